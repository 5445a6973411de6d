"""`memory`: an object passes behind a block and comes out again, unchanged."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import BLOCK, CELL, COLOURS, SHAPES, Cell, Item


@dataclass(frozen=True)
class Memory(Puzzle):
    """Move the object that faces the block straight on, behind the block, to the first cell past
    it.

    The block fills the cells between start and stop, and any number of lanes next to the object's
    own. Up to two other objects stand still in lanes the block leaves free, so that what comes out
    cannot be guessed from what is in sight.

    Distinct puzzles: 3,221,952 (3x3), 78,470,784 (4x4); without the bystanders 960 and 5,760.
    """

    mover: Item
    stop: Cell
    lanes: tuple[
        int, int
    ]  # first and last row (column, when the object moves up or down) that the block spans
    others: tuple[Item, ...]

    kind: ClassVar[str] = "memory"
    category: ClassVar[str] = "memory"
    prompts: ClassVar[tuple[str, ...]] = ("pass behind the wall",)
    sizes: ClassVar[tuple[int, ...]] = (3, 4)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind)
        lane = rng.randrange(size)
        start, stop = rng.choice(
            [(a, b) for a in range(size) for b in range(size) if abs(a - b) >= 2]
        )
        lanes = rng.randint(0, lane), rng.randint(lane, size - 1)
        free = [(k, at) for k in range(size) if not lanes[0] <= k <= lanes[1] for at in range(size)]
        turn = rng.choice((lambda cell: cell, lambda cell: cell[::-1]))  # lanes are rows or columns
        cells = sorted(map(turn, rng.sample(free, min(rng.randint(0, 2), len(free)))))
        thing = [(rng.choice(SHAPES), rng.choice(tuple(COLOURS))) for _ in range(1 + len(cells))]
        mover = Item(*thing[0], turn((lane, start)))
        others = tuple(Item(*what, cell) for what, cell in zip(thing[1:], cells, strict=True))
        return cls(size, mover, turn((lane, stop)), lanes, others)

    @property
    def prompt(self) -> str:
        return "pass behind the wall"

    @property
    def key(self) -> str:
        others = " ".join(map(str, self.others))
        stop, lanes = "{},{}".format(*self.stop), "{}-{}".format(*self.lanes)
        return f"{self.kind}/{self.size}/{self.mover} to {stop} block {lanes} others {others}"

    @property
    def candidates(self) -> tuple[Item, ...]:
        """What comes out: the object, where it stops."""
        return (self.mover._replace(cell=self.stop),)

    @property
    def foils(self) -> tuple[Item, ...]:
        """Another object comes out: of the next colour, or of the next shape."""
        (right,), colours = self.candidates, tuple(COLOURS)
        colour = colours[(colours.index(right.colour) + 1) % len(colours)]
        shape = SHAPES[(SHAPES.index(right.shape) + 1) % len(SHAPES)]
        return (right._replace(colour=colour), right._replace(shape=shape))

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: Item, progress: np.ndarray) -> np.ndarray:
        y, x = draw.pixels(self.size * CELL)
        ends = np.array([draw.centre(self.mover.cell), draw.centre(answer.cell)], np.float32)
        my, mx = (
            (ends[0, k] + progress * (ends[1, k] - ends[0, k]))[:, None, None] for k in (0, 1)
        )
        canvas = draw.items(self.backdrop(), self.others)
        for item, when in ((self.mover, progress < 0.5), (answer, progress >= 0.5)):
            cover = draw.coverage(draw.shape(item.shape, y - my, x - mx))
            cover = cover * when[:, None, None]
            canvas = draw.paint(canvas, cover, COLOURS[item.colour])
        rows, cols = self._block()
        canvas[:, rows, cols] = BLOCK
        return draw.border(canvas)

    def _block(self) -> tuple[slice, slice]:
        """The block's pixels. It overhangs the cells next to it by 2 px,
        to hide the object for longer.
        """
        axis = int(self.mover.cell[0] == self.stop[0])  # 1: along a row
        low, high = sorted((self.mover.cell[axis], self.stop[axis]))
        along = slice((low + 1) * CELL - 2, high * CELL + 2)
        across = slice(self.lanes[0] * CELL, (self.lanes[1] + 1) * CELL)
        return (across, along) if axis == 1 else (along, across)

    def hidden_cells(self) -> tuple[Cell, ...]:
        """The cells of the object's own lane that the block covers."""
        (r0, c0), (r1, c1) = sorted((self.mover.cell, self.stop))
        return tuple(
            (r, c)
            for r in range(r0, r1 + 1)
            for c in range(c0, c1 + 1)
            if (r, c) not in ((r0, c0), (r1, c1))
        )

    def read(self, frame: np.ndarray) -> tuple[Item | None, str]:
        empty = self.backdrop()
        rows, cols = self._block()
        empty[rows, cols] = BLOCK
        empty = draw.border(empty)
        for item in self.others:
            shape, colour = draw.identify(frame, item.cell, empty)
            if (shape, colour) != (item.shape, item.colour):
                it = f"a {item.colour} {item.shape}"
                return None, f"at {item.cell} there is a {colour} {shape}, not {it}"
        look, lean = draw.likeness(frame, self.stop, empty)
        if lean > draw.LEAN:
            return None, f"at {self.stop} no object is clearly visible"
        return Item(*look, self.stop), ""

    def wrong(self, answer: Item) -> str:
        it = f"a {self.mover.colour} {self.mover.shape}"
        if answer in self.candidates:
            return ""
        return f"at {answer.cell} there is a {answer.colour} {answer.shape}, not {it}"

    def halfway(self, frame: np.ndarray, answer: Item, progress: float) -> str:
        # Out of sight means the whole frame looks like the block and the bystanders alone.
        detail = self._mismatch(frame, self._still(answer, progress))
        return detail and f"the object is not hidden: {detail}"
