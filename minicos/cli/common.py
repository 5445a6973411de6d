"""Options that several verbs share, and what they are turned into."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minicos.condition import Condition
    from minicos.pipeline import Wan
    from minicos.runs import Run


def add_parser(verbs, name: str, help: str, examples: str, run) -> argparse.ArgumentParser:
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
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def add_model_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Model, way of sampling, output."""
    parser.add_argument(
        "--model", default="tiny", help="'tiny', the model inside the package, or a folder (default: tiny)"
    )
    parser.add_argument(
        "--preset", help="way of sampling, e.g. official (the authors' code) or cos (the paper's tools)"
    )
    parser.add_argument("--steps", type=positive, help="denoising steps (default: the preset's)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; the same on every machine (default: 0)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a CUDA card if there is one)")
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"run folder; run again to continue (default: {out})"
    )


def add_condition_options(parser: argparse.ArgumentParser) -> None:
    """What to make a video of."""
    parser.add_argument("--prompt", required=True, help="what should happen")
    parser.add_argument("--image", type=Path, help="first frame (png, jpg), for image-to-video models")
    parser.add_argument("--negative", help="negative prompt, used where guidance is not 1 (default: the preset's)")
    parser.add_argument("--frames", type=positive, help="video frames, 4n + 1 (default: the preset's)")


def load(args: argparse.Namespace) -> "Wan":
    """The model of the options, under their preset."""
    from minicos.pipeline import load

    wan = load(args.model, preset=args.preset, device=args.device)
    return wan.with_preset(steps=args.steps) if args.steps else wan


def condition(args: argparse.Namespace, wan: "Wan") -> "Condition":
    """The condition of the options; warns about words that the model's tokenizer does not know."""
    from minicos.media import load_image

    unknown = wan.tokenizer.unknown_words(args.prompt)
    if unknown:
        print(f"minicos: the model does not know the words {', '.join(unknown)}", file=sys.stderr)
    image = None if args.image is None else load_image(args.image)
    return wan.condition(args.prompt, image, negative=args.negative, frames=args.frames)


def open_run(args: argparse.Namespace, wan: "Wan", **settings: object) -> "Run":
    """The run folder of the options: entered again if it holds the same run, refused if it holds another."""
    from minicos.runs import Run

    shared = {"verb": args.verb, "model": str(args.model), "preset": asdict(wan.preset), "seed": args.seed}
    facts = {
        "variant": wan.variant, "device": str(wan.device), "dtype": str(next(wan.experts["high"].blocks.parameters()).dtype),
        "attention": "scaled_dot_product_attention", "command": sys.argv,
    }  # fmt: skip
    return Run.open(args.out, shared | settings, facts)


def condition_settings(args: argparse.Namespace) -> dict[str, object]:
    """What of the condition decides the result: an image counts by its content, not by its name."""
    from hashlib import sha256

    image = None if args.image is None else sha256(args.image.read_bytes()).hexdigest()
    return {"prompt": args.prompt, "negative": args.negative, "frames": args.frames, "image_sha256": image}
