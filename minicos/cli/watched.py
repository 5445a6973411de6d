"""`--puzzle KIND` for verbs that watch one run: a puzzle provides prompt and picture."""

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any

from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.peers.folder import PeerFolder
    from minicos.puzzles import Puzzle
    from minicos.video_model import VideoModel
    from minicos.weights.layouts import Layout

HELP = "instead: a held-out puzzle of this kind, e.g. maze, or maze:7, which skips seven"


def puzzle(args: argparse.Namespace) -> "Puzzle | None":
    """The puzzle of --puzzle, which becomes the input of the run; None if there is a prompt.

    `args` then has its prompt, and its picture as the image. Raises MinicosError for an unknown
    kind.
    """
    spec = getattr(args, "puzzle", None)
    if args.prompt is not None or spec is None:
        return None
    for name in ("image", "last", "height", "width"):
        if getattr(args, name, None) is not None:
            raise MinicosError(f"--{name} needs a --prompt; a puzzle brings a picture of its own")
    found = draw(
        spec,
        size=getattr(args, "size", None),
        split=getattr(args, "split", "test"),
        single=getattr(args, "single", False),
    )
    args.prompt, args.image = found.prompt, found.first_frame()
    return found


def draw(
    spec: str, *, size: int | None = None, split: str = "test", single: bool = False
) -> "Puzzle":
    """The puzzle of "maze" or "maze:7", with several right answers if the kind has such."""
    from minicos import puzzles
    from minicos.analysis.tools.cases import ambiguous

    match = re.fullmatch(r"([^:]+)(?::([0-9]{1,3}))?", spec)
    if not match:
        raise MinicosError(f"--puzzle {spec}: give a kind such as maze, or maze:7 for another one.")
    name, index = match[1], int(match[2] or 0)
    family = puzzles.family(name) if size is None else puzzles.of_kind(name, size)
    if single:
        return family.distinct(index + 1, split, lambda one: not ambiguous(one))[index]
    try:
        return family.distinct(index + 1, split, ambiguous)[index]
    except MinicosError:
        return family.distinct(index + 1, split)[index]


def check(files: "Layout | PeerFolder", puzzle: "Puzzle | None") -> None:
    """Raise MinicosError for a puzzle on a model that was not trained on puzzles."""
    if puzzle is not None and files.variant != "tiny":
        raise MinicosError(
            f"puzzles are for the embedded model, not for {files.variant}: give --image and "
            "--prompt. `minicos puzzles` writes puzzles as pictures."
        )


def preview(args: argparse.Namespace, wan: "VideoModel") -> list[Any]:
    """The recorder of --preview; it keeps nothing, so it does not identify the run."""
    if not args.preview:
        return []
    from minicos.analysis.tools.preview import FILE, Preview
    from minicos.wan import as_wan

    print(f"minicos: {args.out / FILE} is rewritten after every step", file=sys.stderr)
    return [Preview(as_wan(wan, "--preview"))]


def recorders(wan: "VideoModel", puzzle: "Puzzle | None") -> list[Any]:
    """The recorder for a puzzle with several right answers, none of them nearly a mixture of the
    others: which of them are alive.
    """
    if puzzle is None or not 2 <= len(puzzle.candidates) <= 32:
        return []
    from minicos.analysis.answers import Answers
    from minicos.analysis.tools import posterior

    z = posterior.answers(wan, puzzle, wan.preset.frames)
    return [Answers(wan, z)] if posterior.apart(z) else []
