"""The inputs of a swap: one picture and noise with two prompts, and the donors of the controls."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random

import numpy as np
import torch
from torch import Tensor

from minicos import puzzles
from minicos.analysis.options import SwapOptions
from minicos.analysis.swap.drawings import Drawing
from minicos.analysis.tools import cases
from minicos.analysis.tools.cases import Case
from minicos.errors import MinicosError
from minicos.media import load_image

SOME = 8  # puzzles of a kind: one of them admits a second prompt if any does
CONTROLS = ("null", "wrong", "shuffled", "random")
A, B, NEITHER, UNREAD = range(4)  # what a video shows


@dataclass(frozen=True)
class Pair:
    """One picture and noise with two prompts: `a` gives its states, `b` receives them."""

    a: Case
    b: Case
    objects: np.ndarray | None = None  # positions of the objects in the first frame, bool H W
    # functions that say whether a video (F H W 3) shows A's answer, and B's
    shows: tuple[Callable[[np.ndarray], bool], ...] = ()

    @property
    def image(self) -> Tensor | None:
        """The picture that both share."""
        return self.b.image

    def turned(self) -> "Pair":
        """The other direction: B gives, A receives."""
        return replace(self, a=self.b, b=self.a, shows=self.shows[::-1])

    def read(self, video: np.ndarray) -> int:
        """What a video shows: A, B, NEITHER (or both), or UNREAD if nothing can judge it."""
        if not self.shows:
            return UNREAD
        a, b = (shows(video) for shows in self.shows)
        return A if a and not b else B if b and not a else NEITHER


def pairs(
    kind: str, n: int, *, size: int | None = None, split: str = "test", seed: int = 0
) -> list[Pair]:
    """The first n distinct puzzles of a split as B, each with another prompt for its picture as A.
    Puzzles that admit no other prompt are passed over.

    A video shows an answer if its last frame does.

    Raises:
        MinicosError: the puzzles of this kind admit only one prompt.
    """
    draw = partial(cases.held_out, kind, size=size, split=split, seed=seed)
    if not any(map(_asks_twice, map(cases.known, draw(SOME)))):
        raise MinicosError(
            f"a swap needs two prompts for one picture, and {kind} has one: take mark or goal"
        )
    made = []
    for i, case in enumerate(draw(n, keep=_asks_twice)):
        puzzle = cases.known(case)
        others = puzzle.variants()
        other = Case.of(others[i % len(others)], case.seed)
        made.append(
            Pair(
                other,
                case,
                puzzle.foreground(),
                (_answers(others[i % len(others)]), _answers(puzzle)),
            )
        )
    return made


def _asks_twice(puzzle: puzzles.Puzzle) -> bool:
    """Whether its picture admits another prompt."""
    return bool(puzzle.variants())


def drawn(n: int, height: int, width: int, *, seed: int = 0) -> list[Pair]:
    """n drawn pictures with two prompts each, one per class, for any image-to-video model."""
    made = []
    for i in range(n):
        drawing = Drawing.sample(Random(f"probe/{height}/{width}/{i}"), height, width)
        image = torch.from_numpy(drawing.image()).permute(2, 0, 1).float() / 255
        a, b = drawing.kinds if i % 2 else drawing.kinds[::-1]
        made.append(
            Pair(
                Case(drawing.prompt(a), image, seed + i),
                Case(drawing.prompt(b), image, seed + i),
                drawing.mask(),
                (drawing.shows(a), drawing.shows(b)),
            )
        )
    return made


def chosen(options: SwapOptions) -> list[Pair]:
    """The pairs of the options: held-out puzzles, drawn pictures, or the user's own; followed by
    the reverse direction, unless `one_way`.

    Raises:
        MinicosError: there is only one prompt, or an invalid size of drawings.
    """
    if (options.prompt is None) != (options.other is None):
        raise MinicosError("a swap of your own needs two prompts: give --prompt and --other")
    if options.image is not None and options.prompt is None:
        raise MinicosError("--image needs --prompt and --other; without them, puzzles are used")
    if options.probe and options.prompt is not None:
        raise MinicosError("give one of --puzzle, --probe, or --prompt with --other")
    if options.prompt is not None and options.other is not None:
        image = None if options.image is None else load_image(options.image)
        a, b = (Case(prompt, image, options.seed) for prompt in (options.other, options.prompt))
        made = [Pair(a, b)]
    elif options.probe:
        match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", options.pixels)
        if not match:
            raise MinicosError(f"--pixels {options.pixels}: give height x width, such as 480x832")
        made = drawn(options.probe, int(match[1]), int(match[2]), seed=options.seed)
    else:
        made = []
        for kind, n in cases.families(options).items():
            seed = options.seed + len(made)
            made += pairs(kind, n, size=options.size, split=options.split, seed=seed)
    return made if options.one_way else made + [pair.turned() for pair in made]


def _answers(puzzle: puzzles.Puzzle) -> Callable[[np.ndarray], bool]:
    return lambda video: puzzle.score(video).answer is not None


def donors(made: Sequence[Pair], control: str | None) -> list[Case]:
    """The donor of each pair's b: a itself, or what a control uses instead. The noise is always
    b's.

    - null: b itself; nothing may change, to the last bit.
    - wrong: the a of the next pair, that is, another picture (of the same size) and its prompt.
    - shuffled: this picture with the a prompt of the next pair that asks for neither a nor b, or of
      the next pair if there is none.
    - random: a; its states are then replaced by random ones at the same distance (`Swap.random`).
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
    """The pairs after pair i, then those before it, without the reverse of pair i."""
    pair = made[i]
    return [
        other
        for other in (*made[i + 1 :], *made[:i])
        if other.b is not pair.b and other.b is not pair.a
    ]
