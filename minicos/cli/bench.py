"""`minicos bench`: how fast, beside whom, on this machine?"""

import argparse
import json
import sys

from minicos.bench import BENCHMARKS
from minicos.cli import options
from minicos.errors import MinicosError

EXAMPLES = """\
  minicos bench forward                         a pass of the network beside diffusers', with the same weights
  minicos bench kernels --json > kernels.json   a list of {"name", "ours_ms", "peer", "peer_ms", "ratio", "ceiling_share"}
  minicos bench capture --device cpu
ours and its peer run in turns in one process; figures are medians. "ratio" is ours / peer: below 1, ours is faster. "ceiling" is the
share of what this machine reaches on matrix products or, where nothing is multiplied, on copies. On a card sizes are those of
A14B at 832x480x81, with random weights made there; on a CPU they are those of the embedded model. What cannot be
measured here says why. Results: kernels/BENCHMARKS.md
"""


def add(verbs) -> None:
    what = "\n".join(f"  {name:10} {about}" for name, about in BENCHMARKS.items())
    parser = options.add_parser(
        verbs, "bench", "Measure the speed beside peers.", f"{EXAMPLES}\nwhat:\n{what}", run
    )
    parser.add_argument(
        "what",
        choices=BENCHMARKS,
        metavar="WHAT",
        help=f"one of {', '.join(BENCHMARKS)}, see below",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)"
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
    from importlib import import_module

    from minicos.bench.measure import TITLES, header
    from minicos.open import open_device

    device = open_device(args.device)
    if device.type not in ("cpu", "cuda"):
        raise MinicosError(f"there is no clock for {device.type}: take --device cpu or cuda")
    print(header(device), file=sys.stderr if args.json else sys.stdout)
    lines = import_module(f"minicos.bench.{args.what}").lines(device, args.quick)
    if args.json:
        print(json.dumps([line.to_json() for line in lines], indent=1))
        return
    print(TITLES)
    for line in lines:
        print(line, flush=True)
