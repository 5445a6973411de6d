"""`minicos swap`: at which layer is the prompt turned into an answer?"""

import argparse
from dataclasses import asdict, is_dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.cli import opening, options, run_folder, values
from minicos.cli.subjects import add_subject_options

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.analysis.swap.pairs import Pair
    from minicos.analysis.tools.stats import Interval

HELP = "Put hidden states of one prompt's run into another's: where the answer turns."
EXAMPLES = """\
  minicos swap --puzzle mark                                          10 held-out puzzles, both directions, read and scored
  minicos swap --puzzle goal --n 100 --during 0,0-4,all --controls null,wrong,shuffled,random
  minicos swap --puzzle mark --what cross_attn --donor own --region objects
  minicos swap --image shapes.png --prompt "mark the circle" --other "mark the square"
  minicos swap --probe 4 --model Wan2.2-I2V-A14B --preset cos --at 0,10,20,30,39 --during 0   cats and bicycles, drawn for it
writes last_frames.png, curves over layers and a map of layers x steps, swap.json, and the first picture's videos
"""


def add(verbs) -> None:
    parser = options.add_parser(verbs, "swap", HELP, EXAMPLES, run)
    add_subject_options(parser, None, 10, kinds=("mark", "goal"), own=False)
    probe = parser.add_argument_group("or drawn pictures (any image-to-video model; scored)")
    probe.add_argument(
        "--probe", type=values.positive, metavar="N", help="N pictures with cats and bicycles"
    )
    probe.add_argument(
        "--pixels", default="480x832", help="their height x width (default: 480x832)"
    )
    case = parser.add_argument_group("or a case of your own (any model; no score)")
    case.add_argument("--prompt", help="what run B is asked")
    case.add_argument("--other", help="what run A is asked, of the same picture")
    case.add_argument(
        "--image", type=Path, help="the picture (png, jpg), for image-to-video models"
    )
    options.add_model_options(parser, out="runs/swap")
    parser.add_argument(
        "--negative",
        dest="negative_prompt",
        help="what should not be; used where guidance is not 1",
    )
    parser.add_argument(
        "--frames", type=values.frames, help="video frames, 4n + 1 (default: the preset's)"
    )
    swap = parser.add_argument_group("swap")
    swap.add_argument(
        "--what",
        default="stream",
        help="stream, update, self_attn, cross_attn or ffn (default: stream)",
    )
    swap.add_argument(
        "--at", type=layers, help="layers, each by itself, e.g. embed,0,3,6-9 (default: all)"
    )
    swap.add_argument(
        "--side",
        default="output",
        help="of the block, for a stream: output or input (default: output)",
    )
    swap.add_argument(
        "--during",
        default="0,all",
        help="steps, e.g. 0,0-4,5-9,all: one curve each (default: 0,all)",
    )
    swap.add_argument(
        "--donor",
        default="same_x",
        help="own (A's trajectory), same_x (prompt A at B's latent) or both (default: same_x)",
    )
    swap.add_argument(
        "--branch", default="cond", choices=("cond", "both"), help="of guidance (default: cond)"
    )
    swap.add_argument(
        "--region", default="all", help="tokens: all, objects or background (default: all)"
    )
    swap.add_argument("--one-way", action="store_true", help="A into B only, not B into A as well")
    swap.add_argument(
        "--controls",
        default="",
        help="null, wrong, shuffled, random: a list, or all (default: none)",
    )
    swap.add_argument("--controls-at", type=layers, help="their layers (default: three of --at)")


def layers(text: str) -> tuple[int, ...]:
    """embed,0,3,6-9"""
    spans = [(-1, -1) if part in ("embed", "-1") else values.span(part) for part in text.split(",")]
    if not all(spans):
        raise argparse.ArgumentTypeError(
            f"{values.shown(text)} is not a list of layers such as embed,0,3,6-9"
        )
    return tuple(sorted({layer for first, last in spans for layer in range(first, last + 1)}))


