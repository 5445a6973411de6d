"""`mark`: several shapes on a grid; the cell of the named one fills with yellow."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import COLOURS, SHAPES, YELLOW, Cell, Item


@dataclass(frozen=True)
class Mark(Puzzle):
    """Mark the named shape. There is one answer, and every other shape of the picture makes another prompt.

    Distinct pictures: 4,370,112 (3x3), 59,564,160 (4x4), of which shapes and cells alone make 5,472 and 58,560.
    """

    items: tuple[Item, ...]  # 2-4, each of another shape, in the order of SHAPES
    target: str  # the shape that is named

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
        return f"mark the {self.target}"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/{' '.join(map(str, self.items))}"

    @property
    def candidates(self) -> tuple[Cell, ...]:
        """The cell to mark."""
        return tuple(item.cell for item in self.items if item.shape == self.target)

    def variants(self) -> tuple[Self, ...]:
        return tuple(
            replace(self, target=item.shape) for item in self.items if item.shape != self.target
        )

    def backdrop(self) -> np.ndarray:
        return draw.grid(self.size)

    def animate(self, answer: Cell, progress: np.ndarray) -> np.ndarray:
        return draw.items(self._filled(answer, progress), self.items)

    def _filled(self, cell: Cell, progress: np.ndarray) -> np.ndarray:
        """Backdrop with the cell filled from the bottom up, full a little before the end (n, h, w, 3)."""
        level = np.zeros((len(progress), self.size, self.size), np.float32)
        level[:, *cell] = np.minimum(1.1 * progress, 1)
        return draw.border(draw.paint(self.backdrop(), draw.filled(level), YELLOW))

    @property
    def foils(self) -> tuple[Cell, ...]:
        """The cells of the other shapes."""
        return tuple(item.cell for item in self.items if item.shape != self.target)

    @property
    def distractors(self) -> int:
        return len(self.items) - 1

    def read(self, frame: np.ndarray) -> tuple[Cell | None, str]:
        answer, detail = super().read(frame)
        if answer is None:
            return None, detail
        background = self._filled(answer, np.ones(1, np.float32))[0]
        for item in self.items:
            shape, colour = draw.identify(frame, item.cell, background)
            if (shape, colour) != (item.shape, item.colour):
                return (
                    None,
                    f"the {item.colour} {item.shape} at {item.cell} has become a {colour} {shape}",
                )
        return answer, ""
