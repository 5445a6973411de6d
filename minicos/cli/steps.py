"""`minicos steps`: the clean estimate at every denoising step."""

import argparse
from typing import Any

from minicos.analysis.options import StepsOptions
from minicos.cli import recording

HELP = "Decode the clean estimate at every step, and watch the model decide."
EXAMPLES = """\
  minicos steps --puzzle maze  # the first held-out maze with several routes
  minicos steps --puzzle maze:7 --also energy attention  # another one, and more in the same pass
  minicos steps --image maze.png --prompt "solve the maze" --at 0,1,2,5,10,19
  minicos steps --image maze.png --prompt "solve the maze" --preset cos --seeds 4
      # convergence in units of the difference between the seeds
writes x0_sheet.png (steps x frames), convergence.png, x0/step_NN.mp4, and every latent
Decoded by the VAE are the estimates at the steps of --at (default: eight), under guidance also
those of the prompted and the unprompted pass (24 videos by default), and the final video. Other
steps keep their latents alone. --preview shows every step during the run, approximately, without
the VAE; no result is made of it.
  minicos steps --n 20  # the study: when do the frames of held-out mazes settle?
"""


def add(verbs: Any) -> None:
    recording.add(verbs, "steps", HELP, EXAMPLES, StepsOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import steps

    recording.run(args, StepsOptions, steps.study)
