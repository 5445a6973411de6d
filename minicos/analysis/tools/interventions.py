"""Interventions in one run: edits of the latent between steps, hooks inside the passes, and states
from other runs.

The rule: edits change the latent that enters a step, in the order of `+`; inside the pass
interventions act in the same order, each on what the one before it left; recorders look last, and
so see what the interventions did.

    what = Interventions(edits=(Noise("replace", (10,)),)) + Swap((6,),
    range(20)).intervention(give) record(wan, condition, run, [Steps(wan, (0, 10)), Energy((0,
    10))], noise, what)

A donor's run is never edited and starts from the noise that was given, so a swap takes what an
undisturbed run would have held. The first pass of an ensemble of two is one of this run itself, at
the same edited latent and under the interventions before it. The states of a donor on its own
trajectory are saved with each step: a killed run continues to the last bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from minicos.condition import Condition
from minicos.hooks import NO_HOOKS, Hooks
from minicos.sample import State, Step
from minicos.wan import Wan


class Edit(Protocol):
    """A change of the latent between two steps."""

    def __call__(self, x: Tensor, index: int, sigma: Tensor, x0: Tensor | None) -> Tensor:
        """The latent that enters step `index` instead of x, x itself where nothing is to change;
        see `noise.Noise`.
        """
        ...


@dataclass(frozen=True)
class Donor:
    """A second run, one step ahead, whose states are copied into this one."""

    # None: that of the run that it gives to, whose interventions so far it shares
    condition: Condition | None
    steps: Sequence[int]  # in which it gives
    hooks: Hooks  # keep what it gives
    own: bool = True  # on its own trajectory; False: at the latents of the run that it gives to


@dataclass(frozen=True)
class Interventions:
    """Interventions in one run; `a + b` makes those of a, then those of b."""

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
        """The latent that enters step `index` instead of x; x itself where nothing changes."""
        for edit in self.edits:
            x = edit(x, index, sigma, x0)
        return x

    def with_donors(
        self,
        wan: Wan,
        steps: Iterator[Step],
        condition: Condition,
        noise: Tensor,
        x: Tensor,
        start: int,
        before: Mapping[str, Tensor],
    ) -> Iterator[tuple[Step, dict[str, Tensor]]]:
        """The run's `steps` from `start` on, at latent x, each preceded by its donors' and with
        what the donors need to go on from it.

        condition  the run's own
        noise      where donors started
        before     what this gave with the step before `start`; {} at the beginning
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
    """What travelled beside a donor's latent, from what `Interventions.with_donors` gave."""
    prefix = f"{donor}."
    found = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    return State.from_tensors(found, device)
