"""`minicos verify`: does this model compute what diffusers and transformers compute?"""

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from minicos.cli import opening, options, values
from minicos.errors import MinicosError, out_of_memory

if TYPE_CHECKING:
    from minicos.peers.folder import PeerFolder
    from minicos.peers.peer import Peer
    from minicos.plan import Plan
    from minicos.verify import Part, Row
    from minicos.wan import Wan
    from minicos.weights.layouts import Layout

EXAMPLES = """\
  minicos verify  # the embedded model: seconds
  minicos verify --model Wan2.2-I2V-A14B/ --all  # your weights, one line for every layer
  minicos verify --model Wan2.2-I2V-A14B/ --dtype bfloat16 --json
  minicos verify --model Wan2.2-I2V-A14B/ --residency disk  # blocks come from their files
  # a model that diffusers runs: our loop against the pipeline's own latents
  minicos verify --model CogVideoX1.5-5B-I2V/
needs diffusers and transformers; the exit code is 0 if all agree within the tolerance, else 1
diffusers computes its time sinusoid in float32, minicos and the official code in float64: unless
--as-shipped is given, the exact one replaces it, and one more row shows the velocity as shipped
"""
WIDTH = 38  # of the first column
GRID = (3, 4, 6)
# by their names in the parsed options: those that all verbs share and that mean something here
SHARED = (
    *("variant", "part", "lora", "download"),
    *("device", "model_dtype", "height", "width", "residency"),
)
SIDE = "{} of the compared frames in pixels, instead of --grid's (the default: 3 x 4 x 6 tokens)"


def add(verbs) -> None:
    parser = options.add_parser(
        verbs,
        "verify",
        "Compare a model with diffusers and transformers, layer by layer.",
        EXAMPLES,
        run,
    )
    parser.add_argument(
        "--model", default="tiny", help="'tiny', a folder, a file or a Hub id (default: tiny)"
    )
    every = options.Parser()
    options.add_model_options(every, out="")
    for action in every._actions:
        if action.dest in SHARED:
            parser._add_action(action)
            if action.dest in ("height", "width"):
                action.help = SIDE.format(action.dest)
    parser.set_defaults(kernels=None, decode_dtype=None)  # which peers refuse
    parser.add_argument(
        "--grid",
        type=grid,
        metavar="F,H,W",
        help="tokens along each axis (default: 3,4,6); errors show at any size",
    )
    parser.add_argument(
        "--as-shipped",
        action="store_true",
        help="keep diffusers' float32 time sinusoid, which is less exact",
    )
    parser.add_argument(
        "--tolerance",
        type=values.positive_number,
        help="largest rel_l2 (default: 5e-6 in float32, 5e-2 in bfloat16; 2e-5 as shipped); "
        "rel_max may be ten times that",
    )
    parser.add_argument(
        "--all", action="store_true", help="print every layer, not just the worst of its kind"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="one object: ok, first, parts with a row for every layer",
    )


