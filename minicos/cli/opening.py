"""From options to a model that is ready to run, and to the condition of its video."""

import argparse
import os
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicos.errors import MinicosError, printable, warn

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.condition import Condition
    from minicos.config import Preset
    from minicos.ops import Ops
    from minicos.peers.folder import PeerFolder
    from minicos.peers.peer import Peer
    from minicos.plan import Plan
    from minicos.video_model import VideoModel
    from minicos.wan import Wan
    from minicos.weights.layouts import Layout

DRAWN = "`minicos puzzles --kind maze` draws some, and --puzzle maze brings its own."
LARGE = 10**9  # bytes of weights from which the plan is printed; the embedded model is smaller


def images(args: argparse.Namespace) -> "dict[str, Tensor | None]":
    """First and last frame of the options. Read before the model, so that a wrong path is reported
    immediately.
    """
    from minicos.media import as_image

    given = {"image": args.image, "last": getattr(args, "last", None)}
    for path in given.values():
        if isinstance(path, Path) and not path.is_file():
            raise MinicosError(
                f"{path} does not exist or is not a file. Give the path of an image; {DRAWN}"
            )
    return {name: None if one is None else as_image(one) for name, one in given.items()}


def layout_or_peer(args: argparse.Namespace) -> "Layout | PeerFolder":
    """The files of the options' model and what it is, from headers alone, without torch."""
    if peer := peer_folder(args.model, args.download):
        _refuse_for_peers(args, peer.variant)
        return peer
    return layout(args)


def layout(args: argparse.Namespace) -> "Layout":
    """`layout_or_peer` for verbs of Wan only. Raises MinicosError for peers."""
    from minicos.weights.layouts import find

    if peer := peer_folder(args.model, args.download):
        raise MinicosError(
            f"this command is for Wan, and {args.model} is {peer.variant}: steps, energy, "
            "attention, generate, noise, swap, ensemble, run, capture, points, inspect and verify do"
        )
    twice = [name for name, count in Counter(name for name, _ in args.part).items() if count > 1]
    if twice:
        raise MinicosError(f"--part {twice[0]}=... is given twice: name one file for each part")
    files: dict[str, list[tuple[str, float]]] = {}
    for expert, one in args.lora:
        files.setdefault(expert, []).append(one)
    return find(
        args.model, variant=args.variant, parts=dict(args.part), lora=files, download=args.download
    )


def peer_folder(model: str, download: bool = False) -> "PeerFolder | None":
    """The model as a diffusers folder of a peer, if it is one."""
    from minicos.peers import folder
    from minicos.weights.layouts import locate

    path = locate(model, download)
    return folder.find(path) if path.is_dir() else None


def _refuse_for_peers(args: argparse.Namespace, variant: str) -> None:
    """Raise MinicosError for options that do not apply to a model that diffusers runs."""
    given = {
        "--variant": args.variant,
        "--part": args.part,
        "--lora": args.lora,
        "--kernels": args.kernels,
        "--decode-dtype": args.decode_dtype,
        "--preview": getattr(args, "preview", False),
    }
    for option, value in given.items():
        if value:
            raise MinicosError(f"{option} has no place with {variant}, which diffusers runs")


