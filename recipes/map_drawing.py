"""A map of points with labels that do not cover each other: projection, labels, PNG and SVG."""

import csv
import importlib
import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sklearn.decomposition import PCA

from textmeta.errors import DataError, SettingsError

try:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
except ImportError:  # an extra: check_drawing says so
    matplotlib = None

Projection = Literal["auto", "pca", "umap"]

# Okabe and Ito's palette for all kinds of colour vision; a purple for its yellow, too light for a line, and its black
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6F4E9C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "*", "h")
GREY = "#555555"
MARGIN = 4  # pixels that labels keep from each other


@dataclass(frozen=True)
class Group:
    """Tasks that are drawn alike.

    Args:
        corpus: that gives the marker, where there are several.
        name: the label.
        seen: whether the embedding was learned from its classes (then filled) or not (hollow); None where not known.
    """

    corpus: str
    name: str
    seen: bool | None = None


@dataclass(frozen=True, eq=False)
class Point:
    """One task on the map.

    Args:
        vector: (e,) its embedding.
        group: that it belongs to.
        classes: of the task.
    """

    vector: np.ndarray
    group: Group
    classes: tuple[str, ...]


def check_drawing(projection: Projection) -> None:
    """Check that what draws is installed, before anything is computed.

    Raises:
        SettingsError: if it is not; the message says how to install it.
    """
    if matplotlib is None:
        raise SettingsError("drawing needs matplotlib, which is not installed: pip install 'textmeta[plot]'")
    if projection == "umap" and not _has_umap():
        raise SettingsError(
            "projection 'umap' needs umap-learn, which is not installed: pip install umap-learn, or choose 'pca'"
        )


