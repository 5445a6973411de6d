"""The ideal observer: the exact posterior over a puzzle's valid answers, given a noisy latent.

At noise level sigma the latent is x = (1 - sigma) z + sigma noise, where z is the latent of one of
the valid answers z_r, all equally likely (as in the training videos of the embedded model). So

    w_r = p(answer r | x)  is proportional to  exp(-|| x - (1 - sigma) z_r ||^2 / (2 sigma^2)),
    E[z | x] = sum_r w_r z_r

and the clean estimate of a perfect network *is* that mean. This works only for puzzles, which list
their answers. `observer.Observer` is a model with this estimate, from which one can sample.
"""

import torch
from torch import Tensor

from minicos.media import to_float
from minicos.puzzles import Puzzle, draw, timeline
from minicos.video_model import VideoModel
from minicos.wan import as_wan


def answers(
    wan: VideoModel, puzzle: Puzzle, frames: int | None = None, *, foils: bool = False
) -> Tensor:
    """The latent of every valid answer's video, followed with `foils` by those of the plausible
    wrong ones: r c f h w. `frames` is 4n + 1, by default the puzzle's own.

    If answers look the same during a whole latent frame (`Puzzle.hidden`), their mean is used
    there, as in training: the encoder may still distinguish them through its memory.
    """
    count = len(puzzle.candidates) + (len(puzzle.foils) if foils else 0)
    times = timeline(frames or puzzle.frames)
    videos = torch.stack([to_float(draw.to_uint8(puzzle.render(i, times))) for i in range(count)])
    latents = as_wan(wan, "weighing a puzzle's answers").vae.encode(videos.to(wan.device))
    if puzzle.hidden and times.size == puzzle.frames:
        same, valid = list(puzzle.hidden), latents[: len(puzzle.candidates)]
        latents[:, :, same] = valid[:, :, same].mean(0, keepdim=True)
    return latents


def weights(x: Tensor, sigma: float, z: Tensor) -> Tensor:
    """The posterior over the answers z (r c f h w) given a latent x (c f h w) at noise level
    sigma > 0: r, float64, sums to 1.
    """
    gaps = (x.double() - (1 - sigma) * z.double()).square().flatten(1).sum(1)
    return torch.softmax(-gaps / (2 * sigma**2), dim=0)


def mean(w: Tensor, z: Tensor) -> Tensor:
    """sum_r w_r z_r, the ideal observer's clean estimate: c f h w."""
    return torch.tensordot(w, z.double(), dims=1)


def coefficients(x0: Tensor, z: Tensor) -> Tensor:
    """The weight of each answer in a clean estimate x0 (c f h w): the least-squares a (r) with x0 ~
    sum_r a_r z_r and sum a = 1.

    Unique unless one answer is a mixture of the others; then the solution nearest to the last
    answer alone.
    """
    z, x0 = z.double().cpu().flatten(1), x0.double().cpu().flatten()
    if len(z) == 1:
        return torch.ones(1, dtype=torch.float64)
    axes = (z[:-1] - z[-1]).T  # the constraint, solved for the last answer
    a = torch.linalg.lstsq(axes, (x0 - z[-1])[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([a, 1 - a.sum(0, keepdim=True)])


def apart(z: Tensor, least: float = 0.05) -> bool:
    """Whether `coefficients` of these answers (r c f h w, two or more) can be trusted: none is
    nearly a mixture of the others, such as cells that are filled in several combinations. `least`
    is the smallest singular value of their differences, relative to the largest.
    """
    flat = z.double().cpu().flatten(1)
    found = torch.linalg.svdvals(flat[:-1] - flat[-1])
    return bool(found[-1] > least * found[0])


def effective(w: Tensor) -> float:
    """The number of answers alive: the exponential of the entropy of the weights w (clipped to
    [0, 1] and normalised).
    """
    p = w.clamp(0, 1)
    p = p / p.sum()
    return torch.special.entr(p).sum().exp().item()
