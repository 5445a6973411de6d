"""`mirror`: a polyomino flips over, left to right or top to bottom."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, reduce
from itertools import groupby
from random import Random
from typing import ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import CELL, COLOURS

# No piece is its own image under a flip or a half turn, and none has a block of 2 x 2 squares.
PIECES = {
    "l": ("x.", "x.", "xx"),
    "v": ("x..", "x..", "xxx"),
    "f": (".xx", "xx.", ".x."),
    "y": (".x", "xx", ".x", ".x"),
    "n": (".x", ".x", "xx", "x."),
    "w": ("x..", "xx.", ".xx"),
}
UNITS = (8, 10)  # px along a square
PLACES = 4  # px between the places where a piece may stand
AXES = ("left right", "top bottom")
HELD_OUT = frozenset({"f left right", "n top bottom"})

Box = tuple[float, float, float, float]  # centre y, x and half height, width, in squares


@cache
def boxes(piece: str, pose: int) -> tuple[Box, ...]:
    """A piece in one of 8 poses, as overlapping runs of squares in rows and columns.

    Places are relative to its middle.

    Poses 0-3 are quarters of a clockwise turn, 4-7 the same of the mirror image.
    """
    squares = np.array([[mark == "x" for mark in row] for row in PIECES[piece]])
    squares = np.rot90(squares[:, ::-1] if pose >= 4 else squares, -pose)
    height, width = squares.shape
    rows = [
        (r + 0.5 - height / 2, (a + b - width) / 2, 0.5, (b - a) / 2)
        for r in range(height)
        for a, b in _runs(squares[r])
    ]
    columns = [
        ((a + b - height) / 2, c + 0.5 - width / 2, (b - a) / 2, 0.5)
        for c in range(width)
        for a, b in _runs(squares[:, c])
    ]
    return tuple(box for box in (*rows, *columns) if box[2] + box[3] > 1)


@dataclass(frozen=True)
class Mirror(Puzzle):
    """Flip the piece about its middle: over either axis (k = 2) or the named one (k = 1).

    Distinct pictures: 19,776 (6 pieces in 8 poses, 2 sizes and 6 colours, at 34 places on average).
    """

    piece: str
    pose: int  # see `boxes`
    unit: int  # px
    centre: tuple[int, int]  # (y, x) of the middle of its bounding box, px
    colour: str
    axis: str | None = None  # one of AXES, None: either

    kind: ClassVar[str] = "mirror"
    category: ClassVar[str] = "transformation"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    prompts: ClassVar[tuple[str, ...]] = tuple(
        f"mirror the shape {axis}".strip() for axis in ("", *AXES)
    )
    held_out: ClassVar[frozenset[str]] = HELD_OUT

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k")
        if knobs.k not in (None, 1, 2):
            raise MinicosError(f"{cls.kind} has 1 or 2 answers, not k = {knobs.k}")
        piece, pose, unit = rng.choice(tuple(PIECES)), rng.randrange(8), rng.choice(UNITS)
        reach = max(np.hypot(abs(y) + h, abs(x) + w) for y, x, h, w in boxes(piece, pose)) * unit
        middle = size * CELL // 2
        far = int(middle - 2 - reach) // PLACES
        centre = middle + PLACES * rng.randint(-far, far), middle + PLACES * rng.randint(-far, far)
        colour, axis = rng.choice(tuple(COLOURS)), rng.choice(AXES)
        return cls(size, piece, pose, unit, centre, colour, axis if knobs.k == 1 else None)

    @property
    def prompt(self) -> str:
        return f"mirror the shape {self.axis or ''}".strip()

    @property
    def key(self) -> str:
        centre = "{},{}".format(*self.centre)
        piece = f"{self.colour} {self.piece} {self.pose}"
        return f"{self.kind}/{self.size}/{piece} unit {self.unit} at {centre}"

    @property
    def composition(self) -> str | None:
        return self.axis and f"{self.piece} {self.axis}"

    @property
    def candidates(self) -> tuple[str, ...]:
        """The axes it may flip over."""
        return AXES if self.axis is None else (self.axis,)

    @property
    def foils(self) -> tuple[str, ...]:
        """The axis that is not asked for, and a half turn."""
        return (*(axis for axis in AXES if axis not in self.candidates), "half turn")

    def variants(self) -> tuple[Self, ...]:
        """The same picture with the other axis named."""
        return tuple(replace(self, axis=axis) for axis in AXES if self.axis not in (None, axis))

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: str, progress: np.ndarray) -> np.ndarray:
        angle = (np.pi * progress)[:, None, None].astype(np.float32)
        y, x = draw.pixels(self.size * CELL)
        y, x = y - self.centre[0], x - self.centre[1]
        tall = wide = np.ones_like(angle)  # how the piece is stretched
        if answer == "half turn":
            y, x = np.cos(angle) * y - np.sin(angle) * x, np.cos(angle) * x + np.sin(angle) * y
        elif answer == "left right":
            wide = np.cos(angle)
        else:
            tall = np.cos(angle)
        parts = [
            draw.box(y - cy * tall, x - cx * wide, h * np.abs(tall), w * np.abs(wide))
            for cy, cx, h, w in np.multiply(boxes(self.piece, self.pose), self.unit).tolist()
        ]
        shape = reduce(np.minimum, parts)
        return draw.paint(self.backdrop(), draw.coverage(shape), COLOURS[self.colour])


def _runs(line: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of every run of True."""
    at = 0
    for full, run in groupby(line.tolist()):
        length = len(list(run))
        if full:
            yield at, at + length
        at += length
