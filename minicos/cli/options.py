"""Options that several verbs share: the parser, the model's, the condition's."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from minicos.cli import each, values

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


def add_jsonl(parser: argparse.ArgumentParser) -> None:
    """--jsonl, for every verb whose run folder holds numbers."""
    parser.add_argument(
        "--jsonl",
        type=Path,
        metavar="FILE",
        help="add every number to this file as it is found, a JSON object a line (pandas, W&B)",
    )


MODEL_HELP = """\
--model takes
  tiny                        the model inside the package (default)
  a folder                    in the official layout (high_noise_model/ ...) or that of diffusers (transformer/ ...)
  a file                      of ComfyUI or DiffSynth, e.g. --model wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors
                                --part low=wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors --part vae=wan_2.1_vae.safetensors
                                --part text=umt5_xxl_fp8_e4m3fn_scaled.safetensors --part tokenizer=tokenizer.json
  LTX-2, CogVideoX, HunyuanVideo: their folder of diffusers; see weights.md
  a repository's id           on the Hub, e.g. --model Wan-AI/Wan2.2-I2V-A14B: from the local cache, or fetched with --download
LoRA files go to one expert each (a model of one network is its own high one), with a strength if not 1:
  --model Wan2.2-I2V-A14B --variant VBVR-Wan2.2 --lora high=high_noise_lora.safetensors low=low_noise_lora.safetensors:0.5
"""


def add_model_options(
    parser: argparse.ArgumentParser, out: str, seed: int = 0, dtype: str = "--dtype"
) -> None:
    """Model, way of sampling, output. `dtype` is the name of the option of that sense."""
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
        type=values.part,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="files that lie elsewhere; NAME is high, low, vae, text, tokenizer or clip",
    )
    parser.add_argument(
        "--lora",
        type=values.lora,
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
        help="way of sampling, e.g. official (the authors' code), cos (the paper's tools) or diffusers (as its folder states)",
    )
    sampling = parser.add_argument_group("sampling", "the preset's, where not given")
    sampling.add_argument("--steps", type=values.steps, help="denoising steps")
    sampling.add_argument(
        "--solver", choices=SOLVERS, help="how to go from one noise level to the next"
    )
    sampling.add_argument(
        "--shift",
        type=values.positive_number,
        metavar="S",
        help="how far the levels lie towards noise; 1 spaces them evenly",
    )
    sampling.add_argument(
        "--guidance",
        type=values.guidance,
        metavar="G",
        help="strength of the prompt: 5, or high=4,low=3; 1 skips the second pass",
    )
    sampling.add_argument(
        "--boundary",
        type=values.share,
        metavar="B",
        help="timesteps from 1000 B on go to the high-noise expert, e.g. 0.9",
    )
    sampling.add_argument(
        "--loop-dtype",
        choices=("float32", "bfloat16"),
        help="of latent, guidance and timestep; bfloat16, under Euler, as the paper's tools",
    )
    parser.add_argument(
        "--seed",
        type=values.seed,
        default=seed,
        help=f"of the noise; the same on every machine (default: {seed})",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)"
    )
    parser.add_argument(
        dtype,
        dest="model_dtype",
        choices=("float32", "bfloat16"),
        help="of the matrices (default: bfloat16 on a card, float32 on a CPU and for tiny)",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=values.side,
            metavar="PIXELS",
            help=f"{side} of a frame; with an image, so many pixels in its aspect ratio",
        )
    parser.add_argument(
        "--residency",
        choices=("auto", "resident", "swap", "stream"),
        default="auto",
        help="weights all on the device, one network at a time, or block by block (default: the first that fits)",
    )
    parser.add_argument(
        "--kernels",
        action=argparse.BooleanOptionalAction,
        help="compute with the Triton kernels (default: where they work, on a CUDA card)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks: worth it for long runs, since the first step takes minutes; needs a C++ compiler",
    )
    parser.add_argument(
        "--tile",
        type=values.side,
        help="decode large frames in tiles of so many pixels a side, e.g. 256: less memory (default: whole)",
    )
    parser.add_argument(
        "--decode-dtype",
        choices=("float32", "tf32", "bfloat16"),
        help="tf32: convolutions of a card with 10 bits; bfloat16: half the memory, and pictures "
        "differ by a level or so (default: tf32 on a card, float32 on a CPU)",
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


def add_condition_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """What to make a video of."""
    prompt = parser.add_mutually_exclusive_group(required=required)
    prompt.add_argument("--prompt", help="what should happen")
    if required:  # elsewhere, no --prompt means puzzles
        prompt.add_argument(
            "--no-prompt",
            dest="prompt",
            action="store_const",
            const=None,
            help="nothing in particular: an unconditional control",
        )
    each.add(parser, prompt)
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
        "--frames", type=values.frames, help="video frames, 4n + 1 (default: the preset's)"
    )
    parser.add_argument(
        "--area",
        type=values.size,
        metavar="WxH",
        help="size of a frame, e.g. 1280x720; with an image, so many pixels in its aspect ratio (default: the preset's)",
    )
