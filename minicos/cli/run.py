"""`minicos run`: several interventions and several recorders in one pass."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from minicos.analysis.options import (
    SHARE,
    SWAP,
    EnsembleOptions,
    NoiseOptions,
    RecordOptions,
    SwapOptions,
    spans,
)
from minicos.cli import knockout, opening, options, recording, run_folder, study, values, watched
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.noise.edit import Noise
    from minicos.analysis.tools.interventions import Interventions
    from minicos.analysis.tools.shown import Where
    from minicos.condition import Condition
    from minicos.video_model import VideoModel

# depends on the model and on the condition of the donor run
Make = Callable[["VideoModel", "Condition"], "Interventions"]
HELP = "Several interventions and analyses in one pass."
EXAMPLES = """\
  minicos run --puzzle maze --noise step:3 --x0
  minicos run --puzzle mark --swap 6 --other "mark the square" --energy --attention 0,6
  minicos run --puzzle maze --noise step:10 --noise step:2,3 frame:1 --ensemble 20-29 --x0
  minicos run --image shapes.png --prompt "mark the circle" --x0 --energy
  minicos run --puzzle maze --knockout frame:0 to frame:1-3 layers:0-5 steps:0-9 --x0
  minicos run --puzzle maze --knockout word:maze to all --knockout causal --attention 0,6
