"""What would an ideal observer believe? The exact posterior over a puzzle's answers, beside the network's clean estimate.

At noise level sigma the latent is x = (1 - sigma) z + sigma noise, where z is the latent of one of the valid answers z_r, all
equally likely (that is how the embedded model's training videos were drawn). So

    w_r = p(answer r | x)  is proportional to  exp(-|| x - (1 - sigma) z_r ||^2 / (2 sigma^2)),      E[z | x] = sum_r w_r z_r

and the clean estimate of a perfect network *is* that mean: several routes at high noise are Bayes' rule, not a trait of the network.
The question is where a network departs from it: in the weights that it gives to answers (`coefficients`), and in what it shows
that is no mixture of answers at all (`outside`). Only for puzzles, which list their answers; never evidence about large models.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minicos.media import to_float
from minicos.pipeline import Wan
from minicos.puzzles import Puzzle


def answers(wan: Wan, puzzle: Puzzle) -> Tensor:
    """The latent of every valid answer's video: r c f h w."""
    videos = torch.stack([to_float(puzzle.draw(i)) for i in range(len(puzzle.candidates))])
    return wan.vae.encode(videos.to(wan.device))


def weights(x: Tensor, sigma: float, z: Tensor) -> Tensor:
    """The posterior over the answers z (r c f h w) given a latent x (c f h w) at noise level sigma: r, float64, sums to 1."""
    gaps = (x.double() - (1 - sigma) * z.double()).square().flatten(1).sum(1)
    return torch.softmax(-gaps / (2 * sigma**2), dim=0)


def mean(w: Tensor, z: Tensor) -> Tensor:
    """sum_r w_r z_r: what the ideal observer's clean estimate is  (c f h w)."""
    return torch.tensordot(w, z.double(), dims=1)


def coefficients(x0: Tensor, z: Tensor) -> Tensor:
    """How much of each answer a clean estimate x0 (c f h w) shows: the least-squares a with x0 ~ sum_r a_r z_r, sum a = 1  (r)."""
    if len(z) == 1:
        return torch.ones(1, dtype=torch.float64)
    base, rest = (
        z[-1].double().flatten(),
        (z[:-1] - z[-1]).double().flatten(1),
    )  # the constraint, solved for the last one
    a = torch.linalg.lstsq(rest.T, (x0.double().flatten() - base)[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([a, 1 - a.sum(0, keepdim=True)])


def effective(w: Tensor) -> float:
    """How many answers are alive: the exponential of the entropy of the weights w (clipped to [0, 1] and scaled to sum 1)."""
    p = w.clamp(0, 1)
    p = p / p.sum()
    return torch.special.entr(p).sum().exp().item()


@dataclass(frozen=True)
class Belief:
    """Network and ideal observer at one step of one run."""

    ideal: Tensor  # r  posterior weights
    shown: Tensor  # r  coefficients of the network's estimate
    departure: float  # || x0 - E[z | x] ||^2 / mean || z_r - z_s ||^2: 0 ideal, 1 as far as another answer
    outside: float  # the share of it that is no mixture of answers (off their affine span)


def belief(x: Tensor, x0: Tensor, sigma: float, z: Tensor) -> Belief:
    """Compare the estimate x0 that a network makes from x (both c f h w) with the posterior mean. Needs two answers or more."""
    if len(z) < 2:
        raise ValueError("a puzzle with one answer leaves nothing to be undecided about")
    w, a = weights(x, sigma, z), coefficients(x0, z)
    pairs = torch.pdist(z.double().flatten(1)).square().mean()
    gap = (x0.double() - mean(w, z)).square().sum()
    beside = (x0.double() - mean(a, z)).square().sum()
    return Belief(w, a, (gap / pairs).item(), (beside / pairs).item())
