"""The episodes that methods are compared on: cells of corpora, the same for every method and version.

Version 0.1 of textmeta reads this file, too.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from textmeta.data.corpus import Corpus, CorpusSettings, load_corpus
from textmeta.data.episodes import Episode, EpisodeSampler, EpisodeSettings
from textmeta.data.labels import readable_name

WAYS, QUERIES, SHOTS, EPISODE_SEED = 5, 5, (1, 2, 5, 10), 2
BINS = 15  # of equal width, for the expected calibration error
UNLABELLED_DRAW = 2  # third number of the seed unlabelled texts are drawn by: the sampler's own seeds have two
OTHER_DRAWS = 3  # likewise of wrong names
# Corpora to report by: those that the design was not looked for on, then all, those with long texts last.
HEADLINE = ("app_review_type", "arxiv_category", "atis", "cr", "liar_subject", "sst5", "subj")
REPORT = (*HEADLINE, "trec6", "tweeteval_emotion", "huffpost", "github_issue_type", "20news")


@dataclass(frozen=True)
class Cell:
    """A corpus at a number of shots, with the classes that have enough rows for it."""

    corpus: Corpus  # restricted to those classes
    shots: int  # support examples of a class
    ways: int = WAYS  # of an episode; of a corpus with fewer classes, all

    @cached_property
    def _sampler(self) -> EpisodeSampler:
        ways = min(self.ways, len(self.corpus.class_names))
        return EpisodeSampler(self.corpus, EpisodeSettings(ways, self.shots, QUERIES), EPISODE_SEED)

    def episode(self, number: int) -> Episode:
        """Return episode ``number``: a pure function of corpus, classes, ways, shots and number."""
        return self._sampler[number]

    def key(self, method: str, first: int, count: int) -> dict[str, Any]:
        """Return what a line of results is known by."""
        classes = len(self.corpus.class_names)
        return {
            "method": method,
            "corpus": self.corpus.name,
            "classes": classes,
            "sha256": self.corpus.sha256[:12],
            **({} if self.ways == WAYS else {"ways": min(self.ways, classes)}),
            "shots": self.shots,
            "first": first,
            "episodes": count,
        }


def choose_corpora(data_dir: Path, names: Sequence[str] | None = None) -> list[Corpus]:
    """Load the corpora that designs are chosen by, ``choose/NAME.jsonl`` of a data folder; by default all."""
    paths = sorted(path for path in (data_dir / "choose").glob("*.jsonl") if not names or path.stem in names)
    if not paths:
        raise SystemExit(f"{data_dir / 'choose'} has no corpus NAME.jsonl" + (f" of {names}" if names else ""))
    return [load_corpus(CorpusSettings(str(path))) for path in paths]


def report_corpora(data_dir: Path, names: Sequence[str] = REPORT) -> Iterator[Corpus]:
    """Load the corpora to report by, ``report/NAME.jsonl`` or ``NAME.jsonl`` of a data folder."""
    for name in names:
        own = data_dir / "report" / f"{name}.jsonl"
        yield load_corpus(CorpusSettings(str(own if own.exists() else data_dir / own.name)))


def cells_of(corpora: Iterable[Corpus], shots: Sequence[int] = SHOTS, ways: int = WAYS) -> Iterator[Cell]:
    """Yield every cell that has at least two classes of k + 5 different texts."""
    for corpus in corpora:
        for k in shots:
            names = [
                name for number, name in enumerate(corpus.class_names) if len(corpus.rows_of(number)) >= k + QUERIES
            ]
            if len(names) >= 2:
                yield Cell(corpus.restrict(names), k, ways)


# Variants of an episode: with names, right or wrong, without examples, with unlabelled texts


def true_names(episode: Episode) -> Episode:
    """Return an episode with the names of its classes."""
    return replace(episode, label_names=tuple(map(readable_name, episode.class_names)))


def permuted(episode: Episode, cell: Cell, number: int) -> Episode:
    """Return an episode with the names of its classes in another order: each class has another's name."""
    rng = np.random.default_rng((EPISODE_SEED, number, OTHER_DRAWS))
    cycle = rng.permutation(episode.ways)
    names = [""] * episode.ways
    for own, other in zip(cycle, np.roll(cycle, 1), strict=True):
        names[own] = readable_name(episode.class_names[other])
    return replace(episode, label_names=tuple(names))


