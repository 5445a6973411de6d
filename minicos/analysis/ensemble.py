"""Do several seeds decide better together? States of the middle blocks averaged over seeds, early (paper, Sec. 6).

Definition. T seeds of one case (3) are denoised; at the steps S ({0}) the residual stream h_k behind the blocks k of a window (20..29
of 40) is shared between them; then one trajectory, the `carrier`, is finished, or all are. The paper leaves open what "averaging the
latents of layers 20-29" replaces, so each reading is a mode:

    override        independent passes give h_k for each seed; in a second pass h_k := mean over seeds
    input_override  the same, literally as pseudo-code: the *input* of block k := mean of its outputs. Each block of the window runs
                    on its own output, an effect of its own: T = 1 is its control
    lockstep        h_k := mean over seeds while the seeds go through the blocks together
    update          h_k := h_{k-1} + mean of (h_k - h_{k-1}): seeds keep their streams and share what the blocks add
    mix             h_k := (1 - alpha) h_k + alpha mean: from the plain run (0) to lockstep (1)
    x0, latent      rivals without a layer, between steps: the clean estimates, or the latents that leave the step, averaged

Trivial by construction (each a test): `override` and `input_override` discard what stood before, so only the window's last layer counts,
and a window that ends with the network averages velocities; after `lockstep`'s first layer all seeds carry one stream, so only that
one counts: override over a..b is lockstep at b alone. Under both the seeds share one cond velocity for that step and differ through x
and the uncond pass. Only `update` and `mix` use the whole window. At step 0 of 50 an Euler step moves the latent by 0.4 % of
the noise, so little can follow directly: read D beside the gain.

`keep_norm` (ours): a mean of T states is shorter than they are; it is scaled to their mean norm, token by token (latents: frame by frame).
`branches` says in which passes of guidance states are shared (the paper does not), the conditional one by default.

Cost in network passes per case and branch, N steps, S = {0}: T + N - 1, and T + N for the modes of two passes; all trajectories
finished: T N, and T (N + 1). Measured by `Passes`. A plain run takes N; best of T and a vote take T N.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

from minicos.analysis import cases, stats
from minicos.analysis.cases import Case
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.ops import REFERENCE, Ops
from minicos.pipeline import Wan
from minicos.runs import Run
from minicos.sample import Step
from minicos.schedule import Memory

TWO_PASS, ONE_PASS, BETWEEN_STEPS = ("override", "input_override"), ("lockstep", "update", "mix"), ("x0", "latent")
MODES = TWO_PASS + ONE_PASS + BETWEEN_STEPS
DONORS = ("own", "others", "random")
APART = 1_000_000  # between the noise seeds of a case's T runs, since neighbouring cases have neighbouring seeds


@dataclass(frozen=True)
class Ensemble:
    """Which states are shared, when, and between whom."""

    layers: Sequence[int] = ()  # blocks, ascending; see `window`. None for the modes between steps
    mode: str = "override"
    steps: Sequence[int] = (0,)
    seeds: int = 3  # T
    alpha: float = 1.0  # of mix
    keep_norm: bool = False
    branches: Sequence[str] = ("cond",)
    carrier: int | None = 0  # the seed whose trajectory is finished; None: all of them
    donors: str = "own"  # the controls of `share`: "others", "random"

    def __post_init__(self):
        if self.mode not in MODES or self.donors not in DONORS:
            raise MinicosError(f"an ensemble has a mode of {', '.join(MODES)} and donors of {', '.join(DONORS)}")
        if self.seeds < 1 or (self.carrier is not None and not 0 <= self.carrier < self.seeds):
            raise MinicosError(f"{self.seeds} seeds have no carrier {self.carrier}: count from 0")
        if bool(self.layers) == (self.mode in BETWEEN_STEPS) or not self.steps or min(self.steps) < 0:
            raise MinicosError(f"mode {self.mode} at steps {list(self.steps)} cannot share layers {list(self.layers)}")
        if self.alpha != 1 and self.mode != "mix":
            raise MinicosError(f"alpha belongs to mode mix, not to {self.mode}")

    @property
    def counting(self) -> tuple[int, ...]:
        """The layers that decide the result, by algebra."""
        layers = tuple(self.layers)
        return layers[-1:] if self.mode in TWO_PASS else layers[:1] if self.mode == "lockstep" else layers


def window(first: int, last: int, depth: int, of: int = 40) -> tuple[int, ...]:
    """Blocks first..last of a network of `of` blocks, at the same relative depth of one of `depth`, at least one block.

    20..29 of 40 stays itself at depth 40, and is 15..22 at depth 30 and 6..8 at depth 12.
    """
    if not 0 <= first <= last < of:
        raise MinicosError(f"window {first}-{last}: blocks are counted from 0 to {of - 1}")
    begin = min((2 * first * depth + of) // (2 * of), depth - 1)  # rounded half up
    return tuple(range(begin, max(begin + 1, (2 * (last + 1) * depth + of) // (2 * of))))


# -- sharing ----------------------------------------------------------------------------------------------------------


def share(x: Tensor, e: Ensemble, ops: Ops = REFERENCE, draw: int = 0) -> Tensor:
    """Rows (case seed) l d, each replaced by what `e` makes of it and its case's other seeds; `draw` seeds the random control.

    The controls: "others" averages the seeds of T different cases, each keeping its own share in the mean; "random" moves every
    token by the distance that sharing would have moved it.
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
        return (x + direction * (_norm(y.float() - x.float(), ops) / _norm(direction, ops))).to(x.dtype)
    return y


