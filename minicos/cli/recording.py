"""What `steps`, `energy` and `attention` share: record one run of the user's own, or run the study
on held-out puzzles.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minicos.analysis.options import OWN, PUZZLES, Puzzles, RecordOptions
from minicos.cli import opening, options, run_folder, study, values, watched
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.analysis.result import Result
    from minicos.analysis.tools.record import Recorder
    from minicos.condition import Condition
    from minicos.runs import Progress, Run
    from minicos.video_model import VideoModel

VERBS = ("steps", "energy", "attention")


def add(
    verbs: Any,
    name: str,
    help: str,
    examples: str,
    cls: type[Puzzles],
    run: Callable[[argparse.Namespace], None],
) -> None:
    """Add a verb that records one run with --prompt, and runs the study of `cls` with --n."""
    parser = options.add_parser(verbs, name, help, examples, run)
    study.add_json(parser)
    study.add_options(parser, cls, without=("at", "n"))
    parser.group(PUZZLES).add_argument(
        "--n", type=values.positive, help="the study: measure so many puzzles (default: watch one)"
    )
    options.add_condition_options(parser, required=False, heading=OWN)
    study.add_options(parser, RecordOptions)
    others = [verb for verb in VERBS if verb != name]
    parser.group(study.MEASURED).add_argument(
        "--also", nargs="+", choices=others, default=[], help="do these in the same pass"
    )
    options.add_model_options(parser, out=f"runs/{name}")
    options.add_jsonl(parser)


def run(args: argparse.Namespace, cls: type[Puzzles], made: study.Study) -> None:
    """Record one run, of the user's own or of a puzzle; with --n, run the study."""
    if args.n is None:
        if args.prompt is not None:
            study.refuse(args, cls, PUZZLES, study.NO_PUZZLES)
        record(args.verb, args)
    elif args.prompt is not None:
        raise MinicosError(f"--n {study.NO_PUZZLES}")
    elif args.also:
        raise MinicosError("--also goes with one run: leave it out, or --n")
    elif args.image is not None or args.last is not None:
        flag = "--last" if args.image is None else "--image"
        raise MinicosError(f"{flag} needs a --prompt; --n takes held-out puzzles")
    else:
        study.refuse(args, RecordOptions, OWN, "is an option of one run: leave it out, or --n")
        study.run(args, cls, made)


def record(name: str, args: argparse.Namespace) -> None:
    """Run the model once, keep what the verbs need, and draw it."""
    from minicos.analysis.steps import spread
    from minicos.analysis.tools import record as recording
    from minicos.analysis.tools.figures import evenly

    puzzle = watched.puzzle(args)
    images, files = opening.images(args), opening.layout_or_peer(args)
    watched.check(files, puzzle)
    preset, depth = opening.plan(args, files), files.depth
    total, asked = preset.steps, study.read(args, RecordOptions)
    watched_pass = asked.branch if "attention" in (name, *args.also) else "cond"
    if watched_pass == "uncond" and watched_pass not in preset.branches:
        raise MinicosError(
            "--branch uncond: at guidance 1 a run has no unprompted pass; give --guidance 3"
        )
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
    recorders = [
        *made(names, wan, condition, chosen, layers, asked),
        *watched.recorders(wan, puzzle),
    ]
    kept: dict[str, Any] = {"seeds": asked.seeds}
    if "attention" in names:  # the others keep every step and layer, and can be drawn again
        more = {"heads": asked.heads, "branch": asked.branch, "queries": asked.queries}
        kept |= {"layers": layers, "at": chosen, **more}
    subject = run_folder.subject(args, images)
    folder = run_folder.open_run(args, wan, recorders, latents=True, **subject, **kept)
    noise = wan.noise(condition, args.seed)
    watching = [*recorders, *watched.preview(args, wan)]
    with bar(args, wan, recorders) as shown:
        latent = recording.record(wan, condition, folder, watching, noise, bar=shown)
        finish(args, wan, folder, recorders, latent, images, shown)


def made(
    names: set[str],
    wan: "VideoModel",
    condition: "Condition",
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
        "energy": Energy(
            chosen, behind=wan.frames_behind_token, ops=wan.ops, sigmas=wan.schedule().sigmas
        ),
        "attention": Attention(
            layers,
            chosen,
            heads=asked.heads,
            branch=asked.branch,
            words=prompt,
            queries=asked.queries,
            behind=wan.frames_behind_token,
            ops=wan.ops,
            lse=gives_lse(wan),
            parts=parts,
        ),
    }
    return [every[verb] for verb in VERBS if verb in names]


def bar(args: argparse.Namespace, wan: "VideoModel", recorders: "Sequence[Recorder]") -> "Progress":
    """The progress bar of a whole command: steps, pictures of each recorder, and video."""
    from minicos.runs import Progress

    return Progress(len(wan.schedule()) + len(recorders) + 1, args.verb)


def finish(
    args: argparse.Namespace,
    wan: "VideoModel",
    folder: "Run",
    recorders: "Sequence[Recorder]",
    latent: "Tensor",
    images: "dict[str, Tensor | None]",
    shown: "Progress",
) -> None:
    """Draw and count what was kept, make the page, and print the numbers and where everything is;
    with --json, print the numbers alone.
    """
    found, drawn = draw(args, wan, folder, recorders, latent, images["image"], shown)
    if not study.printed(args, folder, found):
        print(folder.path("video.mp4"))
        for files in drawn:
            print(study.listed(folder, files))
    run_folder.close(args, folder)


def draw(
    args: argparse.Namespace,
    wan: "VideoModel",
    folder: "Run",
    recorders: "Sequence[Recorder]",
    latent: "Tensor",
    picture: "Tensor | None",
    shown: "Progress",
) -> "tuple[Result, list[list[str]]]":
    """Save the video of the first sample and its picture, and draw and count what was kept: the
    result, and the files of each recorder.
    """
    from minicos.analysis.result import Number, Result, write
    from minicos.analysis.tools.figures import pixels
    from minicos.analysis.tools.record import recorded
    from minicos.media import save_image, save_video

    save_video(folder.path("video.mp4"), wan.decode(latent[:1])[0], fps=wan.preset.fps)
    if picture is not None:
        save_image(folder.path("first_frame.png"), pixels(picture))
    schedule = wan.schedule()
    about = {"sigmas": schedule.sigmas, "timesteps": schedule.timesteps}
    folder.save_json("schedule.json", about)
    shown.tick()
    drawn, numbers = list[list[str]](), list[Number]()
    for recorder in recorders:
        saved = recorded(folder, recorder.name, len(schedule))
        drawn.append(recorder.draw(saved, folder))
        numbers += recorder.numbers(saved)
        shown.tick()
    shown.close()
    files = ["video.mp4", *(name for names in drawn for name in names)]
    return write(folder, Result(args.verb, folder.settings, numbers, files=files)), drawn
