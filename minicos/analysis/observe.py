"""Run a model once and let several analyses watch: resumable, because every finished step is on disk.

An analysis is three things: hooks for what it wants to see inside the passes, `see` for what it keeps of a step, and `draw` for its
pictures. Whatever `see` returns is saved with the latent that leaves the step, so a run that was killed continues behind its
last finished step, bit for bit, and pictures can be drawn again without a network.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from minicos.analysis.compose import NO_CHANGES, Changes, remembered, state
from minicos.condition import Condition
from minicos.hooks import Hooks
from minicos.pipeline import Wan
from minicos.runs import Run, progress
from minicos.sample import Step
from minicos.schedule import Memory

Saved = Sequence[Mapping[str, Tensor]]  # for each step, what `see` returned


class Analysis(Protocol):
    name: str

    def hooks(self) -> Hooks:
        """What to watch inside the forward passes; NO_HOOKS for nothing."""
        ...

    def see(self, step: Step, run: Run) -> Mapping[str, Tensor]:
        """Called after each step; returns what to keep of it, and may already write pictures of this step."""
        ...

    def draw(self, saved: Saved, run: Run) -> list[str]:
        """Make the pictures from what was kept; returns their names, the one to open first in front."""
        ...


def observe(
    wan: Wan,
    condition: Condition,
    run: Run,
    analyses: Sequence[Analysis],
    noise: Tensor,
    changes: Changes = NO_CHANGES,
) -> Tensor:
    """Denoise under `changes` and the eyes of `analyses`, saving every step in `run`; returns the final latent (b c f h w).

    Steps that `run` already holds are not computed again. Raises MinicosError for changes that this run can never make.
    """
    hooks = sum((a.hooks() for a in analyses), changes.hooks)
    schedule = wan.schedule()
    done = 0
    while done < len(schedule) and run.has(_file(done)):
        done += 1
    x, memory = entering(run, done, noise)
    if not done:
        x = changes.enter(x, 0, condition.per_frame(schedule.sigmas[0]), None)
    before = run.load_tensors(_file(done - 1)) if done else {}
    steps = wan.sample(condition, noise=x, hooks=hooks, start=done, memory=memory)
    steps = changes.beside(wan, steps, condition, noise, x, done, before)
    for step, kept in progress(steps, len(schedule) - done, "denoise"):
        entered = changes.enter(
            step.next, step.index + 1, (step.sigma_map > 0) * step.sigma_next, step.x0
        )
        if entered is not step.next:  # as `sample` does: a history would undo the edit
            step.next, step.memory = entered, None
        tensors = {"next": step.next, **state(step.memory), **kept}
        for a in analyses:
            tensors |= {f"{a.name}.{k}": v for k, v in a.see(step, run).items()}
        run.save_tensors(_file(step.index), tensors)
        x = step.next
    return x


def entering(run: Run, index: int, noise: Tensor) -> tuple[Tensor, Memory | None]:
    """The latent that enters step `index` of a run saved by `observe` from `noise`, and the solver's memory: where to resume."""
    if not index:
        return noise, None
    tensors = run.load_tensors(_file(index - 1))
    return tensors["next"].to(noise.device), remembered(tensors, noise)


def recorded(run: Run, name: str, steps: int) -> list[dict[str, Tensor]]:
    """What the analysis `name` kept of each finished step."""
    return [kept(run, name, i) for i in range(steps) if run.has(_file(i))]


def kept(run: Run, name: str, index: int) -> dict[str, Tensor]:
    """What the analysis `name` kept of one finished step."""
    prefix = f"{name}."
    return {
        k.removeprefix(prefix): v
        for k, v in run.load_tensors(_file(index)).items()
        if k.startswith(prefix)
    }


def _file(index: int) -> str:
    return f"steps/{index:03d}.safetensors"