def _norm(x: Tensor, ops: Ops) -> Tensor:
    return ops.token_energy(x).unsqueeze(-1)


def _strangers(count: int, seeds: int) -> Tensor:
    """An order of the rows (case seed) in which seed j of case c stands in the place of case c - j: no two of a group share a case."""
    if count < seeds:
        raise MinicosError(f"{seeds} seeds of different cases need a batch of {seeds} cases or more, not {count}")
    case, seed = torch.meshgrid(torch.arange(count), torch.arange(seeds), indexing="ij")
    return ((case + seed) % count * seeds + seed).flatten()


def hooks(e: Ensemble, ops: Ops = REFERENCE) -> Hooks:
    """The modes of one pass as hooks, for any run whose batch axis is (case seed). Two-pass and step modes need `run`."""
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


def _first_pass(e: Ensemble, found: dict[str, Tensor], ops: Ops) -> Hooks:
    """Keep the shared state of every layer of the window, under the names of branch and block."""

    def keep(x: Tensor, site: Site) -> None:
        found[f"{site.branch}.{site.name}"] = share(x, e, ops, _draw(site))

    rules = NO_HOOKS
    for k in e.layers:
        rules = _at(rules, f"blocks.{k}", keep, e)
    return rules


def _second_pass(e: Ensemble, found: Mapping[str, Tensor]) -> Hooks:
    """Put the kept states in: behind their blocks, or in front of them."""
    rules = NO_HOOKS
    for k in e.layers:

        def put(x: Tensor, site: Site, block: str = f"blocks.{k}") -> Tensor:
            return found[f"{site.branch}.{block}"].to(x.dtype)

        rules = _at(rules, f"blocks.{k}" if e.mode == "override" else _input(k), put, e)
    return rules


def _at(rules: Hooks, point: str, hook: Callable, e: Ensemble) -> Hooks:
    for branch in e.branches:
        rules = rules.on(point, hook, step=tuple(e.steps), branch=branch)
    return rules


def _input(k: int) -> str:
    """The point where the stream that enters block k is seen."""
    return f"blocks.{k - 1}" if k else "embed"


def _draw(site: Site) -> int:
    return 1000 * site.step + int(site.name.split(".")[1])


