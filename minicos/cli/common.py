"""Options that several verbs share, and what they are turned into."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minicos.errors import MinicosError

if TYPE_CHECKING:
    from torch import Tensor

    from minicos.analysis.observe import Analysis
    from minicos.condition import Condition
    from minicos.config import Preset
    from minicos.ops import Ops
    from minicos.pipeline import Wan
    from minicos.runs import Run
    from minicos.weights.layouts import Layout


SOLVERS = ("euler", "unipc", "dpmpp")  # as in `minicos.schedule`, which imports torch


class Parser(argparse.ArgumentParser):
    """Mistakes in one sentence, as everywhere in minicos."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minicos: {message}. Try `{self.prog} --help`.\n")


def add_parser(verbs, name: str, help: str, examples: str, run: Callable) -> Parser:
    """A verb with one line of help and examples below its options."""
    parser = verbs.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of step numbers such as 0,5,19"
        ) from None


def within(at: tuple[int, ...] | None, steps: int, option: str = "--at ") -> tuple[int, ...] | None:
    """The steps of an option, which the run must have."""
    if at and (at[0] < 0 or at[-1] >= steps):
        raise MinicosError(f"{option}{','.join(map(str, at))}: the run has steps 0 to {steps - 1}.")
    return at


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return value


def positive_number(text: str) -> float:
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def share(text: str) -> float:
    if not 0 < (value := number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1, e.g. 0.9")
    return value


def guidance(text: str) -> dict[str, float]:
    """The guidance of each expert, from "5" or "high=4,low=3"."""
    if "=" not in text:
        return dict.fromkeys(("high", "low"), number(text))
    pairs = [part.partition("=") for part in text.split(",")]
    if sorted(name for name, _, _ in pairs) != ["high", "low"]:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not guidance for both experts: a number, or e.g. high=4,low=3"
        )
    return {name: number(value) for name, _, value in pairs}


def part(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=FILE, e.g. vae=Wan2.1_VAE.safetensors"
        )
    return name, file


def lora(text: str) -> tuple[str, tuple[str, float]]:
    expert, file = part(text)
    path, _, strength = file.rpartition(":")
    if not path or not re.fullmatch(
        r"-?\d*\.?\d+(e-?\d+)?", strength
    ):  # C:\a.safetensors has a colon, too
        return expert, (file, 1.0)
    return expert, (path, float(strength))


MODEL_HELP = """\
--model takes
  tiny                        the model inside the package (default)
  a folder                    in the official layout (high_noise_model/ ...) or that of diffusers (transformer/ ...)
  a file                      of ComfyUI or DiffSynth, e.g. --model wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors
                                --part low=wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors --part vae=wan_2.1_vae.safetensors
                                --part text=umt5_xxl_fp8_e4m3fn_scaled.safetensors --part tokenizer=tokenizer.json
  a repository's id           on the Hub, e.g. --model Wan-AI/Wan2.2-I2V-A14B: from the local cache, or fetched with --download
LoRA files go to one expert each (a model of one network is its own high one), with a strength if not 1:
  --model Wan2.2-I2V-A14B --variant VBVR-Wan2.2 --lora high=high_noise_lora.safetensors low=low_noise_lora.safetensors:0.5
"""


