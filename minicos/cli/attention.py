"""`minicos attention`: where does attention go?"""

import argparse
from typing import Any

from minicos.analysis.options import AttentionOptions
from minicos.cli import recording

HELP = "Watch attention: what tokens receive, what frames exchange, and what padding gets."
EXAMPLES = """\
  minicos attention --puzzle mark --also steps
  minicos attention --puzzle mark --layers 0,6,11 --at 0,10 --heads 0
  minicos attention --image maze.png --prompt "solve the maze" --preset cos --branch uncond
  minicos attention --image maze.png --prompt "solve the maze" --queries 8
      # estimated, with standard errors: for large models
writes attention/received_step_NN.png, attention_frames.png (from which frame to which),
attention_padding.png, attention.safetensors
  minicos attention --n 20  # the study: shares on padding and on the given frame
"""


def add(verbs: Any) -> None:
    recording.add(verbs, "attention", HELP, EXAMPLES, AttentionOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import attention

    recording.run(args, AttentionOptions, attention.study)
