"""Three behaviours that the paper describes (Sec. 4), as numbers on the embedded model: memory, self-correction, perception first.

self-correction     the leading hypothesis of the clean estimate, step by step, among the valid answers and the answers to the same
                    picture's other prompts: wrong early and right late is a correction, a change among valid ones a change of mind.
                    A blurred mixture of valid answers may lie nearest to a wrong one: so the ideal observer's mean (`posterior`) at
                    the same latents is read the same way, and only what exceeds its rate is the network's
perception first    the estimate's error against its own final value, over what stands still and over what moves: which settles first?
                    (What stands still is in the first frame and needs only to be copied: the easier job, and no wonder.)
working memory      while an object is behind the wall, can shape and colour be read out of the hidden states at the tokens that hide it?
                    A ridge classifier on some puzzles, judged on others. Controls: shuffled labels say what chance gives; the patch
                    embedding (layer -1) what those tokens are given before they look at any other; the latents of the drawn video
                    what the picture itself gives away there, since the VAE sees across the wall's edge
The paper is silent on how to measure any of them: the definitions are ours, for puzzles of the embedded model alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from minicos.analysis.tools import cases, posterior
from minicos.analysis.tools.cases import Case
from minicos.hooks import Hooks, Site
from minicos.puzzles import Puzzle
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.sample import Step
from minicos.wan import Wan

EMBED = -1  # the layer before block 0: the patch embedding
RIDGES = tuple(
    10.0**k for k in range(7)
)  # of standardised columns, whose squares sum to the number of rows

# -- self-correction --------------------------------------------------------------------------------------------------


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
        """The step from which on the leader is valid, where it once was not and the video is right; None elsewhere."""
        if not self.wrong or self.final is None or self.wrong[-1] + 1 == len(self.leaders):
            return None
        return self.wrong[-1] + 1

    @property
    def settled(self) -> int:
        """The step from which on the leader stays the same."""
        changes = [s for s in range(1, len(self.leaders)) if self.leaders[s] != self.leaders[s - 1]]
        return changes[-1] if changes else 0


def hypotheses(wan: Wan, puzzle: Puzzle) -> Tensor:
    """Latents of the valid answers, then of the answers to the picture's other prompts: r c f h w."""
    return torch.cat([posterior.answers(wan, p) for p in (puzzle, *puzzle.variants())])


def leading(x0: Tensor, z: Tensor) -> int:
    """The hypothesis of z (r c f h w) that the estimate x0 (c f h w) is nearest to."""
    return int((z - x0).square().flatten(1).sum(1).argmin())


def courses(wan: Wan, batch: Sequence[Case], steps: Sequence[Step]) -> list[tuple[Course, Course]]:
    """Each case's course through a finished run of the batch, and the ideal observer's at the same latents."""
    verdicts = cases.scores(wan, steps[-1].next, batch)
    out = []
    for k, (case, verdict) in enumerate(zip(batch, verdicts, strict=True)):
        z, valid = hypotheses(wan, case.puzzle), len(case.puzzle.candidates)
        ideal = [
            posterior.mean(posterior.weights(step.x[k], step.sigma, z[:valid]), z[:valid])
            for step in steps
        ]
        final = verdict.answer if verdict.solved else None
        own = Course(tuple(leading(step.x0_cond[k], z) for step in steps), valid, final)
        out.append((own, Course(tuple(leading(x0, z) for x0 in ideal), valid, final)))
    return out


# -- perception first -------------------------------------------------------------------------------------------------


