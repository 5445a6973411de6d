"""`partner`: mark the partner of a thing that only the prompt names. Which is whose partner is
known from training alone.

Twelve arbitrary facts pair the 24 things that four shapes in six colours make. Most are asked both
ways in training; four are asked one way only, and `partner-back` asks them the other way. Knob `d`:
the number of other things.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import ClassVar, Self

import numpy as np

from . import draw
from .base import FREE, Knobs
from .draw import COLOURS, SHAPES, Cell, Item
from .marking import Marking, altered_items

FACTS = (
    ("black triangle", "sky triangle"),
    ("pink circle", "black cross"),
    ("sky circle", "red triangle"),
    ("green triangle", "sky cross"),
    ("green circle", "red square"),
    ("black circle", "blue square"),
    ("red cross", "pink square"),
    ("pink cross", "blue cross"),
    ("red circle", "blue circle"),
    ("blue triangle", "sky square"),
    ("green square", "pink triangle"),
    ("black square", "green cross"),
)
PARTNERS = {a: b for pair in FACTS for a, b in (pair, pair[::-1])}
ONE_WAY = FACTS[:4]  # asked from first to second alone


@dataclass(frozen=True)
class Partner(Marking):
    """Mark the partner. Foils are the other things, often with the named one among them."""

    items: tuple[Item, ...]  # all different, by cell
    named: str  # colour and shape of the thing that is asked about

    kind: ClassVar[str] = "partner"
    category: ClassVar[str] = "knowledge"
    sizes: ClassVar[tuple[int, ...]] = (3, 4)
    prompts: ClassVar[tuple[str, ...]] = tuple(
        f"mark the partner of the {colour} {shape}" for shape in SHAPES for colour in COLOURS
    )
    held_out: ClassVar[frozenset[str]] = frozenset(second for _, second in ONE_WAY)

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "d")
        others = rng.randint(3, 6) if knobs.d is None else knobs.d
        named = rng.choice(tuple(PARTNERS))
        right = PARTNERS[named]
        # The rest are drawn evenly: were they like the right one, that would give it away.
        rest = rng.sample([name for name in PARTNERS if name not in (named, right)], others)
        itself = [named] if rng.random() < 0.5 else []
        names = [right, *itself, *rest][: others + 1]
        cells = [divmod(k, size) for k in rng.sample(range(size * size), others + 1)]
        items = [
            Item(shape, colour, cell)
            for (colour, shape), cell in zip(map(str.split, names), cells, strict=True)
        ]
        return cls(size, tuple(sorted(items, key=lambda item: item.cell)), named)

    @property
    def prompt(self) -> str:
        return f"mark the partner of the {self.named}"

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/{' '.join(map(str, self.items))}"

    @property
    def composition(self) -> str:
        return self.named

    @property
    def target(self) -> Cell:
        right = PARTNERS[self.named]
        return next(i.cell for i in self.items if f"{i.colour} {i.shape}" == right)

    @property
    def occupied(self) -> tuple[Cell, ...]:
        return tuple(item.cell for item in self.items)

    def variants(self) -> tuple[Self, ...]:
        names = (PARTNERS[f"{item.colour} {item.shape}"] for item in self.items)
        return tuple(
            replace(self, named=name)
            for name in names
            if name != self.named and (name in self.held_out) == (self.named in self.held_out)
        )

    def put_things(self, canvas: np.ndarray) -> np.ndarray:
        return draw.items(canvas, self.items)

    def altered(self, frame: np.ndarray, background: np.ndarray) -> str:
        return altered_items(self.items, frame, background)
