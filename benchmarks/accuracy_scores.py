"""What a line of the accuracy benchmark holds of its episodes, and back."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from textmeta.data.episodes import Episode
from textmeta.meta.evaluation import EpisodeScores

__all__ = ["ScopeScores", "Series", "joined", "mean_series", "score", "to_result"]

BINS = 15
PER_EPISODE = ("episode_seconds", "fit_seconds")  # of a result, means over its episodes


def score(probabilities: Sequence[np.ndarray], episodes: Sequence[Episode]) -> EpisodeScores:
    """Score the class probabilities (queries, ways) of each episode; the same numbers as textmeta's own evaluation."""
    accuracy, macro_f1, nll, confidence, correct = [], [], [], [], []
    for rows, episode in zip(probabilities, episodes, strict=True):
        labels, predicted = episode.query_labels, rows.argmax(1)
        right = predicted == labels
        counts = [np.bincount(part, minlength=rows.shape[1]) for part in (labels[right], labels, predicted)]
        accuracy.append(right.mean())
        macro_f1.append((2 * counts[0] / (counts[1] + counts[2])).mean())
        nll.append(-np.log(np.maximum(rows[np.arange(len(labels)), labels], 1e-300)).mean())
        confidence.append(rows.max(1))
        correct.append(right)
    return EpisodeScores(
        np.array(accuracy), np.array(macro_f1), np.array(nll), np.concatenate(confidence), np.concatenate(correct)
    )


def to_result(scores: EpisodeScores) -> dict[str, Any]:
    """Return, as JSON takes it, each episode's right answers, NLL and macro-F1 (thousandths), and the bins of ECE."""
    queries = len(scores.correct) // len(scores.accuracy)
    bin_of = np.minimum((scores.confidence * BINS).astype(int), BINS - 1)
    return {
        "queries": queries,
        "right": [round(queries * value) for value in scores.accuracy],
        "nll": _thousandths(scores.nll),
        "f1": _thousandths(scores.macro_f1),
        "bins": {
            "count": np.bincount(bin_of, minlength=BINS).tolist(),
            "confidence": np.bincount(bin_of, scores.confidence, minlength=BINS).round(4).tolist(),
            "correct": np.bincount(bin_of, scores.correct, minlength=BINS).astype(int).tolist(),
        },
    }


def joined(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result of two results' episodes one after the other; what is told beside scores is the second's.

    A measure of episodes that the first has not is left out.
    """
    counts = [len(next(value for value in part.values() if isinstance(value, list))) for part in (first, second)]
    found = dict(second)
    for name, value in second.items():
        if name not in first and (isinstance(value, list) or name in PER_EPISODE):
            del found[name]
        elif isinstance(value, list):
            found[name] = first[name] + value
        elif name in PER_EPISODE:
            found[name] = round(float(np.average([first[name], value], weights=counts)), 4)
        elif name == "bins":
            found[name] = {of: np.add(first[name][of], rows).round(4).tolist() for of, rows in value.items()}
    return found


@dataclass(frozen=True)
class ScopeScores:
    """How well E episodes told texts of their classes from others; in scope is positive.

    Args:
        auroc: (E,) area under the receiver operating characteristic.
        aupr: (E,) average precision.
        fpr95: (E,) share of the outside texts taken for in scope, where 95 % of those in scope are.
        accuracy: (E,) of probabilities at 0.5; None where scores are no probability to be in scope.
    """

    auroc: np.ndarray
    aupr: np.ndarray
    fpr95: np.ndarray
    accuracy: np.ndarray | None = None

    def to_result(self) -> dict[str, Any]:
        """Return, as JSON takes it, each episode's measures in thousandths."""
        return {name: _thousandths(value) for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Series:
    """Scores of E episodes of one cell, in the order of the episodes.

    Args:
        accuracy: (E,) shares.
        macro_f1: (E,).
        nll: (E,) nats.
        bins: (3, 15) count, sum of confidences and number correct of each bin.
    """

    accuracy: np.ndarray
    macro_f1: np.ndarray
    nll: np.ndarray
    bins: np.ndarray

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> "Series":
        """Read what :func:`to_result` made."""
        bins = np.array([result["bins"][name] for name in ("count", "confidence", "correct")], dtype=float)
        right, f1, nll = (np.array(result[name], dtype=float) for name in ("right", "f1", "nll"))
        return cls(right / result["queries"], f1 / 1000, nll / 1000, bins)

    @property
    def ece(self) -> float:
        """Expected calibration error of all queries."""
        return float(np.abs(self.bins[1] - self.bins[2]).sum() / self.bins[0].sum())

    @classmethod
    def joined(cls, parts: Iterable["Series"]) -> "Series":
        """Return the episodes of several cells (folds) one after the other."""
        parts = list(parts)
        return cls(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("accuracy", "macro_f1", "nll")),
            np.sum([part.bins for part in parts], axis=0),
        )


def mean_series(parts: Sequence[Series]) -> Series:
    """Return the mean over training seeds, episode by episode, of those that all have; of all ECE's bins the sums."""
    count = min(len(part.accuracy) for part in parts)
    return Series(
        *(np.mean([getattr(part, name)[:count] for part in parts], axis=0) for name in ("accuracy", "macro_f1", "nll")),
        np.sum([part.bins for part in parts], axis=0),
    )


def _thousandths(values: np.ndarray) -> list[int]:
    return [round(1000 * float(value)) for value in values]
