"""The `minicos` command: one file for each verb. Heavy imports happen inside `run`, so that --help and inspect are instant."""

import argparse
import sys

from minicos.cli import demo, generate, inspect, points, watch
from minicos.errors import MinicosError

DESCRIPTION = """Watch a video diffusion model reason, step by step.

  minicos demo                                    solve a maze and show how: start here
  minicos steps --image maze.png --prompt "solve the maze"    the clean estimate at every denoising step
  minicos energy --image maze.png --prompt "solve the maze"   which tokens each layer works on
  minicos generate ... | points | inspect PATH    make a video | list every hook point | say what a checkpoint is
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="minicos", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (demo, generate, watch, points, inspect):
        verb.add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for a mistake that one sentence explains, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    try:
        args.run(args)
    except MinicosError as error:
        print(f"minicos: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nminicos: stopped. Finished steps are kept; the same command continues.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
