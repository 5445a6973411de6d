"""The denoising loop, as a generator: `for step in sample(...)` hands out every step, and the
loop's body may change it.

Flow matching: x = (1 - sigma) x0 + sigma noise, velocity = noise - x0. A step asks the model for
the velocity at x and moves x to the next, smaller sigma. What the model believes the final video to
be is x0 = x - sigma velocity: the clean estimate, which *Demystifying Video Reasoning* (arXiv
2603.16870) decodes at every step to watch a model reason.

`Model` is the contract between this loop and whatever it samples from: Wan, another family, an
exact posterior without a network. `State` is what travels beside the latent from step to step.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from minicos.checks import check_edit, check_finite, check_gradients, check_types
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.precision import undisturbed
from minicos.schedule import SOLVERS, History, Schedule

VIDEO = "video"  # the latent that a run is about: b c f h w
Latents = Mapping[str, Tensor]  # by name: VIDEO, and whatever is denoised along with it


@dataclass(frozen=True)
class Moment:
    """Where in a run a pass is made."""

    step: int  # counted from 0
    sigma: float
    timestep: int | float  # the number given to the network, in 0..1000
    expert: str  # "high" | "low"


@dataclass(frozen=True)
class State:
    """What travels beside the video latent: it leaves a step with the latent, is saved with it and
    resumed with it.
    """

    history: Mapping[str, History] = field(default_factory=dict)  # of a multistep solver, by latent
    beside: Latents = field(default_factory=dict)  # denoised along with the video (LTX-2's audio)

    def edited(self) -> "State":
        """What is left after an edit of the video latent: the solver's history of it, which would
        undo the edit, is dropped.
        """
        return State({k: h for k, h in self.history.items() if k != VIDEO}, self.beside)

    def take(self, index: Tensor) -> "State":
        """Some samples of the batch, in the order of `index`, which may repeat them."""
        tensors = self.tensors().items()
        return State.from_tensors({k: x[index.to(x.device)] if x.ndim else x for k, x in tensors})

    def tensors(self) -> dict[str, Tensor]:
        """As tensors for a safetensors file; `from_tensors` is the inverse."""
        out = {f"beside.{name}": x.clone() for name, x in self.beside.items()}
        for name, history in self.history.items():
            out |= {f"history.{name}.{key}": x for key, x in history.tensors().items()}
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], device: torch.device | None = None
    ) -> "State":
        """The state saved in a file's tensors, on `device`. Names that begin otherwise are left
        alone.
        """
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
    """What the loop and the studies ask of a model: all that the author of a new one reads.

    Write `schedule` and `velocity`, for a model without a network that is enough. Override what
    else differs: the rest is that of one network of flow matching, without guidance, without hook
    points, on the CPU.

    `schedule` is fixed before a run. Then, at each step, `velocity` is asked for once for each of
    `branches`, and `guide` combines the answers; the solver of the schedule moves every latent. Its
    conditions are a `Condition` of its own kind.
    """

    # -- what the loop asks ------------------------------------------------------------------------

    @abstractmethod
    def schedule(self) -> Schedule:
        """The noise levels of a run, the timesteps given to the network, and the solver."""

    @abstractmethod
    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: Any, hooks: Hooks
    ) -> Latents:
        """One pass: the velocity noise - x0 of every latent, float32, under the same names.

        latents  VIDEO (b c f h w, float32; frames that the condition imposes are in place) and what
                 travels beside it
        branch   one of `branches`
        hooks    to be called on the hook points; step, sigma, expert and branch of the site are
                 filled in, its grid is not
        """

    def branches(self, expert: str, condition: Any) -> tuple[str, ...]:
        """The passes of a step, in their order; "cond" among them. Guidance by a negative prompt
        adds "uncond".

        Raises MinicosError where the condition lacks what one of them needs.
        """
        return ("cond",)

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        """The velocities that the step takes, from those of its passes (branch -> velocities)."""
        return passes["cond"]

    def expert_name(self, timestep: float) -> str:
        """Which network serves a timestep: "high" | "low"."""
        return "high"

    def beside(self, noise: Tensor, condition: Any) -> Latents:
        """The noise of the latents that travel beside the video, for a run that starts from
        `noise`; none for most models.
        """
        return {}

    @property
    def points(self) -> Mapping[str, str]:
        """Every hook point and its shape in letters, e.g. {"blocks.0.ffn": "b l d"}.

        Studies expect "embed" (the stream that enters block 0), "blocks.i" (the one that leaves
        block i), "blocks.i.s" for each sub-layer s, and q, k, heads, allowed and pattern inside
        those that attend (`minicos.attend`).
        """
        return {}

    def check_differentiable(self) -> None:
        """Raise MinicosError where gradients do not flow through `velocity`; to be overridden where
        they do.
        """
        raise MinicosError(f"gradients do not flow through a {type(self).__name__}")

    # -- what studies ask --------------------------------------------------------------------------

    @property
    def depth(self) -> int:
        """Of the network, in blocks."""
        return 0

    @property
    def sublayers(self) -> tuple[str, ...]:
        """Of a block, each a hook point of its own. Studies know them by these names: "self_attn"
        (over all tokens), "cross_attn" (to the text), "ffn".
        """
        return ()

    @property
    def streams(self) -> tuple[str, ...]:
        """What runs through the blocks beside the video, "blocks.i.s" for each stream s: "text",
        "audio"; "joint" is text and video in one tensor.
        """
        return ()

    @property
    def stream_decides(self) -> bool:
        """Whether latent, timestep and the stream that leaves the last block fix the velocity of a
        pass. Where they do, to swap that stream hands over the donor's velocity by construction.
        """
        return True

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames and pixels per latent, along f, h, w."""
        return 1, 1, 1

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The token grid f h w of latents of a shape (b c f h w)."""
        f, h, w = shape[2:]
        return f, h, w

    def frames_behind(self, frame: int) -> range:
        """The frames of the decoded video that a latent frame stands for."""
        t = self.stride[0]
        return range(0, 1) if frame == 0 else range(t * (frame - 1) + 1, t * frame + 1)

    def frames_behind_token(self, frame: int) -> range:
        """The same for a frame of the token grid, which may hold several latent frames."""
        return self.frames_behind(frame)

    def words(self, condition: Any, branch: str) -> int | None:
        """How many rows of the first sample's text are its prompt: what follows is padding. None
        where there is no text.
        """
        return None

    def noise(self, condition: Condition, seed: int | Sequence[int]) -> Tensor:
        """Gaussian noise of the latents' shape; see `draw_noise`."""
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
        """The denoising loop; see `minicos.sample.sample`. `noise` overrides `seed`."""
        check_types(condition, hooks)
        noise = self.noise(condition, seed) if noise is None else noise
        return sample(self, noise, condition, hooks=hooks, start=start, state=state, grad=grad)


