"""`minicos frames`: convergence and sensitivity to noise over frame counts."""

import argparse
import sys
from functools import partial
from typing import Any

from minicos.analysis.options import FramesOptions
from minicos.cli import study

HELP = "Convergence and sensitivity to noise over frame counts."
EXAMPLES = """\
  minicos frames --counts 5,9,13,17
  minicos frames --model Wan2.2-I2V-A14B --image cat.png --prompt "the cat jumps" --counts 9,33,65
"""
TRAINED = 13  # frames of the embedded model's videos


def add(verbs: Any) -> None:
    study.add(verbs, "frames", HELP, EXAMPLES, FramesOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import sweep

    other = [str(count) for count in args.counts if count != TRAINED]
    if args.model == "tiny" and other:
        print(
            f"minicos: the embedded model was trained at {TRAINED} frames: {', '.join(other)} are "
            "out of its distribution",
            file=sys.stderr,
        )
    study.run(
        args,
        FramesOptions,
        sweep.study,
        check=sweep.check,
        load=partial(study.open_model, euler=True),
    )
