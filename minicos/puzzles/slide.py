"""`slide`: tiles slide to their outlines, one after another, and none may run into another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from math import factorial, inf
from random import Random
from typing import ClassVar, NamedTuple, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle, Score, clearest, timeline
from .draw import CELL, COLOURS, Cell

FRAMES = {2: 13, 3: 17, 4: 21}  # by the number of tiles
TILE, OUTLINE = 5.0, (5.0, 7.0)  # half the side of a tile, and of an outline inside and outside, px
REACH = 2  # cells that a tile may slide along either axis
ROOM = 12  # px between the middles of tiles that do not touch
FOILS = 6  # colliding orders at most
MIDDLE = 0.5  # the time in a turn at which the moving tile is determined
Order = tuple[str, ...]  # colours; shorter where the last tiles stay


class Tile(NamedTuple):
    """A coloured tile, and the cell of its outline."""

    colour: str
    start: Cell
    home: Cell

    def __str__(self) -> str:
        return "{} {},{} to {},{}".format(self.colour, *self.start, *self.home)


@dataclass(frozen=True)
class Slide(Puzzle):
    """Slide every tile straight to the outline of its colour, so that none runs into another.

    There are s tiles, and k of the s! orders are free of collisions. A tile may have to wait until
    another has left its outline.
    """

    tiles: tuple[Tile, ...]

    kind: ClassVar[str] = "slide"
    category: ClassVar[str] = "transformation"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    prompts: ClassVar[tuple[str, ...]] = ("move all to their boxes",)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "s")
        if (n := knobs.s or 3) not in FRAMES:
            raise MinicosError(f"{cls.kind} has 2 to 4 tiles, not s = {n}")
        counts = sorted(k for k in {1, 2, 3, factorial(n)} if k <= factorial(n))
        if knobs.k not in (None, *counts):
            raise MinicosError(f"{cls.kind} of {n} tiles has k in {counts}, not k = {knobs.k}")
        cells = [(r, c) for r in range(size) for c in range(size)]
        colours = sorted(rng.sample(tuple(COLOURS), n), key=tuple(COLOURS).index)
        while True:
            starts, homes = rng.sample(cells, n), rng.sample(cells, n)
            puzzle = cls(size, tuple(map(Tile, colours, starts, homes)))
            wanted = knobs.k or max(1, puzzle.ambiguity)
            if all(map(_in_reach, puzzle.tiles)) and puzzle.ambiguity == wanted:
                return puzzle

    @property
    def prompt(self) -> str:
        return self.prompts[0]

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/{' '.join(map(str, self.tiles))}"

    @cached_property
    def candidates(self) -> tuple[Order, ...]:
        """Orders free of collisions."""
        return tuple(order for order in self._orders if not self._collides(order))

    @property
    def foils(self) -> tuple[Order, ...]:
        """Orders with a collision, and one without a collision that omits the last tile."""
        wrong = [order for order in self._orders if order not in self.candidates]
        return (*wrong[:FOILS], self.candidates[0][:-1])

    @property
    def depth(self) -> int:
        return len(self.tiles)

    @property
    def frames(self) -> int:  # type: ignore[override]
        """13 for two tiles, and four more for each further one."""
        return FRAMES[len(self.tiles)]

    @cached_property
    def _orders(self) -> tuple[Order, ...]:
        return tuple(permutations(tile.colour for tile in self.tiles))

    def _collides(self, order: Order) -> bool:
        """Whether a tile would run into another that has not moved yet, or has moved already."""
        at = {tile.colour: tile.start for tile in self.tiles}
        for tile in sorted(self.tiles, key=lambda tile: order.index(tile.colour)):
            others = [cell for colour, cell in at.items() if colour != tile.colour]
            if any(_distance(tile, other) < ROOM for other in others):
                return True
            at[tile.colour] = tile.home
        return False

    def backdrop(self) -> np.ndarray:
        """The floor with the outlines."""
        canvas = draw.border(draw.floor(self.size))
        v, u = draw.pixels(CELL)
        inside, outside = (draw.box(v - CELL / 2, u - CELL / 2, half, half) for half in OUTLINE)
        ring = draw.coverage(np.maximum(outside, -inside))
        for tile in self.tiles:
            here = draw.window(tile.home)
            canvas[here] = draw.paint(canvas[here], ring, COLOURS[tile.colour])
        return canvas

    def animate(self, answer: Order, progress: np.ndarray) -> np.ndarray:
        canvas = np.repeat(self.backdrop()[None], len(progress), axis=0)
        y, x = draw.pixels(self.size * CELL)
        for tile in self.tiles:
            turn = answer.index(tile.colour) if tile.colour in answer else inf
            done = np.clip(progress * len(self.tiles) - turn, 0, 1).astype(np.float32)
            (sy, sx), (hy, hx) = draw.centre(tile.start), draw.centre(tile.home)
            my, mx = sy + (hy - sy) * done, sx + (hx - sx) * done
            rows, cols = _around(tile.start, tile.home)
            square = draw.box(
                y[rows] - my[:, None, None], x[:, cols] - mx[:, None, None], TILE, TILE
            )
            here = (slice(None), rows, cols)
            canvas[here] = draw.paint(canvas[here], draw.coverage(square), COLOURS[tile.colour])
        return canvas

    def score(self, video: np.ndarray) -> Score:
        """Judge a video uint8 (f, 64, 64, 3), f >= 5.

        The first frame must be this picture and the last must show every tile in its outline. In
        each turn it must be clear, half way through, which tile moves, and the order must be free
        of collisions.
        """
        self._check_video(video)
        start, last = self._mismatch(video[0], self.first_frame()), video[-1]
        order = self._order(video)
        shown = self._mismatch(last, self._still(self.candidates[0], 1.0))
        detail = start and f"first frame: {start}"
        if not detail and order is None:
            detail = "it is not clear in which order the tiles move"
        elif not detail and order not in self.candidates:
            whole = len(order or ()) == len(self.tiles)
            detail = "a tile runs into another" if whole else "a tile does not move"
        checks = {
            "start": float(not start),
            "kept": self._kept(last, self.candidates[0]),
            "way": float(order is not None and len(order) > 0),
            "order": float(order in self.candidates),
            **self.rules(last),
        }
        return self._verdict(order, detail or (shown and f"last frame: {shown}"), checks)

    def _order(self, video: np.ndarray) -> Order | None:
        """The tiles in the order of their motion, up to a turn without motion; None if unclear."""
        order: Order = ()
        times = timeline(len(video))
        for turn in range(len(self.tiles)):
            frame = int(np.abs(times - (turn + MIDDLE) / len(self.tiles)).argmin())
            rest = [tile.colour for tile in self.tiles if tile.colour not in order]
            options = [*((*order, colour) for colour in rest), order]
            looks = [self._still(option, float(times[frame])) for option in options]
            seen = clearest(video[frame], looks)
            if seen is None:
                return None
            if options[seen] == order:
                return order
            order = options[seen]
        return order


def _in_reach(tile: Tile) -> bool:
    (r, c), (home_r, home_c) = tile.start, tile.home
    return tile.start != tile.home and max(abs(r - home_r), abs(c - home_c)) <= REACH


def _around(a: Cell, b: Cell) -> tuple[slice, slice]:
    """Row and column slices of the pixels of all cells between two."""
    (top, bottom), (left, right) = (sorted(pair) for pair in zip(a, b, strict=True))
    return slice(top * CELL, (bottom + 1) * CELL), slice(left * CELL, (right + 1) * CELL)


def _distance(tile: Tile, cell: Cell) -> float:
    """How near a tile comes to the middle of a cell: the larger of both offsets, px."""
    steps = np.linspace(0, 1, 33)[:, None]
    path = np.array(tile.start) + steps * np.subtract(tile.home, tile.start)
    return float(CELL * np.abs(path - cell).max(1).min())
