"""At which layer is the prompt turned into an answer? Hidden states of run A are put into run B (paper, Sec. 5.2 and Fig. 6b).

A and B share picture and noise and differ in the prompt ("circle the cat", "circle the bicycles"). At layers k and steps S, run B
computes with A's state instead of its own and goes on from there, later layers included. Does it end at A's answer or at B's?

Definition. y is the latent B ends at, A and B are those of the undisturbed runs, t = <y - B, A - B> / ||A - B||^2. Reported are
    flip        2t - 1: -1 where B stays B, +1 where it became A
    off_axis    ||y - B - t (A - B)|| / ||A - B||: what became neither; flip means little where this is not small
    leverage    |dsigma| ||dv|| / ||x|| at the first swapped step, dv the change of the guided velocity (g times that of the prompted
                branch): how far one step can move the latent at all
and, where pictures can be read, the rates of A, B and neither, with the layer at which `flip` crosses 0 and the rate of A crosses 1/2.

What is true by construction, so no finding:
- The whole stream after the last block *is* A's velocity: over all steps the run ends at A, flip = 1, whatever the model. A curve over
  layers ends there; the finding is where it turns.
- Whole streams of several layers: only the last of them counts.
- Donor `own` hands over A's latent together with A's reading of the prompt. From the second step on the two latents differ, so that even
  a swap of the patch embedding, which no prompt has touched, disturbs B. At step 0 the two donors are one, since the noise is shared.
- Donor `same_x` at block k, whole stream, is B with the prompt of A in blocks 0..k, bit for bit: what it measures is where the prompt is
  *read*. (It is computed that way: keys and values of the text depend on no latent, so one run of A serves all layers.)
- One Euler step of 50 at high noise moves the latent by well under 1 %, at every layer: look at `leverage` before reading step 0 alone.

Where the paper is silent each reading is an option: what is swapped (`WHAT`), block output or input, donor (`DONORS`), branch, which tokens
(`REGIONS`). Controls (`CONTROLS`): A = B (difference exactly 0), another case's A, another case's prompt, a random direction of equal norm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from minicos import puzzles
from minicos.analysis import cases, figures
from minicos.analysis.cases import Case
from minicos.analysis.probe import Probe
from minicos.analysis.stats import Interval, bootstrap
from minicos.condition import Condition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.media import save_video
from minicos.pipeline import Wan
from minicos.runs import Run
from minicos.sample import Step

WHAT = (
    "stream",
    "update",
    "self_attn",
    "cross_attn",
    "ffn",
)  # h_k, h_k - h_{k-1}, a sub-layer's output (before its gate)
DONORS = ("own", "same_x")  # A on its own trajectory, or prompt A at B's latent
REGIONS = ("all", "objects", "background")  # which tokens, by the objects of the first frame
CONTROLS = ("null", "wrong", "shuffled", "random")
EMBED = -1  # the layer before block 0: the patch embedding, which no prompt has touched
A, B, NEITHER, UNREAD = range(4)  # what a video shows
States = dict[tuple[str, str], Tensor]  # (point, branch) -> the donor's tensor at the present step


@dataclass(frozen=True)
class Swap:
    """What is swapped, where and when: an intervention that knows nothing of a model or of cases."""

    layers: tuple[int, ...]  # blocks from 0; EMBED is allowed for a stream
    steps: range
    what: str = "stream"  # of WHAT; or "prompt": keys and values of the text in blocks 0..k, see `lockstep`
    at: str = "output"  # of the block, or its "input", which is the output of the one before
    branch: str | None = "cond"  # None: both
    region: Tensor | None = None  # tokens that are swapped, bool l or b l; None: all
    random: bool = False  # control: B's own state, moved as far as A's is away but in a random direction

    def __post_init__(self):
        if self.what not in (*WHAT, "prompt") or self.at not in ("output", "input"):
            raise MinicosError(f"a swap is of {', '.join(WHAT)}, at output or input; not {self.what!r} at {self.at!r}")
        if self.at == "input" and self.what != "stream":
            raise MinicosError(f"only a stream can be swapped at a block's input, not {self.what}")
        lowest = 0 if self.at == "input" or self.what not in ("stream", "prompt") else EMBED
        if not self.layers or min(self.layers) < lowest:
            raise MinicosError(f"a swap of {self.what} needs layers from {lowest} on, not {list(self.layers)}")
        if not self.steps or self.steps.step != 1:
            raise MinicosError(f"a swap needs a range of steps, not {self.steps}")

    @property
    def whole_stream(self) -> bool:
        return self.what == "stream" and self.region is None and not self.random

    def record(self, states: States) -> Hooks:
        """Hooks for run A: keep what will be swapped in `states`, where each step overwrites the one before."""

        def keep(x: Tensor, site: Site) -> None:
            states[site.name, site.branch] = x

        names = {name for layer in self.layers for name in self._points(layer)}
        return sum((Hooks().on(name, keep, step=self.steps, branch=self.branch) for name in sorted(names)), NO_HOOKS)

    def hooks(self, states: States) -> Hooks:
        """Hooks for run B: put in what `record` kept of the same step."""
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

        for layer in sorted(self.layers):  # in this order `own` holds what an earlier layer's swap has left
            points = self._points(layer)
            rules = dict.fromkeys(points, put)
            if self.what == "update":
                rules = {points[0]: remember, points[1]: put_update(points[0])}
            for point, hook in rules.items():
                hooks = hooks.on(point, hook, step=self.steps, branch=self.branch)
        return hooks

    def _points(self, layer: int) -> tuple[str, ...]:
        """The hook points that a swap at a layer replaces; for an update, the one that it starts from and the one it replaces."""
        if self.what == "prompt":
            return tuple(f"blocks.{i}.cross_attn.{name}" for i in range(layer + 1) for name in "kv")
        if self.what in ("self_attn", "cross_attn", "ffn"):
            return (f"blocks.{layer}.{self.what}",)
        if self.what == "update":
            return _output(layer - 1), _output(layer)
        return (_output(layer - (self.at == "input")),)

    def _put(self, own: Tensor, donated: Tensor, site: Site) -> Tensor:
        if self.random:
            draw = torch.Generator().manual_seed(crc32(f"{site.name} {site.step} {site.branch}".encode()))
            direction = torch.randn(own.shape, generator=draw).to(own)
            length = (donated - own).norm(dim=-1, keepdim=True)  # of every token
            donated = own + length * direction / direction.norm(dim=-1, keepdim=True)
        if self.region is not None:
            donated = torch.where(self.region.to(own.device)[..., None], donated, own)
        return donated


def _output(layer: int) -> str:
    return "embed" if layer == EMBED else f"blocks.{layer}"


def lockstep(
    wan: Wan, give: Condition, take: Condition, noise: Tensor, swaps: Sequence[Swap], *, donor: str = "own",
    x: Tensor | None = None, start: int = 0,
) -> Iterator[list[Step]]:  # fmt: skip
    """Run B once for each swap, all in step with their donor: at every step, the list of B's steps (one for each swap).

    give, take  the conditions of A and B; both start from `noise`
    swaps       over the same steps. Under donor `own` they share one run of A, under `same_x` each has a pass of A at its own latent
                (whole streams excepted: see the top)
    x, start    B's undisturbed latent entering step `start` (at most the first swapped step), so that nothing is computed twice
    No more than one step's states of A are kept.
    """
    steps, total = swaps[0].steps, len(wan.schedule())
    if donor not in DONORS or any(swap.steps != steps for swap in swaps):
        raise MinicosError(f"swaps in lockstep need equal steps and a donor of {', '.join(DONORS)}, not {donor!r}")
    if steps.start < start or steps.stop > total:
        raise MinicosError(f"steps {steps.start} to {steps.stop - 1} are not among the steps {start} to {total - 1}")
    x = noise if x is None else x
    if donor == "same_x" and _same_but_text(give, take) and all(swap.whole_stream for swap in swaps):
        # A and B part only in the text: its keys and values, which no latent enters, carry all of A into a block's stream.
        outputs = [max(swap.layers) - (swap.at == "input") for swap in swaps]
        swaps = [Swap((k,), steps, "prompt", branch=s.branch) for k, s in zip(outputs, swaps, strict=True)]
        donor = "own"
    if donor == "own":
        stores = [{}] * len(swaps)
        record = sum((swap.record(stores[0]) for swap in swaps), NO_HOOKS)
        gives = [islice(wan.sample(give, noise=noise, hooks=record), start, None)]  # A is at step `start` too
    else:
        stores = [{} for _ in swaps]
        gives = [
            wan.sample(give, noise=x, start=start, hooks=swap.record(s)) for swap, s in zip(swaps, stores, strict=True)
        ]
    takes = [wan.sample(take, noise=x, start=start, hooks=swap.hooks(s)) for swap, s in zip(swaps, stores, strict=True)]
    for index in range(start, total):
        given = [next(run) for run in gives] if index < steps.stop else []
        taken = [next(run) for run in takes]
        if donor == "same_x":
            for a, b in zip(given, taken, strict=False):
                a.next = b.next
        yield taken


def _same_but_text(a: Condition, b: Condition) -> bool:
    """Whether two conditions agree in everything but the prompt."""
    fields = {name: (value, vars(b)[name]) for name, value in vars(a).items() if name != "text"}
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x is y or x == y
        for x, y in fields.values()
    )


def flip(y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Where y lies between b and a (all b c f h w): 2t - 1 and the off-axis share, each (b,); NaN where a = b.

    Imposed frames are equal in all three and count for nothing.
    """
    y, axis = (y.double() - b.double()).flatten(1), (a.double() - b.double()).flatten(1)
    squared = axis.square().sum(1)
    t = (y * axis).sum(1) / squared
    return 2 * t - 1, (y - t[:, None] * axis).norm(dim=1) / squared.sqrt()


