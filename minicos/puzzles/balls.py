"""`balls`: hard balls move in a box, bounce off its walls and off each other."""

from __future__ import annotations

import cmath
from dataclasses import dataclass
from itertools import combinations, permutations
from math import inf, pi
from random import Random
from typing import ClassVar, Self

import numpy as np

from minicos.errors import MinicosError

from . import draw
from .base import FREE, Knobs, Puzzle, Score, timeline
from .draw import CELL, COLOURS
from .maze import TRAIL
from .motion import ANGLES, HIGH, LOW, RADIUS, SPEED, Ball, move

MARK = 13, 2  # length and half width, px, of the stroke on the floor that shows a ball's direction
FRAMES = {1: 13, 2: 13, 3: 17, 4: 17}  # by the number of balls
# Of balls. The strokes are sky; a fast black ball looks like a green one behind the tiny VAE.
NAMES = ("red", "green", "blue", "pink")
NEAR = 4  # px by which a ball may be off
# Distance from a ball's colour (RGB, 0..441) up to which a pixel counts as its own: a ball that is
# half faded away has none.
INK = 60
WHOLE = 0.25, 1.3  # limits of a ball's own pixels, as a share of its area
STRAY = 0.4  # and of its own colour elsewhere: edges of other balls, but no second ball
# Conditions for a fair puzzle. Times are in frames, distances in px.
HIT = 0.6  # least share of the relative speed along the line of centres: no glancing hits
EARLY, LATE = 2, 3  # no first hit before, no last hit in the last so many
FAR = 8  # least distance between start and end of a ball, and between ends of answer and foils
# Least distance of centres at the judged moments, by the number of balls: closer discs blend in the
# tiny VAE. Four balls have hardly room for more.
APART = {1: 15, 2: 15, 3: 15, 4: 12}


def draw_fair(rng: Random, n: int) -> tuple[Ball, ...]:
    """n balls that meet n - 1 times in a chain: every motion depends on the one before."""
    until, colours = FRAMES[n] - 2, rng.sample(NAMES, n)
    while True:
        balls: tuple[Ball, ...] = ()
        for _ in range(40 * n):
            ball = _aimed(rng, balls, colours[len(balls)], until)
            if _chained((*balls, ball), until) and _legible((*balls, ball), n):
                balls = (*balls, ball)
            if len(balls) == n:
                break
        if len(balls) == n and _ends_apart(balls, until):
            return balls


def _aimed(rng: Random, others: tuple[Ball, ...], colour: str, until: int) -> Ball:
    """A ball that would, going straight, hit one of the others; any ball if there are none."""
    angle, when = rng.randrange(ANGLES), rng.uniform(EARLY, until - LATE)
    if not others:
        return Ball(colour, (rng.randrange(9, 57, 2), rng.randrange(9, 57, 2)), angle)
    target = complex(rng.choice(move(others, "bounce", until).at(np.array([when]))[0]))
    touching = target + cmath.rect(2 * RADIUS, 2 * pi * rng.random())
    start = touching - when * SPEED * Ball(colour, (0, 0), angle).heading
    y, x = (2 * round((at - 1) / 2) + 1 for at in (start.imag, start.real))  # odd, as above
    return Ball(colour, (y, x), angle)


def _chained(balls: tuple[Ball, ...], until: int) -> bool:
    """Whether the balls fit into the box and hit each other in one chain, in good time."""
    if not all(LOW < at < HIGH for ball in balls for at in ball.start):
        return False
    if any(abs(a.place - b.place) < 3 * RADIUS for a, b in combinations(balls, 2)):
        return False
    if any(_covers(a, b) for a, b in permutations(balls, 2)):
        return False
    hits = [event for event in move(balls, "bounce", until).events if event.j >= 0]
    if len(hits) != len(balls) - 1:
        return False
    met = {hits[0].i, hits[0].j} if hits else set()
    for hit in hits:
        if met.isdisjoint((hit.i, hit.j)) or hit.share < HIT:
            return False
        met |= {hit.i, hit.j}
    return all(EARLY < hit.wait < until - LATE for hit in hits)


