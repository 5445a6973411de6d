"""At which layer does the prompt become an answer? Hidden states of run A are put into run B
(paper, Sec. 5.2 and Fig. 6b).

A and B share picture and noise and differ in the prompt ("circle the cat", "circle the bicycles").
At layers k and steps S, run B uses A's state instead of its own and continues from there, later
layers included. Does it end at A's answer or at B's?

Definition. y is the latent B ends at, A and B are those of the undisturbed runs, and t = <y - B, A
- B> / ||A - B||^2. Reported are

    flip        2t - 1: -1 if B stays B, +1 if it becomes A
    off_axis    ||y - B - t (A - B)|| / ||A - B||: the part that is neither; flip means little
                unless this is small
    leverage    |dsigma| ||dv|| / ||x|| at the first swapped step, with dv the change of the guided
                velocity (g times that of the prompted branch): how far one step can move the latent

and, if pictures can be judged, the rates of A, B and neither, with the layer at which `flip`
crosses 0 and the rate of A crosses 1/2.

True by construction, so not findings:

- The whole stream after the last block *is* A's velocity: over all steps the run ends at A, flip =
  1, in every model whose `stream_decides`. A curve over layers ends there; the finding is where it
  turns. (In HunyuanVideo the prompt also enters the head, and nothing is true by construction.)
- Whole streams of several layers: only the last of them counts.
- Donor `own` transfers A's latent together with A's reading of the prompt. From the second step on
  the two latents differ, so even a swap of the patch embedding, which does not depend on the
  prompt, disturbs B. At step 0 the two donors are the same, since the noise is shared.
- Donor `same_x` at block k, whole stream, equals B with the prompt of A in blocks 0..k, bit for
  bit: it measures where the prompt is *read*. (It is computed that way: keys and values of the text
  do not depend on the latent, so one run of A serves all layers.)
- One Euler step of 50 at high noise moves the latent by well under 1 %, at every layer: look at
  `leverage` before interpreting step 0 alone.

Where the paper does not specify a choice, it is an option: what is swapped (`Swap.what`), block
output or input, donor (`DONORS`), branch, and which tokens (`REGIONS`). Controls
(`pairs.CONTROLS`): A = B (difference exactly 0), another case's A, another case's prompt, a random
direction of equal norm.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from zlib import crc32

import torch
from torch import Tensor

from minicos.analysis.tools.interventions import Donor, Interventions
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hook, Hooks, Site
from minicos.sample import State, Step
from minicos.video_model import VideoModel

# A on its own trajectory, or prompt A at the latent of B; and how a title says it
DONORS = {"own": "A's own run", "same_x": "A at B's latent"}
REGIONS = ("all", "objects", "background")  # which tokens, by the objects of the first frame
EMBED = -1  # the layer before block 0: the patch embedding, which does not depend on the prompt
States = dict[tuple[str, str], Tensor]  # (point, branch) -> the donor's tensor at the current step


@dataclass(frozen=True)
class Swap:
    """What is swapped, where and when: an intervention that does not depend on a model or on
    cases.
    """

    layers: tuple[int, ...]  # blocks from 0; EMBED is possible for a stream
    steps: range
    # "stream" h_k; "update" h_k - h_{k-1}; a sub-layer of the model: its output, before its gate;
    # "prompt": keys and values of the text in blocks 0..k, see `lockstep`
    what: str = "stream"
    at: str = "output"  # of the block, or its "input", which is the output of the one before
    branch: str | None = "cond"  # None: both
    region: Tensor | None = None  # tokens that are swapped, bool l or b l; None: all
    # control: B's own state, moved by the distance to A's, but in a random direction
    random: bool = False

    def __post_init__(self):
        if self.at not in ("output", "input"):
            raise MinicosError(f"a swap is at output or input, not at {self.at!r}")
        if self.at == "input" and self.what != "stream":
            raise MinicosError(f"only a stream can be swapped at a block's input, not {self.what}")
        lowest = 0 if self.at == "input" or self.what not in ("stream", "prompt") else EMBED
        if not self.layers or min(self.layers) < lowest:
            raise MinicosError(
                f"a swap of {self.what} needs layers from {lowest} on, not {list(self.layers)}"
            )
        if not self.steps or self.steps.step != 1:
            raise MinicosError(f"a swap needs a range of steps, not {self.steps}")

    @property
    def whole_stream(self) -> bool:
        """Whether all tokens of a stream are swapped, with the donor's own states."""
        return self.what == "stream" and self.region is None and not self.random

    def record(self, states: States) -> Hooks:
        """Hooks for run A that store the states to swap in `states`; each step overwrites the one
        before.
        """

        def keep(x: Tensor, site: Site) -> None:
            states[site.name, site.branch] = x

        names = {name for layer in self.layers for name in self._points(layer)}
        return sum(
            (Hooks().on(name, keep, step=self.steps, branch=self.branch) for name in sorted(names)),
            NO_HOOKS,
        )

    def hooks(self, states: States) -> Hooks:
        """Hooks for run B that insert what `record` stored in the same step."""
        hooks, own = NO_HOOKS, {}

        def remember(x: Tensor, site: Site) -> None:
            own[site.name, site.branch] = x

        def put(x: Tensor, site: Site) -> Tensor:
            return self._put(x, states[site.name, site.branch], site)

        def put_update(before: str) -> Callable[[Tensor, Site], Tensor]:
            def put(x: Tensor, site: Site) -> Tensor:
                update = states[site.name, site.branch] - states[before, site.branch]
                return self._put(x, own[before, site.branch] + update, site)

            return put

        # in this order, `own` contains the result of a swap at an earlier layer
        for layer in sorted(self.layers):
            points = self._points(layer)
            rules: dict[str, Hook] = dict.fromkeys(points, put)
            if self.what == "update":
                rules = {points[0]: remember, points[1]: put_update(points[0])}
            for point, hook in rules.items():
                hooks = hooks.on(point, hook, step=self.steps, branch=self.branch)
        return hooks

    def intervention(self, give: Condition, donor: str = "own") -> Interventions:
        """This swap as one of several interventions in a run; the states come from a run under
        `give`, with a donor of `DONORS`.
        """
        if donor not in DONORS:
            raise MinicosError(f"no donor {donor!r}: take one of {', '.join(DONORS)}")
        states: States = {}
        gives = Donor(give, self.steps, self.record(states), own=donor == "own")
        return Interventions(self.hooks(states), donors=(gives,))

    def _points(self, layer: int) -> tuple[str, ...]:
        """The hook points that a swap at a layer replaces; for an update, the point before it and
        the one that it replaces.
        """
        if self.what == "prompt":
            return tuple(f"blocks.{i}.cross_attn.{name}" for i in range(layer + 1) for name in "kv")
        if self.what == "update":
            return _output(layer - 1), _output(layer)
        if self.what == "stream":
            return (_output(layer - (self.at == "input")),)
        return (f"blocks.{layer}.{self.what}",)

    def _put(self, own: Tensor, donated: Tensor, site: Site) -> Tensor:
        if self.random:
            draw = torch.Generator().manual_seed(
                crc32(f"{site.name} {site.step} {site.branch}".encode())
            )
            direction = torch.randn(own.shape, generator=draw).to(own)
            length = (donated - own).norm(dim=-1, keepdim=True)  # of every token
            donated = own + length * direction / direction.norm(dim=-1, keepdim=True)
        if self.region is not None:
            donated = torch.where(self.region.to(own.device)[..., None], donated, own)
        return donated