def leverage(swapped: Step, velocity: Tensor) -> Tensor:
    """|dsigma| ||dv|| / ||x||: how far the swap moves the latent in this step, of its norm; `velocity` is B's own at this x. (b,)"""
    moved = (swapped.velocity - velocity).flatten(1).norm(dim=1) * abs(swapped.sigma_next - swapped.sigma)
    return moved / swapped.x.flatten(1).norm(dim=1)


def tokens(mask: np.ndarray, grid: tuple[int, int, int]) -> Tensor:
    """A mask of pixels bool (H W) as a mask of tokens bool (l), alike in all frames: a token counts if any of its pixels does."""
    f, h, w = grid
    pooled = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(mask)[None].float(), (h, w))[0] > 0
    return pooled.flatten().repeat(f)


def crossing(
    layers: Sequence[int], curves: np.ndarray, level: float, *, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """The layer at which the mean of curves (n layers) first reaches `level`, between layers by a straight line; inf where never.

    The interval is that of the mean curve over resampled rows, one row for each puzzle.
    """
    n, rng = len(curves), np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), size=resamples)
    at = _crossing(layers, np.concatenate([curves.mean(0)[None], counts @ curves / n]), level)
    low, high = np.quantile(at[1:], [0.025, 0.975], method="nearest")
    return Interval(float(at[0]), float(low), float(high), n)


