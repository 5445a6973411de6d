"""`minicos plant`: does a run correct a wrong answer that was put into it?"""

import argparse
from typing import Any

from minicos.analysis.options import PlantOptions
from minicos.cli import study

HELP = "Put a wrong answer into a run: is it corrected?"
EXAMPLES = """\
  minicos plant  # 20 mazes with several right answers, six steps
  minicos plant --puzzle maze,mirror --n 20 --at 2,5,8 --ideal
at each step the latent becomes a wrong answer at that step's noise level, and the run continues.
The control plants a valid answer: a run that abandons what it holds for no reason abandons that too
"""


def add(verbs: Any) -> None:
    study.add(verbs, "plant", HELP, EXAMPLES, PlantOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import plant

    study.run(args, PlantOptions, plant.study)
