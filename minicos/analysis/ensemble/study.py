"""Does averaging mid-layer states over seeds help? Arms are chosen on one split and reported on
another (paper, Sec. 6).

`share` defines what is shared, and when; `plan` adds controls and rivals to the arms. A gain is the
paired difference to the plain run of the same seed. D to the plain run is reported with every gain:
an arm that moves nothing cannot gain anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minicos.analysis.ensemble import measure
from minicos.analysis.ensemble.measure import compare, moved
from minicos.analysis.ensemble.plan import controls, plan, rivals
from minicos.analysis.ensemble.share import Ensemble
from minicos.analysis.options import EnsembleOptions
from minicos.analysis.outline import Outline
from minicos.analysis.result import Interval, Number, Result, Row, write
from minicos.analysis.tools import cases, figures, stats
from minicos.analysis.tools.cases import Case
from minicos.analysis.tools.observer import IDEAL, Observer, folder
from minicos.analysis.tools.shown import save_videos
from minicos.errors import MinicosError
from minicos.media import save_video
from minicos.runs import Progress, Run
from minicos.video_model import VideoModel

BATCH = 10  # puzzles that are computed, and stored, at a time
COLUMNS = 7  # frames in the sheet


def check(wan: Outline, options: EnsembleOptions) -> None:
    """Raise MinicosError for what cannot be done, before anything runs."""
    plan(wan, options)
    if options.prompt is None and options.n < options.seeds:
        raise MinicosError(
            f"--n {options.n}: the wrong donors of {options.seeds} seeds take as many puzzles"
        )


def study(wan: VideoModel, run: Run, options: EnsembleOptions) -> Result:
    """Choose an arm on the dev split and report it on the test split; for a case of the user's own,
    videos and D of every arm.
    """
    check(wan, options)
    arms = plan(wan, options)
    if options.prompt is None:
        found = _puzzles(wan, run, arms, options)
    else:
        found = _own(wan, run, {name: e for some in arms for name, e in some.items()}, options)
    return write(run, found)


def _puzzles(
    wan: VideoModel, run: Run, arms: Sequence[Mapping[str, Ensemble]], options: EnsembleOptions
) -> Result:
    tried = sum(map(len, arms))
    choose = options.choose if tried > 1 else 0
    most = max(BATCH, options.seeds)
    dev = _batches(replace(options, split="dev", n=choose), most) if choose else []
    test = _batches(replace(options, split="test"), most)
    instead = not options.no_rivals
    chosen, table = experiment(wan, run, arms, dev, test, instead, options.select)
    how = f"chosen on {choose} dev puzzles" if choose else "fixed beforehand"
    plain, *others = table
    gains = {str(row["arm"]): row["gain"] for row in others}
    figures.intervals(
        run.path("ensemble.png"),
        {name: gain for name, gain in gains.items() if isinstance(gain, Interval)},
        x=f"gain in puzzles solved over one plain run ({plain['solved']}), n = {options.n}",
        title=f"{options.seeds} seeds, {options.puzzle}, {wan.preset.steps} steps; red: {chosen}, {how}",
        strong=chosen,
    )
    found = numbers(table, chosen, how, next(iter(arms[0])))
    if options.ideal:
        found += ideal(wan, run, test, options)
    return Result("ensemble", run.settings, found, {"arms": table}, files=["ensemble.png"])


def ideal(
    wan: VideoModel, run: Run, test: Sequence[Sequence[Case]], options: EnsembleOptions
) -> list[Number]:
    """The gains of an ideal observer from choosing one of T runs, from the same noise.

    It has no layers whose states could be shared.
    """
    observer = Observer.of(wan)

    def alone(batch: Sequence[Case]) -> dict[str, Tensor]:
        start = measure.starts(observer, batch, options.seeds)
        return measure.plain_runs(observer, batch, *start, options.select)[0]

    return ideal_numbers(cases.collect(run, folder("test", IDEAL), test, alone))


def ideal_numbers(data: Mapping[str, np.ndarray]) -> list[Number]:
    """The gains of `instead` over the first of an observer's plain runs."""
    base = data["plain.solved"][:, 0].astype(float)
    gains = {
        name: stats.average(solved - base, signed=True) for name, solved in instead(data).items()
    }
    return [
        Number.of(f"puzzles solved: {name}, minus plain: {IDEAL}", gain, unit="share")
        for name, gain in gains.items()
    ]