noise changes the latent that enters a step; inside the pass attention is cut first, then the swap
acts, then the ensemble; analyses come last. For the meaning of the options see `minicos noise`,
`swap` and `ensemble`
"""
DETAILS: dict[str, dict[str, Any]] = {  # intervention -> its options, with their defaults
    "noise": {"mode": "replace"},
    "swap": {"what": "stream", "side": "output", "donor": "own", "during": "all"},
    "ensemble": {"modes": ("lockstep",), "share_at": "0", "alpha": 0.5},
}


def add(verbs: Any) -> None:
    parser = options.add_parser(verbs, "run", HELP, EXAMPLES, run)
    study.add_json(parser)
    options.add_condition_options(parser)
    kept = parser.add_argument_group("analyses")
    kept.add_argument("--x0", action="store_true", help="the clean estimate, as in `minicos steps`")
    kept.add_argument(
        "--energy", nargs="?", const="all", choices=("all",), help="token energy of every layer"
    )
    kept.add_argument(
        "--attention",
        type=values.indices,
        metavar="LAYERS",
        help="attention of these layers, e.g. 0,6",
    )
    study.add_options(parser, RecordOptions, only={"at": None}, heading="analyses")
    parser.group(options.VIDEO).add_argument(
        "--seeds",
        type=values.positive,
        help="samples; the first is shown (default: 1; for --ensemble 3)",
    )
    done = parser.add_argument_group("interventions")
    done.add_argument(
        "--noise",
        nargs="+",
        action="append",
        default=[],
        metavar="step:10",
        help="noise at steps, in latent frames, or both: step:10 or frame:1 or step:2,3 frame:1; "
        "can be repeated",
    )
    done.add_argument(
        "--knockout",
        nargs="+",
        action="append",
        default=[],
        metavar="frame:0 to frame:2",
        help=knockout.HELP,
    )
    done.add_argument(
        "--swap", metavar="LAYERS", help="replace these layers' states by those of --other's run"
    )
    done.add_argument(
        "--ensemble", metavar="20-29", help="share these blocks (of 40, scaled) between seeds"
    )
    study.add_options(parser, NoiseOptions, only=DETAILS["noise"])
    study.add_options(parser, SwapOptions, only={"other": None} | DETAILS["swap"], heading=SWAP)
    study.add_options(parser, EnsembleOptions, only=DETAILS["ensemble"], heading=SHARE)
    options.add_model_options(parser, out="runs/run")
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.steps import spread
    from minicos.analysis.tools.interventions import Interventions
    from minicos.analysis.tools.record import record
    from minicos.analysis.tools.shown import Where, list_interventions
    from minicos.weights.files import about

    _check_details(args)
    puzzle = watched.puzzle(args)
    images, files = opening.images(args), opening.layout_or_peer(args)
    watched.check(files, puzzle)
    preset, depth = opening.plan(args, files), files.depth
    total, passes = preset.steps, dict.fromkeys(("cond", "uncond", *preset.branches))
    chosen = opening.within(args.at, total) or spread(8, total)
    seeds = args.seeds or (3 if args.ensemble else 1)
    if args.ensemble and seeds == 1:
        raise MinicosError("--ensemble shares states between seeds: take --seeds 2 or more")
    if args.attention and not 0 <= args.attention[0] <= args.attention[-1] < depth:
        raise MinicosError(f"--attention: this model has layers 0 to {depth - 1}.")
    edits = [_noise(parts, args.mode, args.seed, total) for parts in args.noise]
    cuts = [knockout.read(parts, total, depth, (*passes,)) for parts in args.knockout]
    for parts in args.knockout:
        knockout.check_word(parts, args.prompt)
    inside = _inside(args, total, depth, seeds)
    outline = opening.outline(args, files)
    if outline is not None:
        _check_frames(edits, outline.latent_frames(preset.frames))
        with about(f"--image {args.image}"):
            grid = outline.grid(images["image"])
        for parts in args.knockout:
            knockout.check_places(parts, grid)

    wan = opening.load(args, files, images["image"])
    if edits and args.solver is None:  # an edit makes a multistep solver restart
        wan = wan.with_preset(solver="euler")
    condition = opening.condition(args, wan, images, seeds)
    _check_frames(edits, condition.shape[2])
    pairs = zip(cuts, args.knockout, strict=True)
    cuts = [knockout.resolve(cut, parts, wan, args.prompt) for cut, parts in pairs]
    for cut, parts in zip(cuts, args.knockout, strict=True):
        rows = wan.rows(condition, "cond")
        knockout.check_grid(cut, parts, wan.grid(condition.shape), rows)
    give = condition
    if args.swap:
        give = wan.condition([args.other] * seeds, images["image"], last=images["last"])
    first = sum((cut.intervention() for cut in cuts), Interventions(edits=tuple(edits)))
    interventions = sum((make(wan, give) for make, _ in inside), first)
    places = [
        *(Where(f"noise: {edit.mode}", edit.steps, edit.frames or ()) for edit in edits),
        *(knockout.where(*both) for both in zip(cuts, args.knockout, strict=True)),
        *(where for _, where in inside),
    ]
    names = {
        n
        for n, asked in (("steps", args.x0), ("energy", args.energy), ("attention", args.attention))
        if asked
    }
    recorders = [
        *recording.made(names, wan, condition, chosen, args.attention or (), RecordOptions()),
        *watched.recorders(wan, puzzle),
    ]
    settings = {name: getattr(args, name) for name in SETTINGS}
    subject = run_folder.subject(args, images)
    folder = run_folder.open_run(
        args, wan, recorders, latents=True, **subject, **settings, seeds=seeds, at=chosen
    )
    watching = [*recorders, *watched.preview(args, wan)]
    noise = wan.noise(condition, args.seed)
    list_interventions(folder, places)
    with recording.bar(args, wan, recorders) as bar:
        latent = record(wan, condition, folder, watching, noise, interventions, bar)
        recording.finish(args, wan, folder, recorders, latent, images, bar)


SETTINGS = (
    *("noise", "mode", "knockout", "swap", "other", "what", "side", "donor", "during"),
    *("ensemble", "modes", "alpha", "share_at", "attention"),
)


def _check_details(args: argparse.Namespace) -> None:
    """Raise MinicosError for details of an intervention that is not asked for."""
    for what, usual in DETAILS.items():
        for name, value in usual.items():
            if not getattr(args, what) and getattr(args, name) != value:
                raise MinicosError(f"--{name.replace('_', '-')} is of no use without --{what}")


def _check_frames(edits: "Sequence[Noise]", count: int) -> None:
    """Raise MinicosError for noise in a latent frame that a video of so many does not have."""
    if outside := [f for edit in edits for f in edit.frames or () if f >= count]:
        raise MinicosError(
            f"--noise frame:{outside[0]}: this run has latent frames 0 to {count - 1}."
        )


def _inside(
    args: argparse.Namespace, total: int, depth: int, seeds: int
) -> "list[tuple[Make, Where]]":
    """The swap and the ensemble, still to be given the model and the donor's condition, and where
    they act.
    """
    from minicos.analysis.ensemble.share import Ensemble, intervention, window
    from minicos.analysis.swap.plan import layers, ranges
    from minicos.analysis.swap.states import EMBED, Swap
    from minicos.analysis.tools.shown import Where

    if (args.swap is None) != (args.other is None):
        raise MinicosError(
            "a swap needs both: --swap LAYERS, and --other with the prompt of the run that gives"
        )
    made: list[tuple[Make, Where]] = []
    if args.swap:
        swapped = layers(args.swap, "--swap")
        if not EMBED <= swapped[0] <= swapped[-1] < depth:
            raise MinicosError(f"--swap: this model has layers 0 to {depth - 1}.")
        during = ranges(args.during, total)
        if len(during) != 1:
            raise MinicosError(f"--during {args.during}: one range of steps, such as 0-4.")
        swap = Swap(swapped, during[0], what=args.what, at=args.side)
        where = Where(f"swap: {args.what} of “{args.other}”", tuple(during[0]), (), swapped)
        made.append((lambda wan, give: swap.intervention(give, args.donor), where))
    if args.ensemble:
        windows = spans(args.ensemble, "--ensemble")
        if len(windows) != 1 or len(args.modes) != 1:
            raise MinicosError(
                f"--ensemble {args.ensemble}: one window of blocks, such as 20-29, and one of "
                "--modes."
            )
        shared = sorted({s for a, b in spans(args.share_at, "--share-at") for s in range(a, b + 1)})
        opening.within(tuple(shared), total, "--share-at ")
        (mode,) = args.modes
        alpha = args.alpha if mode == "mix" else 1.0
        e = Ensemble(window(*windows[0], depth), mode, shared, seeds, alpha, carrier=None)
        where = Where(f"ensemble: {mode} of {seeds} seeds", shared, (), e.layers)
        made.append((lambda wan, give: intervention(e, wan.ops), where))
    return made


def _noise(parts: list[str], mode: str, seed: int, total: int) -> "Noise":
    """From ["step:2,3", "frame:1"]; both together mean noise in these frames at these steps."""
    from minicos.analysis.noise.edit import Noise

    found = {}
    try:
        for part in parts:
            axis, _, numbers = part.partition(":")
            if axis not in ("step", "frame") or axis in found:
                raise ValueError
            found[axis] = values.indices(numbers)
    except (ValueError, argparse.ArgumentTypeError):
        raise MinicosError(
            f"--noise {' '.join(parts)}: give step:10, or frame:1, or step:2,3 frame:1."
        ) from None
    steps = opening.within(found.get("step"), total, "--noise step:") or tuple(range(total))
    return Noise(mode, steps, found.get("frame"), seed=seed)
