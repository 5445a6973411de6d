"""The conditions of the paper by name: what is done to a run, or instead of one.

`FORMS` explains each name, `groups` lists the conditions of each experiment of the paper. Where the
paper does not specify a choice (which state, whose prompt, where noise goes), it is an option here,
with a default that is ours. Such a condition is called an arm in the code, since
`minicos.condition.Condition` is what a video is conditioned on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minicos.analysis.ensemble import share
from minicos.analysis.ensemble.share import Ensemble, window
from minicos.analysis.noise.edit import Noise
from minicos.analysis.outline import Outline
from minicos.analysis.swap.states import Swap
from minicos.analysis.tools.interventions import NO_INTERVENTIONS, Interventions
from minicos.config import LIKE, Preset
from minicos.errors import MinicosError
from minicos.wan import Wan

APART = 1_000_000  # offset between the noise seeds of an ensemble's runs, as in `ensemble.study`
See = Callable[[int, Tensor], None]  # the index of a step and its clean estimates (b c f h w)
WINDOWS = ("0-9", "10-19", "20-29", "30-39", "0-39")
FRAMES = (1, 5, 9, 17, 33, 65, 97)
BASELINES = ("static", "truth")

FORMS = {  # an example of each form -> what it means
    "plain": "the model as it is",
    "ensemble": "states of blocks 20-29 (of 40, scaled to the model) shared by 3 seeds at step 0",
    "ensemble:window=0-9,seeds=5,at=0-4": "the same with other blocks, seeds and steps",
    "ensemble:mode=update": "shared in another way: override (default), input_override, lockstep",
    "noise:step=10": "Gaussian noise instead of the latent that enters step 10; or 5-9",
    "noise:frame=2": "the same in latent frame 2 at every step; or 1-3",
    "noise:step=10,frame=2,mode=renoise": "both at once; mode is replace (default), renoise, erase",
    "swap:layer=20": "the stream after block 20 (of 40, scaled) at step 0 comes from a run of the "
    "same picture and noise under another sample's prompt",
    "swap:layer=20,during=0-4": "the same at steps 0 to 4",
    "frames=33": "another number of frames, 4n + 1",
    "steps=4": "another number of steps",
    "4step": "weights distilled to four steps: --weights 4step high=FILE low=FILE (tiny: its own)",
    "vbvr-lora": "VBVR as LoRA files: --weights vbvr-lora high=FILE low=FILE",
    "static": "no model: the first frame held",
    "truth": "no model: the true video, sent through this reader and writer",
}


def _span(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or len(text) > 11:
        raise ValueError
    begin, end = int(first), int(last or first)
    if begin > end:
        raise ValueError
    return begin, end


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 5 or int(text) < 1:
        raise ValueError
    return int(text)


def _one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return parse


OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {  # kind -> option -> how its value is read
    "plain": {},
    "ensemble": {
        "window": _span,
        "seeds": _count,
        "at": _span,
        "mode": _one_of("override", "input_override", "lockstep", "update"),
    },
    "noise": {"step": _span, "frame": _span, "mode": _one_of("replace", "renoise", "erase")},
    "swap": {"layer": _span, "during": _span},
    "frames": {"frames": _count},
    "steps": {"steps": _count},
    "4step": {},
    "vbvr-lora": {},
    "static": {},
    "truth": {},
}


@dataclass(frozen=True)
class Arm:
    """One condition of an experiment."""

    name: str  # as given
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def folder(self) -> str:
        """The name as a folder name that is valid on every system."""
        return self.name.replace(":", "_").replace(",", "_")

    @property
    def baseline(self) -> bool:
        """Whether it is made without a model."""
        return self.kind in BASELINES

    @property
    def weights(self) -> str:
        """The weights that it runs on: "" for those of --model, else the name for --weights."""
        return self.kind if self.kind in ("4step", "vbvr-lora") else ""

    @property
    def frames(self) -> int | None:
        """The requested number of video frames; None: the sample's."""
        return self.options.get("frames")

    def steps(self, preset: Preset) -> int:
        """The number of steps of its runs under a preset."""
        return self.options.get("steps", preset.steps)

    @property
    def seeds(self) -> int:
        """The number of runs for each sample at a time."""
        return self.options.get("seeds", 3) if self.kind == "ensemble" else 1

    def passes(self, steps: int, every_step: bool) -> int:
        """Passes of each guidance branch for one sample in a run of `steps` steps."""
        steps = self.options.get("steps", steps)
        if self.kind == "ensemble":
            first, last = self.options.get("at", (0, 0))
            again = (
                last - first + 1 if self.options.get("mode", "override").endswith("override") else 0
            )
            shared = self.seeds * (steps if every_step else last + 1)
            carried = 0 if every_step else steps - last - 1
            # the second pass of the last shared step belongs to the carrier alone, if only its
            # trajectory continues
            return (
                shared
                + carried
                + again * self.seeds
                - (self.seeds - 1) * (again > 0 and not every_step)
            )
        if self.kind == "swap":
            return steps + self.options.get("during", (0, 0))[1] + 1
        return steps


