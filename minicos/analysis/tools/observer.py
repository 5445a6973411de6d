"""The ideal observer as a model: every study without hooks inside a network can run on it.

It receives the puzzle and therefore knows all videos that answer it. Its velocity is the one whose
clean estimate is the exact posterior mean (`posterior`),

    v(x, sigma) = (x - E[z | x]) / sigma

and it is sampled like a network: same noise, same solver, same steps, same decoder. Any effect that
a study finds in it follows from Bayes' rule and the puzzles, and is not a finding about a network.

    observer = Observer.of(wan)
    condition = cases.condition(observer, batch)  # gives it the puzzles
    for step in observer.sample(condition, seed=0): ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from minicos.analysis.options import Ideal
from minicos.analysis.tools import posterior
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.puzzles import Puzzle
from minicos.sample import VIDEO, Latents, Moment
from minicos.video_model import VideoModel
from minicos.wan import Wan, as_wan

NETWORK, IDEAL = "network", "ideal observer"


def models(wan: VideoModel, options: Ideal) -> dict[str, VideoModel]:
    """The models of a study, by name: the network and, if requested, the ideal observer."""
    return {NETWORK: wan, **({IDEAL: Observer.of(wan)} if options.ideal else {})}


def folder(name: str, who: str) -> str:
    """The subfolder for a part of a study of one of these models."""
    return name if who == NETWORK else f"ideal/{name}"


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Known(Condition):
    """The condition of an observer: the answers of every sample's puzzle."""

    answers: Tensor  # b r c f h w  latents; zero beyond a sample's own count
    counts: Tensor  # b  number of answers of each sample, int64


@dataclass(frozen=True, repr=False)
class Observer(Wan):
    """A model whose estimate is the posterior mean given its latent, with the VAE and the preset of
    a `Wan`. None of that model's networks runs. The only hook point is the velocity.
    """

    foils: bool = False  # also consider plausible wrong answers possible

    @classmethod
    def of(cls, model: VideoModel, *, foils: bool = False) -> Self:
        """The observer that replaces a model's networks."""
        wan = as_wan(model, "an ideal observer")
        return cls(**{f.name: getattr(wan, f.name) for f in fields(Wan)}, foils=foils)

    def known(self, puzzles: Sequence[Puzzle], frames: int) -> Known:
        """The condition with the puzzles, all of one size, for videos of `frames` frames.

        Raises:
            MinicosError: a puzzle lists only some of its answers. An observer that does not know
                them all is not ideal.
        """
        for p in puzzles:
            if len(p.candidates) < p.ambiguity:
                raise MinicosError(
                    f"an ideal observer knows all answers, and this {p.kind} lists "
                    f"{len(p.candidates)} of {p.ambiguity}: leave out --ideal, or take another family"
                )
        each = [posterior.answers(self, p, frames, foils=self.foils) for p in puzzles]
        counts = torch.tensor([len(z) for z in each], device=self.device)
        answers = each[0].new_zeros(len(each), int(counts.max()), *each[0].shape[1:])
        for row, z in zip(answers, each, strict=True):
            row[: len(z)] = z
        b, _, c, f, h, w = answers.shape
        return Known(shape=(b, c, f, h, w), answers=answers, counts=counts)

    def believes(self, x: Tensor, sigma: float, condition: Known) -> Tensor:
        """The posterior over every sample's answers given latents x (b c f h w) at level sigma:
        b r, float64, 0 beyond a sample's own count.
        """
        z = condition.answers.double()
        gaps = (x.double()[:, None] - (1 - sigma) * z).square().flatten(2).sum(2)
        beyond = torch.arange(z.shape[1], device=z.device) >= condition.counts[:, None]
        return torch.softmax((-gaps / (2 * sigma**2)).masked_fill(beyond, -torch.inf), dim=1)

    # -- as a `Model` ------------------------------------------------------------------------------

    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: Any, hooks: Hooks
    ) -> Latents:
        x = latents[VIDEO]
        w = self.believes(x, moment.sigma, condition)
        mean = torch.einsum("br,brcfhw->bcfhw", w, condition.answers.double())
        return {VIDEO: hooks("velocity", ((x.double() - mean) / moment.sigma).float())}

    def branches(self, expert: str, condition: Any) -> tuple[str, ...]:
        return ("cond",)  # no guidance: its answers already follow the prompt

    def pictured(self, condition: Any) -> tuple[int, ...]:
        return (0,)  # all answers begin with the puzzle's picture

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        return passes["cond"]

    @property
    def points(self) -> Mapping[str, str]:
        return {"velocity": "b c f h w"}

    @property
    def depth(self) -> int:
        return 0

    @property
    def sublayers(self) -> tuple[str, ...]:
        return ()
