"""The tables of the task-embedding experiment, from the lines of its results file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from task_corpora import TRAINED, UNSEEN

__all__ = ["print_tables"]

Z95 = 1.96
Line = Mapping[str, Any]
STAGES = (("start, 1 shot", 1, "start"), ("start, 5 shots", 5, "start"), ("adapted, 5 shots", 5, "adapted"))
GROUPS = (("held-out classes", TRAINED), ("unseen corpora", UNSEEN))


def print_tables(lines: Sequence[Line]) -> None:
    """Print a table of every part that has lines."""
    for part, make in (("choose", _choosing), ("report", _report), ("retrieval", _retrieval), ("transfer", _transfer)):
        own = [line for line in lines if line["key"]["part"] == part]
        if own:
            seconds = sum(line["seconds"] for line in own)
            print(f"\n## {part} ({len(own)} runs, {seconds / 60:.0f} minutes)\n")
            make(own)


def _choosing(lines: Sequence[Line]) -> None:
    """Each variant on the corpora left out: true embedding against another corpus's, and against none."""
    rows = []
    for variant in dict.fromkeys(line["key"]["variant"] for line in lines):
        own = [line for line in lines if line["key"]["variant"] == variant]
        for stage, shots, when in STAGES:
            cells = [line["result"][f"{line['key']['left_out']} {shots}"] for line in own]
            row = [f"{variant} ({len(own)})", stage, f"{100 * _of(cells, _accuracy, 'true', when).mean():.2f}"]
            for score, scale, digits in ((_accuracy, 100, 2), (_nll, 1, 3)):
                true = _of(cells, score, "true", when)
                row += [
                    _difference([true - _of(cells, score, arm, when)], scale, digits) for arm in ("between", "mean")
                ]
            rows.append(row)
    over = ("over another corpus's embedding", "over none")
    _print(("variant (corpora)", "", "accuracy", *over, *(f"NLL {title}" for title in over)), rows)


def _of(cells: Sequence[Mapping[str, Any]], score: Callable[..., np.ndarray], arm: str, when: str) -> np.ndarray:
    return np.concatenate([score(cell, arm, when) for cell in cells])


def _report(lines: Sequence[Line]) -> None:
    """All arms: accuracy, and what the true embedding has over each control, paired by episode, mean over seeds."""
    by_variant: dict[str, list[Line]] = {}
    for line in lines:
        by_variant.setdefault(line["key"]["variant"], []).append(line)
    arms = [
        ("true embedding", "banks", "true"),
        ("swapped within the corpus", "banks", "within"),
        ("swapped between corpora", "banks", "between"),
        ("mean of the bank", "banks", "mean"),
        ("swapped in training", "banks, swapped in training", "true"),
        ("one bank of the same size", "one bank of the same size", "mean"),
        ("no meta-training", "not trained", "mean"),
    ]
    for group, corpora in GROUPS:
        rows = []
        for title, variant, arm in arms:
            row = [title]
            for _, shots, when in STAGES:
                cells = [f"{name} {shots}" for name in corpora]
                if variant not in by_variant or "banks" not in by_variant:
                    row += ["", ""]
                    continue
                true = _over_seeds(by_variant["banks"], cells, "true", when, _accuracy)
                right = _over_seeds(by_variant[variant], cells, arm, when, _accuracy)
                nll = _over_seeds(by_variant[variant], cells, arm, when, _nll)
                row.append(f"{100 * right.mean():.2f}, {nll.mean():.3f}")
                row.append("" if row[0] == "true embedding" else _difference([true - right]))
            rows.append(row)
        print(f"\n{group}\n")
        head = ["arm"]
        for stage, _, _ in STAGES:
            head += [f"{stage}: accuracy, NLL", "true embedding over it"]
        _print(head, rows)
        _temperature(by_variant, corpora)
    _per_corpus(by_variant)


def _temperature(by_variant: Mapping[str, Sequence[Line]], corpora: Sequence[str]) -> None:
    """What a temperature of the task's own does to the NLL, paired by episode."""
    lines = by_variant.get("own temperature")
    if not lines:
        return
    rows = []
    for title, arm in (("swapped between corpora", "between"), ("one temperature for all", "mean")):
        row = [title]
        for _, shots, when in STAGES:
            cells = [f"{name} {shots}" for name in corpora]
            true, other = (_over_seeds(lines, cells, one, when, _nll) for one in ("true", arm))
            row.append(_difference([true - other], 1, 3))
        rows.append(row)
    print("\nNLL with a temperature of the task's own, over\n")
    _print(["", *(stage for stage, _, _ in STAGES)], rows)


