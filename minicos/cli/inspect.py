"""`minicos inspect`: what a checkpoint is, from its headers alone."""

import argparse
import json
from pathlib import Path

from minicos.cli import common

EXAMPLES = """\
  minicos inspect Wan2.2-I2V-A14B/
  minicos inspect wan2.2_t2v_low_noise_14B_fp8_scaled.safetensors --json
"""


def add(verbs) -> None:
    parser = common.add_parser(verbs, "inspect", "Say what a checkpoint is, without loading it.", EXAMPLES, run)
    parser.add_argument("path", type=Path, help="a file or a folder")
    parser.add_argument(
        "--json", action="store_true", help="one object: variant, layout, tensors, parameters, dtypes ..."
    )


def run(args: argparse.Namespace) -> None:
    from minicos.weights.inspect import describe, inspect

    checkpoint = inspect(args.path)
    print(json.dumps(checkpoint.to_json(), indent=1) if args.json else describe(checkpoint))