def ranges(text: str, total: int) -> tuple[range, ...]:
    """0,0-4,all"""
    from minicos.errors import MinicosError

    spans = [(0, total - 1) if part == "all" else values.span(part) for part in text.split(",")]
    found = tuple(range(span[0], span[1] + 1) for span in spans if span)
    if not all(spans) or any(steps.stop > total for steps in found):
        raise MinicosError(f"--during {text}: give steps 0 to {total - 1} such as 0,0-4,all.")
    return found


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.swap import pairs as swap_pairs
    from minicos.analysis.swap import results as swap_results
    from minicos.analysis.swap import states as swap
    from minicos.analysis.swap import study as swap_study
    from minicos.errors import MinicosError

    image = opening.images(args)["image"]
    made = subjects(args, image)
    wan = opening.load(args)
    opening.tell_unknown(wan, *(case.prompt for pair in made for case in (pair.a, pair.b)))
    depth = len(wan.experts["high"].blocks)
    whole_stream = args.what == "stream" and args.side == "output"
    chosen = args.at or tuple(range(swap.EMBED if whole_stream else 0, depth))
    for option, given in (("--at", chosen), ("--controls-at", args.controls_at or chosen)):
        if given[0] < (swap.EMBED if whole_stream else 0) or given[-1] >= depth:
            raise MinicosError(
                f"{option}: this model has layers 0 to {depth - 1}, and `embed` for a stream's output."
            )
    controls = (
        swap_pairs.CONTROLS
        if args.controls == "all"
        else tuple(c for c in args.controls.split(",") if c)
    )
    three = sorted(
        {chosen[len(chosen) // 4], chosen[len(chosen) // 2], chosen[-1 - len(chosen) // 8]}
    )
    plan = swap_study.Plan(
        layers=chosen,
        ranges=ranges(args.during, wan.preset.steps),
        donors=swap.DONORS if args.donor == "both" else (args.donor,),
        what=args.what,
        at=args.side,
        branch=None if args.branch == "both" else args.branch,
        region=args.region,
        controls=controls,
        control_layers=args.controls_at or tuple(three),
    )
    pictures = len(made)
    made += [] if args.one_way else [pair.turned() for pair in made]
    plan.check(made)
    settings = {
        "puzzle": args.puzzle,
        "size": args.size,
        "n": args.n,
        "split": args.split,
        "probe": args.probe,
        "other": args.other,
        "one_way": args.one_way,
        **run_folder.subject(args, {"image": image}),
        **asdict(plan),
        "ranges": [str(r) for r in plan.ranges],
    }
    folder = run_folder.open_run(args, wan, [], **settings)
    results = swap_study.sweep(wan, folder, plan, made)
    lines, turns = (
        swap_results.table(plan, results, pictures),
        swap_results.turns(plan, results, pictures),
    )
    folder.save_json("swap.json", {"turns": plain_numbers(turns), "lines": plain_numbers(lines)})
    tell(lines, turns, results[None])
    first, *rest = swap_results.draw(plan, results, pictures, folder)
    print(f"\n{folder.path(first)}  (and {len(rest)} more)")


def subjects(args: argparse.Namespace, image: "Tensor | None") -> list["Pair"]:
    """The pairs of the options; exactly one subject must be given."""
    from minicos.analysis.swap import pairs as swap_pairs
    from minicos.analysis.tools.cases import Case
    from minicos.errors import MinicosError

    chosen = [x for x in (args.puzzle, args.probe, args.prompt) if x is not None]
    if len(chosen) != 1 or (args.prompt is None) != (args.other is None):
        raise MinicosError(
            "give one subject: --puzzle KIND, or --probe N, or --prompt and --other with an --image"
        )
    if args.probe:
        height, cross, width = args.pixels.partition("x")
        if not (cross and height.isdecimal() and width.isdecimal()):
            raise MinicosError(f"--pixels {args.pixels}: give height x width, such as 480x832")
        return swap_pairs.probes(args.probe, int(height), int(width), seed=args.seed)
    if args.puzzle:
        return swap_pairs.pairs(
            args.puzzle, args.n, size=args.size, split=args.split, seed=args.seed
        )
    return [
        swap_pairs.Pair(Case(args.other, image, args.seed), Case(args.prompt, image, args.seed))
    ]


def tell(lines: list[dict], turns: list[dict], plain: dict) -> None:
    """The table, each arm under its headline."""
    from minicos.analysis.swap.pairs import UNREAD, A, B

    if (plain["a.answer"] != UNREAD).all():
        right = (plain["a.answer"] == A).mean(), (plain["b.answer"] == B).mean()
        print(f"undisturbed: {right[0]:.0%} of A's runs show A's answer, {right[1]:.0%} of B's B's")
    headlines = {turn["arm"]: turn for turn in turns}
    last = None
    for line in lines:
        if line["arm"] != last:
            last = line["arm"]
            print(f"\n{last}")
            if turn := headlines.get(last):
                for name, level in (("flip", "0"), ("A", "1/2")):
                    if name in turn:
                        print(
                            f"  {'the rate of A' if name == 'A' else 'flip'} reaches {level} at layer {place(turn[name])}"
                        )
            print(
                "  layer  flip (-1 B, +1 A)       off-axis  leverage  largest change"
                + "   rate of A            B     neither" * ("A" in line)
            )
        rates = ""
        if "A" in line:
            a = line["A"]
            rates = f"  {a.value:4.2f} [{a.low:4.2f}, {a.high:4.2f}]  {line['B'].value:8.2f}  {line['neither'].value:8.2f}"
        f = line["flip"]
        layer = "embed" if line["layer"] < 0 else line["layer"]
        print(
            f"  {layer:>5}  {f.value:+.3f} [{f.low:+.3f}, {f.high:+.3f}]  {line['off_axis']:8.3f}  {line['leverage']:8.5f}  "
            f"{line['changed']:14.2g}{rates}"
        )


def plain_numbers(lines: list[dict]) -> list[dict]:
    """Lines as JSON: an interval is an object; never and not a number are null."""

    def plain(value: object) -> object:
        if isinstance(value, float):
            return value if isfinite(value) else None
        return {k: plain(v) for k, v in asdict(value).items()} if is_dataclass(value) else value

    return [{name: plain(value) for name, value in line.items()} for line in lines]


def place(at: "Interval") -> str:
    """A layer with its interval, in words where the curve never gets there."""
    low, mean, high = (
        "never" if x == float("inf") else f"{x:.1f}" for x in (at.low, at.value, at.high)
    )
    return f"{mean} [{low}, {high}], n = {at.n}"
