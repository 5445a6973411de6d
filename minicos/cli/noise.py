"""`minicos noise`: what noise at a step or in a frame does; with --boundaries, for several
boundaries between the experts.
"""

import argparse
from functools import partial
from typing import Any

from minicos.analysis.options import NoiseOptions
from minicos.cli import study

HELP = "Put noise into one step or one frame, and measure the effect."
EXAMPLES = """\
  minicos noise --n 20 --at 0,4,8,12,16  # mazes of the embedded model, the paper's noise
  minicos noise --mode add  # step and frame noise at exactly equal dose
  minicos noise --preset cos --mode renoise --boundaries 0.8,0.9  # does the peak follow it?
  minicos noise --image maze.png --prompt "solve the maze" --seeds 4  # your own picture
prints a table with intervals; open sensitivity.png (dashed: where the experts change), D.png and
videos.png
"""


def add(verbs: Any) -> None:
    study.add(verbs, "noise", HELP, EXAMPLES, NoiseOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import sweep
    from minicos.analysis.noise import study as noise

    made = sweep if args.boundaries else noise
    study.run(
        args, NoiseOptions, made.study, check=made.check, load=partial(study.open_model, euler=True)
    )
