"""Every figure that minicos draws; the only file that imports matplotlib. Arrays in, a PNG out,
written atomically.

`lines` also writes the numbers that it draws, as NAME.json next to NAME.png: the page of a run
shows them as a curve that follows its sliders. Figures of large models stay legible: a sheet shows
at most `ROWS` latent frames and `COLUMNS` layers, evenly spaced, and its title says of how many.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from minicos.analysis.result import Curve, Interval
from minicos.runs import replace_file

# inches: the widest cell, and the size that all cells together should fit into
CELL, WIDTH, HEIGHT = 1.1, 11.0, 7.5
DPI, PAD = 110, 0.08  # pixels an inch; inches around a figure
GAP = 0.03  # of a cell, on each side
ROWS, COLUMNS = 11, 12  # most maps of a sheet
STRENGTH = 0.65  # opacity of a map over the picture beneath it


def pixels(image: Tensor) -> np.ndarray:
    """(3 h w) in [0, 1] -> uint8 (h w 3)."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` indices, evenly spaced, including first and last: the rows or
    columns that a sheet shows.
    """
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def four_each(frame: int) -> range:
    """The video frames of a latent frame, as `Model.frames_behind_token` gives them for Wan."""
    return range(0, 1) if frame == 0 else range(4 * frame - 3, 4 * frame + 1)


def frame_name(shown: range) -> str:
    """The video frames that a latent frame shows: "frame 0", "1-4"; "padding" for none."""
    if len(shown) < 2:
        return f"frame {shown[0]}" if shown else "padding"
    return f"{shown[0]}-{shown[-1]}"


def under(video: np.ndarray | None, frames: Sequence[int]) -> list[np.ndarray] | None:
    """These frames of a video, or its last if they are beyond; None without a video."""
    return None if video is None else [video[min(f, len(video) - 1)] for f in frames]


def heat(values: np.ndarray, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Values of any shape as colours (... 4), from `low` (black) to `high` (pale yellow), by
    default their 1st and 99th percentile. Non-finite values are transparent.
    """
    low, high = _ends(values, low, high)
    colours = colormaps["magma"]((np.nan_to_num(values) - low) / max(high - low, 1e-12))
    colours[..., 3] = np.isfinite(values)
    return colours


def _ends(values: np.ndarray, low: float | None, high: float | None) -> tuple[float, float]:
    known = values[np.isfinite(values)]
    found = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
    return (float(found[0] if low is None else low), float(found[1] if high is None else high))


def colours(values: np.ndarray) -> np.ndarray:
    """Three numbers per pixel (... 3), centred on 0, as red, green and blue in [0, 1].

    0 is grey. All three share one scale, the largest absolute value, so the first principal
    component colours a picture most, and a component that hardly varies is hardly visible.
    """
    return 0.5 + 0.5 * values / max(np.abs(values).max(), 1e-12)


