"""What changes the outcome: noise, seeds that share states, fewer steps and other lengths."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis import report
from minicos.analysis.ensemble import share as ensemble
from minicos.analysis.ensemble import study as ensemble_study
from minicos.analysis.noise import results as sensitivity
from minicos.analysis.noise import study as noise_study
from minicos.analysis.report import Section, difference, mean
from minicos.analysis.reproduce.subjects import AT_LEAST, SHORT, fewer, groups, several
from minicos.analysis.tools import cases, figures, stats
from minicos.analysis.tools.cases import Case, held_out
from minicos.runs import Run
from minicos.wan import Wan


def noise_section(wan: Wan, run: Run, n: int) -> Section:
    wan = wan.with_preset(steps=SHORT)
    at = tuple(
        SHORT * k // 4 for k in range(4)
    )  # as many as there are latent frames, so that doses match
    claims, told, shown = [], {}, []
    for mode, count in (("renoise", fewer(n)), ("replace", n)):
        inside = Run(run.path(mode), run.settings)
        results = noise_study.study(
            wan, several(count), inside, noise_study.Plan(mode, at=at, others=1)
        )
        names = sensitivity.draw(results, wan, inside)
        shown += [
            f"{mode}/{name}"
            for name in names
            if name in ("sensitivity.png", "frames.png", "videos.png")
        ]
        clean, kinds = (
            results.runs["clean"]["solved"].astype(float),
            (results.names("step"), results.names("frame")),
        )
        moved = [np.mean([results.final(name) for name in kind], axis=0) for kind in kinds]
        lost = [
            np.mean([clean - results.runs[name]["solved"] for name in kind], axis=0)
            for kind in kinds
        ]
        doses = [np.mean([results.dose(name) for name in kind], axis=0) for kind in kinds]
        beside = np.mean([results.untouched(name) for name in kinds[1]], axis=0)
        damage, same = (
            sensitivity.sensitivity(results),
            "the same cells (steps x frames), frame by frame",
        )
        claims += [
            difference(f"{mode}: D of the video, step noise minus frame noise", *moved, same),
            difference(f"{mode}: mazes lost, step noise minus frame noise", *lost, same),
            difference(
                f"{mode}: dose, step minus frame noise, share of the latter",
                doses[0] / doses[1],
                1,
                "0: matched",
            ),
            difference(
                f"{mode}: D, noise at step {at[0]} minus step {at[-1]}",
                damage[:, 0],
                damage[:, -1],
                f"step {at[-1]}",
            ),
            mean(
                f"{mode}: D of the frames beside the noised one",
                beside,
                "0: frames do not depend on each other",
            ),
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
`renoise` keeps the clean estimate and draws its noise again, on the schedule; `replace`, the paper's, puts noise alone. D =
0 is the same video and 1 another seed's. By construction the null intervention gives 0, and step 0 is a reseed. A late
`replace` leaves noise that the later steps are not told of and cannot remove in any model, in all frames or in one; a model
that treated frames alone would lose as much by either, and still by the early steps of step noise, which frame noise
overwrites: part of a positive difference under `replace` is no finding.

`renoise`: step noise moves the video by D = {told["renoise"][0]}, frame noise by {told["renoise"][1]}: {claims[0]}. They
lose {told["renoise"][2]} and {told["renoise"][3]} of the mazes (solved clean: {clean.mean():.2f}): {claims[1]}.
`replace`: D = {told["replace"][0]} and {told["replace"][1]}: {claims[5]}; lost {told["replace"][2]} and
{told["replace"][3]}: {claims[6]}. The paper finds a step fragile and a frame robust, at doses that differ."""
    return Section("Noise at a step, noise in a frame", text, tuple(claims), tuple(shown))


