"""`latin`: colour the empty cells of a square so that no row and no column repeats a colour.

A mean of two solutions is not a solution, so sampling steps have something to decide. Knob `k`: 1
(one solution), 2 (a few: 2 to 24) or 100 (many: 100 and more). Empty cells fill in reading order,
so each colour depends on those before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations
from random import Random
from typing import ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle
from .draw import CELL

NAMES = ("red", "green", "blue", "yellow", "pink")  # the first `size` of them
PALETTE = np.array([draw.YELLOW if n == "yellow" else draw.COLOURS[n] for n in NAMES], np.float32)
CLEAR = 40.0  # RGB distance of a cell's mean from its colour: a mix of 77 : 23 of the nearest two
CAP = 24  # candidates that are listed
K = {1: (1, 1), 2: (2, CAP), 100: (100, 10**9)}  # knob -> range of the number of solutions
GIVENS = {4: {1: (6, 9), 2: (3, 6), 100: (1, 2)}, 5: {1: (9, 14), 2: (6, 10), 100: (3, 5)}}

Board = tuple[int, ...]  # colours row by row, -1 where empty


@cache
def squares(size: int) -> np.ndarray:
    """Every Latin square of one size, one a column: int8 (size * size, 576 or 161280).

    Every square is one with a sorted first row and column, its rows but the first and then its
    columns permuted.
    """
    rows, found = list(permutations(range(size))), []

    def grow(board: list[tuple[int, ...]]) -> None:
        if len(board) == size:
            found.append(board)
            return
        for row in rows:
            fits = all(a != b for other in board for a, b in zip(other, row, strict=True))
            if row[0] == len(board) and fits:
                grow([*board, row])

    grow([rows[0]])
    down = np.array([(0, *order) for order in permutations(range(1, size))])
    every = np.array(found, np.int8)[:, down][
        ..., np.array(rows)
    ]  # (reduced, down, row, across, column)
    return np.ascontiguousarray(every.transpose(2, 4, 0, 1, 3).reshape(size * size, -1))


@dataclass(frozen=True)
class Latin(Puzzle):
    """Fill the square. Distinct pictures by far exceed what training can show:
    161,280 squares, millions of masks.
    """

    given: Board

    kind: ClassVar[str] = "latin"
    category: ClassVar[str] = "abstraction"
    sizes: ClassVar[tuple[int, ...]] = (4, 5)
    prompts: ClassVar[tuple[str, ...]] = ("fill the square",)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k")
        k = rng.choice(tuple(K)) if knobs.k is None else knobs.k
        if k not in K:
            raise MinicosError(f"{cls.kind} with k = {k}: one of {', '.join(map(str, K))}")
        every = squares(size)
        while True:
            square = every[:, rng.randrange(every.shape[1])].tolist()
            keep = set(rng.sample(range(size * size), rng.randint(*GIVENS[size][k])))
            puzzle = cls(size, tuple(v if i in keep else -1 for i, v in enumerate(square)))
            if K[k][0] <= puzzle.ambiguity <= K[k][1]:
                return puzzle

    @property
    def prompt(self) -> str:
        return "fill the square"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/" + "".join("." if v < 0 else str(v) for v in self.given)

    @cached_property
    def _solutions(self) -> np.ndarray:
        """Columns of `squares` that solve this one."""
        every, left = squares(self.size), None
        for cell, colour in enumerate(self.given):
            if colour >= 0:
                hit = every[cell] == colour if left is None else every[cell, left] == colour
                left = np.flatnonzero(hit) if left is None else left[hit]
        return np.arange(every.shape[1]) if left is None else left

    @property
    def ambiguity(self) -> int:
        """Solutions in all."""
        return len(self._solutions)

    @property
    def depth(self) -> int:
        """Empty cells."""
        return self.given.count(-1)

    @cached_property
    def candidates(self) -> tuple[Board, ...]:
        """The solutions, or CAP of them at random."""
        chosen = self._solutions.tolist()
        if len(chosen) > CAP:
            chosen = sorted(Random(self.key).sample(chosen, CAP))
        return tuple(map(tuple, squares(self.size)[:, chosen].T.tolist()))

    @cached_property
    def foils(self) -> tuple[Board, ...]:
        """A solution with one cell recoloured, so that one row and one
        column repeat: four such boards.
        """
        rng = Random(f"{self.key} foils")
        found: list[Board] = []
        while len(found) < 4:
            board = list(rng.choice(self.candidates))
            cell = rng.choice([i for i, v in enumerate(self.given) if v < 0])
            board[cell] = rng.choice([v for v in range(self.size) if v != board[cell]])
            if tuple(board) not in found:
                found.append(tuple(board))
        return tuple(found)

    def backdrop(self) -> np.ndarray:
        return draw.grid(self.size)

    def animate(self, answer: Board, progress: np.ndarray) -> np.ndarray:
        level = np.where(np.array(self.given) >= 0, 1, self._filled(progress))
        colours = PALETTE[list(answer)].reshape(self.size, self.size, 3)
        picture = colours.repeat(CELL, axis=0).repeat(CELL, axis=1)
        cover = draw.filled(level.reshape(-1, self.size, self.size))
        return draw.border(draw.paint(self.backdrop(), cover, picture))

    def _filled(self, progress: np.ndarray) -> np.ndarray:
        """How full each cell is if it was empty, 0..1: one after the other, a
        fifth of the time each. (n, cells)
        """
        begin = np.linspace(0, 0.8, self.size**2, dtype=np.float32)
        return np.clip((progress[:, None] - begin) / np.float32(0.2), 0, 1)

    # -- scoring --

    def colours(self, frame: np.ndarray) -> Board:
        """The colour of each cell of a frame, -1 where it is none of the palette or not clear."""
        cells = frame.reshape(self.size, CELL, self.size, CELL, 3)[:, 4:-4, :, 4:-4]
        mean = cells.mean(axis=(1, 3), dtype=np.float32).reshape(-1, 1, 3)
        apart = np.linalg.norm(mean - PALETTE[: self.size], axis=-1)
        return tuple(np.where(apart.min(1) < CLEAR, apart.argmin(1), -1).tolist())

    def read(self, frame: np.ndarray) -> tuple[Board | None, str]:
        board = self.colours(frame)
        if -1 in board:
            return None, f"cell {divmod(board.index(-1), self.size)} has no clear colour"
        return board, ""

    def wrong(self, answer: Board) -> str:
        for cell, (given, colour) in enumerate(zip(self.given, answer, strict=True)):
            if given not in (-1, colour):
                return f"cell {divmod(cell, self.size)} was given in {NAMES[given]}"
        board = np.array(answer).reshape(self.size, self.size)
        for name, lines in (("row", board), ("column", board.T)):
            for i, line in enumerate(lines.tolist()):
                if len(set(line)) < self.size:
                    return f"{name} {i} repeats a colour"
        return ""

    def rules(self, last: np.ndarray) -> dict[str, float]:
        """rows, columns: of the pairs of cells in a line, of which one was empty, the share that
        differ; colouring at random gets 1 - 1/size of them, which counts 0.
        """
        seen = np.array(self.colours(last)).reshape(self.size, self.size)
        given = np.array(self.given).reshape(self.size, self.size) >= 0
        chance = 1 - 1 / self.size
        shares = {"rows": _differ(seen, given), "columns": _differ(seen.T, given.T)}
        return {name: max(0.0, (share - chance) / (1 - chance)) for name, share in shares.items()}

    def halfway(self, frame: np.ndarray, answer: Board, progress: float) -> str:
        # Cells that must be full by now have their colour, and cells that
        # must not have begun are empty.
        seen, level = self.colours(frame), self._filled(np.array([progress], np.float32))[0]
        for cell, colour in enumerate(answer):
            due = colour if level[cell] == 1 or self.given[cell] >= 0 else -1
            if seen[cell] != due and level[cell] in (0, 1):
                return f"cell {divmod(cell, self.size)} is not as it should be by then"
        return ""


def _differ(board: np.ndarray, given: np.ndarray) -> float:
    """Of the pairs of cells in a row of which one was not given, the
    share that are clear and differ.
    """
    a, b = np.triu_indices(len(board), 1)
    counted = ~(given[:, a] & given[:, b])
    apart = (board[:, a] >= 0) & (board[:, b] >= 0) & (board[:, a] != board[:, b])
    return float(apart[counted].mean())
