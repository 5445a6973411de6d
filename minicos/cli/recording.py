"""What `steps`, `energy` and `attention` share: record one run of the user's own, or make the
study of held-out puzzles.
"""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minicos.analysis.options import OWN, PUZZLES, Puzzles, RecordOptions
from minicos.cli import opening, options, run_folder, study
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.tools.record import Recorder
    from minicos.condition import WanCondition
    from minicos.runs import Run
    from minicos.wan import Wan

VERBS = ("steps", "energy", "attention")


def add(
    verbs: Any,
    name: str,
    help: str,
    examples: str,
    cls: type[Puzzles],
    run: Callable[[argparse.Namespace], None],
) -> None:
    """A verb that records with --prompt, and without makes the study of `cls`."""
    parser = options.add_parser(verbs, name, help, examples, run)
    study.add_options(parser, cls, without=("at",))
    options.add_condition_options(parser, required=False)
    study.add_options(parser, RecordOptions)
    others = [verb for verb in VERBS if verb != name]
    parser.add_argument(
        "--also", nargs="+", choices=others, default=[], help="do these in the same pass"
    )
    options.add_model_options(parser, out=f"runs/{name}")
    options.add_jsonl(parser)


def run(args: argparse.Namespace, cls: type[Puzzles], made: study.Study) -> None:
    """Record a run of the user's own, or make the study."""
    if args.prompt is not None:
        study.refuse(args, cls, PUZZLES, study.NO_PUZZLES)
        record(args.verb, args)
    elif args.also:
        raise MinicosError(f"--also {study.NO_PROMPT}")
    elif args.image is not None or args.last is not None:
        raise MinicosError("--image needs a --prompt; without both, held-out puzzles are used")
    else:
        study.refuse(args, RecordOptions, OWN, study.NO_PROMPT)
        study.run(args, cls, made)


def record(name: str, args: argparse.Namespace) -> None:
    """Run the model once, keep what the verbs ask for, and draw it."""
    from minicos.analysis.steps import spread
    from minicos.analysis.tools import record as recording
    from minicos.analysis.tools.figures import evenly

    images, files = opening.images(args), opening.layout_or_peer(args)
    total, depth = opening.plan(args, files).steps, files.depth
    asked = study.read(args, RecordOptions)
    chosen = opening.within(asked.at, total) or spread(8, total)
    layers = asked.layers or tuple(evenly(depth, 8))
    for option, given, count in (
        ("--layers", layers, depth),
        ("--heads", asked.heads or (0,), files.heads),
    ):
        if given[0] < 0 or given[-1] >= count:
            raise MinicosError(f"{option}: this model has them from 0 to {count - 1}.")
    wan = opening.load(args, files, images["image"])
    condition = opening.condition(args, wan, images, asked.seeds)
    names = {name, *args.also}
    recorders = made(names, wan, condition, chosen, layers, asked)
    kept: dict[str, Any] = {"seeds": asked.seeds}
    if "attention" in names:  # the others keep every step and layer, and may be drawn anew
        more = {"heads": asked.heads, "branch": asked.branch, "queries": asked.queries}
        kept |= {"layers": layers, "at": chosen, **more}
    subject = run_folder.subject(args, images)
    folder = run_folder.open_run(args, wan, recorders, latents=True, **subject, **kept)
    recording.record(wan, condition, folder, recorders, wan.noise(condition, args.seed))
    draw(recorders, folder, total)


def made(
    names: set[str],
    wan: "Wan",
    condition: "WanCondition",
    chosen: tuple[int, ...],
    layers: tuple[int, ...],
    asked: RecordOptions,
) -> "list[Recorder]":
    """The recorders of some verbs, in the order of VERBS."""
    from minicos.analysis.attention import PARTS, Attention, gives_lse
    from minicos.analysis.energy import Energy
    from minicos.analysis.steps import Steps

    prompt = wan.words(condition, asked.branch)
    parts = [part for part in PARTS if part in wan.sublayers]
    every: dict[str, Recorder] = {
        "steps": Steps(wan, chosen),
        "energy": Energy(chosen, behind=wan.frames_behind_token, ops=wan.ops),
        "attention": Attention(
            layers,
            chosen,
            asked.heads,
            asked.branch,
            prompt,
            asked.queries,
            wan.ops,
            gives_lse(wan),
            parts,
        ),
    }
    return [every[verb] for verb in VERBS if verb in names]


def draw(recorders: "list[Recorder]", folder: "Run", steps: int) -> None:
    """Draw what was kept, make the page of the run, and print where."""
    from minicos.analysis.tools.record import recorded
    from minicos.page.gather import write

    for recorder in recorders:
        first, *rest = recorder.draw(recorded(folder, recorder.name, steps), folder)
        print(f"{folder.path(first)}  (and {len(rest)} more)")
    print(f"{write(folder)}  (all of it on one page: open it in a browser)")
