"""`shell`: a ball goes under one of three cups, cups change places, the one with the ball lifts."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from random import Random
from typing import ClassVar, NamedTuple, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle, Score, clearest, timeline
from .draw import CELL, COLOURS, SHAPES, Cell, Item

CUPS = 3
CUP, BALL = 5, 4.8  # half a cup's side and the radius of the ball, px
LIFT, SWING = 10, 7  # how far a cup lifts, and leaves the row when it changes places, px
PAIRS = ("left", "right")  # which two neighbours change places
LENGTHS = range(1, 6)  # how many times they may
UNCLEAR = -1  # in place of a pair


class Answer(NamedTuple):
    """Which pairs change places, and under which cup the ball is at the end."""

    swaps: tuple[int, ...]  # indices of PAIRS
    ball: int  # which cup, from the left


@dataclass(frozen=True)
class Shell(Puzzle):
    """Cover the ball, swap neighbouring cups s times, and lift the cup with the ball.

    The cups look the same and the picture shows only where the ball is at first, so its final place
    follows from the drawn swaps. A model chooses them (k = 2 ** s) or the prompt names them (k =
    1). Covering the ball, each swap and the final lift take four frames each, that is, one latent
    frame. One or two bystanders (d) are in the free row.

    Distinct pictures: 426,240 (10 pairs of colours, 4 places for the cups, 3 for the ball,
    bystanders in 4 cells).
    """

    ball: int  # which cup, from the left
    colours: tuple[str, str]  # of ball and cups
    place: Cell  # of the left cup; the others stand in the next cells
    others: tuple[Item, ...]
    length: int  # number of swaps
    named: tuple[int, ...] | None = None  # the swaps that the prompt names

    kind: ClassVar[str] = "shell"
    category: ClassVar[str] = "memory"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    prompts: ClassVar[tuple[str, ...]] = (
        "swap the cups then show the ball",
        *(
            f"swap {' '.join(names)} then show the ball"
            for length in LENGTHS
            for names in product(PAIRS, repeat=length)
        ),
    )

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "s", "d")
        length = knobs.s or 2
        if length not in LENGTHS:
            raise MinicosError(f"{cls.kind} has 1 to {max(LENGTHS)} swaps, not s = {length}")
        if knobs.k not in (None, 1, 2**length):
            raise MinicosError(f"{cls.kind} has 1 or 2 ** s answers, not k = {knobs.k}")
        row, column = rng.choice((1, 2)), rng.randrange(size - CUPS + 1)
        free = 0 if row == 2 else size - 1  # the row that the cups never reach
        columns = sorted(rng.sample(range(size), knobs.d or rng.randint(1, 2)))
        colours = tuple(COLOURS)
        others = tuple(
            Item(rng.choice(SHAPES), rng.choice(colours), (free, column)) for column in columns
        )
        ball, cups = rng.randrange(CUPS), rng.choice(("red", "blue"))
        colour = rng.choice([colour for colour in colours if colour != cups])
        swaps = tuple(rng.randrange(2) for _ in range(length))
        named = swaps if knobs.k == 1 else None
        return cls(size, ball, (colour, cups), (row, column), others, length, named)

    @property
    def prompt(self) -> str:
        swaps = "the cups" if self.named is None else _names(self.named)
        return f"swap {swaps} then show the ball"

    @property
    def key(self) -> str:
        ball, cups = self.colours
        place, others = "{},{}".format(*self.place), " ".join(map(str, self.others))
        return (
            f"{self.kind}/{self.size}/{ball} ball {self.ball} {cups} cups {place} others {others}"
        )

    @property
    def frames(self) -> int:  # type: ignore[override]
        """1 and four for each of cover, swaps and lift."""
        return 4 * self.length + 9

    @property
    def candidates(self) -> tuple[Answer, ...]:
        """Every sequence of swaps that the prompt admits, with the cup where the ball is then."""
        chosen = product(range(2), repeat=self.length) if self.named is None else (self.named,)
        return tuple(Answer(swaps, self._follow(swaps)) for swaps in chosen)

    @property
    def foils(self) -> tuple[Answer, ...]:
        """The same swaps with the ball under a wrong cup: the first one, if that is wrong."""
        return tuple(
            Answer(swaps, self.ball if self.ball != ball else (ball + 1) % 3)
            for swaps, ball in self.candidates
        )

    @property
    def depth(self) -> int:
        return self.length

    @property
    def distractors(self) -> int:
        return len(self.others)

    def backdrop(self) -> np.ndarray:
        return draw.border(draw.floor(self.size))

    def animate(self, answer: Answer, progress: np.ndarray) -> np.ndarray:
        canvas = draw.items(self.backdrop(), self.others)
        canvas = np.repeat(canvas[None], len(progress), axis=0)
        row, left = draw.centre(self.place)
        band = slice(int(row) - LIFT - CUP - 1, int(row) + SWING + CUP + 1)
        y, x = draw.pixels(self.size * CELL)
        y, x = y[band] - np.float32(row), x - np.float32(left)
        frame = progress * (self.frames - 2)
        lifting = self.frames - 5
        for cup, now in ((self.ball, frame <= 4), (answer.ball, frame >= lifting)):
            cover = draw.coverage(draw.disc(y, x - CELL * cup, BALL))
            canvas[now, band] = draw.paint(canvas[now, band], cover, COLOURS[self.colours[0]])
        for cy, cx in self._cups(answer, frame):
            cover = draw.coverage(draw.box(y - cy, x - cx, CUP, CUP))
            canvas[:, band] = draw.paint(canvas[:, band], cover, COLOURS[self.colours[1]])
        return canvas

    def _cups(self, answer: Answer, frame: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where the cups are at `frame` (n,) of 0..frames - 2: y and x, each (n, 1, 1).

        In px from the place of the left cup.
        """
        y = np.zeros((CUPS, len(frame)), np.float32)
        x = np.repeat(CELL * np.arange(CUPS, dtype=np.float32)[:, None], len(frame), axis=1)
        y[self.ball] -= LIFT * np.clip(1 - frame / 3, 0, 1)
        y[answer.ball] -= LIFT * np.clip((frame - self.frames + 5) / 3, 0, 1)
        for turn, pair in enumerate(answer.swaps):
            part = (frame - 4) / 4 - turn
            now = (part > 0) & (part < 1)
            angle = np.pi * part[now]
            for cup, side in ((pair, -1), (pair + 1, 1)):
                x[cup, now] = CELL * (pair + 0.5) + side * CELL / 2 * np.cos(angle)
                y[cup, now] = side * SWING * np.sin(angle)
        return [(cy[:, None, None], cx[:, None, None]) for cy, cx in zip(y, x, strict=True)]

    def score(self, video: np.ndarray) -> Score:
        """Judge a video uint8 (f, 64, 64, 3), f >= 5.

        The first frame must be this picture. In the middle of each swap it must be clear which cups
        change places, as the prompt says if it does. In the last frame the ball must be, clearly,
        under the cup where these swaps bring it.
        """
        self._check_video(video)
        start, last = self._mismatch(video[0], self.first_frame()), video[-1]
        covered = self._mismatch(*self._moment(video, 4, self.candidates[0]))
        swaps = tuple(self._swap(video, turn) for turn in range(self.length))
        ends = [Answer((), spot) for spot in range(CUPS)]
        ball = clearest(last, [self._still(end, 1.0) for end in ends])
        detail = start and f"first frame: {start}"
        detail = detail or (covered and f"the ball is not covered: {covered}")
        detail = detail or self._complaint(swaps, ball)
        end = ends[ball or 0]
        if not detail and (shown := self._mismatch(last, self._still(end, 1.0))):
            detail = f"last frame: {shown}"
        asked = self.named or swaps
        right = [swap == ask != UNCLEAR for swap, ask in zip(swaps, asked, strict=True)]
        checks = {
            "start": float(not start),
            "kept": self._kept(last, end),
            "way": float(not covered),
            "swaps": sum(right) / len(right),
            "ball": float(UNCLEAR not in swaps and ball == self._follow(swaps)),
        }
        return self._verdict((swaps, ball), detail, checks)

    def _complaint(self, swaps: tuple[int, ...], ball: int | None) -> str:
        """Why the readings are not an answer; empty if they are."""
        if UNCLEAR in swaps:
            return f"swap {swaps.index(UNCLEAR) + 1}: it is not clear which cups change places"
        if self.named is not None and self.named != swaps:
            return f"the cups swap {_names(swaps)}, not {_names(self.named)}"
        if ball is None:
            return "last frame: it is not clear where the ball is"
        if ball != (right := self._follow(swaps)):
            return f"last frame: the ball is under cup {ball + 1}, not under cup {right + 1}"
        return ""

    def _swap(self, video: np.ndarray, turn: int) -> int:
        """Which pair changes places in a swap, or UNCLEAR."""
        moments = [
            self._moment(video, 4 * turn + 6, Answer((pair,) * self.length, 0)) for pair in (0, 1)
        ]
        rest = self._still(Answer((), 0), 4 / (self.frames - 2))
        seen = clearest(moments[0][0], [*(look for _, look in moments), rest])
        return UNCLEAR if seen is None or seen > 1 else seen

    def _moment(
        self, video: np.ndarray, frame: int, answer: Answer
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `video` shows, and should show, at the time of a frame of a full-length video."""
        index = round(frame * (len(video) - 2) / (self.frames - 2))
        return video[index], self._still(answer, float(timeline(len(video))[index]))

    def _follow(self, swaps: tuple[int, ...]) -> int:
        """Where the ball is after these swaps."""
        ball = self.ball
        for pair in swaps:
            ball = {pair: pair + 1, pair + 1: pair}.get(ball, ball)
        return ball


def _names(swaps: tuple[int, ...]) -> str:
    """Swaps in words."""
    return " ".join(PAIRS[swap] for swap in swaps)