def grid(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not three positive numbers such as 3,4,6")
    f, h, w = map(int, text.split(","))
    return f, h, w


def run(args: argparse.Namespace) -> int:
    """The exit code: 0 if all agree, else 1."""
    from minicos.verify import peers

    versions = {
        peer.__name__: peer.__version__ for peer in peers()
    }  # requested before a model is read

    from minicos.peers.peer import Peer
    from minicos.peers.verify import verify as verify_peer
    from minicos.verify import verify

    files = opening.layout_or_peer(args)
    tokens, video = compared(args, files)
    try:
        wan = opened(args, files, video)
        if isinstance(wan, Peer):
            parts = verify_peer(wan, tokens, tolerance=args.tolerance)
        else:
            parts = verify(wan, tokens, as_shipped=args.as_shipped, tolerance=args.tolerance)
        return report(args, wan, versions, parts)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MinicosError(
            "out of memory. Take a smaller --grid, --dtype bfloat16 or --residency stream."
        ) from error


def report(
    args: argparse.Namespace, wan: "Wan | Peer", versions: dict[str, str], found: Iterable["Part"]
) -> int:
    """Print the parts, each when it is done, and the verdict; returns the exit code."""
    dtype = str(wan.dtype).removeprefix("torch.")
    if args.json:
        parts = list(found)
        facts = {"model": wan.variant, "dtype": dtype, "device": str(wan.device), "peers": versions}
        print(json.dumps(facts | to_json(parts), indent=1))
    else:
        parts = list(told(found, args.all))
        peer = " and ".join(map(" ".join, versions.items()))
        print(verdict(f"{wan.variant} ({dtype} on {wan.device})", peer, parts))
    return int(any(part.parted for part in parts))


def compared(
    args: argparse.Namespace, files: "Layout | PeerFolder"
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Tokens along frames, height and width, and the frames, height and width of their video."""
    from minicos.condition import check_size
    from minicos.peers.folder import PeerFolder
    from minicos.peers.verify import WHOLE

    if isinstance(files, PeerFolder):
        (t, *_), (pt, *sides), whole = files.stride, files.token, WHOLE
        first = pt // t
    else:
        t, *strides = files.vae.config.stride
        first, *patch = files.experts["high"].config.patch_size
        sides, whole = [a * b for a, b in zip(strides, patch, strict=True)], 1
    f, *tokens = args.grid or GRID
    if args.height or args.width:
        if not (args.height and args.width):
            raise MinicosError("--height and --width go together: give both")
        if args.grid:
            raise MinicosError("--grid is another way to say --height and --width: leave it out")
        check_size(args.height, args.width, math.lcm(*sides, whole))
        tokens = [n // side for n, side in zip((args.height, args.width), sides, strict=True)]
    height, width = (-(-n * side // whole) * whole for n, side in zip(tokens, sides, strict=True))
    return (f, tokens[0], tokens[1]), ((f * first - 1) * t + 1, height, width)


def opened(
    args: argparse.Namespace, files: "Layout | PeerFolder", video: tuple[int, int, int]
) -> "Wan | Peer":
    """The model, with memory for this video. Raises MinicosError, also with what would fit."""
    from minicos.peers.folder import PeerFolder
    from minicos.plan import DoesNotFit

    if args.as_shipped and isinstance(files, PeerFolder):
        raise MinicosError("--as-shipped is about the time sinusoid of Wan: leave it out")
    try:
        return _load(args, files, video, opening.show)
    except MinicosError as error:
        short = error if isinstance(error, DoesNotFit) else error.__cause__
        if not isinstance(short, DoesNotFit):
            raise
        said = f"{short} {remedy(args, files, video)}"
        raise MinicosError(said) from error


def _load(
    args: argparse.Namespace,
    files: "Layout | PeerFolder",
    video: tuple[int, int, int],
    tell: Callable[..., object],
) -> "Wan | Peer":
    import torch

    from minicos import device
    from minicos.open import load
    from minicos.peers.folder import PeerFolder
    from minicos.peers.opening import open_peer

    frames, *size = video
    preset = files.preset().changed(frames=frames, size=tuple(size), area=None)
    dtype = args.model_dtype and getattr(torch, args.model_dtype)
    if isinstance(files, PeerFolder):
        how = {"device": args.device, "dtype": dtype, "residency": args.residency}
        return open_peer(files, preset, tell=tell, **how)
    ops = device.operations(device.open_device(args.device))
    return load(
        files,
        preset=preset,
        device=args.device,
        dtype=dtype,
        residency=args.residency,
        tell=lambda plan: tell(replace(plan, operations=0), ops),  # a comparison has no steps
        ops=ops,
    )


class _Planned(Exception):
    """A plan fits; nothing has been read."""


def remedy(
    args: argparse.Namespace, files: "Layout | PeerFolder", video: tuple[int, int, int]
) -> str:
    """The first of some changes of the options that makes the model fit, as a sentence."""
    narrow, there = {"model_dtype": "bfloat16"}, {"device": "cpu"}
    for wish in ({}, narrow, there, there | narrow):
        changes = {"residency": "auto"} | wish
        words = [
            f"--{name.removeprefix('model_')} {value}"
            for name, value in changes.items()
            if value != getattr(args, name)
        ]
        if words and _fits(_with(args, **changes), files, video):
            return f"It fits with {' '.join(words)}."
    usual = _with(args, grid=None, height=None, width=None)
    if usual != args and _fits(usual, files, compared(usual, files)[1]):
        return "It fits without --grid, --height and --width."
    return "Take a device, or a machine, with more memory."


def _with(args: argparse.Namespace, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**vars(args) | changes)


def _fits(
    args: argparse.Namespace, files: "Layout | PeerFolder", video: tuple[int, int, int]
) -> bool:
    """Whether a model with these options fits, from headers alone."""
    import torch

    from minicos.plan import available, choose

    def stop(plan: "Plan", ops: object = None) -> None:
        host = available(torch.device("cpu"))
        choose(plan.residency, plan.parts, plan.device, free=plan.free, host=host, dtype=plan.dtype)
        raise _Planned

    try:
        _load(args, files, video, stop)
    except _Planned:
        return True
    except MinicosError:
        return False
    return True


def told(parts: Iterable["Part"], everything: bool) -> Iterator["Part"]:
    """Print each part when it is done."""
    print(f"  {'':{WIDTH}} rel_l2   allowed  rel_max  allowed")
    for part in parts:
        print(f"{part.name}: {part.skipped}" if part.skipped else part.name)
        for name, row in (
            ((row.point, row) for row in part.rows) if everything else folded(part.rows).items()
        ):
            columns = (row.rel_l2, row.tolerance, row.rel_max, row.tolerance_max)
            numbers = " ".join(f"{f'{x:.1e}' if x else '0':8}" for x in columns)
            print(f"  {name:{WIDTH}} {numbers}{'' if row.ok else ' parted'}".rstrip())
        yield part


def folded(rows: Iterable["Row"]) -> dict[str, "Row"]:
    """The worst row of each kind, such as blocks.*.ffn; NaN is worst of all."""
    worst: dict[str, Row] = {}
    for row in rows:
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", row.point)
        if kind not in worst or badness(row) > badness(worst[kind]):
            worst[kind] = row
    return worst


def badness(row: "Row") -> float:
    """The error of a row as a multiple of its tolerance."""
    worst = max(row.rel_l2 / row.tolerance, row.rel_max / row.tolerance_max)
    return math.inf if math.isnan(row.rel_l2 + row.rel_max) else worst


def verdict(model: str, peers: str, parts: list["Part"]) -> str:
    skipped = "".join(f" Not compared: {part.name}." for part in parts if part.skipped)
    for part in parts:
        if row := part.parted:
            return (
                f"{model} parts from {peers}, first at {part.name} {row.point}:"
                f" rel_l2 {row.rel_l2:.1e}, allowed {row.tolerance:.1e};"
                f" rel_max {row.rel_max:.1e}, allowed {row.tolerance_max:.1e}.{skipped}"
            )
    return f"{model} agrees with {peers} at all of {sum(len(part.rows) for part in parts)} points.{skipped}"


def to_json(parts: list["Part"]) -> dict:
    """Numbers that JSON lacks (infinity, NaN) become null."""

    def number(x: float) -> float | None:
        return x if math.isfinite(x) else None

    def entry(row: "Row") -> dict:
        return {
            "point": row.point,
            "rel_l2": number(row.rel_l2),
            "rel_max": number(row.rel_max),
            "tolerance": row.tolerance,
            "tolerance_max": row.tolerance_max,
            "ok": row.ok,
        }

    first = next(({"part": part.name} | entry(part.parted) for part in parts if part.parted), None)
    return {
        "ok": first is None,
        "first": first,
        "parts": [
            {"name": p.name, "skipped": p.skipped, "rows": [entry(row) for row in p.rows]}
            for p in parts
        ],
    }
