"""A picture of accuracy by the number of shots."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accuracy_scores import Series
from accuracy_tables import half_interval
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["curve_points", "draw_curves"]

ENOUGH = 20  # episodes

Rows = Mapping[tuple[str, int], Mapping[str, Mapping[str | None, Series]]]


def draw_curves(rows: Rows, titles: Mapping[str, str], path: Path) -> None:
    """Draw, for each corpus, a line for each method with its 95 % interval.

    Args:
        rows: corpus and shots → method → fold → scores.
        titles: of the methods, in their order.
        path: of the PNG file.
    """
    corpora = sorted({corpus for corpus, _ in rows})
    few = len(corpora) < 3  # the legend needs room
    figure = Figure(figsize=(max(6.5, 4.2 * len(corpora)), 4.5 if few else 4), layout="constrained")
    FigureCanvasAgg(figure)
    methods = [name for name in titles if any(name in cell for cell in rows.values())]
    for number, corpus in enumerate(corpora):
        axes = figure.add_subplot(1, len(corpora), number + 1)
        points = curve_points(rows, corpus)
        for colour, method in enumerate(methods):
            shots = sorted(n for n, name in points if name == method)
            if not shots:
                continue
            values = [points[n, method] for n in shots]
            means = np.array([part.mean() for part in values])
            halves = [half_interval(part) or np.nan for part in values]
            style = "--" if method.endswith("-names") else "-"
            axes.errorbar(
                shots, means, halves, fmt=style, marker="o", markersize=3, color=f"C{colour}", label=titles[method]
            )
        axes.set_xscale("symlog", linthresh=1)
        ticks = sorted({n for name, n in rows if name == corpus})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_xlabel("examples a class")
        axes.set_title(corpus)
    figure.axes[0].set_ylabel("accuracy, per cent")
    handles = {}  # not every method is in every corpus
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=2 if few else 4, fontsize="small"
    )
    figure.savefig(path, dpi=120)


def curve_points(rows: Rows, corpus: str) -> dict[tuple[int, str], np.ndarray]:
    """Return the accuracies in per cent of a corpus's episodes by shots and method.

    Where a method has fewer than half of the corpus's episodes, and fewer than :data:`ENOUGH`, it has no point: an
    interval of two says nothing.
    """
    found = {
        (shots, method): 100 * Series.joined(folds.values()).accuracy
        for (name, shots), methods in rows.items()
        if name == corpus
        for method, folds in methods.items()
    }
    least = min(ENOUGH, max(map(len, found.values())) / 2)
    return {key: values for key, values in found.items() if len(values) >= least}
