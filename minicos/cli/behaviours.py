"""`minicos behaviours`: self-correction, perception before action and working memory, measured
on held-out puzzles.
"""

import argparse
from typing import Any

from minicos.analysis.options import BehavioursOptions
from minicos.cli import study

HELP = "Self-correction, perception first, memory."
EXAMPLES = """\
  minicos behaviours                                  50 puzzles of each kind, 300 to train the readout
  minicos behaviours --n 100 --rows 500 --at 0,4,8
self-correction: is the leading answer wrong early and right late, beyond what an ideal observer's blur explains?
perception first: does what stands still settle before what moves?
working memory: can the hidden object's shape and colour be read out of the tokens that hide it?
"""


def add(verbs: Any) -> None:
    study.add(verbs, "behaviours", HELP, EXAMPLES, BehavioursOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.behaviours.study import study as behaviours

    study.run(args, BehavioursOptions, behaviours)
