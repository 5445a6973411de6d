"""What a run believes: answers alive beside the ideal observer's, and when they are decided."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis import behaviours, commitment, report, steps
from minicos.analysis.noise import results as sensitivity
from minicos.analysis.report import Section, difference, mean
from minicos.analysis.reproduce.subjects import SHORT, fewer, groups, several, untrained
from minicos.analysis.tools import cases, figures, posterior, stats
from minicos.analysis.tools.cases import Case, held_out
from minicos.runs import Run
from minicos.wan import Wan


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
            row = (
                posterior.effective(b.ideal),
                posterior.effective(b.shown),
                b.departure,
                b.outside,
                leads,
            )
            table[k, s] = torch.tensor(row)
    return out | dict(
        zip(("ideal", "shown", "departure", "outside", "leads"), table.unbind(2), strict=True)
    )


def strangers(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Departure of a network's first estimate from the ideal observer's: what an untrained one gives."""
    condition = cases.condition(wan, batch)
    first = next(wan.sample(condition, noise=cases.noise(wan, condition, batch)))
    latents = [posterior.answers(wan, case.puzzle) for case in batch]
    each = zip(first.x, first.x0, latents, strict=True)
    return {
        "departure": torch.tensor(
            [posterior.belief(x, x0, first.sigma, z).departure for x, x0, z in each]
        )
    }


def step_section(wan: Wan, run: Run, n: int) -> Section:
    mazes = several(n)
    single = held_out("maze", n, keep=lambda puzzle: not cases.ambiguous(puzzle))
    many = cases.collect(run, "several", groups(mazes, 25), partial(believed, wan))
    one = cases.collect(run, "one", groups(single, 25), partial(believed, wan))
    random = cases.collect(run, "untrained", groups(mazes, 25), partial(strangers, untrained(wan)))
    sigmas, middle = wan.schedule().sigmas, many["ideal"].shape[1] // 2
    chance = np.array([1 / len(case.puzzle.candidates) for case in mazes])
    unit = many["moved"][:, 0, 1:].mean(
        0
    )  # how far the first estimate is from the last one where there is a choice
    settled = {
        name: _settled(data["moved"], unit) for name, data in (("several", many), ("one", one))
    }  # n f
    ideal, shown = many["ideal"], many["shown"]
    claims = (
        difference(
            "answers alive, network: first minus last step",
            shown[:, 0],
            shown[:, -1],
            "the last step",
        ),
        difference(
            "answers alive, ideal observer: first minus last step",
            ideal[:, 0],
            ideal[:, -1],
            "the last step",
        ),
        difference(
            "answers alive at step 0: network minus ideal",
            shown[:, 0],
            ideal[:, 0],
            "ideal observer: all alike",
        ),
        difference(
            f"answers alive at step {middle}: network minus ideal",
            shown[:, middle],
            ideal[:, middle],
            "ideal observer",
        ),
        difference(
            "answer shown most at step 0 is the final one: rate minus chance",
            many["leads"][:, 0],
            chance,
            "one in its routes",
        ),
        mean(
            "departure from the ideal observer at step 0",
            many["departure"][:, 0],
            "0: ideal, 1: as far as another answer",
        ),
        mean(
            f"departure from the ideal observer at step {middle}",
            many["departure"][:, middle],
            "0: ideal",
        ),
        difference(
            "departure at step 0: untrained minus trained",
            random["departure"],
            many["departure"][:, 0],
            "untrained network",
        ),
        mean(
            "step at which the estimate settles, several routes",
            settled["several"].max(1),
            "the last step",
        ),
        report.of(
            "step at which it settles: several minus one route",
            stats.unpaired(settled["several"].max(1), settled["one"].max(1)),
            "mazes with one route (other mazes: unpaired)",
        ),
        difference(
            "step at which it settles: last minus second latent frame",
            *settled["several"][:, [-1, 0]].T,
            "the same video's frames",
        ),
    )
    at = np.arange(len(sigmas) - 1)
    lines = {
        "network": sensitivity.curve(shown, at),
        "ideal observer": sensitivity.curve(ideal, at),
    }
    figures.bands(
        run.path("alive.png"),
        lines,
        x="denoising step",
        y="answers alive",
        title=f"Answers alive in the clean estimate, {n} mazes with several routes",
    )
    lines = {
        "from the ideal observer": many["departure"],
        "of it no mixture of answers": many["outside"],
    }
    figures.bands(
        run.path("departure.png"),
        {name: sensitivity.curve(values, at) for name, values in lines.items()},
        x="denoising step",
        y="1: as far as another answer",
        title="Where the network departs from the ideal observer",
    )
    far = many["moved"].mean(0) / many["moved"][:, 0].mean(0).clip(1e-9)
    figures.grid(
        run.path("convergence.png"),
        far[:, 1:].T,
        x="denoising step",
        y="latent frame after the first",
        title="Distance of every frame's estimate to the last one, 1: as at the first step",
    )
    pictured = {"first maze": mazes[0], "most answers\nat step 0": mazes[int(shown[:, 0].argmax())]}
    alive = [f"{values[:, k].mean():.2f}" for values in (shown, ideal) for k in (0, -1)]
    text = f"""\
Mazes with several right answers, {len(at)} steps (`minicos steps`). Answers alive is the exponential of the entropy of the
weights that an estimate gives to the valid answers; an ideal observer's are exact (`minicos/analysis/posterior.py`). By
construction it holds all routes alike at step 0, where the latent is noise alone, and one at the end: several candidates
early are Bayes' rule. The question is where the network departs from it.

The network's estimate holds {alive[0]} answers at step 0 and {alive[1]} at the last step, the ideal observer's {alive[2]} and
{alive[3]}. At step 0, where nothing can be known, network minus ideal observer is {claims[2]}, and the answer that the
network shows most is the final one in {many["leads"][:, 0].mean():.2f} of the mazes, beyond chance by {claims[4]}: above
zero, the network leans before anything is decided, and ends where it leans. Mazes with several routes settle
{claims[9].brief} steps later than mazes with one. The last latent frame settles {claims[10]} steps after the second: were
the answer found along the frames, later frames would settle later."""
    return Section(
        "Several candidates early, one late",
        text,
        claims,
        (_belief_sheet(wan, run, pictured), "alive.png", "departure.png", "convergence.png"),
    )


