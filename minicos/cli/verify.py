"""`minicos verify`: does this model compute what diffusers and transformers compute?"""

import argparse
import json
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from minicos.cli import opening, options, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.verify import Part, Row

EXAMPLES = """\
  minicos verify  # the embedded model: seconds
  minicos verify --model Wan2.2-I2V-A14B/ --all  # your weights, one line for every layer
  minicos verify --model Wan2.2-I2V-A14B/ --dtype bfloat16 --json
  # a model that diffusers runs: our loop against the pipeline's own latents
  minicos verify --model CogVideoX1.5-5B-I2V/
needs diffusers and transformers; the exit code is 0 if all agree within the tolerance, else 1
diffusers computes its time sinusoid in float32, minicos and the official code in float64: unless
--as-shipped is given, the exact one replaces it, and one more row shows the velocity as shipped
"""
WIDTH = 38  # of the first column


def add(verbs) -> None:
    parser = options.add_parser(
        verbs,
        "verify",
        "Compare a model with diffusers and transformers, layer by layer.",
        EXAMPLES,
        run,
    )
    parser.add_argument("--model", default="tiny", help="'tiny' or a folder (default: tiny)")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the matrices (default: float32 on the CPU and for tiny)",
    )
    parser.add_argument(
        "--grid",
        type=grid,
        default=(3, 4, 6),
        metavar="F,H,W",
        help="tokens along each axis (default: 3,4,6)",
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

    import torch

    from minicos.open import load
    from minicos.peers.opening import open_peer
    from minicos.peers.peer import Peer
    from minicos.peers.verify import verify as verify_peer
    from minicos.verify import verify
    from minicos.wan import Wan

    dtype_asked = args.dtype and getattr(torch, args.dtype)
    wan: Wan | Peer
    if folder := opening.peer_folder(args.model):
        if args.as_shipped:
            raise MinicosError("--as-shipped is about the time sinusoid of Wan: leave it out")
        wan = open_peer(folder, folder.preset(), device=args.device, dtype=dtype_asked)
        compared = verify_peer(wan, args.grid, tolerance=args.tolerance)
    else:
        wan = load(args.model, device=args.device, dtype=dtype_asked)
        compared = verify(wan, args.grid, as_shipped=args.as_shipped, tolerance=args.tolerance)
    dtype = str(wan.dtype).removeprefix("torch.")
    if args.json:
        parts = list(compared)
        facts = {"model": wan.variant, "dtype": dtype, "device": str(wan.device), "peers": versions}
        print(json.dumps(facts | to_json(parts), indent=1))
    else:
        parts = list(told(compared, args.all))
        peer = " and ".join(map(" ".join, versions.items()))
        print(verdict(f"{wan.variant} ({dtype} on {wan.device})", peer, parts))
    return int(any(part.parted for part in parts))


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
