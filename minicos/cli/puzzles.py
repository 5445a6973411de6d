"""`minicos puzzles`: draw the puzzles of the embedded model and write them as files."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.cli import options, values

if TYPE_CHECKING:
    from minicos.puzzles import Family

EXAMPLES = """\
  minicos puzzles --list  # every family, and its settings
  minicos puzzles --kind latin --n 3 --out puzzles  # three of one family, and a sheet of them
  minicos puzzles --kind maze --size 5 --d 2  # a kind with a size and settings of your own
each puzzle is a folder: first_frame.png, final_frame.png, ground_truth.mp4 and prompt.txt, as in
VBVR-Bench, and answers/ and foils/; `minicos vbvr --data puzzles` runs and scores them (--scale 4
keeps colours exact in videos)
"""


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "puzzles", "Draw puzzles and write them as files.", EXAMPLES, run
    )
    parser.add_argument("--list", action="store_true", help="list every family and stop")
    parser.add_argument(
        "--kind",
        metavar="NAME",
        action="append",
        help="a family; may be given more than once (default: all)",
    )
    parser.add_argument(
        "--n", type=values.positive, default=5, help="number of each kind (default: 5)"
    )
    parser.add_argument(
        "--split", choices=("train", "dev", "test"), default="test", help="(default: test)"
    )
    parser.add_argument(
        "--out", type=values.path, default=Path("puzzles"), help="(default: puzzles)"
    )
    parser.add_argument("--scale", type=values.positive, default=1, help="repeat pixels")
    own = parser.add_argument_group("a kind of your own, if one of these is given")
    own.add_argument("--size", type=values.positive, help="cells along a side")
    for knob, what in (("k", "valid answers"), ("s", "serial depth"), ("d", "distractors")):
        own.add_argument(f"--{knob}", type=values.positive, help=what)


def run(args: argparse.Namespace) -> None:
    from minicos.puzzles import FAMILIES

    if args.list:
        print(*map(_line, FAMILIES.values()), sep="\n")
        return
    for family in [_family(name, args) for name in args.kind or FAMILIES]:
        _write(family, args)


def _family(name: str, args: argparse.Namespace) -> "Family":
    """The family of this name, or a kind with the size and the settings of the options."""
    from minicos import puzzles

    if args.size is args.k is args.s is args.d is None:
        return puzzles.family(name)
    own = puzzles.of_kind(name, args.size or 4, puzzles.Knobs(args.k, args.s, args.d))
    knobs = "".join(f"-{knob}{value}" for knob, value in vars(own.knobs).items() if value)
    return replace(own, name=f"{name}-own{knobs}")


def _write(family: "Family", args: argparse.Namespace) -> None:
    """Write the first puzzles of a family to a folder, except those that exist, and a sheet."""
    from minicos.media import load_image, save_image
    from minicos.puzzles import FAMILIES, export
    from minicos.puzzles.export import sheet
    from minicos.runs import write_json
    from minicos.vbvr.puzzles import metadata

    folder = args.out / f"{family.name}_{family.size}x{family.size}_{args.split}"
    drawn = [family.draw(seed, args.split) for seed in range(args.n)]
    for seed, puzzle in enumerate(drawn):
        place = folder / f"{seed:05d}"
        if not place.exists():
            export(puzzle, 0, place, args.scale)
        about = place / "metadata.json"  # by which `minicos vbvr --data` scores it
        if family.name in FAMILIES and not about.exists():
            width = load_image(place / "first_frame.png").shape[-1]
            scale = width // puzzle.first_frame().shape[1]
            write_json(about, metadata(family, seed, args.split, scale))
        print(place)
    save_image(folder.with_suffix(".png"), sheet(drawn))
    print(folder.with_suffix(".png"))


def _line(family: "Family") -> str:
    """A family in one line: name, category, domain, size, settings and a prompt."""
    knobs = " ".join(f"{k}={v}" for k, v in vars(family.knobs).items() if v is not None)
    where = f"{family.domain:3}  {family.size}x{family.size}"
    prompt = family.draw(0, "test").prompt
    return f'{family.name:16} {family.category:14} {where}  {knobs:12} "{prompt}"'
