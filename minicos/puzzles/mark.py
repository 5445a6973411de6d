"""`mark`: several shapes on a grid; the cell of the named one fills with yellow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw
from .base import FREE, Knobs
from .draw import COLOURS, SHAPES, Cell, Item
from .marking import Marking, altered_items


@dataclass(frozen=True)
class Mark(Marking):
    """Mark the named shape. There is one answer, and every other shape of the picture makes another
    prompt.

    Distinct pictures: 4,370,112 (3x3), 59,564,160 (4x4), of which shapes and cells alone make 5,472
    and 58,560.
    """

    items: tuple[Item, ...]  # 2-4, each of another shape, in the order of SHAPES
    named: str  # the shape to mark

    kind: ClassVar[str] = "mark"
    category: ClassVar[str] = "perception"
    prompts: ClassVar[tuple[str, ...]] = tuple(f"mark the {shape}" for shape in SHAPES)
    sizes: ClassVar[tuple[int, ...]] = (3, 4)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind)
        shapes = sorted(rng.sample(SHAPES, rng.randint(2, 4)), key=SHAPES.index)
        cells = rng.sample(range(size * size), len(shapes))
        items = tuple(
            Item(shape, rng.choice(tuple(COLOURS)), divmod(cell, size))
            for shape, cell in zip(shapes, cells, strict=True)
        )
        return cls(size, items, rng.choice(shapes))

    @property
    def prompt(self) -> str:
        return f"mark the {self.named}"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/{' '.join(map(str, self.items))}"

    @property
    def occupied(self) -> tuple[Cell, ...]:
        return tuple(item.cell for item in self.items)

    @property
    def target(self) -> Cell:
        return next(item.cell for item in self.items if item.shape == self.named)

    def variants(self) -> tuple[Self, ...]:
        return tuple(
            replace(self, named=item.shape) for item in self.items if item.shape != self.named
        )

    def put_things(self, canvas: np.ndarray) -> np.ndarray:
        return draw.items(canvas, self.items)

    def altered(self, frame: np.ndarray, background: np.ndarray) -> str:
        return altered_items(self.items, frame, background)