def plan(args: argparse.Namespace, files: "Layout | PeerFolder") -> "Preset":
    """The way of sampling that the options select. Everything that can be refused without reading
    weights is refused here.
    """
    from minicos.journal import check as check_journal
    from minicos.journal import nearest
    from minicos.wan import UNUSED_NEGATIVE

    if getattr(args, "jsonl", None) is not None:
        check_journal(args.jsonl)
    above = nearest(args.out)
    if args.out.is_symlink() and not args.out.exists():
        raise MinicosError(f"{args.out} is a link to nothing. Remove it, or choose another --out.")
    if not above.is_dir():
        raise MinicosError(f"{above} is a file, not a folder. Choose another --out.")
    if not os.access(above, os.W_OK):
        raise MinicosError(f"cannot write into {above}. Choose another --out.")
    variant = files.variant
    chosen = files.preset(args.preset).changed(**_changes(args))
    files.check(chosen.frames, args.tile)
    if (args.height or getattr(args, "area", None)) and getattr(args, "image", None) is None:
        _check_size(files, chosen)
    if getattr(args, "negative_prompt", None) is not None and not chosen.guided:
        warn(UNUSED_NEGATIVE)
    if args.boundary is not None and len(files.experts) == 1:
        raise MinicosError(f"--boundary is between two experts, and {variant} has one here.")
    if getattr(args, "prompt", None) is not None:  # otherwise puzzles have their own pictures
        given = (args.image is not None, getattr(args, "last", None) is not None)
        if chosen.needs_image and not given[0]:
            raise MinicosError(
                f"{variant} makes a video from a first frame: give an image with --image. {DRAWN}"
            )
        chosen.check_inputs(variant, [args.prompt], *given)
    return chosen


def _check_size(files: "Layout | PeerFolder", preset: "Preset") -> None:
    """Raise MinicosError for frames of a size that does not divide into patches."""
    from minicos.condition import check_size
    from minicos.weights.layouts import Layout

    if isinstance(files, Layout):  # peers round a size, or refuse it themselves
        patch = files.experts["high"].config.patch_size[1]
        check_size(*preset.size, files.vae.config.stride[1] * patch)


@dataclass(frozen=True)
class HeaderOutline:
    """The `Outline` of a Wan model, from headers alone."""

    variant: str
    preset: "Preset"
    experts: tuple[str, ...]
    depth: int
    sublayers: tuple[str, ...]
    streams: tuple[str, ...]
    stream_decides: bool
    stride: tuple[int, int, int]
    patch: tuple[int, int, int]
    loras: tuple[tuple[Path, float], ...]

    def with_preset(self, **changes: Any) -> "HeaderOutline":
        return replace(self, preset=self.preset.changed(**changes))

    def latent_frames(self, frames: int) -> int:
        return (frames - 1) // self.stride[0] + 1

    def grid(self, image: "Tensor | None") -> tuple[int, int, int]:
        """Frames, rows and columns of the tokens of a video from this first frame (.. h w), if any.

        Raises:
            MinicosError: the model cannot make a video of this size.
        """
        from minicos.condition import frame_size

        (t, h, w), (_, stride, _) = self.patch, self.stride
        height, width = self.preset.size
        if image is not None:
            size = (image.shape[-2], image.shape[-1])
            height, width = frame_size(size, self.preset.area, stride, h, self.preset.resize)
        frames = self.latent_frames(self.preset.frames) // t
        return frames, height // stride // h, width // stride // w


def outline(args: argparse.Namespace, files: "Layout | PeerFolder") -> HeaderOutline | None:
    """The outline of the options' run; None for a peer, which is described when it is loaded."""
    from minicos.weights.layouts import Layout

    if not isinstance(files, Layout):
        return None
    return HeaderOutline(
        variant=files.variant,
        preset=plan(args, files),
        experts=tuple(files.experts),
        depth=files.depth,
        sublayers=("self_attn", "cross_attn", "ffn"),
        streams=(),
        stream_decides=True,
        stride=files.vae.config.stride,
        patch=files.experts["high"].config.patch_size,
        loras=tuple(one for part in files.experts.values() for one in part.loras),
    )


def within(at: tuple[int, ...] | None, steps: int, option: str = "--at ") -> tuple[int, ...] | None:
    """The steps of an option, checked against the run."""
    if at and (at[0] < 0 or at[-1] >= steps):
        raise MinicosError(f"{option}{','.join(map(str, at))}: the run has steps 0 to {steps - 1}.")
    return at


