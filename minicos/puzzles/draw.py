"""Pixel primitives: flat colours, signed distances, and the two comparisons used for scoring.

Lengths are pixels, x to the right and y down, measured from the top left corner of the picture;
pixel (r, c) has its centre at (r + 0.5, c + 0.5). A signed distance is negative inside a shape.
Canvases are float32 in 0..255 until `to_uint8`, with any leading axes (usually frames): (..., h, w,
3).
"""

from __future__ import annotations

from functools import cache, reduce
from typing import NamedTuple

import numpy as np

CELL = 16  # pixels along a side: one cell is one token of the tiny model (VAE stride 8, patch 2)

Cell = tuple[int, int]  # (row, column)
Colour = tuple[int, int, int]

FLOOR: Colour = (244, 244, 244)
GRID: Colour = (212, 212, 212)
WALL: Colour = (45, 45, 45)
BLOCK: Colour = (150, 150, 150)
YELLOW: Colour = (255, 214, 30)
COLOURS: dict[str, Colour] = {
    "red": (222, 40, 45),
    "green": (35, 165, 70),
    "blue": (35, 60, 205),
    "sky": (80, 185, 250),
    "pink": (240, 105, 200),
    "black": (20, 20, 20),
}
PALE = "pink"  # the colour that the embedded VAE draws too pale for small or short-lived things
SHAPES = ("circle", "triangle", "square", "cross")
LEAN = 0.25  # limit for `likeness`: mixes of 60 : 40 lean by .27 and more, a blurred object by .08


class Item(NamedTuple):
    """A coloured shape in a cell."""

    shape: str
    colour: str
    cell: Cell

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}@{self.cell[0]},{self.cell[1]}"


# -- geometry --------------------------------------------------------------------------------------


