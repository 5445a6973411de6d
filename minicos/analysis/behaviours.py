"""Three behaviours that the paper describes (Sec. 4), as numbers on the embedded model: memory, self-correction, perception first.

self-correction     the leading hypothesis of the clean estimate, step by step, among the valid answers and the answers to the same
                    picture's other prompts: wrong early and right late is a correction, a change among valid ones a change of mind
perception first    the estimate's error against its own final value, over what stands still and over what moves: which settles first?
                    (What stands still is in the first frame and needs only to be copied: the easier job, and no wonder.)
working memory      while an object is behind the wall, can shape and colour be read out of the hidden states at the tokens that hide it?
                    A ridge classifier on some puzzles, judged on others; shuffled labels say what chance gives, and the same probe on
                    the latents of the drawn video what the picture itself gives away
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minicos.analysis import cases, posterior
from minicos.analysis.cases import Case
from minicos.hooks import Hooks, Site
from minicos.pipeline import Wan
from minicos.puzzles import Puzzle
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.puzzles.memory import Memory
from minicos.sample import Step

# -- self-correction --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Course:
    """What one run believed, step by step."""

    leaders: tuple[int, ...]  # the leading hypothesis at every step
    valid: int  # hypotheses below this number are valid answers
    final: int | None  # the answer of the finished video

    @property
    def corrected(self) -> int | None:
        """The step from which on the leader is valid, where it was not at first and the video is right; None elsewhere."""
        wrong = [s for s, leader in enumerate(self.leaders) if leader >= self.valid]
        return wrong[-1] + 1 if wrong and self.final is not None and wrong[-1] + 1 < len(self.leaders) else None

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


def courses(wan: Wan, batch: Sequence[Case], steps: Sequence[Step]) -> list[Course]:
    """Each case's course through a finished run of the batch."""
    verdicts = cases.scores(wan, steps[-1].next, batch)
    out = []
    for k, (case, verdict) in enumerate(zip(batch, verdicts, strict=True)):
        z = hypotheses(wan, case.puzzle)
        leaders = tuple(leading(step.x0[k], z) for step in steps)
        out.append(Course(leaders, len(case.puzzle.candidates), verdict.answer if verdict.solved else None))
    return out


# -- perception first -------------------------------------------------------------------------------------------------


def masks(puzzle: Puzzle, answer: int, stride: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Where things stand still and where something moves, on the latent grid without its first frame: two bool (f h w)."""
    moving = torch.from_numpy(puzzle.answer_mask(answer))[1:]
    still = torch.from_numpy(puzzle.foreground()).expand(len(moving), -1, -1)
    pooled = [F.max_pool3d(m[None].float(), stride)[0] > 0 for m in (still, moving)]
    return pooled[0] & ~pooled[1], pooled[1]


def unsettled(steps: Sequence[Step], k: int, where: Tensor) -> np.ndarray:
    """Squared error of case k's estimate against its final latent at `where` (f h w, without frame 0), over that latent's power: steps."""
    final = steps[-1].next[k, :, 1:][:, where]
    return np.array([((s.x0[k, :, 1:][:, where] - final).square().sum() / final.square().sum()).item() for s in steps])


def first_below(curve: np.ndarray, level: float = 0.05) -> int:
    """The step from which on a curve stays below `level`; its length if it never does."""
    above = np.flatnonzero(curve >= level)
    return int(above[-1]) + 1 if len(above) else 0


# -- working memory ---------------------------------------------------------------------------------------------------


@dataclass
class Hidden:
    """A hook that keeps each block's mean state over the tokens that hide the object: layer -> b d."""

    batch: Sequence[Case]
    states: dict[int, Tensor] = field(default_factory=dict)

    def hooks(self, step: int) -> Hooks:
        return Hooks().on("blocks.*", self, step=step, branch="cond")

    def __call__(self, x: Tensor, site: Site) -> None:
        grid = x.unflatten(1, site.grid)  # b f h w d
        self.states[int(site.name.split(".")[1])] = torch.stack(
            [behind(row, case.puzzle) for row, case in zip(grid, self.batch, strict=True)]
        )


def behind(grid: Tensor, puzzle: Memory) -> Tensor:
    """Mean over the cells behind the wall, in the latent frames in which the object is out of sight (f h w d -> d)."""
    rows, columns = zip(*puzzle.hidden_cells(), strict=True)
    middle = grid.shape[0] // 2  # of 4 latent frames this is the third, video frames 5 to 8: the object is hidden at 6
    return grid[middle, list(rows), list(columns)].mean(0)


def labels(batch: Sequence[Case]) -> Tensor:
    """Shape and colour of the hidden object as numbers: b 2."""
    movers = [case.puzzle.mover for case in batch]
    colours = tuple(COLOURS)
    return torch.tensor([(SHAPES.index(m.shape), colours.index(m.colour)) for m in movers])


def readout(train: Tensor, told: Tensor, test: Tensor, classes: int, ridge: float = 1.0) -> Tensor:
    """Classes of the rows `test` (n d) by ridge regression onto one-hot labels `told` of the rows `train`, standardised: n, int64."""
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    a, b = ((x - mean) / std for x in (train.double(), test.double()))
    target = F.one_hot(told, classes).double()
    w = torch.linalg.solve(a.T @ a + ridge * torch.eye(a.shape[1], dtype=a.dtype), a.T @ (target - target.mean(0)))
    return (b @ w + target.mean(0)).argmax(1)
