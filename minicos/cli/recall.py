"""`minicos recall`: is an invented object the same when it reappears?"""

import argparse
from typing import Any

from minicos.analysis.options import RecallOptions
from minicos.cli import study

HELP = "Cut attention between the frames that must agree."
EXAMPLES = """\
  minicos recall  # 25 puzzles in which a hidden object appears twice
  minicos recall --puzzle shell --n 20  # cups whose swaps the model chooses
attention is cut in all layers and steps.
"""


def add(verbs: Any) -> None:
    study.add(verbs, "recall", HELP, EXAMPLES, RecallOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import recall

    study.run(args, RecallOptions, recall.study)