def handover_section(wan: Wan, run: Run, n: int) -> Section:
    wan, at = wan.with_preset(steps=SHORT), (1, 3, 5, 7)
    usual = wan.preset.boundary
    # D compares latents: without their puzzles no video is decoded
    unscored = [replace(case, puzzle=None) for case in several(fewer(n))]
    damage, serves = {}, {}
    for boundary in (0.96, usual, 0.8):
        moved = wan.with_preset(boundary=boundary)
        inside = Run(run.path(f"{boundary:g}"), run.settings)
        results = noise_study.study(
            moved, unscored, inside, noise_study.Plan("renoise", at=at, frames=(), others=1)
        )
        damage[boundary] = sensitivity.sensitivity(results)  # n steps
        serves[boundary] = [moved.expert_name(t) for t in moved.schedule().timesteps]
    claims = []
    for boundary in (0.96, 0.8):
        other = [serves[boundary][s] != serves[usual][s] for s in at]
        for which, chosen in (
            ("another expert", other),
            ("the same expert", [not o for o in other]),
        ):
            named = ", ".join(str(s) for s, take in zip(at, chosen, strict=True) if take)
            claims.append(
                difference(
                    f"D, noise at steps {named} (served by {which}): boundary {boundary:g} minus {usual:g}",
                    damage[boundary][:, chosen].mean(1),
                    damage[usual][:, chosen].mean(1),
                    f"boundary {usual:g}",
                )
            )
    begins = {boundary: serves[boundary].index("low") for boundary in damage}
    figures.bands(
        run.path("handover.png"),
        {
            f"low-noise expert from step {begins[b]}": sensitivity.curve(d, np.array(at))
            for b, d in damage.items()
        },
        x="step that is noised (renoise)",
        y="D of the video",
        title="Does sensitivity follow the hand-over between the experts?",
    )
    rates = "; ".join(
        f"{', '.join(f'{v:.2f}' for v in d.mean(0))} with the hand-over at step {begins[b]}"
        for b, d in damage.items()
    )
    text = f"""\
The paper's sensitivity peaks where its tools change experts, so that the peak could be the hand-over's. Here the boundary is moved
({usual:g} in training) and the rest kept: noise at the steps {", ".join(map(str, at))} of {SHORT}, on the schedule (`minicos noise
--mode renoise --boundaries 0.96,{usual:g},0.8`). D is measured in latents. If sensitivity belongs to the noise level, curves stay; if
to the expert, they move where another expert serves a step.

D at these steps: {rates}. At the steps that changed hands: {claims[0]} (boundary 0.96) and {claims[2]} (0.8)."""
    return Section(
        "Noise and the hand-over between experts", text, tuple(claims), ("handover.png",)
    )