def _settled(moved: np.ndarray, unit: np.ndarray, level: float = 0.1) -> np.ndarray:
    """The step from which on an estimate's distance to the last one (n N f) stays below a share of `unit` (f - 1): n (f - 1).

    The given first frame is left out. One unit for all mazes: where there is no choice, even the first estimate may be near.
    """
    return np.array(
        [[behaviours.first_below(curve, level) for curve in (row[:, 1:] / unit).T] for row in moved]
    )


def _belief_sheet(wan: Wan, run: Run, mazes: Mapping[str, Case]) -> str:
    """The last frame of network and ideal observer at several steps of one run, for each maze."""
    if not run.has("sheet.png"):
        rows, names, chosen = [], [], steps.spread(8, wan.preset.steps)
        for name, case in mazes.items():
            condition, z = cases.condition(wan, [case]), posterior.answers(wan, case.puzzle)
            made = [
                s
                for s in wan.sample(condition, noise=cases.noise(wan, condition, [case]))
                if s.index in chosen
            ]
            ideal = [
                posterior.mean(posterior.weights(s.x[0], s.sigma, z), z)[None].float() for s in made
            ]
            for who, estimates in (("network", [s.x0 for s in made]), ("ideal observer", ideal)):
                rows.append(list(wan.decode(torch.cat(estimates))[:, -1]))
                names.append(f"{name}\n{who}")
        columns = [f"step {s.index}\nσ {s.sigma:.2f}" for s in made]
        figures.sheet(
            run.path("sheet.png"),
            rows,
            rows=names,
            columns=columns,
            title="Last frame of the clean estimate",
        )
    return "sheet.png"


def commitment_section(wan: Wan, run: Run, n: int) -> Section:
    wan, n, count = wan.with_preset(steps=SHORT), fewer(n), 3
    mazes, at = several(n), (0, 2, 4, SHORT - 2)

    def compute(batch: Sequence[Case]) -> dict[str, Tensor]:
        return {"answers": commitment.completions(wan, batch, at, count)}

    answers = torch.from_numpy(
        cases.collect(run, "completions", groups(mazes, 25), compute)["answers"]
    )
    routes = [len(case.puzzle.candidates) for case in mazes]
    shares = [commitment.shares(a, r) for a, r in zip(answers, routes, strict=True)]
    committed = np.stack([commitment.commitment(share).numpy() for share in shares])
    valid = (answers >= 0).double().mean(2).numpy()
    agree = ((answers == answers[..., :1]) & (answers >= 0)).all(2).double().numpy()
    first = f"step 0, another seed by construction (of {count} completions)"
    claims = (
        *(
            difference(
                f"commitment at step {s} minus step 0", committed[:, k], committed[:, 0], first
            )
            for k, s in enumerate(at)
            if k
        ),
        difference(
            f"all completions alike and valid: step {at[1]} minus step 0",
            agree[:, 1],
            agree[:, 0],
            first,
        ),
        difference(
            "valid completions: first minus last of these steps",
            valid[:, 0],
            valid[:, -1],
            f"step {at[-1]}",
        ),
    )
    lines = {
        "commitment": sensitivity.curve(committed[np.isfinite(committed).all(1)], np.array(at)),
        "all alike and valid": sensitivity.curve(agree, np.array(at)),
        "valid completions": sensitivity.curve(valid, np.array(at)),
    }
    figures.bands(
        run.path("commitment.png"),
        lines,
        x="step that is completed from",
        y="commitment; share",
        title=f"When is the answer decided? {n} mazes, {count} completions each",
        levels={"decided": commitment.DECIDED},
    )
    course = ", ".join(
        f"{c:.2f} at step {s}" for s, c in zip(at, np.nanmean(committed, 0), strict=True)
    )
    same = ", ".join(f"{c:.2f} at step {s}" for s, c in zip(at, agree.mean(0), strict=True))
    text = f"""\
The clean estimate of a step is thrown back to its noise level and completed {count} times ({SHORT} steps, `minicos
commitment`): commitment is 0 where the completions answer every which way, 1 where they agree. By construction it ends at 1,
and at step 0 completions are nothing but other seeds, so that the agreement there is what so few completions give by chance.

Commitment is {course}; all completions give one valid answer in {same} of the mazes. An estimate can show one answer
and leave it open, or blur what is decided: compare with the answers alive above."""
    return Section("When the answer is decided", text, claims, ("commitment.png",))
