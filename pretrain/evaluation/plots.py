"""Drawings of a pretraining run: numbers and images in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from foundation.json_files import as_number

FRAME_RIGHT, FRAME_WRONG = "#2e8b57", "#c0392b"
LINE_WIDTH = 1.4  # points
CAPTION_SIZE = 6  # points, of the text below the images of a sheet
LINE_HEIGHT = 0.11  # inches, of such a text
MARGIN = 1.5  # halves of an image beyond the outermost points of an embedding, so that none lies under the border
CELLS = 18  # a side, of a picture with images at the points of an embedding
ARTICLE_LDMI = "4 LDMI / P (nats; scale of the thesis)"
Line = tuple[np.ndarray, np.ndarray]  # x, y


def series(lines: Sequence[Mapping[str, Any]], key: str, x: str = "epoch") -> Line:
    """The values of a key over the epochs, of the lines of a metrics.json that have both as finite numbers."""
    rows = [(as_number(line.get(x)), as_number(line.get(key))) for line in lines]
    points = np.array([row for row in rows if None not in row], dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss, its terms, learning rate, effective rank and LDMI over the epochs.

    `runs`: the lines of metrics.json by name of the run.
    """
    panels = {
        "total": "loss",
        "big_bang": "big-bang term",
        "attraction": "attraction term",
        "learning_rate": "learning rate",
        "effective_rank": "effective rank",
        "ldmi": "LDMI (nats)",
    }
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for name, lines in runs.items():
            x, y = series(lines, key)
            axes.plot(x, y, label=name, marker=_marker(x), markersize=3, linewidth=LINE_WIDTH)
        axes.set(xlabel="epoch", title=title)
        if key == "attraction":
            axes.set_yscale("log")
        axes.set_xlim(left=0)  # a single value lies where it was measured, too
        _finish(axes)
    if len(runs) > 1:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def information_curves(
    information: Line, accuracy: Line, accuracy_label: str, dim: int, ldmi_scale: str = "nats"
) -> Figure:
    """LDMI and probe accuracy over the epochs, each on its own axis (thesis Fig. 5.1).

    Args:
        information: LDMI in nats; accuracy: in percent. Either may be empty.
        accuracy_label: of its axis.
        dim: P, dimension of the embedding.
        ldmi_scale: `nats`; `article`, 4 LDMI / P, as the authors plot it; or `both`.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    factor, label = 4 / dim, "LDMI (nats)"
    if ldmi_scale == "article":
        information, label = (information[0], information[1] * factor), ARTICLE_LDMI
    for axes, (x, y), colour, name, marker in (
        (left, information, "C0", label, _marker(information[0])),
        (right, accuracy, "C1", accuracy_label, "o"),
    ):
        axes.spines["top"].set_visible(False)
        if len(x):
            axes.plot(x, y, color=colour, marker=marker, markersize=3, linewidth=LINE_WIDTH)
            axes.set_ylabel(name, color=colour)
        else:
            axes.set_yticks([])
            for each in (left, right):  # each of the two draws all four sides
                each.spines["left" if axes is left else "right"].set_visible(False)
    if ldmi_scale == "both" and len(information[0]):
        scales: Any = (lambda nats: nats * factor, lambda scaled: scaled / factor)
        second = left.secondary_yaxis(-0.25, functions=scales)
        second.set_ylabel(ARTICLE_LDMI, color="C0")
    left.set_xlabel("epoch")
    left.set_xlim(left=0)
    return figure


def eigenvalue_spectra(spectra: Mapping[str, np.ndarray]) -> Figure:
    """Sorted eigenvalues of the projector covariance of several runs (thesis Fig. 5.3). Each (P,), descending."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, eigenvalues in spectra.items():
        # Rounding leaves the smallest eigenvalues of a collapsed covariance at or below 0, where a logarithm ends.
        axes.semilogy(
            np.arange(1, len(eigenvalues) + 1), np.maximum(eigenvalues, 1e-12), label=name, linewidth=LINE_WIDTH
        )
    axes.set(xlabel="index", ylabel="eigenvalue")
    dims = [len(each) for each in spectra.values()]
    if max(dims) > 4 * min(dims):  # else the short ones are a dash at the left edge
        axes.set_xscale("log")
    axes.legend(frameon=False)
    _finish(axes)
    return figure


