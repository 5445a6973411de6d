"""`minicos commitment`: at which step is the answer decided?"""

import argparse
from typing import Any

from minicos.analysis.options import CommitmentOptions
from minicos.cli import study

HELP = "When is the answer decided?"
EXAMPLES = """\
  minicos commitment  # 20 held-out mazes with several right answers
  minicos commitment --n 5 --count 4 --at 0,2,5,10
  minicos commitment --model Wan2.2-I2V-A14B --image maze.png --prompt "solve the maze" --count 4
At each step the clean estimate is set back to its noise level with fresh noise and completed
--count times: commitment is 0 if the completions are as different as random answers, and 1 if they
always agree. Without a scorer: how far apart they end.
"""


def add(verbs: Any) -> None:
    study.add(verbs, "commitment", HELP, EXAMPLES, CommitmentOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import commitment

    study.run(args, CommitmentOptions, commitment.study)
