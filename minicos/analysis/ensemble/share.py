"""Do several seeds decide better together? States of the middle blocks averaged over seeds, early
(paper, Sec. 6).

Definition. T seeds of one case (3) are denoised. At the steps S ({0}) the residual stream h_k after
the blocks k of a window (20..29 of 40) is shared between them; then one trajectory, the `carrier`,
is finished, or all are. The paper does not say what "averaging the latents of layers 20-29"
replaces, so each interpretation is a mode:

    override        independent passes give h_k for each seed; in a second pass h_k := mean over
                    seeds
    input_override  the same, literally as pseudo-code: the *input* of block k := mean of its
                    outputs. Each block of the window runs on its own output, which is an effect in
                    itself: T = 1 is its control
    lockstep        h_k := mean over seeds while the seeds pass through the blocks together
    update          h_k := h_{k-1} + mean of (h_k - h_{k-1}): seeds keep their streams and share
                    what the blocks add
    mix             h_k := (1 - alpha) h_k + alpha mean: from the plain run (0) to lockstep (1)
    x0, latent      alternatives without a layer, between steps: averages of the clean estimates, or
                    of the latents that leave the step

Trivial by construction (each is tested): `override` and `input_override` discard earlier states, so
only the window's last layer counts, and a window that ends with the network averages velocities.
After the first layer of `lockstep` all seeds have one stream, so only that layer counts: override
over a..b equals lockstep at b alone. In both modes the seeds share one cond velocity for that step
and differ through x and the uncond pass. Only `update` and `mix` use the whole window. At step 0 of
50 an Euler step moves the latent by 0.4 % of the noise, so the direct effect is small: read D
together with the gain.

`keep_norm` (ours): a mean of T states is shorter than they are; it is rescaled to their mean norm,
token by token (latents: frame by frame). `branches` selects the guidance passes in which states are
shared (the paper does not say), by default the conditional one.

Cost in network passes per case and branch, for N steps and S = {0}: T + N - 1, and T + N for the
modes with two passes; if all trajectories are finished: T N, and T (N + 1). Measured by `Passes`. A
plain run costs N; best of T and a vote cost T N.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minicos.analysis.tools.interventions import Donor, Interventions
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.ops import REFERENCE, Ops
from minicos.sample import Step
from minicos.video_model import VideoModel

TWO_PASS = ("override", "input_override")
ONE_PASS = ("lockstep", "update", "mix")
BETWEEN_STEPS = ("x0", "latent")
MODES = TWO_PASS + ONE_PASS + BETWEEN_STEPS
DONORS = ("own", "others", "random")


@dataclass(frozen=True)
class Ensemble:
    """Which states are shared, at which steps, and between which seeds."""

    layers: Sequence[int] = ()  # blocks, ascending; see `window`. Empty for modes between steps
    mode: str = "override"
    steps: Sequence[int] = (0,)
    seeds: int = 3  # T
    alpha: float = 1.0  # of mode "mix"
    keep_norm: bool = False
    branches: Sequence[str] = ("cond",)
    carrier: int | None = 0  # the seed whose trajectory is finished; None: all of them
    donors: str = "own"  # or a control of `share`: "others", "random"

    def __post_init__(self):
        if self.mode not in MODES or self.donors not in DONORS:
            raise MinicosError(
                f"an ensemble has a mode of {', '.join(MODES)} and donors of {', '.join(DONORS)}"
            )
        if self.seeds < 1 or (self.carrier is not None and not 0 <= self.carrier < self.seeds):
            raise MinicosError(f"{self.seeds} seeds have no carrier {self.carrier}: count from 0")
        if (
            bool(self.layers) == (self.mode in BETWEEN_STEPS)
            or not self.steps
            or min(self.steps) < 0
        ):
            raise MinicosError(
                f"mode {self.mode} at steps {list(self.steps)} cannot share layers "
                f"{list(self.layers)}"
            )
        if self.alpha != 1 and self.mode != "mix":
            raise MinicosError(f"alpha belongs to mode mix, not to {self.mode}")

    @property
    def counting(self) -> tuple[int, ...]:
        """The layers that determine the result, by algebra."""
        layers = tuple(self.layers)
        return (
            layers[-1:]
            if self.mode in TWO_PASS
            else layers[:1]
            if self.mode == "lockstep"
            else layers
        )


def window(first: int, last: int, depth: int, of: int = 40) -> tuple[int, ...]:
    """The blocks at the relative depth of blocks first..last of `of` in a network with `depth`
    blocks; at least one.

    20..29 of 40 is itself at depth 40, 15..22 at depth 30, and 6..8 at depth 12.
    """
    if not 0 <= first <= last < of:
        raise MinicosError(f"window {first}-{last}: blocks are counted from 0 to {of - 1}")
    begin = min((2 * first * depth + of) // (2 * of), depth - 1)  # rounded half up
    return tuple(range(begin, max(begin + 1, (2 * (last + 1) * depth + of) // (2 * of))))


# -- sharing ---------------------------------------------------------------------------------------


def share(x: Tensor, e: Ensemble, ops: Ops = REFERENCE, draw: int = 0) -> Tensor:
    """Rows (case seed) l d, each combined with its case's other seeds as `e` says; `draw` seeds the
    random control.

    The controls: "others" averages the seeds of T different cases, each of which keeps its own
    share in the mean; "random" moves every token by the distance that sharing would have moved it.
    """
    if e.seeds == 1:
        return x
    order = _strangers(len(x) // e.seeds, e.seeds) if e.donors == "others" else torch.arange(len(x))
    own = x[order.to(x.device)] if e.donors == "others" else x
    y = ops.latent_mean(own, e.seeds, 1.0 if e.keep_norm else e.alpha)
    if e.keep_norm:
        norm = ops.latent_mean(_norm(own, ops), e.seeds) / _norm(y, ops).clamp_min(1e-30)
        y = ((1 - e.alpha) * own.float() + e.alpha * norm * y.float()).to(x.dtype)
    if e.donors == "others":
        return y[order.argsort().to(x.device)]
    if e.donors == "random":
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(draw)).to(x.device)
        return (x + direction * (_norm(y.float() - x.float(), ops) / _norm(direction, ops))).to(
            x.dtype
        )
    return y


def _norm(x: Tensor, ops: Ops) -> Tensor:
    return ops.token_energy(x).unsqueeze(-1)


def _strangers(count: int, seeds: int) -> Tensor:
    """An order of the rows (case seed) in which seed j of case c takes the place of case c - j, so
    no two rows of a group belong to one case.
    """
    if count < seeds:
        raise MinicosError(
            f"{seeds} seeds of different cases need a batch of {seeds} cases or more, not {count}"
        )
    case, seed = torch.meshgrid(torch.arange(count), torch.arange(seeds), indexing="ij")
    return ((case + seed) % count * seeds + seed).flatten()


def hooks(e: Ensemble, ops: Ops = REFERENCE) -> Hooks:
    """The modes with one pass as hooks, for any run whose batch axis is (case seed); for the others
    see `two_passes` and `run`.
    """
    if e.mode not in ONE_PASS:
        raise MinicosError(f"mode {e.mode} is not made of hooks alone: call ensemble.run")
    if e.seeds == 1 or e.alpha == 0:
        return NO_HOOKS
    before: dict[str, Tensor] = {}  # the stream that enters the block, for `update`

    def remember(x: Tensor, site: Site) -> None:
        before["x"] = x

    def shared(x: Tensor, site: Site) -> Tensor:
        return share(x, e, ops, _draw(site))

    def updated(x: Tensor, site: Site) -> Tensor:
        entered = before.pop("x")
        return (entered + share(x - entered, e, ops, _draw(site))).to(x.dtype)

    rules = NO_HOOKS
    for k in e.layers:
        if e.mode == "update":
            rules = _at(rules, _input(k), remember, e)
        rules = _at(rules, f"blocks.{k}", updated if e.mode == "update" else shared, e)
    return rules


def two_passes(
    e: Ensemble, found: dict[tuple[str, str], Tensor], ops: Ops = REFERENCE
) -> tuple[Hooks, Hooks]:
    """The modes with two passes as the hooks of each pass: the first stores shared states in
    `found`, the second inserts them.
    """

    def keep(x: Tensor, site: Site) -> None:
        found[site.branch, site.name] = share(x, e, ops, _draw(site))

    first = second = NO_HOOKS
    for k in e.layers:

        def put(x: Tensor, site: Site, block: str = f"blocks.{k}") -> Tensor:
            return found[site.branch, block].to(x.dtype)

        first = _at(first, f"blocks.{k}", keep, e)
        second = _at(second, f"blocks.{k}" if e.mode == "override" else _input(k), put, e)
    return first, second


def intervention(e: Ensemble, ops: Ops = REFERENCE) -> Interventions:
    """Sharing inside the passes as one of several interventions in a run of rows (case seed); not
    for modes "x0" and "latent".
    """
    if e.mode not in TWO_PASS:
        return Interventions(hooks(e, ops))
    first, second = two_passes(e, {}, ops)
    return Interventions(second, donors=(Donor(None, e.steps, first, own=False),))


def _at(rules: Hooks, point: str, hook: Callable, e: Ensemble) -> Hooks:
    for branch in e.branches:
        rules = rules.on(point, hook, step=tuple(e.steps), branch=branch)
    return rules


def _input(k: int) -> str:
    """The hook point of the stream that enters block k."""
    return f"blocks.{k - 1}" if k else "embed"


def _draw(site: Site) -> int:
    return 1000 * site.step + int(site.name.split(".")[1])


def edit(step: Step, e: Ensemble, ops: Ops = REFERENCE) -> Tensor:
    """The alternatives between steps: the latent (case seed) c f h w that leaves the step, with
    clean estimates or latents shared.

    With a shared x0 the velocity is (x - x0) / sigma, and the step follows it: exact for Euler,
    first order for the other solvers.
    """

    def shared(x: Tensor) -> Tensor:  # each frame as one token
        return (
            share(x.transpose(1, 2).flatten(2), e, ops, step.index)
            .view_as(x.transpose(1, 2))
            .transpose(1, 2)
        )

    if e.mode == "latent":
        return shared(step.next)
    return step.next + (step.sigma_next - step.sigma) / step.sigma * (step.x0 - shared(step.x0))


def run(
    wan: VideoModel, condition: Condition, noise: Tensor, e: Ensemble, *, watch: Hooks = NO_HOOKS
) -> Tensor:
    """Denoise rows (case seed) c f h w; returns the final latents, one for each case, or all rows
    if there is no carrier.

    `watch` runs in every pass, before the ensemble's own hooks. Raises MinicosError if the run has
    no such step or block.
    """
    last = max(e.steps)
    if last >= wan.preset.steps:
        raise MinicosError(f"sharing at step {last}: the run has steps 0 to {wan.preset.steps - 1}")
    guidance, guided = wan.preset.guidance, "uncond" in e.branches
    if guided and all(g == 1 for g in guidance.values()):
        raise MinicosError(
            "at guidance 1 there is no unconditional pass to share states in: share in the "
            "conditional one"
        )
    chosen = (
        torch.arange(len(noise))
        if e.carrier is None
        else torch.arange(e.carrier, len(noise), e.seeds)
    )
    found: dict[tuple[str, str], Tensor] = {}
    ahead, inside = NO_HOOKS, hooks(e, wan.ops) if e.mode in ONE_PASS else NO_HOOKS
    if e.mode in TWO_PASS:
        ahead, inside = two_passes(e, found, wan.ops)
    # the first pass needs no uncond branch if only cond is shared
    first = wan if guided else wan.with_preset(guidance=dict.fromkeys(guidance, 1.0))
    x, state = noise, None
    for i in range(last + 1):
        if i in e.steps and e.mode in TWO_PASS:
            next(first.sample(condition, noise=x, hooks=watch + ahead, start=i, state=state))
            if i == last:  # the second pass of the last shared step belongs to the carriers already
                condition, x, state = (
                    condition.take(chosen),
                    x[chosen.to(x.device)],
                    state and state.take(chosen),
                )
                found.update({name: h[chosen.to(h.device)] for name, h in found.items()})
        step = next(wan.sample(condition, noise=x, hooks=watch + inside, start=i, state=state))
        x, state = step.next, step.state
        if i in e.steps and e.mode in BETWEEN_STEPS:
            x, state = condition.impose(edit(step, e, wan.ops)), state.edited()
    if len(x) != len(chosen):
        condition, x, state = (
            condition.take(chosen),
            x[chosen.to(x.device)],
            state and state.take(chosen),
        )
    for step in wan.sample(condition, noise=x, hooks=watch, start=last + 1, state=state):
        x = step.next
    return x


class Passes:
    """A hook that counts samples through the network: the cost of the runs it watches."""

    def __init__(self):
        self.count = 0
        self.hooks = Hooks().on("velocity", self._add)

    def _add(self, x: Tensor, site: Site) -> None:
        self.count += len(x)
