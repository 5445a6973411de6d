"""`minicos noise`: what noise at a step or in a frame does. `minicos frames`, `minicos distilled`: the same under several settings."""

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from minicos.cli import opening, options, run_folder, subjects, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.noise.study import Plan
    from minicos.analysis.sweep import Setting
    from minicos.analysis.tools.cases import Case
    from minicos.wan import Wan

T = TypeVar("T")

NOISE = """\
  minicos noise --n 100 --at 0,4,8,12,16                           mazes of the embedded model, the paper's noise
  minicos noise --mode add                                         step and frame noise at exactly equal dose
  minicos noise --preset cos --mode renoise --boundaries 0.8,0.875,0.9,0.95   does the peak follow the hand-over?
  minicos noise --image maze.png --prompt "solve the maze" --seeds 4   a picture of your own under four seeds
prints a table with intervals; open sensitivity.png (dashed: where the experts change), D.png and videos.png
"""
FRAMES = """\
  minicos frames --counts 5,9,13,17
  minicos frames --model Wan2.2-I2V-A14B --image cat.png --prompt "the cat jumps" --counts 5,9,17,33,65,97 --points 5
"""
DISTILLED = """\
  minicos distilled --counts 4,8,20,50
  minicos distilled --counts 4,50 --models Wan2.2-I2V-A14B-4step,Wan2.2-I2V-A14B --image cat.png --prompt "the cat jumps"
with --models, one count for each of them
"""


def add(verbs) -> None:
    for name, help, examples, run in (
        ("noise", "Put noise into one step or one frame, and see what comes of it.", NOISE, noise),
        (
            "frames",
            "Convergence and sensitivity to noise over frame counts.",
            FRAMES,
            partial(several, frames),
        ),
        (
            "distilled",
            "Convergence and sensitivity to noise over few-step sampling or weights.",
            DISTILLED,
            partial(several, distilled),
        ),
    ):
        parser = options.add_parser(verbs, name, help, examples, run)
        subjects.add_subject_options(parser, n=25)
        parser.add_argument(
            "--seeds", type=values.positive, default=1, help="of a case of your own (default: 1)"
        )
        parser.add_argument(
            "--negative",
            dest="negative_prompt",
            help="what should not; used where guidance is not 1",
        )
        how = parser.add_argument_group("noise")
        how.add_argument(
            "--mode",
            choices=("replace", "renoise", "erase", "add"),
            default="replace",
            help="what replaces the latent: N(0, 1); its belief under fresh noise; no belief; itself with noise added (default: replace)",
        )
        how.add_argument(
            "--dose",
            type=values.positive_number,
            help="of add: squared norm in all, in latent frames of unit variance",
        )
        how.add_argument(
            "--layer", type=values.whole(0, 999), help="also compare this block's output by CKA"
        )
        how.add_argument(
            "--others",
            type=values.positive,
            default=2,
            help="other seeds for the yardstick (default: 2)",
        )
        if name == "noise":
            how.add_argument(
                "--at", type=values.indices, help="steps to noise, e.g. 0,5,19 (default: all)"
            )
            how.add_argument(
                "--in",
                dest="inside",
                type=values.indices,
                help="latent frames to noise (default: all)",
            )
            how.add_argument(
                "--match",
                choices=("cells", "none"),
                default="cells",
                help="noise a frame at as many steps as there are frames, or (none, as the paper) at all (default: cells)",
            )
            how.add_argument(
                "--boundaries",
                type=listed(values.share),
                help="several places of the hand-over, e.g. 0.875,0.9",
            )
        else:
            what = "video frames, 4n + 1" if name == "frames" else "denoising steps"
            default = (5, 9, 13, 17) if name == "frames" else (4, 8, 20, 50)
            parser.add_argument(
                "--counts",
                type=values.indices,
                default=default,
                help=f"{what} (default: {','.join(map(str, default))})",
            )
            parser.add_argument(
                "--points",
                type=values.positive,
                default=5,
                help="steps to noise, evenly spread (default: 5)",
            )
        if name != "frames":
            parser.add_argument(
                "--frames", type=values.frames, help="4n + 1 (default: the preset's)"
            )
        if name == "distilled":
            parser.add_argument(
                "--models",
                type=listed(str),
                help="other weights, one for each count, instead of --model",
            )
        options.add_model_options(parser, out=f"runs/{name}")


