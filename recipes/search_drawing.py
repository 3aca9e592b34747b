"""The picture of a search: accuracy by trial, and by each setting that was searched."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from search_study import Outcome, Range, Space, best_of, shown

from textmeta.errors import SettingsError
from textmeta.files import write_atomically

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
except ImportError:  # an extra: check_drawing says so
    matplotlib = None

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"  # as Okabe and Ito chose them, and grey
COLUMNS = 3
LETTERS = 28  # of all choices together, from which on they are slanted


def check_drawing() -> None:
    """Check that what draws is installed, before anything is computed.

    Raises:
        SettingsError: if it is not; the message says how to install it.
    """
    if matplotlib is None:
        raise SettingsError("drawing needs matplotlib, which is not installed: pip install 'textmeta[plot]'")


def draw(found: Sequence[Outcome], space: Space, path: Path) -> None:
    """Draw a panel of all trials with the running best, and one for each setting, as PNG.

    Args:
        found: the trials.
        space: what was searched.
        path: of the picture.
    """
    columns = min(COLUMNS, len(space))
    rows = math.ceil(len(space) / columns)
    figure = Figure(figsize=(11, 3.4 + 2.8 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1.2, *[1] * rows])
    top = figure.add_subplot(grid[0, :])
    _draw_trials(top, found)
    if not all(isinstance(values, Range) for values in space.values()):
        top.plot([], [], color=GREY, label="median of a choice")
    for number, (name, values) in enumerate(space.items()):
        plot = figure.add_subplot(grid[1 + number // columns, number % columns], sharey=top)
        _draw_setting(plot, found, name, values)
        if number % columns:
            plot.tick_params(labelleft=False)
        else:
            plot.set_ylabel("validation accuracy, %")
    low, high = top.get_ylim()
    top.set_ylim(low, min(high, 100 + 0.04 * (high - low)))  # no accuracy is above 100 %
    for plot in figure.axes:
        plot.grid(color="#E5E5E5", linewidth=0.8)
        plot.set_axisbelow(True)
        plot.spines[["top", "right"]].set_visible(False)
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    write_atomically(path, _png(figure))


def _png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _draw_trials(plot: Any, found: Sequence[Outcome]) -> None:
    best, running = -math.inf, []
    for outcome in found:
        best = best if outcome.pruned else max(best, 100 * (outcome.accuracy or 0))
        running.append(best if best > -math.inf else math.nan)
    plot.step([outcome.number for outcome in found], running, where="post", color=GREEN, label="best so far")
    _scatter(plot, found, [outcome.number for outcome in found])
    lost = [outcome.number for outcome in found if outcome.accuracy is None]
    if lost:  # no accuracy to stand at
        bottom = plot.get_xaxis_transform()
        plot.scatter(lost, [0.03] * len(lost), marker="x", color="black", transform=bottom, label="diverged")
    plot.set_xlabel("trial")
    plot.set_ylabel("validation accuracy, %")
    plot.set_xlim(-0.5, len(found) - 0.5)
    plot.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _draw_setting(plot: Any, found: Sequence[Outcome], name: str, values: list[Any] | Range) -> None:
    plot.set_xlabel(name)
    if isinstance(values, Range):
        _scatter(plot, found, [outcome.values[name] for outcome in found])
        margin = 0.04
        if values.log:
            ratio = (values.high / values.low) ** margin
            plot.set_xscale("log")
            plot.set_xlim(values.low / ratio, values.high * ratio)
            if values.high < 30 * values.low:  # too few powers of ten for the usual ticks
                digits = (1, 2, 5) if values.high > 5 * values.low else range(1, 10)
                plot.xaxis.set_major_locator(LogLocator(subs=digits))
                plot.xaxis.set_major_formatter("{x:g}")
                plot.xaxis.set_minor_locator(NullLocator())
        else:
            room = margin * (values.high - values.low)
            plot.set_xlim(values.low - room, values.high + room)
            plot.xaxis.set_major_locator(MaxNLocator(5, integer=isinstance(values.low, int)))
        return
    # equal choices would hide each other: each trial stands a little aside, by the golden ratio
    aside = [0.4 * ((outcome.number * 0.618) % 1 - 0.5) for outcome in found]
    places = [values.index(outcome.values[name]) for outcome in found]
    for place in sorted(set(places)):
        own = [100 * (o.accuracy or 0) for o, at in zip(found, places, strict=True) if at == place and not o.pruned]
        if own:
            plot.hlines(float(np.median(own)), place - 0.3, place + 0.3, color=GREY, linewidth=1.5, zorder=1)
    _scatter(plot, found, [place + shift for place, shift in zip(places, aside, strict=True)])
    plot.set_xlim(-0.5, len(values) - 0.5)
    labels = [shown(value) for value in values]
    slanted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if sum(map(len, labels)) > LETTERS else {}
    plot.set_xticks(range(len(values)), labels, **slanted)


def _scatter(plot: Any, found: Sequence[Outcome], places: Sequence[float]) -> None:
    """Draw the trials at these places: complete, pruned, and the best of all."""
    first = [outcome.number for outcome in best_of(list(found))[:1]]
    kinds = {
        "complete": {"color": BLUE, "s": 30, "alpha": 0.8},
        "pruned": {"facecolors": "none", "edgecolors": GREY, "s": 30, "linewidths": 1.2},
        "best": {"color": ORANGE, "s": 130, "marker": "*", "edgecolors": "white", "linewidths": 0.8},
    }
    for order, (label, style) in enumerate(kinds.items()):
        points = [
            (place, 100 * outcome.accuracy)
            for outcome, place in zip(found, places, strict=True)
            if outcome.accuracy is not None
            and label == ("best" if outcome.number in first else "pruned" if outcome.pruned else "complete")
        ]
        if points:
            plot.scatter(*zip(*points, strict=True), zorder=3 + order, label=label, **style)
