"""The `minicos` command, with one file for each verb. Heavy imports happen inside `run`, so --help
and inspect are instant.
"""

import argparse
import os
import shlex
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minicos import __version__, signals
from minicos.cli import (
    attention,
    behaviours,
    belief,
    bench,
    capture,
    commitment,
    completion,
    counts,
    demo,
    distilled,
    energy,
    ensemble,
    frames,
    generate,
    inspect,
    noise,
    plant,
    points,
    puzzles,
    recall,
    reproduce,
    run,
    selfcheck,
    steps,
    swap,
    vbvr,
    verify,
)
from minicos.cli.options import Parser
from minicos.errors import MinicosError, MinicosWarning, out_of_memory

VERBS = (
    demo,
    generate,
    steps,
    energy,
    attention,
    belief,
    commitment,
    plant,
    recall,
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
    capture,
    points,
    inspect,
    verify,
    selfcheck,
    bench,
    completion,
)
DESCRIPTION = """\
Watch a video diffusion model reason, step by step. Start here, and open the page that it makes:

  minicos demo

watch one run, of a puzzle of the embedded model (--puzzle) or of a picture of your own (--image):
  minicos steps --puzzle maze             # the clean estimate at every denoising step
  minicos energy --puzzle mark            # which tokens each layer works on
  minicos attention --puzzle mark         # which tokens attend to which
  minicos generate --puzzle maze          # just the video
change it:
  minicos run --puzzle maze --noise step:3 --x0 --energy
measure it over many puzzles:
  minicos noise                           # what noise at a step or in a frame destroys
  minicos swap                            # at which layer a prompt becomes an answer
  minicos ensemble                        # do seeds that share states solve more?
  minicos reproduce                       # every experiment, one report
  minicos vbvr --puzzles 50 --condition plain ensemble     # a benchmark, with its tables
about models and this machine:
  minicos puzzles --list                  # what the embedded model is trained and judged on
  minicos points                          # every hook point of a model
  minicos inspect PATH                    # what a checkpoint is
  minicos verify                          # does it compute what diffusers computes?
  minicos selfcheck --model DIR           # do your weights run correctly here?
  minicos bench forward                   # how fast is it, compared with diffusers?
"""


def parser() -> Parser:
    top = Parser(
        prog="minicos",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"minicos {__version__}")
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0 or a code of the verb; 2 for a mistake that one sentence explains; 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    args = argparse.Namespace()
    try:
        with signals.handled(), _warnings_in_one_line():
            _check_folder()
            for text in argv:
                _check_text(text)
            args = parser().parse_args(
                argv,
                argparse.Namespace(
                    command=shlex.join(["minicos", *argv]), begin=time.monotonic()
                ),  # runs remember both
            )
            code = args.run(args) or 0
            sys.stdout.flush()
            return code
    except MinicosError as error:
        return _stop(2, str(error))
    except KeyboardInterrupt:
        return _stop(130, f"stopped.{_kept(args)}")
    except signals.Terminated:
        return _stop(143, f"stopped by SIGTERM.{_kept(args)}")
    except BrokenPipeError:
        # `minicos points | head`: the reader is gone, so the flush at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = error.filename or "reading or writing failed"  # e.g. stdout, on a full disk
        return _stop(2, f"{what}: {error.strerror or error}. Check path, space and permissions.")
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return _stop(
            2,
            "out of memory. Take fewer --frames, a smaller --image, or --residency swap, stream or "
            "disk.",
        )


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print minicos's warnings like its errors, in one line, each warning once."""
    said: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def in_one_line(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if not issubclass(category, MinicosWarning):
                show(message, category, *where)
            elif str(message) not in said:
                said.add(str(message))
                print(f"minicos: {message}", file=sys.stderr)

        warnings.simplefilter("always", MinicosWarning)
        warnings.showwarning = in_one_line  # type: ignore[assignment]
        yield


def _check_folder() -> None:
    """Raise MinicosError if the current folder was deleted, as of another terminal."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise MinicosError(
            "the current folder does not exist any more. Change into another one."
        ) from None


def _check_text(text: str) -> None:
    """Raise MinicosError for an argument that is not valid text: it could be neither tokenized nor
    written to a file.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise MinicosError(
            f"the argument {text!a} is not UTF-8. Rename the file, or set the terminal to UTF-8."
        ) from None


def _kept(args: argparse.Namespace) -> str:
    """What an interrupted command leaves on disk, as a sentence."""
    if getattr(args, "out", None) is None:
        return ""
    return f" What is finished is kept in {args.out}; the same command continues."


def _stop(code: int, sentence: str) -> int:
    print(f"minicos: {sentence}", file=sys.stderr)
    return code