def add_model_options(parser: argparse.ArgumentParser, out: str, seed: int = 0) -> None:
    """Model, way of sampling, output."""
    parser.epilog = f"{parser.epilog}\n{MODEL_HELP}"
    parser.add_argument(
        "--model",
        default="tiny",
        help="'tiny', a folder, a file or a Hub id, see below (default: tiny)",
    )
    parser.add_argument(
        "--variant",
        help="what it is where its files cannot tell, e.g. VBVR-Wan2.2 or Wan2.1-T2V-14B",
    )
    parser.add_argument(
        "--part",
        type=part,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="files that lie elsewhere; NAME is high, low, vae, text, tokenizer or clip",
    )
    parser.add_argument(
        "--lora",
        type=lora,
        nargs="+",
        action="extend",
        default=[],
        metavar="EXPERT=FILE[:STRENGTH]",
        help="merge a LoRA into an expert, high or low",
    )
    parser.add_argument(
        "--download", action="store_true", help="fetch a Hub id, after telling its size"
    )
    parser.add_argument(
        "--preset",
        help="way of sampling, e.g. official (the authors' code) or cos (the paper's tools)",
    )
    sampling = parser.add_argument_group("sampling", "the preset's, where not given")
    sampling.add_argument("--steps", type=positive, help="denoising steps")
    sampling.add_argument(
        "--solver", choices=SOLVERS, help="how to go from one noise level to the next"
    )
    sampling.add_argument(
        "--shift",
        type=positive_number,
        metavar="S",
        help="how far the levels lie towards noise; 1 spaces them evenly",
    )
    sampling.add_argument(
        "--guidance",
        type=guidance,
        metavar="G",
        help="strength of the prompt: 5, or high=4,low=3; 1 skips the second pass",
    )
    sampling.add_argument(
        "--boundary",
        type=share,
        metavar="B",
        help="timesteps from 1000 B on go to the high-noise expert, e.g. 0.9",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=seed,
        help=f"of the noise; the same on every machine (default: {seed})",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)"
    )
    parser.add_argument(
        "--residency",
        choices=("auto", "resident", "swap", "stream"),
        default="auto",
        help="weights all on the device, one network at a time, or block by block (default: the first that fits)",
    )
    parser.add_argument(
        "--kernels", action="store_true", help="compute with the Triton kernels; needs a CUDA card"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks: worth it for long runs, since the first step takes minutes; needs a C++ compiler",
    )
    parser.add_argument(
        "--tile",
        type=positive,
        help="decode large frames in tiles of so many pixels a side, e.g. 256: less memory (default: whole)",
    )
    parser.add_argument(
        "--decode-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="bfloat16 decodes within half the memory; pictures differ by a level or so (default: float32)",
    )
    parser.add_argument(
        "--noise-device",
        choices=("cpu", "cuda"),
        help="cpu: noise that is the same on every machine; cuda: that of the official code (default: cpu)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(out),
        help=f"run folder; run again to continue (default: {out})",
    )


def add_condition_options(parser: argparse.ArgumentParser) -> None:
    """What to make a video of."""
    parser.add_argument("--prompt", required=True, help="what should happen")
    parser.add_argument(
        "--image", type=Path, help="first frame (png, jpg), for image-to-video models"
    )
    parser.add_argument(
        "--last", type=Path, help="last frame, for models that lead from one frame to another"
    )
    parser.add_argument(
        "--negative", dest="negative_prompt", help="what should not; used where guidance is not 1"
    )
    parser.add_argument(
        "--frames", type=positive, help="video frames, 4n + 1 (default: the preset's)"
    )


def images(args: argparse.Namespace) -> "dict[str, Tensor | None]":
    """First and last frame of the options. Read before the model, so that a wrong path is told at once."""
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
    """The way of sampling that the options name. Whatever can be refused without reading a weight is refused here."""
    from minicos.config import preset

    if not (getattr(args, "prompt", None) or "-").strip():
        raise MinicosError(
            "the prompt is empty; say what should happen, e.g. --prompt 'solve the maze'"
        )
    above = next(folder for folder in (args.out, *args.out.absolute().parents) if folder.exists())
    if not above.is_dir():
        raise MinicosError(f"{above} is a file, not a folder. Choose another --out.")
    if not os.access(above, os.W_OK):
        raise MinicosError(f"cannot write into {above}. Choose another --out.")
    variant = files.variant
    chosen = replace(preset(variant, args.preset), **_changes(args))
    if args.boundary is not None and len(files.experts) == 1:
        raise MinicosError(f"--boundary is between two experts, and {variant} has one here.")
    if "last" in args:
        if args.image is None and chosen.image in ("channels", "first and last"):
            raise MinicosError(f"{variant} makes a video from a first frame: give an image")
        if args.image is not None and chosen.image == "none":
            raise MinicosError(f"{variant} makes a video from text alone and takes no image")
        if (args.last is not None) != (chosen.image == "first and last"):
            what = (
                "needs a last frame, too: give one" if args.last is None else "takes no last frame"
            )
            raise MinicosError(f"{variant} {what}")
    return chosen


LARGE = (
    10**9
)  # bytes of weights from which the plan is printed: the embedded model starts without ado