def _crossing(layers: Sequence[int], curves: np.ndarray, level: float) -> np.ndarray:
    """For each curve (rows layers), the layer where it first reaches `level`."""
    x = np.asarray(layers, dtype=np.float64)
    reached = curves >= level
    first = reached.argmax(1)
    row, before = np.arange(len(curves)), np.maximum(first - 1, 0)
    high, low = curves[row, first], curves[row, before]
    share = np.where(first > 0, (high - level) / np.where(high > low, high - low, 1), 0)
    return np.where(reached.any(1), x[first] - share * (x[first] - x[before]), np.inf)


# -- subjects ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One picture and noise with two prompts: `a` gives, `b` receives."""

    a: Case
    b: Case
    objects: np.ndarray | None = None  # where they stand in the first frame, bool H W
    shows: tuple[Callable[[np.ndarray], bool], ...] = ()  # whether a video (F H W 3) shows A's answer, and B's

    @property
    def image(self) -> Tensor | None:
        return self.b.image

    def turned(self) -> "Pair":
        return replace(self, a=self.b, b=self.a, shows=self.shows[::-1])

    def read(self, video: np.ndarray) -> int:
        """What a video shows: A, B, NEITHER (or both), or UNREAD where nobody can tell."""
        if not self.shows:
            return UNREAD
        a, b = (shows(video) for shows in self.shows)
        return A if a and not b else B if b and not a else NEITHER


