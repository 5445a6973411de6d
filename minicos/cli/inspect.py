"""`minicos inspect`: what a checkpoint is, from its headers alone."""

import argparse
import json
from pathlib import Path

from minicos.cli import options

EXAMPLES = """\
  minicos inspect Wan2.2-I2V-A14B/
  minicos inspect wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors --json
  # fetch a repository of the Hub, after printing its size
  minicos inspect Wan-AI/Wan2.1-T2V-1.3B --download
"""


def add(verbs) -> None:
    parser = options.add_parser(
        verbs, "inspect", "Identify a checkpoint without loading it.", EXAMPLES, run
    )
    parser.add_argument(
        "path",
        help="a file, a folder, 'tiny', or the id of a repository on the Hub (in the local cache)",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch a Hub id first, after printing its size"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one object: variant, layout, tensors, parameters, dtypes ...",
    )


def run(args: argparse.Namespace) -> None:
    from minicos.peers import folder
    from minicos.weights import hub
    from minicos.weights.inspect import describe, inspect
    from minicos.weights.layouts import locate

    path = Path(args.path)
    if not path.exists() and (args.path.partition(":")[0] == "tiny" or hub.is_id(args.path)):
        path = locate(args.path, args.download)
    peer = folder.find(path) if path.is_dir() else None
    checkpoint = inspect(path) if peer is None else peer.checkpoint()
    print(json.dumps(checkpoint.to_json(), indent=1) if args.json else describe(checkpoint))