def load(
    args: argparse.Namespace, files: "Layout | None" = None, image: "Tensor | None" = None
) -> "Wan":
    """The model of the options, under their preset, with room for a video from this first frame.

    Tells what was merged into it and what else its files could be and, of a large one, the plan: which weights go where.
    """
    import torch

    from minicos import attention, cost, pipeline
    from minicos.plan import Plan, describe

    def tell(plan: Plan) -> None:
        if plan.weights >= LARGE:
            print(describe(plan, cost.throughput(plan.device, plan.dtype)), file=sys.stderr)
            print(
                f"  attention {attention.describe(attention.with_best(ops, plan.device))}",
                file=sys.stderr,
            )

    files = files or layout(args)
    chosen, ops = plan(args, files), _ops(args)
    wan = pipeline.load(
        files,
        preset=args.preset,
        device=args.device,
        residency=args.residency,
        frames=chosen.frames,
        size=None if image is None else tuple(image.shape[-2:]),
        tile=args.tile,
        tell=tell,
        ops=ops,
        decode_dtype=getattr(torch, args.decode_dtype),
        compile=args.compile,
    ).with_preset(**_changes(args))
    for line in (
        *wan.notes,
        *(map(str, wan.loras) if args.lora else ()),
    ):  # one of the model's own is no news
        print(f"minicos: {line}", file=sys.stderr)
    return wan


def _ops(args: argparse.Namespace) -> "Ops":
    """The operations of the options."""
    import torch

    from minicos.ops import REFERENCE

    if not args.kernels:
        return REFERENCE
    if not torch.cuda.is_available() or not (args.device or "cuda").startswith("cuda"):
        raise MinicosError(
            "--kernels needs a CUDA card: the Triton kernels run nowhere else. Leave it out."
        )
    try:
        return REFERENCE.with_kernels()
    except ImportError as error:
        raise MinicosError(
            f"--kernels needs Triton ({error}). Install it, or leave --kernels out."
        ) from error


def _changes(args: argparse.Namespace) -> dict[str, object]:
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
    )
    given = {name: getattr(args, name, None) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def condition(
    args: argparse.Namespace, wan: "Wan", images: "dict[str, Tensor | None]", samples: int = 1
) -> "Condition":
    """The condition of the options, for one sample or several; warns about words that the model's tokenizer does not know."""
    tell_unknown(wan, args.prompt)
    return wan.condition([args.prompt] * samples, **images)


def tell_unknown(wan: "Wan", *prompts: str) -> None:
    """Name the words that the model's tokenizer does not know: it reads <unk> in their place."""
    if words := dict.fromkeys(
        word for prompt in prompts for word in wan.tokenizer.unknown_words(prompt)
    ):
        print(f"minicos: the model does not know the words {', '.join(words)}", file=sys.stderr)


def subject(args: argparse.Namespace, images: "dict[str, Tensor | None]") -> dict[str, str | None]:
    """What a run is about, among its settings: an image counts by its pixels, not by its name."""
    from hashlib import sha256

    hashes = {
        k: sha256(x.numpy().tobytes()).hexdigest()[:16] for k, x in images.items() if x is not None
    }
    return {"prompt": args.prompt, "image": None, **hashes}


def _decoding(wan: "Wan") -> dict[str, object]:
    """How latents become pixels, where not as by default: whole frames, in float32."""
    import torch

    dtype = {"decode_dtype": str(wan.decode_dtype)} if wan.decode_dtype != torch.float32 else {}
    return dtype | ({"tile": wan.tile} if wan.tile else {})


def open_run(
    args: argparse.Namespace, wan: "Wan", analyses: Sequence["Analysis"], **settings: object
) -> "Run":
    """The run folder of the options: entered again if it holds the same run, refused if it holds another."""
    from minicos.attention import describe
    from minicos.config import PRESETS
    from minicos.runs import Run

    model = {
        "model": wan.variant,
        "weights": wan.weights,
        **asdict(wan.preset),
        "dtype": str(wan.dtype),
        "seed": args.seed,
        **_decoding(wan),
    }
    facts = {
        "command": args.command,
        "model_path": str(args.model),
        "device": str(wan.device),
        "preset": args.preset or next(iter(PRESETS[wan.variant])),
        "residency": wan.residency.plan.residency,
        "attention": describe(wan.ops),
        "kernels": args.kernels,
        "compiled": args.compile,
        "loras": [asdict(one) for one in wan.loras],
    }
    return Run.open(args.out, {**model, **settings, "analyses": [a.name for a in analyses]}, facts)
