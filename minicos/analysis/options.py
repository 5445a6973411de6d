"""The options of every study with their defaults: one frozen dataclass each.

The same object is the argument of `study`, the options of the verb (`minicos noise --mode renoise`)
and the settings that a run folder stores. Nothing here imports torch, so `minicos VERB --help` is
instant.
"""

import re
from collections.abc import Iterator
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_type_hints

from minicos.errors import MinicosError

Mode = Literal["replace", "renoise", "erase", "add"]
Branch = Literal["cond", "both"]


def option(
    default: Any, help: str, *, flag: str = "", group: str = "", least: int | None = None
) -> Any:
    """A field with its help text. `flag` is the option's name if it differs from the field's;
    `least` is the smallest accepted whole number.
    """
    about = {"help": help, "flag": flag, "group": group, "least": least}
    return field(default=default, metadata=about)


def option_fields(cls: type) -> Iterator[tuple[Field[Any], list[str], Any]]:
    """The fields of an options class that are options of a verb: field, flags and type."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if "help" in f.metadata:
            flags = f.metadata["flag"] or "--" + f.name.replace("_", "-")
            yield f, flags.split(), hints[f.name]


def arguments(options: Any) -> list[str]:
    """The words of a command line that give these options: --n, and all that differ from their
    default. None is written as the word none.
    """
    words = [] if options.seed == 0 else ["--seed", str(options.seed)]
    for f, (flag, *_), _ in option_fields(type(options)):
        value = getattr(options, f.name)
        if f.name == "n":  # without it `steps`, `energy` and `attention` watch one puzzle
            words += [flag, str(value)]
        elif value is True and value != f.default:
            words.append(flag)
        elif value != f.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [flag, "none" if value is None else text or "none"]
    return words


def spans(text: str, flag: str, **words: tuple[int, int]) -> list[tuple[int, int]]:
    """First and last of every part of "0,3-5,all"; `words` are the spans of names such as all.

    Raises:
        MinicosError: the text has another form.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        first, last = words.get(part.strip(), (1, 0))
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            known = "".join(f" or {word}" for word in words)
            raise MinicosError(f"{flag} {text}: give a list such as 0,3-5{known}.")
        found.append((first, last))
    return found


PUZZLES = "held-out puzzles (the embedded model; scored)"
OWN = "or a case of your own (any model; no score)"
NOISE, SWAP, SHARE = "noise", "swap", "ensemble"  # headings of --help


@dataclass(frozen=True)
class Puzzles:
    """Held-out puzzles; puzzle i, counted from 0, starts from the noise of seed `seed` + i."""

    puzzle: str = option(
        "maze", "family of puzzles, several with commas, or a kind with --size", group=PUZZLES
    )
    size: int | None = option(None, "cells along a side of a kind", group=PUZZLES)
    n: int = option(25, "number of puzzles, split evenly between families", group=PUZZLES, least=1)
    split: Literal["dev", "test"] = option("test", "of the puzzles", group=PUZZLES)
    several: bool = option(False, "only puzzles with several right answers", group=PUZZLES)
    single: bool = option(False, "only puzzles with one right answer", group=PUZZLES)
    seed: int = 0

    def wants(self, ambiguous: bool) -> bool:
        """Whether the options ask for puzzles with several right answers, or with one."""
        return not (self.single if ambiguous else self.several)


@dataclass(frozen=True)
class Cases(Puzzles):
    """Held-out puzzles, or a prompt with a first frame of the user's own."""

    prompt: str | None = option(None, "what should happen", group=OWN)
    image: Path | None = option(
        None, "first frame (png, jpg), for image-to-video models", group=OWN
    )
    seeds: int = option(1, "runs of it, with seeds from --seed upwards", group=OWN, least=1)


@dataclass(frozen=True)
class Ideal:
    """For studies that do not look into a network: they can also run on an ideal observer
    (`tools/observer.py`).
    """

    ideal: bool = option(
        False, "also run an exact ideal observer as the model, from the same noise", group=PUZZLES
    )


@dataclass(frozen=True)
class RecordOptions:
    """What to keep of one run of the user's own: `steps`, `energy`, `attention`, `run`."""

    at: tuple[int, ...] | None = option(
        None, "steps to show (default: eight, denser at the start); for puzzles, steps to measure"
    )
    seeds: int = option(1, "samples; the first is shown", group=OWN, least=1)
    layers: tuple[int, ...] | None = option(
        None, "layers for attention (default: eight, evenly spaced)", group=OWN
    )
    heads: tuple[int, ...] | None = option(
        None, "heads for attention (default: mean of all)", group=OWN
    )
    branch: str = option(
        "cond", "guidance pass for attention: cond, uncond or another of the model", group=OWN
    )
    queries: int | None = option(
        None,
        "random queries per latent frame, for attention (default: all, exact)",
        group=OWN,
        least=2,
    )
    seed: int = 0


