"""`minicos points`: every hook point of a model."""

import argparse
import json
import re

from minicos.cli import opening, options

EXAMPLES = """\
  minicos points  # the embedded model's points, with all blocks in one
  minicos points --all  # every block
  minicos points --model Wan2.2-I2V-A14B --json  # a variant by name needs no weights
letters: b batch, l tokens (f*h*w), d width, e that inside ffn, n heads, k head width, t text rows,
         m image rows, c latent channels, g distinct timesteps
allowed and pattern are computed only if a hook is registered on them
minicos.streams.stream(wan, x, step, condition, layer) stops a pass at a layer and returns the stream
that enters it
"""


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "points", "List every hook point with its shape.", EXAMPLES, run
    )
    parser.add_argument(
        "--model",
        default="tiny",
        help="a variant (tiny, Wan2.2-I2V-A14B ...), a folder, a file or a Hub id (default: tiny)",
    )
    parser.add_argument(
        "--all", action="store_true", help="print every block, not just the pattern"
    )
    parser.add_argument(
        "--json", action="store_true", help='a list of {"name", "shape"}, one entry per point'
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from minicos.config import FINETUNES, VARIANTS
    from minicos.errors import MinicosError
    from minicos.points import LETTERS, points
    from minicos.weights import hub
    from minicos.weights.layouts import dit_config

    name = FINETUNES.get(args.model, args.model)
    if name not in VARIANTS and not Path(args.model).exists() and not hub.is_id(args.model):
        raise MinicosError(
            f"{args.model!r} is neither a model's files nor a variant: take one of "
            f"{', '.join(VARIANTS)}."
        )
    peer = None if name in VARIANTS else opening.peer_folder(args.model)
    if peer is not None:
        from minicos.peers.opening import points as points_of_a_peer

        found, depth = points_of_a_peer(peer), peer.depth
    else:
        cfg = VARIANTS.get(name) or dit_config(args.model)
        found, depth = points(cfg), cfg.num_layers
    if args.json:
        print(
            json.dumps([{"name": name, "shape": shape} for name, shape in found.items()], indent=1)
        )
        return
    if not args.all:
        found = {re.sub(r"^blocks\.\d+", "blocks.i", name): shape for name, shape in found.items()}
    width = max(map(len, found))
    for name, shape in found.items():
        print(f"{name:{width}}  {shape}")
    if not args.all:
        print(f"\ni = 0..{depth - 1}; in a pattern, * stands for one dotted segment: blocks.*.ffn")
        used = {letter for shape in found.values() for letter in shape.split()}
        print("\n".join(f"{k:7}  {v}" for k, v in LETTERS.items() if used.issuperset(k.split())))
