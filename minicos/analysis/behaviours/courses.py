"""Self-correction and perception before action, as numbers on the embedded model (paper, Sec. 4).

self-correction     the leading hypothesis of the clean estimate, step by step, among the valid
                    answers and the answers to the same
                    picture's other prompts: wrong early and right late is a correction, a change
                    among valid ones a change of mind.
                    A blurred mixture of valid answers may lie nearest to a wrong one: so the ideal
                    observer's mean (`posterior`) at
                    the same latents is read the same way, and only what exceeds its rate is the
                    network's
perception first    the estimate's error against its own final value, over what stands still and
                    over what moves: which settles first?
                    (What stands still is in the first frame and needs only to be copied: the easier
                    job, and no wonder.)
The paper is silent on how to measure either: the definitions are ours, for puzzles of the embedded
model alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.tools import cases, posterior, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.masks import on_grid
from minicos.puzzles import Puzzle
from minicos.sample import Step
from minicos.wan import Wan

# of the latent's power: the error below which a part of the estimate counts as settled
SETTLED = 0.05

# -- self-correction -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What one run believed, step by step."""

    leaders: tuple[int, ...]  # the leading hypothesis at every step
    valid: int  # hypotheses below this number are valid answers
    final: int | None  # the answer of the finished video

    @property
    def wrong(self) -> tuple[int, ...]:
        """The steps at which the leader is no valid answer."""
        return tuple(s for s, leader in enumerate(self.leaders) if leader >= self.valid)

    @property
    def corrected(self) -> int | None:
        """The step from which on the leader is valid, where it once was not and the video is
        right; None elsewhere.
        """
        if not self.wrong or self.final is None or self.wrong[-1] + 1 == len(self.leaders):
            return None
        return self.wrong[-1] + 1

    @property
    def settled(self) -> int:
        """The step from which on the leader stays the same."""
        changes = [s for s in range(1, len(self.leaders)) if self.leaders[s] != self.leaders[s - 1]]
        return changes[-1] if changes else 0


def hypotheses(wan: Wan, puzzle: Puzzle) -> Tensor:
    """Latents of the valid answers, then of the answers to the picture's other prompts: r c f h
    w.
    """
    return torch.cat([posterior.answers(wan, p) for p in (puzzle, *puzzle.variants())])


def _count(puzzle: Puzzle) -> int:
    return sum(len(p.candidates) for p in (puzzle, *puzzle.variants()))


def leading(x0: Tensor, z: Tensor) -> int:
    """The hypothesis of z (r c f h w) that the estimate x0 (c f h w) is nearest to."""
    return int((z - x0).square().flatten(1).sum(1).argmin())


def courses(wan: Wan, batch: Sequence[Case], steps: Sequence[Step]) -> list[tuple[Course, Course]]:
    """Each case's course through a finished run of the batch, and the ideal observer's at the
    same latents.
    """
    verdicts = cases.scores(wan, steps[-1].next, batch)
    out = []
    for k, (case, verdict) in enumerate(zip(batch, verdicts, strict=True)):
        z, valid = hypotheses(wan, cases.known(case)), len(cases.known(case).candidates)
        ideal = [
            posterior.mean(posterior.weights(step.x[k], step.sigma, z[:valid]), z[:valid])
            for step in steps
        ]
        final = verdict.answer if verdict.solved else None
        own = Course(tuple(leading(step.x0_cond[k], z) for step in steps), valid, final)
        out.append((own, Course(tuple(leading(x0, z) for x0 in ideal), valid, final)))
    return out


# -- perception first ------------------------------------------------------------------------------


def masks(puzzle: Puzzle, answer: int, grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Where things stand still and where something moves, on the latent grid f h w without its
    first frame: two bool (f - 1 h w).
    """
    pixels = (puzzle.foreground(), puzzle.answer_mask(answer))
    still, moving = (on_grid(mask, grid)[1:] for mask in pixels)
    return still & ~moving, moving


def unsettled(steps: Sequence[Step], k: int, where: Tensor) -> np.ndarray:
    """Squared error of case k's estimate against its final latent at `where` (f h w, without frame
    0), over that latent's power: steps.

    Raises ValueError where nothing is there.
    """
    if not where.any():
        raise ValueError("nothing is there whose error could be measured")
    final = steps[-1].next[k, :, 1:][:, where]
    return np.array(
        [
            ((s.x0_cond[k, :, 1:][:, where] - final).square().sum() / final.square().sum()).item()
            for s in steps
        ]
    )


def settling(steps: Sequence[Step], k: int, puzzle: Puzzle, answer: int) -> list[float]:
    """The steps from which on what stands still and what moves are settled, in a run of case k that
    ends at `answer`.

    NaN where there is no such thing: in a maze all objects move or are reached.
    """
    final = steps[-1].next
    grid = (final.shape[2], final.shape[3], final.shape[4])
    return [
        _settled(unsettled(steps, k, where)) if where.any() else math.nan
        for where in (mask.to(final.device) for mask in masks(puzzle, answer, grid))
    ]


def _settled(error: np.ndarray) -> float:
    """The step from which on an error stays below SETTLED; their number if it never does."""
    return float(stats.settled((error >= SETTLED)[None])[0])


def follow(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Run a batch and keep its courses and what settles when; first axis cases.

    leaders, ideal   b N  leading hypotheses: the network's, the ideal observer's
    valid            b    how many hypotheses are valid, of so many `hypotheses`
    final            b    the finished video's answer, -1 where it is not right
    settled          b 2  `settling` at that answer; NaN where there is none
    """
    condition = cases.condition(wan, batch)
    steps = list(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    found = courses(wan, batch, steps)
    finals = [own.final for own, _ in found]
    settled = [
        [math.nan] * 2 if final is None else settling(steps, k, cases.known(case), final)
        for k, (case, final) in enumerate(zip(batch, finals, strict=True))
    ]
    return {
        "leaders": torch.tensor([own.leaders for own, _ in found]),
        "ideal": torch.tensor([ideal.leaders for _, ideal in found]),
        "valid": torch.tensor([own.valid for own, _ in found]),
        "hypotheses": torch.tensor([_count(cases.known(case)) for case in batch]),
        "final": torch.tensor([-1 if final is None else final for final in finals]),
        "settled": torch.tensor(settled, dtype=torch.float64),
    }