def codes(episode: Episode, cell: Cell, number: int) -> Episode:
    """Return an episode whose classes have random codes of three letters for names."""
    rng = np.random.default_rng((EPISODE_SEED, number, OTHER_DRAWS))
    names = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 3)) for _ in range(episode.ways)]
    return replace(episode, label_names=tuple(names))


def without_examples(episode: Episode) -> Episode:
    """Return an episode without a support set."""
    return replace(episode, support_texts=(), support_labels=episode.support_labels[:0])


def unlabelled(mixture: str) -> Callable[[Episode, Cell, int], Episode]:
    """Return what adds unlabelled texts to an episode."""
    return lambda e, cell, number: with_unlabelled(e, cell.corpus, EPISODE_SEED, number, mixture=mixture)


VARIANTS: Mapping[str, Callable[[Episode, Cell, int], Episode]] = {
    "plain": lambda e, cell, number: e,
    "names": lambda e, cell, number: true_names(e),
    "permuted": permuted,
    "codes": codes,
    "unlabelled": unlabelled("same"),
    "unlabelled-skewed": unlabelled("skewed"),
    "unlabelled-others": unlabelled("others"),
    "names-unlabelled": lambda e, cell, number: true_names(unlabelled("same")(e, cell, number)),
    "names-unlabelled-skewed": lambda e, cell, number: true_names(unlabelled("skewed")(e, cell, number)),
    "names-unlabelled-others": lambda e, cell, number: true_names(unlabelled("others")(e, cell, number)),
    "names-alone": lambda e, cell, number: true_names(without_examples(e)),
    "names-alone-unlabelled": lambda e, cell, number: without_examples(VARIANTS["names-unlabelled"](e, cell, number)),
}


def with_unlabelled(
    episode: Episode, corpus: Corpus, seed: int, number: int, per_class: int = 15, mixture: str = "same"
) -> Episode:
    """Return an episode with unlabelled texts of its corpus, a pure function of the arguments.

    They are drawn from the rows whose texts are in neither the support nor the query set, and shuffled; what
    ``per_class`` and the mixture mean, :func:`~textmeta.data.mixed_episodes.draw_unlabelled` says.
    """
    from textmeta.data.mixed_episodes import draw_unlabelled  # noqa: PLC0415 - 0.1 has none

    index = {name: label for label, name in enumerate(corpus.class_names)}
    taken = {*episode.support_texts, *episode.query_texts}

    def left(name: str) -> np.ndarray:
        rows = np.array([row for row in corpus.rows_of(index[name]) if corpus.texts[row] not in taken], dtype=np.int64)
        taken.update(corpus.texts[row] for row in rows)  # a text that has two classes may be drawn only once
        return rows

    pools = [left(name) for name in episode.class_names]
    others = np.empty(0, dtype=np.int64)
    if mixture == "others":
        others = np.concatenate([others, *(left(name) for name in index if name not in episode.class_names)])
        assert others.size, f"{corpus.name} has no text of a class other than the episode's"
    rows = draw_unlabelled(np.random.default_rng((seed, number, UNLABELLED_DRAW)), pools, others, per_class, mixture)
    return replace(episode, unlabelled_texts=tuple(corpus.texts[row] for row in rows))


def result_of(probabilities: Sequence[np.ndarray], episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return, as JSON takes it, each episode's right answers and queries, mean NLL and macro-F1 (thousandths).

    And of all together, for each bin of confidence: queries, right ones, and the sum of confidences (thousandths).
    """
    right, queries, nll, f1 = [], [], [], []
    bins = np.zeros((BINS, 3))
    for rows, episode in zip(probabilities, episodes, strict=True):
        labels, predicted = episode.query_labels, rows.argmax(1)
        hit = predicted == labels
        counts = [np.bincount(part, minlength=rows.shape[1]) for part in (labels[hit], labels, predicted)]
        right.append(int(hit.sum()))
        queries.append(len(labels))
        own = rows[np.arange(len(labels)), labels]
        nll.append(round(1000 * float(-np.log(np.maximum(own, 1e-300)).mean())))
        f1.append(round(1000 * float((2 * counts[0] / np.maximum(counts[1] + counts[2], 1)).mean())))
        sure = rows.max(1)
        np.add.at(bins, np.minimum(sure * BINS, BINS - 1).astype(int), np.stack([np.ones_like(sure), hit, sure], 1))
    bins[:, 2] *= 1000
    return {"right": right, "queries": queries, "nll": nll, "f1": f1, "bins": bins.round().astype(int).tolist()}