@cache
def pixels(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres of a square picture: y (side, 1) and x (1, side), in pixels."""
    centres = np.arange(side, dtype=np.float32) + np.float32(0.5)
    return centres[:, None], centres[None, :]


def centre(cell: Cell) -> tuple[float, float]:
    """Centre (y, x) of a cell, in pixels."""
    return (cell[0] + 0.5) * CELL, (cell[1] + 0.5) * CELL


def disc(y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to a disc about the origin."""
    return np.sqrt(y * y + x * x) - np.float32(radius)


def box(
    y: np.ndarray, x: np.ndarray, half_h: float | np.ndarray, half_w: float | np.ndarray
) -> np.ndarray:
    """Signed distance (Chebyshev) to an upright box about the origin; its
    halves may be arrays that broadcast.
    """
    return np.maximum(np.abs(y) - np.float32(half_h), np.abs(x) - np.float32(half_w))


def shape(name: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to one of SHAPES about the origin; none reaches farther than 5 px."""
    if name == "circle":
        return disc(y, x, 4.8)
    if name == "square":
        return box(y, x, 4, 4)
    if name == "cross":
        return np.minimum(box(y, x, 5, 2), box(y, x, 2, 5))
    if name == "triangle":  # apex up: base at y = 4, slanted sides with slope 2
        return np.maximum(y - 4, (2 * np.abs(x) - y - 5.5) * np.float32(5**-0.5))
    raise ValueError(f"unknown shape {name!r}: one of {', '.join(SHAPES)}")


# -- painting --------------------------------------------------------------------------------------


def coverage(distance: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, 0..1: a one-pixel ramp across its outline."""
    return np.clip(np.float32(0.5) - distance, 0, 1)


def paint(canvas: np.ndarray, cover: np.ndarray, colour: Colour | np.ndarray) -> np.ndarray:
    """Lay a colour, or a picture (h, w, 3), over `canvas` (..., h, w, 3) where `cover`
    (..., h, w) is 1; leading axes broadcast.
    """
    painted = np.empty((*np.broadcast_shapes(canvas.shape[:-1], cover.shape), 3), np.float32)
    colour = np.asarray(colour, np.float32)
    for k in range(3):  # by channel: broadcasting over a last axis of 3 is five times slower
        painted[..., k] = canvas[..., k] + cover * (colour[..., k] - canvas[..., k])
    return painted


def floor(size: int) -> np.ndarray:
    """Empty floor of size x size cells (h, w, 3)."""
    side = size * CELL
    return np.full((side, side, 3), FLOOR, np.float32)


def grid(size: int) -> np.ndarray:
    """Floor with lines between the cells and the wall all round (h, w, 3)."""
    canvas = floor(size)
    for line in range(CELL, size * CELL, CELL):
        canvas[line - 1 : line + 1, :] = canvas[:, line - 1 : line + 1] = GRID
    return border(canvas)


def filled(level: np.ndarray) -> np.ndarray:
    """Coverage of cells that fill from the bottom, the lines between them left free: level
    (n, rows, columns) in 0..1 to (n, h, w).
    """
    inside = np.zeros(CELL, np.float32)
    inside[1:-1] = 1
    above = np.arange(CELL, 0, -1, dtype=np.float32) - np.float32(
        1.5
    )  # px of level below a pixel's centre
    height = np.float32(CELL - 2) * level.astype(np.float32)[:, :, None, :]  # px
    upright = coverage(above[:, None] - height) * inside[:, None]  # (n, rows, CELL, columns)
    n, rows, _, columns = upright.shape
    cells = upright[..., None] * inside
    return cells.reshape(n, rows * CELL, columns * CELL)


def border(canvas: np.ndarray) -> np.ndarray:
    """A copy of `canvas` (..., h, w, 3) with the 2 px wall all round."""
    framed = canvas.copy()
    framed[..., :2, :, :] = framed[..., -2:, :, :] = WALL
    framed[..., :, :2, :] = framed[..., :, -2:, :] = WALL
    return framed


def items(canvas: np.ndarray, items_: tuple[Item, ...]) -> np.ndarray:
    """`canvas` (..., h, w, 3) with every item in its cell."""
    painted = canvas.copy()
    for item in items_:
        here = (..., *window(item.cell), slice(None))
        painted[here] = paint(painted[here], stencil(item.shape), COLOURS[item.colour])
    return painted


def window(cell: Cell) -> tuple[slice, slice]:
    """Row and column slices of a cell's pixels."""
    row, col = cell
    return slice(row * CELL, (row + 1) * CELL), slice(col * CELL, (col + 1) * CELL)


@cache
def stencil(name: str, blur: int = 1) -> np.ndarray:
    """Coverage of a shape in the middle of one cell (CELL, CELL), after a blur x blur mean."""
    y, x = pixels(CELL)
    return box_blur(coverage(shape(name, y - CELL / 2, x - CELL / 2))[..., None], blur)[..., 0]


def to_uint8(canvas: np.ndarray) -> np.ndarray:
    """Round a float canvas to uint8."""
    return (canvas + np.float32(0.5)).astype(np.uint8)


# -- comparing -------------------------------------------------------------------------------------


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pixels (..., h, w) where two uint8 pictures differ by more than 24 in some channel."""
    return np.abs(a.astype(np.int16) - b).max(-1) > 24


def box_blur(picture: np.ndarray, width: int) -> np.ndarray:
    """Mean over width x width pixels (odd), edges repeated: float32 (..., h, w, 3)."""
    blurred: np.ndarray = picture.astype(np.float32)
    reach = width // 2
    for axis in (-3, -2):
        length = blurred.shape[axis]
        padding = [(0, 0)] * blurred.ndim
        padding[axis] = (reach, reach)
        padded = np.moveaxis(np.pad(blurred, padding, mode="edge"), axis, 0)
        total = reduce(np.add, (padded[k : k + length] for k in range(width)))
        blurred = np.moveaxis(total / width, 0, axis)
    return blurred


def deviation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Distance in RGB, 0..441, between two pictures after a 5x5 mean: (..., h, w).

    The mean tolerates blur, noise and outlines that are off by a fraction of a pixel, and keeps
    everything with a meaning: a wall (2 px) that appeared or vanished still counts 140, a stub of
    trail (4 px) 120, a moved object 200.
    """
    return np.linalg.norm(box_blur(a.astype(np.float32) - b, 5), axis=-1)


def lean(frame: np.ndarray, here: np.ndarray, there: np.ndarray) -> float:
    """The position of `frame` on the line from one picture (0) to another (1). Noise and blur
    hardly move it; a mixture does.
    """
    line = there.astype(np.float32) - here
    return float(((frame - here.astype(np.float32)) * line).sum() / np.square(line).sum())


def likeness(
    frame: np.ndarray, cell: Cell, background: np.ndarray
) -> tuple[tuple[str, str], float]:
    """The (shape, colour) that best explains the content of a cell of `frame` (h, w, 3), and its
    lean.

    `background` (h, w, 3) is the same picture without the object. The lean detects blends: it is
    the position of the cell between this look, with the best-fitting blur, and another one, about
    .5 for an even blend of two. Sharp and blurred renderings are both compared: against sharp ones
    alone, a blurred square would pass for a circle. The outer 3 px are ignored, since walls bleed
    into them.
    """
    inner = (slice(3, -3), slice(3, -3))
    seen, empty = (
        picture[window(cell)][inner].astype(np.float32) for picture in (frame, background)
    )
    looks = [(name, colour) for name in SHAPES for colour in COLOURS]
    covers = np.stack([[stencil(name, blur)[inner] for name, _ in looks] for blur in (1, 3)])
    colours = np.array([COLOURS[colour] for _, colour in looks], np.float32)[:, None, None]
    sharp, blurred = empty + covers[..., None] * (colours - empty)  # (looks, h, w, 3) each
    errors = np.square(np.stack([sharp, blurred]) - seen).sum((2, 3, 4))
    best = int(errors.min(0).argmin())
    mix = np.clip(lean(seen, sharp[best], blurred[best]), 0, 1)
    fit = sharp + mix * (blurred - sharp)
    leans = [lean(seen, fit[best], look) for i, look in enumerate(fit) if i != best]
    return looks[best], max(leans)


def identify(frame: np.ndarray, cell: Cell, background: np.ndarray) -> tuple[str, str]:
    """The (shape, colour) that best explains the content of a cell of `frame`, see `likeness`."""
    return likeness(frame, cell, background)[0]
