"""What recorded lines say: accuracies by cell, differences paired by episode, calibration errors; tables of them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from runs import Line
from scipy import stats

Cells = dict[tuple[str, int], np.ndarray]  # (corpus, shots) -> accuracy of each episode, in percent
Told = tuple[float, float]  # a mean, and half its 95 % interval
Rows = list[list[str]]  # of a table, its head first


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


def mean(cells: Cells, shots: int, corpora: Collection[str] | None = None) -> Told | None:
    """Return the mean over corpora, by default those that there are, and half its 95 % interval; None if one lacks."""
    keys = _keys(cells, shots, corpora)
    return difference(cells, {key: np.zeros_like(cells[key]) for key in keys}, keys)


def _keys(cells: Cells, shots: int, corpora: Collection[str] | None) -> list[tuple[str, int]]:
    keys = sorted(key for key in cells if key[1] == shots and (corpora is None or key[0] in corpora))
    return keys if corpora is None or len(keys) == len(corpora) else []


def best(found: Mapping[str, Cells], names: Sequence[str], shots: int, corpora: Collection[str] | None = None) -> Cells:
    """Return the cells of that method which has the highest mean at a number of shots."""
    means = {name: mean(found.get(name, {}), shots, corpora) for name in names}
    there = {name: told[0] for name, told in means.items() if told}
    return found[max(there, key=lambda name: there[name])] if there else {}


def differences(
    found: Mapping[str, Cells],
    one: str,
    others: Sequence[str],
    shots: Sequence[int],
    corpora: Collection[str] | None = None,
    pooled: Sequence[int] | None = None,
) -> list[Told | None]:
    """Return paired differences at each number of shots, to the best of some others there, and one that is pooled.

    Of corpora that are named all have to be there; else those count that both have. The last is over the numbers of
    shots in ``pooled``, by default all.
    """
    told, ours, theirs = {}, {}, {}
    for k in shots:
        rival = best(found, others, k, corpora)
        keys = [key for key in _keys(found.get(one, {}), k, corpora) if key in rival]
        told[k] = difference(found.get(one, {}), rival, keys)
        if k in (pooled or shots):
            ours |= {key: found[one][key] for key in keys}
            theirs |= {key: rival[key] for key in keys}
    lacks = corpora is not None and not all(told[k] for k in pooled or shots)
    return [*told.values(), None if lacks else difference(ours, theirs, list(ours))]


# Tables


def shown(told: Told | None, sign: str = "+") -> str:
    """Return a figure as tables have it."""
    return "–" if told is None else f"{told[0]:{sign}.2f}±{told[1]:.2f}"


def heads(shots: Sequence[int], *more: str) -> list[str]:
    """Return the head of a table over numbers of shots."""
    return ["", *(f"{k} shot{'s' * (k != 1)}" for k in shots), *more]


def mean_rows(
    found: Mapping[str, Cells], methods: Mapping[str, str], shots: Sequence[int], corpora: Collection[str] | None = None
) -> Rows:
    """Return the means of methods, by their titles, and how many corpora and, at least, episodes they are of."""
    table = [heads(shots, "corpora x episodes")]
    for title, method in methods.items():
        own = {key: row for key, row in found.get(method, {}).items() if corpora is None or key[0] in corpora}
        size = f"{len({corpus for corpus, _ in own})} x {min(map(len, own.values()))}" if own else "–"
        table.append([title, *(shown(mean(own, k, corpora), "") for k in shots), size])
    return table


def corpus_rows(
    found: Mapping[str, Cells],
    sides: Mapping[str, tuple[str, Sequence[str]]],
    shots: Sequence[int],
    corpora: Sequence[str],
) -> Rows:
    """Return by corpus the accuracies of methods, by title, and differences to their best rivals; ! is wholly below -1.

    Which rival is the best is told by the mean over all corpora.
    """
    table = [["", *(f"{title}, {head}" for title in sides for head in heads(shots)[1:])]]
    for corpus in corpora:
        row = [corpus]
        for (method, rivals), k in ((side, k) for side in sides.values() for k in shots):
            own = found.get(method, {})
            told = difference(own, best(found, rivals, k), [(corpus, k)])
            below = "!" if told and sum(told) < -1 else ""
            row.append("–" if told is None else f"{own[corpus, k].mean():.1f} ({told[0]:+.1f}±{told[1]:.1f}){below}")
        table.append(row)
    return table


GOALS = ["wanted", "at least", "found", ""]


def goal_row(title: str, told: Told | None, least: float, end: int = 0) -> list[str]:
    """Return whether the mean, or the lower (-1) or the upper end (1) of an interval, is at least a number."""
    lacks = None if told is None else least - (told[0] + end * told[1])
    verdict = "not run yet" if lacks is None else "met" if lacks <= 0 else f"missed by {lacks:.2f}"
    return [title, f"{('mean', 'upper end', 'lower end')[end]} {least:+.1f}", shown(told), verdict]


def missed(goals: Rows) -> Rows:
    """Return the goals that are not met, and how many others are."""
    left = [row for row in goals[1:] if row[3] != "met"]
    return [goals[0], *left, [f"{len(goals) - 1 - len(left)} others", "", "", "met"]]