def _covers(ball: Ball, other: Ball) -> bool:
    """Whether a ball touches the stroke that shows where another one goes."""
    offset = (ball.place - other.place) * other.heading.conjugate()
    along = min(max(offset.real, 0), MARK[0])
    return abs(offset - along) < RADIUS + MARK[1] + 1


def judged(frames: int) -> list[int]:
    """The frames of a video that `Balls.score` looks at."""
    return [0, frames // 4, frames // 2, 3 * (frames - 1) // 4, frames - 1]


def _legible(balls: tuple[Ball, ...], n: int) -> bool:
    """Whether no two balls are close to each other in a judged frame of a video of n balls."""
    frames = FRAMES[n]
    places = move(balls, "bounce", frames - 2).at(timeline(frames)[judged(frames)] * (frames - 2))
    return all((abs(a - b) >= APART[n]).all() for a, b in combinations(places.T, 2))


def _ends_apart(balls: tuple[Ball, ...], until: int) -> bool:
    """Whether answer and foils end apart, hide no ball, and every ball ends away from its start."""
    ends = [move(balls, rule, until).places[-1] for rule in ("bounce", *_foils(balls))]
    return (
        all(_farthest(a, b) >= FAR for a, b in combinations(ends, 2))
        and all(abs(a - b) > 1.9 * RADIUS for end in ends for a, b in combinations(end, 2))
        and all(abs(end - ball.place) >= FAR for end, ball in zip(ends[0], balls, strict=True))
    )


def _farthest(a: list[complex], b: list[complex]) -> float:
    return max(abs(p - q) for p, q in zip(a, b, strict=True))


def _foils(balls: tuple[Ball, ...]) -> tuple[str, ...]:
    return ("pass", "stop") if len(balls) > 1 else ("stop",)


@dataclass(frozen=True)
class Balls(Puzzle):
    """Let the balls move as the strokes say, until time is up.

    Everything follows from the picture: s - 1 hits between s balls of equal mass, one after
    another, besides bounces off the walls; s = 1 is one ball that bounces off a wall, at the same
    speed for as long as two balls.
    """

    balls: tuple[Ball, ...]

    kind: ClassVar[str] = "balls"
    category: ClassVar[str] = "physics"
    sizes: ClassVar[tuple[int, ...]] = (4,)
    prompts: ClassVar[tuple[str, ...]] = ("let the balls move",)
    # A missing ball deviates by 150 or more; most discs lose up to 90 in the shipped VAE, few 115.
    limit: ClassVar[float] = 120.0

    @classmethod
    def sample(cls, rng: Random, size: int, knobs: Knobs = FREE) -> Self:
        knobs.check(cls.kind, "k", "s")
        if (n := knobs.s or 2) not in FRAMES or knobs.k not in (None, 1):
            raise MinicosError(f"{cls.kind} has k = 1 and s in {tuple(FRAMES)}, not {knobs}")
        return cls(size, draw_fair(rng, n))

    @property
    def prompt(self) -> str:
        return self.prompts[0]

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.size}/{' '.join(map(str, self.balls))}"

    @property
    def frames(self) -> int:  # type: ignore[override]
        """13, or 17 for three balls and more."""
        return FRAMES[len(self.balls)]

    @property
    def candidates(self) -> tuple[str, ...]:
        """The rules for meeting balls, see `move`."""
        return ("bounce",)

    @property
    def foils(self) -> tuple[str, ...]:
        return _foils(self.balls)

    @property
    def depth(self) -> int:
        return len(self.balls)

    def backdrop(self) -> np.ndarray:
        """The box, and a stroke from where each ball starts to where it goes."""
        canvas = draw.floor(self.size)
        y, x = draw.pixels(self.size * CELL)
        for ball in self.balls:
            offset = x + 1j * y - ball.place - MARK[0] / 2 * ball.heading
            along = offset * np.conj(ball.heading)
            stroke = draw.box(along.imag, along.real, MARK[1], MARK[0] / 2)
            canvas = draw.paint(canvas, draw.coverage(stroke), TRAIL)
        return draw.border(canvas)

    def animate(self, answer: str, progress: np.ndarray) -> np.ndarray:
        until = self.frames - 2
        places = move(self.balls, answer, until).at(progress * until)
        return self._scene(places)

    def _scene(self, places: np.ndarray) -> np.ndarray:
        """The box with balls at `places` (n, balls) complex: float32 (n, h, w, 3)."""
        y, x = draw.pixels(self.size * CELL)
        canvas = np.repeat(self.backdrop()[None], len(places), axis=0)
        for ball, place in zip(self.balls, places.T[..., None, None], strict=True):
            dy, dx = y - place.imag.astype(np.float32), x - place.real.astype(np.float32)
            canvas = draw.paint(
                canvas, draw.coverage(draw.disc(dy, dx, RADIUS)), COLOURS[ball.colour]
            )
        return canvas

    def score(self, video: np.ndarray) -> Score:
        """Judge a video uint8 (f, 64, 64, 3), f >= 5.

        Every ball must be where it should be, up to NEAR px, at a quarter, half and three quarters
        of the time and at the end, whole and there once.
        """
        self._check_video(video)
        until, count = self.frames - 2, len(video)
        when = judged(count)
        times = timeline(count)[when] * until
        seen = np.array([self._find(frame) for frame in video[when]])
        off = {
            rule: np.abs(seen - move(self.balls, rule, until).at(times))
            for rule in (*self.candidates, *self.foils)
        }
        shown = next((rule for rule, gaps in off.items() if (gaps[-1] < NEAR).all()), None)
        gaps, whole = off["bounce"], np.isfinite(seen[-1]).all()
        start = self._mismatch(video[0], self.first_frame())
        detail = start and f"first frame: {start}"
        for k in (4, 1, 2, 3):
            detail = detail or self._complaint(when[k], gaps[k])
        rest = self._mismatch(video[-1], draw.to_uint8(self._scene(seen[-1:]))[0]) if whole else ""
        checks = {
            "start": float(not start),
            "kept": self._kept(video[-1], "bounce"),
            "way": float((gaps[1:4] < NEAR).all(1).mean()),
            "near": float((gaps[-1] < NEAR).mean()),
            "place": float(np.clip(1 - (gaps[-1] - 1) / (self._paths() - 1), 0, 1).mean()),
        }
        return self._verdict(shown, detail or (rest and f"last frame: {rest}"), checks)

    def _paths(self) -> np.ndarray:
        """How far from its start each ball should end, px (balls,)."""
        ends = move(self.balls, "bounce", self.frames - 2).places[-1]
        return np.abs(np.array(ends) - [ball.place for ball in self.balls])

    def _complaint(self, frame: int, gaps: np.ndarray) -> str:
        """Which ball is farther from its place than NEAR; empty when none is."""
        worst = int(gaps.argmax())
        if gaps[worst] < NEAR:
            return ""
        wrong = (
            f"{gaps[worst]:.0f} px off" if np.isfinite(gaps[worst]) else "not there, whole and once"
        )
        return f"frame {frame}: the {self.balls[worst].colour} ball is {wrong}"

    def _find(self, frame: np.ndarray) -> list[complex]:
        """Where each ball is, inf where it is not whole or not there just once."""
        inside = slice(2, -2)
        y, x = draw.pixels(self.size * CELL)
        grid, pixels = (x + 1j * y)[inside, inside], frame[inside, inside].astype(np.float32)
        colours = [np.array(COLOURS[ball.colour], np.float32) for ball in self.balls]
        return [_centre(grid[np.linalg.norm(pixels - one, axis=-1) < INK]) for one in colours]


def _centre(own: np.ndarray) -> complex:
    """The middle of the only disc that these pixels form (complex x + iy); inf if they do not."""
    if not len(own):
        return complex(inf)
    dense = own[(np.abs(own[:, None] - own) < RADIUS).sum(1).argmax()]
    middle = own[np.abs(own - dense) < RADIUS + 2].mean()
    here = np.abs(own - middle) < RADIUS + 2
    area = pi * RADIUS**2
    whole = WHOLE[0] < here.sum() / area < WHOLE[1] and (~here).sum() / area < STRAY
    return complex(own[here].mean()) if whole else complex(inf)
