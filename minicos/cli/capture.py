"""`minicos capture`: activations of a running model as files for probes and autoencoders."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicos.cli import opening, options, run_folder, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.activations import Wanted
    from minicos.vbvr.cases import Sample
    from minicos.vbvr.generate import Making
    from minicos.wan import Wan

HELP = "Write hook points of a running model to files that probes and autoencoders map into memory."
EXAMPLES = """\
  # the mean of every latent frame, after each block
  minicos capture --cases puzzles --points "blocks.*" --at 0,10 --reduce frames
  # all tokens, of both guidance passes
  minicos capture --cases puzzles --points blocks.6 --branches cond uncond
  # how many bytes would it be?
  minicos capture --cases VBVR-Bench --model Video-Reason/VBVR-Wan2.2 --points blocks.20 --dry-run
writes OUT/shards/NNNNN.safetensors (one for each sample) and OUT/index.json; read them with minicos.activations.Activations:
  a = Activations("runs/capture"); x, where = a.rows("blocks.6", step=0)
"""


def add(verbs: Any) -> None:
    parser = options.add_parser(verbs, "capture", HELP, EXAMPLES, run)
    parser.add_argument(
        "--cases",
        type=values.path,
        required=True,
        help="a folder of pictures with prompts, e.g. of `minicos puzzles`",
    )
    parser.add_argument(
        "--limit", type=values.positive, metavar="N", help="only the first N of them"
    )
    parser.add_argument(
        "--points",
        nargs="+",
        required=True,
        metavar="POINT",
        help='hook points, e.g. "blocks.*" (see `minicos points`)',
    )
    parser.add_argument(
        "--at", type=values.indices, default=(0,), help="steps, e.g. 0,5,19 (default: 0)"
    )
    parser.add_argument(
        "--branches",
        nargs="+",
        default=["cond"],
        help="passes of the model: cond and, under guidance, uncond (default: cond)",
    )
    parser.add_argument(
        "--reduce",
        choices=("whole", "frames", "mean", "norm"),
        default="whole",
        help="what to keep of the tokens (default: whole)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="on disk (default: bfloat16)",
    )
    parser.add_argument(
        "--area",
        type=values.area,
        metavar="WxH",
        help="most pixels in a frame, e.g. 832x480 (default: the preset's, or the picture's own)",
    )
    parser.add_argument(
        "--frames", type=values.frames, help="video frames, 4n + 1 (default: the preset's)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say how many bytes it would write, and stop"
    )
    options.add_model_options(parser, out="runs/capture", dtype="--model-dtype")
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> int:
    from minicos import activations
    from minicos.activations import Wanted
    from minicos.points import points
    from minicos.runs import progress
    from minicos.vbvr import cases
    from minicos.vbvr.generate import Making

    wanted = Wanted(tuple(args.points), args.at, tuple(args.branches), args.reduce, args.dtype)
    found = cases.read(args.cases, truth=False)
    for name, why in found.problems.items():
        print(f"minicos: {name}: {why}", file=sys.stderr)
    samples = found.samples[: args.limit]
    files = opening.layout(args)
    preset, dit, vae = opening.plan(args, files), files.experts["high"].config, files.vae.config
    opening.within(args.at, preset.steps)
    for name in set(args.branches) - set(preset.branches):
        there = " and ".join(preset.branches)
        raise MinicosError(f"--branches {name}: this run has the passes {there}.")
    making = Making.of(files, preset, args.area)
    grids = [_grid(making, sample, vae.stride, dit.patch_size) for sample in samples]
    wanted.check(points(dit))
    size = activations.megabytes(wanted, points(dit), grids, dit.dim)
    print(f"{len(samples)} samples, {size:.1f} MB", file=sys.stderr)
    if args.dry_run:
        return 0
    _room(args.out, size)
    wan = opening.load_wan(args, files).with_preset(area=None)
    settings = {
        name: getattr(args, name)
        for name in ("points", "at", "branches", "reduce", "dtype", "area")
    }
    folder = run_folder.open_run(
        args, wan, [], **settings, cases=[sample.name for sample in samples]
    )
    for number, sample in enumerate(progress(samples, len(samples), "capture")):
        shard = activations.shard(Path(), number).as_posix()
        if not folder.has(shard):
            _capture(wan, wanted, making, sample, args.seed + number, folder.folder, number)
            folder.record(shard)
    activations.index(folder.folder, wanted, folder.settings)
    print(folder.path("index.json"))
    return int(bool(found.problems))


def _grid(
    making: "Making", sample: "Sample", stride: tuple[int, int, int], patch: tuple[int, int, int]
) -> tuple[int, int, int]:
    """The token grid (f, h, w) of a sample."""
    height, width = making.fit(sample).made
    frames = (making.preset.frames - 1) // stride[0] + 1
    return frames // patch[0], height // stride[1] // patch[1], width // stride[2] // patch[2]


def _room(out: Path, megabytes: float) -> None:
    """Raise MinicosError if the disk has less room than that."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free / 1e6
    if megabytes > 0.95 * free:
        raise MinicosError(
            f"{megabytes:.0f} MB will not fit on the disk of {there}, which has {free:.0f} MB left."
            " Take fewer --points or --at, or --reduce."
        )


def _capture(
    wan: "Wan",
    wanted: "Wanted",
    making: "Making",
    sample: "Sample",
    seed: int,
    out: Path,
    number: int,
) -> None:
    """Run one sample up to its last captured step, and write its shard."""
    from torch import Tensor

    from minicos import activations
    from minicos.vbvr.cases import load_picture
    from minicos.vbvr.conditions import image_batch

    picture = making.fit(sample).forward(load_picture(sample))
    image = image_batch([picture]) if wan.preset.takes_image else None
    size = None if image is not None else tuple(picture.shape[:2])
    condition = wan.condition(sample.prompt, image, size=size)
    kept: dict[str, Tensor] = {}
    grids: list[tuple[int, int, int]] = []
    for step in wan.sample(
        condition, noise=wan.noise(condition, seed), hooks=wanted.hooks(kept, grids)
    ):
        if step.index == max(wanted.steps):
            break
    about = {"sample": sample.name, "prompt": sample.prompt, "seed": seed, "grid": grids[0]}
    activations.write(out, number, kept, about)
