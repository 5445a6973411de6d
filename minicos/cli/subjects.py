"""What an experiment runs on, as options: held-out puzzles of the embedded model, or a prompt and a picture under several seeds."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.cli import common
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.analysis.cases import Case


def add_options(parser: argparse.ArgumentParser) -> None:
    """A subject, and how many of it."""
    what = parser.add_argument_group(
        "what to run it on", "held-out puzzles, which know their answers, or your own prompt"
    )
    what.add_argument(
        "--puzzle", help="kind of puzzle: maze, goal, mark, memory or turn (default without --prompt: maze)"
    )
    what.add_argument("--size", type=common.positive, default=4, help="cells along a puzzle's side (default: 4)")
    what.add_argument("--split", choices=("dev", "test"), default="test", help="puzzles to take (default: test)")
    what.add_argument("--prompt", help="what should happen")
    what.add_argument("--image", type=Path, help="first frame (png, jpg), for image-to-video models")
    what.add_argument("--negative", dest="negative_prompt", help="what should not; used where guidance is not 1")
    what.add_argument("--n", type=common.positive, help="puzzles (default: 25), or seeds of your prompt (default: 1)")


def cases(args: argparse.Namespace) -> tuple[list["Case"], dict[str, object]]:
    """The cases of the options, and what a run folder should remember of them."""
    from minicos import puzzles
    from minicos.analysis.cases import Case, held_out

    if args.prompt is None:
        kind = args.puzzle or "maze"
        if args.image is not None:
            raise MinicosError("--image needs a --prompt that says what should happen")
        if kind not in puzzles.KINDS or args.size not in puzzles.PUZZLES[kind].sizes:
            raise MinicosError(
                f"no {kind} puzzles of size {args.size}: kinds are {', '.join(puzzles.KINDS)}, sizes 3 to 5"
            )
        if args.model != "tiny":
            raise MinicosError(
                "the puzzles are for the embedded model: give a --prompt, and an --image if the model takes one"
            )
        n = args.n or 25
        try:
            found = held_out(kind, n, size=args.size, split=args.split, seed=args.seed)
        except ValueError as error:
            raise MinicosError(str(error)) from error
        return found, {"puzzle": kind, "size": args.size, "split": args.split, "n": n}
    if args.puzzle:
        raise MinicosError("--puzzle brings its own prompt: give one of the two")
    image = common.image(args)
    n = args.n or 1
    return [Case(args.prompt, image, args.seed + i) for i in range(n)], common.subject(args, image) | {"n": n}
