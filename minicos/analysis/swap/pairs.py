"""What a swap runs on: one picture and noise with two prompts, and who gives its states instead in a control."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
import torch
from torch import Tensor

from minicos import puzzles
from minicos.analysis.swap.pictures import Probe
from minicos.analysis.tools import cases
from minicos.analysis.tools.cases import Case
from minicos.errors import MinicosError

CONTROLS = ("null", "wrong", "shuffled", "random")
A, B, NEITHER, UNREAD = range(4)  # what a video shows


@dataclass(frozen=True)
class Pair:
    """One picture and noise with two prompts: `a` gives, `b` receives."""

    a: Case
    b: Case
    objects: np.ndarray | None = None  # where they stand in the first frame, bool H W
    shows: tuple[
        Callable[[np.ndarray], bool], ...
    ] = ()  # whether a video (F H W 3) shows A's answer, and B's

    @property
    def image(self) -> Tensor | None:
        return self.b.image

    def turned(self) -> "Pair":
        return replace(self, a=self.b, b=self.a, shows=self.shows[::-1])

    def read(self, video: np.ndarray) -> int:
        """What a video shows: A, B, NEITHER (or both), or UNREAD where nobody can tell."""
        if not self.shows:
            return UNREAD
        a, b = (shows(video) for shows in self.shows)
        return A if a and not b else B if b and not a else NEITHER


def pairs(kind: str, n: int, *, size: int = 4, split: str = "test", seed: int = 0) -> list[Pair]:
    """The first n distinct puzzles of a split as B, each with another prompt for its picture as A.

    A video shows an answer when its last frame does. Raises MinicosError for puzzles that admit one prompt only.
    """
    made = []
    for i, case in enumerate(cases.held_out(kind, n, size=size, split=split, seed=seed)):
        others = case.puzzle.variants()
        if not others:
            raise MinicosError(
                f"a swap needs two prompts for one picture, and {kind} has one: take mark or goal"
            )
        other = Case.of(others[i % len(others)], case.seed)
        made.append(
            Pair(
                other,
                case,
                case.puzzle.foreground(),
                (_answers(other.puzzle), _answers(case.puzzle)),
            )
        )
    return made


def probes(n: int, height: int, width: int, *, seed: int = 0) -> list[Pair]:
    """n drawn pictures with a prompt for each of their two classes, for any image-to-video model."""
    made = []
    for i in range(n):
        probe = Probe.sample(Random(f"probe/{height}/{width}/{i}"), height, width)
        image = torch.from_numpy(probe.image()).permute(2, 0, 1).float() / 255
        a, b = probe.kinds if i % 2 else probe.kinds[::-1]
        made.append(
            Pair(
                Case(probe.prompt(a), image, seed + i),
                Case(probe.prompt(b), image, seed + i),
                probe.mask(),
                (probe.shows(a), probe.shows(b)),
            )
        )
    return made


def _answers(puzzle: puzzles.Puzzle) -> Callable[[np.ndarray], bool]:
    return lambda video: puzzle.score(video).answer is not None


def donors(made: Sequence[Pair], control: str | None) -> list[Case]:
    """The case that gives to each pair's b: a itself, or what a control takes in its place (the noise is b's in any case).

    null      b itself: nothing may change, to the last bit
    wrong     the a of the next pair: another picture (of the same size) and its prompt
    shuffled  this picture with the a prompt of the next pair that asks for neither a nor b; of the next pair, where all do
    random    a; its states are then replaced by random ones at the same distance (`Swap.random`)
    """
    if control == "null":
        return [pair.b for pair in made]
    if control in (None, "random"):
        return [pair.a for pair in made]
    if control not in CONTROLS:
        raise MinicosError(f"no control {control!r}: one of {', '.join(CONTROLS)}")
    following = [_others(made, i) for i in range(len(made))]
    if not all(following):
        raise MinicosError(
            f"the control {control!r} takes its donor from another picture, and there is only one"
        )
    if control == "wrong":
        return [others[0].a for others in following]
    third = [
        next(
            (o.a.prompt for o in others if o.a.prompt not in (pair.a.prompt, pair.b.prompt)),
            others[0].a.prompt,
        )
        for pair, others in zip(made, following, strict=True)
    ]
    return [
        replace(pair.b, prompt=prompt, puzzle=None)
        for pair, prompt in zip(made, third, strict=True)
    ]


def _others(made: Sequence[Pair], i: int) -> list[Pair]:
    """The pairs behind pair i, then those before it, without pair i turned around."""
    pair = made[i]
    return [
        other
        for other in (*made[i + 1 :], *made[:i])
        if other.b is not pair.b and other.b is not pair.a
    ]