def pairs(kind: str, n: int, *, size: int = 4, split: str = "test", seed: int = 0) -> list[Pair]:
    """The first n distinct puzzles of a split as B, each with another prompt for its picture as A.

    A video shows an answer when its last frame does. Raises MinicosError for puzzles that admit one prompt only.
    """
    made = []
    for i, case in enumerate(cases.held_out(kind, n, size=size, split=split, seed=seed)):
        others = case.puzzle.variants()
        if not others:
            raise MinicosError(f"a swap needs two prompts for one picture, and {kind} has one: take mark or goal")
        other = Case.of(others[i % len(others)], case.seed)
        made.append(Pair(other, case, case.puzzle.foreground(), (_answers(other.puzzle), _answers(case.puzzle))))
    return made


def probes(n: int, height: int, width: int, *, seed: int = 0) -> list[Pair]:
    """n drawn pictures with a prompt for each of their two classes, for any image-to-video model."""
    made = []
    for i in range(n):
        probe = Probe.sample(Random(f"probe/{height}/{width}/{i}"), height, width)
        image = torch.from_numpy(probe.image()).permute(2, 0, 1).float() / 255
        a, b = probe.kinds if i % 2 else probe.kinds[::-1]
        made.append(
            Pair(
                Case(probe.prompt(a), image, seed + i),
                Case(probe.prompt(b), image, seed + i),
                probe.mask(),
                (probe.shows(a), probe.shows(b)),
            )
        )
    return made


def _answers(puzzle: puzzles.Puzzle) -> Callable[[np.ndarray], bool]:
    return lambda video: puzzle.score(video).answer is not None


def donors(made: Sequence[Pair], control: str | None) -> list[Case]:
    """The case that gives to each pair's b: a itself, or what a control takes in its place (the noise is b's in any case).

    null      b itself: nothing may change, to the last bit
    wrong     the a of the next pair: another picture (of the same size) and its prompt
    shuffled  this picture with the a prompt of the next pair that asks for neither a nor b; of the next pair, where all do
    random    a; its states are then replaced by random ones at the same distance (`Swap.random`)
    """
    if control == "null":
        return [pair.b for pair in made]
    if control in (None, "random"):
        return [pair.a for pair in made]
    if control not in CONTROLS:
        raise MinicosError(f"no control {control!r}: one of {', '.join(CONTROLS)}")
    following = [_others(made, i) for i in range(len(made))]
    if not all(following):
        raise MinicosError(f"the control {control!r} takes its donor from another picture, and there is only one")
    if control == "wrong":
        return [others[0].a for others in following]
    third = [
        next((o.a.prompt for o in others if o.a.prompt not in (pair.a.prompt, pair.b.prompt)), others[0].a.prompt)
        for pair, others in zip(made, following, strict=True)
    ]
    return [replace(pair.b, prompt=prompt, puzzle=None) for pair, prompt in zip(made, third, strict=True)]


def _others(made: Sequence[Pair], i: int) -> list[Pair]:
    """The pairs behind pair i, then those before it, without pair i turned around."""
    pair = made[i]
    return [other for other in (*made[i + 1 :], *made[:i]) if other.b is not pair.b and other.b is not pair.a]


# -- measuring --------------------------------------------------------------------------------------------------------