@dataclass(repr=False)
class Step:
    """One turn of the loop. Read anything. Assign `next` to intervene: the loop continues from it.

    An edit, also one in place (`step.next += e`), through `.data` or numpy, drops the solver's
    history of the video, which would silently undo it; what travels beside it stays
    (`State.edited`). Assign `state` to change that.
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
    state: State  # what leaves the step with it

    def __repr__(self) -> str:
        x, beside = self.x, ", ".join(self.state.beside)
        passes = " and ".join(self.velocities)
        return (
            f"Step {self.index}: sigma {self.sigma:.4g} -> {self.sigma_next:.4g},"
            f" timestep {self.timestep:g}, expert {self.expert}\n"
            f"  x, velocity, x0, next: {tuple(x.shape)} {x.dtype} on {x.device}; passes {passes}\n"
            f"  state: history of {', '.join(self.state.history) or 'nothing'}, beside the video "
            f"{beside or 'nothing'}"
        )

    @property
    def x0(self) -> Tensor:
        """The clean estimate x - sigma v (paper, eq. 2), guided."""
        return self.x - self.sigma_map * self.velocity

    @property
    def velocity_cond(self) -> Tensor:
        """Of the prompted pass: b c f h w."""
        return self.velocities["cond"]

    @property
    def velocity_uncond(self) -> Tensor | None:
        """Of the unprompted pass: b c f h w. None where guidance is 1."""
        return self.velocities.get("uncond")

    @property
    def x0_cond(self) -> Tensor:
        """The clean estimate of the prompted branch alone."""
        return self.x0_of("cond")

    @property
    def x0_uncond(self) -> Tensor:
        """The clean estimate of the unprompted branch. Raises MinicosError at guidance 1, where
        there is none.
        """
        return self.x0_of("uncond")

    def x0_of(self, branch: str) -> Tensor:
        """The clean estimate of one pass. Raises MinicosError where the step does not have it."""
        if branch not in self.velocities:
            there = " and ".join(self.velocities)
            raise MinicosError(
                f"step {self.index} has no {branch} pass, only {there}: the model makes none, or "
                f"guidance is 1 for the {self.expert} expert"
            )
        return self.x - self.sigma_map * self.velocities[branch]

    @property
    def noise(self) -> Tensor:
        """The estimate of the noise in x: x + (1 - sigma) v."""
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
    """Denoise from `noise` (b c f h w, float32), one `Step` at a time.

    hooks      run inside every forward pass
    start      resume: `noise` is then the latent entering step `start`, `state` that of the step
               before. Indices stay absolute, and a resumed run continues the undisturbed one bit
               for bit
    grad       keep the graph from the first step of this run to the last, also through guidance and
               solver: gradients reach the noise, the condition's tensors and what hooks put in. For
               some steps alone, sample without up to the first, start there, and leave the loop
               after the last. Frozen blocks that no hook watches are computed again in the backward
               pass instead of kept
    Loop bodies run with gradients as the caller has them; without `grad` the network itself runs
    without, and tensors that expect gradients are refused. Default device and dtype, autocast and
    inference mode of the caller do not change a run. Raises MinicosError at the call, before
    anything runs: for noise of another shape or dtype, a hook on no point or at a moment that this
    run does not have, a start outside the run, a condition without a negative prompt where one is
    needed, and where something should travel beside the latent and `state` is missing.
    """
    check_types(condition, hooks)
    if not isinstance(noise, Tensor):
        raise MinicosError(f"noise is a tensor, not {type(noise).__name__}; see `Wan.noise`")
    if grad:
        model.check_differentiable()
    else:
        check_gradients(noise, *vars(condition).values())
    if tuple(noise.shape) != tuple(condition.shape) or noise.dtype != torch.float32:
        raise MinicosError(
            f"the noise is {noise.dtype} {tuple(noise.shape)}; this condition needs float32 "
            f"{condition.shape}"
        )
    schedule = model.schedule()
    passes = [  # also those before `start`: a resumed run has the hooks of the whole one
        {"step": i, "expert": expert, "branch": branch}
        for i, expert in enumerate(map(model.expert_name, schedule.timesteps))
        for branch in model.branches(expert, condition)
    ]
    hooks.check(model.points, passes)
    if not isinstance(start, SupportsIndex) or not 0 <= start <= len(schedule):
        raise MinicosError(f"a run of {len(schedule)} steps cannot start at step {start}")
    beside = model.beside(noise, condition)
    if state is None and start == 0:
        state = State(beside=beside)
    state = state or State()
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
        # Values are compared, too: they show an edit in place, also one through `.data` or numpy.
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
    """Step i from the latent x. Raises MinicosError where it leads to numbers that are not
    finite.
    """
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
    """Every latent at the end of step i: the video, and the state that leaves with it."""
    solver = SOLVERS[schedule.solver]
    moved: dict[str, Tensor] = {}
    history: dict[str, History] = {}
    for name, x in latents.items():
        moved[name], left = solver(x, velocity[name], i, schedule, state.history.get(name))
        if left is not None:
            history[name] = left
    return moved.pop(VIDEO), State(history, moved)


def classifier_free(passes: Mapping[str, Latents], strength: float) -> Latents:
    """v_uncond + strength (v_cond - v_uncond), of every latent (arXiv:2207.12598, eq. 6); strength
    1 needs no uncond pass.
    """
    cond = passes["cond"]
    if strength == 1:
        return cond
    uncond = passes["uncond"]
    return {name: uncond[name] + strength * (cond[name] - uncond[name]) for name in cond}


def draw_noise(
    shape: Sequence[int], seed: int | Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise of a shape (b c f h w), one seed for each sample (a number n means n, n + 1,
    ...), drawn on `device`.

    Raises MinicosError for seeds that are too few, too many or out of range.
    """
    count, *rest = shape
    try:
        seeds = (
            [index(s) for s in seed]
            if isinstance(seed, Iterable)
            else [*range(index(seed), index(seed) + count)]
        )
    except TypeError:
        raise MinicosError(f"a seed is a whole number, or a list of them, not {seed!r}") from None
    if len(seeds) != count:
        raise MinicosError(f"{len(seeds)} seeds for {count} samples: give one for each")
    if not all(0 <= s < 2**63 for s in seeds):
        raise MinicosError(f"seed {seed}: take a number from 0 to 2^63 - 1")
    drawn = [torch.Generator(device).manual_seed(s) for s in seeds]
    return torch.stack(
        [torch.randn(rest, generator=g, device=device, dtype=torch.float32) for g in drawn]
    )