def place(vectors: np.ndarray, projection: Projection, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Return where each vector stands, (n, 2), and names of the axes.

    Args:
        vectors: (n, e), at least 3 of them.
        projection: pca (first two principal components), umap, or auto: umap where it is installed.
        seed: of UMAP.

    Raises:
        DataError: if there are too few vectors.
    """
    if len(vectors) < 3:
        raise DataError(f"a map needs at least 3 tasks, given {len(vectors)}")
    if projection == "umap" or (projection == "auto" and _has_umap()):
        umap = importlib.import_module("umap")  # not above: it takes seconds
        start = "spectral" if len(vectors) > 10 else "random"  # a handful of points has no such spectrum
        # more neighbours than a group has tasks, or groups become islands; loose, or labels cover them
        look = {"n_neighbors": min(50, len(vectors) - 1), "min_dist": 0.9, "spread": 1.5, "metric": "cosine"}
        reducer = umap.UMAP(**look, init=start, random_state=seed, n_jobs=1)
        return np.asarray(reducer.fit_transform(vectors)), ("UMAP, first axis", "UMAP, second axis")
    pca = PCA(2, svd_solver="full").fit(vectors)
    shares = np.nan_to_num(pca.explained_variance_ratio_)  # nan, where all vectors are the same
    first, second = (f"principal component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares))
    return pca.transform(vectors), (first, second)


def draw(
    points: Sequence[Point], positions: np.ndarray, axes: tuple[str, str], title: str, subtitle: str, path: Path
) -> None:
    """Write the map as PNG and SVG, and its coordinates as CSV: the same bytes for the same arguments.

    Args:
        points: what is drawn.
        positions: (n, 2), of each.
        axes: their names.
        title: says what is shown.
        subtitle: says how it was made.
        path: of the files, without an ending.
    """
    width, height = np.ptp(positions, axis=0)
    shape = float(np.clip(height / max(width, 1e-9), 0.6, 1.0))  # of the cloud, so that equal scales waste no room
    figure = Figure(figsize=(10, 10 * shape + 1), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # measures text, without a display
    plot = figure.add_subplot()
    figure.suptitle(title, fontsize=15, fontweight="bold")
    plot.set_title(subtitle, fontsize=10, color=GREY)
    plot.set_xlabel(axes[0], color=GREY)
    plot.set_ylabel(axes[1], color=GREY)
    plot.set_xticks([])
    plot.set_yticks([])
    plot.set_aspect("equal", adjustable="datalim")
    plot.spines[:].set_color("#CCCCCC")

    rows: dict[Group, list[int]] = {}
    for row, point in enumerate(points):
        rows.setdefault(point.group, []).append(row)
    centres = np.array([np.median(positions[own], axis=0) for own in rows.values()])
    colours = _colours(centres)
    corpora = list(dict.fromkeys(group.corpus for group in rows))
    some_seen = any(group.seen for group in rows)
    used: Counter[str] = Counter()
    for group, centre, colour in zip(rows, centres, colours, strict=True):
        # a shape for each corpus; of one corpus alone, another shape where a colour comes again
        shape = MARKERS[(corpora.index(group.corpus) if len(corpora) > 1 else used[colour]) % len(MARKERS)]
        used[colour] += 1
        own = positions[rows[group]]
        rays = np.stack([np.broadcast_to(centre, own.shape), own], axis=1)  # hold together what belongs together
        plot.add_collection(LineCollection(rays, colors=colour, linewidths=0.8, alpha=0.25, zorder=1))
        face = "white" if some_seen and not group.seen else colour
        plot.scatter(*own.T, s=32, marker=shape, c=face, edgecolors=colour, linewidths=1.2, alpha=0.85, zorder=2)
    _add_legend(figure, list(rows), corpora if 1 < len(corpora) < len(rows) else [])
    _add_labels(figure, plot, [group.name for group in rows], centres, colours)

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "textmeta"}):  # otherwise ids in the SVG are random
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"))
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["corpus", "group", "seen", "x", "y", "classes"])
        for point, (x, y) in zip(points, positions, strict=True):
            told = (point.group.corpus, point.group.name, point.group.seen)
            writer.writerow([*told, f"{x:.6f}", f"{y:.6f}", "; ".join(point.classes)])


def _has_umap() -> bool:
    return importlib.util.find_spec("umap") is not None


def _colours(centres: np.ndarray) -> list[str]:
    """Return a colour for each group; where one comes again, it is far from where it was."""
    chosen: list[int] = []
    for number, centre in enumerate(centres):
        uses = Counter(chosen)
        distances = np.linalg.norm(centres[:number] - centre, axis=1)
        free = [colour for colour in range(len(COLOURS)) if uses[colour] == number // len(COLOURS)]
        nearest = {c: min((d for d, had in zip(distances, chosen, strict=True) if had == c), default=0) for c in free}
        chosen.append(max(free, key=lambda colour: nearest[colour]))
    return [COLOURS[colour] for colour in chosen]


def _add_legend(figure: Any, groups: Sequence[Group], corpora: Sequence[str]) -> None:
    """Say which shape is which corpus, where labels do not, and what is filled and what is not."""
    entries = [(name, MARKERS[number % len(MARKERS)], GREY) for number, name in enumerate(corpora)]
    if any(group.seen for group in groups) and not all(group.seen for group in groups):
        entries += [("classes that trained the task encoder", "o", GREY), ("classes that it never saw", "o", "white")]
    handles = [
        Line2D([], [], linestyle="", marker=shape, markeredgecolor=GREY, markerfacecolor=face, label=name)
        for name, shape, face in entries
    ]
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=10
        )


def _add_labels(figure: Any, plot: Any, labels: Sequence[str], centres: np.ndarray, colours: Sequence[str]) -> None:
    """Write each label at its centre, or as near as the others leave room, with a line to the centre."""
    texts = []
    for label, centre, colour in zip(labels, centres, colours, strict=True):
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour, "linewidth": 1.5, "alpha": 0.8}
        font = {"size": 10, "weight": "bold", "ha": "center", "va": "center"}
        texts.append(plot.text(*centre, label, fontdict=font, bbox=box, zorder=4, parse_math=False))
    figure.canvas.draw()  # the layout, which must stay as it is from here on
    figure.set_layout_engine("none")
    boxes = [text.get_bbox_patch().get_window_extent() for text in texts]
    sizes = np.array([(box.width, box.height) for box in boxes]) + MARGIN
    frame, to_data = plot.get_window_extent(), plot.transData.inverted()
    anchors = plot.transData.transform(centres)
    placed = spread(anchors, sizes, np.array([[frame.x0, frame.y0], [frame.x1, frame.y1]]))
    for text, centre, anchor, at, size, colour in zip(texts, centres, anchors, placed, sizes, colours, strict=True):
        text.set_position(to_data.transform(at))
        if (np.abs(at - anchor) > size / 2).any():
            line = np.stack([to_data.transform(at), centre])
            plot.add_line(Line2D(*line.T, color=colour, linewidth=1.5, marker="o", markevery=[1], zorder=3))


def spread(anchors: np.ndarray, sizes: np.ndarray, frame: np.ndarray, rounds: int = 2000) -> np.ndarray:
    """Return centres of boxes, near their anchors, that do not overlap.

    Two that overlap are pushed apart along the direction in which they overlap less; the others are drawn back.

    Args:
        anchors: (n, 2), where the boxes want to be.
        sizes: (n, 2), of the boxes.
        frame: (2, 2), lower and upper corner of what they have to stay in.
        rounds: at most so many.
    """
    placed = anchors.astype(float)
    for number in range(rounds):
        pull = max(0.0, 0.05 * (1 - 2 * number / rounds))  # the second half of the rounds only pushes
        placed += pull * (anchors - placed)
        moved = False
        for i in range(len(placed)):
            for j in range(i):
                gap = placed[i] - placed[j]
                overlap = (sizes[i] + sizes[j]) / 2 - np.abs(gap)
                if (overlap > 0).all():
                    axis = int(np.argmin(overlap))
                    step = (overlap[axis] / 2 + 0.5) * (1 if gap[axis] >= 0 else -1)
                    placed[i, axis] += step
                    placed[j, axis] -= step
                    moved = True
        placed = np.clip(placed, frame[0] + sizes / 2, frame[1] - sizes / 2)
        if not moved and pull == 0:
            break
    return placed
