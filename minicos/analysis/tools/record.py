"""Run a model once with several recorders. Resumable, because every finished step is on disk.

A recorder has three parts: hooks for what it observes inside the passes, `keep` for what it keeps
of a step, and `draw` for its pictures. The result of `keep` is saved with the latent that leaves
the step, so a killed run continues after its last finished step, bit for bit, and pictures can be
drawn again without a network.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.result import Number
from minicos.analysis.tools.interventions import NO_INTERVENTIONS, Interventions
from minicos.condition import Condition
from minicos.hooks import Hooks
from minicos.journal import brief
from minicos.media import load_video
from minicos.runs import Progress, Run
from minicos.sample import State, Step
from minicos.video_model import VideoModel

Saved = Sequence[Mapping[str, Tensor]]  # the results of `keep` for each step


class Recorder(Protocol):
    """Observes a run: hooks, what to keep of a step, pictures."""

    @property
    def name(self) -> str:
        """The name under which the recorder's data are saved."""
        ...

    def hooks(self) -> Hooks:
        """Hooks inside the forward passes; NO_HOOKS for none."""
        ...

    def keep(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """Called after each step; returns what to keep of it, and may already write pictures of the
        step.
        """
        ...

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """Draw the pictures from what was kept; returns their names, the main one first."""
        ...

    def numbers(self, saved: Saved) -> list[Number]:
        """What was found in the run, in a few numbers; none where there is nothing to count."""
        ...


def record(
    wan: VideoModel,
    condition: Condition,
    run: Run,
    recorders: Sequence[Recorder],
    noise: Tensor,
    interventions: Interventions = NO_INTERVENTIONS,
    bar: Progress | None = None,
) -> Tensor:
    """Denoise under `interventions`, saving in `run` every step and what `recorders` keep of it;
    returns the final latent (b c f h w).

    Steps that `run` already contains are not computed again. `bar` is that of a command with more
    to do, with one tick for each step.

    Raises:
        MinicosError: the interventions are impossible in this run.
    """
    hooks = sum((r.hooks() for r in recorders), interventions.hooks)
    schedule = wan.schedule()
    done = 0
    while done < len(schedule) and run.has(_file(done)):
        done += 1
    if run.journal is not None:
        for index in range(done):
            _log(run, index, schedule.sigmas, run.load_tensors(_file(index)))
    x, state = entering(run, done, noise)
    if not done:  # additional latents start as without interventions
        state = State(beside=wan.beside(noise, condition))
        x = interventions.enter(x, 0, condition.per_frame(schedule.sigmas[0]), None)
    before = run.load_tensors(_file(done - 1)) if done else {}
    steps = wan.sample(condition, noise=x, hooks=hooks, start=done, state=state)
    pairs = interventions.with_donors(wan, steps, condition, noise, x, done, before)
    with Progress(len(schedule), "denoise") if bar is None else nullcontext(bar) as shown:
        shown.skip(done)
        shown.begin()
        for step, given in pairs:
            entered = interventions.enter(
                step.next, step.index + 1, (step.sigma_map > 0) * step.sigma_next, step.x0
            )
            if entered is not step.next:  # as in `sample`: a history would undo the edit
                step.next, step.state = entered, step.state.edited()
            tensors = {"next": step.next, **step.state.tensors(), **given}
            for r in recorders:
                tensors |= {f"{r.name}.{k}": v for k, v in r.keep(step, run).items()}
            run.save_tensors(_file(step.index), tensors)
            _log(run, step.index, schedule.sigmas, tensors)
            x = step.next
            shown.tick()
    return x


def _log(run: Run, index: int, sigmas: Sequence[float], tensors: Mapping[str, Tensor]) -> None:
    """Write a step's numbers to the run's journal: its noise level, and what was kept of it."""
    if run.journal is not None:
        kept = {name: brief(values) for name, values in tensors.items()}
        run.log({"part": "steps", "step": index, "sigma": sigmas[index], **kept})


def entering(run: Run, index: int, noise: Tensor) -> tuple[Tensor, State | None]:
    """The latent that enters step `index` of a run saved by `record` from `noise`, and its state:
    where to resume.
    """
    if not index:
        return noise, None
    tensors = run.load_tensors(_file(index - 1))
    return tensors["next"].to(noise.device), State.from_tensors(tensors, noise.device)


def recorded(run: Run, name: str, steps: int) -> list[dict[str, Tensor]]:
    """What the recorder `name` kept of each step of a finished run.

    Raises:
        MinicosError: a step is missing or damaged, e.g. deleted meanwhile.
    """
    return [kept(run, name, i) for i in range(steps)]


def kept(run: Run, name: str, index: int) -> dict[str, Tensor]:
    """What the recorder `name` kept of one finished step."""
    prefix = f"{name}."
    return {
        k.removeprefix(prefix): v
        for k, v in run.load_tensors(_file(index)).items()
        if k.startswith(prefix)
    }


def seen(run: Run, step: int) -> np.ndarray | None:
    """A video of the run to draw maps over, uint8 (f h w 3): the clean estimate of the step, or
    the result; None if the run has neither.
    """
    for name in (f"x0/step_{step:02d}.mp4", "video.mp4"):
        if run.path(name).exists():
            return load_video(run.path(name))
    return None


def _file(index: int) -> str:
    return f"steps/{index:03d}.safetensors"


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of 32-bit numbers, copied to the host in one transfer, since waiting for each would
    stall the card.
    """
    if not tensors:
        return {}
    flat = torch.cat([x.reshape(-1).view(torch.int32) for x in tensors.values()]).cpu()
    parts = flat.split([x.numel() for x in tensors.values()])
    return {
        name: part.clone().view(x.dtype).view(x.shape)
        for (name, x), part in zip(tensors.items(), parts, strict=True)
    }
