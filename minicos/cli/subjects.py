"""What an experiment runs on, as options: held-out puzzles, which know their answers, or the user's own picture and prompt."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.cli import run_folder, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.analysis.tools.cases import Case
    from minicos.puzzles import Puzzle

KINDS = ("maze", "goal", "mark", "memory", "turn")


def add_subject_options(
    parser: argparse.ArgumentParser,
    kind: str | None = "maze",
    n: int = 100,
    *,
    size: int = 4,
    kinds: Sequence[str] = KINDS,
    split: bool = True,
    own: bool = True,
) -> None:
    """Puzzles, of `kind` unless told otherwise (None: there are none then); where `own`, `--prompt` and `--image` are the user's case."""
    puzzles = parser.add_argument_group("held-out puzzles (the embedded model; scored)")
    default = "" if kind is None else f" (default: {kind})"
    puzzles.add_argument("--puzzle", choices=kinds, default=kind, help=f"kind of puzzle{default}")
    puzzles.add_argument(
        "--size",
        type=int,
        default=size,
        choices=(3, 4, 5),
        help=f"cells along a side (default: {size})",
    )
    puzzles.add_argument("--n", type=values.positive, default=n, help=f"how many (default: {n})")
    if split:
        puzzles.add_argument(
            "--split", choices=("dev", "test"), default="test", help="default: test"
        )
    if not own:
        parser.set_defaults(prompt=None, image=None)
        return
    case = parser.add_argument_group("or a case of your own (any model; no score)")
    case.add_argument("--prompt", help="what should happen")
    case.add_argument(
        "--image", type=Path, help="first frame (png, jpg), for image-to-video models"
    )


def subjects(
    args: argparse.Namespace, keep: Callable[["Puzzle"], bool] = lambda puzzle: True
) -> list["Case"]:
    """The cases of the options, with noise seeds from --seed on. `keep` chooses among puzzles, e.g. those with several answers."""
    from minicos.analysis.tools.cases import Case, held_out

    if args.prompt is not None:
        return [Case(args.prompt, image(args), args.seed)]
    if args.image is not None:
        raise MinicosError(
            "--image needs a --prompt beside it; without both, held-out puzzles are used"
        )
    return held_out(
        args.puzzle, args.n, size=args.size, split=args.split, seed=args.seed, keep=keep
    )


def image(args: argparse.Namespace) -> "Tensor | None":
    """The user's own first frame."""
    from minicos.media import load_image

    return None if args.image is None else load_image(args.image)


def about(args: argparse.Namespace) -> dict[str, object]:
    """The options of `subjects` among a run's settings."""
    if args.prompt is not None:
        return run_folder.subject(args, {"image": image(args)})
    return {"puzzle": args.puzzle, "size": args.size, "n": args.n, "split": args.split}
