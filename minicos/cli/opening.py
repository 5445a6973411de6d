"""From options to a model that is ready to run, and to the condition of its video."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from minicos.errors import MinicosError, warn

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.condition import WanCondition
    from minicos.config import Preset
    from minicos.wan import Wan
    from minicos.weights.layouts import Layout

LARGE = 10**9  # bytes of weights from which the plan is printed: the embedded model starts without


def images(args: argparse.Namespace) -> "dict[str, Tensor | None]":
    """First and last frame of the options. Read before the model, so that a wrong path is told
    at once.
    """
    from minicos.media import load_image

    paths = {"image": args.image, "last": getattr(args, "last", None)}
    return {name: None if path is None else load_image(path) for name, path in paths.items()}


def layout(args: argparse.Namespace) -> "Layout":
    """The files of the options' model and what it is, from headers alone; torch is not needed."""
    from minicos.weights.layouts import find

    files: dict[str, list[tuple[str, float]]] = {}
    for expert, one in args.lora:
        files.setdefault(expert, []).append(one)
    return find(
        args.model, variant=args.variant, parts=dict(args.part), lora=files, download=args.download
    )


def plan(args: argparse.Namespace, files: "Layout") -> "Preset":
    """The way of sampling that the options name. Whatever can be refused without reading a
    weight is refused here.
    """
    from minicos.condition import check_frames
    from minicos.tiles import check_side
    from minicos.wan import UNUSED_NEGATIVE

    above = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise MinicosError(f"{above} is a file, not a folder. Choose another --out.")
    if not os.access(above, os.W_OK):
        raise MinicosError(f"cannot write into {above}. Choose another --out.")
    variant, stride = files.variant, files.vae.config.stride
    chosen = files.preset(args.preset).changed(**_changes(args))
    check_frames(chosen.frames, stride[0])
    check_side(args.tile, stride[1])
    if getattr(args, "negative_prompt", None) is not None and not chosen.guided:
        warn(UNUSED_NEGATIVE)
    if args.boundary is not None and len(files.experts) == 1:
        raise MinicosError(f"--boundary is between two experts, and {variant} has one here.")
    if getattr(args, "prompt", None) is not None:  # without one, puzzles bring their own pictures
        given = (args.image is not None, getattr(args, "last", None) is not None)
        chosen.check_inputs(variant, [args.prompt], *given)
    return chosen


def within(at: tuple[int, ...] | None, steps: int, option: str = "--at ") -> tuple[int, ...] | None:
    """The steps of an option, which the run must have."""
    if at and (at[0] < 0 or at[-1] >= steps):
        raise MinicosError(f"{option}{','.join(map(str, at))}: the run has steps 0 to {steps - 1}.")
    return at


def load(
    args: argparse.Namespace, files: "Layout | None" = None, image: "Tensor | None" = None
) -> "Wan":
    """The model of the options, under their preset, with room for a video from this first frame.

    Tells what was merged into it and what else its files could be and, of a large one, the plan:
    which weights go where.
    """
    import torch

    from minicos import cost, device
    from minicos import open as opening
    from minicos.plan import Plan, describe

    def tell(plan: Plan) -> None:
        if plan.weights >= LARGE:
            print(describe(plan, cost.throughput(plan.device, plan.dtype)), file=sys.stderr)
        if plan.weights >= LARGE or plan.device.type != "cpu":
            print(f"  operations: {device.describe(ops, plan.device)}", file=sys.stderr)

    opened: list[Wan] = getattr(args, "opened", [])  # by an earlier sample of --cases
    if opened:
        return opened[0]
    files = files or layout(args)
    chosen = plan(args, files)
    ops = device.operations(opening.open_device(args.device), args.kernels)
    wan = opening.load(
        files,
        preset=chosen,
        device=args.device,
        dtype=None if args.model_dtype is None else getattr(torch, args.model_dtype),
        residency=args.residency,
        frames=chosen.frames,
        size=None if image is None else (image.shape[-2], image.shape[-1]),
        tile=args.tile,
        tell=tell,
        ops=ops,
        decode_dtype=torch.bfloat16 if args.decode_dtype == "bfloat16" else torch.float32,
        decode_tf32=None if args.decode_dtype is None else args.decode_dtype == "tf32",
        compile=args.compile,
    ).with_preset(**_changes(args))
    for line in (
        *wan.notes,
        *(map(str, wan.loras) if args.lora else ()),
    ):  # one of the model's own is no news
        print(f"minicos: {line}", file=sys.stderr)
    opened.append(wan)
    return wan


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of the preset that options change."""
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
    if isinstance(area, tuple):  # not for `vbvr` and `capture`, which fit each picture
        height, width = area
        given |= {"area": height * width, "size": (height, width)}
    return {name: value for name, value in given.items() if value is not None}


def condition(
    args: argparse.Namespace, wan: "Wan", images: "dict[str, Tensor | None]", samples: int = 1
) -> "WanCondition":
    """The condition of the options, for one sample or several."""
    return wan.condition([args.prompt] * samples, images["image"], last=images["last"])