def _batches(options: EnsembleOptions, most: int) -> list[list[Case]]:
    """Puzzles in even batches of at least `most`, if there are enough of one shape: wrong donors
    come from the same batch.
    """
    out = []
    for made in cases.alike(cases.chosen(options)):
        count = max(1, len(made) // most)
        out += [made[len(made) * i // count : len(made) * (i + 1) // count] for i in range(count)]
    return out


def numbers(table: Sequence[Row], chosen: str, how: str, paper: str) -> list[Number]:
    """The share that a plain run solves, then every gain over it; the paper's window first."""
    plain, *others = table
    found = []
    for row in (plain, *sorted(others, key=lambda row: row["arm"] != paper)):
        name, p, power = str(row["arm"]), row.get("p after Holm"), row.get("finds a gain of")
        notes = [f"p = {p:.2g} after Holm"] if isinstance(p, float) else []
        notes += ["the first arm"] * (name == paper) + [how] * (name == chosen)
        notes += [role for key, role in ROLES.items() if key in name]
        if isinstance(row.get("D to plain"), float):
            notes.append(f"D to the plain run {row['D to plain']:.3g}")
        title = f"puzzles solved: {name}" + (", minus plain" if row is not plain else "")
        value = row["solved"] if row is plain else row["gain"]
        if isinstance(value, Interval):
            number = Number.of(title, value, unit="share", note="; ".join(notes))
            if isinstance(power, float) and isinstance(row["p"], float):
                number = replace(number, resolvable=power, p=row["p"])
            found.append(number)
    return found


ROLES = {  # what a row is a control of
    "other cases": "wrong donors",
    "random direction": "random direction of equal norm",
    "vote": "rival at equal compute",
    "best of": "upper bound at equal compute",
    "early selection": "rival that scores clean estimates",
}


def experiment(
    wan: VideoModel,
    run: Run,
    arms: Sequence[Mapping[str, Ensemble]],
    dev: Sequence[Sequence[Case]],
    test: Sequence[Sequence[Case]],
    instead: bool = True,
    select: int = 1,
) -> tuple[str, list[Row]]:
    """Choose an arm on batches of dev puzzles and report on batches of test puzzles; returns its
    name and the table.

    `arms` holds an `ablation` for each set of steps, the paper's first. All are tried on dev, and
    the one that solves most puzzles is chosen (the first of equals; without dev puzzles the very
    first). On test: the first ablation, the chosen arm, its controls and its `rivals`, which share
    something other than hidden states. Batches are stored in `run` when they are finished.
    """
    candidates = {name: e for some in arms for name, e in some.items()}
    chosen = next(iter(candidates))
    most = len(arms[0]) + 5  # arms on test: perhaps another one, its controls, rivals
    bar = Progress(len(dev) * (1 + len(candidates)) + len(test) * (1 + most), "ensemble")
    if dev:
        data = _collect(wan, run, "dev", dev, candidates, bar)
        chosen = max(candidates, key=lambda name: data[f"{name}.solved"].mean())
    family = {**arms[0], chosen: candidates[chosen]}
    tried = {
        **family,
        **controls(chosen, candidates[chosen]),
        **(rivals(candidates[chosen]) if instead else {}),
    }
    bar.skip(len(test) * (most - len(tried)))
    with bar:
        tested = _collect(wan, run, "test", test, tried, bar, select)
    return chosen, rows(tested, tried, list(family))


def _collect(
    wan: VideoModel,
    run: Run,
    name: str,
    work: Sequence[Sequence[Case]],
    arms: Mapping[str, Ensemble],
    bar: Progress,
    select: int = 1,
) -> dict[str, np.ndarray]:
    """`compare` of every batch. `bar` has a tick for its plain runs, and one for each arm."""
    bar.skip(len(arms) * sum(run.has(cases.stored(name, i)) for i in range(len(work))))
    return cases.collect(run, name, work, partial(compare, wan, arms, select=select, bar=bar), bar)


def rows(
    data: Mapping[str, np.ndarray], arms: Mapping[str, Ensemble], family: Sequence[str]
) -> list[Row]:
    """The table: plain, the arms in order, then the rivals that choose among T plain runs. The p
    values of `family` are corrected together.

    Columns:
        solved: share of puzzles.
        gain, p: paired difference to the plain carrier, and its sign-flip test.
        finds a gain of: the smallest gain that this number of puzzles can resolve, given the
            scatter (of at least one changed puzzle).
        D to plain: 0 the same video, 1 as different as another seed.
        passes: through the network, per puzzle.
    """
    (carrier,) = {e.carrier for e in arms.values()}
    plain = data["plain.solved"].astype(float)
    seeds, passes = plain.shape[1], float(data["plain.passes"].mean())
    base = plain.mean(1) if carrier is None else plain[:, carrier]
    solved = {name: data[f"{name}.solved"].astype(float).mean(1) for name in arms} | instead(data)
    rivals_passes = dict.fromkeys(solved, passes)
    if "plain.early" in data:
        rivals_passes[EARLY.format(seeds)] = float(data["plain.early.passes"].mean())
    p = {name: stats.p_value(values - base) for name, values in solved.items()}
    corrected = dict(zip(family, stats.holm([p[name] for name in family]), strict=True))
    table: list[Row] = [
        {"arm": "plain (T = 1)", "solved": stats.average(base), "passes": passes / seeds}
    ]
    for name, values in solved.items():
        gain = values - base
        table.append(
            {
                "arm": name,
                "solved": stats.average(values),
                "gain": stats.average(gain, signed=True),
                "p": p[name],
                "p after Holm": corrected.get(name),
                "finds a gain of": stats.resolvable(
                    max(float(gain.std()), len(gain) ** -0.5), len(gain)
                ),
                "D to plain": moved(data, name) if name in arms else None,
                "passes": float(data[f"{name}.passes"].mean())
                if name in arms
                else rivals_passes[name],
            }
        )
    return table


EARLY = "early selection among {} seeds"


def instead(data: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rivals that choose among T plain runs: name -> whether the chosen run solves each puzzle."""
    plain = data["plain.solved"].astype(float)
    each, seeds = range(len(plain)), plain.shape[1]
    solved = {
        f"vote among {seeds} plain runs": plain[each, data["plain.vote"]],
        f"best of {seeds} plain runs (oracle)": plain.max(1),
    }
    if "plain.early" in data:
        solved[EARLY.format(seeds)] = plain[each, data["plain.early"]]
    return solved


# -- a case of the user's own ----------------------------------------------------------------------


def _own(
    wan: VideoModel, run: Run, arms: Mapping[str, Ensemble], options: EnsembleOptions
) -> Result:
    """Every plain run and every arm as videos side by side, and D of each arm to its plain run."""
    first = next(iter(arms))
    *_, random = controls(first, arms[first]).items()
    arms = {**arms, random[0]: random[1]}
    case = cases.chosen(replace(options, seeds=1))
    with Progress(1 + len(arms), "ensemble") as bar:
        data = _collect(wan, run, "latents", [case], arms, bar)
    passes = float(data["plain.passes"][0]) / options.seeds
    table: list[Row] = [{"arm": "plain, each", "passes": passes}]
    table += [
        {
            "arm": name,
            "D to plain": None if options.seeds == 1 else moved(data, name),
            "passes": float(data[f"{name}.passes"][0]),
        }
        for name in arms
    ]
    return Result(
        "ensemble", run.settings, (), {"arms": table}, files=_videos(wan, run, data, arms)
    )


def _videos(
    wan: VideoModel, run: Run, data: Mapping[str, np.ndarray], arms: Mapping[str, Ensemble]
) -> list[str]:
    """A video of every run, all of them side by side, and a sheet."""
    videos = {}
    for name in ("plain", *arms):
        for j, latent in enumerate(torch.from_numpy(data[f"{name}.latent"][0])):
            seed = f", seed {j}" if j or name == "plain" else ""
            label = f"{name}{seed}"
            videos[label] = wan.decode(latent[None])[0]
    save_videos(run, videos, wan.preset.fps)
    together = np.concatenate(list(videos.values()), axis=2)
    save_video(run.path("side_by_side.mp4"), together, fps=wan.preset.fps)
    columns = figures.evenly(len(together), COLUMNS)
    figures.sheet(
        run.path("ensemble_sheet.png"),
        [[video[f] for f in columns] for video in videos.values()],
        rows=[label.replace(", ", "\n") for label in videos],
        columns=[f"frame {f}" for f in columns],
        title="Plain runs and ensembles of the same seeds",
    )
    return ["side_by_side.mp4", "ensemble_sheet.png"]