def arm(text: str) -> Arm:
    """The condition with this name. Raises MinicosError with the known names."""
    kind, _, rest = text.partition(":")
    if kind.partition("=")[0] in ("frames", "steps"):
        kind, rest = kind.partition("=")[0], text
    if kind not in OPTIONS:
        raise MinicosError(
            f"no condition {text!r}: take one of {', '.join(OPTIONS)}, or an experiment: "
            f"{', '.join(groups(1))}. --list-conditions says what they are."
        )
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            options[key] = OPTIONS[kind][key](value)
        except (KeyError, ValueError):
            known = ", ".join(f"{name}=..." for name in OPTIONS[kind]) or "no options"
            raise MinicosError(
                f"condition {text!r}: {part!r} is not an option of {kind}, which has {known}."
            ) from None
    needed = {"noise": ("step", "frame"), "swap": ("layer",)}.get(kind, ())
    if needed and not any(name in options for name in needed):
        raise MinicosError(
            f"condition {text!r} needs {' or '.join(needed)}, e.g. {kind}:{needed[0]}=10."
        )
    if kind == "frames" and options["frames"] % 4 != 1:
        raise MinicosError(f"condition {text!r}: a model makes 4n + 1 frames, such as 33.")
    if kind == "ensemble" and options.get("seeds", 3) < 2:
        raise MinicosError(
            f"condition {text!r}: an ensemble shares states between two seeds or more."
        )
    return Arm(text, kind, options)


def expand(names: Sequence[str], steps: int) -> list[Arm]:
    """The conditions of these names, without repetition; a name of `groups` means several."""
    known = groups(steps)
    flat = [one for name in names for one in known.get(name, (name,))]
    return [arm(name) for name in dict.fromkeys(flat)]


def groups(steps: int) -> dict[str, tuple[str, ...]]:
    """The paper's experiments on the benchmark, for a run of `steps` steps: name -> conditions."""
    noised = sorted({round(k * steps / 10) for k in range(10)})
    return {
        "table-1": ("plain", "ensemble"),
        "appendix-a": ("plain", *(f"ensemble:window={w}" for w in WINDOWS)),
        "figure-3": (
            "plain",
            *(f"noise:step={k}" for k in noised),
            *(f"noise:frame={k}" for k in (1, 2, 3)),
        ),
        "appendix-b": tuple(f"frames={n}" for n in FRAMES),
        "appendix-c": ("plain", "4step"),
    }


def described(steps: int) -> str:
    """Every condition and every experiment, for a terminal."""
    width = max(map(len, FORMS)) + 2
    forms = [f"  {name.ljust(width)}{meaning}" for name, meaning in FORMS.items()]
    whole = [f"  {name.ljust(12)}{', '.join(arms)}" for name, arms in groups(steps).items()]
    return "\n".join(
        ["conditions", *forms, f"\nexperiments of the paper, at {steps} steps", *whole]
    )


@dataclass(frozen=True)
class Batch:
    """Samples of one shape, as model input."""

    prompts: Sequence[str]
    images: Tensor | None  # b 3 h w in [0, 1], in the size that the model makes
    others: Sequence[str]  # for each, another sample's prompt, for swaps
    seeds: Sequence[int]  # noise seed of each
    frames: int