def edit(step: Step, e: Ensemble, ops: Ops = REFERENCE) -> Tensor:
    """The rivals between steps: the latent (case seed) c f h w that leaves the step, with clean estimates or latents shared.

    With a shared x0 the velocity is (x - x0) / sigma, and the step goes along it: exact for Euler, first order for the others.
    """

    def shared(x: Tensor) -> Tensor:  # one token for each frame
        return share(x.transpose(1, 2).flatten(2), e, ops, step.index).view_as(x.transpose(1, 2)).transpose(1, 2)

    if e.mode == "latent":
        return shared(step.next)
    return step.next + (step.sigma_next - step.sigma) / step.sigma * (step.x0 - shared(step.x0))


def run(wan: Wan, condition: Condition, noise: Tensor, e: Ensemble, *, watch: Hooks = NO_HOOKS) -> Tensor:
    """Denoise rows (case seed) c f h w; returns the final latents, one for each case, or all rows where there is no carrier.

    `watch` runs in every pass, before the ensemble's own hooks. Raises MinicosError where the run has no such step or block.
    """
    last = max(e.steps)
    if last >= wan.preset.steps:
        raise MinicosError(f"sharing at step {last}: the run has steps 0 to {wan.preset.steps - 1}")
    guidance, guided = wan.preset.guidance, "uncond" in e.branches
    if guided and all(g == 1 for g in guidance.values()):
        raise MinicosError(
            "at guidance 1 there is no unconditional pass to share states in: share in the conditional one"
        )
    chosen = torch.arange(len(noise)) if e.carrier is None else torch.arange(e.carrier, len(noise), e.seeds)
    inside = hooks(e, wan.ops) if e.mode in ONE_PASS else NO_HOOKS
    first = wan if guided else wan.with_preset(guidance=dict.fromkeys(guidance, 1.0))  # where cond alone shares
    x, memory = noise, None
    for i in range(last + 1):
        if i in e.steps and e.mode in TWO_PASS:
            found: dict[str, Tensor] = {}
            keep = watch + _first_pass(e, found, wan.ops)
            next(first.sample(condition, noise=x, hooks=keep, start=i, memory=memory))
            if i == last:  # the second pass of the last shared step is already the carriers' own
                condition, x, memory = rows(condition, chosen), x[chosen.to(x.device)], _rows(memory, chosen)
                found = {name: h[chosen.to(h.device)] for name, h in found.items()}
            inside = _second_pass(e, found)
        step = next(wan.sample(condition, noise=x, hooks=watch + inside, start=i, memory=memory))
        x, memory = step.next, step.memory
        if i in e.steps and e.mode in BETWEEN_STEPS:
            x, memory = condition.impose(edit(step, e, wan.ops)), None
    if len(x) != len(chosen):
        condition, x, memory = rows(condition, chosen), x[chosen.to(x.device)], _rows(memory, chosen)
    for step in wan.sample(condition, noise=x, hooks=watch, start=last + 1, memory=memory):
        x = step.next
    return x


def rows(condition: Condition, index: Tensor) -> Condition:
    """Some samples of a batch's condition, in the order of `index`, which may repeat them."""
    count = condition.shape[0]
    tensors = {f.name: getattr(condition, f.name) for f in fields(condition)}
    batched = {k: v[index.to(v.device)] for k, v in tensors.items() if isinstance(v, Tensor) and len(v) == count}
    return replace(condition, **batched, shape=(len(index), *condition.shape[1:]))


def _rows(memory: object, index: Tensor) -> object:
    if not isinstance(memory, Memory):
        return memory
    return Memory.from_state({k: v[index.to(v.device)] if v.ndim else v for k, v in memory.state().items()})


class Passes:
    """A hook that counts samples through the network: the cost of whatever it watches."""

    def __init__(self):
        self.count = 0
        self.hooks = Hooks().on("velocity", self._add)

    def _add(self, x: Tensor, site: Site) -> None:
        self.count += len(x)


