"""`tour`: visit coloured way-points in the order that the prompt names, leaving a trail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, pairwise, permutations
from math import factorial
from random import Random
from typing import ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import CELL, COLOURS, Cell
from .maze import AGENT, TRAIL

NAMES = ("red", "blue", "pink", "black")  # of way-points; agent and trail have the other colours
FRAMES = {2: 13, 3: 17, 4: 21}  # by the number of way-points
FOILS = 5  # of each sort, at most
CLEAR = 12  # px; distance of a leg from every point that it does not join
HELD_OUT = frozenset({"red blue black", "black pink red", "blue red pink", "pink black blue"})
Order = tuple[str, ...]


@dataclass(frozen=True)
class Tour(Puzzle):
    """Walk straight to each way-point, in the order named (k = 1) or in any (k = s!).

    s way-points are placed in a field without walls such that no order crosses a point before its
    turn.

    Distinct pictures: on 4x4, 11,088 (s = 2) and 16,416 (s = 3), with s! named orders each. Four
    points hardly fit into 4x4 (480): use 5x5.
    """

    start: Cell
    points: tuple[Cell, ...]  # of the colours below
    colours: tuple[str, ...]  # in the order of NAMES
    order: Order | None = None  # that the prompt names; None: any

    kind: ClassVar[str] = "tour"
    category: ClassVar[str] = "spatiality"
    sizes: ClassVar[tuple[int, ...]] = (4, 5)
    prompts: ClassVar[tuple[str, ...]] = (
        "visit all",
        *(f"visit {' then '.join(order)}" for n in FRAMES for order in permutations(NAMES, n)),
    )
    held_out: ClassVar[frozenset[str]] = HELD_OUT

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "s")
        if (n := knobs.s or 3) not in FRAMES:
            raise MinicosError(f"{cls.kind} has 2 to 4 way-points, not s = {n}")
        if knobs.k not in (None, 1, factorial(n)):
            raise MinicosError(
                f"{cls.kind} has 1 or s! = {factorial(n)} answers, not k = {knobs.k}"
            )
        cells = [(r, c) for r in range(size) for c in range(size)]
        while True:
            start, *points = rng.sample(cells, n + 1)
            if _clear([start, *points]):
                break
        colours = tuple(sorted(rng.sample(NAMES, n), key=NAMES.index))
        order = tuple(rng.sample(colours, n))
        return cls(size, start, tuple(points), colours, order if knobs.k == 1 else None)

    @property
    def prompt(self) -> str:
        return "visit all" if self.order is None else f"visit {' then '.join(self.order)}"

    @property
    def key(self) -> str:
        places = zip(("start", *self.colours), (self.start, *self.points), strict=True)
        return f"{self.kind}/{self.size}/{' '.join(f'{name} {r},{c}' for name, (r, c) in places)}"

    @property
    def composition(self) -> str | None:
        """The order that the prompt names."""
        return None if self.order is None else " ".join(self.order)

    @property
    def candidates(self) -> tuple[Order, ...]:
        """Orders in which the points may be visited."""
        return tuple(permutations(self.colours)) if self.order is None else (self.order,)

    @property
    def foils(self) -> tuple[Order, ...]:
        """Orders that are not asked for, and tours that omit the last point."""
        others = [order for order in permutations(self.colours) if order not in self.candidates]
        return (*others[:FOILS], *(order[:-1] for order in self.candidates[:FOILS]))

    @property
    def depth(self) -> int:
        return len(self.points)

    @property
    def frames(self) -> int:  # type: ignore[override]
        """13 for two way-points, and four more for each further one."""
        return FRAMES[len(self.points)]

    def variants(self) -> tuple[Self, ...]:
        """The same picture with every other order named."""
        orders = () if self.order is None else permutations(self.colours)
        return tuple(replace(self, order=order) for order in orders if order != self.order)

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: Order, progress: np.ndarray) -> np.ndarray:
        y, x = draw.pixels(self.size * CELL)
        place = dict(zip(self.colours, map(_centre, self.points), strict=True))
        corners = [_centre(self.start), *(place[colour] for colour in answer)]
        lengths = [abs(b - a) for a, b in pairwise(corners)]
        walked = (progress * sum(lengths)).astype(np.float32)
        trail = reduce(np.maximum, _legs(x + 1j * y, corners, walked[:, None, None]))
        canvas = draw.paint(self.backdrop(), trail, TRAIL)
        v, u = draw.pixels(CELL)
        square = draw.coverage(draw.box(v - CELL / 2, u - CELL / 2, 5, 5))
        for colour, cell in zip(self.colours, self.points, strict=True):
            here = (slice(None), *draw.window(cell))
            canvas[here] = draw.paint(canvas[here], square, COLOURS[colour])
        agent = np.interp(walked, np.cumsum([0, *lengths]), corners)[:, None, None]
        dy, dx = (y - agent.imag).astype(np.float32), (x - agent.real).astype(np.float32)
        return draw.paint(canvas, draw.coverage(draw.disc(dy, dx, 4.6)), AGENT)


def _centre(cell: Cell) -> complex:
    """The middle of a cell as x + iy, px."""
    y, x = draw.centre(cell)
    return complex(x, y)


def _legs(grid: np.ndarray, corners: list[complex], walked: np.ndarray) -> Iterator[np.ndarray]:
    """Coverage of every pixel by what is `walked` (n, 1, 1), px, of each leg (n, h, w)."""
    before = 0.0
    for a, b in pairwise(corners):
        length, heading = abs(b - a), (b - a) / abs(b - a)
        offset = ((grid - a) * heading.conjugate()).astype(np.complex64)
        line = draw.coverage(np.maximum(np.abs(offset.imag) - 2, -offset.real))
        done = np.clip(walked - np.float32(before), 0, np.float32(length))
        yield line * draw.coverage(offset.real - done)
        before += length


def _clear(cells: list[Cell]) -> bool:
    """Whether no straight leg between two cells comes near a third."""
    centres = [_centre(cell) for cell in cells]
    for a, b in combinations(centres, 2):
        for c in centres:
            if c not in (a, b):
                offset = (c - a) * ((b - a) / abs(b - a)).conjugate()
                along = min(max(offset.real, 0), abs(b - a))
                if abs(offset - along) < CLEAR:
                    return False
    return True
