"""Every experiment on the embedded model, one section each: the definitions are in their own files, the choices of size are here.

A section is a function (wan, run, n) -> Section. Whatever costs time goes through `cases.collect` or a study that keeps what it
finished, so a section that was killed continues and ends at the same bits. Networks run on one thread (`work`), sections beside
each other: two thread pools on two cores would lose, and last bits then do not depend on the number of cores.

Puzzles are of the test split. Steps, layers and windows are fixed here beforehand, except the ensemble's arm (dev split).
Interventions are run at fewer denoising steps than the preset's 20, which costs the embedded model little (section `counts`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from time import process_time

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minicos.analysis import (
    attention, behaviours, cases, commitment, energy, ensemble, figures, noise, posterior, report, sensitivity, stats, steps, swap,
)  # fmt: skip
from minicos.analysis.cases import Case, held_out
from minicos.analysis.report import Section, difference, mean
from minicos.dit import DiT
from minicos.hooks import Hooks, Site
from minicos.ops import attention_mass
from minicos.pipeline import Wan, load
from minicos.puzzles.draw import COLOURS, SHAPES
from minicos.runs import Run

SHORT = 10  # denoising steps of the interventions
AT_LEAST = 4  # puzzles: the ensemble's wrong donors take three, a yardstick two


def untrained(wan: Wan, seed: int = 0) -> Wan:
    """The same architecture with random weights, as PyTorch draws them: what a measure shows of any network."""
    high = wan.experts["high"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiT(high.cfg, residual=high.blocks[0].residual, time_skip=high.time_skip).requires_grad_(False)
    network = network.to(wan.device, wan.dtype).eval()
    return replace(wan, experts=dict.fromkeys(wan.experts, network))


def groups(subjects: Sequence[Case], most: int) -> list[list[Case]]:
    """As few batches as do, of nearly equal size: a rest of one case could be nobody's wrong donor."""
    parts = np.array_split(np.arange(len(subjects)), -(-len(subjects) // most))
    return [[subjects[i] for i in part] for part in parts]


def several(n: int) -> list[Case]:
    return held_out("maze", n, keep=cases.ambiguous)


# -- steps, and the ideal observer ------------------------------------------------------------------------------------


def believed(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Each case's run against the ideal observer at every step: b N (and b N f); NaN where a maze has one route.

    ideal, shown        answers alive in the posterior, and in the network's estimate
    departure, outside  of the network's estimate from the posterior mean, and its part that no mixture of answers explains
    leads               whether the answer shown most is the one that the run ends at
    moved               squared distance of the estimate to the last one, per latent frame
    """
    condition = cases.condition(wan, batch)
    made = list(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    out = {"moved": torch.stack([stats.squared(step.x0, made[-1].x0) for step in made], dim=1)}
    table = torch.full((len(batch), len(made), 5), torch.nan, dtype=torch.float64)
    for k, case in enumerate(batch):
        if not cases.ambiguous(case.puzzle):
            continue
        z = posterior.answers(wan, case.puzzle)
        seen = [posterior.belief(step.x[k], step.x0[k], step.sigma, z) for step in made]
        final = seen[-1].shown.argmax()
        for s, b in enumerate(seen):
            leads = float(b.shown.argmax() == final)
            row = posterior.effective(b.ideal), posterior.effective(b.shown), b.departure, b.outside, leads
            table[k, s] = torch.tensor(row)
    return out | dict(zip(("ideal", "shown", "departure", "outside", "leads"), table.unbind(2), strict=True))


def strangers(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Departure of a network's first estimate from the ideal observer's: what an untrained one gives."""
    condition = cases.condition(wan, batch)
    first = next(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    latents = [posterior.answers(wan, case.puzzle) for case in batch]
    each = zip(first.x, first.x0, latents, strict=True)
    return {"departure": torch.tensor([posterior.belief(x, x0, first.sigma, z).departure for x, x0, z in each])}


def step_section(wan: Wan, run: Run, n: int) -> Section:
    mazes = several(n)
    single = held_out("maze", n, keep=lambda puzzle: not cases.ambiguous(puzzle))
    many = cases.collect(run, "several", groups(mazes, 25), partial(believed, wan))
    one = cases.collect(run, "one", groups(single, 25), partial(believed, wan))
    random = cases.collect(run, "untrained", groups(mazes, 25), partial(strangers, untrained(wan)))
    sigmas, middle = wan.schedule().sigmas, many["ideal"].shape[1] // 2
    chance = np.array([1 / len(case.puzzle.candidates) for case in mazes])
    unit = many["moved"][:, 0, 1:].mean(0)  # how far the first estimate is from the last one where there is a choice
    settled = {name: _settled(data["moved"], unit) for name, data in (("several", many), ("one", one))}  # n f
    ideal, shown = many["ideal"], many["shown"]
    claims = (
        difference("answers alive, network: first minus last step", shown[:, 0], shown[:, -1], "the last step"),
        difference("answers alive, ideal observer: first minus last step", ideal[:, 0], ideal[:, -1], "the last step"),
        difference("answers alive at step 0: network minus ideal", shown[:, 0], ideal[:, 0], "ideal observer: all alike"),
        difference(f"answers alive at step {middle}: network minus ideal", shown[:, middle], ideal[:, middle], "ideal observer"),
        difference("answer shown most at step 0 is the final one: rate minus chance", many["leads"][:, 0], chance, "one in its routes"),
        mean("departure from the ideal observer at step 0", many["departure"][:, 0], "0: ideal, 1: as far as another answer"),
        mean(f"departure from the ideal observer at step {middle}", many["departure"][:, middle], "0: ideal"),
        difference(
            "departure at step 0: untrained minus trained", random["departure"], many["departure"][:, 0], "untrained network"
        ),
        mean("step at which the estimate settles, several routes", settled["several"].max(1), "the last step"),
        report.of(
            "step at which it settles: several minus one route",
            stats.unpaired(settled["several"].max(1), settled["one"].max(1)), "mazes with one route (other mazes: unpaired)",
        ),
        difference("step at which it settles: last minus second latent frame", *settled["several"][:, [-1, 0]].T, "the same video's frames"),
    )  # fmt: skip
    at = np.arange(len(sigmas) - 1)
    lines = {"network": sensitivity.curve(shown, at), "ideal observer": sensitivity.curve(ideal, at)}
    figures.bands(
        run.path("alive.png"), lines, x="denoising step", y="answers alive",
        title=f"Answers alive in the clean estimate, {n} mazes with several routes",
    )  # fmt: skip
    lines = {"from the ideal observer": many["departure"], "of it no mixture of answers": many["outside"]}
    figures.bands(
        run.path("departure.png"), {name: sensitivity.curve(values, at) for name, values in lines.items()},
        x="denoising step", y="1: as far as another answer", title="Where the network departs from the ideal observer",
    )  # fmt: skip
    far = many["moved"].mean(0) / many["moved"][:, 0].mean(0).clip(1e-9)
    figures.grid(
        run.path("convergence.png"), far[:, 1:].T, x="denoising step", y="latent frame after the first",
        title="Distance of every frame's estimate to the last one, 1: as at the first step",
    )  # fmt: skip
    text = f"""\
Mazes with several right answers, {len(at)} steps (`minicos steps`). Answers alive is the exponential of the entropy of the weights
that an estimate gives to the valid answers; the ideal observer's are exact (`minicos/analysis/posterior.py`). By construction the
ideal observer holds all routes alike at step 0, where the latent is noise alone, and the last step has one: several candidates
early are Bayes' rule, and the question is where the network departs from it.

The network's estimate holds {shown[:, 0].mean():.2f} answers at step 0 and {shown[:, -1].mean():.2f} at the last, the ideal observer's
{ideal[:, 0].mean():.2f} and {ideal[:, -1].mean():.2f}. At step 0, where nothing could be known, the network's weights differ from the ideal ones by
{claims[2]} answers, and the answer that it shows most is the final one more often than by chance by {claims[4]}. Late in the run a
departure is measured against the answers' own distance. With one route nothing is to be decided: settling several routes takes
{claims[9].brief} steps more. Later frames settle {claims[10].brief} steps after earlier ones: along the steps, or along the frames?"""
    return Section("Several candidates early, one late", text, claims, (
        _belief_sheet(wan, run, mazes[0]), "alive.png", "departure.png", "convergence.png",
    ))  # fmt: skip


def _settled(moved: np.ndarray, unit: np.ndarray, level: float = 0.1) -> np.ndarray:
    """The step from which on an estimate's distance to the last one (n N f) stays below a share of `unit` (f - 1): n (f - 1).

    The given first frame is left out. One unit for all mazes: where there is no choice, even the first estimate may be near.
    """
    return np.array([[behaviours.first_below(curve, level) for curve in (row[:, 1:] / unit).T] for row in moved])


def _belief_sheet(wan: Wan, run: Run, case: Case) -> str:
    """The last frame of network and ideal observer at several steps of one run."""
    if not run.has("sheet.png"):
        condition, z = cases.condition(wan, [case]), posterior.answers(wan, case.puzzle)
        shown = steps.spread(8, wan.preset.steps)
        made = [s for s in wan.sample(condition, noise=cases.noise(wan, condition, [case])) if s.index in shown]
        ideal = [posterior.mean(posterior.weights(s.x[0], s.sigma, z), z)[None].float() for s in made]
        rows = [wan.decode(torch.cat([s.x0 for s in made])), wan.decode(torch.cat(ideal))]
        figures.sheet(
            run.path("sheet.png"), [list(videos[:, -1]) for videos in rows], rows=["network", "ideal\nobserver"],
            columns=[f"step {s.index}\nσ {s.sigma:.2f}" for s in made], title="Last frame of the clean estimate",
        )  # fmt: skip
    return "sheet.png"


# -- commitment -------------------------------------------------------------------------------------------------------


def commitment_section(wan: Wan, run: Run, n: int) -> Section:
    wan, mazes, count = wan.with_preset(steps=SHORT), several(n), 6
    at = (*steps.spread(5, SHORT)[:-1], SHORT - 2)

    def compute(batch: Sequence[Case]) -> dict[str, Tensor]:
        return {"answers": commitment.completions(wan, batch, at, count)}

    answers = torch.from_numpy(cases.collect(run, "completions", groups(mazes, 4), compute)["answers"])
    routes = [len(case.puzzle.candidates) for case in mazes]
    shares = [commitment.shares(a, r) for a, r in zip(answers, routes, strict=True)]
    committed = np.stack([commitment.commitment(share).numpy() for share in shares])
    decided = [commitment.decision(line, at) for line in committed]
    valid = (answers >= 0).double().mean(2).numpy()
    first = f"step 0, another seed by construction (of {count} completions)"
    claims = (
        difference(f"commitment at step {at[1]} minus step 0", committed[:, 1], committed[:, 0], first),
        difference(f"commitment at step {at[-1]} minus step 0", committed[:, -1], committed[:, 0], first),
        mean(f"first step of {', '.join(map(str, at))} that is decided", [np.nan if s is None else s for s in decided], "mazes never decided are left out"),
        difference("valid completions: first minus last of these steps", valid[:, 0], valid[:, -1], f"step {at[-1]}"),
    )  # fmt: skip
    lines = {
        "commitment": sensitivity.curve(committed[np.isfinite(committed).all(1)], np.array(at)),
        "valid completions": sensitivity.curve(valid, np.array(at)),
    }
    figures.bands(
        run.path("commitment.png"), lines, x="step that is completed from", y="commitment; share",
        title=f"When is the answer decided? {n} mazes, {count} completions each", levels={"decided": commitment.DECIDED},
    )  # fmt: skip
    text = f"""\
The clean estimate of a step is thrown back to its noise level and completed {count} times ({SHORT} steps, `minicos commitment`): commitment is 0 where
the completions answer every which way and 1 where they agree. By construction it rises to 1, and step 0 is nothing but other seeds,
whose answers agree by {np.nanmean(committed[:, 0]):.2f} with so few completions. It is {", ".join(f"{c:.2f} at step {s}" for s, c in zip(at, np.nanmean(committed, 0), strict=True))};
{sum(s is not None for s in decided)} of {n} mazes are decided by step {at[-1]}, on average at step {claims[2].brief}.
Each completion costs a run and a decoded video, so this section has fewer mazes than the others."""
    return Section("When the answer is decided", text, claims, ("commitment.png",))


# -- behaviours -------------------------------------------------------------------------------------------------------


def course(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Corrections and, for still and moving parts, the step at which they settle: each b."""
    condition = cases.condition(wan, batch)
    made = list(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    found = behaviours.courses(wan, batch, made)
    still, moving = [], []
    for k, (case, c) in enumerate(zip(batch, found, strict=True)):
        for out, where in zip(
            (still, moving), behaviours.masks(case.puzzle, c.final or 0, wan.vae.cfg.stride), strict=True
        ):
            out.append(behaviours.first_below(behaviours.unsettled(made, k, where)) if where.any() else torch.nan)
    hypotheses = [
        c.valid + sum(len(p.candidates) for p in case.puzzle.variants()) for case, c in zip(batch, found, strict=True)
    ]
    return {
        "still": torch.tensor(still, dtype=torch.float64),
        "moving": torch.tensor(moving, dtype=torch.float64),
        "wrong": torch.tensor([float(c.leaders[0] >= c.valid) for c in found]),
        "chance": torch.tensor([1 - c.valid / h for c, h in zip(found, hypotheses, strict=True)]),
        "corrected": torch.tensor([float(c.corrected is not None) for c in found]),
        "changed": torch.tensor([float(c.settled > 0 and c.corrected is None) for c in found]),
        "solved": torch.tensor([float(c.final is not None) for c in found]),
    }  # fmt: skip


def hidden(wan: Wan, step: int, batch: Sequence[Case]) -> dict[str, Tensor]:
    """At the tokens that hide the object: states of every block at a step (b layer d), the drawn video's latents (b p), labels (b 2)."""
    condition, watch = cases.condition(wan, batch), behaviours.Hidden(batch)
    for made in wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=watch.hooks(step)):
        if made.index == step:
            break
    _, ph, pw = wan.experts["high"].cfg.patch_size
    drawn = []
    for case in batch:
        z = posterior.answers(wan, case.puzzle)[0]
        drawn.append(behaviours.behind(rearrange(z, "c f (h p) (w q) -> f h w (c p q)", p=ph, q=pw), case.puzzle))
    states = torch.stack([watch.states[k] for k in sorted(watch.states)], dim=1)
    return {"states": states, "drawn": torch.stack(drawn), "labels": behaviours.labels(batch)}


def behaviour_section(wan: Wan, run: Run, n: int) -> Section:
    goal = cases.collect(run, "goal", groups(held_out("goal", n), 25), partial(course, wan))
    step = wan.preset.steps // 2
    told, test = (
        cases.collect(
            run, f"memory_{split}", groups(held_out("memory", count, split=split), 25), partial(hidden, wan, step)
        )
        for split, count in (("dev", n + n // 2), ("test", n))
    )
    claims = [
        difference("leading hypothesis wrong at step 0: rate minus chance", goal["wrong"], goal["chance"], "a leader drawn at random"),
        mean("wrong early and right late (self-correction): rate", goal["corrected"], "0"),
        difference("step at which what moves settles minus what stands still", goal["moving"], goal["still"], "what stands still (is given)"),
    ]  # fmt: skip
    lines, blocks = {}, []
    for i, (name, classes) in enumerate((("shape", len(SHAPES)), ("colour", len(COLOURS)))):
        right = _readouts(told, test, i, classes)
        layer = right["layer"]
        blocks.append(layer)
        lines[name] = right["states"].mean(0)
        claims += [
            difference(f"hidden object's {name} read from hidden states: minus shuffled labels", right["states"][:, layer], right["shuffled"], "labels of another object"),
            difference(f"hidden object's {name} read from hidden states: minus the drawn picture", right["states"][:, layer], right["drawn"], "latents of the drawn video, same tokens"),
        ]  # fmt: skip
    figures.curves(
        run.path("memory.png"), lines, x="layer", y="share read out right",
        title=f"Shape (chance {1 / len(SHAPES):.2f}) and colour (chance {1 / len(COLOURS):.2f}) of the hidden object, step {step}",
    )  # fmt: skip
    text = f"""\
Three behaviours that the paper describes (`minicos/analysis/behaviours.py`). Self-correction: mazes with two goals, the leading hypothesis among the
valid routes and those to the other goal, step by step. It is wrong at step 0 in {goal["wrong"].mean():.2f} of the runs, {goal["corrected"].mean():.2f} of all runs
are wrong early and right late, {goal["changed"].mean():.2f} change their mind among valid answers, {goal["solved"].mean():.2f} end right. Perception before action: what
moves settles {claims[2]} steps after what stands still, which is the easier job, being copied from the given frame. Working memory: while an object is behind
a wall, its shape and colour are read from the hidden states at the tokens that hide it by a linear classifier (told by puzzles of the dev split,
the layer chosen there by two-fold validation, {blocks[0]} for shape and {blocks[1]} for colour, judged on test puzzles). Against shuffled labels: {claims[3]} (shape) and {claims[5]} (colour). The latents
of a drawn video are the harder control, since four video frames share a latent frame and the object is visible in some of them: {claims[4]} and {claims[6]}."""
    return Section("Self-correction, perception before action, working memory", text, tuple(claims), ("memory.png",))


def _readouts(told: Mapping[str, np.ndarray], test: Mapping[str, np.ndarray], label: int, classes: int) -> dict:
    """Which test objects are read out right: from the states of each layer (n layer), with shuffled labels and from drawn latents (n)."""
    told, test = ({k: torch.from_numpy(v) for k, v in data.items()} for data in (told, test))
    y, truth = told["labels"][:, label], test["labels"][:, label]
    half = len(y) // 2

    def right(x: Tensor, y: Tensor, other: Tensor, truth: Tensor) -> np.ndarray:
        return (behaviours.readout(x, y, other, classes) == truth).double().numpy()

    depth, a = told["states"].shape[1], told["states"]
    folds = [
        right(a[:half, k], y[:half], a[half:, k], y[half:]).mean()
        + right(a[half:, k], y[half:], a[:half, k], y[:half]).mean()
        for k in range(depth)
    ]
    layer = int(np.argmax(folds))
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    return {
        "layer": layer,
        "states": np.stack([right(a[:, k], y, test["states"][:, k], truth) for k in range(depth)], axis=1),
        "shuffled": right(a[:, layer], shuffled, test["states"][:, layer], truth),
        "drawn": right(told["drawn"], y, test["drawn"], truth),
    }


# -- noise ------------------------------------------------------------------------------------------------------------


def noise_section(wan: Wan, run: Run, n: int) -> Section:
    wan, at = wan.with_preset(steps=SHORT), tuple(SHORT * k // 4 for k in range(4))
    claims, told, shown = [], {}, []
    for mode in ("renoise", "replace"):
        inside = Run(run.path(mode), run.settings)
        results = noise.study(wan, several(n), inside, noise.Plan(mode, at=at, others=1))
        names = sensitivity.draw(results, wan, inside)
        shown += [f"{mode}/{name}" for name in names if name in ("sensitivity.png", "frames.png", "videos.png")]
        clean, kinds = results.runs["clean"]["solved"].astype(float), (results.names("step"), results.names("frame"))
        moved = [np.mean([results.final(name) for name in kind], axis=0) for kind in kinds]
        lost = [np.mean([clean - results.runs[name]["solved"] for name in kind], axis=0) for kind in kinds]
        doses = [np.mean([results.dose(name) for name in kind], axis=0) for kind in kinds]
        beside = np.mean([results.untouched(name) for name in kinds[1]], axis=0)
        damage, same = sensitivity.sensitivity(results), "the same cells (steps x frames), frame by frame"
        claims += [
            difference(f"{mode}: D of the video, step noise minus frame noise", *moved, same),
            difference(f"{mode}: mazes lost, step noise minus frame noise", *lost, same),
            difference(
                f"{mode}: dose, step minus frame noise, share of the latter", doses[0] / doses[1], 1, "0: matched"
            ),
            difference(
                f"{mode}: D, noise at step {at[0]} minus step {at[-1]}", damage[:, 0], damage[:, -1], f"step {at[-1]}"
            ),
            mean(f"{mode}: D of the frames beside the noised one", beside, "0: frames do not depend on each other"),
        ]
        told[mode] = [f"{v.mean():.2f}" for v in (*moved, *lost)]
    claims += [
        mean("D of the null intervention", results.final("null"), "exactly 0"),
        mean("D of another seed", results.final("seed 1"), "1 by definition: the yardstick"),
    ]
    steps_named = ", ".join(map(str, at))
    text = f"""\
Latents entering a step get Gaussian noise, in all frames at one of the steps {steps_named} of {SHORT}, or in one latent
frame at all of these steps: the same noised cells, once by step and once by frame, so that doses agree (`minicos noise`).
`renoise` keeps the clean estimate and draws its noise again, on the schedule; `replace`, the paper's, puts noise alone. D is
0 for the same video and 1 for another seed's. By construction the null intervention gives 0, and step 0 is a reseed. After
`replace` at a late step the video *is* noise in any model: every frame that is noised at all steps is lost, and so are all
frames of the late step, which leaves a positive difference for step noise even in a model that treats frames alone.

`renoise`: step noise moves the video by D = {told["renoise"][0]}, frame noise by {told["renoise"][1]}: {claims[0]}. They
lose {told["renoise"][2]} and {told["renoise"][3]} of the mazes (solved clean: {clean.mean():.2f}): {claims[1]}.
`replace`: D = {told["replace"][0]} and {told["replace"][1]}: {claims[5]}; lost {told["replace"][2]} and
{told["replace"][3]}: {claims[6]}. The paper finds a step fragile and a frame robust, at doses that differ."""
    return Section("Noise at a step, noise in a frame", text, tuple(claims), tuple(shown))


# -- energy and attention ---------------------------------------------------------------------------------------------


@dataclass
class Looking:
    """A hook on blocks: AUROC of each sample's token energy against the cells that the answer fills, b form layer."""

    batch: Sequence[Case]

    def __post_init__(self):
        self.found: list[Tensor] = []
        self.before: Tensor | None = None

    def hooks(self, step: int) -> Hooks:
        return (
            Hooks().on("embed", self.begin, step=step, branch="cond").on("blocks.*", self.see, step=step, branch="cond")
        )

    def begin(self, x: Tensor, site: Site) -> None:
        self.before = x

    def see(self, x: Tensor, site: Site) -> None:
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
    for made in wan.sample(condition, noise=cases.noise(wan, condition, batch), hooks=watch.hooks(step)):
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
    claims = tuple(
        claim
        for k, form in enumerate(energy.FORMS)
        for claim in (
            difference(f"AUROC of the answer's cells, {form} energy: late minus early third of layers", late[:, k], early[:, k], "early layers"),
            difference(f"AUROC of the answer's cells, {form} energy, late layers: trained minus untrained", late[:, k], random[:, k, -third:].mean(1), "untrained network"),
        )
    )  # fmt: skip
    lines = {form: trained[:, k] for k, form in enumerate(energy.FORMS)} | {"centred, untrained": random[:, 1]}
    figures.bands(
        run.path("auroc.png"), {name: sensitivity.curve(values, np.arange(depth)) for name, values in lines.items()}, x="layer", y="AUROC",
        title=f"Does token energy single out the answer? Step {step}, {n} puzzles", levels={"blind": 0.5},
    )  # fmt: skip
    text = f"""\
"Mark the circle" and its like: the cell to be filled is known, and the AUROC says how well a layer's token energy separates its tokens from the others (.5: blind; below: the answer's tokens have less),
at step {step} of {wan.preset.steps} (`minicos energy`). Raw energy is the paper's; centred drops the mean token and massive channels; update is what a block writes. By construction nothing: an untrained network sees the
picture too, so it is the control. Early layers reach {", ".join(f"{early[:, k].mean():.2f} ({form})" for k, form in enumerate(energy.FORMS))}, late ones {", ".join(f"{late[:, k].mean():.2f} ({form})" for k, form in enumerate(energy.FORMS))};
the paper reads a turn from background to objects off such maps."""
    return Section("Which tokens layers work on", text, claims, ("auroc.png",))


def weigh(wan: Wan, step: int, batch: Sequence[Case]) -> dict[str, Tensor]:
    """At one step, for every layer: share of cross-attention on padding (b layer), of later frames' attention on frame 0 (b layer)."""
    condition = cases.condition(wan, batch)
    words = condition.text.any(-1).sum(1)  # b
    held: dict[str, Tensor] = {}
    found: dict[str, list[Tensor]] = {"padding": [], "first": []}

    def hold(q: Tensor, site: Site) -> None:
        held["q"] = q

    def see(k: Tensor, site: Site) -> None:
        text = ".cross_attn." in site.name
        received, between = attention_mass(held.pop("q"), k, frames=1 if text else site.grid[0])
        if text:
            share = received.mean(1) / site.grid[0] / site.grid[1] / site.grid[2]  # b t, of one query
            found["padding"].append(torch.stack([row[w:].sum() for row, w in zip(share, words, strict=True)]))
        else:
            found["first"].append(between.mean(1)[:, 1:, 0].mean(1))

    hooks = Hooks()
    for part in ("self_attn", "cross_attn"):
        hooks = hooks.on(f"blocks.*.{part}.q", hold, step=step, branch="cond").on(
            f"blocks.*.{part}.k", see, step=step, branch="cond"
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
    claims = (
        difference("cross-attention on padding rows: minus their share of rows", padding.mean(1), uniform, "uniform attention"),
        difference("cross-attention on padding rows: trained minus untrained", padding.mean(1), random["padding"].mean(1), "untrained network"),
        difference("attention of later frames on the given one: minus its share", first.mean(1), 1 / trained["frames"], "uniform attention"),
        difference("attention of later frames on the given one: trained minus untrained", first.mean(1), random["first"].mean(1), "untrained network"),
    )  # fmt: skip
    at = np.arange(padding.shape[1])
    lines = {
        "on padding": padding,
        "on padding, untrained": random["padding"],
        "on frame 0": first,
        "on frame 0, untrained": random["first"],
    }
    figures.bands(
        run.path("attention.png"), {name: sensitivity.curve(values, at) for name, values in lines.items()}, x="layer", y="share of attention",
        title=f"Attention on zero-padded text rows, and of later frames on the first; step {step}", levels={"padding, uniform": float(uniform.mean())},
    )  # fmt: skip
    text = f"""\
Exact attention mass at step {step}, mean over heads, tokens and layers (`minicos attention`). Prompts are padded with zero rows, which the network attends to like to any other row: {uniform.mean():.2f} of the rows are padding,
and they receive {padding.mean():.2f} of the mass ({random["padding"].mean():.2f} in an untrained network); nothing is fixed by construction, since no mask hides them. Of the attention of later latent frames {first.mean():.2f} goes to the given first one
(uniform: {1 / trained["frames"][0]:.2f}): {claims[2]}."""
    return Section("Where attention goes", text, claims, ("attention.png",))


# -- swap -------------------------------------------------------------------------------------------------------------


def swap_section(wan: Wan, run: Run, n: int) -> Section:
    wan = wan.with_preset(steps=SHORT)
    depth = len(wan.experts["high"].blocks)
    site = 3 * depth // 4
    plan = swap.Plan(
        layers=tuple(range(depth)),
        ranges=(range(SHORT),),
        donors=("same_x",),
        controls=swap.CONTROLS,
        control_layers=(site,),
    )
    results = swap.sweep(wan, run, plan, swap.pairs("mark", n))
    names = swap.draw(plan, results, n, run)
    by = {arm.control: results[arm] for arm in plan.arms}
    own, became = by[None], by[None]["answer"] == swap.A
    (turn,) = swap.turns(plan, results, n)
    never = "before the first layer: 0 by construction of B"

    def control(name: str) -> np.ndarray:
        return by[name]["answer"][:, 0] == swap.A

    claims = (
        report.of("layer at which half of the swapped runs show A's answer", turn["A"], "the last layer turns all by construction"),
        report.of("layer at which the latent lies half-way to A (flip = 0)", turn["flip"], "the last layer: +1 by construction"),
        difference(f"rate of A's answer: layer {depth - 1} minus layer 0", became[:, -1], became[:, 0], never),
        *(
            difference(f"rate of A's answer at layer {site}: own donor minus {words}", became[:, site], control(name), words)
            for name, words in (("wrong", "wrong donor"), ("shuffled", "shuffled prompt"), ("random", "random direction of equal norm"))
        ),
        mean(f"largest change by the null swap at layer {site}", by["null"]["changed"][:, 0], "exactly 0"),
        mean(f"off-axis share at layer {site}", own["off_axis"][:, site], "0: between A and B"),
    )  # fmt: skip
    right = (results[None]["a.answer"] == swap.A).mean(), (results[None]["b.answer"] == swap.B).mean()
    text = f"""\
"Mark the circle" (A) and "mark the square" (B) of one picture: at every step the residual stream behind a layer of run B is replaced by the one that A's prompt gives at the same latent ({SHORT} steps, `minicos swap`).
By construction the last layer hands over A's velocity, so that curves end at A: the finding is where they turn. Undisturbed, {right[0]:.2f} of the A runs show A's answer and {right[1]:.2f} of the B runs B's.

Half of the runs show A's answer from layer {claims[0].brief} of 0 to {depth - 1} on. At layer {site} A's answer appears in {became[:, site].mean():.2f} of the runs, with a wrong donor in {control("wrong").mean():.2f}, with a
shuffled prompt in {control("shuffled").mean():.2f}, moved as far in a random direction in {control("random").mean():.2f}. The null swap changes nothing."""
    return Section(
        "Where a prompt becomes an answer", text, claims, tuple(name for name in names if not name.endswith("map.png"))
    )


# -- ensemble ---------------------------------------------------------------------------------------------------------


def ensemble_section(wan: Wan, run: Run, n: int) -> Section:
    short, size, dev = 8, 5, max(AT_LEAST, n // 4)
    wan = wan.with_preset(steps=short)
    depth = len(wan.experts["high"].blocks)
    like = ensemble.Ensemble((0,))
    early = replace(like, steps=tuple(range(short // 4)))
    arms = [
        ensemble.ablation(depth, ((20, 29), (0, 9), (0, 39)), ("override",), like),
        ensemble.ablation(depth, ((20, 29),), ("update",), early),
    ]
    subjects = {
        split: groups(held_out("maze", k, size=size, split=split), 10) for split, k in (("dev", dev), ("test", n))
    }
    chosen, rows = ensemble.experiment(wan, run, arms, subjects["dev"], subjects["test"])
    paper, base = next(iter(arms[0])), rows[0].rate
    claims = tuple(
        replace(
            report.of(f"mazes solved: {row.name}, minus plain", row.gain, _role(row, chosen, paper)),
            resolvable=row.resolvable,
        )
        for row in sorted(rows[1:], key=lambda row: row.name != paper)
    )  # fmt: skip
    figures.intervals(
        run.path("ensemble.png"), {row.name: (row.gain.effect, row.gain.low, row.gain.high) for row in rows[1:]},
        x=f"gain in puzzles solved over one plain run ({base.effect:.2f})", strong=chosen,
        title=f"Three seeds, {n} mazes of {size}x{size}, {short} steps; red: chosen on {dev} dev mazes",
    )  # fmt: skip
    by = {row.name: row for row in rows}
    best = by["best of 3 plain runs (oracle)"]
    text = f"""\
States of the middle blocks averaged over three seeds, early, then one trajectory finished (`minicos ensemble`), on {size}x{size} mazes, larger than any the model was trained on, at {short} steps: one plain run solves {base.effect:.2f}.
Three windows and a rival mode were tried on {dev} dev mazes, where "{chosen}" did best; on test it is reported with the paper's window, p values corrected after Holm. By construction only the last layer of an override counts,
and a step 0 of {short} moves the latent further than one of 50; the D of the paper's window to the plain run is {by[paper].distance or 0:.2f}.

The paper's window gains {claims[0]}; {n} puzzles find a gain of {by[paper].resolvable:.2f} or more. The chosen arm ({by[chosen].passes:.0f} passes) gains {by[chosen].gain}. At equal compute or nearly so ({best.passes:.0f} passes), a vote among three plain runs gains
{by["vote among 3 plain runs"].gain}, and an oracle that takes the best of them {best.gain}: what there is to be gained."""
    return Section("Seeds that share states", text, claims, ("ensemble.png",))


def _role(row: ensemble.Row, chosen: str, paper: str) -> str:
    """What a row is held against, or is a control of."""
    roles = {
        "other cases": "wrong donors", "random direction": "random direction of equal norm", "clean estimate": "rival without a layer",
        "latent": "rival without a layer", "vote": "rival at equal compute", "best of": "upper bound at equal compute",
    }  # fmt: skip
    for key, role in roles.items():
        if key in row.name:
            return role
    facts = [f"p = {row.p_holm:.2g} after Holm"] * (row.p_holm is not None)
    facts += ["the paper's window"] * (row.name == paper) + ["chosen on dev"] * (row.name == chosen)
    return "; ".join(["plain run, T = 1", *facts])


# -- counts of steps and frames ---------------------------------------------------------------------------------------


def count_section(wan: Wan, run: Run, n: int) -> Section:
    whole, usual = wan.preset.steps, wan.preset.frames
    settings = {f"{k} steps": {"steps": k} for k in (whole, SHORT, 4, 2, 1)}
    settings |= {f"{f} frames": {"frames": f} for f in (usual - 4, usual + 4)}
    mazes, solved = groups(held_out("maze", n), 20), {}
    for name, changes in settings.items():
        solved[name] = cases.collect(run, name.replace(" ", "_"), mazes, partial(success, wan.with_preset(**changes)))[
            "solved"
        ]
    base = solved[f"{whole} steps"]
    claims = tuple(
        difference(f"mazes solved: {name} minus {whole} steps, {usual} frames", values, base, f"{whole} steps, {usual} frames")
        for name, values in solved.items() if values is not base
    )  # fmt: skip
    figures.intervals(
        run.path("counts.png"), {name: vars(stats.bootstrap(v)) and _triple(v) for name, v in solved.items()},
        x="share of mazes solved", title=f"{n} mazes; {usual} frames unless said, {whole} steps unless said",
    )  # fmt: skip
    text = f"""\
Few-step sampling and other lengths of video (`minicos distilled`, `minicos frames` measure convergence and sensitivity there as well). The model was trained at {usual} frames and is not distilled, so that other counts are out of
distribution; one step returns the first clean estimate, a mixture wherever there is a choice. Solved: {", ".join(f"{v.mean():.2f} at {name}" for name, v in solved.items())}."""
    return Section("Fewer steps, other lengths", text, claims, ("counts.png",))


def success(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Whether each puzzle is solved, 0 or 1: b."""
    condition = cases.condition(wan, batch)
    *_, last = wan.sample(condition, noise=cases.noise(wan, condition, batch))
    return {"solved": torch.tensor([float(score.solved) for score in cases.scores(wan, last.next, batch)])}


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    interval = stats.bootstrap(values)
    return interval.effect, interval.low, interval.high


# -- all of them ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experiment:
    make: Callable[[Wan, Run, int], Section]
    n: int  # puzzles, so that all experiments take some 900 seconds of one core
    seconds: float  # of one core and of one puzzle: the longest experiments begin first


EXPERIMENTS = {  # in the order of the report
    "steps": Experiment(step_section, 100, 0.8),
    "commitment": Experiment(commitment_section, 16, 6.0),
    "behaviours": Experiment(behaviour_section, 100, 0.9),
    "noise": Experiment(noise_section, 50, 4.0),
    "energy": Experiment(energy_section, 100, 0.3),
    "attention": Experiment(attention_section, 100, 0.3),
    "swap": Experiment(swap_section, 40, 3.6),
    "ensemble": Experiment(ensemble_section, 60, 4.0),
    "counts": Experiment(count_section, 40, 1.5),
}


def work(model: str, run: Run, name: str, n: int, command: str) -> tuple[str, float]:
    """Make one section, unless `run` holds it; its name, and the seconds of processor that it took. For a process of its own."""
    torch.set_num_threads(1)
    begin, file = process_time(), f"{name}/section.json"
    if not run.has(file):
        section = EXPERIMENTS[name].make(_load(model), Run(run.path(name), run.settings), n)
        claims = tuple(replace(claim, command=command) for claim in section.claims)
        run.save_json(file, asdict(replace(section, claims=claims)))
    return name, process_time() - begin


def finished(run: Run, names: Sequence[str]) -> dict[str, Section]:
    """The sections that `run` holds, in the order of the report."""
    return {name: report.from_json(run.load_json(f"{name}/section.json")) for name in EXPERIMENTS if name in names}


_load = cache(load)