@dataclass(frozen=True)
class StepsOptions(Ideal, Puzzles):
    """Do all frames of the estimate settle together, and later where there is a choice?
    (`analysis/steps.py`)
    """

    several: bool = True  # in addition to as many puzzles with one right answer
    single: bool = False


@dataclass(frozen=True)
class BeliefOptions(Ideal, Puzzles):
    """What would an ideal observer believe at each step? (`analysis/belief.py`)"""

    several: bool = True
    single: bool = False


@dataclass(frozen=True)
class CommitmentOptions(Ideal, Cases):
    """When is the answer decided? (`analysis/commitment.py`)"""

    n: int = option(20, "how many puzzles", group=PUZZLES, least=1)
    several: bool = True
    single: bool = False
    at: tuple[int, ...] | None = option(
        None, "steps to complete from (default: six, denser at the start)"
    )
    seeds: int = 1
    count: int = option(8, "completions of each step", least=1)
    also_single: bool = option(
        False, "also puzzles with one right answer, for self-correction only", group=PUZZLES
    )

    def wants(self, ambiguous: bool) -> bool:
        return self.also_single or super().wants(ambiguous)


@dataclass(frozen=True)
class PlantOptions(Ideal, Puzzles):
    """Does a run correct a wrong answer that was put into it? (`analysis/plant.py`)"""

    n: int = option(20, "how many puzzles", group=PUZZLES, least=1)
    several: bool = True  # the control plants another of several right answers
    single: bool = False
    at: tuple[int, ...] | None = option(
        None, "steps at which an answer is planted (default: six, denser at the start)"
    )


@dataclass(frozen=True)
class RecallOptions(Puzzles):
    """Is an invented object the same when it reappears, and which frame reads which?
    (`analysis/recall.py`)
    """

    puzzle: str = option("reveal", "reveal, shell, or families of either", group=PUZZLES)


@dataclass(frozen=True)
class BehavioursOptions(Ideal):
    """Perception before action, working memory (`analysis/behaviours`)."""

    n: int = option(50, "puzzles of each kind", least=1)
    size: int | None = option(None, "cells along a side")
    rows: int = option(300, "training puzzles for the readout; 0: no readout", least=0)
    at: tuple[int, ...] | None = option(
        None, "steps of the readout (default: 0, and a quarter of the run)"
    )
    seed: int = 0


@dataclass(frozen=True)
class EnergyOptions(Puzzles):
    """Does token energy single out the answer's cells? (`analysis/energy.py`)"""

    puzzle: str = option("mark", "family of puzzles, or a kind with --size", group=PUZZLES)
    at: tuple[int, ...] | None = option(None, "steps to measure (default: the middle one)")


@dataclass(frozen=True)
class AttentionOptions(Puzzles):
    """How much attention goes to padding and to the given frame? (`analysis/attention.py`)"""

    puzzle: str = option("mark", "family of puzzles, or a kind with --size", group=PUZZLES)
    at: tuple[int, ...] | None = option(None, "steps to measure (default: the middle one)")


@dataclass(frozen=True)
class CountsOptions(Ideal, Puzzles):
    """How many steps and frames does an answer take? (`analysis/counts.py`)"""

    counts: tuple[int, ...] = option(
        (1, 2, 4, 10, 20), "denoising steps; all are compared with the largest"
    )
    lengths: tuple[int, ...] = option((), "video frames, 4n + 1, at the largest of --counts")
    against: str | None = option(
        None, "families with short chains, if --puzzle has long ones, for comparison", group=PUZZLES
    )


@dataclass(frozen=True)
class NoiseOptions(Ideal, Cases):
    """Noise at steps and in frames (`analysis/noise`)."""

    mode: Mode = option(
        "replace",
        "what the latent becomes. replace: pure noise; renoise: x0 with fresh noise; erase: the "
        "mean colour with noise; add: x with noise",
        group=NOISE,
    )
    at: tuple[int, ...] | None = option(
        None, "steps to noise, e.g. 0,5,19 (default: all)", group=NOISE
    )
    frames: tuple[int, ...] | None = option(
        None, "latent frames to noise, or none (default: all)", flag="--in", group=NOISE
    )
    match: Literal["cells", "none"] = option(
        "cells",
        "noise a frame at as many steps as there are frames, or (none, as in the paper) at all",
        group=NOISE,
    )
    dose: float | None = option(
        None,
        "total squared norm of add, in latent frames of unit variance (default: as many as "
        "there are)",
        group=NOISE,
    )
    layer: int | None = option(None, "also compare this block's output by CKA", group=NOISE)
    others: int = option(2, "other seeds that define the unit of D", group=NOISE, least=1)
    boundaries: tuple[float, ...] = option(
        (), "boundaries between the experts, each compared with the first", group=NOISE
    )


