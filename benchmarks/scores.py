"""What recorded lines say: accuracies by cell, differences paired by episode, calibration errors."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from runs import Line
from scipy import stats

__all__ = [
    "Cells",
    "Told",
    "accuracies",
    "best",
    "calibration_bins",
    "calibration_errors",
    "difference",
    "differences",
    "mean",
    "shown",
]

Cells = dict[tuple[str, int], np.ndarray]  # (corpus, shots) -> accuracy of each episode, in percent
Told = tuple[float, float]  # a mean, and half its 95 % interval


def method_of(key: Mapping[str, Any]) -> str:
    """Return what tables call a method; a core method is VARIANT @ ADAPTER."""
    return str(key["method"]) + (f" @ {key['adapter']}" if "adapter" in key else "")


def accuracies(lines: Sequence[Line], measure: str = "accuracy") -> dict[str, Cells]:
    """Return of each method its cells. Accuracy and F1 in percent, NLL in nats."""
    parts: dict[tuple[str, str, int], dict[int, np.ndarray]] = {}
    classes: dict[tuple[str, int], tuple[int, str]] = {}
    for line in lines:
        key, result = line["key"], line["result"]
        drawn_from = (key["classes"], key["sha256"])
        if classes.setdefault((key["corpus"], key["shots"]), drawn_from) != drawn_from:
            raise SystemExit(f"{key['corpus']} at {key['shots']} shots was recorded on two versions of the corpus")
        values = 100 * np.array(result["right"]) / np.array(result["queries"])
        if measure != "accuracy":
            values = np.array(result[measure]) / {"nll": 1000, "f1": 10}[measure]
        parts.setdefault((method_of(key), key["corpus"], key["shots"]), {})[key["first"]] = values
    found: dict[str, Cells] = {}
    for (method, corpus, shots), chunks in parts.items():
        whole, at = [], 0
        while at in chunks:  # a gap ends what can be paired
            whole.append(chunks[at])
            at += len(chunks[at])
        if whole:
            found.setdefault(method, {})[corpus, shots] = np.concatenate(whole)
    return found


def calibration_bins(lines: Sequence[Line]) -> dict[tuple[str, int], np.ndarray]:
    """Return (15, 3) of each method at each number of shots: queries, right ones, and the sum of confidences."""
    bins: dict[tuple[str, int], np.ndarray] = {}
    for line in lines:
        if "bins" in line["result"]:
            name = (method_of(line["key"]), line["key"]["shots"])
            bins[name] = bins.get(name, 0) + np.array(line["result"]["bins"]) * [1, 1, 0.001]
    return bins


def calibration_errors(lines: Sequence[Line]) -> dict[tuple[str, int], float]:
    """Return the expected calibration error, in percent, of each method at each number of shots."""
    return {
        name: 100 * float(np.abs(part[:, 1] - part[:, 2]).sum() / part[:, 0].sum())
        for name, part in sorted(calibration_bins(lines).items())
    }


def difference(one: Cells, other: Cells, keys: Sequence[tuple[str, int]]) -> Told | None:
    """Return the mean over cells of the paired differences, and half its 95 % interval."""
    pairs = [(one[key], other[key]) for key in keys if key in one and key in other]
    rows = [a[: min(len(a), len(b))] - b[: min(len(a), len(b))] for a, b in pairs]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return None
    error = np.sqrt(sum(row.var(ddof=1) / len(row) for row in rows)) / len(rows)
    freedom = sum(len(row) - 1 for row in rows)
    return float(np.mean([row.mean() for row in rows])), float(stats.t.ppf(0.975, freedom) * error)


def keys_of(cells: Cells, shots: int, corpora: Collection[str] | None = None) -> list[tuple[str, int]]:
    """Return the cells at a number of shots; none, where one of the corpora that are asked for is missing."""
    keys = sorted(key for key in cells if key[1] == shots and (corpora is None or key[0] in corpora))
    return keys if corpora is None or len(keys) == len(corpora) else []


def mean(cells: Cells, shots: int, corpora: Collection[str] | None = None) -> Told | None:
    """Return the mean over the corpora, and half its 95 % interval."""
    keys = keys_of(cells, shots, corpora)
    return difference(cells, {key: np.zeros_like(cells[key]) for key in keys}, keys)


def best(
    found: Mapping[str, Cells], names: Sequence[str], shots: int, corpora: Collection[str] | None = None
) -> str | None:
    """Return which of the methods has the highest mean at a number of shots."""
    means = {name: mean(found[name], shots, corpora) for name in names if name in found}
    return max((name for name in means if means[name]), key=lambda name: means[name] or (0, 0), default=None)


def differences(
    found: Mapping[str, Cells],
    one: str,
    others: Sequence[str],
    shots: Sequence[int],
    corpora: Collection[str] | None = None,
    pooled: Sequence[int] | None = None,
) -> list[Told | None]:
    """Return paired differences at each number of shots, to the best of some others there, and one that is pooled.

    Args:
        found: cells by method.
        one: method.
        others: rivals.
        shots: of the differences.
        corpora: all have to be there; by default those that both have.
        pooled: the numbers of shots that the last one is pooled over, by default all.
    """
    told, ours, theirs = [], {}, {}
    for k in shots:
        rival = best(found, others, k, corpora)
        keys = [key for key in keys_of(found.get(one, {}), k, corpora) if rival and key in found[rival]]
        told.append(difference(found[one], found[rival], keys) if rival and keys else None)
        if k in (pooled or shots):
            ours |= {key: found[one][key] for key in keys}
            theirs |= {key: found[rival or ""][key] for key in keys}
    lacks = corpora is not None and any(
        part is None for k, part in zip(shots, told, strict=True) if k in (pooled or shots)
    )
    return [*told, None if lacks else difference(ours, theirs, list(ours))]


def shown(told: Told | None, sign: str = "+") -> str:
    """Return a figure as tables have it."""
    return "–" if told is None else f"{told[0]:{sign}.2f} ± {told[1]:.2f}"
