"""Options that several verbs share: the parser, and the options of model and condition."""

import argparse
import os
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from minicos.analysis.reading import READINGS
from minicos.cli import each, values, watched

VIDEO, GENERAL = "the video", "general options"  # headings of --help
SOLVERS = ("euler", "unipc", "dpmpp")  # as in `minicos.schedule`, which imports torch


class Parser(argparse.ArgumentParser):
    """A parser with one-sentence errors, whose --help omits the options that all verbs share;
    --help-all includes them.
    """

    folded: tuple[argparse.Action, ...] = ()  # omitted by --help
    more = ""  # text that --help-all appends

    def group(self, title: str) -> "argparse._ArgumentGroup":
        """The group of options with this heading, added if there is none."""
        found = (group for group in self._action_groups if group.title == title)
        return next(found, None) or self.add_argument_group(title)

    def format_help(self) -> str:
        helps = [action.help for action in self.folded]
        for action in self.folded:
            action.help = argparse.SUPPRESS
        try:
            return self._formatted()
        finally:
            for action, help in zip(self.folded, helps, strict=True):
                action.help = help

    def format_whole_help(self) -> str:
        """The help with every option."""
        epilog, self.epilog = self.epilog, f"{self.epilog}\n{self.more}"
        try:
            return self._formatted()
        finally:
            self.epilog = epilog

    def _formatted(self) -> str:
        """The help, with the options of a verb before those of all verbs."""
        groups, shared, usage = self._action_groups, self._optionals, self.usage
        self._action_groups = [*(group for group in groups if group is not shared), shared]
        own = any(group._group_actions for group in groups if group is not shared)
        shared.title = GENERAL if own else "options"
        self.usage = " ".join(["%(prog)s", "[options]", *map(_word, self._needed())])
        try:
            return super().format_help()
        finally:
            self._action_groups, self.usage = groups, usage

    def _needed(self) -> list[argparse.Action]:
        """What a command must have; not one of several that exclude each other."""
        return [action for action in self._actions if action.required]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minicos: {message}. Try `{self.prog} --help`.\n")


def _word(action: argparse.Action) -> str:
    """An argument that must be given, in a usage line."""
    name = action.metavar or action.dest.upper()
    return " ".join([*action.option_strings[:1], str(name)])


class HelpAll(argparse.Action):
    """--help-all."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(parser.format_whole_help(), end="")
        parser.exit()


def add_parser(verbs, name: str, help: str, examples: str, run: Callable) -> Parser:
    """Add a verb: what it shows and how to read it, with examples below its options."""
    reading = READINGS.get(name)
    about = help if reading is None else f"{reading.shows} {reading.read}"
    parser = verbs.add_parser(
        name,
        help=help,
        description=textwrap.fill(about, 100),
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_jsonl(parser: argparse.ArgumentParser) -> None:
    """Add --jsonl, for verbs whose run folder holds numbers."""
    parser.add_argument(
        "--jsonl",
        type=values.path,
        metavar="FILE",
        help="append every number to this file as it is found, one JSON object per line (pandas, "
        "W&B)",
    )


MODEL_HELP = """\
--model takes
  tiny                        the model inside the package (default)
  a folder                    in the official layout (high_noise_model/ ...) or that of diffusers (transformer/ ...)
  a file                      of ComfyUI or DiffSynth, e.g. --model wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors
                                --part low=wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors --part vae=wan_2.1_vae.safetensors
                                --part text=umt5_xxl_fp8_e4m3fn_scaled.safetensors --part tokenizer=tokenizer.json
  LTX-2, CogVideoX, HunyuanVideo: their diffusers folder; see weights.md
  a repository's id           on the Hub, e.g. --model Wan-AI/Wan2.2-I2V-A14B: from the local cache, or fetched with --download
Each LoRA file belongs to one expert (in a model with one network: high); append a strength if it is not 1:
  --model Wan2.2-I2V-A14B --variant VBVR-Wan2.2 --lora high=high_noise_lora.safetensors low=low_noise_lora.safetensors:0.5
