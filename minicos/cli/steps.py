"""`minicos steps`: the clean estimate at every denoising step."""

import argparse
from typing import Any

from minicos.analysis.options import StepsOptions
from minicos.cli import recording

HELP = "Decode the clean estimate at every step: what the model believes, as it makes up its mind."
EXAMPLES = """\
  minicos steps --image maze.png --prompt "solve the maze" --out seen
  minicos steps --image maze.png --prompt "solve the maze" --preset cos --at 0,1,2,5,10,20,49 --also energy
  minicos steps --image maze.png --prompt "solve the maze" --seeds 4    other seeds, by whose difference convergence is measured
writes x0_sheet.png (steps x frames), convergence.png, x0/step_NN.mp4, and every latent as safetensors
  minicos steps --n 100     without a prompt: when do the frames of held-out mazes settle, with several routes and with one?
"""


def add(verbs: Any) -> None:
    recording.add(verbs, "steps", HELP, EXAMPLES, StepsOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import steps

    recording.run(args, StepsOptions, steps.study)