def undisturbed(wan: Wan, made: Sequence[Pair], starts: Sequence[int]) -> dict[str, Tensor]:
    """Both runs of each pair, first axis pairs: where they end, what that shows, and B's latent and velocity at `starts`."""
    out, ends = {}, {}
    for name in ("a", "b"):
        condition = cases.condition(wan, [getattr(pair, name) for pair in made])
        noise = cases.noise(wan, condition, [pair.b for pair in made])
        kept = {}
        for step in wan.sample(condition, noise=noise):
            if step.index in starts:
                kept[step.index] = step.x, step.velocity
        ends[name] = step.next
    out["x"], out["velocity"] = (torch.stack([kept[i][k] for i in starts], dim=1) for k in (0, 1))
    return out | ends | {f"{name}.answer": read(wan, ends[name], made) for name in ends}


def measure(
    wan: Wan, made: Sequence[Pair], given: Sequence[Case], plain: Mapping[str, Tensor], swaps: Sequence[Swap], *,
    donor: str = "own", index: int = 0,
) -> tuple[dict[str, Tensor], list[Tensor]]:  # fmt: skip
    """Everything reported of some swaps in some pairs, each (pairs swaps), and B's final latents, one for each swap.

    given         the donors' cases (`donors`)
    plain, index  the pairs' `undisturbed` runs, and which of its starts is the swaps' first step
    """
    take = cases.condition(wan, [pair.b for pair in made])
    give = cases.condition(wan, given)
    noise = cases.noise(wan, take, [pair.b for pair in made])
    first = swaps[0].steps.start
    resumed = wan.preset.solver == "euler"  # others have a history, and dropping it is a change of its own
    x, start = (plain["x"][:, index].to(noise), first) if resumed else (noise, 0)
    for steps in lockstep(wan, give, take, noise, swaps, donor=donor, x=x, start=start):
        if steps[0].index == first:
            moved = [leverage(step, plain["velocity"][:, index].to(noise)) for step in steps]
    ends = [step.next for step in steps]
    flips, off_axis = zip(*(flip(y, plain["a"].to(y), plain["b"].to(y)) for y in ends), strict=True)
    out = {
        "flip": torch.stack(flips, 1),
        "off_axis": torch.stack(off_axis, 1),
        "leverage": torch.stack(moved, 1),
        "changed": torch.stack([(y - plain["b"].to(y)).abs().flatten(1).amax(1) for y in ends], 1),
        "answer": torch.stack([read(wan, y, made) for y in ends], 1),
    }
    return out, ends


def read(wan: Wan, latent: Tensor, made: Sequence[Pair]) -> Tensor:
    """What each pair's final latent shows, int64 (b,); nothing is decoded where nobody can tell."""
    if not any(pair.shows for pair in made):
        return torch.full((len(made),), UNREAD)
    return torch.tensor([pair.read(video) for pair, video in zip(made, wan.decode(latent), strict=True)])


@dataclass(frozen=True)
class Plan:
    """A sweep: every layer by itself, over every range of steps, from every donor, and some layers again for each control."""

    layers: tuple[int, ...]
    ranges: tuple[range, ...]
    donors: tuple[str, ...] = ("own",)
    what: str = "stream"
    at: str = "output"
    branch: str | None = "cond"
    region: str = "all"  # of REGIONS
    controls: tuple[str, ...] = ()
    control_layers: tuple[int, ...] = ()  # (): all of them

    @property
    def arms(self) -> list["Arm"]:
        """At step 0 alone both donors are one (equal noise, equal latent): it is measured once."""
        return [
            Arm(steps, donor, control)
            for steps in self.ranges
            for donor in (self.donors[:1] if steps == range(1) else self.donors)
            for control in (None, *self.controls)
        ]

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
                f"the region {self.region!r} needs pictures that know their objects: a puzzle or a probe"
            )
        if len({None if pair.image is None else tuple(pair.image.shape) for pair in made}) > 1:
            raise MinicosError("the pictures of a sweep must have one size")

    def swaps(self, arm: "Arm", region: Tensor | None) -> list[Swap]:
        """One for each layer of an arm."""
        rest = (self.what, self.at, self.branch, region, arm.control == "random")
        return [Swap((layer,), arm.steps, *rest) for layer in self.layers_of(arm)]

    def layers_of(self, arm: "Arm") -> tuple[int, ...]:
        return (self.control_layers or self.layers) if arm.control else self.layers


