"""`--cases FOLDER`: run a verb once for each sample of a folder, each in its own run folder."""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from minicos.cli import opening, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.config import Preset
    from minicos.peers.folder import PeerFolder
    from minicos.vbvr.cases import Sample
    from minicos.vbvr.generate import Making
    from minicos.video_model import VideoModel
    from minicos.weights.layouts import Layout

Verb = Callable[[argparse.Namespace], Any]


def add(parser: argparse.ArgumentParser, group: "argparse._ActionsContainer | None" = None) -> None:
    """Add the option to a verb that takes --prompt and --image; `group` is the group of --prompt if
    that is exclusive.
    """
    (group or parser).add_argument(
        "--cases",
        type=values.path,
        metavar="FOLDER",
        help="instead: every sample of a folder (picture and prompt.txt, VBVR-Bench ...), each in "
        "OUT/NAME",
    )
    parser.set_defaults(run=partial(run, parser.get_default("run")))


def run(verb: Verb, args: argparse.Namespace) -> int:
    """Run the verb normally, or once for each sample. A sample that fails is reported at the end;
    the others are kept.
    """
    if args.cases is None:
        return verb(args) or 0
    if args.prompt is not None or args.image is not None:
        raise MinicosError(
            "--cases brings its own prompts and pictures: leave --prompt and --image out."
        )
    from minicos.page.folders import Row, write_cases
    from minicos.vbvr import cases, work

    found = cases.read(args.cases)
    files = opening.layout_or_peer(args)
    sizes = making(files, opening.plan(args, files))
    failed = dict(found.problems)
    opened: list[VideoModel] = []  # with room for the largest picture, which comes first
    order = sorted(found.samples, key=lambda sample: -sample.size[0] * sample.size[1])
    for number, sample in enumerate(order):
        print(f"minicos: {number + 1}/{len(order)}  {sample.name}", file=sys.stderr)
        try:
            own = _own(args, sizes, sample, cases.other(found.samples, sample))
            if code := verb(argparse.Namespace(**{**vars(args), **own, "opened": opened})):
                failed[sample.name] = f"exit code {code}"
        except BrokenPipeError:  # `| head`: there is nobody to tell
            raise
        except work.FAILURES as error:
            failed[sample.name] = work.one_line(error)
    for name, why in failed.items():
        print(f"minicos: failed: {name}: {why}", file=sys.stderr)
    rows = [Row(one.name, one.prompt, failed.get(one.name, "")) for one in found.samples]
    rows += [Row(name, "", why) for name, why in found.problems.items()]
    place = sys.stderr if getattr(args, "json", False) else sys.stdout
    page = write_cases(args.out, args.verb, args.command, rows)
    print(f"{page}  (all cases, a row for each: open it in a browser)", file=place)
    return int(bool(failed))


def making(files: "Layout | PeerFolder", preset: "Preset", area: int | None = None) -> "Making":
    """The sizes that a model makes of a folder's pictures, also one that diffusers runs."""
    from minicos.peers.folder import PeerFolder
    from minicos.vbvr.generate import Making

    if isinstance(files, PeerFolder):
        frames, side, _ = files.token
        return Making(files.variant, preset, side, frames, area)
    return Making.of(files, preset, area)


def _own(
    args: argparse.Namespace, sizes: "Making", sample: "Sample", other: str
) -> dict[str, object]:
    """The options of one sample: its prompt, its picture in a size that the model supports, and its
    folder.
    """
    from minicos.media import save_image
    from minicos.vbvr.cases import load_picture

    out = args.out / sample.name
    own: dict[str, object] = {"cases": None, "prompt": sample.prompt, "out": out}
    own["begin"] = time.monotonic()
    if sizes.preset.takes_image:
        image = out.with_name(f"{out.name}.png")
        save_image(image, sizes.fit(sample).forward(load_picture(sample)))
        own["image"] = image
    if getattr(args, "other", "") is None and (args.verb == "swap" or getattr(args, "swap", None)):
        own["other"] = other
    return own
