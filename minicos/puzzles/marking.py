"""Puzzles whose answer is a cell: it fills with yellow, and everything else stays unchanged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import draw
from .base import Puzzle
from .draw import YELLOW, Cell, Item


@dataclass(frozen=True)
class Marking(Puzzle):
    """Mark one of the cells that hold something; the others are foils. Subclasses choose the cell
    and paint the things.
    """

    @property
    def target(self) -> Cell:
        """The cell to mark."""
        raise NotImplementedError

    @property
    def occupied(self) -> tuple[Cell, ...]:
        """Every cell that holds something."""
        raise NotImplementedError

    def put_things(self, canvas: np.ndarray) -> np.ndarray:
        """`canvas` (n, h, w, 3) with everything that the picture holds."""
        raise NotImplementedError

    @property
    def candidates(self) -> tuple[Cell, ...]:
        """The cell to mark."""
        return (self.target,)

    @property
    def foils(self) -> tuple[Cell, ...]:
        """The cells of the other things."""
        return tuple(cell for cell in self.occupied if cell != self.target)

    @property
    def distractors(self) -> int:
        """Other things."""
        return len(self.occupied) - 1

    def backdrop(self) -> np.ndarray:
        return draw.grid(self.size)

    def animate(self, answer: Cell, progress: np.ndarray) -> np.ndarray:
        return self.put_things(self.filled(answer, progress))

    def filled(self, cell: Cell, progress: np.ndarray) -> np.ndarray:
        """Backdrop with the cell filled from the bottom up, full a
        little before the end (n, h, w, 3).
        """
        level = np.zeros((len(progress), self.size, self.size), np.float32)
        level[:, *cell] = np.minimum(1.1 * progress, 1)
        return draw.border(draw.paint(self.backdrop(), draw.filled(level), YELLOW))

    def read(self, frame: np.ndarray) -> tuple[Cell | None, str]:
        answer, detail = super().read(frame)
        if answer is None:
            return None, detail
        detail = self.altered(frame, self.filled(answer, np.ones(1, np.float32))[0])
        return (None, detail) if detail else (answer, "")

    def altered(self, frame: np.ndarray, background: np.ndarray) -> str:
        """Which thing has turned into another, in words; empty if none has. `background` is the
        picture without things.
        """
        raise NotImplementedError


def altered_items(items: tuple[Item, ...], frame: np.ndarray, background: np.ndarray) -> str:
    """`Marking.altered` for items."""
    for item in items:
        shape, colour = draw.identify(frame, item.cell, background)
        if (shape, colour) != (item.shape, item.colour):
            it = f"the {item.colour} {item.shape} at {item.cell}"
            return f"{it} has become a {colour} {shape}"
    return ""
