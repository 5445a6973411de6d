"""The denoising loop as a generator: `for step in sample(...)` yields every step, and the body of
the loop may change it.

Flow matching: x = (1 - sigma) x0 + sigma noise, velocity = noise - x0. A step asks the model for
the velocity at x and moves x to the next, smaller sigma. The model's current estimate of the final
video is x0 = x - sigma velocity: the clean estimate, which *Demystifying Video Reasoning*
(arXiv:2603.16870) decodes at every step to observe how a model reasons.

`Model` is the interface between this loop and what it samples from: Wan, another model family, or
an exact posterior without a network. `State` holds what a run carries from step to step in
addition to the video latent.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from minicos.checks import (
    check_edit,
    check_finite,
    check_gradients,
    check_noise,
    check_state,
    check_types,
)
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.indices import numbers, several
from minicos.precision import undisturbed
from minicos.schedule import SOLVERS, History, Schedule

VIDEO = "video"  # name of the video latent, b c f h w
Latents = Mapping[str, Tensor]  # by name: VIDEO, and any latent that is denoised along with it


@dataclass(frozen=True)
class Moment:
    """The step, timestep and expert of a pass."""

    step: int  # counted from 0
    sigma: float
    timestep: int | float  # the number given to the network, in 0..1000
    expert: str  # "high" | "low"


@dataclass(frozen=True)
class State:
    """What a run carries from step to step in addition to the video latent. It is saved and
    resumed together with the latent.
    """

    history: Mapping[str, History] = field(default_factory=dict)  # of the solver, for each latent
    beside: Latents = field(default_factory=dict)  # denoised along with the video (LTX-2's audio)

    def edited(self) -> "State":
        """The state after an edit of the video latent: without the solver's history of it, which
        would undo the edit.
        """
        return State({k: h for k, h in self.history.items() if k != VIDEO}, self.beside)

    def take(self, index: Tensor) -> "State":
        """The state of the samples in `index`, in that order; samples may repeat."""
        tensors = self.tensors().items()
        return State.from_tensors({k: x[index.to(x.device)] if x.ndim else x for k, x in tensors})

    def tensors(self) -> dict[str, Tensor]:
        """The state as tensors for a safetensors file; `from_tensors` is the inverse."""
        out = {f"beside.{name}": x.clone() for name, x in self.beside.items()}
        for name, history in self.history.items():
            out |= {f"history.{name}.{key}": x for key, x in history.tensors().items()}
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], device: torch.device | None = None
    ) -> "State":
        """The state from a file's tensors, on `device`. Names with other prefixes are ignored."""
        beside: dict[str, Tensor] = {}
        history: dict[str, dict[str, Tensor]] = {}
        for key, x in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "beside":
                beside[name] = x.to(device)
            elif kind == "history":
                name, _, part = name.partition(".")
                history.setdefault(name, {})[part] = x.to(device)
        return cls({k: History.from_tensors(parts) for k, parts in history.items()}, beside)


