"""`minicos ensemble`: average hidden states over seeds, on scored puzzles or on a picture of your
own.
"""

import argparse
from typing import Any

from minicos.analysis.options import EnsembleOptions
from minicos.cli import study

HELP = "Average hidden states over seeds: does it help?"
EXAMPLES = """\
  minicos ensemble  # the window ablation on ten held-out 5x5 mazes, with rivals and controls
  minicos ensemble --n 100 --choose 40  # the arm is chosen on 40 more: ten minutes or more
  minicos ensemble --steps 8 --at 0,0-3 --modes lockstep,update --windows 20-29
  minicos ensemble --image maze.png --prompt "solve the maze"  # videos side by side, and D
puzzles: ensemble.png and results.json (rates, gains, intervals). With --choose, the arm and its
steps are chosen on the dev split and reported on test. Mazes of 4x4 and smaller leave the embedded model little room
for a gain; 5x5 is larger than any it was trained on.
"""


def add(verbs: Any) -> None:
    study.add(verbs, "ensemble", HELP, EXAMPLES, EnsembleOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.ensemble import study as ensemble

    study.run(args, EnsembleOptions, ensemble.study, check=ensemble.check)
