"""The tables of out of scope detection, from the lines of the results file alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from accuracy_tables import COLUMNS, check_comparable, counting_lines, difference_text, with_interval
from measure import print_table

__all__ = ["paired_auroc", "print_scope_tables"]

TITLES = {
    "oos": "Out of scope: all test classes at once, against texts of no class",
    "left-out": "Out of scope: 5-way, against other test classes of the same corpus",
}
MEASURES = ("auroc", "aupr", "fpr95", "accuracy")
OURS = "textmeta"

Measures = Mapping[str, np.ndarray]  # each (E,)
Folds = Mapping[str, Measures]


def print_scope_tables(lines: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of AUROC and one of the other measures, for each setting that has lines."""
    for setting, title in TITLES.items():
        own = [line for line in lines if line["key"].get("setting") == setting]
        if not own:
            continue
        rows = _read(own)
        columns = [name for name in COLUMNS if any(name in methods for methods in rows.values())]
        others = [name for name in columns if name != OURS]
        table = [("corpus, shots", *(COLUMNS[name] for name in columns), *(f"over {COLUMNS[name]}" for name in others))]
        rest = [("corpus, shots", *(COLUMNS[name] for name in columns), "accuracy of textmeta's rule at 0.5")]
        for (corpus, shots), methods in rows.items():
            name = f"{corpus}, {shots}"
            cells = [with_interval(_joined(methods[m], "auroc")) if m in methods else "–" for m in columns]
            ours = methods.get(OURS, {})
            table.append(
                (name, *cells, *(difference_text(paired_auroc(ours, methods.get(other, {}))) for other in others))
            )
            pairs = [[_joined(methods[m], part) for part in ("aupr", "fpr95")] if m in methods else [] for m in columns]
            told = bool(ours) and all("accuracy" in part for part in ours.values())
            accuracy = with_interval(_joined(ours, "accuracy")) if told else "–"
            rest.append((name, *(" / ".join(f"{v.mean():.2f}" for v in pair) or "–" for pair in pairs), accuracy))
        hours = sum(line["seconds"] for line in own) / 3600
        print(f"\n## {title} ({len(own)} runs, {hours:.1f} hours)")
        print("\nAs many texts are in scope as are not; in scope is positive. AUROC in per cent ± 95 % over the")
        print("episodes of all folds, and textmeta's points over the baselines [95 %], paired by episode.\n")
        print_table(table)
        print("\nAUPR / share of the outside texts that pass where 95 % of those in scope do, in per cent\n")
        print_table(rest)


def paired_auroc(ours: Folds, other: Folds) -> np.ndarray:
    """Return ours less the other's, in points, on the episodes that both were scored on."""
    differences = []
    for fold in [fold for fold in ours if fold in other]:
        one, two = ours[fold]["auroc"], other[fold]["auroc"]
        count = min(len(one), len(two))
        differences.append(one[:count] - two[:count])
    return np.concatenate(differences or [np.empty(0)])


def _read(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, dict[str, Measures]]]:
    """Return corpus and shots → method → fold → measures in per cent, means over training seeds."""
    found: dict[tuple[str, int], dict[str, dict[str, list[Measures]]]] = {}
    for line in check_comparable(counting_lines(lines)):
        key, result = line["key"], line["result"]
        folds = found.setdefault((key["corpus"], key["shots"]), {}).setdefault(key["method"], {})
        folds.setdefault(key["fold"], []).append(
            {name: np.array(result[name]) / 10 for name in MEASURES if name in result}
        )
    return {
        row: {
            method: {fold: _mean(seeds) for fold, seeds in sorted(folds.items())} for method, folds in methods.items()
        }
        for row, methods in sorted(found.items())
    }


def _mean(seeds: Sequence[Measures]) -> Measures:
    count = min(len(part["auroc"]) for part in seeds)
    names = [name for name in MEASURES if all(name in part for part in seeds)]
    return {name: np.mean([part[name][:count] for part in seeds], axis=0) for name in names}


def _joined(folds: Folds, measure: str) -> np.ndarray:
    return np.concatenate([part[measure] for part in folds.values()])
