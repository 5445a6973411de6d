"""Every picture minicos draws; the one file that imports matplotlib. Arrays in, a PNG out, written in one step."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from minicos.runs import replace_file

INCH = 1.1  # width of a cell


def pixels(image: Tensor) -> np.ndarray:
    """(3 h w) in [0, 1] -> uint8 (h w 3)."""
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def sheet(
    path: Path, images: Sequence[Sequence[np.ndarray]], *, rows: Sequence[str], columns: Sequence[str], title: str
) -> None:
    """Pictures (uint8 h w 3) in a labelled grid."""
    figure, axes = _grid(len(rows), len(columns), images[0][0].shape[0] / images[0][0].shape[1], title)
    for r, line in enumerate(images):
        for c, image in enumerate(line):
            axes[r, c].imshow(image, interpolation="nearest")
    _label(axes, rows, columns)
    save(figure, path)


def heat_sheet(path: Path, values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str], title: str) -> None:
    """Values (row column h w) as heat maps in a labelled grid; every row has its own colour scale (1st to 99th percentile)."""
    figure, axes = _grid(len(rows), len(columns), values.shape[2] / values.shape[3], title)
    for r, line in enumerate(values):
        low, high = np.percentile(line, [1, 99])
        for c, value in enumerate(line):
            axes[r, c].imshow(value, vmin=low, vmax=max(high, low + 1e-12), cmap="magma", interpolation="nearest")
    _label(axes, rows, columns)
    save(figure, path)


def curves(path: Path, lines: Mapping[str, np.ndarray], *, x: str, y: str, title: str) -> None:
    """One curve for each name, coloured in order."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for k, (name, values) in enumerate(lines.items()):
        shade = k / max(1, len(lines) - 1)
        axes.plot(np.arange(len(values)), values, label=name, color=(0.15 + 0.75 * shade, 0.25, 0.75 - 0.55 * shade))
    axes.set(xlabel=x, ylabel=y, title=title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def _grid(rows: int, columns: int, ratio: float, title: str) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(INCH * columns + 1.0, INCH * ratio * rows + 0.7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _label(axes: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for edge in axis.spines.values():
            edge.set_visible(False)
    for axis, text in zip(axes[:, 0], rows, strict=True):
        axis.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=8)
    for axis, text in zip(axes[0], columns, strict=True):
        axis.set_title(text, fontsize=8)
