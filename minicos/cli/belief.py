"""`minicos belief`: the clean estimate at each step, compared with an ideal observer's."""

import argparse
from typing import Any

from minicos.analysis.options import BeliefOptions
from minicos.cli import study

HELP = "The clean estimate, compared with an ideal observer's."
EXAMPLES = """\
  minicos belief  # 25 held-out mazes with several right answers
  minicos belief --n 20 --steps 50
  minicos belief --puzzle goal --size 5
The latent at a step is a noisy answer. Bayes' rule gives the probability of each answer, and the
mean of the answers under these weights is the clean estimate of a perfect network. Several routes
at once are thus not a property of the network. Printed per step: answers alive for the ideal
observer and in the estimate, the estimate's distance to the ideal one (1: as far as another
answer), the part of it that is not a mixture of answers, and the distance of an observer that does
not see x.
"""


def add(verbs: Any) -> None:
    study.add(verbs, "belief", HELP, EXAMPLES, BeliefOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import belief

    study.run(args, BeliefOptions, belief.study)