@dataclass(frozen=True)
class SweepOptions(NoiseOptions):
    """Noise at the same few steps under several settings (`analysis/sweep.py`)."""

    at: tuple[int, ...] | None = None
    frames: tuple[int, ...] | None = ()  # noise in frames is measured by `noise` only
    match: Literal["cells", "none"] = "cells"
    boundaries: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    points: int = option(5, "number of steps to noise, evenly spaced", group=NOISE, least=1)


@dataclass(frozen=True)
class FramesOptions(SweepOptions):
    """Over frame counts."""

    counts: tuple[int, ...] = option((5, 9, 13, 17), "video frames, 4n + 1")


@dataclass(frozen=True)
class DistilledOptions(SweepOptions):
    """Over few-step sampling or weights."""

    counts: tuple[int, ...] = option((4, 8, 20, 50), "denoising steps")
    models: tuple[str, ...] = option((), "other weights, one per count, instead of --model")


@dataclass(frozen=True)
class SwapOptions(Cases):
    """At which layer does a prompt become an answer? (`analysis/swap`)"""

    puzzle: str = option(
        "mark",
        "families with several prompts per picture: mark, goal, pick, partner, ...",
        group=PUZZLES,
    )
    n: int = option(10, "how many puzzles", group=PUZZLES, least=1)
    probe: int | None = option(
        None,
        "number of drawn pictures with cats and bicycles, for any image-to-video model; scored",
        least=1,
    )
    pixels: str = option("480x832", "their height x width")
    prompt: str | None = option(None, "the prompt of run B", group=OWN)
    other: str | None = option(None, "the prompt of run A, for the same picture", group=OWN)
    seeds: int = 1
    several: bool = False
    single: bool = False
    what: str = option(
        "stream",
        "what is swapped: stream, update, a sub-layer of the model such as self_attn, or a stream "
        "next to the video's: text, joint (text and video), audio",
        group=SWAP,
    )
    layers: str | None = option(
        None,
        "layers, swapped one at a time, e.g. embed,0,3,6-9 (default: all)",
        flag="--layers --at",
        group=SWAP,
    )
    side: Literal["output", "input"] = option("output", "of the block, for a stream", group=SWAP)
    during: str = option("0,all", "steps, e.g. 0,0-4,5-9,all: one curve each", group=SWAP)
    donor: Literal["own", "same_x", "both"] = option(
        "same_x", "own: A's trajectory; same_x: prompt A at B's latent", group=SWAP
    )
    branch: Branch = option("cond", "guidance passes that are swapped", group=SWAP)
    region: Literal["all", "objects", "background"] = option(
        "all", "tokens that are swapped", group=SWAP
    )
    one_way: bool = option(False, "only A into B, not also B into A", group=SWAP)
    controls: tuple[str, ...] = option(
        (), "some of null, wrong, shuffled, random; or all", group=SWAP
    )
    control_layers: str | None = option(
        None, "layers of the controls (default: three of --at)", flag="--controls-at", group=SWAP
    )


@dataclass(frozen=True)
class EnsembleOptions(Ideal, Cases):
    """Does averaging mid-layer states over seeds help? (`analysis/ensemble`)"""

    size: int | None = option(5, "cells along a side of a kind", group=PUZZLES)
    n: int = option(10, "how many puzzles", group=PUZZLES, least=1)
    split: Literal["dev", "test"] = "test"  # the arm is chosen on dev and reported on test
    choose: int = option(
        0, "dev puzzles that choose the arm; 0: take the first", group=PUZZLES, least=0
    )
    modes: tuple[str, ...] = option(
        (),
        "override, input_override, lockstep, update, mix (default: override,update; override)",
        group=SHARE,
    )
    windows: str | None = option(
        None, "blocks, scaled from 40 to the model (default: 20-29,0-9,0-39; 20-29)", group=SHARE
    )
    share_at: str | None = option(
        None,
        "steps that share, e.g. 0,0-4; one of several is chosen (default: 0,first quarter; 0)",
        flag="--share-at --at",
        group=SHARE,
    )
    seeds: int = option(3, "number of runs that share, T", group=SHARE, least=1)
    alpha: float = option(0.5, "of mode mix", group=SHARE)
    keep_norm: bool = option(
        False, "rescale the mean to the average norm of its inputs", group=SHARE
    )
    branch: Branch = option("cond", "guidance passes that share", group=SHARE)
    carrier: str = option("0", "the seed that is finished, or 'all'", group=SHARE)
    arms: tuple[str, ...] = option(
        (),
        "arms by name, e.g. 'override 20-29 @0,update 20-29 @0-4', instead of the three above",
        group=SHARE,
    )
    select: int = option(
        2, "steps after which the best-scored seed is chosen, a rival", group=SHARE, least=1
    )
    no_rivals: bool = option(False, "do not also average clean estimates and latents", group=SHARE)