class Model(ABC):
    """The interface that the loop and the studies require of a model.

    Implement `schedule` and `velocity`; that is enough for a model without a network. The defaults
    of all other methods describe a single flow-matching network without guidance, without hook
    points, on the CPU. Override those that differ.

    The schedule is fixed before a run. At each step the loop calls `velocity` once for each of
    `branches`, `guide` combines the results, and the solver of the schedule moves every latent. A
    model may define its own subclass of `Condition`.

    A model that makes videos of prompts and pictures, as commands need it, is a
    `video_model.VideoModel`.
    """

    # -- called by the loop ------------------------------------------------------------------------

    @abstractmethod
    def schedule(self) -> Schedule:
        """The noise levels of a run, the timesteps given to the network, and the solver."""

    @abstractmethod
    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: Any, hooks: Hooks
    ) -> Latents:
        """One pass: the velocity (noise - x0) of every latent, float32, under the same names.

        Args:
            latents: VIDEO (b c f h w, float32, with the frames that the condition imposes) and any
                latent that is denoised along with it.
            branch: one of `branches`.
            hooks: to be called at the hook points. Step, sigma, expert and branch of the site are
                set; the model sets the grid.
        """

    def branches(self, expert: str, condition: Any) -> tuple[str, ...]:
        """The passes of a step, in order. "cond" is always one of them; guidance by a negative
        prompt adds "uncond".

        Raises:
            MinicosError: the condition lacks what a pass needs.
        """
        return ("cond",)

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        """Combine the velocities of a step's passes (branch -> velocities)."""
        return passes["cond"]

    def expert_name(self, timestep: float) -> str:
        """The expert for a timestep: "high" or "low"."""
        return "high"

    def beside(self, noise: Tensor, condition: Any) -> Latents:
        """The noise of the latents that are denoised along with the video, for a run that starts
        from `noise`; empty for most models.
        """
        return {}

    @property
    def points(self) -> Mapping[str, str]:
        """Every hook point and its shape in letters, e.g. {"blocks.0.ffn": "b l d"}.

        Studies expect "embed" (the stream that enters block 0), "blocks.i" (the stream that leaves
        block i), "blocks.i.s" for each sub-layer s, and q, k, heads, allowed and pattern inside
        each attention sub-layer (see `minicos.attend`).
        """
        return {}

    def check_differentiable(self) -> None:
        """Raise MinicosError if gradients do not flow through `velocity`. Override this in models
        through which they do.
        """
        raise MinicosError(f"gradients do not flow through a {type(self).__name__}")

    # -- called by studies -------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """The number of blocks of the network."""
        return 0

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sub-layers of a block, each of which is a hook point. Studies use the names
        "self_attn" (attention over all tokens), "cross_attn" (attention to the text) and "ffn".
        """
        return ()

    @property
    def streams(self) -> tuple[str, ...]:
        """Further streams through the blocks, with hook points "blocks.i.s" for each stream s:
        "text", "audio", or "joint" (text and video in one tensor).
        """
        return ()

    @property
    def stream_decides(self) -> bool:
        """Whether latent, timestep and the stream that leaves the last block determine the velocity
        of a pass. If so, swapping that stream trivially transfers the donor's velocity.
        """
        return True

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames, and pixels in height and width, per latent: (f, h, w)."""
        return 1, 1, 1

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The token grid (f, h, w) of latents with shape b c f h w."""
        f, h, w = shape[2:]
        return f, h, w

    def frames_behind(self, frame: int) -> range:
        """The frames of the decoded video that a latent frame covers."""
        t = self.stride[0]
        return range(0, 1) if frame == 0 else range(t * (frame - 1) + 1, t * frame + 1)

    def frames_behind_token(self, frame: int) -> range:
        """The frames of the decoded video that a frame of the token grid covers; it may hold
        several latent frames.
        """
        return self.frames_behind(frame)

    def pictured(self, condition: Any) -> tuple[int, ...]:
        """The latent frames that show a given picture: it is imposed there, or an input there at
        every step. Studies measure them separately from the frames that the model makes.
        """
        return () if condition.first is None else (0,)

    def words(self, condition: Any, branch: str) -> int | None:
        """The number of text rows that belong to the first sample's prompt; the rest is padding.
        None without text.
        """
        return None

    def noise(self, condition: Condition, seed: int | Sequence[int]) -> Tensor:
        """Gaussian noise in the shape of the latents, see `draw_noise`."""
        return draw_noise(condition.shape, seed)

    def sample(
        self,
        condition: Condition,
        *,
        seed: int | Sequence[int] = 0,
        noise: Tensor | None = None,
        hooks: Hooks = NO_HOOKS,
        start: int = 0,
        state: State | None = None,
        grad: bool = False,
    ) -> "Iterator[Step]":
        """The denoising loop, see `minicos.sample.sample`. `noise` overrides `seed`."""
        check_types(condition, hooks)
        noise = self.noise(condition, seed) if noise is None else noise
        return sample(self, noise, condition, hooks=hooks, start=start, state=state, grad=grad)


@dataclass(repr=False)
class Step:
    """One step of the loop. All fields may be read; assign `next` to intervene.

    An edit of `next` drops the solver's history of the video, which would undo the edit. This
    includes edits in place (`step.next += e`), through `.data` or through numpy. The rest of the
    state stays (`State.edited`); assign `state` to change that.
    """

    index: int  # counted from 0
    sigma: float
    sigma_next: float
    timestep: int | float  # the number given to the network, in 0..1000
    expert: str  # "high" | "low"
    sigma_map: Tensor  # sigma per frame, 0 where a frame is imposed  1 1 f 1 1
    x: Tensor  # latent entering the step                             b c f h w
    velocities: Mapping[str, Tensor]  # of each pass, by branch       b c f h w
    velocity: Tensor  # guided                                        b c f h w
    next: Tensor  # latent leaving the step                           b c f h w
    state: State  # state leaving the step

    def __repr__(self) -> str:
        x = self.x
        return (
            f"Step {self.index}: sigma {self.sigma:.4g} -> {self.sigma_next:.4g},"
            f" timestep {self.timestep:g}, expert {self.expert}\n"
            f"  x, velocity, x0, next: {tuple(x.shape)} {x.dtype} on {x.device}; passes "
            f"{' and '.join(self.velocities)}\n"
            f"  state: history of {', '.join(self.state.history) or 'nothing'}; other latents: "
            f"{', '.join(self.state.beside) or 'none'}"
        )

    @property
    def x0(self) -> Tensor:
        """The clean estimate x - sigma v with the guided velocity (paper, eq. 2): b c f h w."""
        return self.x - self.sigma_map * self.velocity

    @property
    def velocity_cond(self) -> Tensor:
        """The velocity of the prompted pass: b c f h w."""
        return self.velocities["cond"]

    @property
    def velocity_uncond(self) -> Tensor | None:
        """The velocity of the unprompted pass: b c f h w; None at guidance 1."""
        return self.velocities.get("uncond")

    @property
    def x0_cond(self) -> Tensor:
        """The clean estimate of the prompted pass: b c f h w."""
        return self.x0_of("cond")

    @property
    def x0_uncond(self) -> Tensor:
        """The clean estimate of the unprompted pass: b c f h w. Raises MinicosError at guidance 1,
        where this pass is skipped.
        """
        return self.x0_of("uncond")

    def x0_of(self, branch: str) -> Tensor:
        """The clean estimate of one pass. Raises MinicosError if the step has no such pass."""
        if branch not in self.velocities:
            there = " and ".join(self.velocities)
            raise MinicosError(
                f"step {self.index} has no {branch} pass, only {there}: the model makes none, or "
                f"guidance is 1 for the {self.expert} expert"
            )
        return self.x - self.sigma_map * self.velocities[branch]

    @property
    def noise(self) -> Tensor:
        """The estimate of the noise in x: x + (1 - sigma) v, b c f h w."""
        return self.x + (1 - self.sigma_map) * self.velocity


def sample(
    model: Model,
    noise: Tensor,
    condition: Condition,
    *,
    hooks: Hooks = NO_HOOKS,
    start: int = 0,
    state: State | None = None,
    grad: bool = False,
) -> Iterator[Step]:
    """Denoise from `noise` (b c f h w, float32) and yield one `Step` at a time.

    The body of the loop runs with the caller's gradient mode. Without `grad` the network runs
    without gradients, and tensors that require them are refused. The caller's default device and
    dtype, autocast and inference mode do not affect a run.

    Args:
        hooks: run inside every forward pass.
        start: resume at this step. `noise` is then the latent that enters it, and `state` the
            state of the step before. Step indices stay absolute, and the resumed run equals the
            uninterrupted one bit for bit.
        state: state of the step before `start`; None at the beginning.
        grad: keep the graph from the first step of this run to the last, through guidance and
            solver, so that gradients reach the noise, the condition and what hooks insert. To
            differentiate some steps only, sample without `grad` up to the first of them, start
            there, and leave the loop after the last. Frozen blocks without hooks are recomputed in
            the backward pass.

    Raises:
        MinicosError: at the call, before anything runs, if the noise has another shape or dtype, a
            hook matches no point or no moment of this run, `start` is outside the run, the
            condition lacks a negative prompt that is needed, or `state` lacks a latent that is
            denoised along with the video.
    """
    check_types(condition, hooks, state)
    check_noise(noise, condition.shape)
    if grad:
        model.check_differentiable()
    else:
        check_gradients(noise, *vars(condition).values())
    schedule = model.schedule()
    passes = [  # including those before `start`: a resumed run accepts the hooks of the whole run
        {"step": i, "expert": expert, "branch": branch}
        for i, expert in enumerate(map(model.expert_name, schedule.timesteps))
        for branch in model.branches(expert, condition)
    ]
    hooks.check(model.points, passes)
    if not isinstance(start, SupportsIndex) or not 0 <= start <= len(schedule):
        raise MinicosError(f"a run of {len(schedule)} steps cannot start at step {start}")
    beside = model.beside(noise, condition)
    if state is None:
        state = State() if start else State(beside=beside)
    if missing := ", ".join(beside.keys() - state.beside.keys()):
        raise MinicosError(
            f"this model denoises {missing} along with the video: start at step {start} with the "
            "state of the step before"
        )
    return _steps(model, noise, condition, schedule, hooks, start, state, grad)


def _steps(
    model: Model,
    x: Tensor,
    condition: Condition,
    schedule: Schedule,
    hooks: Hooks,
    start: int,
    state: State,
    grad: bool,
) -> Iterator[Step]:
    for i in range(start, len(schedule)):
        with undisturbed(grad):  # no `yield` inside
            step = _step(model, x, condition, schedule, hooks, i, state)
        proposed, given = step.next, step.next.clone()
        yield step
        check_edit(step.index, step.next, given, grad)
        check_state(step.state)
        # Values are compared as well, which detects edits in place and through `.data`.
        if step.next is not proposed or not torch.equal(proposed, given):
            step.state = step.state.edited()
        x, state = step.next, step.state


def _step(
    model: Model,
    x: Tensor,
    condition: Condition,
    schedule: Schedule,
    hooks: Hooks,
    i: int,
    state: State,
) -> Step:
    """Step i from the latent x. Raises MinicosError if a result is not finite."""
    sigma, timestep = schedule.sigmas[i], schedule.timesteps[i]
    moment = Moment(i, sigma, timestep, model.expert_name(timestep))
    x = condition.impose(x)
    latents = {VIDEO: x, **state.beside}
    where = i, moment.expert
    check_finite(
        latents, *where, "entered it so: look at the noise, the first frame or the last edit"
    )
    passes = {}
    for branch in model.branches(moment.expert, condition):
        here = hooks.at(step=i, sigma=sigma, expert=moment.expert, branch=branch)
        passes[branch] = model.velocity(latents, moment, branch, condition, here)
        check_finite(
            passes[branch],
            *where,
            f"left the network so (branch {branch}): too strong a LoRA, damaged weights or a hook"
            " are the likely cause",
        )
    velocity = model.guide(passes, latents, moment)
    moved, state = _advance(latents, velocity, i, schedule, state)
    proposed = condition.impose(moved)
    left = {VIDEO: proposed, **state.beside}
    check_finite(left, *where, "overflowed in guidance or solver: take less guidance")
    return Step(
        index=i,
        sigma=sigma,
        sigma_next=schedule.sigmas[i + 1],
        timestep=timestep,
        expert=moment.expert,
        sigma_map=condition.per_frame(sigma, x.device),
        x=x,
        velocities={name: answer[VIDEO] for name, answer in passes.items()},
        velocity=velocity[VIDEO],
        next=proposed,
        state=state,
    )


def _advance(
    latents: Latents, velocity: Latents, i: int, schedule: Schedule, state: State
) -> tuple[Tensor, State]:
    """All latents at the end of step i: the video, and the state that leaves the step."""
    solver = SOLVERS[schedule.solver]
    moved: dict[str, Tensor] = {}
    history: dict[str, History] = {}
    for name, x in latents.items():
        moved[name], left = solver(x, velocity[name], i, schedule, state.history.get(name))
        if left is not None:
            history[name] = left
    return moved.pop(VIDEO), State(history, moved)


def classifier_free(passes: Mapping[str, Latents], strength: float) -> Latents:
    """v_uncond + strength (v_cond - v_uncond), for every latent (arXiv:2207.12598, eq. 6). At
    strength 1 no uncond pass is needed.
    """
    cond = passes["cond"]
    if strength == 1:
        return cond
    uncond = passes["uncond"]
    return {name: uncond[name] + strength * (cond[name] - uncond[name]) for name in cond}


def draw_noise(
    shape: Sequence[int], seed: int | Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise of a shape (b c f h w), drawn on `device` from one seed for each sample. A
    number n as seed means n, n + 1, ...

    Raises:
        MinicosError: there are too few or too many seeds, or one is out of range.
    """
    count, *rest = shape
    seeds = numbers("a seed", seed)
    if not several(seed):
        seeds = tuple(range(seeds[0], seeds[0] + count))
    if len(seeds) != count:
        raise MinicosError(f"{len(seeds)} seeds for {count} samples: give one for each")
    if not all(0 <= s < 2**63 for s in seeds):
        raise MinicosError(f"seed {seed}: take a number from 0 to 2^63 - 1")
    drawn = [torch.Generator(device).manual_seed(s) for s in seeds]
    return torch.stack(
        [torch.randn(rest, generator=g, device=device, dtype=torch.float32) for g in drawn]
    )
