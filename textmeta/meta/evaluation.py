"""Evaluation: episodes to accuracy, macro-F1, NLL and ECE with confidence intervals, and paired differences."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor
from tqdm import tqdm

from textmeta.data.episodes import Episode
from textmeta.errors import DataError
from textmeta.meta.adaptation import (
    adapt,
    embed_tasks,
    query_logits,
    start_parameters,
    task_weights,
    unadapted,
)
from textmeta.meta.inner_loop import InnerLoopSettings
from textmeta.meta.shared_features import SharedFeatures
from textmeta.meta.strengths import best_start
from textmeta.meta.tasks import query_batch, support_batch
from textmeta.model.encoder import Encoder
from textmeta.model.heads import class_mask

__all__ = [
    "EpisodeScores",
    "compare_with_frozen",
    "format_table",
    "frozen_prototypes",
    "paired_difference",
    "score_episodes",
    "summary",
]

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution
TASKS_AT_ONCE = 8


@dataclass(frozen=True)
class EpisodeScores:
    """Scores of E episodes with Q queries in all.

    Args:
        accuracy: (E,) share of an episode's queries classified right.
        macro_f1: (E,) mean over its classes of F1.
        nll: (E,) mean negative log-likelihood of the true class, in nats.
        confidence: (Q,) probability of the predicted class.
        correct: (Q,) bool, whether it is the true one.
    """

    accuracy: np.ndarray
    macro_f1: np.ndarray
    nll: np.ndarray
    confidence: np.ndarray
    correct: np.ndarray


def score_episodes(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    progress: str | None = None,
    shared: SharedFeatures | None = None,
) -> EpisodeScores:
    """Adapt to each episode's support set and score its query set.

    Args:
        encoder: makes features.
        parameters: the initialisation.
        episodes: E episodes.
        inner: what the task learner does.
        progress: label of a progress bar; None shows none.
        shared: features of this encoder and these parameters that are known already; those of the episodes are added.

    Raises:
        DataError: if there are no episodes.
    """
    if not episodes:
        raise DataError("no episodes to score")
    probabilities: dict[int, np.ndarray] = {}
    with torch.no_grad(), tqdm(total=len(episodes), desc=progress, unit="episode", disable=progress is None) as bar:
        for indices, logits in _all_logits(encoder, parameters, episodes, inner, shared):
            for index, task_logits in zip(indices, logits, strict=True):
                own = task_logits[: len(episodes[index].query_labels), : episodes[index].ways]
                probabilities[index] = own.double().softmax(-1).cpu().numpy()
            bar.update(len(indices))
    rows = [_episode_scores(probabilities[i], episode.query_labels) for i, episode in enumerate(episodes)]
    accuracy, macro_f1, nll, confidence, correct = zip(*rows, strict=True)
    return EpisodeScores(
        np.array(accuracy), np.array(macro_f1), np.array(nll), np.concatenate(confidence), np.concatenate(correct)
    )


def frozen_prototypes(encoder: Encoder, episodes: Sequence[Episode], progress: str | None = None) -> EpisodeScores:
    """Score the baseline: prototypes of the frozen encoder's features, nothing learned, nothing adapted."""
    inner = InnerLoopSettings(steps=0)
    start = start_parameters(encoder.factor_shapes, inner, encoder.hidden_size)
    start = {name: value.to(encoder.device) for name, value in start.items()}
    return score_episodes(encoder, start, episodes, inner, progress)


def summary(scores: EpisodeScores) -> dict[str, float | int]:
    """Return mean accuracy, its 95 % interval's half-width, macro-F1, NLL and ECE (15 bins)."""
    return {
        "episodes": len(scores.accuracy),
        "accuracy": float(scores.accuracy.mean()),
        "accuracy_ci95": _half_width(scores.accuracy),
        "macro_f1": float(scores.macro_f1.mean()),
        "nll": float(scores.nll.mean()),
        "ece": expected_calibration_error(scores.confidence, scores.correct),
    }


def paired_difference(after: EpisodeScores, before: EpisodeScores) -> dict[str, float]:
    """Return the mean difference of accuracy and its 95 % interval, paired by episode.

    Raises:
        DataError: if the two were not scored on as many episodes.
    """
    if len(after.accuracy) != len(before.accuracy):
        raise DataError(f"cannot pair {len(after.accuracy)} episodes with {len(before.accuracy)}")
    difference = after.accuracy - before.accuracy
    mean, half = float(difference.mean()), _half_width(difference)
    return {"difference": mean, "low": mean - half, "high": mean + half}