@dataclass(frozen=True)
class Arm:
    """One curve over layers."""

    steps: range
    donor: str
    control: str | None = None

    @property
    def name(self) -> str:
        """ "steps 0-19 own" or "step 0 own null"."""
        steps = f"step {self.steps[0]}" if len(self.steps) == 1 else f"steps {self.steps[0]}-{self.steps[-1]}"
        return " ".join([steps, self.donor, *([self.control] if self.control else [])])

    @property
    def file(self) -> str:
        return self.name.replace(" ", "_")


def sweep(wan: Wan, run: Run, plan: Plan, made: Sequence[Pair], most: int = 25) -> dict[Arm, dict[str, np.ndarray]]:
    """Measure every arm of a plan: {"flip", "off_axis", "leverage", "changed", "answer"}, each (pairs layers); under Arm's key None
    the `undisturbed` runs. Batches that `run` holds are not computed again. Of the first pair all videos are kept to look at.
    """
    plan.check(made)
    work = [range(i, min(i + most, len(made))) for i in range(0, len(made), most)]
    starts = sorted({steps.start for steps in plan.ranges})

    def chosen(of: Sequence, rows: Sequence[int]) -> list:
        return [of[i] for i in rows]

    def compute_plain(rows: range) -> dict[str, Tensor]:
        out = undisturbed(wan, chosen(made, rows), starts)
        if 0 in rows:
            _keep(wan, run, "undisturbed", {name: out[name] for name in ("b", "a")})
        return out

    plain = cases.collect(run, "undisturbed", work, compute_plain)
    results: dict[Arm | None, dict[str, np.ndarray]] = {None: plain}
    for arm in plan.arms:
        given = donors(made, arm.control)

        def compute(rows: range, arm: Arm = arm, given: Sequence[Case] = given) -> dict[str, Tensor]:
            batch = chosen(made, rows)
            swaps = plan.swaps(arm, _region(wan, plan.region, batch))
            before = {name: torch.from_numpy(values[rows.start : rows.stop]) for name, values in plain.items()}
            index = starts.index(arm.steps.start)
            out, ends = measure(wan, batch, chosen(given, rows), before, swaps, donor=arm.donor, index=index)
            if 0 in rows and not arm.control:
                layers = plan.layers_of(arm)
                _keep(wan, run, arm.file, {f"layer_{_layer(k)}": y for k, y in zip(layers, ends, strict=True)})
            return out

        results[arm] = cases.collect(run, arm.file, work, compute)
    return results


