"""The pictures of accuracy.py: accuracy over shots, reliability, gain by corpus."""

from collections.abc import Sequence
from pathlib import Path

import scores
from accuracy import ALL_SHOTS, LAST_LAYER, NAMED
from cells import HEADLINE, REPORT
from matplotlib import pyplot as plt
from runs import Line

FROZEN = ("logistic regression, four layers", "logistic regression", "prototypes")
CURVES = {  # of each panel: what the legend says -> method
    "no names": {
        "textmeta": "plain",
        "textmeta, unlabelled texts": "unlabelled",
        "textmeta 0.1": "textmeta-0.1",
        "SetFit": "setfit",
        **dict(zip(FROZEN, ("logistic-views-256", *LAST_LAYER[::-1]), strict=True)),
    },
    "names": {
        "textmeta": "names",
        "textmeta, unlabelled texts": "names-unlabelled",
        **dict(zip(FROZEN, NAMED[::-1], strict=True)),
    },
}


def draw(lines: Sequence[Line], folder: Path) -> None:
    """Draw all three into a folder, of what is recorded."""
    found, bins = scores.accuracies(lines), scores.calibration_bins(lines)
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, (title, curves) in zip(axes, CURVES.items(), strict=True):
        for label, method in curves.items():
            told = {k: scores.mean(found.get(method, {}), k, HEADLINE) for k in ALL_SHOTS}
            points = [(k, *part) for k, part in told.items() if part]
            if points:
                width = 2.5 if label == "textmeta" else 1.2
                axis.errorbar(*zip(*points, strict=True), label=label, marker="o", ms=3, linewidth=width, capsize=2)
                axis.legend(fontsize=8)
        axis.set(title=title, xlabel="examples a class", xscale="log", xticks=ALL_SHOTS, xticklabels=ALL_SHOTS)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"accuracy, %, mean of {len(HEADLINE)} corpora")
    figure.savefig(folder / "accuracy_over_shots.png", dpi=130, metadata={"Software": None})
    figure, axis = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
    axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
    for k in [k for k in ALL_SHOTS if ("plain", k) in bins]:
        count, right, sure = bins["plain", k][bins["plain", k][:, 0] >= 50].T
        axis.plot(sure / count, right / count, marker="o", ms=3, label=scores.heads([k])[1])
        axis.legend(fontsize=8)
    axis.set(xlabel="confidence", ylabel="share that is right", title="textmeta, no names", xlim=(0, 1), ylim=(0, 1))
    figure.savefig(folder / "reliability.png", dpi=130, metadata={"Software": None})
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for offset, label, method, rivals in ((0.15, "no names", "plain", LAST_LAYER), (-0.15, "names", "names", NAMED)):
        rival = scores.best(found, rivals, 5)
        told = [scores.difference(found.get(method, {}), rival, [(corpus, 5)]) for corpus in REPORT]
        points = [(part[0], offset - place, 0, part[1]) for place, part in enumerate(told) if part]
        if points:
            axis.errorbar(*zip(*points, strict=True), fmt="o", capsize=3, label=label)
            axis.legend(fontsize=8)
    axis.axvline(0, color="gray", linewidth=1)
    axis.set_yticks([-place for place in range(len(REPORT))], [f"{c} *" if c in HEADLINE else c for c in REPORT])
    axis.set(xlabel="points over the better baseline at 5 shots (* of the seven)")
    figure.savefig(folder / "gain_by_corpus.png", dpi=130, metadata={"Software": None})
    plt.close("all")
