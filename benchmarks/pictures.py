"""The pictures of accuracy.py: accuracy over shots, reliability, gain by corpus."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from accuracy import ALL_SHOTS, LAST_LAYER, NAMED
from cells import HEADLINE, REPORT
from runs import Line
from scores import Cells, accuracies, best, calibration_bins, difference, mean

mpl.use("Agg")
from matplotlib import pyplot as plt

__all__ = ["draw"]

CURVES = {  # of each panel: what the legend says -> method
    "no names": {
        "textmeta": "plain",
        "textmeta, unlabelled texts": "unlabelled",
        "textmeta 0.1": "textmeta-0.1",
        "SetFit": "setfit",
        "logistic regression, four layers": "logistic-views-256",
        "logistic regression": LAST_LAYER[1],
        "prototypes": LAST_LAYER[0],
    },
    "names": {
        "textmeta": "names",
        "textmeta, unlabelled texts": "names-unlabelled",
        "logistic regression, four layers": NAMED[2],
        "logistic regression": NAMED[1],
        "prototypes": NAMED[0],
    },
}


def draw(lines: Sequence[Line], folder: Path) -> None:
    """Draw all three into a folder, of what is recorded."""
    found = accuracies(lines)
    draw_shots(found, folder / "accuracy_over_shots.png")
    draw_reliability(lines, folder / "reliability.png")
    draw_gains(found, folder / "gain_by_corpus.png")


def draw_shots(found: Mapping[str, Cells], path: Path) -> None:
    """Draw the mean accuracy over the seven corpora, with its interval."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes, CURVES.items(), strict=True):
        for label, method in curves.items():
            told = {k: mean(found.get(method, {}), k, HEADLINE) for k in ALL_SHOTS}
            points = [(k, *part) for k, part in told.items() if part]
            if points:
                x, y, half = zip(*points, strict=True)
                width = 2.5 if label == "textmeta" else 1.2
                axis.errorbar(x, y, half, label=label, marker="o", markersize=3, linewidth=width, capsize=2)
        axis.set(title=title, xlabel="examples a class", xscale="log", xticks=ALL_SHOTS, xticklabels=ALL_SHOTS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel(f"accuracy, %, mean of {len(HEADLINE)} corpora")
    _save(figure, path)


def draw_reliability(lines: Sequence[Line], path: Path) -> None:
    """Draw how often answers of each confidence are right, of all corpora together."""
    figure, axis = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
    bins = calibration_bins(lines)
    for k in ALL_SHOTS:
        if ("plain", k) in bins:
            count, right, sure = bins["plain", k][bins["plain", k][:, 0] >= 50].T
            axis.plot(sure / count, right / count, marker="o", markersize=3, label=f"{k} shots")
    axis.set(xlabel="confidence", ylabel="accuracy", title="textmeta, no names", xlim=(0, 1), ylim=(0, 1))
    axis.legend()
    _save(figure, path)


def draw_gains(found: Mapping[str, Cells], path: Path) -> None:
    """Draw the gain at 5 shots over the better baseline, corpus by corpus."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for offset, label, method, rivals in ((0.15, "no names", "plain", LAST_LAYER), (-0.15, "names", "names", NAMED)):
        rival = found.get(best(found, rivals, 5) or "", {})
        told = [difference(found.get(method, {}), rival, [(corpus, 5)]) for corpus in REPORT]
        points = [(*part, offset - place) for place, part in enumerate(told) if part]
        if points:
            gain, half, y = zip(*points, strict=True)
            axis.errorbar(gain, y, xerr=half, fmt="o", capsize=3, label=label)
    axis.axvline(0, color="gray", linewidth=1)
    axis.set_yticks([-place for place in range(len(REPORT))], [f"{c} *" if c in HEADLINE else c for c in REPORT])
    axis.set(xlabel="points over the better of prototypes and logistic regression, 5 shots (* of the seven)")
    axis.legend()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
