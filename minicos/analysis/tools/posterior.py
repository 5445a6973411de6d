"""What would an ideal observer believe? The exact posterior over a puzzle's answers, beside the network's clean estimate.

At noise level sigma the latent is x = (1 - sigma) z + sigma noise, where z is the latent of one of the valid answers z_r, all
equally likely (that is how the embedded model's training videos were drawn). So

    w_r = p(answer r | x)  is proportional to  exp(-|| x - (1 - sigma) z_r ||^2 / (2 sigma^2)),      E[z | x] = sum_r w_r z_r

and the clean estimate of a perfect network *is* that mean: several routes at high noise are Bayes' rule, not a trait of the network.
The question is where a network departs from it: in the weights that it gives to answers (`coefficients`), and in what it shows
that is no mixture of answers at all (`outside`). Only for puzzles, which list their answers; never evidence about large models.

Where a run is guided, the prompted branch is the one to compare: a guided estimate is no posterior mean, by construction. Trivial by
construction, too: at the last steps one answer has all the weight, whatever the network. `prior` is the control, an observer who
knows the answers and does not look at x; a network that is nearer to the ideal has read x.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicos.analysis.tools import cases
from minicos.analysis.tools.cases import Case
from minicos.media import to_float
from minicos.puzzles import Puzzle
from minicos.wan import Wan


def answers(wan: Wan, puzzle: Puzzle) -> Tensor:
    """The latent of every valid answer's video: r c f h w."""
    videos = torch.stack([to_float(puzzle.draw(i)) for i in range(len(puzzle.candidates))])
    return wan.vae.encode(videos.to(wan.device))


def weights(x: Tensor, sigma: float, z: Tensor) -> Tensor:
    """The posterior over the answers z (r c f h w) given a latent x (c f h w) at noise level sigma > 0: r, float64, sums to 1."""
    gaps = (x.double() - (1 - sigma) * z.double()).square().flatten(1).sum(1)
    return torch.softmax(-gaps / (2 * sigma**2), dim=0)


def mean(w: Tensor, z: Tensor) -> Tensor:
    """sum_r w_r z_r: what the ideal observer's clean estimate is  (c f h w)."""
    return torch.tensordot(w, z.double(), dims=1)


def coefficients(x0: Tensor, z: Tensor) -> Tensor:
    """How much of each answer a clean estimate x0 (c f h w) shows: the least-squares a with x0 ~ sum_r a_r z_r, sum a = 1  (r).

    Unique where no answer is a mixture of the others; else the one that is closest to the last answer alone.
    """
    z, x0 = z.double().cpu().flatten(1), x0.double().cpu().flatten()
    if len(z) == 1:
        return torch.ones(1, dtype=torch.float64)
    axes = (z[:-1] - z[-1]).T  # the constraint, solved for the last answer
    a = torch.linalg.lstsq(axes, (x0 - z[-1])[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([a, 1 - a.sum(0, keepdim=True)])


def effective(w: Tensor) -> float:
    """How many answers are alive: the exponential of the entropy of the weights w (clipped to [0, 1] and scaled to sum 1)."""
    p = w.clamp(0, 1)
    p = p / p.sum()
    return torch.special.entr(p).sum().exp().item()


@dataclass(frozen=True)
class Belief:
    """Network and ideal observer at one step of one run. Distances are squared, over the mean squared distance of two answers."""

    ideal: Tensor  # r  posterior weights
    shown: Tensor  # r  coefficients of the network's estimate
    departure: float  # of the estimate from E[z | x]: 0 ideal, 1 as far as another answer
    outside: float  # the part of it that is no mixture of answers (off their affine span)
    prior: float  # departure of the even mixture of all answers


def belief(x: Tensor, x0: Tensor, sigma: float, z: Tensor) -> Belief:
    """Compare the estimate x0 that a network makes from x (both c f h w) with the posterior mean. Raises ValueError for one answer."""
    if len(z) < 2:
        raise ValueError("a puzzle with one answer leaves nothing to be undecided about")
    x, x0, z = (tensor.double().cpu() for tensor in (x, x0, z))
    w, a = weights(x, sigma, z), coefficients(x0, z)
    ideal, unit = mean(w, z), torch.pdist(z.flatten(1)).square().mean()
    gaps = (x0 - ideal, x0 - mean(a, z), z.mean(0) - ideal)
    return Belief(w, a, *((gap.square().sum() / unit).item() for gap in gaps))


def beliefs(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Run a batch of puzzles and compare every step: each b N (N steps), float64, first axis cases.

    ideal, shown                 answers alive (`effective`) for the ideal observer, and in the network's estimate
    departure, outside, prior    of `Belief`
    final                        weight that the ideal observer gives to the answer of the finished video; NaN where it has none
    """
    condition = cases.condition(wan, batch)
    answered = [answers(wan, case.puzzle).cpu() for case in batch]
    seen = []
    for step in wan.sample(condition, noise=cases.noise(wan, condition, batch)):
        seen.append(
            [
                belief(x, x0, step.sigma, z)
                for x, x0, z in zip(step.x, step.x0_cond, answered, strict=True)
            ]
        )
    ends = [
        verdict.answer if verdict.solved else None
        for verdict in cases.scores(wan, step.next, batch)
    ]
    read = {
        "ideal": lambda found, end: effective(found.ideal),
        "shown": lambda found, end: effective(found.shown),
        "departure": lambda found, end: found.departure,
        "outside": lambda found, end: found.outside,
        "prior": lambda found, end: found.prior,
        "final": lambda found, end: math.nan if end is None else found.ideal[end].item(),
    }
    return {
        name: torch.tensor(
            [list(map(number, line, ends)) for line in seen], dtype=torch.float64
        ).T.contiguous()
        for name, number in read.items()
    }
