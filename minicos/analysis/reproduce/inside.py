"""Inside the passes: energy, attention, swapped states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis import energy, report
from minicos.analysis.noise import results as sensitivity
from minicos.analysis.report import Section, difference, mean
from minicos.analysis.reproduce.subjects import SHORT, fewer, groups, untrained
from minicos.analysis.swap import results as swap_results
from minicos.analysis.swap import study as swap_study
from minicos.analysis.swap.pairs import CONTROLS, A, B, pairs
from minicos.analysis.tools import cases, figures
from minicos.analysis.tools.cases import Case, held_out
from minicos.hooks import Hooks, Site
from minicos.runs import Run
from minicos.wan import Wan


@dataclass
class Looking:
    """A hook on blocks: AUROC of each sample's token energy against the cells that the answer fills, b form layer."""

    batch: Sequence[Case]

    def __post_init__(self):
        self.found: list[Tensor] = []
        self.before: Tensor | None = None

    def hooks(self, step: int) -> Hooks:
        return (
            Hooks()
            .on("embed", self.begin, step=step, branch="cond")
            .on("blocks.*", self.keep, step=step, branch="cond")
        )

    def begin(self, x: Tensor, site: Site) -> None:
        self.before = x

    def keep(self, x: Tensor, site: Site) -> None:
        rows = []
        for h, before, case in zip(x, self.before, self.batch, strict=True):
            mask = energy.on_tokens(case.puzzle.answer_mask(0), site.grid)
            forms = h.float().norm(dim=-1), energy.centred(h), (h - before).float().norm(dim=-1)
            rows.append(energy.separation(torch.stack(forms).view(3, *site.grid).cpu(), mask))
        self.found.append(torch.tensor(rows))
        self.before = x


def looks(wan: Wan, step: int, batch: Sequence[Case]) -> dict[str, Tensor]:
    """AUROC b form layer at one step of the run."""
    condition, watch = cases.condition(wan, batch), Looking(batch)
    for made in wan.sample(
        condition, noise=cases.noise(wan, condition, batch), hooks=watch.hooks(step)
    ):
        if made.index == step:
            break
    return {"auroc": torch.stack(watch.found, dim=2)}


def energy_section(wan: Wan, run: Run, n: int) -> Section:
    step, work = wan.preset.steps // 2, groups(held_out("mark", n), 25)
    trained = cases.collect(run, "trained", work, partial(looks, wan, step))["auroc"]
    random = cases.collect(run, "untrained", work, partial(looks, untrained(wan), step))["auroc"]
    depth = trained.shape[2]
    third = max(1, depth // 3)
    early, late = trained[:, :, :third].mean(2), trained[:, :, -third:].mean(2)
    claims = []
    for k, form in enumerate(energy.FORMS):
        what, others = f"AUROC of the answer's cells, {form} energy", random[:, k, -third:].mean(1)
        claims += [
            difference(
                f"{what}: late minus early third of layers", late[:, k], early[:, k], "early layers"
            ),
            difference(
                f"{what}, late third: trained minus untrained",
                late[:, k],
                others,
                "untrained network",
            ),
        ]
    lines = {form: trained[:, k] for k, form in enumerate(energy.FORMS)} | {
        "centred, untrained": random[:, 1]
    }
    figures.bands(
        run.path("auroc.png"),
        {name: sensitivity.curve(values, np.arange(depth)) for name, values in lines.items()},
        x="layer",
        y="AUROC",
        title=f"Does token energy single out the answer? Step {step}, {n} puzzles",
        levels={"blind": 0.5},
    )
    reached = [
        ", ".join(f"{part[:, k].mean():.2f} ({form})" for k, form in enumerate(energy.FORMS))
        for part in (early, late)
    ]
    text = f"""\
"Mark the circle" and its like: the cell to be filled is known, and the AUROC says how well a layer's token energy tells its
tokens from the others at step {step} of {wan.preset.steps} (.5: blind; below: the answer's tokens have less; `minicos energy`).
Raw energy is the paper's, centred energy drops the mean token and massive channels, update is what a block writes. Any
network sees the picture and where objects are in it, so an untrained one is the control.

Early layers reach {reached[0]}; late ones {reached[1]}. The paper reads a turn from background to objects off maps of raw
energy: late minus early {claims[0]}."""
    return Section("Which tokens layers work on", text, tuple(claims), ("auroc.png",))


def weigh(wan: Wan, step: int, batch: Sequence[Case]) -> dict[str, Tensor]:
    """At one step, for every layer: share of cross-attention on padding (b layer), of later frames' attention on frame 0 (b layer)."""
    condition = cases.condition(wan, batch)
    words = condition.text.any(-1).sum(1)  # b
    held: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {"padding": [], "first": []}

    def hold(q: Tensor, site: Site) -> None:
        held["q"] = q

    def keep(k: Tensor, site: Site) -> None:
        text = ".cross_attn." in site.name
        received, between = wan.ops.attention_mass(
            held.pop("q"), k, frames=1 if text else site.grid[0]
        )
        if text:
            share = (
                received.mean(1) / site.grid[0] / site.grid[1] / site.grid[2]
            )  # b t, of one query
            found["padding"].append(
                torch.stack([row[w:].sum() for row, w in zip(share, words, strict=True)])
            )
        else:
            found["first"].append(between.mean(1)[:, 1:, 0].mean(1))

    hooks = Hooks()
    for part in ("self_attn", "cross_attn"):
        hooks = hooks.on(f"blocks.*.{part}.q", hold, step=step, branch="cond").on(
            f"blocks.*.{part}.k", keep, step=step, branch="cond"
        )
    for made in wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=hooks):
        if made.index == step:
            break
    shares = {name: torch.stack(layers, dim=1) for name, layers in found.items()}
    return shares | {
        "uniform": 1 - words / condition.text.shape[1],
        "frames": torch.full((len(batch),), condition.shape[2]),
    }