# -- the experiment ---------------------------------------------------------------------------------------------------


def ablation(
    depth: int, windows: Sequence[tuple[int, int]], modes: Sequence[str], like: Ensemble
) -> dict[str, Ensemble]:
    """An arm for each mode and window (in blocks of 40), otherwise `like`; by name, e.g. "override 20-29 @0"."""
    return {
        f"{mode} {a}-{b} @{span(like.steps)}": replace(
            like, layers=window(a, b, depth), mode=mode, alpha=like.alpha if mode == "mix" else 1.0
        )
        for mode in modes
        for a, b in windows
    }


def controls(name: str, e: Ensemble) -> dict[str, Ensemble]:
    """The same arm with wrong donors, and with a random direction of equal norm (at the layers that count, so that it acts once)."""
    return {
        f"{name}, other cases": replace(e, donors="others"),
        f"{name}, random direction": replace(e, layers=e.counting, donors="random"),
    }


def rivals(like: Ensemble) -> dict[str, Ensemble]:
    """What could be averaged instead, at the same steps: clean estimates, and latents at their own norm."""
    common = {"layers": (), "alpha": 1.0, "donors": "own"}
    return {
        f"clean estimate @{span(like.steps)}": replace(like, **common, mode="x0", keep_norm=False),
        f"latent, norm kept @{span(like.steps)}": replace(like, **common, mode="latent", keep_norm=True),
    }


def span(steps: Sequence[int]) -> str:
    """Steps in words: 0, 0-4, or 0,2,5."""
    low, high = min(steps), max(steps)
    consecutive = len(steps) == high - low + 1 > 1
    return f"{low}-{high}" if consecutive else ",".join(map(str, steps))


def compare(wan: Wan, arms: Mapping[str, Ensemble], batch: Sequence[Case]) -> dict[str, Tensor]:
    """T plain runs of each case and every arm from the same noise. First axis: cases.

    "plain.*" has a second axis of T seeds; an arm's second axis is its carriers (1, or T). Keys, each behind the name of its arm:
    latent   of cases without a puzzle
    solved   of puzzles, 0 or 1
    moved    squared distance of the final latent to the plain one of the same seed; "plain.apart" is that of two plain runs
    passes   through the network, per case
    "plain.vote" is the run nearest to the others: of three runs of which two agree, one of those. A vote without a scorer.
    """
    (seeds,) = {e.seeds for e in arms.values()}
    single = cases.condition(wan, batch)
    condition = rows(single, torch.arange(len(batch)).repeat_interleave(seeds))
    noise = torch.stack([cases.noise(wan, single, batch, APART * j) for j in range(seeds)], dim=1).flatten(0, 1)
    out: dict[str, Tensor] = {}

    def note(name: str, latent: Tensor, counter: Passes) -> None:
        each = latent.unflatten(0, (len(batch), -1))
        repeated = [case for case in batch for _ in range(each.shape[1])]
        if batch[0].puzzle is None:
            out[f"{name}.latent"] = each
        else:
            solved = torch.tensor([score.solved for score in cases.scores(wan, latent, repeated)])
            out[f"{name}.solved"] = solved.view(each.shape[:2]).byte()
        out[f"{name}.passes"] = torch.full((len(batch),), counter.count / len(batch))

    counter = Passes()
    for step in wan.sample(condition, noise=noise, hooks=counter.hooks):
        final = step.next
    note("plain", final, counter)
    plain = final.unflatten(0, (len(batch), seeds))
    pairs = (plain[:, :, None].double() - plain[:, None].double()).square().sum(dim=(3, 4, 5, 6))  # case seed seed
    out["plain.vote"] = pairs.sum(2).argmin(1)
    out["plain.apart"] = pairs.sum(dim=(1, 2)) / max(1, seeds * (seeds - 1))
    for name, e in arms.items():
        counter = Passes()
        latent = run(wan, condition, noise, e, watch=counter.hooks)
        note(name, latent, counter)
        own = plain if e.carrier is None else plain[:, e.carrier : e.carrier + 1]
        out[f"{name}.moved"] = stats.squared(latent, own.flatten(0, 1)).sum(1).view(own.shape[:2])
    return out


