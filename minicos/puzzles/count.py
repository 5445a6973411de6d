"""`count`: fill as many free cells as there are dots, in any choice of cells.

The dots are in one to three cells (knob `s`) and must be added; other figures do not count (knob
`d`). There are many answers, since the choice of cells is free; with `k` 1 the prompt asks for them
in order, from the top left. Totals of 5 and 8 never occur in training: `count-new` draws those.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import comb
from random import Random
from typing import ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw, figures
from .base import FREE, Knobs, Puzzle
from .draw import CELL, COLOURS, FLOOR, YELLOW, Cell
from .figures import Figure

CAP = 24  # candidates that are listed
CLEAR = 0.2  # a cell is empty up to this level and full from 1 less this

Cells = tuple[Cell, ...]  # in reading order


@dataclass(frozen=True)
class Count(Puzzle):
    """Fill any cells, or the first ones, as many as there are dots."""

    dice: tuple[tuple[int, str, Cell], ...]  # dots, their colour, cell
    others: tuple[tuple[Figure, Cell], ...]
    ordered: bool  # fill the first free cells

    kind: ClassVar[str] = "count"
    category: ClassVar[str] = "perception"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    prompts: ClassVar[tuple[str, ...]] = (
        "fill a cell for each dot",
        "fill a cell for each dot in order",
    )
    held_out: ClassVar[frozenset[str]] = frozenset({"5", "8"})

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "s", "d")
        if knobs.k not in (None, 1, 2):
            raise MinicosError(f"{cls.kind} with k = {knobs.k}: 1 (in order) or 2 (any cells)")
        ordered = rng.random() < 0.5 if knobs.k is None else knobs.k == 1
        dice = rng.randint(1, 3) if knobs.s is None else knobs.s
        others = rng.randint(0, 2) if knobs.d is None else knobs.d
        cells = [divmod(i, size) for i in rng.sample(range(size * size), dice + others)]
        counts = _counts(rng, dice)
        shapes = [rng.choice([s for s in figures.NAMES if s != "circle"]) for _ in range(others)]
        dots = [(n, rng.choice(tuple(COLOURS)), c) for n, c in zip(counts, cells, strict=False)]
        plain = [
            Figure(s, rng.choice(tuple(COLOURS)), rng.randrange(len(figures.RADII))) for s in shapes
        ]
        around = sorted(zip(plain, cells[dice:], strict=True), key=lambda other: other[1])
        return cls(size, tuple(sorted(dots, key=lambda die: die[2])), tuple(around), ordered)

    @property
    def prompt(self) -> str:
        return self.prompts[self.ordered]

    @property
    def key(self) -> str:
        dice = " ".join(f"{colour} {n} dots@{r},{c}" for n, colour, (r, c) in self.dice)
        others = " ".join(f"{figure}@{r},{c}" for figure, (r, c) in self.others)
        return f"{self.kind}/{self.size}/{dice} others {others}"

    @property
    def composition(self) -> str:
        return str(self.total)

    @property
    def total(self) -> int:
        """Dots in all."""
        return sum(n for n, _, _ in self.dice)

    @cached_property
    def free(self) -> Cells:
        """The cells that hold nothing."""
        taken = {cell for _, _, cell in self.dice} | {cell for _, cell in self.others}
        every = ((r, c) for r in range(self.size) for c in range(self.size))
        return tuple(cell for cell in every if cell not in taken)

    @property
    def ambiguity(self) -> int:
        return 1 if self.ordered else comb(len(self.free), self.total)

    @property
    def depth(self) -> int:
        """Numbers to add."""
        return len(self.dice)

    @property
    def distractors(self) -> int:
        return len(self.others)

    @cached_property
    def candidates(self) -> tuple[Cells, ...]:
        """The sets of cells that may be filled, or CAP of them at random."""
        if self.ordered:
            return (self.free[: self.total],)
        return self._some(self.total, CAP)

    @cached_property
    def foils(self) -> tuple[Cells, ...]:
        """One cell too many, one too few; where the order counts, also as many cells, but
        others.
        """
        numbers = [n for n in (self.total + 1, self.total - 1) if n]
        if self.ordered:
            shifted = self.free[1 : self.total + 1]
            return (*(self.free[:n] for n in numbers), shifted)
        return tuple(cells for n in numbers for cells in self._some(n, 2))

    def _some(self, n: int, most: int) -> tuple[Cells, ...]:
        """Sets of n free cells: all, or so many of them at random."""
        rng = Random(f"{self.key} {n}")
        if comb(len(self.free), n) <= most:
            return tuple(combinations(self.free, n))
        found: set[Cells] = set()
        while len(found) < most:
            found.add(tuple(sorted(rng.sample(self.free, n))))
        return tuple(sorted(found))

    def variants(self) -> tuple[Self, ...]:
        return (type(self)(self.size, self.dice, self.others, not self.ordered),)

    def backdrop(self) -> np.ndarray:
        return draw.grid(self.size)

    def animate(self, answer: Cells, progress: np.ndarray) -> np.ndarray:
        level = np.zeros((len(progress), self.size, self.size), np.float32)
        for row, column in answer:
            level[:, row, column] = progress
        canvas = draw.border(draw.paint(self.backdrop(), draw.filled(level), YELLOW))
        for n, colour, cell in self.dice:
            figures.put_dots(canvas, n, colour, cell)
        for figure, cell in self.others:
            figures.put(canvas, figure, cell)
        return canvas

    # -- scoring --

    def levels(self, frame: np.ndarray) -> np.ndarray:
        """How full of yellow each free cell of a frame is, 0..1, about: (cells,)"""
        cells = frame.reshape(self.size, CELL, self.size, CELL, 3)[:, 2:-2, :, 2:-2]
        mean = cells.mean(axis=(1, 3), dtype=np.float32)
        line = np.subtract(YELLOW, FLOOR, dtype=np.float32)
        along = (mean - np.array(FLOOR, np.float32)) @ line / (line @ line)
        return np.array([along[cell] for cell in self.free])

    def read(self, frame: np.ndarray) -> tuple[Cells | None, str]:
        levels = self.levels(frame)
        for cell, level in zip(self.free, levels, strict=True):
            if CLEAR < level < 1 - CLEAR:
                return None, f"cell {cell} is neither full nor empty"
        full = tuple(c for c, level in zip(self.free, levels, strict=True) if level > 0.5)
        return (full, "") if full else (None, "no cell is full")

    def wrong(self, answer: Cells) -> str:
        if len(answer) != self.total:
            return f"{len(answer)} cells are full and there are {self.total} dots"
        return (
            "" if not self.ordered or answer in self.candidates else "not the first cells are full"
        )

    def rules(self, last: np.ndarray) -> dict[str, float]:
        """near: full cells differ by less than two from the dots; right: by
        none, and in order where that is asked.
        """
        answer, _ = self.read(last)
        if answer is None:
            return {"near": 0.0, "right": 0.0}
        near = max(0.0, 1 - abs(len(answer) - self.total) / 2)
        return {"near": near, "right": float(not self.wrong(answer))}

    def halfway(self, frame: np.ndarray, answer: Cells, progress: float) -> str:
        # The right cells are filling, all others are empty.
        for cell, level in zip(self.free, self.levels(frame), strict=True):
            if cell not in answer and level > CLEAR:
                return f"cell {cell} is filling and then is not full"
            if cell in answer and not 0.1 < level < 0.95:
                return f"cell {cell} is not filling"
        return ""


def _counts(rng: Random, dice: int) -> list[int]:
    """Dots of each of some cells, 1 to 4, 8 at most in all."""
    while True:
        counts = [rng.randint(1, len(figures.SPOTS)) for _ in range(dice)]
        if sum(counts) <= 8:
            return counts