def _region(wan: Wan, name: str, made: Sequence[Pair]) -> Tensor | None:
    """The tokens that are swapped in each pair, bool (b, l); None for all."""
    if name == "all":
        return None
    shape, patch = cases.condition(wan, [pair.b for pair in made]).shape, wan.experts["high"].cfg.patch_size
    grid = tuple(size // p for size, p in zip(shape[2:], patch, strict=True))
    inside = torch.stack([tokens(pair.objects, grid) for pair in made])
    return inside if name == "objects" else ~inside


def _keep(wan: Wan, run: Run, name: str, latents: Mapping[str, Tensor]) -> None:
    """The first sample of each latent as a video, and all their last frames for the picture of `draw`."""
    last = {}
    for label, latent in latents.items():
        video = wan.decode(latent[:1])[0]
        save_video(run.path(f"videos/{name}/{label}.mp4"), video, fps=wan.preset.fps)
        last[label] = torch.from_numpy(video[-1])
    run.save_tensors(f"last/{name}.safetensors", last)


# -- telling ----------------------------------------------------------------------------------------------------------


def table(plan: Plan, results: Mapping[Arm | None, Mapping[str, np.ndarray]], pictures: int) -> list[dict]:
    """A line for each arm and layer: means with intervals over pictures (rows beyond `pictures` are the same ones turned)."""

    def over(values: np.ndarray) -> Interval:
        return bootstrap(by_picture(values, pictures))

    lines = []
    for arm in plan.arms:
        found = results[arm]
        scored = bool((found["answer"] != UNREAD).all())
        for j, layer in enumerate(plan.layers_of(arm)):
            line = {"arm": arm.name, "layer": layer, "flip": over(found["flip"][:, j])}
            line |= {name: float(np.mean(found[name][:, j])) for name in ("off_axis", "leverage")}
            line["changed"] = float(found["changed"][:, j].max())
            if scored:
                line |= {
                    name: over(found["answer"][:, j] == k) for name, k in (("A", A), ("B", B), ("neither", NEITHER))
                }
            lines.append(line)
    return lines


def turns(plan: Plan, results: Mapping[Arm | None, Mapping[str, np.ndarray]], pictures: int) -> list[dict]:
    """For each arm without a control, the layer at which the answer turns: by `flip` and, where pictures are read, by the rate of A."""
    lines = []
    for arm in plan.arms:
        if arm.control is None:
            found, line = results[arm], {"arm": arm.name}
            line["flip"] = crossing(plan.layers, by_picture(found["flip"], pictures), 0.0)
            if (found["answer"] != UNREAD).all():
                line["A"] = crossing(plan.layers, by_picture(found["answer"] == A, pictures), 0.5)
            lines.append(line)
    return lines


def by_picture(values: np.ndarray, pictures: int) -> np.ndarray:
    """Rows (pictures, or twice as many: both directions) averaged over directions, so that a picture counts once."""
    return np.asarray(values, dtype=np.float64).reshape(-1, pictures, *values.shape[1:]).mean(0)


def draw(plan: Plan, results: Mapping[Arm | None, Mapping[str, np.ndarray]], pictures: int, run: Run) -> list[str]:
    """The pictures: flip (and rates) over layers with controls, layers x ranges as a map, the first pair's last frames."""
    lines, names = table(plan, results, pictures), []
    measures = [("flip", "flip: −1 stays B, +1 becomes A")]
    measures += [("A", "rate of A's answer")] * ("A" in lines[0])
    for arm in plan.arms:
        if arm.control is None:
            mine = [arm, *(replace(arm, control=control) for control in plan.controls)]
            for measure_, label in measures:
                curves = {
                    a.control or plan.what: [(x["layer"], x[measure_]) for x in lines if x["arm"] == a.name]
                    for a in mine
                }
                names.append(f"{measure_}_{arm.file}.png")
                figures.errorbars(
                    run.path(names[-1]),
                    {
                        name: [(layer, i.effect, i.low, i.high) for layer, i in points]
                        for name, points in curves.items()
                    },
                    x="layer (−1: patch embedding)" if EMBED in plan.layers else "layer",
                    y=label,
                    level={"flip": 0.0, "A": 0.5}[measure_],
                    title=f"{plan.what} of A put into B, {arm.name}; 95 % over {pictures} pictures",
                )
    effects = [arm for arm in plan.arms if arm.control is None]
    layers = [_layer(k) for k in plan.layers]
    if len(effects) > 1:
        for measure_, label in measures:
            values = [[x[measure_].effect for x in lines if x["arm"] == arm.name] for arm in effects]
            names.append(f"{measure_}_map.png")
            figures.matrix(
                run.path(names[-1]), np.array(values), rows=[arm.name for arm in effects], columns=layers,
                limits={"flip": (-1, 1), "A": (0, 1)}[measure_], title=f"{plan.what} of A put into B at a layer (across): {label}",
            )  # fmt: skip
    plain = run.load_tensors("last/undisturbed.safetensors")
    shown = figures.evenly(len(plan.layers), 12)
    images = []
    for arm in effects:
        last = run.load_tensors(f"last/{arm.file}.safetensors")
        images.append([plain["b"], *(last[f"layer_{layers[i]}"] for i in shown), plain["a"]])
    figures.sheet(
        run.path("last_frames.png"), [[image.numpy() for image in row] for row in images],
        rows=[arm.name for arm in effects], columns=["B", *(layers[i] for i in shown), "A"],
        title="Last frames: B undisturbed, B with A's state at a layer, A undisturbed",
    )  # fmt: skip
    return ["last_frames.png", *names]


def _layer(k: int) -> str:
    return "embed" if k == EMBED else str(k)