def final(wan: Wan, arm: Arm, batch: Batch, see: See | None = None) -> Tensor:
    """The final latents (b c f h w) of a batch under a condition. `see` is called with every step's
    clean estimates.

    With `see`, an ensemble finishes all of its trajectories instead of the carrier's alone: the
    same result except for rounding, at the cost of as many runs.

    Raises:
        MinicosError: the condition refers to something that this model's run does not have.
    """
    check(wan, arm, batch.frames)
    if arm.kind == "steps":
        wan = wan.with_preset(steps=arm.options["steps"])
    seeds = [seed + APART * j for seed in batch.seeds for j in range(arm.seeds)]
    images = None if batch.images is None else batch.images.repeat_interleave(arm.seeds, 0)
    prompts = [prompt for prompt in batch.prompts for _ in range(arm.seeds)]
    condition = wan.condition(prompts, images, frames=batch.frames)
    noise = wan.noise(condition, seeds)
    what = NO_INTERVENTIONS
    if arm.kind == "ensemble":
        ensemble = _ensemble(wan, arm)
        if see is None:
            return share.run(wan, condition, noise, ensemble)
        what = share.intervention(ensemble, wan.ops)
    elif arm.kind == "noise":
        what = Interventions(edits=(_noise(wan, arm, seeds),))
    elif arm.kind == "swap":
        what = _swap(wan, arm).intervention(
            wan.condition(list(batch.others), images, frames=batch.frames)
        )
    x = what.enter(noise, 0, condition.per_frame(wan.schedule().sigmas[0]), None)
    steps = wan.sample(condition, noise=x, hooks=what.hooks)
    for step, _ in what.with_donors(wan, steps, condition, noise, x, 0, {}):
        entered = what.enter(
            step.next, step.index + 1, (step.sigma_map > 0) * step.sigma_next, step.x0
        )
        if entered is not step.next:
            step.next, step.state = entered, step.state.edited()
        if see is not None:
            see(step.index, step.x0[:: arm.seeds])
        x = step.next
    return x[:: arm.seeds]


def check(wan: Outline, arm: Arm, frames: int) -> None:
    """Raise MinicosError if this model, under its preset, cannot run a condition."""
    steps, latents = wan.preset.steps, wan.latent_frames(frames)
    for name, count in (("step", steps), ("at", steps), ("during", steps), ("frame", latents)):
        if name in arm.options and arm.options[name][1] >= count:
            what = "latent frames" if name == "frame" else "steps"
            raise MinicosError(f"condition {arm.name!r}: the run has {what} 0 to {count - 1}.")
    if arm.kind == "noise" and wan.preset.solver != "euler":
        raise MinicosError(
            f"condition {arm.name!r}: {wan.preset.solver} remembers earlier steps and starts "
            "afresh at an edit, so a plain run would differ"
            " in that, too. Take --solver euler for all conditions."
        )
    wanted = {"4step": "a model distilled to four steps", "vbvr-lora": "VBVR-Wan2.2"}.get(arm.kind)
    own = wan.variant == "tiny" and len(wan.experts) == 1 and wan.loras  # tiny:distilled
    few = wan.variant.endswith("-4step") or bool(own)
    vbvr = wan.variant.removeprefix(LIKE) == "VBVR-Wan2.2"
    fits = {"4step": few, "vbvr-lora": vbvr}
    if wanted and not fits[arm.kind]:
        raise MinicosError(
            f"condition {arm.name!r} needs {wanted}, and this is {wan.variant}. Give its LoRA "
            "files: "
            f"--weights {arm.kind} high=FILE low=FILE."
        )


def _ensemble(wan: Wan, arm: Arm) -> Ensemble:
    depth = len(wan.experts["high"].blocks)
    first, last = arm.options.get("window", (20, 29))
    begin, end = arm.options.get("at", (0, 0))
    return Ensemble(
        window(first, last, depth),
        arm.options.get("mode", "override"),
        tuple(range(begin, end + 1)),
        arm.seeds,
    )


def _noise(wan: Wan, arm: Arm, seeds: Sequence[int]) -> Noise:
    begin, end = arm.options.get("step", (0, wan.preset.steps - 1))
    frames = arm.options.get("frame")
    return Noise(
        arm.options.get("mode", "replace"),
        tuple(range(begin, end + 1)),
        None if frames is None else tuple(range(frames[0], frames[1] + 1)),
        seed=seeds,
    )


def _swap(wan: Wan, arm: Arm) -> Swap:
    first, last = arm.options["layer"]
    begin, end = arm.options.get("during", (0, 0))
    return Swap(window(first, last, len(wan.experts["high"].blocks)), range(begin, end + 1))


def image_batch(pictures: Sequence[Any]) -> Tensor:
    """Pictures uint8 (h w 3) as a batch (b 3 h w) in [0, 1]."""
    return torch.stack([torch.from_numpy(p).permute(2, 0, 1).float() / 255 for p in pictures])