def _output(layer: int) -> str:
    return "embed" if layer == EMBED else f"blocks.{layer}"


def lockstep(
    wan: VideoModel,
    give: Condition,
    take: Condition,
    noise: Tensor,
    swaps: Sequence[Swap],
    *,
    donor: str = "own",
    x: Tensor | None = None,
    start: int = 0,
    state: State | None = None,
) -> Iterator[list[Step]]:
    """Run B once for each swap, in step with their donor; yields, at every step, the list of B's
    steps (one for each swap). The states of only one step of A are kept.

    Args:
        give: the condition of A; both runs start from `noise`.
        take: the condition of B.
        swaps: all over the same steps. With donor `own` they share one run of A, with `same_x` each
            has a pass of A at its own latent (except for whole streams, see the top).
        x: B's undisturbed latent that enters step `start`, to avoid computing it twice.
        start: at most the first swapped step.
        state: the state that belongs to x.
    """
    steps, total = swaps[0].steps, len(wan.schedule())
    if donor not in DONORS or any(swap.steps != steps for swap in swaps):
        raise MinicosError(
            f"swaps in lockstep need equal steps and a donor of {', '.join(DONORS)}, not {donor!r}"
        )
    if steps.start < start or steps.stop > total:
        raise MinicosError(
            f"steps {steps.start} to {steps.stop - 1} are not among the steps {start} to "
            f"{total - 1}"
        )
    x = noise if x is None else x
    if donor == "same_x" and give.same_but_text(take) and all(swap.whole_stream for swap in swaps):
        # A and B differ only in the text, whose keys and values do not depend on the latent and
        # carry all of A's influence on a block's stream.
        outputs = [max(swap.layers) - (swap.at == "input") for swap in swaps]
        swaps = [
            Swap((k,), steps, "prompt", branch=s.branch)
            for k, s in zip(outputs, swaps, strict=True)
        ]
        donor = "own"
    stores: list[States]
    gives: list[Iterator[Step]]
    if donor == "own":
        stores = [{}] * len(swaps)
        record = sum((swap.record(stores[0]) for swap in swaps), NO_HOOKS)
        gives = [
            islice(wan.sample(give, noise=noise, hooks=record), start, None)
        ]  # A is at step `start` too
    else:
        stores = [{} for _ in swaps]
        gives = [
            wan.sample(give, noise=x, start=start, state=state, hooks=swap.record(s))
            for swap, s in zip(swaps, stores, strict=True)
        ]
    takes = [
        wan.sample(take, noise=x, start=start, state=state, hooks=swap.hooks(s))
        for swap, s in zip(swaps, stores, strict=True)
    ]
    for index in range(start, total):
        given = [next(run) for run in gives] if index < steps.stop else []
        taken = [next(run) for run in takes]
        if donor == "same_x":
            for a, b in zip(given, taken, strict=False):
                a.next = b.next
        yield taken


def flip(y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where y lies between b and a (all b c f h w): 2t - 1 and the off-axis share, each (b,); NaN
    if a = b. Imposed frames are equal in all three and do not contribute.
    """
    y, axis = (y.double() - b.double()).flatten(1), (a.double() - b.double()).flatten(1)
    squared = axis.square().sum(1)
    t = (y * axis).sum(1) / squared
    return 2 * t - 1, (y - t[:, None] * axis).norm(dim=1) / squared.sqrt()


def leverage(swapped: Step, velocity: Tensor) -> Tensor:
    """|dsigma| ||dv|| / ||x||: how far the swap moves the latent in this step, relative to its
    norm: (b,). `velocity` is B's own at this x.
    """
    moved = (swapped.velocity - velocity).flatten(1).norm(dim=1) * abs(
        swapped.sigma_next - swapped.sigma
    )
    return moved / swapped.x.flatten(1).norm(dim=1)
