"""`reveal`: an object not in the picture comes out on one side of a block, then on the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random
from typing import Any, ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle, Score, timeline
from .draw import BLOCK, CELL, COLOURS, PALE, SHAPES, Item

Look = tuple[str, str]  # (shape, colour)
Answer = tuple[Look, Look]  # what comes out first, and what comes out second

LOOKS: tuple[Look, ...] = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
HELD_OUT = frozenset({"red cross", "blue triangle", "green circle", "pink square"})
SIDES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}  # first to second
DWELLS = {
    "equal": "show the {} {} then {}",
    "first": "show the {} {} longer then {}",
    "second": "show the {} {} then {} longer",
}
COVER = slice(14, 50)  # px of the lane that the block hides
# Where the object is along its lane at frames 0..11, px from the side where it comes out first.
# Latent frames 1 and 3 show it, latent frame 2 hides it. A reveal that starts late lasts a frame
# less.
PATHS = {
    "equal": (20, 14, 8, 8, 8, 20, 28, 36, 44, 50, 56, 56),
    "first": (20, 14, 8, 8, 8, 20, 28, 36, 44, 44, 50, 56),
    "second": (20, 20, 14, 8, 8, 20, 28, 36, 44, 50, 56, 56),
}
STAYS = 8, 56  # where it stands still the first and the second time, px as in PATHS
AWAY = 6.5 / 11  # progress from which it is the second object
# Limits for draw.likeness in the first and the second reveal. Even blends of two to four looks are
# above the second; the first, which may last two frames, must only show no 60 : 40 mix.
LEANS = 0.27, 0.2


@dataclass(frozen=True)
class Reveal(Puzzle):
    """Let an object out on one side of the block, and the same object on the other side.

    The picture does not show the object: a model has to invent one of 24 (k = 24), one of a named
    colour (k = 4), or draw the one that is named (k = 1). It must be the same both times, although
    it is hidden in between. One or two bystanders (d) are in other lanes. Both reveals last equally
    long, or the prompt says which is longer.

    Distinct pictures: 306,432 (8 lanes, one or two bystanders in 12 cells), with four or more
    prompts each.
    """

    side: str  # where the object comes out first: one of SIDES
    lane: int  # row (column, for top and bottom) in which it moves
    others: tuple[Item, ...]
    dwell: str = "equal"  # which of the two reveals lasts longer: one of DWELLS
    named: str = "object"  # "object", "red object", "red circle"

    kind: ClassVar[str] = "reveal"
    category: ClassVar[str] = "memory"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    held_out: ClassVar[frozenset[str]] = HELD_OUT
    limit: ClassVar[float] = 60.0
    prompts: ClassVar[tuple[str, ...]] = tuple(
        words.format(named, *sides)
        for named in (
            "object",
            *(f"{colour} object" for colour in COLOURS),
            *(f"{colour} {shape}" for shape, colour in LOOKS),
        )
        for words in DWELLS.values()
        for sides in SIDES.items()
    )

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "d")
        shape, colour = rng.choice(LOOKS)
        names = {24: "object", 4: f"{colour} object", 1: f"{colour} {shape}"}
        if (k := knobs.k or 24) not in names:
            raise MinicosError(f"{cls.kind} has 24, 4 or 1 answers, not k = {k}")
        side, lane = rng.choice(tuple(SIDES)), rng.randrange(size)
        free = [(other, at) for other in range(size) if other != lane for at in range(size)]
        cells = rng.sample(free, knobs.d or rng.randint(1, 2))
        cells = sorted(cell if _axis(side) else cell[::-1] for cell in cells)
        others = tuple(Item(*rng.choice(LOOKS), cell) for cell in cells)
        # mostly equal: the embedded VAE draws an object less well in a reveal that is the shorter
        dwell = rng.choice((*7 * ("equal",), *DWELLS))
        return cls(size, side, lane, others, dwell, names[k])

    @property
    def legible(self) -> bool:
        """Whether the embedded VAE can draw what the prompt names: pink comes out too pale in the
        shorter reveal, and as a circle.
        """
        return PALE not in self.named or (self.dwell == "equal" and "circle" not in self.named)

    @property
    def prompt(self) -> str:
        return DWELLS[self.dwell].format(self.named, self.side, SIDES[self.side])

    @property
    def key(self) -> str:
        lane = f"{('column', 'row')[_axis(self.side)]} {self.lane}"
        return f"{self.kind}/{self.size}/{lane} others {' '.join(map(str, self.others))}"

    @property
    def composition(self) -> str | None:
        """The colour and shape that the prompt names together."""
        return None if self.named.endswith("object") else self.named

    @property
    def candidates(self) -> tuple[Answer, ...]:
        """The same object twice: every one that the prompt admits."""
        return tuple((look, look) for look in LOOKS if self._admits(look))

    @property
    def foils(self) -> tuple[Answer, ...]:
        """An admitted object, then another; where the prompt names one, also the other twice."""
        pairs = [(look, _other(look, i)) for i, (look, _) in enumerate(self.candidates)]
        twice = [(other, other) for _, other in pairs if not self._admits(other)]
        return (*pairs, *twice)

    @property
    def depth(self) -> int:
        return 2

    @property
    def distractors(self) -> int:
        return len(self.others)

    @property
    def hidden(self) -> tuple[int, ...]:
        return (2,)

    def variants(self) -> tuple[Self, ...]:
        """The same picture with the sides exchanged."""
        return (replace(self, side=SIDES[self.side]),)

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: Answer | None, progress: np.ndarray) -> np.ndarray:
        """See `Puzzle.animate`; None means no object at all."""
        still = draw.items(self.backdrop(), self.others)
        canvas = np.repeat(still[None], len(progress), axis=0)
        lane = slice(self.lane * CELL, (self.lane + 1) * CELL)
        inside = canvas[(slice(None), *_oriented(self.side, lane, slice(None)))]
        second = progress >= AWAY
        for look, now in zip(answer or (), (~second, second), strict=False):
            cover = draw.coverage(draw.shape(look[0], *self._offsets(progress[now])))
            inside[now] = draw.paint(inside[now], cover, COLOURS[look[1]])
        canvas[(slice(None), *_oriented(self.side, lane, COVER))] = BLOCK
        return draw.border(canvas)

    def _offsets(self, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far the lane's pixels are from the object, y and x: they broadcast to (n, h, w)."""
        along = np.interp(progress, np.arange(12) / 11, PATHS[self.dwell])
        if self.side in ("right", "bottom"):
            along = self.size * CELL - along
        centres = _oriented(self.side, np.full_like(along, CELL / 2), along)
        y, x = draw.pixels(self.size * CELL)
        y, x = (y[:CELL], x) if _axis(self.side) else (y, x[:, :CELL])
        my, mx = (at.astype(np.float32)[:, None, None] for at in centres)
        return y - my, x - mx

    def score(self, video: np.ndarray) -> Score:
        """Judge a video uint8 (f, 64, 64, 3), f >= 5.

        The first frame must be this picture. In the clearest frame of each reveal there must be an
        object, clearly one and no blend, and the same; in the middle frame, none; and in the last
        one still the second. Everything else must stay. The check "same" is also passed if the
        object comes out on the second side first: it has been remembered.
        """
        self._check_video(video)
        times = timeline(len(video))
        blank = draw.to_uint8(self.animate(None, times))
        (out, first), (_, second) = self._reveals(video, blank)
        turned = [look for _, look in self.variants()[0]._reveals(video, blank)]
        vague = "is on the other side" if turned[0] else "shows no object clearly"
        when = [0, out, len(video) // 2, len(video) - 1]
        seen, times = video[when], times[when]
        guess = first or second or LOOKS[0], second or first or LOOKS[0]
        right = draw.to_uint8(self.animate(guess, times))
        wrong = [self._mismatch(*pair) for pair in zip(seen, right, strict=True)]
        complaints = {
            "first frame": wrong[0],
            "first reveal": wrong[1] if first else vague,
            "middle frame": wrong[2],
            "second reveal": wrong[3] if second else "shows no object clearly",
            "prompt": "" if second and self._admits(second) else f"it asks for the {self.named}",
            "both reveals": "" if first == second else f"{first} has become {second}",
        }
        detail = next((f"{where}: {why}" for where, why in complaints.items() if why), "")
        checks = {
            "start": float(not wrong[0]),
            "kept": self._kept(seen[3], guess),
            "way": float(first is not None and not wrong[2]),
            "object": float(second is not None and self._admits(second)),
            "same": float(any(a and a == b for a, b in ((first, second), turned))),
        }
        return self._verdict((first, second), detail, checks)

    def _reveals(self, video: np.ndarray, blank: np.ndarray) -> list[tuple[int, Look | None]]:
        """For each reveal, of the frames in which the object stands still, the one that shows it
        best, and the object; None if there is none, or none clearly.
        """
        along = np.interp(timeline(len(video)) * 11, np.arange(12), PATHS[self.dwell])
        found = []
        for stays, side, limit in zip(STAYS, (self.side, SIDES[self.side]), LEANS, strict=True):
            far, place = np.abs(along - stays), self._place(side)
            looks = {
                int(k): draw.likeness(video[k], place, blank[k])
                for k in np.flatnonzero(far <= far.min() + 0.5)
            }
            best = min(looks, key=lambda k: looks[k][1])
            look, lean = looks[best]
            found.append((best, look if lean < limit else None))
        return found

    def _place(self, side: str) -> draw.Cell:
        """The cell at one end of the lane."""
        row, column = _oriented(side, self.lane, 0 if side in ("left", "top") else self.size - 1)
        return row, column

    def _admits(self, look: Look) -> bool:
        colour, shape = ("", *self.named.split())[-2:]
        return colour in ("", look[1]) and shape in ("object", look[0])


def _axis(side: str) -> int:
    """1 where the object moves along a row, 0 along a column."""
    return int(side in ("left", "right"))


def _oriented(side: str, lane: Any, along: Any) -> tuple[Any, Any]:
    """A place in a lane as (row, column) or (y, x)."""
    return (lane, along) if _axis(side) else (along, lane)


def _other(look: Look, i: int) -> Look:
    """A look that differs in colour, or for odd i in shape."""
    shape, colour = look
    if i % 2:
        return SHAPES[(SHAPES.index(shape) + 1) % len(SHAPES)], colour
    colours = tuple(COLOURS)
    return shape, colours[(colours.index(colour) + 1 + i // 2 % 5) % len(colours)]
