"""`minicos run`: several interventions and several analyses in one pass."""

import argparse
from typing import TYPE_CHECKING

from minicos.cli import opening, options, run_folder, values
from minicos.cli.swap import layers, ranges

if TYPE_CHECKING:
    from minicos.analysis.noise.edit import Noise

EXAMPLES = """\
  minicos run --image shapes.png --prompt "mark the circle" --x0 --energy
  minicos run --image shapes.png --prompt "mark the circle" --swap 6 --other "mark the square" --energy --attention 0,6
  minicos run --image maze.png --prompt "solve the maze" --noise step:10 --noise step:2,3 frame:1 --ensemble 20-29 --x0
noise changes the latent that enters a step, the swap acts inside the pass, then the ensemble; analyses look last.
"""


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "run", "Several interventions and analyses in one pass.", EXAMPLES, run
    )
    options.add_condition_options(parser)
    options.add_model_options(parser, out="runs/run")
    see = parser.add_argument_group("analyses")
    see.add_argument("--x0", action="store_true", help="the clean estimate, as `minicos steps`")
    see.add_argument(
        "--energy", nargs="?", const="all", choices=("all",), help="token energy of every layer"
    )
    see.add_argument(
        "--attention",
        type=values.indices,
        metavar="LAYERS",
        help="attention of these layers, e.g. 0,6",
    )
    see.add_argument(
        "--at", type=values.indices, help="steps to show (default: eight, denser at the start)"
    )
    do = parser.add_argument_group("interventions")
    do.add_argument(
        "--noise",
        nargs="+",
        action="append",
        default=[],
        metavar="step:10",
        help="noise entering steps, in latent frames, or both: step:10 or frame:1 or step:2,3 frame:1; may be repeated",
    )
    do.add_argument(
        "--mode",
        choices=("replace", "renoise", "erase", "add"),
        default="replace",
        help="of --noise (default: replace)",
    )
    do.add_argument(
        "--swap", type=layers, metavar="LAYERS", help="put these layers' states of --other's run in"
    )
    do.add_argument("--other", help="the prompt of the run that gives")
    do.add_argument(
        "--what", default="stream", help="of the swap, as in `minicos swap` (default: stream)"
    )
    do.add_argument(
        "--donor",
        choices=("own", "same_x"),
        default="own",
        help="its own run, or at this one's latents",
    )
    do.add_argument("--during", default="all", help="steps of the swap, e.g. 0-4 (default: all)")
    do.add_argument(
        "--ensemble",
        metavar="20-29",
        help="share these blocks (of 40, scaled to the model) between seeds",
    )
    do.add_argument(
        "--how",
        choices=("override", "input_override", "lockstep", "update", "mix"),
        default="lockstep",
        help="as --modes of `minicos ensemble`; the overrides take a pass more in each --share-at step (default: lockstep)",
    )
    do.add_argument("--alpha", type=values.number, default=0.5, help="of --how mix (default: 0.5)")
    do.add_argument(
        "--share-at", type=values.indices, default=(0,), help="steps of the ensemble (default: 0)"
    )
    do.add_argument(
        "--seeds", type=values.positive, help="samples; the first is shown (default: 1; 3 to share)"
    )


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.attention import Attention, words
    from minicos.analysis.energy import Energy
    from minicos.analysis.ensemble import share
    from minicos.analysis.ensemble.share import Ensemble, window
    from minicos.analysis.steps import Steps, spread
    from minicos.analysis.swap.states import EMBED, Swap
    from minicos.analysis.tools.interventions import NO_INTERVENTIONS, Interventions
    from minicos.analysis.tools.record import record, recorded
    from minicos.cli.ensemble import spans
    from minicos.errors import MinicosError
    from minicos.media import save_video

    images, files = opening.images(args), opening.layout(args)
    total, depth = opening.plan(args, files).steps, files.experts["high"].config.num_layers
    chosen, seeds = (
        opening.within(args.at, total) or spread(8, total),
        args.seeds or (3 if args.ensemble else 1),
    )
    if (args.swap is None) != (args.other is None):
        raise MinicosError(
            "a swap needs both: --swap LAYERS, and --other with the prompt of the run that gives"
        )
    if args.ensemble and seeds == 1:
        raise MinicosError("--ensemble shares states between seeds: take --seeds 2 or more")
    for option, given in (("--swap", args.swap), ("--attention", args.attention)):
        if given and not (EMBED if option == "--swap" else 0) <= given[0] <= given[-1] < depth:
            raise MinicosError(f"{option}: this model has layers 0 to {depth - 1}.")
    opening.within(args.share_at, total, "--share-at ")
    edits = [_noise(parts, args.mode, args.seed, total) for parts in args.noise]
    during = ranges(args.during, total)
    if len(during) != 1:
        raise MinicosError(f"--during {args.during}: one range of steps, such as 0-4.")

    wan = opening.load(args, files, images["image"])
    if edits and args.solver is None:  # an edit makes a multistep solver start afresh
        wan = wan.with_preset(solver="euler")
    condition = opening.condition(args, wan, images, seeds)
    frames = range(condition.shape[2])
    if outside := [f for edit in edits for f in edit.frames or () if f not in frames]:
        raise MinicosError(
            f"--noise frame:{outside[0]}: this run has latent frames 0 to {frames[-1]}."
        )
    changes = NO_INTERVENTIONS
    for edit in edits:
        changes += Interventions(edits=(edit,))
    if args.swap:
        swap = Swap(args.swap, during[0], what=args.what)
        changes += swap.intervention(wan.condition([args.other] * seeds, **images), args.donor)
    if args.ensemble:
        try:
            ((first, last),) = spans(args.ensemble)
        except (argparse.ArgumentTypeError, ValueError):
            raise MinicosError(
                f"--ensemble {args.ensemble}: one window of blocks, such as 20-29."
            ) from None
        alpha = args.alpha if args.how == "mix" else 1.0
        e = Ensemble(
            window(first, last, depth), args.how, args.share_at, seeds, alpha, carrier=None
        )
        changes += share.intervention(e, wan.ops)
    analyses = [Steps(wan, chosen)] if args.x0 else []
    if args.energy:
        analyses.append(Energy(chosen, stride=wan.vae.cfg.stride[0], ops=wan.ops))
    if args.attention:
        analyses.append(
            Attention(args.attention, chosen, words=words(condition, "cond"), ops=wan.ops)
        )
    settings = {
        name: getattr(args, name)
        for name in (
            "noise",
            "mode",
            "swap",
            "other",
            "what",
            "donor",
            "during",
            "ensemble",
            "how",
            "alpha",
            "share_at",
            "attention",
        )
    }
    folder = run_folder.open_run(
        args, wan, analyses, **run_folder.subject(args, images), **settings, seeds=seeds, at=chosen
    )
    noise = wan.noise(condition, args.seed)
    latent = record(wan, condition, folder, analyses, noise, changes)
    save_video(folder.path("video.mp4"), wan.decode(latent[:1])[0], fps=wan.preset.fps)
    print(folder.path("video.mp4"))
    for analysis in analyses:
        first, *rest = analysis.draw(recorded(folder, analysis.name, total), folder)
        print(f"{folder.path(first)}  (and {len(rest)} more)")


def _noise(parts: list[str], mode: str, seed: int, total: int) -> "Noise":
    """From ["step:2,3", "frame:1"]: both at once are noise in these frames at these steps."""
    from minicos.analysis.noise.edit import Noise
    from minicos.errors import MinicosError

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
