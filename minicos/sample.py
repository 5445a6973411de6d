"""The denoising loop, as a generator: `for step in sample(...)` hands out every step, and the loop's body may change it.

Flow matching: x = (1 - sigma) x0 + sigma noise, velocity = noise - x0. A step asks the network for the velocity at x and
moves x to the next, smaller sigma. What the network believes the final video to be is x0 = x - sigma velocity: the clean
estimate, which *Demystifying Video Reasoning* (arXiv 2603.16870) decodes at every step to watch a model reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from minicos.condition import Condition
from minicos.dit import DiT
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.ops import without_tf32
from minicos.schedule import SOLVERS, Schedule


class Model(Protocol):
    """What the loop needs of a model."""

    @property
    def points(self) -> Mapping[str, str]: ...

    def serves(self, timestep: float) -> str:
        """The name of the expert for a timestep: "high" | "low"."""
        ...

    def expert(self, timestep: float) -> tuple[str, DiT]:
        """The same with its network, ready to run; another expert may have to leave the device for it."""
        ...


@dataclass
class Step:
    """One turn of the loop. Read anything. Assign `next` to intervene: the loop continues from it.

    An edit, also one in place (`step.next += e`), drops the solver's history, which would silently undo it.
    """

    index: int  # counted from 0
    sigma: float
    sigma_next: float
    timestep: int | float  # what the network is told, in 0..1000
    expert: str  # "high" | "low"
    sigma_map: Tensor  # sigma per frame, 0 where a frame is imposed  1 1 f 1 1
    x: Tensor  # latent entering the step                             b c f h w
    velocity_cond: Tensor  #                                          b c f h w
    velocity_uncond: Tensor | None  # None where guidance is 1
    velocity: Tensor  # guided
    next: Tensor  # latent leaving the step                           b c f h w
    memory: object  # the solver's history after this step, saved with it

    @property
    def x0(self) -> Tensor:
        """The clean estimate x - sigma v (paper, eq. 2), guided."""
        return self.x - self.sigma_map * self.velocity

    @property
    def x0_cond(self) -> Tensor:
        """The clean estimate of the prompted branch alone."""
        return self.x - self.sigma_map * self.velocity_cond

    @property
    def x0_uncond(self) -> Tensor:
        """The clean estimate of the unprompted branch; there is one only where guidance is not 1."""
        return self.x - self.sigma_map * self.velocity_uncond

    @property
    def noise(self) -> Tensor:
        """The estimate of the noise in x: x + (1 - sigma) v."""
        return self.x + (1 - self.sigma_map) * self.velocity


def sample(
    model: Model,
    noise: Tensor,
    condition: Condition,
    *,
    schedule: Schedule,
    guidance: Mapping[str, float],
    hooks: Hooks = NO_HOOKS,
    start: int = 0,
    memory: object = None,
) -> Iterator[Step]:
    """Denoise from `noise` (b c f h w, float32), one `Step` at a time.

    guidance   {"high": g, "low": g}; v = v_uncond + g (v_cond - v_uncond), and 1 skips the uncond pass
    hooks      run inside every forward pass; one that names no point, or a moment that this run does not have, raises
               MinicosError here, before anything runs
    start      resume: `noise` is then the latent entering step `start`, `memory` that of the step before. Indices stay absolute,
               and a resumed run continues the undisturbed one bit for bit
    Loop bodies run with gradients as the caller has them; the network itself runs without.
    """
    if tuple(noise.shape) != tuple(condition.shape) or noise.dtype != torch.float32:
        raise MinicosError(
            f"the noise is {noise.dtype} {tuple(noise.shape)}; this condition needs float32 {condition.shape}"
        )
    experts = [model.serves(timestep) for timestep in schedule.timesteps]
    if not set(experts) <= set(guidance):
        needs = ", ".join(sorted(set(experts)))
        raise MinicosError(f"this run needs guidance for {needs}; it was given {dict(guidance)}")
    passes = [
        {"step": i, "expert": name, "branch": branch}
        for i, name in enumerate(
            experts
        )  # also those before `start`: a resumed run has the hooks of the whole one
        for branch in (("cond",) if guidance[name] == 1 else ("cond", "uncond"))
    ]
    hooks.check(model.points, passes)
    if not 0 <= start <= len(schedule):
        raise MinicosError(f"a run of {len(schedule)} steps cannot start at step {start}")
    if any(g != 1 for g in guidance.values()):
        condition.branch("uncond")  # raises where there is no negative prompt
    return _steps(model, noise, condition, schedule, guidance, hooks, start, memory)


def _steps(model, x, condition, schedule, guidance, hooks, start, memory) -> Iterator[Step]:
    solver = SOLVERS[schedule.solver]
    for i in range(start, len(schedule)):
        sigma, timestep = schedule.sigmas[i], schedule.timesteps[i]
        x = condition.impose(x)
        name, dit = model.expert(timestep)
        here = hooks.at(step=i, sigma=sigma, expert=name)
        cond = _velocity(dit, x, timestep, condition, here, "cond")
        g = guidance[name]
        uncond = None if g == 1 else _velocity(dit, x, timestep, condition, here, "uncond")
        velocity = cond if uncond is None else uncond + g * (cond - uncond)
        proposed, memory = solver(x, velocity, i, schedule, memory)
        proposed = condition.impose(proposed)
        step = Step(
            index=i,
            sigma=sigma,
            sigma_next=schedule.sigmas[i + 1],
            timestep=timestep,
            expert=name,
            sigma_map=condition.per_frame(sigma, x.device),
            x=x,
            velocity_cond=cond,
            velocity_uncond=uncond,
            velocity=velocity,
            next=proposed,
            memory=memory,
        )
        version = proposed._version  # torch counts the writes into a tensor
        yield step
        if step.next is not proposed or proposed._version != version:
            step.memory = memory = None
        x = step.next


@torch.no_grad()
@without_tf32()
def _velocity(
    dit: DiT, x: Tensor, timestep: float, condition: Condition, hooks: Hooks, branch: str
) -> Tensor:
    t = condition.per_frame(timestep)[0, :, :, 0, 0].expand(
        len(x), -1
    )  # b g, on the host, where the sinusoid is built
    return dit(
        x, t, condition.branch(branch), condition.y, condition.clip, hooks=hooks.at(branch=branch)
    )