@dataclass(frozen=True)
class Row:
    """One line of the result: an arm against the plain runs of the same seeds."""

    name: str
    rate: stats.Interval  # share of puzzles solved
    gain: stats.Interval  # paired difference to the plain carrier
    p: float  # sign-flip test
    p_holm: float | None  # corrected over the arms of the ablation; None for rivals and controls
    resolvable: float  # the gain that so many puzzles find, given the scatter (of one changed puzzle at least)
    distance: float | None  # D to the plain run: 0 the same video, 1 as different as another seed
    passes: float  # through the network, per puzzle


def result(data: Mapping, arms: Mapping[str, Ensemble], family: Sequence[str]) -> list[Row]:
    """The table: plain, the arms in order, then the rivals that choose among T plain runs. `family` is corrected together."""
    (carrier,) = {e.carrier for e in arms.values()}
    plain = data["plain.solved"].astype(float)
    seeds = plain.shape[1]
    passes = float(data["plain.passes"].mean())
    base = plain.mean(1) if carrier is None else plain[:, carrier]
    vote = plain[range(len(plain)), data["plain.vote"]]
    solved = {
        "plain (T = 1)": (base, passes / seeds, None),
        **{
            name: (data[f"{name}.solved"].mean(1), float(data[f"{name}.passes"].mean()), moved(data, name))
            for name in arms
        },
        f"vote among {seeds} plain runs": (vote, passes, None),
        f"best of {seeds} plain runs (oracle)": (plain.max(1), passes, None),
    }
    p = {name: stats.p_value(values - base) for name, (values, _, _) in solved.items()}
    corrected = dict(zip(family, stats.holm([p[name] for name in family]), strict=True))
    return [
        Row(
            name, stats.bootstrap(values), stats.paired(values, base), p[name], corrected.get(name),
            stats.resolvable(max(float((values - base).std()), len(base) ** -0.5), len(base)), distance, cost,
        )
        for name, (values, cost, distance) in solved.items()
    ]  # fmt: skip


def moved(data: Mapping, name: str) -> float | None:
    """D of an arm's final latents to the plain ones; None for T = 1.

    Pooled over cases: three seeds that give one answer are no yardstick of their own.
    """
    unit = float(data["plain.apart"].mean())
    return float(data[f"{name}.moved"].mean()) / unit if unit else None


def experiment(
    wan: Wan,
    folder: Run,
    arms: Sequence[Mapping[str, Ensemble]],
    dev: Sequence[Sequence[Case]],
    test: Sequence[Sequence[Case]],
) -> tuple[str, list[Row]]:
    """Choose an arm on batches of dev puzzles, report on batches of test puzzles; its name, and the table.

    `arms` holds an `ablation` for each set of steps, the paper's in front. On dev all are tried, and most puzzles solved decides
    (of equals the first; without dev puzzles the very first is taken). On test: the first ablation, the chosen arm, its controls
    and its rivals. Batches are kept in `folder` as they are finished.
    """
    candidates = {name: e for some in arms for name, e in some.items()}
    chosen = next(iter(candidates))
    if dev:
        data = cases.collect(folder, "dev", dev, partial(compare, wan, candidates))
        chosen = max(candidates, key=lambda name: data[f"{name}.solved"].mean())
    family = {**arms[0], chosen: candidates[chosen]}
    tried = {**family, **controls(chosen, candidates[chosen]), **rivals(candidates[chosen])}
    return chosen, result(cases.collect(folder, "test", test, partial(compare, wan, tried)), tried, list(family))
