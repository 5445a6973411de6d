"""`minicos bench`: speed on this machine, compared with other libraries."""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.bench import BENCHMARKS
from minicos.cli import options, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    import torch

    from minicos.bench.measure import Line

EXAMPLES = """\
  minicos bench  # everything, and one table of it: bench.md
  minicos bench forward  # a pass of the network and of diffusers', with the same weights
  # a list of {"name", "ours_ms", "peer", "peer_ms", "ratio", "ceiling_share"}
  minicos bench kernels --json > kernels.json
  minicos bench capture --device cpu
minicos and the other library run in turns in one process; figures are medians. "ratio" is minicos /
other: below 1, minicos is faster. "ceiling" is the share of what this machine reaches on matrix
products or, where nothing is multiplied, on copies. On a card, sizes are those of A14B at
832x480x81, with random weights; on a CPU they are those of the embedded model. Whole runs are
measured without pictures and, "as typed", with all that the command writes. What cannot be measured
here is listed with the reason. Results: kernels/BENCHMARKS.md
"""


def add(verbs) -> None:
    what = "\n".join(f"  {name:10} {about}" for name, about in BENCHMARKS.items())
    parser = options.add_parser(
        verbs,
        "bench",
        "Measure the speed, compared with other libraries.",
        f"{EXAMPLES}\nwhat:\n{what}",
        run,
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=BENCHMARKS,
        metavar="WHAT",
        help=f"one of {', '.join(BENCHMARKS)}, see below (default: all)",
    )
    parser.add_argument(
        "--out", type=values.path, help="file for the table, in Markdown (of all: bench.md)"
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)"
    )
    parser.add_argument(
        "--gb",
        type=values.positive_number,
        help="load: size of the checkpoint that is written and read, in GB, at most a third of the "
        "free disk (default: 4 on a card, 1 on a CPU)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes: does it run here? (the figures mean nothing)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="a list with an object for each line; the header on stderr",
    )


def run(args: argparse.Namespace) -> None:
    from minicos.bench.measure import TITLES, Line, header, markdown
    from minicos.device import open_device
    from minicos.journal import check_place
    from minicos.runs import replace_file

    device = open_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise MinicosError(f"there is no clock for {device.type}: take --device cpu or cuda")
    if args.gb is not None and args.what not in (None, "load"):
        raise MinicosError(f"--gb is for load, and {args.what} reads no file: leave it out")
    more = {"load": {"gb": args.gb}} if args.gb is not None else {}
    out = args.out or (None if args.what else Path("bench.md"))
    if out is not None:
        check_place(out, "--out")
    about = header(device)
    print(about, file=sys.stderr if args.json else sys.stdout)
    results: dict[str, list[Line]] = {}
    for name in [args.what] if args.what else BENCHMARKS:
        if not args.json:
            print(TITLES)
        results[name] = []
        for line in lines(name, device, args.quick, **more.get(name, {})):
            results[name].append(line)
            if not args.json:
                print(line, flush=True)
            if out is not None:  # after each line, so that an interruption keeps earlier ones
                text = markdown(results, about)
                replace_file(out, partial(Path.write_text, data=text, encoding="utf-8"))
    if args.json:
        print(json.dumps([line.to_json() for each in results.values() for line in each], indent=1))
    elif out is not None:
        print(f"{out}  (the same as one table)")


def lines(name: str, device: "torch.device", quick: bool, **more: float) -> "Iterator[Line]":
    """The lines of a benchmark, or one with the reason if it cannot run at all. `more`: options of
    this benchmark.
    """
    from importlib import import_module

    from minicos.bench.measure import Line

    try:
        yield from import_module(f"minicos.bench.{name}").lines(device, quick, **more)
    except MinicosError as error:
        yield Line(name, not_measured=str(error))
