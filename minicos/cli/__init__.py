"""The `minicos` command: one file for each verb. Heavy imports happen inside `run`, so that --help and inspect are instant."""

import argparse
import os
import shlex
import sys

from minicos.cli import (
    attention,
    behaviours,
    belief,
    bench,
    commitment,
    counts,
    demo,
    distilled,
    energy,
    ensemble,
    frames,
    generate,
    inspect,
    noise,
    points,
    puzzles,
    reproduce,
    run,
    steps,
    swap,
    vbvr,
    verify,
)
from minicos.cli.options import Parser
from minicos.errors import MinicosError

VERBS = (
    demo,
    generate,
    steps,
    energy,
    attention,
    belief,
    commitment,
    behaviours,
    counts,
    noise,
    frames,
    distilled,
    swap,
    ensemble,
    run,
    reproduce,
    vbvr,
    puzzles,
    points,
    inspect,
    verify,
    bench,
)
DESCRIPTION = """\
Watch a video diffusion model reason, step by step.

  minicos demo                                                     solve a maze and show how: start here
  minicos steps --image maze.png --prompt "solve the maze"         the clean estimate at every denoising step
  minicos energy --image maze.png --prompt "solve the maze"        which tokens each layer works on
  minicos ensemble                                                 do seeds that share states solve more?
  minicos swap                                                     at which layer a prompt becomes an answer
  minicos run --image maze.png --prompt "solve the maze" --noise step:10 --x0 --energy    several of these in one pass
  minicos reproduce                                                every experiment, one report
  minicos vbvr --puzzles 500 --condition plain ensemble            a benchmark, condition by condition, with its tables
  minicos generate --image maze.png --prompt "solve the maze"      just the video
  minicos puzzles --list                                           what the embedded model is trained and judged on
  minicos points                                                   every hook point of a model
  minicos inspect PATH                                             what a checkpoint is
  minicos verify                                                   does it compute what diffusers computes?
  minicos bench forward                                            how fast is it, beside diffusers?
"""


def parser() -> Parser:
    top = Parser(
        prog="minicos",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code: 0 (or what the verb says), 2 for a mistake that one sentence explains, 130 after Ctrl-C."""
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    args = parser().parse_args(
        argv, argparse.Namespace(command=shlex.join(["minicos", *argv]))
    )  # runs remember it
    code = 0
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
    except MinicosError as error:
        return _stop(2, str(error))
    except KeyboardInterrupt:
        kept = (
            " Finished steps are kept; the same command continues." if hasattr(args, "out") else ""
        )
        return _stop(130, f"stopped.{kept}")
    except (
        BrokenPipeError
    ):  # `minicos points | head`: nobody reads on, and the flush at exit should not mind
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _stop(
            2,
            f"{error.filename or 'the system'}: {error.strerror or error}. Check path and permissions.",
        )
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        return _stop(
            2,
            "out of memory. Take fewer --frames, a smaller --image, or --residency swap or stream.",
        )
    return code


def _stop(code: int, sentence: str) -> int:
    print(f"minicos: {sentence}", file=sys.stderr)
    return code


def _out_of_memory(error: Exception) -> bool:
    """Told by name, since the type is torch's and torch may not be imported."""
    kind = type(error).__name__
    return kind in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)