def attention_section(wan: Wan, run: Run, n: int) -> Section:
    step, work = wan.preset.steps // 2, groups(held_out("mark", n), 25)
    trained = cases.collect(run, "trained", work, partial(weigh, wan, step))
    random = cases.collect(run, "untrained", work, partial(weigh, untrained(wan), step))
    padding, first, uniform = trained["padding"], trained["first"], trained["uniform"]
    claims = []
    for what, key, share in (
        ("cross-attention on padding rows", "padding", uniform),
        ("attention of later frames on the given one", "first", 1 / trained["frames"]),
    ):
        ours, others = trained[key].mean(1), random[key].mean(1)
        claims += [
            difference(f"{what}: minus uniform", ours, share, "uniform attention"),
            difference(f"{what}: trained minus untrained", ours, others, "untrained network"),
        ]
    at = np.arange(padding.shape[1])
    lines = {
        "on padding": padding,
        "on padding, untrained": random["padding"],
        "on frame 0": first,
        "on frame 0, untrained": random["first"],
    }
    figures.bands(
        run.path("attention.png"),
        {name: sensitivity.curve(values, at) for name, values in lines.items()},
        x="layer",
        y="share of attention",
        title=f"Attention on zero-padded text rows and on the given frame, step {step}",
        levels={"padding, uniform": float(uniform.mean())},
    )
    mass, others, given = (f"{values.mean():.2f}" for values in (padding, random["padding"], first))
    text = f"""\
Exact attention mass at step {step}, mean over heads, tokens and layers (`minicos attention`). Prompts are padded with zero rows,
and nothing is fixed by construction, since no mask hides them. They are {uniform.mean():.2f} of the rows and receive {mass} of
the mass, in an untrained network {others}: {claims[0]} beyond their share. Of the attention of later latent frames {given} goes
to the given first one, against {1 / trained["frames"][0]:.2f} if it were uniform."""
    return Section("Where attention goes", text, tuple(claims), ("attention.png",))


