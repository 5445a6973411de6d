"""Figures: shapes in four sizes and four directions, reading one from a cell, and dots to count.

Sizes and directions are as coarse as the embedded VAE requires.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from . import draw
from .draw import CELL, COLOURS, Cell

RADII = (4.5, 5.4, 6.3, 7.2)  # px, of the circle around a figure of each level
TURNS = {"circle": 1, "square": 1, "cross": 1, "triangle": 4, "half": 4}  # directions it can show
NAMES = tuple(TURNS)
INNER = (slice(1, -1), slice(1, -1))  # the part of a cell that is read, without walls and lines
LEAN = 0.3  # limit for `read`: no 60 : 40 mix passes

SPOTS = {  # px from the middle of a cell (y, x)
    1: ((0, 0),),
    2: ((-4, -4), (4, 4)),
    3: ((-4, -4), (0, 0), (4, 4)),
    4: ((-4, -4), (-4, 4), (4, -4), (4, 4)),
}


class Figure(NamedTuple):
    """A coloured shape of a size and direction."""

    shape: str
    colour: str
    level: int = 2  # index into RADII
    turn: int = 0  # quarters of a clockwise turn

    def __str__(self) -> str:
        return f"{self.colour} {self.shape} {self.level}{self.turn}"


def distance(shape: str, radius: float, turn: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Signed distance to a figure about the origin, apex or round side up before it turns."""
    angle = np.float32(turn * np.pi / 2)
    y, x = np.cos(angle) * y - np.sin(angle) * x, np.cos(angle) * x + np.sin(angle) * y
    if shape == "circle":
        return draw.disc(y, x, radius)
    if shape == "square":
        return draw.box(y, x, 0.75 * radius, 0.75 * radius)
    if shape == "cross":
        arm, pen = 0.95 * radius, 0.36 * radius
        return np.minimum(draw.box(y, x, arm, pen), draw.box(y, x, pen, arm))
    if shape == "triangle":
        side = 0.944 * np.abs(x) - 0.329 * (y + radius)  # pointed, so that its direction shows
        return np.maximum(y - 0.78 * radius, side)
    if shape == "half":
        return np.maximum(draw.disc(y - 0.4 * radius, x, radius), y - 0.4 * radius)
    raise ValueError(f"unknown figure {shape!r}: one of {', '.join(NAMES)}")


@cache
def cover(shape: str, level: int, turn: int) -> np.ndarray:
    """Coverage of a figure in the middle of one cell (CELL, CELL)."""
    y, x = draw.pixels(CELL)
    y, x = y - CELL / 2, x - CELL / 2
    return draw.coverage(distance(shape, RADII[level], turn, y, x))


def put(canvas: np.ndarray, figure: Figure, cell: Cell, shown: np.ndarray | None = None) -> None:
    """Paint a figure into a cell of `canvas` (n, h, w, 3), in place; `shown` (n,) in 0..1 reveals
    it from the bottom up.
    """
    here = (slice(None), *draw.window(cell))
    mask = cover(figure.shape, figure.level, figure.turn)
    if shown is not None:
        up = np.arange(CELL, 0, -1, dtype=np.float32) - np.float32(0.5)  # px above the cell's floor
        mask = (
            mask
            * draw.coverage(up[:, None] - CELL * shown[:, None, None])
            * (shown > 0)[:, None, None]
        )
    canvas[here] = draw.paint(canvas[here], mask, COLOURS[figure.colour])


def put_dots(canvas: np.ndarray, count: int, colour: str, cell: Cell) -> None:
    """Paint `count` dots (see SPOTS) into a cell of `canvas` (n, h, w, 3), in place."""
    here = (slice(None), *draw.window(cell))
    canvas[here] = draw.paint(canvas[here], _dots(count), COLOURS[colour])


@cache
def _dots(count: int) -> np.ndarray:
    """Coverage of `count` dots in one cell (CELL, CELL)."""
    y, x = draw.pixels(CELL)
    spots = [draw.disc(y - CELL / 2 - dy, x - CELL / 2 - dx, 2.2) for dy, dx in SPOTS[count]]
    return draw.coverage(np.minimum.reduce(spots))


@cache
def _bank() -> tuple[tuple[Figure, ...], np.ndarray, np.ndarray]:
    """Every figure in one colour, and the coverage of each, sharp and
    after a 3x3 mean (figures, pixels).
    """
    kinds = tuple(
        Figure(name, next(iter(COLOURS)), level, turn)
        for name in NAMES
        for level in range(len(RADII))
        for turn in range(TURNS[name])
    )
    sharp = np.stack([cover(f.shape, f.level, f.turn) for f in kinds])
    blurred = draw.box_blur(sharp[..., None], 3)[..., 0]
    sharp, blurred = (masks[:, *INNER].reshape(len(kinds), -1) for masks in (sharp, blurred))
    return kinds, sharp, blurred


def read(
    frame: np.ndarray, cell: Cell, background: np.ndarray, limit: float = LEAN
) -> Figure | None:
    """The figure in a cell of `frame` (h, w, 3); None if the cell is empty or shows none clearly.

    `background` (h, w, 3) is the picture without it. Clear means that the cell leans to no other
    figure by more than `limit`, each with the best-fitting blur (see `draw.lean`). A look is
    background + coverage x tint, so the required inner products of the 264 looks with pictures are
    products of their 44 coverages with tints.
    """
    kinds, sharp, blurred = _bank()
    seen, empty = (
        picture[draw.window(cell)][INNER].reshape(-1, 3).astype(np.float32)
        for picture in (frame, background)
    )
    seen -= empty
    tints = np.array(list(COLOURS.values()), np.float32) - empty[:, None]  # (pixels, colours, 3)
    square = np.square(tints).sum(-1)

    def along(masks: np.ndarray, picture: np.ndarray) -> np.ndarray:
        return masks @ (tints * picture[:, None]).sum(-1)  # inner products (figures, colours)

    errors = [masks**2 @ square - 2 * along(masks, seen) for masks in (sharp, blurred)]
    best = np.unravel_index(np.minimum(*errors).argmin(), errors[0].shape)
    ends = [masks[best[0], :, None] * tints[:, best[1]] for masks in (sharp, blurred)]
    masks = sharp + np.clip(draw.lean(seen, *ends), 0, 1) * (blurred - sharp)
    here = masks[best[0], :, None] * tints[:, best[1]]
    rest = seen - here
    lines = masks**2 @ square - 2 * along(masks, here) + np.square(here).sum()
    lines[best] = np.inf
    leans = (along(masks, rest) - (here * rest).sum()) / lines
    if max(leans.max(), draw.lean(seen, here, np.zeros_like(here))) > limit:
        return None
    return kinds[best[0]]._replace(colour=tuple(COLOURS)[best[1]])
