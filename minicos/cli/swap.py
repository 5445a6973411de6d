"""`minicos swap`: at which layer does the prompt become an answer?"""

import argparse
from typing import TYPE_CHECKING, Any

from minicos.analysis.options import SwapOptions
from minicos.cli import study

if TYPE_CHECKING:
    from minicos.video_model import VideoModel

HELP = "Put hidden states of one prompt's run into another's: at which layer does the answer turn?"
EXAMPLES = """\
  minicos swap --puzzle mark  # 10 held-out puzzles, both directions, scored
  minicos swap --puzzle goal --n 4 --at 3,6,9 --during 0,all --controls null,wrong
  minicos swap --puzzle mark --what cross_attn --donor own --region objects
  minicos swap --image shapes.png --prompt "mark the circle" --other "mark the square"
  minicos swap --probe 4 --model Wan2.2-I2V-A14B --preset cos --at 0,10,20,30,39 --during 0
      # pictures of cats and bicycles, drawn for this purpose
writes last_frames.png, curves over layers and a map of layers x steps, results.json, and the first
picture's videos
"""


def add(verbs: Any) -> None:
    study.add(verbs, "swap", HELP, EXAMPLES, SwapOptions, run)


def run(args: argparse.Namespace) -> None:
    from minicos.analysis.swap import study as swap

    study.run(args, SwapOptions, swap.study, check=swap.check, load=load)


def load(args: argparse.Namespace, asked: SwapOptions) -> "VideoModel":
    """The model, with memory for the first picture; warns about words of the prompts that it does
    not know.
    """
    from minicos.analysis.swap import pairs

    made = pairs.chosen(asked)
    return study.open_model(args, asked, [case for pair in made for case in (pair.a, pair.b)])
