"""`pick`: compare the things in the picture and mark one: the largest, the one with the fewest
dots, the odd one.

Unlike in `mark`, the prompt does not name what to mark: it follows from the comparison. Knob `d`:
the number of other things. The second largest never occurs in training, although the second
smallest and the second most dots do: `pick-second` asks for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, NamedTuple, Self

import numpy as np

from . import figures
from .base import FREE, Knobs
from .draw import COLOURS, PALE, Cell
from .figures import TURNS, Figure
from .marking import Marking

BY_SIZE = {"smallest": 0, "second smallest": 1, "second largest": -2, "largest": -1}  # rank
BY_DOTS = {"fewest dots": 0, "second fewest dots": 1, "second most dots": -2, "most dots": -1}
ODD = "odd one"


class Thing(NamedTuple):
    """A figure in a cell, or, where `dots` is not 0, so many dots of its colour."""

    figure: Figure
    dots: int
    cell: Cell

    def __str__(self) -> str:
        what = f"{self.figure.colour} {self.dots} dots" if self.dots else str(self.figure)
        return f"{what}@{self.cell[0]},{self.cell[1]}"


@dataclass(frozen=True)
class Pick(Marking):
    """Mark the thing that the rule singles out."""

    things: tuple[Thing, ...]
    rule: str  # of BY_SIZE or BY_DOTS, or ODD

    kind: ClassVar[str] = "pick"
    category: ClassVar[str] = "perception"
    sizes: ClassVar[tuple[int, ...]] = (3, 4)
    prompts: ClassVar[tuple[str, ...]] = tuple(f"mark the {r}" for r in (*BY_SIZE, *BY_DOTS, ODD))
    held_out: ClassVar[frozenset[str]] = frozenset({"second largest"})

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "d")
        n = 1 + (rng.randint(3, 7) if knobs.d is None else knobs.d)
        rule = rng.choice(rng.choice((tuple(BY_SIZE), tuple(BY_DOTS), (ODD,))))
        cells = [divmod(k, size) for k in rng.sample(range(size * size), n)]
        if rule == ODD:
            same, other = _odd(rng)
            kinds = [(other, 0), *[(same, 0)] * (n - 1)]
        elif rule in BY_SIZE:
            shape = rng.choice(tuple(TURNS))
            sizes = _values(rng, n, len(figures.RADII), BY_SIZE[rule])
            kinds = [(_figure(rng, shape)._replace(level=level), 0) for level in sizes]
        else:
            more = _values(rng, n, len(figures.SPOTS), BY_DOTS[rule])
            kinds = [(_figure(rng, "circle"), 1 + dots) for dots in more]
        things = (Thing(*kind, cell) for kind, cell in zip(kinds, cells, strict=True))
        return cls(size, tuple(sorted(things, key=lambda thing: thing.cell)), rule)

    @property
    def legible(self) -> bool:
        """Whether the embedded VAE can draw the marked thing: pink on yellow is too pale, and the
        largest circle leaves too little of its cell to fill.
        """
        figure = next(t for t in self.things if t.cell == self.target).figure
        covered = figure.shape == "circle" and figure.level == len(figures.RADII) - 1
        return figure.colour != PALE and not covered

    @property
    def prompt(self) -> str:
        return f"mark the {self.rule}"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/{' '.join(map(str, self.things))}"

    @property
    def composition(self) -> str:
        return self.rule

    @property
    def target(self) -> Cell:
        if self.rule == ODD:
            kinds = [thing.figure for thing in self.things]
            return next(t.cell for t in self.things if kinds.count(t.figure) == 1)
        order = sorted(self.things, key=lambda thing: (thing.dots, thing.figure.level))
        return order[{**BY_SIZE, **BY_DOTS}[self.rule]].cell

    @property
    def occupied(self) -> tuple[Cell, ...]:
        return tuple(thing.cell for thing in self.things)

    def variants(self) -> tuple[Self, ...]:
        ranks = next((r for r in (BY_SIZE, BY_DOTS) if self.rule in r), {})
        values = [thing.dots or thing.figure.level for thing in self.things]
        others = (
            replace(self, rule=rule)
            for rule, rank in ranks.items()
            if rule != self.rule and _settled(values, rank)
            if (rule in self.held_out) == (self.rule in self.held_out)
        )
        return tuple(other for other in others if other.legible)

    def put_things(self, canvas: np.ndarray) -> np.ndarray:
        for thing in self.things:
            if thing.dots:
                figures.put_dots(canvas, thing.dots, thing.figure.colour, thing.cell)
            else:
                figures.put(canvas, thing.figure, thing.cell)
        return canvas

    def altered(self, frame: np.ndarray, background: np.ndarray) -> str:
        for thing in self.things:
            shown = None if thing.dots else figures.read(frame, thing.cell, background)
            if shown not in (None, thing.figure):  # one that is unclear is no other one
                return f"the figure at {thing.cell} has become another"
        return ""


def _figure(rng: Random, shape: str) -> Figure:
    return Figure(shape, rng.choice(tuple(COLOURS)), turn=rng.randrange(TURNS[shape]))


def _values(rng: Random, n: int, top: int, rank: int) -> list[int]:
    """n numbers below `top` of which one alone has this rank, counted from an end."""
    while True:
        values = [rng.randrange(top) for _ in range(n)]
        if _settled(values, rank):
            return values


def _settled(values: list[int], rank: int) -> bool:
    """Whether one value alone has this rank and, for a second place, one alone the first."""
    order = sorted(values)
    ends = (0, 1)[: rank + 1] if rank >= 0 else (-1, -2)[:-rank]
    return all(values.count(order[end]) == 1 for end in ends)


def _odd(rng: Random) -> tuple[Figure, Figure]:
    """A figure and one that differs from it in shape, colour, size (by
    two levels or more) or direction.
    """
    levels = range(len(figures.RADII))
    same = _figure(rng, rng.choice(tuple(TURNS)))._replace(level=rng.choice(levels))
    what = rng.choice(("shape", "colour", "level", "turn"))
    if what == "shape":
        shape = rng.choice([name for name in TURNS if name != same.shape])
        return same, same._replace(shape=shape, turn=rng.randrange(TURNS[shape]))
    if what == "colour":
        return same, same._replace(colour=rng.choice([c for c in COLOURS if c != same.colour]))
    if what == "level":
        far = [level for level in levels if abs(level - same.level) > 1]
        return same, same._replace(level=rng.choice(far))
    same = same._replace(shape=rng.choice([name for name in TURNS if TURNS[name] > 1]))
    return same, same._replace(turn=(same.turn + rng.randint(1, 3)) % TURNS[same.shape])
