"""`minicos belief`: what the network shows at each step, beside what an ideal observer would
believe.
"""

import argparse
from typing import Any

from minicos.analysis.options import BeliefOptions
from minicos.cli import study

HELP = "The clean estimate beside an ideal observer's."
EXAMPLES = """\
  minicos belief  # 25 held-out mazes with several right answers
  minicos belief --n 100 --steps 50
  minicos belief --puzzle goal --size 5
The latent at a step is a noisy answer; Bayes' rule says how likely each answer is given it, and the
mean of the answers under these weights is what a perfect network's clean estimate would be: several
routes at once are no trait of the network. Printed per step: answers alive for the ideal observer
and in the estimate, the estimate's distance from the ideal one (1: as far as another answer), the
part of it that is no mixture of answers, and the distance of an observer who does not look.
"""


def add(verbs: Any) -> None:
    study.add(verbs, "belief", HELP, EXAMPLES, BeliefOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import belief

    study.run(args, BeliefOptions, belief.study)