def compare_with_frozen(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    progress: str | None = None,
) -> dict[str, dict[str, float | int]]:
    """Score an initialisation and frozen prototypes on the same episodes.

    Returns:
        ``{"frozen": summary, "meta_trained": summary, "paired": paired difference of accuracy}``.
    """
    before = frozen_prototypes(encoder, episodes, progress and f"{progress}, frozen")
    after = score_episodes(encoder, parameters, episodes, inner, progress and f"{progress}, meta-trained")
    return {"frozen": summary(before), "meta_trained": summary(after), "paired": dict(paired_difference(after, before))}


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Return the expected calibration error of Guo et al. (2017), eq. 3, with bins of equal width."""
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(bin_of, confidence - correct, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return results as a table: one row per setting, frozen and meta-trained accuracy and their paired difference.

    Args:
        results: setting to ``{"frozen": summary, "meta_trained": summary, "paired": paired difference}``.
    """
    head = ("", "frozen prototypes", "meta-trained", "difference, paired 95 %", "macro-F1", "NLL", "ECE")
    rows: list[tuple[str, ...]] = [head]
    for name, result in results.items():
        before, after, paired = result["frozen"], result["meta_trained"], result["paired"]
        rows.append(
            (
                name,
                *(f"{100 * part['accuracy']:.2f} ± {100 * part['accuracy_ci95']:.2f}" for part in (before, after)),
                f"{100 * paired['difference']:+.2f} [{100 * paired['low']:+.2f}, {100 * paired['high']:+.2f}]",
                *(f"{scale * before[key]:.2f} → {scale * after[key]:.2f}" for key, scale in _OTHER_COLUMNS),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-+-".join("-" * width for width in widths), *lines[1:]])


_OTHER_COLUMNS = (("macro_f1", 100), ("nll", 1), ("ece", 100))


def _all_logits(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    shared: SharedFeatures | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield numbers of episodes and their padded logits."""
    own_start = inner.conditioning is not None and inner.conditioning.start != "none"
    adapting = [i for i, e in enumerate(episodes) if own_start or (inner.steps and _can_learn(e))]
    yield from _unadapted_logits(
        encoder, parameters, episodes, inner, sorted(set(range(len(episodes))) - set(adapting)), shared
    )
    for start in range(0, len(adapting), TASKS_AT_ONCE):
        indices = adapting[start : start + TASKS_AT_ONCE]
        part = [episodes[index] for index in indices]
        support = support_batch(encoder, part)
        adapted = adapt(encoder, parameters, support, inner)
        weights = task_weights(encoder, adapted, support)
        yield indices, query_logits(encoder, adapted, weights, query_batch(encoder, part))


def _can_learn(episode: Episode) -> bool:
    """Whether any class has two examples, or an example and a name."""
    rows = [*episode.support_labels, *(range(episode.ways) if episode.label_names else ())]
    return bool(np.bincount(rows).max() > 1)


def _unadapted_logits(
    encoder: Encoder,
    parameters: Mapping[str, Tensor],
    episodes: Sequence[Episode],
    inner: InnerLoopSettings,
    indices: Sequence[int],
    shared: SharedFeatures | None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Do the same where no step is taken (:class:`~textmeta.meta.shared_features.SharedFeatures`)."""
    if shared is None:
        shared = SharedFeatures(encoder, parameters, (), inner.strengths)
    shared.add([episodes[index] for index in indices])
    for index in indices:
        support, features, queries = shared.task(episodes[index])
        conditions = None
        if inner.conditioning is not None and inner.conditioning.decides:  # the temperature may be the task's own
            conditions = embed_tasks(encoder, parameters, support_batch(encoder, [episodes[index]]), inner)
        start = unadapted(parameters, support, inner, encoder.hidden_size, conditions)
        best, start = best_start(start, list(features[:, None]), support, parameters)
        weights = task_weights(encoder, start, support)
        yield [index], start.head.logits(queries[best], weights, start.scalars, class_mask(support.ways))


def _episode_scores(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float, np.ndarray, np.ndarray]:
    predicted = probabilities.argmax(1)
    correct = predicted == labels
    f1 = f1_score(labels, predicted, average="macro", zero_division=0.0)
    nll = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean()
    return correct.mean(), f1, nll, probabilities.max(1), correct


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        raise DataError(f"an interval needs at least 2 episodes, given {len(values)}")
    return float(Z95 * values.std(ddof=1) / np.sqrt(len(values)))
