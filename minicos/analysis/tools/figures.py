"""Every picture minicos draws; the one file that imports matplotlib. Arrays in, a PNG out,
written in one step.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minicos.analysis.result import Curve, Interval
from minicos.runs import replace_file

# inches: the widest cell, and what all cells together should fit into
CELL, WIDTH, HEIGHT = 1.1, 11.0, 7.5
GAP = 0.03  # of a cell, on every side


def pixels(image: Tensor) -> np.ndarray:
    """(3 h w) in [0, 1] -> uint8 (h w 3)."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spaced, first and last included: the rows or
    columns that a sheet shows.
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def heat(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Values of any shape as colours (... 4), from `low` (black) to `high` (pale yellow): by
    default their 1st and 99th percentile.
    """
    low, high = (np.percentile(values, p) if v is None else v for v, p in ((low, 1), (high, 99)))
    return colormaps["magma"]((values - low) / max(high - low, 1e-12))


def colours(values: np.ndarray) -> np.ndarray:
    """Three numbers a pixel (... 3) as red, green and blue in [0, 1], each channel from its 1st
    to its 99th percentile.
    """
    low, high = np.percentile(values.reshape(-1, 3), [1, 99], axis=0)
    return np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)


def sheet(
    path: Path,
    images: Sequence[Sequence[np.ndarray]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> None:
    """Pictures (uint8 h w 3, or the colours of `heat`) in a labelled grid that fits a screen,
    unless that made them tiny.
    """
    ratio = images[0][0].shape[0] / images[0][0].shape[1]
    cell = max(0.4, min(CELL, WIDTH / len(columns), HEIGHT / (ratio * len(rows))))
    figure = Figure(
        figsize=(cell * len(columns) + 0.9, cell * ratio * len(rows) + 0.6), layout="constrained"
    )
    axes = figure.subplots()
    for r, line in enumerate(images):
        for c, image in enumerate(line):
            place = (c - 0.5 + GAP, c + 0.5 - GAP, r + 0.5 - GAP / ratio, r - 0.5 + GAP / ratio)
            axes.imshow(
                image,
                extent=place,
                interpolation="nearest" if image.shape[1] < 110 * cell else "antialiased",
            )
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), aspect=ratio)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8, top=True, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def lines(
    path: Path,
    curves: Sequence[Curve],
    *,
    y: str,
    title: str,
    marks: Mapping[str, float] | None = None,
    levels: Mapping[str, float] | None = None,
    log: bool = False,
    falling: bool = False,
) -> None:
    """Curves over their common axis, with shaded intervals where they have any.

    `marks` are upright lines, in the colour of the curve of the same name where there is one;
    `levels` are level lines. `falling` runs the axis from high to low, as sigma does.
    """
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    axes = figure.subplots()
    shades = np.linspace(0, 0.9, len(curves))
    colours = {c.name: colormaps["viridis"](s) for c, s in zip(curves, shades, strict=True)}
    for c in curves:
        axes.plot(
            c.x, c.value, label=c.name, color=colours[c.name], marker="." if len(c.x) < 60 else None
        )
        if len(c.low):
            axes.fill_between(c.x, c.low, c.high, color=colours[c.name], alpha=0.18, linewidth=0)
    for name, at in (marks or {}).items():
        label = None if name in colours else name
        axes.axvline(at, color=colours.get(name, "0.35"), linestyle="--", linewidth=1, label=label)
    for name, at in (levels or {}).items():
        axes.axhline(at, color="0.35", linestyle=":", linewidth=1, label=name)
    axes.set(xlabel=curves[0].x_label, ylabel=y, title=title)
    if all(float(x).is_integer() for c in curves for x in c.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if falling:
        axes.invert_xaxis()
    if log:
        axes.set_yscale("symlog", linthresh=0.01)
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    save(figure, path)


def grid(
    path: Path,
    values: np.ndarray,
    *,
    x: str,
    y: str,
    title: str,
    limits: tuple[float, float] | None = None,
    mark: float | None = None,
) -> None:
    """A matrix as coloured cells with a scale (y down, x across, both counted from 0); NaN stays
    white; `mark` lines both axes.
    """
    rows, columns = values.shape
    figure = Figure(
        figsize=(max(4.5, min(9, 0.3 * columns + 1.5)), max(2.2, min(7, 0.3 * rows + 1.2))),
        layout="constrained",
    )
    axes = figure.subplots()
    low, high = limits or (0, np.nanmax(values) if np.isfinite(values).any() else 1)
    image = axes.imshow(
        values, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest"
    )
    if mark is not None:
        axes.axvline(mark, color="red", linestyle="--", linewidth=1)
        axes.axhline(mark, color="red", linestyle="--", linewidth=1)
    axes.set(xlabel=x, ylabel=y, title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=axes)
    save(figure, path)


def intervals(
    path: Path, rows: Mapping[str, Interval], *, x: str, title: str, strong: str = ""
) -> None:
    """One line for each name: a dot at the mean and a bar from low to high, with zero marked;
    `strong` is drawn in red.
    """
    figure = Figure(figsize=(7.2, 0.7 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color="0.6", linewidth=0.8)
    for place, (name, found) in enumerate(rows.items()):
        color = (0.9, 0.25, 0.2) if name == strong else (0.15, 0.25, 0.75)
        axes.plot([found.low, found.high], [place, place], color=color, linewidth=1.6)
        axes.plot(found.value, place, "o", color=color, markersize=4.5)
    axes.set(xlabel=x, ylim=(len(rows) - 0.5, -0.5))
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.grid(axis="x", alpha=0.25)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def matrix(
    path: Path,
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    title: str,
) -> None:
    """A table of numbers (rows columns) as colours between `limits`, each number written in its
    cell.
    """
    figure = Figure(figsize=(0.55 * len(columns) + 2.2, 0.42 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="coolwarm", vmin=limits[0], vmax=limits[1], aspect="auto")
    middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
    for (r, c), value in np.ndenumerate(values):
        color = "white" if abs(value - middle) > 0.75 * half else "black"
        axes.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8)
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, in one step."""
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
