"""`minicos energy`: which tokens have the most energy in each layer?"""

import argparse
from typing import Any

from minicos.analysis.options import EnergyOptions
from minicos.cli import recording

HELP = "Token energy of every layer: the tokens that the network works on."
EXAMPLES = """\
  minicos energy --puzzle mark
  minicos energy --puzzle maze --also steps --at 0,5,19
  minicos energy --image maze.png --prompt "solve the maze" --out busy
writes energy/FORM_BRANCH_step_NN.png (latent frames x layers), energy_layers_BRANCH.png and
others, energy.safetensors (step layer f h w)
  minicos energy --n 20  # the study: AUROC against the answer's cells, with an untrained network
"""


def add(verbs: Any) -> None:
    recording.add(verbs, "energy", HELP, EXAMPLES, EnergyOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import energy

    recording.run(args, EnergyOptions, energy.study)
