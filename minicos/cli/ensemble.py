"""`minicos ensemble`: average hidden states over seeds, on puzzles that are scored or on a picture of one's own."""

import argparse
from typing import TYPE_CHECKING

from minicos.cli import opening, options, run_folder, values
from minicos.cli.subjects import add_subject_options

if TYPE_CHECKING:
    from minicos.analysis.ensemble.share import Ensemble
    from minicos.analysis.ensemble.study import Row
    from minicos.runs import Run
    from minicos.wan import Wan

EXAMPLES = """\
  minicos ensemble --puzzle maze --size 5 --n 100                     the window ablation on held-out mazes, with rivals and controls
  minicos ensemble --puzzle maze --size 5 --steps 8 --at 0,0-3 --modes lockstep,update --windows 20-29
  minicos ensemble --image maze.png --prompt "solve the maze"         your own picture: videos side by side, and how far apart
puzzles: ensemble.png and result.json (rates, gains, intervals); the arm and its steps are chosen on the dev split, reported on test.
Mazes of 4x4 and smaller leave the embedded model little to gain; 5x5 is larger than any it was trained on.
"""
WINDOWS = ((20, 29), (0, 9), (0, 39))  # the paper's first
FRAMES = 7  # columns of the sheet
BATCH = 10  # puzzles computed, and kept, at a time


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "ensemble", "Average hidden states over seeds: does it help?", EXAMPLES, run
    )
    add_subject_options(parser, None, 100, size=5, split=False)
    parser.add_argument(
        "--choose",
        type=values.whole(0, values.MOST_PUZZLES),
        default=40,
        metavar="N",
        help="dev puzzles that choose the arm; 0: the first one is taken",
    )
    parser.add_argument(
        "--negative", dest="negative_prompt", help="what should not; used where guidance is not 1"
    )
    parser.add_argument(
        "--frames", type=values.frames, help="video frames, 4n + 1 (default: the preset's)"
    )
    parser.add_argument(
        "--modes",
        type=names,
        help="override, input_override, lockstep, update, mix (default: override,update; override)",
    )
    parser.add_argument(
        "--windows",
        type=spans,
        help="blocks as of 40, scaled to the model (default: 20-29,0-9,0-39; 20-29)",
    )
    parser.add_argument(
        "--at",
        type=spans,
        help="steps that share, 0 or 0-4; of several, one is chosen (default: 0 and the first quarter; 0)",
    )
    parser.add_argument(
        "--seeds", type=values.positive, default=3, help="runs that share, T (default: 3)"
    )
    parser.add_argument(
        "--alpha", type=values.number, default=0.5, help="of mode mix (default: 0.5)"
    )
    parser.add_argument(
        "--keep-norm", action="store_true", help="give the mean the norm of what it is the mean of"
    )
    parser.add_argument(
        "--branch", choices=("cond", "both"), default="cond", help="guidance passes (default: cond)"
    )
    parser.add_argument(
        "--carrier", default="0", help="the seed that is finished, or 'all' (default: 0)"
    )
    options.add_model_options(parser, out="runs/ensemble")


def names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def spans(text: str) -> tuple[tuple[int, int], ...]:
    """ "0,0-4" -> ((0, 0), (0, 4))"""
    found = tuple(values.span(part) for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"{values.shown(text)} is not a list such as 20-29 or 0,0-4"
        )
    return found


