"""`minicos counts`: how many steps and frames does an answer take?"""

import argparse
from typing import Any

from minicos.analysis.options import CountsOptions
from minicos.cli import study

HELP = "The share of puzzles solved over step counts and video lengths."
EXAMPLES = """\
  minicos counts  # mazes at 1, 2, 4, 10 and 20 steps
  minicos counts --puzzle goal --n 20 --counts 1,20 --lengths 9,17
"""


def add(verbs: Any) -> None:
    study.add(verbs, "counts", HELP, EXAMPLES, CountsOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import counts

    study.run(args, CountsOptions, counts.study, check=counts.check)
