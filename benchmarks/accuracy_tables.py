"""The tables of the accuracy benchmark, from the lines of its results file alone."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accuracy_reference import print_references
from accuracy_scores import Series, mean_series
from measure import print_table
from scipy.stats import t as student_t

# where a folder `runs` lies beside, ruff sorts the package elsewhere
# isort: split
from textmeta.errors import DataError

__all__ = [
    "COLUMNS",
    "check_comparable",
    "counting_lines",
    "difference_text",
    "half_interval",
    "paired",
    "print_tables",
    "read_rows",
    "with_interval",
]

FEWEST = 5  # of fewer episodes there is no interval
# columns, in their order; what uses label names stands apart, at the end
COLUMNS = {
    "frozen": "frozen prototypes",
    "logistic": "logistic regression",
    "sentence-transformers": "sentence-transformers + logistic regression",
    "lora": "plain LoRA",
    "setfit": "SetFit",
    "protonet": "ProtoNet with LoRA",
    "textmeta": "textmeta",
    "frozen-names": "with label names: frozen prototypes",
    "textmeta-names": "with label names: textmeta",
}
OURS = {"textmeta": "frozen", "textmeta-names": "frozen-names"}  # ours, and the frozen prototypes beside it
TITLES = {
    "classes": "Unseen classes, 5-way: trained on a fold's training classes",
    "all_way": "Unseen classes, all test classes at once",
    "corpora": "Unseen corpora: one adapter, trained on others",
    "curve": "Unseen corpora, by number of shots",
}

PLACE = ("corpus", "shots", "method", "fold")
# the same of all methods of a row; the classes of a fold
COMPARED = ("data", "outside", "classes", "encoder", "pooling", "max_length", "ways", "queries", "episode_seed")

Row = tuple[str, int]  # corpus, shots
Folds = Mapping[str | None, Series]
Rows = Mapping[Row, Mapping[str, Folds]]


def print_tables(lines: Sequence[Mapping[str, Any]], *, quick: bool = False, pictures: Path | None = None) -> None:
    """Print a Markdown table of everything that has lines.

    Args:
        lines: of the results file; which of them count: :func:`counting_lines`.
        quick: whether they are of a small version.
        pictures: folder for the picture of the curve; None for none.
    """
    if not lines:
        print("no results yet")
        return
    dates = sorted({line["date"] for line in lines})
    versions = ", ".join(sorted({f"{name} {number}" for line in lines for name, number in line["versions"].items()}))
    key = lines[-1]["key"]
    print(f"\n`python benchmarks/accuracy.py --data-dir DIR`, {dates[0]} to {dates[-1]}; {versions}; texts cut at")
    print(f"{key['max_length']} tokens, {key['queries']} queries a class, no unlabelled queries.")
    if quick:
        print("\n**A small version of everything, to see that it runs: these figures are of no worth.**")
    for part, title in TITLES.items():  # the part scope has tables of its own: accuracy_scope_tables
        own = [line for line in lines if line["key"]["part"] == part]
        if not own:
            continue
        rows = read_rows(own)
        hours = sum(line["seconds"] for line in own) / 3600
        print(f"\n## {title} ({len(own)} runs, {hours:.1f} hours)")
        _accuracy(rows)
        _differences(rows)
        _others(rows)
        _seconds(own)
        if part == "classes":
            print_references(rows, COLUMNS, OURS)
        if part == "curve" and pictures is not None:
            _picture(rows, pictures / "accuracy_curve.png")
    _short(lines)


def read_rows(lines: Iterable[Mapping[str, Any]]) -> Rows:
    """Return corpus and shots → method → fold → scores, means over training seeds.

    Raises:
        DataError: if methods that would stand side by side were run on different data, encoders or episodes.
    """
    found: dict[Row, dict[str, dict[str | None, list[Series]]]] = {}
    for line in check_comparable(counting_lines(lines)):
        corpus, shots, method, fold = (line["key"][name] for name in PLACE)
        seeds = found.setdefault((corpus, shots), {}).setdefault(method, {}).setdefault(fold, [])
        seeds.append(Series.of(line["result"]))
    return {
        row: {method: {fold: mean_series(seeds) for fold, seeds in sorted(folds.items(), key=str)} for method, folds in
              methods.items()} for row, methods in sorted(found.items())
    }  # fmt: skip


def counting_lines(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return one line of each corpus, number of shots, method, fold, seed and adapter.

    Where several differ in their settings (a recipe, an adapter's hash), those of the newest count, of one day the last
    one's, however few episodes they have; of lines that differ in the number of episodes alone, the one with the most.
    """
    found: dict[tuple, list[Mapping[str, Any]]] = {}
    for line in sorted(lines, key=lambda line: str(line.get("date", ""))):
        key = line["key"]
        place = *(key[name] for name in PLACE), *(key.get(name) for name in ("setting", "seed", "adapter"))
        found.setdefault(place, []).append(line)
    return [max(_like_the_last(own), key=lambda line: line["key"]["episodes"]) for own in found.values()]