def _per_corpus(by_variant: Mapping[str, Sequence[Line]]) -> None:
    """What the true embedding has over its main controls in each corpus, from the start."""
    if "banks" not in by_variant:
        return
    rows = []
    for name in (*TRAINED, *UNSEEN):
        row = [name]
        for shots in (1, 5):
            true = _over_seeds(by_variant["banks"], [f"{name} {shots}"], "true", "start", _accuracy)
            row.append(f"{100 * true.mean():.2f}")
            for variant, arm in (
                ("banks", "between"),
                ("banks", "mean"),
                ("one bank of the same size", "mean"),
                ("not trained", "mean"),
            ):
                own = by_variant.get(variant, [])
                if not own:
                    row.append("")
                    continue
                other = _over_seeds(own, [f"{name} {shots}"], arm, "start", _accuracy)
                row.append(_difference([true - other]))
        rows.append(row)
    head = ["corpus"]
    for shots in (1, 5):
        over = ("swapped between", "mean of the bank", "one bank", "no training")
        head += [f"{shots}-shot start", *(f"over {title}" for title in over)]
    print("\nby corpus\n")
    _print(head, rows)


def _retrieval(lines: Sequence[Line]) -> None:
    """Top-1 and mean reciprocal rank among 200 tasks, mean over seeds, and differences paired by task."""
    cells = list(lines[0]["result"])
    ways = list(lines[0]["result"][cells[0]])
    for shots in ("1", "5"):
        own = [cell for cell in cells if cell.split()[1] == shots]
        found = {
            way: np.concatenate([np.mean([_hits(line["result"][cell][way]) for line in lines], 0) for cell in own])
            for way in ways
        }
        rows = []
        for way in ways:
            row = [way]
            for cell in own:
                ranks = np.array([line["result"][cell][way] for line in lines])
                row.append(f"{100 * (ranks == 1).mean():.1f}, {(1 / ranks).mean():.3f}")
            row.append(f"{100 * found[way].mean():.1f}")
            row += ["" if way == best else _difference([found[best] - found[way]]) for best in ways[:2]]
            rows.append(row)
        print(f"\n{shots} shots: top-1 in per cent, mean reciprocal rank\n")
        _print(["", *(cell.split()[0] for cell in own), "top-1, all", *(f"{way} over it" for way in ways[:2])], rows)


def _transfer(lines: Sequence[Line]) -> None:
    """Does nearness say what one task's adapter does for another? Means over the targets, with 95 % intervals.

    Spearman's rank correlation of nearness and gain over the sources of each target; and the gain from the nearest
    source's adapter, less the mean gain from all of them.
    """
    for line in lines:
        corpora, columns = np.array(line["result"]["corpora"]), line["result"]["columns"]
        pairs = np.array(line["result"]["pairs"])
        source, target, gain = pairs[:, 0].astype(int), pairs[:, 1].astype(int), pairs[:, 2]
        rows = []
        for title, others in (
            ("all other tasks", source != target),
            ("other corpora", corpora[source] != corpora[target]),
        ):
            for number, column in enumerate(columns):
                correlations, gains = [], []
                for one in range(len(corpora)):
                    kept = others & (target == one)
                    near = pairs[kept, 3 + number]
                    correlations.append(spearmanr(near, gain[kept]).statistic)
                    gains.append(gain[kept][near.argmax()] - gain[kept].mean())
                intervals = [_difference([np.array(values)], 1, 3) for values in (correlations, gains)]
                rows.append([title, column, *intervals])
        _print(("sources", "nearness", "rank correlation with the gain", "NLL gained by choosing the nearest"), rows)


def _accuracy(cell: Mapping[str, Any], arm: str, when: str) -> np.ndarray:
    scores = cell[arm].get(when, cell[arm]["start"])
    return np.array(scores["right"]) / cell["queries"]


def _nll(cell: Mapping[str, Any], arm: str, when: str) -> np.ndarray:
    return np.array(cell[arm].get(when, cell[arm]["start"])["nll"]) / 1000


def _over_seeds(
    lines: Sequence[Line], cells: Iterable[str], arm: str, when: str, score: Callable[..., np.ndarray]
) -> np.ndarray:
    """Return the scores of all episodes of some cells, each the mean over seeds."""
    return np.concatenate([np.mean([score(line["result"][cell], arm, when) for line in lines], 0) for cell in cells])


def _hits(ranks: Sequence[int]) -> np.ndarray:
    return np.array(ranks) == 1


def _difference(parts: Sequence[np.ndarray], scale: float = 100, digits: int = 2) -> str:
    """Return a mean difference with its 95 % interval."""
    values = scale * np.concatenate(parts)
    half = Z95 * values.std(ddof=1) / np.sqrt(len(values))
    mean = values.mean()
    return f"{mean:+.{digits}f} [{mean - half:+.{digits}f}, {mean + half:+.{digits}f}]"


def _print(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