def masks(puzzle: Puzzle, answer: int, stride: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Where things stand still and where something moves, on the latent grid without its first frame: two bool (f h w)."""
    moving = torch.from_numpy(puzzle.answer_mask(answer))[1:]
    still = torch.from_numpy(puzzle.foreground()).expand(len(moving), -1, -1)
    pooled = [F.max_pool3d(m[None].float(), stride)[0] > 0 for m in (still, moving)]
    return pooled[0] & ~pooled[1], pooled[1]


def unsettled(steps: Sequence[Step], k: int, where: Tensor) -> np.ndarray:
    """Squared error of case k's estimate against its final latent at `where` (f h w, without frame 0), over that latent's power: steps.

    Raises ValueError where nothing is there.
    """
    if not where.any():
        raise ValueError("nothing is there whose error could be measured")
    final = steps[-1].next[k, :, 1:][:, where]
    return np.array(
        [
            ((s.x0[k, :, 1:][:, where] - final).square().sum() / final.square().sum()).item()
            for s in steps
        ]
    )


def first_below(curve: np.ndarray, level: float = 0.05) -> int:
    """The step from which on a curve stays below `level`; its length if it never does."""
    above = np.flatnonzero(curve >= level)
    return int(above[-1]) + 1 if len(above) else 0


def settling(
    steps: Sequence[Step], k: int, puzzle: Puzzle, answer: int, stride: tuple[int, int, int]
) -> list[float]:
    """The steps from which on what stands still and what moves are settled, in a run of case k that ends at `answer`.

    NaN where there is no such thing: in a maze all objects move or are reached.
    """
    return [
        float(first_below(unsettled(steps, k, where))) if where.any() else math.nan
        for where in (mask.to(steps[-1].next.device) for mask in masks(puzzle, answer, stride))
    ]


def watch(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Run a batch and keep its courses and what settles when; first axis cases.

    leaders, ideal   b N  leading hypotheses: the network's, the ideal observer's
    valid, final     b    how many hypotheses are valid; the finished video's answer, -1 where it is not right
    settled          b 2  `settling` at that answer; NaN where there is none
    """
    condition = cases.condition(wan, batch)
    steps = list(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    found = courses(wan, batch, steps)
    finals = [own.final for own, _ in found]
    settled = [
        [math.nan] * 2
        if final is None
        else settling(steps, k, case.puzzle, final, wan.vae.cfg.stride)
        for k, (case, final) in enumerate(zip(batch, finals, strict=True))
    ]
    return {
        "leaders": torch.tensor([own.leaders for own, _ in found]),
        "ideal": torch.tensor([ideal.leaders for _, ideal in found]),
        "valid": torch.tensor([own.valid for own, _ in found]),
        "final": torch.tensor([-1 if final is None else final for final in finals]),
        "settled": torch.tensor(settled, dtype=torch.float64),
    }


# -- working memory ---------------------------------------------------------------------------------------------------


@dataclass
class Hidden:
    """A hook that keeps the mean state over the tokens that hide the object: (step, layer) -> b d; layer -1 is the patch embedding."""

    batch: Sequence[Case]
    states: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def hooks(self, steps: Sequence[int]) -> Hooks:
        when = {"step": tuple(steps), "branch": "cond"}
        return Hooks().on("embed", self, **when).on("blocks.*", self, **when)

    def __call__(self, x: Tensor, site: Site) -> None:
        layer = EMBED if site.name == "embed" else int(site.name.split(".")[1])
        self.states[site.step, layer] = _behind(x.unflatten(1, site.grid), self.batch)


def _behind(grid: Tensor, batch: Sequence[Case]) -> Tensor:
    """Mean over the cells behind the wall, in the latent frame around the middle of the video: b f h w d -> b d.

    A cell is a token. Of 4 latent frames it is the third, video frames 5 to 8: the object is out of sight at 6, and at 8 its edge
    shows beside these cells.
    """
    middle = grid.shape[1] // 2
    cells = [tuple(zip(*case.puzzle.hidden_cells(), strict=True)) for case in batch]
    return torch.stack(
        [rows[middle, list(r), list(c)].mean(0) for rows, (r, c) in zip(grid, cells, strict=True)]
    )


def memories(wan: Wan, batch: Sequence[Case], at: Sequence[int]) -> dict[str, Tensor]:
    """What the tokens behind the wall hold, for a batch of `memory` puzzles.

    states   b steps layers d, steps in the order of `at`, layers from -1
    drawn    b d', the same tokens of the drawn video's latent
    labels   b 2, see `labels`
    """
    condition, hidden = cases.condition(wan, batch), Hidden(batch)
    run = wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hidden.hooks(at))
    for _ in islice(run, max(at) + 1):
        pass
    cfg = wan.experts["high"].cfg
    states = [
        torch.stack([hidden.states[s, k] for k in range(EMBED, cfg.num_layers)], dim=1) for s in at
    ]
    videos = torch.cat([posterior.answers(wan, case.puzzle) for case in batch])
    pf, ph, pw = cfg.patch_size
    grid = rearrange(
        videos, "b c (f pf) (h ph) (w pw) -> b f h w (c pf ph pw)", pf=pf, ph=ph, pw=pw
    )
    return {
        "states": torch.stack(states, dim=1),
        "drawn": _behind(grid, batch),
        "labels": labels(batch),
    }


def labels(batch: Sequence[Case]) -> Tensor:
    """Shape and colour of the hidden object as numbers: b 2."""
    movers = [case.puzzle.mover for case in batch]
    colours = tuple(COLOURS)
    return torch.tensor([(SHAPES.index(m.shape), colours.index(m.colour)) for m in movers])


def readout(train: Tensor, told: Tensor, test: Tensor, classes: int) -> tuple[Tensor, float]:
    """Classes of the rows `test` (n d): n, int64; and the share of training rows that are read rightly when they are left out.

    Ridge regression onto one-hot labels `told` of the rows `train` (m d), columns standardised. Of RIDGES the one is taken whose squared
    error on left-out rows is least; leaving out needs no fit of its own, since an error left out is the error left in / (1 - leverage).
    """
    centre, scale = train.double().mean(0), train.double().std(0).clamp_min(1e-6)
    a, b = ((x.double() - centre) / scale for x in (train, test))
    target = F.one_hot(told, classes).double()
    rate = target.mean(0)
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    found = []
    for ridge in RIDGES:
        keep = s.square() / (s.square() + ridge)
        error = (target - rate - (u * keep) @ (u.T @ target)) / (
            1 - 1 / len(a) - (u.square() * keep).sum(1)
        )[:, None]
        found.append((error.square().sum().item(), ridge, target - error))
    _, ridge, left_out = min(found, key=lambda one: one[0])
    w = vt.T @ ((s / (s.square() + ridge))[:, None] * (u.T @ target))
    return (b @ w + rate).argmax(1), (left_out.argmax(1) == told).double().mean().item()