def run(args: argparse.Namespace) -> None:
    from dataclasses import replace

    from minicos.analysis.ensemble.share import Ensemble
    from minicos.analysis.ensemble.study import ablation
    from minicos.errors import MinicosError

    if (args.puzzle is None) == (args.prompt is None):
        raise MinicosError("give --puzzle, or --prompt (and --image where the model takes one)")
    if args.carrier != "all" and not args.carrier.isdecimal():
        raise MinicosError(f"--carrier {args.carrier}: a number from 0, or all")
    scored = args.puzzle is not None
    image = opening.images(args)["image"]
    wan = opening.load(args)
    like = Ensemble(
        (0,),
        seeds=args.seeds,
        alpha=args.alpha,
        mode="mix",
        keep_norm=args.keep_norm,
        branches=("cond", "uncond") if args.branch == "both" else ("cond",),
        carrier=None if args.carrier == "all" else int(args.carrier),
    )
    modes = args.modes or (("override", "update") if scored else ("override",))
    windows = args.windows or (WINDOWS if scored else WINDOWS[:1])
    at = args.at or (((0, 0), (0, max(1, wan.preset.steps // 4) - 1)) if scored else ((0, 0),))
    depth = len(wan.experts["high"].blocks)
    arms = [
        ablation(depth, windows, modes, replace(like, steps=tuple(range(a, b + 1))))
        for a, b in dict.fromkeys(at)
    ]
    settings = {
        "windows": windows,
        "modes": modes,
        "at": at,
        "seeds": args.seeds,
        "alpha": args.alpha,
        "keep_norm": args.keep_norm,
        "branch": args.branch,
        "carrier": args.carrier,
    }
    if scored:
        puzzles(args, wan, arms, settings)
    else:
        own(args, wan, image, {name: e for some in arms for name, e in some.items()}, settings)


def puzzles(
    args: argparse.Namespace, wan: "Wan", arms: list[dict[str, "Ensemble"]], settings: dict
) -> None:
    """Choose an arm on the dev split, report it with the ablation, its controls and its rivals on the test split."""
    from dataclasses import asdict

    from minicos.analysis.ensemble.study import experiment
    from minicos.analysis.tools import figures
    from minicos.errors import MinicosError

    if args.n < args.seeds:
        raise MinicosError(
            f"--n {args.n}: the wrong donors of {args.seeds} seeds take as many puzzles"
        )
    settings |= {"puzzle": args.puzzle, "size": args.size, "n": args.n, "choose": args.choose}
    test = held_out(args, "test", args.n)
    dev = held_out(args, "dev", args.choose) if args.choose and sum(map(len, arms)) > 1 else []
    folder = run_folder.open_run(args, wan, [], **settings)
    chosen, table = experiment(wan, folder, arms, dev, test)
    how = f"chosen on {args.choose} dev puzzles" if dev else "fixed beforehand"
    folder.save_json("result.json", {"chosen": chosen, "rows": [asdict(row) for row in table]})
    figures.intervals(
        folder.path("ensemble.png"),
        {row.name: (row.gain.value, row.gain.low, row.gain.high) for row in table[1:]},
        x=f"gain in puzzles solved over one plain run ({table[0].rate.value:.2f}), n = {args.n}",
        title=f"{args.seeds} seeds, {args.puzzle} {args.size}x{args.size}, {wan.preset.steps} steps; red: {how}",
        strong=chosen,
    )
    show(table)
    (row,) = (row for row in table if row.name == chosen)
    tested = sum(row.p_holm is not None for row in table)
    print(
        f"\n{chosen}, {how}: gain {row.gain}; p = {row.p_holm:.2g} after Holm over {tested} arms."
        f"\n{args.n} puzzles find a gain of {row.resolvable:.3f} or more in four of five experiments (5 % level)."
        f"\n{folder.path('ensemble.png')}  {folder.path('result.json')}"
    )


def held_out(args: argparse.Namespace, split: str, n: int) -> list[list]:
    """Puzzles in even batches of BATCH or more: wrong donors need company."""
    from minicos.analysis.tools import cases

    made = cases.held_out(args.puzzle, n, size=args.size, split=split, seed=args.seed)
    count = max(1, n // max(BATCH, args.seeds))
    return [made[n * i // count : n * (i + 1) // count] for i in range(count)]


def show(table: list["Row"]) -> None:
    width = max(len(row.name) for row in table)
    print(f"{'':{width}}  solved  gain    95 % interval     p      Holm    D to plain  passes")
    first, *others = table
    print(f"{first.name:{width}}  {first.rate.value:6.3f}  {first.passes:58.1f}")
    for row in others:
        holm = "" if row.p_holm is None else f"{row.p_holm:.2g}"
        distance = "" if row.distance is None else f"{row.distance:.3f}"
        print(
            f"{row.name:{width}}  {row.rate.value:6.3f}  {row.gain.value:+.3f}  [{row.gain.low:+.3f}, {row.gain.high:+.3f}]"
            f"  {row.p:<6.2g} {holm:6}  {distance:>8}  {row.passes:6.1f}"
        )


def own(
    args: argparse.Namespace, wan: "Wan", image: object, arms: dict[str, "Ensemble"], settings: dict
) -> None:
    """One picture or prompt: every plain run and every arm as videos, side by side, and D of each arm to its plain run."""
    from functools import partial

    from minicos.analysis.ensemble.study import compare, controls, moved
    from minicos.analysis.tools import cases

    first = next(iter(arms))
    *_, random = controls(first, arms[first]).items()
    arms = {**arms, random[0]: random[1]}
    opening.tell_unknown(wan, args.prompt)
    folder = run_folder.open_run(
        args, wan, [], **settings, **run_folder.subject(args, {"image": image})
    )
    case = cases.Case(args.prompt, image, args.seed)
    data = cases.collect(folder, "latents", [[case]], partial(compare, wan, arms))
    draw(folder, wan, data, arms)
    print(
        "D: 0 the plain run's video, 1 as different as another seed. Passes: samples through the network."
    )
    print(
        f"  {'plain, each':40}          {float(data['plain.passes'][0]) / args.seeds:7.0f} passes"
    )
    for name in arms:
        distance = "" if args.seeds == 1 else f"D {moved(data, name):.3f}"
        print(f"  {name:40}  {distance}  {float(data[f'{name}.passes'][0]):7.0f} passes")
    print(
        f"{folder.path('side_by_side.mp4')}  {folder.path('ensemble_sheet.png')}  (and one video for each run in {folder.path('videos')})"
    )


def draw(folder: "Run", wan: "Wan", data: dict, arms: dict[str, "Ensemble"]) -> None:
    import numpy as np
    import torch

    from minicos.analysis.tools import figures
    from minicos.media import save_video

    videos = {}
    for name in ("plain", *arms):
        for j, latent in enumerate(torch.from_numpy(data[f"{name}.latent"][0])):
            label = (
                f"plain, seed {j}" if name == "plain" else name if j == 0 else f"{name}, seed {j}"
            )
            videos[label] = wan.decode(latent[None])[0]
            file = "".join(c if c.isalnum() or c in "-." else "_" for c in label)
            save_video(folder.path(f"videos/{file}.mp4"), videos[label], fps=wan.preset.fps)
    save_video(
        folder.path("side_by_side.mp4"),
        np.concatenate(list(videos.values()), axis=2),
        fps=wan.preset.fps,
    )
    columns = figures.evenly(len(next(iter(videos.values()))), FRAMES)
    figures.sheet(
        folder.path("ensemble_sheet.png"),
        [[video[f] for f in columns] for video in videos.values()],
        rows=[label.replace(", ", "\n") for label in videos],
        columns=[f"frame {f}" for f in columns],
        title="Plain runs and ensembles of the same seeds",
    )
