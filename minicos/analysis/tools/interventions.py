"""Interventions in one run: edits of the latent between steps, hooks inside the passes, and states
from other runs.

The rule: edits change the latent that enters a step, in the order of `+`; inside the pass,
interventions act in the same order, each on the result of the one before it; recorders come last,
so they observe the effect of the interventions.

    what = Interventions(edits=(Noise("replace", (10,)),))
    what += Swap((6,), range(20)).intervention(give)
    record(wan, condition, run, [Steps(wan, (0, 10)), Energy((0, 10))], noise, what)

A donor's run is never edited and starts from the given noise, so a swap takes the states of an
undisturbed run. For ensembles with two passes, the first pass belongs to this run itself, at the
same edited latent and under the earlier interventions. The states of a donor on its own trajectory
are saved with each step, so a killed run resumes exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from minicos.condition import Condition
from minicos.hooks import NO_HOOKS, Hooks
from minicos.sample import State, Step
from minicos.video_model import VideoModel


class Edit(Protocol):
    """A change of the latent between two steps."""

    def __call__(self, x: Tensor, index: int, sigma: Tensor, x0: Tensor | None) -> Tensor:
        """The latent that enters step `index` instead of x; x itself if nothing changes. See
        `noise.Noise`.
        """
        ...


@dataclass(frozen=True)
class Donor:
    """A second run, one step ahead, whose states are copied into this one."""

    # None: that of the receiving run, whose earlier interventions it shares
    condition: Condition | None
    steps: Sequence[int]  # in which states are copied
    hooks: Hooks  # store the states to copy
    own: bool = True  # on its own trajectory; False: at the latents of the receiving run


@dataclass(frozen=True)
class Interventions:
    """Interventions in one run; `a + b` applies those of a, then those of b."""

    hooks: Hooks = NO_HOOKS
    edits: tuple[Edit, ...] = ()
    donors: tuple[Donor, ...] = ()

    def __add__(self, other: "Interventions") -> "Interventions":
        donors = (
            replace(d, hooks=self.hooks + d.hooks) if d.condition is None else d
            for d in other.donors
        )
        return Interventions(
            self.hooks + other.hooks, self.edits + other.edits, (*self.donors, *donors)
        )

    def enter(self, x: Tensor, index: int, sigma: Tensor, x0: Tensor | None) -> Tensor:
        """The latent that enters step `index` instead of x; x itself if nothing changes."""
        for edit in self.edits:
            x = edit(x, index, sigma, x0)
        return x

    def with_donors(
        self,
        wan: VideoModel,
        steps: Iterator[Step],
        condition: Condition,
        noise: Tensor,
        x: Tensor,
        start: int,
        before: Mapping[str, Tensor],
    ) -> Iterator[tuple[Step, dict[str, Tensor]]]:
        """The run's `steps` from `start` on, at latent x. Each step is preceded by those of its
        donors, and comes with the tensors that the donors need to continue.

        Args:
            condition: the run's own.
            noise: initial noise of the donors.
            before: the tensors that came with the step before `start`; {} at the beginning.
        """
        own = {name: d for name, d in self._named() if d.own and start <= max(d.steps)}
        runs = {
            name: wan.sample(
                d.condition or condition,
                noise=before[f"{name}.next"].to(noise) if start else noise,
                hooks=d.hooks,
                start=start,
                state=_saved(before, name, noise.device) if start else None,
            )
            for name, d in own.items()
        }
        beside = State(beside=wan.beside(noise, condition))
        state = State.from_tensors(before, noise.device) if start else beside
        for index in range(start, len(wan.schedule())):
            kept: dict[str, Tensor] = {}
            for name, d in self._named():
                if d.own and index <= max(d.steps):
                    given = next(runs[name])
                    kept[f"{name}.next"] = given.next
                    kept |= {f"{name}.{k}": v for k, v in given.state.tensors().items()}
                elif not d.own and index in d.steps:
                    own_or_given = d.condition or condition
                    next(wan.sample(own_or_given, noise=x, hooks=d.hooks, start=index, state=state))
            step = next(steps)
            yield step, kept
            x, state = step.next, step.state

    def _named(self) -> Iterator[tuple[str, Donor]]:
        return ((f"donor{i}", donor) for i, donor in enumerate(self.donors))


NO_INTERVENTIONS = Interventions()


def _saved(tensors: Mapping[str, Tensor], donor: str, device: torch.device) -> State:
    """The state of a donor, from the tensors of `Interventions.with_donors`."""
    prefix = f"{donor}."
    found = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    return State.from_tensors(found, device)