def load(
    args: argparse.Namespace,
    files: "Layout | PeerFolder | None" = None,
    image: "Tensor | None" = None,
) -> "VideoModel":
    """The model of the options, under their preset, with memory for a video from this first frame.

    Prints which LoRAs were merged, what else the files could be and, for a large model, the plan.
    """
    from minicos.peers.folder import PeerFolder

    opened: list[VideoModel] = getattr(args, "opened", [])  # by an earlier sample of --cases
    if not opened:
        files = files or layout_or_peer(args)
        if isinstance(files, PeerFolder):
            opened.append(_load_peer(args, files))
        else:
            opened.append(load_wan(args, files, image))
    return _fitting(opened[0], image)


def load_wan(args: argparse.Namespace, files: "Layout", image: "Tensor | None" = None) -> "Wan":
    """`load` for commands that are for Wan alone."""
    import torch

    from minicos import device
    from minicos import open as opening

    chosen = plan(args, files)
    ops = device.operations(device.open_device(args.device), args.kernels)
    wan = opening.load(
        files,
        preset=chosen,
        device=args.device,
        dtype=None if args.model_dtype is None else getattr(torch, args.model_dtype),
        residency=args.residency,
        frames=chosen.frames,
        size=None if image is None else (image.shape[-2], image.shape[-1]),
        tile=args.tile,
        tell=partial(show, ops=ops),
        ops=ops,
        decode_dtype=torch.bfloat16 if args.decode_dtype == "bfloat16" else torch.float32,
        decode_tf32=None if args.decode_dtype is None else args.decode_dtype == "tf32",
        compile=args.compile,
    ).with_preset(**_changes(args))
    merged = map(str, wan.loras) if args.lora else ()  # not those that the model comes with
    for line in (*wan.notes, *merged):
        print(f"minicos: {printable(line)}", file=sys.stderr)
    return wan


def show(plan: "Plan", ops: "Ops | None" = None) -> None:
    """Print the plan of a large model and, of Wan (on a card always), its operations."""
    from minicos import cost, device
    from minicos.plan import describe

    if plan.weights >= LARGE:
        speed = cost.throughput(plan.device, plan.dtype) if plan.operations else None
        print(describe(plan, speed), file=sys.stderr)
    if ops is not None and (plan.weights >= LARGE or plan.device.type != "cpu"):
        print(f"  operations: {device.describe(ops, plan.device)}", file=sys.stderr)


def _load_peer(args: argparse.Namespace, files: "PeerFolder") -> "Peer":
    """A peer under the options' preset."""
    from minicos.peers.opening import open_peer

    how = {"device": args.device, "residency": args.residency, "compile": args.compile}
    return open_peer(files, plan(args, files), tell=show, tile=args.tile, **how)


def _fitting(model: "VideoModel", image: "Tensor | None") -> "VideoModel":
    """A peer for videos with the aspect ratio of this first frame; Wan adapts by itself."""
    from minicos.peers.peer import Peer

    if image is None or not isinstance(model, Peer):
        return model
    return model.with_preset(size=model.fitting((image.shape[-2], image.shape[-1])))


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the preset that the options change."""
    names = (
        "steps",
        "solver",
        "shift",
        "guidance",
        "boundary",
        "frames",
        "negative_prompt",
        "noise_device",
        "loop_dtype",
    )
    given = {name: getattr(args, name, None) for name in names}
    area = getattr(args, "area", None)
    if args.height or args.width:
        if not (args.height and args.width):
            raise MinicosError("--height and --width go together: give both")
        if area is not None:
            raise MinicosError("--area is another way to say --height and --width: leave it out")
        area = args.height, args.width
    if isinstance(area, tuple):  # not in `vbvr` and `capture`, which resize each picture
        height, width = area
        given |= {"area": height * width, "size": (height, width)}
    return {name: value for name, value in given.items() if value is not None}


def condition(
    args: argparse.Namespace,
    wan: "VideoModel",
    images: "dict[str, Tensor | None]",
    samples: int = 1,
) -> "Condition":
    """The condition of the options, for one sample or several."""
    return wan.condition([args.prompt] * samples, images["image"], last=images["last"])