def swap_section(wan: Wan, run: Run, n: int) -> Section:
    wan = wan.with_preset(steps=SHORT)
    depth, whole = len(wan.experts["high"].blocks), range(SHORT)
    site = 3 * depth // 4
    few, inside = fewer(n), Run(run.path("layers"), run.settings)
    rare = tuple(name for name in CONTROLS if name != "wrong")
    curve = swap_study.Plan(
        tuple(range(depth)), (whole,), ("same_x",), controls=rare, control_layers=(site,)
    )
    layers = swap_study.sweep(wan, inside, curve, pairs("mark", few))
    begun = swap_study.Plan((site,), (range(1), range(2), range(SHORT // 2)), ("same_x",))
    swept = swap_study.sweep(wan, inside, begun, pairs("mark", few))
    held = swap_study.Plan((site,), (whole,), ("same_x",), controls=("wrong",))
    results = swap_study.sweep(wan, Run(run.path("controls"), run.settings), held, pairs("mark", n))
    names = [f"layers/{name}" for name in swap_results.draw(curve, layers, few, inside)]
    became = layers[curve.arms[0]]["answer"] == A
    own, wrong = (results[arm] for arm in held.arms)
    by = {arm.control: layers[arm] for arm in curve.arms}
    (turn,) = swap_results.turns(curve, layers, few)

    def rate(found: Mapping[str, np.ndarray]) -> np.ndarray:
        return found["answer"][:, 0] == A

    early = {f"{arm.name.split(' same')[0]} alone": rate(swept[arm]) for arm in begun.arms}
    claims = (
        report.of(
            "layer at which half of the swapped runs show A's answer",
            turn["A"],
            "the last layer turns all by construction",
        ),
        report.of(
            "layer at which the latent lies half-way to A (flip = 0)",
            turn["flip"],
            "the last layer: +1 by construction",
        ),
        difference(
            f"rate of A's answer: layer {depth - 1} minus layer 0",
            became[:, -1],
            became[:, 0],
            "layer 0, all steps",
        ),
        difference(
            f"rate of A's answer at layer {site}: own donor minus wrong donor",
            rate(own),
            rate(wrong),
            "wrong donor",
        ),
        *(
            difference(
                f"rate of A's answer at layer {site}: own donor minus {words}",
                became[:, site],
                rate(by[name]),
                words,
            )
            for name, words in (
                ("shuffled", "shuffled prompt"),
                ("random", "random direction of equal norm"),
            )
        ),
        *(
            difference(
                f"rate of A's answer at layer {site}: {when} minus all steps",
                found,
                became[:, site],
                "swapped at all steps",
            )
            for when, found in early.items()
        ),
        mean(
            f"largest change by the null swap at layer {site}",
            by["null"]["changed"][:, 0],
            "exactly 0",
        ),
        mean(f"off-axis share at layer {site}", own["off_axis"][:, 0], "0: between A and B"),
        mean(
            "leverage of step 0: how far it moves the latent, of its norm",
            own["leverage"][:, 0],
            "0: nothing",
        ),
    )
    right = [
        f"{(results[None][f'{run_}.answer'] == code).mean():.2f}"
        for run_, code in (("a", A), ("b", B))
    ]
    shuffled, random = (f"{rate(by[name]).mean():.2f}" for name in ("shuffled", "random"))
    briefly = ", ".join(f"{found.mean():.2f} at {when}" for when, found in early.items())
    text = f"""\
"Mark the circle" (A) and "mark the square" (B) of one picture: at every step the residual stream behind one layer of run B is
replaced by what A's prompt makes of the same latent ({SHORT} steps, `minicos swap`). By construction the last layer hands over
A's velocity, so that curves end at A: the finding is where they turn. Undisturbed, {right[0]} of the A runs show A's answer
and {right[1]} of the B runs B's.

Half of the swapped runs show A's answer from layer {claims[0].brief} of 0 to {depth - 1} on. At layer {site} it appears in
{rate(own).mean():.2f} of the runs; with a wrong donor in {rate(wrong).mean():.2f}, with a shuffled prompt in {shuffled}, moved as far in a
random direction in {random}. Swapped in the first steps only: {briefly}; step 0 moves the latent by
{own["leverage"][:, 0].mean():.3f} of its norm. The largest change by the null swap is {by["null"]["changed"].max():g}."""
    return Section("Where a prompt becomes an answer", text, claims, tuple(names))
