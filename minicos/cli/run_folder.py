"""The run folder of the options: what identifies a run, and what is only recorded."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.analysis.tools.record import Recorder
    from minicos.journal import Journal
    from minicos.runs import Run
    from minicos.video_model import VideoModel


def subject(args: argparse.Namespace, images: "dict[str, Tensor | None]") -> dict[str, str | None]:
    """The input of a run, among its settings: an image counts by its pixels, not by its name."""
    from hashlib import sha256

    hashes = {
        k: sha256(x.numpy().tobytes()).hexdigest()[:16] for k, x in images.items() if x is not None
    }
    return {"prompt": args.prompt, "image": None, **hashes}


def _decoding(wan: "VideoModel") -> dict[str, object]:
    """How latents become pixels, if not by default (whole frames, in float32)."""
    import torch

    found: dict[str, object] = {}
    if wan.decode_dtype != torch.float32:
        found["decode_dtype"] = str(wan.decode_dtype)
    if wan.decode_tf32:
        found["decode_tf32"] = True
    if wan.tile:
        found["tile"] = wan.tile
    return found


def open_run(
    args: argparse.Namespace,
    wan: "VideoModel",
    analyses: Sequence["Recorder"],
    *,
    latents: bool = False,
    **settings: object,
) -> "Run":
    """The run folder of the options. It is opened again if it holds the same run, and refused if it
    holds another.

    Args:
        latents: whether only latents are stored and read again; then the way of decoding does not
            identify the run.
        settings: what else identifies the run.
    """
    from minicos.device import describe
    from minicos.runs import Run

    model = {
        "model": wan.variant,
        "weights": wan.weights,
        **asdict(wan.preset),
        "dtype": str(wan.dtype),
        "seed": args.seed,
        **({} if latents else _decoding(wan)),
    }
    facts = {
        "command": args.command,
        "model_path": str(args.model),
        "device": str(wan.device),
        "preset": args.preset or wan.presets[0],
        "residency": wan.placement,
        "operations": describe(wan.ops, wan.device),
        **_decoding(wan),
        "compiled": args.compile,
        "loras": [asdict(one) for one in wan.loras],
        "lead": next(f for f in count() if wan.frames_behind_token(f)),  # frames that are not shown
    }
    found = {**model, **settings, "analyses": [a.name for a in analyses]}
    return Run.open(args.out, found, facts, journal(args))


def journal(args: argparse.Namespace) -> "Journal | None":
    """The journal of --jsonl, for verbs that have it."""
    from minicos.journal import Journal

    path = getattr(args, "jsonl", None)
    return None if path is None else Journal(path)


def close(args: argparse.Namespace, run: "Run", quiet: bool = False) -> None:
    """Finish a command with a run folder: write its duration to run.json, make its page and, unless
    `quiet`, print where it is.
    """
    from minicos.page.gather import write

    run.add_sitting(time.monotonic() - args.begin)
    page = write(run)
    if not quiet:
        place = sys.stderr if getattr(args, "json", False) else sys.stdout
        print(f"{page}  (all of it on one page: open it in a browser)", file=place)