"""


def add_model_options(parser: Parser, out: str, seed: int = 0, dtype: str = "--dtype") -> None:
    """Options of model, sampling and output. `dtype` is the name of the option for the dtype."""
    parser.add_argument(
        "--model",
        type=os.path.expanduser,
        default="tiny",
        help="'tiny', a folder, a file or a Hub id, see --help-all (default: tiny)",
    )
    parser.add_argument(
        "--out",
        type=values.path,
        default=Path(out),
        help=f"run folder; run again to continue (default: {out})",
    )
    parser.add_argument(
        "--help-all",
        action=HelpAll,
        nargs=0,
        help="also the options that all verbs share: steps, seed, guidance, device, LoRA ...",
    )
    own = set(parser._actions)
    _add_shared_options(parser, seed, dtype)
    parser.folded = tuple(action for action in parser._actions if action not in own)
    parser.more = MODEL_HELP


def _add_shared_options(parser: argparse.ArgumentParser, seed: int, dtype: str) -> None:
    """The options that --help omits."""
    parser.add_argument(
        "--variant",
        type=values.name,
        help="the model's name if its files do not identify it, e.g. VBVR-Wan2.2 or Wan2.1-T2V-14B",
    )
    parser.add_argument(
        "--part",
        type=values.part,
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE",
        help="files stored elsewhere; NAME is high, low, vae, text, tokenizer or clip",
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
        "--download", action="store_true", help="fetch a Hub id, after printing its size"
    )
    parser.add_argument(
        "--preset",
        type=values.name,
        help="way of sampling, e.g. official (the authors' code), cos (the paper's tools) or "
        "diffusers (as the folder's configuration says)",
    )
    sampling = parser.add_argument_group("sampling (default: the preset's)")
    sampling.add_argument("--steps", type=values.steps, help="denoising steps")
    sampling.add_argument(
        "--solver", choices=SOLVERS, help="how to move from one noise level to the next"
    )
    sampling.add_argument(
        "--shift",
        type=values.shift,
        metavar="S",
        help="moves the noise levels towards noise; 1 spaces them evenly",
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
        help="timesteps from 1000 B upwards use the high-noise expert, e.g. 0.9",
    )
    sampling.add_argument(
        "--loop-dtype",
        choices=("float32", "bfloat16"),
        help="dtype of latent, guidance and timestep; bfloat16, with Euler, as in the paper's "
        "tools",
    )
    parser.add_argument(
        "--seed",
        type=values.seed,
        default=seed,
        help=f"seed of the noise; equal on every machine (default: {seed})",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)"
    )
    parser.add_argument(
        dtype,
        dest="model_dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the matrices (default: bfloat16 on a card, float32 on a CPU and for tiny)",
    )
    for side in ("height", "width"):
        parser.add_argument(
            f"--{side}",
            type=values.side,
            metavar="PIXELS",
            help=f"{side} of a frame; with an image, the same area in its aspect ratio",
        )
    parser.add_argument(
        "--residency",
        choices=("auto", "resident", "swap", "stream", "disk"),
        default="auto",
        help="keep weights all on the device, one network at a time, block by block from the "
        "host's memory, or block by block from their files (default: the first that fits)",
    )
    parser.add_argument(
        "--kernels",
        action=argparse.BooleanOptionalAction,
        help="use the Triton kernels (default: if they work, on a CUDA card)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the blocks; for long runs, since the first step takes minutes; needs a C++ "
        "compiler",
    )
    parser.add_argument(
        "--tile",
        type=values.side,
        help="decode large frames in tiles with this side in pixels, e.g. 256, to save memory "
        "(default: whole)",
    )
    parser.add_argument(
        "--decode-dtype",
        choices=("float32", "tf32", "bfloat16"),
        help="tf32: convolutions with 10 bits of mantissa on a card; bfloat16: half the memory, "
        "and "
        "pixels differ by about one level (default: tf32 on a card, float32 on a CPU)",
    )
    parser.add_argument(
        "--noise-device",
        choices=("cpu", "cuda"),
        help="cpu: noise is equal on every machine; cuda: as in the official code (default: cpu)",
    )


def add_condition_options(parser: Parser, required: bool = True, heading: str = VIDEO) -> None:
    """Options that say what to make a video of, under a heading."""
    group = parser.group(heading)
    prompt = group.add_mutually_exclusive_group(required=required)
    prompt.add_argument("--prompt", help="what should happen")
    if required:  # otherwise, no --prompt means puzzles
        prompt.add_argument(
            "--no-prompt",
            dest="prompt",
            action="store_const",
            const=None,
            help="no prompt: an unconditional control",
        )
        prompt.add_argument("--puzzle", metavar="KIND", help=watched.HELP)
    each.add(parser, prompt)
    group.add_argument(
        "--image", type=values.path, help="first frame (png, jpg), for image-to-video models"
    )
    group.add_argument("--last", type=values.path, help="last frame, for models that take one")
    add_sampling_of_own(group)
    group.add_argument(
        "--area",
        type=values.size,
        metavar="WxH",
        help="size of a frame, e.g. 1280x720; with an image, the same area in its aspect ratio "
        "(default: the preset's)",
    )
    parser.add_argument(
        "--preview",
        action="store_true",
        help="during the run, rewrite OUT/preview.png after every step: an approximate clean "
        "estimate",
    )


def add_sampling_of_own(group: "argparse._ActionsContainer", frames: bool = True) -> None:
    """Options that any video of the user's own may need."""
    group.add_argument(
        "--negative", dest="negative_prompt", help="negative prompt (ignored at guidance 1)"
    )
    if frames:
        group.add_argument(
            "--frames", type=values.frames, help="video frames, 4n + 1 (default: the preset's)"
        )