def _like_the_last(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return those with the settings of the last line, the last one first."""
    last = _but_episodes(lines[-1]["key"])
    return [line for line in reversed(lines) if _but_episodes(line["key"]) == last]


def _but_episodes(key: Mapping[str, Any]) -> dict[str, Any]:
    return {**key, "part": None, "episodes": None}


def check_comparable(lines: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the lines, if all of a corpus and number of shots are of the same data, encoder and episodes.

    Raises:
        DataError: if they are not.
    """
    known: dict[tuple, Mapping[str, Any]] = {}
    for key in [line["key"] for line in lines]:
        for name in [name for name in COMPARED if name in key]:
            fold = key["fold"] if name == "classes" else None
            other = known.setdefault((key["corpus"], key["shots"], name, fold), key)
            if key[name] != other[name]:
                raise DataError(
                    f"{key['corpus']}, {key['shots']} shots: {key['method']} was run with {name} {key[name]!r}, "
                    f"{other['method']} with {other[name]!r}; take one of them out of the file of results"
                )
    return lines


def paired(ours: Folds, other: Folds, measure: str = "accuracy") -> tuple[np.ndarray, np.ndarray]:
    """Return a measure of both on the episodes that both were scored on: of each common fold the first ones."""
    folds = [fold for fold in ours if fold in other]
    counts = {fold: min(len(ours[fold].accuracy), len(other[fold].accuracy)) for fold in folds}
    one, two = (
        np.concatenate([getattr(part[fold], measure)[: counts[fold]] for fold in folds] or [np.empty(0)])
        for part in (ours, other)
    )
    return one, two


def _accuracy(rows: Rows) -> None:
    columns = _columns(rows)
    table = [("corpus, shots", *(COLUMNS.get(name, name) for name in columns))]
    for row, methods in rows.items():
        usual = max(sum(len(part.accuracy) for part in folds.values()) for folds in methods.values())
        table.append((_name(row), *(_mean(methods.get(name), usual) for name in columns)))
    print(
        "\nAccuracy in per cent ± 95 % over the episodes of all folds, in brackets the standard deviation of the folds'"
    )
    print("means; n where there are fewer episodes than in the row's other cells.\n")
    print_table(table)


def _mean(folds: Folds | None, usual: int) -> str:
    if not folds:
        return "–"
    accuracy = 100 * Series.joined(folds.values()).accuracy
    text = with_interval(accuracy)
    if len(folds) > 1:
        text += f" ({np.std([100 * part.accuracy.mean() for part in folds.values()], ddof=1):.2f})"
    return text + (f", n = {len(accuracy)}" if len(accuracy) < usual else "")


def _differences(rows: Rows) -> None:
    for ours, frozen in OURS.items():
        others = [
            name for name in _columns(rows) if name not in OURS and name.endswith("-names") == (ours != "textmeta")
        ]
        table = [("corpus, shots", *(f"over {COLUMNS[name].split(': ')[-1]}" for name in others), "error cut, %")]
        for row, methods in rows.items():
            if ours in methods:
                cells = [_difference(methods[ours], methods.get(name)) for name in others]
                table.append((_name(row), *cells, _error_cut(methods[ours], methods.get(frozen))))
        if len(table) > 1:
            names = "" if ours == "textmeta" else " Label names on both sides."
            print(
                f"\n{COLUMNS[ours]}: points over the others [95 %], paired by episode, on the episodes that both have;"
            )
            print(f"and the share of the errors of frozen prototypes that is gone.{names}\n")
            print_table(table)


def _difference(ours: Folds, other: Folds | None) -> str:
    if not other:
        return "–"
    one, two = paired(ours, other)
    return difference_text(100 * (one - two))


def difference_text(difference: np.ndarray) -> str:
    """Return a mean difference and its 95 % interval over the episodes."""
    if not len(difference):
        return "–"
    mean, half = difference.mean(), half_interval(difference)
    interval = "" if half is None else f" [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"{mean:+.2f}{interval}"


def _error_cut(ours: Folds, frozen: Folds | None) -> str:
    one, two = paired(ours, frozen or {})
    return f"{100 * (one.mean() - two.mean()) / (1 - two.mean()):.0f}" if len(two) and two.mean() < 1 else "–"


def _others(rows: Rows) -> None:
    columns = _columns(rows)
    table = [("corpus, shots", *(COLUMNS.get(name, name) for name in columns))]
    for row, methods in rows.items():
        cells = []
        for name in columns:
            if name not in methods:
                cells.append("–")
                continue
            all_folds = Series.joined(methods[name].values())
            cells.append(
                f"{100 * all_folds.macro_f1.mean():.2f}, {all_folds.nll.mean():.3f}, {100 * all_folds.ece:.1f}"
            )
        table.append((_name(row), *cells))
    print("\nMacro-F1 in per cent, NLL in nats, ECE in per cent (15 bins)\n")
    print_table(table)


def _seconds(lines: Sequence[Mapping[str, Any]]) -> None:
    lines = [line for line in lines if line.get("device", "cpu") == "cpu"]
    table = [("", "meta-training: steps", "seconds", "of all processors", "seconds an episode, 1 / 5 / 10 shots")]
    for name in [name for name in COLUMNS if any(line["key"]["method"] == name for line in lines)]:
        own = [line for line in lines if line["key"]["method"] == name]
        told = [_median(line["result"].get(f"training_{part}") for line in own) for part in _TRAINING]
        by_shots = [
            [line["result"].get("episode_seconds") for line in own if line["key"]["shots"] == n] for n in (1, 5, 10)
        ]
        table.append((COLUMNS[name], *told, " / ".join(_median(part) for part in by_shots)))
    print("\nTime, medians over corpora and folds, on the CPUs of a machine that does other things too. What is on the")
    print("disk beforehand is not counted: frozen features, and the states below the lowest LoRA.\n")
    print_table(table)


_TRAINING = ("steps", "seconds", "processor_seconds")


def _median(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.median(known):.3g}" if known else "–"


def _short(lines: Sequence[Mapping[str, Any]]) -> None:
    table = [("", "frozen prototypes", "textmeta", "difference", "NLL")]
    for part in ("classes", "corpora"):
        for row, methods in read_rows(line for line in lines if line["key"]["part"] == part).items():
            if {"frozen", "textmeta"} <= methods.keys():
                one, two = paired(methods["frozen"], methods["textmeta"])
                where = "unseen classes" if part == "classes" else "unseen corpus"
                cells = (with_interval(100 * one), with_interval(100 * two))
                nll = " → ".join(f"{v.mean():.2f}" for v in paired(methods["frozen"], methods["textmeta"], "nll"))
                table.append(
                    (f"{_name(row)}, {where}", *cells, _difference(methods["textmeta"], methods["frozen"]), nll)
                )
    if len(table) > 1:
        print("\n## In short\n")
        print_table(table)


def _picture(rows: Rows, path: Path) -> None:
    try:
        from accuracy_picture import draw_curves  # noqa: PLC0415 - matplotlib is an extra
    except ImportError:
        print("\nno picture: matplotlib is not installed (extra `plot`)")
        return
    draw_curves(rows, COLUMNS, path)
    print(f"\nThe same as a picture: {path.name}")


def _columns(rows: Rows) -> list[str]:
    known = {name for methods in rows.values() for name in methods}
    return [name for name in COLUMNS if name in known] + sorted(known - COLUMNS.keys())


def _name(row: Row) -> str:
    return f"{row[0]}, {row[1]}"


def with_interval(values: np.ndarray) -> str:
    """Return a mean and half its 95 % interval over the episodes."""
    half = half_interval(values)
    return f"{values.mean():.2f}" + ("" if half is None else f" ± {half:.2f}")


def half_interval(values: np.ndarray) -> float | None:
    """Return half the 95 % interval (Student's t) of the mean of episodes; None, if they are too few for one."""
    count = len(values)
    if count < FEWEST:
        return None
    return float(student_t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count))
