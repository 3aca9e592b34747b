"""Evaluation: episodes to accuracy, macro-F1, NLL and calibration error, with intervals and paired differences."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from textmeta.data.episodes import OUTSIDE, Episode
from textmeta.encoder.token_states import TokenStateReader
from textmeta.errors import DataError, DivergedError, SettingsError, TextMetaError
from textmeta.heads.pooling import pool, to_length_one
from textmeta.meta.learner import TaskLearner
from textmeta.meta.plan import is_memory_full
from textmeta.processes import shared_out
from textmeta.progress import progress_bar

TASKS_AT_ONCE, TEXTS_AT_ONCE = 8, 512  # so that memory stays bounded; a task of more texts is learned alone
R = TypeVar("R")
COSINE_SCALE = 10.0  # what frozen prototypes' cosines are multiplied by to become logits


@dataclass(frozen=True)
class EpisodeScores:
    """Scores of E episodes with Q queries in all; those of no class of their episode are not among them."""

    accuracy: np.ndarray  # (E,) share of an episode's queries classified right
    macro_f1: np.ndarray  # (E,) mean over its classes of F1
    nll: np.ndarray  # (E,) mean negative log-likelihood of the true class, in nats
    confidence: np.ndarray  # (Q,) probability of the predicted class
    correct: np.ndarray  # (Q,) bool, whether it is the true one


def score_episodes(
    learner: TaskLearner, episodes: Sequence[Episode], progress: str | None = None, *, together: bool = False
) -> EpisodeScores:
    """Learn the task of each episode and score its queries, several tasks at once; ``progress`` labels a bar.

    Queries of no class of their episode are left out. The processes of a run may do it ``together``; then all get all
    scores. DataError if there are no episodes, or one has no other query.
    """
    return _score(lambda part: learner.answer_episodes(part).logits, episodes, progress, together)


def frozen_prototypes(
    reader: TokenStateReader, episodes: Sequence[Episode], progress: str | None = None, *, together: bool = False
) -> EpisodeScores:
    """Score what needs no training: cosines to the class means of the frozen encoder's last layer, mean pooled.

    A name, where an episode has them, is one more example of its class. For the rest see :func:`score_episodes`.
    """
    encoder = reader.encoder
    if reader.layers[-1] != encoder.total_layers:
        reader = TokenStateReader(encoder, [encoder.total_layers])
    mean = torch.zeros(reader.views, encoder.hidden_size, device=encoder.device)

    def logits_of(part: Sequence[Episode]) -> Iterator[Tensor]:
        for e in part:
            names = e.label_names or ()
            labels = torch.tensor([*e.support_labels.tolist(), *range(len(names))], device=encoder.device)
            views = pool(reader.read([*e.support_texts, *names, *e.query_texts]), mean)[:, -1]
            sums = views.new_zeros(e.ways, views.shape[1]).index_add(0, labels, views[: len(labels)])
            yield COSINE_SCALE * views[len(labels) :] @ to_length_one(sums).T

    return _score(logits_of, episodes, progress, together)


def summary(scores: EpisodeScores) -> dict[str, float | int]:
    """Return mean accuracy, the half-width of its 95 % interval (Student's t over episodes), macro-F1, NLL and ECE."""
    return {
        "episodes": len(scores.accuracy),
        "accuracy": float(scores.accuracy.mean()),
        "accuracy_ci95": half_width(scores.accuracy),
        "macro_f1": float(scores.macro_f1.mean()),
        "nll": float(scores.nll.mean()),
        "ece": _calibration_error(scores.confidence, scores.correct),
    }


def paired_difference(after: EpisodeScores, before: EpisodeScores) -> dict[str, float]:
    """Return the mean ``difference`` of accuracy on the same episodes; ``low`` and ``high`` of its 95 % interval."""
    if len(after.accuracy) != len(before.accuracy):
        raise DataError(f"cannot pair {len(after.accuracy)} episodes with {len(before.accuracy)}")
    gain = after.accuracy - before.accuracy
    mean, half = float(gain.mean()), half_width(gain)
    return {"difference": mean, "low": mean - half, "high": mean + half}


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table, in percent but for NLL, of the :func:`summary` of each name; ``paired`` may be in it, too."""
    rows: list[tuple[str, ...]] = [("", "accuracy", "macro-F1", "NLL", "ECE", "difference, paired 95 %")]
    for name, result in results.items():
        accuracy, half, f1, ece = (100 * result[key] for key in ("accuracy", "accuracy_ci95", "macro_f1", "ece"))
        paired = [100 * result["paired"][key] for key in ("difference", "low", "high")] if "paired" in result else []
        difference = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*paired) if paired else ""
        scores = (f"{accuracy:.2f} ± {half:.2f}", f"{f1:.2f}", f"{result['nll']:.2f}", f"{ece:.2f}")
        rows.append((name, *scores, difference))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


def _score(
    logits_of: Callable[[Sequence[Episode]], Iterable[Tensor]],
    episodes: Sequence[Episode],
    progress: str | None,
    together: bool,
) -> EpisodeScores:
    if not episodes:
        raise DataError("no episodes to score")
    parts = by_parts(lambda part: [*map(_scores_of, part, logits_of(part))], episodes, progress, together)
    return EpisodeScores(*map(np.hstack, zip(*chain(*parts), strict=True)))


@torch.no_grad()
def by_parts(
    work: Callable[[Sequence[Episode]], R], episodes: Sequence[Episode], progress: str | None, together: bool
) -> list[R]:
    """Return what ``work`` makes of each of the :func:`in_parts`; processes may share them out, and all get all."""

    def every(parts: Sequence[Sequence[Episode]]) -> list[R]:
        found = []
        with progress_bar(sum(map(len, parts)), progress, "episode") as bar:
            for part in parts:
                try:
                    found.append(work(part))
                except (RuntimeError, MemoryError) as error:
                    if told := _told(error, part):
                        raise told from error
                    raise
                bar.update(len(part))
        return found

    parts = list(in_parts(episodes))
    return shared_out(every, parts) if together else every(parts)


def _told(error: Exception, part: Sequence[Episode]) -> TextMetaError | None:
    """Return what tells an error on some episodes in our words, if these have caused it."""
    where = f"{len(part)} episodes of {', '.join(sorted({e.corpus for e in part}))}"
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return DivergedError(f"scoring {where}: no finite solution ({error!s:.200})")
    if is_memory_full(error):
        texts = sum(len(e.support_texts + e.unlabelled_texts + e.query_texts) for e in part)
        return SettingsError(f"scoring {where}: the memory is too small for {texts} texts ({error!s:.200})")
    return None


def in_parts(episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
    """Yield episodes in groups that are small enough to be learned at once."""
    part: list[Episode] = []
    for episode in episodes:
        texts = sum(len(e.support_texts + e.unlabelled_texts + e.query_texts) + e.ways for e in [*part, episode])
        if part and (len(part) == TASKS_AT_ONCE or texts > TEXTS_AT_ONCE):
            yield part
            part = []
        part.append(episode)
    if part:
        yield part


def _scores_of(episode: Episode, logits: Tensor) -> tuple[Any, ...]:
    from sklearn.metrics import f1_score  # noqa: PLC0415 - takes a second, which a plan need not wait

    own = np.flatnonzero(episode.query_labels != OUTSIDE)
    if not own.size:
        raise DataError(f"corpus {episode.corpus!r}: an episode has no query of its classes, so nothing can be scored")
    labels = episode.query_labels[own]
    logs = logits[own, : episode.ways].cpu().double().log_softmax(-1).numpy()  # without padding
    predicted, nll = logs.argmax(1), -logs[np.arange(len(own)), labels].mean()
    f1 = f1_score(labels, predicted, average="macro", zero_division=0.0)
    return (predicted == labels).mean(), f1, nll, np.exp(logs.max(1)), predicted == labels


def half_width(values: np.ndarray) -> float:
    """Return the half-width of the 95 % interval of a mean (Student's t); DataError of fewer than two values."""
    if len(values) < 2:
        raise DataError(f"an interval needs at least 2 episodes, given {len(values)}")
    from scipy.stats import t as students_t  # noqa: PLC0415 - likewise

    return float(students_t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))


def _calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Return the expected calibration error of Guo et al. (2017), eq. 3, with 15 bins of equal width."""
    bin_of = np.minimum((confidence * 15).astype(int), 14)
    return float(np.abs(np.bincount(bin_of, confidence - correct)).sum() / len(confidence))