def embedding_scatter(points: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str = "") -> Figure:
    """Points (N, 2) or (N, 3), coloured by class (thesis Fig. 5.4)."""
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes: Any = figure.add_subplot(projection="3d" if points.shape[1] == 3 else None)
    palette = "tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "hsv"
    colours = matplotlib.colormaps[palette].resampled(max(len(classes), 1))
    for number, name in enumerate(classes):
        chosen = points[labels == number]
        axes.scatter(*chosen.T, s=6, color=colours(number), label=name if len(classes) <= 20 else None, linewidths=0)
    axes.set(xticklabels=[], yticklabels=[])
    axes.set_title(title, fontsize=10, parse_math=False)
    if points.shape[1] == 3:
        axes.set_zticklabels([])
    if len(classes) <= 20:
        axes.legend(frameon=False, markerscale=3, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def spread_out(points: np.ndarray) -> np.ndarray:
    """Indices of the first of the points (N, 2) in each cell of a grid of `CELLS` x `CELLS`."""
    low, high = points.min(axis=0), points.max(axis=0)
    cells = np.floor((points - low) / np.maximum(high - low, 1e-12) * (CELLS - 1e-6)).astype(int)
    return np.sort(np.unique(cells, axis=0, return_index=True)[1])


def embedding_images(points: np.ndarray, images: Sequence[np.ndarray], title: str = "") -> Figure:
    """Images (H, W, 3) uint8 at their points (N, 2)."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    axes: Any = figure.add_subplot()
    low, high = points.min(axis=0), points.max(axis=0)
    half = np.maximum(high - low, 1e-12) / CELLS / 2
    for (x, y), image in zip(points, images, strict=True):
        axes.imshow(image, extent=(x - half[0], x + half[0], y - half[1], y + half[1]), aspect="auto")
    low, high = low - MARGIN * half, high + MARGIN * half
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10, parse_math=False)
    return figure


def image_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    frames: Sequence[Sequence[str | None]] | None = None,
    captions: Sequence[Sequence[str]] | None = None,
    side: float = 1.1,
) -> Figure:
    """Images in rows and columns.

    Args:
        rows: images (H, W, 3) uint8.
        titles: of the columns; as many as there are, or fewer.
        frames: colour of the frame of each image, None for none. A legend explains `FRAME_RIGHT` and `FRAME_WRONG`.
        captions: the lines of text below each image.
        side: of an image with its margins, in inches.
    """
    columns = max(len(row) for row in rows)
    lines = max((text.count("\n") + 1 for row in captions for text in row), default=0) if captions else 0
    height = (side + LINE_HEIGHT * lines) * len(rows) + 0.3
    figure = Figure(figsize=(side * columns, height), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for i, j in np.ndindex(len(rows), columns):
        axes: Any = grid[i, j]
        axes.set(xticks=[], yticks=[])
        colour = frames[i][j] if frames else None
        for spine in axes.spines.values():
            spine.set(visible=colour is not None, color=colour, linewidth=2.5)
        if j < len(rows[i]):
            axes.imshow(rows[i][j])
            if captions:
                axes.set_xlabel(captions[i][j], fontsize=CAPTION_SIZE, labelpad=2, parse_math=False)
        if i == 0 and j < len(titles):
            axes.set_title(titles[j], fontsize=8)
    meanings = {FRAME_RIGHT: "the class of the query", FRAME_WRONG: "another class"}
    drawn = {colour for row in frames or () for colour in row}
    handles = [Patch(facecolor="none", edgecolor=c, lw=2, label=text) for c, text in meanings.items() if c in drawn]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def caption_letters(side: float) -> int:
    """How many letters a line below an image of `image_sheet` holds."""
    return int(72 * (side - 0.1) / (0.66 * CAPTION_SIZE))


def _marker(x: np.ndarray) -> str:
    """The marker of a curve over these abscissae: a single value has no line that could be seen."""
    return "o" if len(x) == 1 else ""


def _finish(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.5)
