"""`minicos capture`: activations of a running model as files for probes and autoencoders."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicos.cli import each, opening, options, run_folder, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.activations import Wanted
    from minicos.peers.folder import PeerFolder
    from minicos.vbvr.cases import Sample
    from minicos.vbvr.generate import Making
    from minicos.video_model import VideoModel
    from minicos.weights.layouts import Layout

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
    own = parser.group("what is written")
    own.add_argument(
        "--cases",
        type=values.path,
        required=True,
        help="a folder of pictures with prompts, e.g. of `minicos puzzles`",
    )
    own.add_argument("--limit", type=values.positive, metavar="N", help="only the first N of them")
    own.add_argument(
        "--points",
        nargs="+",
        required=True,
        metavar="POINT",
        help='hook points, e.g. "blocks.*" (see `minicos points`)',
    )
    own.add_argument(
        "--at", type=values.indices, default=(0,), help="steps, e.g. 0,5,19 (default: 0)"
    )
    own.add_argument(
        "--branches",
        nargs="+",
        default=["cond"],
        metavar="BRANCH",
        help="passes of the model: cond and, under guidance, uncond (default: cond)",
    )
    own.add_argument(
        "--reduce",
        choices=("whole", "frames", "mean", "norm"),
        default="whole",
        help="what to keep of the tokens (default: whole)",
    )
    own.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="bfloat16",
        help="on disk (default: bfloat16)",
    )
    own.add_argument(
        "--area",
        type=values.area,
        metavar="WxH",
        help="most pixels in a frame, e.g. 832x480 (default: the preset's, or the picture's own)",
    )
    own.add_argument(
        "--frames", type=values.frames, help="video frames, 4n + 1 (default: the preset's)"
    )
    own.add_argument(
        "--dry-run", action="store_true", help="say how many bytes it would write, and stop"
    )
    options.add_model_options(parser, out="runs/capture", dtype="--model-dtype")
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> int:
    from minicos import activations
    from minicos.activations import Wanted
    from minicos.runs import Progress
    from minicos.vbvr import cases, work
    from minicos.vbvr.generate import fitting

    wanted = Wanted(tuple(args.points), args.at, tuple(args.branches), args.reduce, args.dtype)
    files = opening.layout_or_peer(args)
    preset = opening.plan(args, files)
    opening.within(args.at, preset.steps)
    for name in set(args.branches) - set(preset.branches):
        there = " and ".join(preset.branches)
        raise MinicosError(f"--branches {name}: this run has the passes {there}.")
    sizes = each.making(files, preset, args.area)
    found = fitting(cases.read(args.cases, truth=False), [sizes])
    for name, why in found.problems.items():
        print(f"minicos: {name}: {why}", file=sys.stderr)
    if not found.samples:
        raise MinicosError(f"{found.root} holds no sample that can be used.")
    samples = found.samples[: args.limit]
    shapes, width = _network(files)
    wanted.check(shapes)
    grids = [_tokens(sizes, sample) for sample in samples]
    size = activations.megabytes(wanted, shapes, grids, width)
    print(f"{len(samples)} samples, {size:.1f} MB", file=sys.stderr)
    if args.dry_run:
        return 0
    _room(args.out, size)
    wan = opening.load(args, files).with_preset(area=None)
    settings = {
        name: getattr(args, name)
        for name in ("points", "at", "branches", "reduce", "dtype", "area")
    }
    folder = run_folder.open_run(
        args, wan, [], **settings, cases=[sample.name for sample in samples]
    )

    def make(sample: "Sample") -> None:
        number = samples.index(sample)
        shard = activations.shard(Path(), number).as_posix()
        if not folder.has(shard):
            _capture(wan, wanted, sizes, sample, args.seed + number, folder.folder, number)
            folder.record(shard)
        folder.log({"what": "capture", "sample": sample.name, "file": shard})
        bar.tick()

    with Progress(len(samples), "capture") as bar:
        bar.begin()
        failed = work.attempt(samples, make, retries=0)
    for sample, why in failed.items():
        print(f"minicos: failed: {sample.name}: {why}", file=sys.stderr)
    activations.index(folder.folder, wanted, folder.settings)
    print(folder.path("index.json"))
    return int(bool(found.problems or failed))


def _network(files: "Layout | PeerFolder") -> tuple[dict[str, str], int]:
    """Hook points of a model with their shapes, and the width of its stream; no weight is read."""
    from minicos.peers import opening as peers
    from minicos.peers.folder import PeerFolder
    from minicos.points import points

    if isinstance(files, PeerFolder):
        return peers.points(files), files.width
    dit = files.experts["high"].config
    return points(dit), dit.dim


def _tokens(sizes: "Making", sample: "Sample") -> tuple[int, int, int]:
    """The token grid (f, h, w) of a sample."""
    height, width = sizes.fit(sample).made
    frames = (sizes.preset.frames - 1) // sizes.stride + 1
    return frames, height // sizes.step, width // sizes.step


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
    wan: "VideoModel",
    wanted: "Wanted",
    sizes: "Making",
    sample: "Sample",
    seed: int,
    out: Path,
    number: int,
) -> None:
    """Run one sample up to its last captured step, and write its shard."""
    from minicos import activations
    from minicos.vbvr.cases import load_picture
    from minicos.vbvr.conditions import image_batch

    picture = sizes.fit(sample).forward(load_picture(sample))
    image = image_batch([picture]) if wan.preset.takes_image else None
    wan = wan.with_preset(size=picture.shape[:2])
    condition = wan.condition(sample.prompt, image)
    about = {"sample": sample.name, "prompt": sample.prompt}
    activations.capture(wan, condition, wanted, out, number, seed=seed, about=about)