def listed(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Of an option: values of a kind, separated by commas."""

    def read(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,5,19") from None

    return read


def noise(args: argparse.Namespace) -> None:
    from minicos.analysis.noise import results as sensitivity
    from minicos.analysis.noise.study import Plan, study
    from minicos.analysis.sweep import Setting

    cases, about, wan = _subject(args)
    plan = Plan(
        args.mode, args.at, args.inside, args.match, args.dose, args.layer, args.others, args.seed
    )
    _check(plan, wan)
    if args.boundaries:
        if len(wan.experts) == 1:
            raise MinicosError(
                f"--boundaries lie between two experts, and {wan.variant} has one here."
            )
        settings = {str(b): Setting(wan.with_preset(boundary=b), plan) for b in args.boundaries}
        _told(args, wan, cases, settings, about, "boundary", "step")
        return
    run = run_folder.open_run(args, wan, [], **about, plan=asdict(plan))
    results = study(wan, cases, run, plan)
    run.save_json("results.json", sensitivity.to_json(results))
    pictures = sensitivity.draw(results, wan, run)
    print(sensitivity.table(sensitivity.rows(results)))
    if results.puzzles:
        print(
            f"clean: {results.runs['clean']['solved'].mean():.2f} of {len(cases)} solved; scores are differences to that"
        )
    for name, value in sensitivity.headline(results).items():
        print(f"step noise - frame noise, {name}: {value}")
    top, _ = sensitivity.peak(sensitivity.sensitivity(results), sensitivity.at(results))
    hand = "" if results.handover is None else f"; the experts change at step {results.handover}"
    print(f"D peaks for noise at step {top.value:.0f} [{top.low:.0f}, {top.high:.0f}]{hand}")
    spent, full = results.passes()
    print(
        f"{spent} network passes for the steps' sweep and its clean run: {spent / full:.3f} of as many full runs"
    )
    print(f"{run.path(pictures[0])}  (and {len(pictures) - 1} more)")


def several(settings: Callable, args: argparse.Namespace) -> None:
    cases, about, wan = _subject(args)
    chosen = settings(args, wan)
    _told(args, wan, cases, chosen, about, args.verb, "share" if args.verb == "frames" else "sigma")


def frames(args: argparse.Namespace, wan: "Wan") -> dict[str, "Setting"]:
    from minicos.analysis.sweep import Setting

    if wan.variant == "tiny" and (other := [f for f in args.counts if f != 13]):
        print(
            f"the embedded model was trained at 13 frames: {', '.join(map(str, other))} are out of its distribution"
        )
    plan = _plan(args, wan.preset.steps)
    return {str(count): Setting(wan.with_preset(frames=count), plan) for count in args.counts}


def distilled(args: argparse.Namespace, wan: "Wan") -> dict[str, "Setting"]:
    from minicos.analysis.sweep import Setting

    if args.models is None:
        return {
            f"{count} steps": Setting(wan.with_preset(steps=count), _plan(args, count))
            for count in args.counts
        }
    if len(args.models) != len(args.counts):
        raise MinicosError(
            f"{len(args.models)} --models and {len(args.counts)} --counts: give one count for each model"
        )
    out = {}
    for model, count in zip(args.models, args.counts, strict=True):
        args.model, args.steps = model, count
        out[f"{Path(model).name}, {count} steps"] = Setting(_load(args), _plan(args, count))
    return out


def _plan(args: argparse.Namespace, steps: int) -> "Plan":
    """Noise at `--points` steps spread over the run, the first included and the last not; frame noise is left to `minicos noise`."""
    from minicos.analysis.noise.study import Plan

    points = min(args.points, steps)
    at = tuple(sorted({i * steps // points for i in range(points)}))
    return Plan(args.mode, at, (), "cells", args.dose, args.layer, args.others, args.seed)


def _subject(args: argparse.Namespace) -> "tuple[list[Case], dict, Wan]":
    """The cases, what to remember of them, and the model. A case of the user's own is run under `--seeds` seeds."""
    cases = subjects.subjects(args)
    if args.prompt is not None:
        cases = [replace(cases[0], seed=args.seed + i) for i in range(args.seeds)]
    elif args.model != "tiny":
        raise MinicosError(
            "the puzzles are for the embedded model: give a --prompt, and an --image if the model takes one"
        )
    return cases, subjects.about(args) | {"seeds": args.seeds}, _load(args)


def _load(args: argparse.Namespace) -> "Wan":
    """The model; under Euler unless a solver is asked for, since an edit makes a multistep solver start afresh."""
    wan = opening.load(args, image=subjects.image(args))
    return wan if args.solver else wan.with_preset(solver="euler")


def _check(plan: "Plan", wan: "Wan") -> None:
    """Mistakes in the plan, before a folder is made for it."""
    layers, stride = wan.experts["high"].cfg.num_layers, wan.vae.cfg.stride[0]
    if plan.layer is not None and not 0 <= plan.layer < layers:
        raise MinicosError(f"--layer {plan.layer}: the model has blocks 0 to {layers - 1}")
    plan.edits(wan.preset.steps, [False] * ((wan.preset.frames - 1) // stride + 1))


def _told(
    args: argparse.Namespace,
    wan: "Wan",
    cases: list["Case"],
    settings: dict[str, "Setting"],
    about: dict,
    x: str,
    axis: str,
) -> None:
    """Study the settings, print their table, draw them together."""
    from minicos.analysis import sweep as analysis

    for setting in settings.values():
        _check(setting.plan, setting.wan)
    kept = {
        name: {"preset": asdict(s.wan.preset), "weights": s.wan.weights, "plan": asdict(s.plan)}
        for name, s in settings.items()
    }
    run = run_folder.open_run(args, wan, [], **about, settings=kept)
    named = {re.sub(r"[^\w.]+", "_", name): setting for name, setting in settings.items()}
    found = analysis.compare(named, cases, run)
    rows = analysis.rows(found)
    run.save_json("settings.json", [asdict(row) for row in rows])
    print(analysis.table(rows, x))
    pictures = analysis.picture(found, run, axis)
    print(f"{run.path(pictures[0])}  (each setting has a folder beside it)")
