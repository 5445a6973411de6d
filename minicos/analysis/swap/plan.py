"""Which swaps to make: layers, ranges of steps, donors, controls; from options to `Swap`s."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from minicos.analysis.options import SwapOptions, spans
from minicos.analysis.outline import Outline
from minicos.analysis.swap.pairs import CONTROLS, Pair, donors
from minicos.analysis.swap.states import DONORS, EMBED, REGIONS, Swap
from minicos.errors import MinicosError, suggest


@dataclass(frozen=True)
class Plan:
    """A sweep: each layer separately, over every range of steps, from every donor, and some layers
    again for each control.
    """

    layers: tuple[int, ...]
    ranges: tuple[range, ...]
    donors: tuple[str, ...] = ("own",)
    what: str = "stream"
    at: str = "output"
    branch: str | None = "cond"
    region: str = "all"  # a name in REGIONS
    controls: tuple[str, ...] = ()
    control_layers: tuple[int, ...] = ()  # (): all of them
    decided: bool = True  # `Model.stream_decides`

    @property
    def arms(self) -> list["Arm"]:
        """All curves. At step 0 both donors are the same (equal noise, equal latent), so it is
        measured once.
        """
        return [
            Arm(steps, donor, control)
            for steps in self.ranges
            for donor in (self.donors[:1] if steps == range(1) else self.donors)
            for control in (None, *self.controls)
        ]

    @property
    def last(self) -> str:
        """What is known about the last layer before the measurement."""
        if self.decided:
            return "the last layer turns all by construction"
        return "the last layer need not turn all: the prompt also enters behind it"

    @property
    def effects(self) -> list["Arm"]:
        """The arms that are not controls."""
        return [arm for arm in self.arms if arm.control is None]

    def check(self, made: Sequence[Pair]) -> None:
        """Raise MinicosError for what cannot be done with these pairs, before anything runs."""
        for arm in self.arms:
            self.swaps(arm, None)
            donors(made, arm.control)
            if arm.donor not in DONORS:
                raise MinicosError(f"no donor {arm.donor!r}: one of {', '.join(DONORS)}")
        if self.region not in REGIONS:
            raise MinicosError(f"no region {self.region!r}: one of {', '.join(REGIONS)}")
        if self.region != "all" and any(pair.objects is None for pair in made):
            raise MinicosError(
                f"the region {self.region!r} needs pictures that know their objects: --puzzle or "
                "--probe"
            )
        if len({None if pair.image is None else tuple(pair.image.shape) for pair in made}) > 1:
            raise MinicosError("the pictures of a sweep must have one size")

    def swaps(self, arm: "Arm", region: Tensor | None) -> list[Swap]:
        """One swap for each layer of an arm."""
        rest = (self.what, self.at, self.branch, region, arm.control == "random")
        return [Swap((layer,), arm.steps, *rest) for layer in self.layers_of(arm)]

    @property
    def compared(self) -> tuple[int, ...]:
        """The layers at which arms are compared with each other and with controls."""
        return tuple(k for k in self.control_layers or self.layers if k in self.layers)

    def layers_of(self, arm: "Arm") -> tuple[int, ...]:
        """The layers at which an arm is measured."""
        return (self.control_layers or self.layers) if arm.control else self.layers


@dataclass(frozen=True)
class Arm:
    """One curve over layers."""

    steps: range
    donor: str
    control: str | None = None

    @property
    def name(self) -> str:
        """ "steps 0-19, A's own run" or "step 0, A at B's latent, null"."""
        return ", ".join([self._steps, DONORS[self.donor], *filter(None, [self.control])])

    def under(self, control: str) -> "Arm":
        """The same arm with the donor of a control."""
        return replace(self, control=control)

    @property
    def file(self) -> str:
        """The name as part of a file name: "steps_0-19_own"."""
        parts = [self._steps, self.donor, *filter(None, [self.control])]
        return "_".join(parts).replace(" ", "_")

    @property
    def _steps(self) -> str:
        first, last = self.steps[0], self.steps[-1]
        return f"step {first}" if first == last else f"steps {first}-{last}"


def plan(wan: Outline, options: SwapOptions) -> Plan:
    """The plan that the options ask for. Raises MinicosError for layers and steps that the run does
    not have.
    """
    depth, kinds = wan.depth, ("stream", "update", *wan.sublayers, *wan.streams)
    if options.what not in kinds:
        raise MinicosError(
            f"--what {options.what}: this model has {', '.join(kinds)}"
            f"{suggest(options.what, kinds)}"
        )
    lowest = EMBED if options.what == "stream" and options.side == "output" else 0
    chosen = layers(options.layers, "--layers") or tuple(range(lowest, depth))
    controlled = layers(options.control_layers, "--controls-at") or _three(chosen)
    for flag, given in (("--layers", chosen), ("--controls-at", controlled)):
        if given[0] < lowest or given[-1] >= depth:
            raise MinicosError(
                f"{flag}: this model has layers 0 to {depth - 1}, and `embed` for a stream's "
                "output."
            )
    return Plan(
        layers=chosen,
        ranges=ranges(options.during, wan.preset.steps),
        donors=tuple(DONORS) if options.donor == "both" else (options.donor,),
        what=options.what,
        at=options.side,
        branch=None if options.branch == "both" else options.branch,
        region=options.region,
        controls=CONTROLS if options.controls == ("all",) else options.controls,
        control_layers=controlled,
        decided=wan.stream_decides,
    )


def _three(chosen: Sequence[int]) -> tuple[int, ...]:
    """Three of the layers, at a quarter, a half and near the end."""
    count = len(chosen)
    return tuple(sorted({chosen[count // 4], chosen[count // 2], chosen[-1 - count // 8]}))


def layers(text: str | None, flag: str) -> tuple[int, ...]:
    """The layers of an option: embed,0,3,6-9; () for none. Raises MinicosError for other forms."""
    found = [] if text is None else spans(text, flag, embed=(EMBED, EMBED))
    return tuple(sorted({layer for a, b in found for layer in range(a, b + 1)}))


def ranges(text: str, total: int) -> tuple[range, ...]:
    """The ranges of steps of an option: 0,0-4,all. Raises MinicosError for other forms, and for
    steps beyond `total`.
    """
    found = tuple(range(a, b + 1) for a, b in spans(text, "--during", all=(0, total - 1)))
    if any(steps.stop > total for steps in found):
        raise MinicosError(f"--during {text}: the run has steps 0 to {total - 1}.")
    return found


def layer_name(k: int) -> str:
    """The name of a layer as shown."""
    return "embed" if k == EMBED else str(k)
