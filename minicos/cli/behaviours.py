"""`minicos behaviours`: perception before action and working memory, on held-out puzzles."""

import argparse
from typing import Any

from minicos.analysis.options import BehavioursOptions
from minicos.cli import study

HELP = "Perception before action, and memory."
EXAMPLES = """\
  minicos behaviours --n 20 --rows 100 --at 0,4,8
  minicos behaviours  # 50 puzzles of each kind, 300 to train the readout
  minicos behaviours --rows 0 --ideal  # perception only, with an ideal observer
perception before action: is the destination decided before the route? working memory: can the
hidden object's shape and colour be read out of the tokens that cover it? for self-correction see
commitment and plant
"""


def add(verbs: Any) -> None:
    study.add(verbs, "behaviours", HELP, EXAMPLES, BehavioursOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.behaviours.study import study as behaviours

    study.run(args, BehavioursOptions, behaviours)