def ensemble_section(wan: Wan, run: Run, n: int) -> Section:
    short, size, dev = 8, 5, max(AT_LEAST, n // 10)
    wan = wan.with_preset(steps=short)
    depth = len(wan.experts["high"].blocks)
    like = ensemble.Ensemble((0,))
    early = replace(like, steps=tuple(range(short // 4)))
    arms = [
        ensemble_study.ablation(depth, ((20, 29), (0, 9), (0, 39)), ("override",), like),
        ensemble_study.ablation(depth, ((20, 29),), ("update",), early),
    ]
    subjects = {
        split: groups(held_out("maze", k, size=size, split=split), 10)
        for split, k in (("dev", dev), ("test", n))
    }
    chosen, rows = ensemble_study.experiment(
        wan, run, arms, subjects["dev"], subjects["test"], instead=False
    )
    paper, base = next(iter(arms[0])), rows[0].rate
    claims = tuple(
        replace(
            report.of(
                f"mazes solved: {row.name}, minus plain", row.gain, _role(row, chosen, paper)
            ),
            resolvable=row.resolvable,
        )
        for row in sorted(rows[1:], key=lambda row: row.name != paper)
    )
    figures.intervals(
        run.path("ensemble.png"),
        {row.name: (row.gain.value, row.gain.low, row.gain.high) for row in rows[1:]},
        x=f"gain in puzzles solved over one plain run ({base.value:.2f})",
        strong=chosen,
        title=f"Three seeds, {n} mazes of {size}x{size}, {short} steps; red: chosen on {dev} dev mazes",
    )
    by = {row.name: row for row in rows}
    best = by["best of 3 plain runs (oracle)"]
    text = f"""\
States of the middle blocks are averaged over three seeds, early, and one trajectory is finished (`minicos ensemble`), on
{size}x{size} mazes, larger than any that the model was trained on, at {short} steps: one plain run solves {base.value:.2f}. Three
windows and a rival mode were tried on {dev} dev mazes, and "{chosen}" was taken (most solved; of equals the first). On test
it stands beside the paper's windows, with p values corrected after Holm. By construction only the last layer of an override
counts, and step 0 of {short} moves the latent further than step 0 of 50: D of the paper's window to the plain run is
{by[paper].distance or 0:.1g}.

The paper's window gains {claims[0]}; {n} mazes find a gain of {by[paper].resolvable:.2f} or more. The arm chosen on dev gains
{by[chosen].gain}, at {by[chosen].passes:.0f} network passes where a plain run takes {short}. At {best.passes:.0f} passes a vote among
three plain runs gains {by["vote among 3 plain runs"].gain}, and an oracle that picks the best of them {best.gain}: what there is
to be gained."""
    return Section("Seeds that share states", text, claims, ("ensemble.png",))


def _role(row: ensemble_study.Row, chosen: str, paper: str) -> str:
    """What a row is held against, or is a control of."""
    roles = {
        "other cases": "wrong donors",
        "random direction": "random direction of equal norm",
        "vote": "rival at equal compute",
        "best of": "upper bound at equal compute",
    }
    for key, role in roles.items():
        if key in row.name:
            return role
    facts = [f"p = {row.p_holm:.2g} after Holm"] * (row.p_holm is not None)
    facts += ["the paper's window"] * (row.name == paper) + ["chosen on dev"] * (row.name == chosen)
    return "; ".join(["plain run, T = 1", *facts])


def count_section(wan: Wan, run: Run, n: int) -> Section:
    n, whole, usual = fewer(n), wan.preset.steps, wan.preset.frames
    settings = {f"{k} steps": {"steps": k} for k in (whole, SHORT, 4, 2, 1)}
    settings |= {f"{f} frames": {"frames": f} for f in (usual - 4, usual + 4)}
    mazes, solved = groups(held_out("maze", n), 20), {}
    for name, changes in settings.items():
        found = cases.collect(
            run, name.replace(" ", "_"), mazes, partial(success, wan.with_preset(**changes))
        )
        solved[name] = found["solved"]
    base = solved[f"{whole} steps"]
    claims = tuple(
        difference(
            f"mazes solved: {name} minus {whole} steps, {usual} frames",
            values,
            base,
            f"{whole} steps, {usual} frames",
        )
        for name, values in solved.items()
        if values is not base
    )
    figures.intervals(
        run.path("counts.png"),
        {name: _triple(values) for name, values in solved.items()},
        x="share of mazes solved",
        title=f"{n} mazes; {usual} frames unless said, {whole} steps unless said",
    )
    rates = ", ".join(f"{values.mean():.2f} at {name}" for name, values in solved.items())
    text = f"""\
Few-step sampling, and other lengths of video (`minicos distilled` and `minicos frames` measure convergence and sensitivity
there as well). The model was trained at {usual} frames and is not distilled, so that other counts are out of distribution; one
step returns the first clean estimate, a mixture wherever there is a choice. Solved: {rates}."""
    return Section("Fewer steps, other lengths", text, claims, ("counts.png",))


def success(wan: Wan, batch: Sequence[Case]) -> dict[str, Tensor]:
    """Whether each puzzle is solved, 0 or 1: b."""
    condition = cases.condition(wan, batch)
    *_, last = wan.sample(condition, noise=cases.noise(wan, condition, batch))
    return {
        "solved": torch.tensor(
            [float(score.solved) for score in cases.scores(wan, last.next, batch)]
        )
    }


def _triple(values: np.ndarray) -> tuple[float, float, float]:
    interval = stats.bootstrap(values)
    return interval.value, interval.low, interval.high