def sheet(
    path: Path,
    images: Sequence[Sequence[np.ndarray]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
) -> Path:
    """Pictures (uint8 h w 3, or colours in [0, 1]) in a labelled grid that fits on a screen, unless
    that would make them tiny. Returns `path`.
    """
    return save(_cells(images, rows, columns, title), path)


def maps(
    path: Path,
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    bar: str,
    beneath: Sequence[np.ndarray] | None = None,
    limits: tuple[float, float] | None = None,
) -> Path:
    """Maps (rows columns h w) in a labelled grid with a colour bar, each over the picture `beneath`
    its row (uint8 h w 3) if there is one.

    With `limits`, one scale applies to all maps. Without, each column has its own scale, from the
    1st to the 99th percentile, which is written above it. At most `ROWS` x `COLUMNS` maps are
    drawn, evenly spaced. Returns `path`.
    """
    r, c = evenly(len(values), ROWS), evenly(len(values[0]), COLUMNS)
    ends = [limits or _ends(values[:, k], None, None) for k in c]
    pictures = [
        [
            _over(None if beneath is None else beneath[i], values[i, k], *span)
            for k, span in zip(c, ends, strict=True)
        ]
        for i in r
    ]
    names = [columns[k] for k in c]
    if limits is None:
        names = [
            f"{name}\n{_brief(low)} to {_brief(high)}"
            for name, (low, high) in zip(names, ends, strict=True)
        ]
    for shown, of, what in ((r, rows, "rows"), (c, columns, "columns")):
        if len(shown) < len(of):
            title += f"; {len(shown)} of {len(of)} {what}"
    figure = _cells(pictures, [rows[i] for i in r], names, title, wide=limits is None)
    scale = ScalarMappable(Normalize(*(limits or (0, 1))), colormaps["magma"])
    width, height = figure.get_size_inches()
    beside = figure.add_axes((1 + 0.1 / width, 0, max(0.1, height / 30) / width, 1))
    drawn = figure.colorbar(scale, cax=beside)
    drawn.set_label(bar, fontsize=8)
    drawn.ax.tick_params(labelsize=7)
    if limits is None:
        drawn.set_ticks([0, 1], labels=["lowest of\nits column", "highest"])
    return save(figure, path)


def _over(picture: np.ndarray | None, values: np.ndarray, low: float, high: float) -> np.ndarray:
    """A map (h w) as colours, over a grey picture if there is one."""
    painted = heat(values, low, high)[..., :3]
    if picture is None:
        return painted
    size = picture.shape[1], picture.shape[0]
    tiles = Image.fromarray((255 * painted).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    grey = picture.mean(2, keepdims=True) / 255
    return STRENGTH * np.asarray(tiles) / 255 + (1 - STRENGTH) * grey


def _cells(
    images: Sequence[Sequence[np.ndarray]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    wide: bool = False,
) -> Figure:
    """A figure with the pictures in a labelled grid; `wide` if the names above need room."""
    ratio = images[0][0].shape[0] / images[0][0].shape[1]
    cell = max(0.4, min(CELL, WIDTH / len(columns), HEIGHT / (ratio * len(rows))))
    if wide:
        cell = max(cell, 0.75)
    # One picture of all cells, drawn pixel by pixel: matplotlib would take seconds for a hundred.
    wide_px, high_px = round(DPI * cell), round(DPI * cell * ratio)
    gap = max(1, round(GAP * wide_px))
    canvas = Image.new("RGB", (wide_px * len(columns), high_px * len(rows)), "white")
    for r, line in enumerate(images):
        for c, image in enumerate(line):
            shown = _resized(image, wide_px - 2 * gap, max(1, high_px - 2 * gap))
            canvas.paste(shown, (c * wide_px + gap, r * high_px + gap), mask=shown)
    figure = Figure(figsize=(canvas.width / DPI, canvas.height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))  # names and title are outside; `save` makes room for them
    place = (-0.5, len(columns) - 0.5, len(rows) - 0.5, -0.5)
    axes.imshow(np.asarray(canvas), extent=place, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    letters = 8 if cell > 0.7 else 6.5
    axes.tick_params(length=0, labelsize=letters, top=True, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(_wrapped(title, figure.get_figwidth() + 1.4), fontsize=9)
    return figure


def _resized(image: np.ndarray, width: int, height: int) -> Image.Image:
    """A picture (uint8 h w 3, or colours in [0, 1], perhaps with an opacity) as RGBA, in another
    size: larger with sharp pixels.
    """
    bounded = image if image.dtype == np.uint8 else (255 * image).round().clip(0, 255)
    sharp = image.shape[1] < width
    how = Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS
    return Image.fromarray(bounded.astype(np.uint8)).convert("RGBA").resize((width, height), how)


def _title(figure: Figure, title: str) -> None:
    """A title wrapped to the figure's width."""
    figure.suptitle(_wrapped(title, figure.get_figwidth()), fontsize=9)


def _wrapped(title: str, inches: float) -> str:
    """A title in lines of this length; line breaks of its own are kept."""
    width = int(13.5 * inches)  # letters of 9 points in a line
    lines = [line for part in title.split("\n") for line in textwrap.wrap(part, max(20, width))]
    return "\n".join(lines)


def _brief(value: float) -> str:
    return f"{value:.2g}"


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
    sigmas: Sequence[float] | None = None,
) -> Path:
    """Curves over their common axis, with shaded intervals if they have any; their numbers are
    written to a file of the same name that ends in .json. Returns `path`.

    The y axis begins at 0 unless a value is below it.

    Args:
        marks: vertical lines, in the colour of the curve with the same name if there is one.
        levels: horizontal lines.
        sigmas: noise levels of the steps, written below an axis of steps.
        falling: let the x axis run from high to low, as sigma does.
    """
    figure = Figure(figsize=(7.6, 4), layout="constrained")
    axes = figure.subplots()
    shades = np.linspace(0, 0.9, len(curves))
    colours = {c.name: colormaps["viridis"](s) for c, s in zip(curves, shades, strict=True)}
    for c in curves:
        marker = "." if len(c.x) < 60 else None
        axes.plot(c.x, c.value, label=c.name, color=colours[c.name], marker=marker)
        if len(c.low):
            axes.fill_between(c.x, c.low, c.high, color=colours[c.name], alpha=0.18, linewidth=0)
    for name, at in (marks or {}).items():
        label = None if name in colours else name
        axes.axvline(at, color=colours.get(name, "0.35"), linestyle="--", linewidth=1, label=label)
    for (name, at), style in zip((levels or {}).items(), cycle((":", "--", "-.")), strict=False):
        axes.axhline(at, color="0.35", linestyle=style, linewidth=1, label=name)
    axes.set(xlabel=curves[0].x_label, ylabel=y)
    if all(float(x).is_integer() for c in curves for x in c.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if falling:
        axes.invert_xaxis()
    if sigmas is not None:
        _noise_levels(axes, curves[0].x, sigmas)
    known = [v for c in curves for v in (*c.value, *c.low) if math.isfinite(v)]
    if log:
        axes.set_yscale("symlog", linthresh=0.01)
    if log or min(known, default=0) >= 0:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    _title(figure, title)
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    save(figure, path)
    about = {"title": title, "unit": y, "marks": dict(marks or {}), "levels": dict(levels or {})}
    text = (
        json.dumps({**about, "falling": falling, "curves": [_plain(asdict(c)) for c in curves]})
        + "\n"
    )
    numbers = path.with_suffix(".json")
    replace_file(numbers, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def _plain(value: Any) -> Any:
    """The value as JSON: non-finite numbers become null."""
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return [_plain(v) for v in value]
    return float(value) if math.isfinite(value) else None


def _noise_levels(
    axes: Axes, steps: Sequence[float], sigmas: Sequence[float], most: int = 8
) -> None:
    """Tick labels of an x axis of steps: the step, and its sigma below."""
    shown = [int(steps[i]) for i in evenly(len(steps), most)]
    axes.set_xticks(shown, [f"{s}\nσ {sigmas[s]:.2f}" for s in shown], fontsize=8)


def grid(
    path: Path,
    values: np.ndarray,
    *,
    x: str,
    y: str,
    title: str,
    bar: str = "",
    limits: tuple[float, float] | None = None,
    mark: float | None = None,
    rows: Sequence[str] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Path:
    """A matrix as coloured cells with a scale (y down, x across, both from 0); NaN stays white;
    `mark` draws a line across both axes; `rows` are names of the rows; `sigmas` as in `lines`.
    Returns `path`.
    """
    high, wide = values.shape
    size = (max(4.5, min(9, 0.3 * wide + 1.5)), max(2.2, min(7, 0.3 * high + 1.2)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    low, top = limits or (0, np.nanmax(values) if np.isfinite(values).any() else 1)
    image = axes.imshow(
        values, aspect="auto", cmap="viridis", vmin=low, vmax=top, interpolation="nearest"
    )
    if mark is not None:
        axes.axvline(mark, color="red", linestyle="--", linewidth=1)
        axes.axhline(mark, color="red", linestyle="--", linewidth=1)
    axes.set(xlabel=x, ylabel=y)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    if rows is not None:
        shown = evenly(high, 21)
        axes.set_yticks(shown, [rows[i] for i in shown], fontsize=8)
    if sigmas is not None:
        _noise_levels(axes, range(wide), sigmas, most=int(size[0]))
    _title(figure, title)
    figure.colorbar(image, ax=axes, label=bar)
    return save(figure, path)


def intervals(
    path: Path, rows: Mapping[str, Interval], *, x: str, title: str, strong: str = ""
) -> None:
    """A line for each name: a dot at the mean and a bar from low to high, with a line at zero;
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
    _title(figure, title)
    save(figure, path)


def matrix(
    path: Path,
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    title: str,
    x: str = "",
    bar: str = "",
) -> None:
    """A table of numbers (rows columns) as colours between `limits`, with each number written in
    its cell.
    """
    figure = Figure(figsize=(0.55 * len(columns) + 3, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="coolwarm", vmin=limits[0], vmax=limits[1], aspect="auto")
    middle, half = sum(limits) / 2, (limits[1] - limits[0]) / 2
    for (r, c), value in np.ndenumerate(values):
        color = "white" if abs(value - middle) > 0.75 * half else "black"
        axes.text(c, r, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(x)
    axes.tick_params(length=0, labelsize=8)
    figure.colorbar(image, ax=axes, label=bar)
    _title(figure, title)
    save(figure, path)


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, atomically; returns `path`."""
    whole: Any = "tight"
    if figure.get_layout_engine() is None:  # what "tight" finds by drawing everything once more
        whole = figure.get_tightbbox().padded(PAD)
    kind: dict[str, Any] = {"format": "png", "dpi": DPI, "bbox_inches": whole, "pad_inches": PAD}
    replace_file(path, lambda temporary: figure.savefig(temporary, **kind))
    return path
