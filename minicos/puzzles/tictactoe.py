"""`tictactoe`: draw the circle or the cross that makes three in a row. A family that never occurs
in training.

Its pictures and its rule are new, but its words and figures are not. Knob `k`: 1 (one winning move)
or 2 (two or more).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import ClassVar, NamedTuple, Self

import numpy as np

from . import draw, figures
from .base import FREE, Knobs, Puzzle
from .draw import COLOURS, Cell
from .figures import Figure

SIDES = ("circle", "cross")
LINES = (
    *(tuple((r, c) for c in range(3)) for r in range(3)),
    *(tuple((r, c) for r in range(3)) for c in range(3)),
    tuple((i, i) for i in range(3)),
    tuple((i, 2 - i) for i in range(3)),
)


class Move(NamedTuple):
    """A mark of one side in a cell."""

    side: str
    cell: Cell


@dataclass(frozen=True)
class TicTacToe(Puzzle):
    """Win by the next move."""

    moves: tuple[Move, ...]  # on the board, by cell
    colours: tuple[str, str]  # of circles and crosses
    side: str  # whose move it is

    kind: ClassVar[str] = "tictactoe"
    category: ClassVar[str] = "abstraction"
    sizes: ClassVar[tuple[int, ...]] = (3,)
    prompts: ClassVar[tuple[str, ...]] = tuple(f"draw the next {side}" for side in SIDES)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k")
        while True:
            cells = rng.sample([(r, c) for r in range(3) for c in range(3)], rng.randint(4, 7))
            side = rng.choice(SIDES)
            other = SIDES[side == SIDES[0]]
            order = (side, other) if len(cells) % 2 == 0 else (other, side)
            moves = sorted(
                (Move(order[i % 2], cell) for i, cell in enumerate(cells)), key=lambda m: m.cell
            )
            colours = rng.sample(tuple(COLOURS), 2)
            board = cls(size, tuple(moves), (colours[0], colours[1]), side)
            won = any(board._wins(side, cell) for side, cell in moves)
            enough = board.ambiguity == 1 if knobs.k == 1 else board.ambiguity >= (knobs.k or 1)
            if enough and not won:
                return board

    @property
    def prompt(self) -> str:
        return f"draw the next {self.side}"

    @property
    def key(self) -> str:
        board = " ".join(f"{side}@{r},{c}" for side, (r, c) in self.moves)
        return f"{self.kind}/{self.size}/{board} {' '.join(self.colours)}"

    def _wins(self, side: str, cell: Cell) -> bool:
        """Whether a side has three in a row when it holds `cell`, too."""
        held = {m.cell for m in self.moves if m.side == side} | {cell}
        return any(cell in line and held.issuperset(line) for line in LINES)

    @cached_property
    def empty(self) -> tuple[Cell, ...]:
        taken = {move.cell for move in self.moves}
        return tuple((r, c) for r in range(3) for c in range(3) if (r, c) not in taken)

    @cached_property
    def candidates(self) -> tuple[Move, ...]:
        """The winning moves."""
        return tuple(Move(self.side, cell) for cell in self.empty if self._wins(self.side, cell))

    @property
    def foils(self) -> tuple[Move, ...]:
        """The other side's mark in the first winning cell, and moves that do not win."""
        other = SIDES[self.side == SIDES[0]]
        idle = (Move(self.side, cell) for cell in self.empty if not self._wins(self.side, cell))
        return (Move(other, self.candidates[0].cell), *idle)

    def variants(self) -> tuple[Self, ...]:
        other = replace(self, side=SIDES[self.side == SIDES[0]])
        return (other,) if other.candidates else ()

    def backdrop(self) -> np.ndarray:
        return draw.grid(self.size)

    def _figure(self, side: str) -> Figure:
        return Figure(side, self.colours[SIDES.index(side)], level=2)

    def animate(self, answer: Move, progress: np.ndarray) -> np.ndarray:
        canvas = np.repeat(self.backdrop()[None], len(progress), axis=0)
        for move in self.moves:
            figures.put(canvas, self._figure(move.side), move.cell)
        figures.put(canvas, self._figure(answer.side), answer.cell, progress)
        return canvas

    def read(self, frame: np.ndarray) -> tuple[Move | None, str]:
        answer, detail = super().read(frame)
        if answer is not None and figures.read(frame, answer.cell, self.backdrop()) != self._figure(
            answer.side
        ):
            return (
                None,
                f"the new mark at {answer.cell} is not a {answer.side} of its colour and size",
            )
        return answer, detail
