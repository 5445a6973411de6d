"""Train the embedded model in stages; each stage resumes where it was killed.

    python -m minicos.tiny.train vae        --out FOLDER   the causal VAE
    python -m minicos.tiny.train latents    --out FOLDER   draw puzzles and encode them (several
                                                           processes: --part 0/2, --part 1/2)
    python -m minicos.tiny.train decoder    --out FOLDER   train the decoder further, also while
                                                           `dit` runs
    python -m minicos.tiny.train dit        --out FOLDER   text encoder and DiT, from the shards
                                                           that `latents` has written so far
    python -m minicos.tiny.train low        --out FOLDER   the low-noise expert, a LoRA on the DiT
    python -m minicos.tiny.train export     --out FOLDER   write everything in the official layout
                                                           to minicos/tiny/weights

Variants are LoRAs on the DiT, too; `export --variant NAME` writes one.

    python -m minicos.tiny.train one-answer   --out FOLDER   only one answer to each prompt (first:
                                                             latents --one-answer)
    python -m minicos.tiny.train distilled    --out FOLDER   four steps for twenty
    python -m minicos.tiny.train frame-causal --out FOLDER   no frame attends to a later one

With `--resume-from MODEL` a new FOLDER begins with the VAE, text encoder and high-noise expert of
MODEL ("tiny" or a folder) and with fresh optimisers; the stage `vae` is then not needed. FOLDER
should be outside the work tree. To end early, run `dit` again with `--steps` a few hundred above
the current step: the rate then falls to zero over these.
"""

import argparse
import re
from pathlib import Path

import tokenizers
import torch

from minicos.errors import MinicosError
from minicos.open import load
from minicos.runs import read_json, replace_file, write_json
from minicos.text import Tokenizer
from minicos.tiny import data, export, mixture, tokenizer, train_dit, train_vae

WEIGHTS = Path(__file__).parent / "weights"
VARIANTS = Path(__file__).parent / "variants"
TOKENIZER = WEIGHTS / "google" / "umt5-xxl" / "tokenizer.json"
STEPS = {
    "vae": 2400,
    "latents": 40,
    "decoder": 3000,
    "dit": 24000,
    "low": 700,
    "one-answer": 800,
    "distilled": 800,
    "frame-causal": 1500,
    "export": 0,
}


def main() -> None:
    parser = options()
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    try:
        run(args)
    except MinicosError as error:
        parser.error(str(error))


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minicos.tiny.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("stage", choices=STEPS)
    add("--out", type=Path, required=True, help="folder of checkpoints, logs and latents")
    add("--resume-from", metavar="MODEL", help="a model that a new --out begins with")
    add("--steps", type=int, help="training steps, or shards of each source for `latents`")
    add("--family", action="append", help="for `latents`: this family alone; may be repeated")
    add("--part", default="0/1", help="for `latents`: k/n, process k of n that share the shards")
    add("--one-answer", action="store_true", help="for `latents`: the first valid answer alone")
    add("--to", type=Path, default=WEIGHTS, help="for `export`: the folder to write")
    add("--variant", help="for `export`: write what `tiny:VARIANT` opens instead")
    add("--checkpoint", default="dit/averaged", help="for `export`, such as dit/averaged-4000")
    add(
        "--share",
        type=float,
        default=1.0,
        help="for `export`: of the trained decoder in the average with the one it began as",
    )
    add("--rate", type=float, default=1.0, help="for `dit`: factor on its learning rates")
    add(
        "--decay",
        type=float,
        default=1 / 3,
        help="for `dit`: share of the steps in which they fall to 0",
    )
    add("--seed", type=int, default=0)
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, default=1)
    add(
        "--compile", action="store_true", help="compile the networks: minutes at first, then faster"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """One stage. Raises MinicosError for arguments that do not fit."""
    words = prepare(args.out, args.resume_from)
    steps = args.steps or STEPS[args.stage]
    common = {"steps": steps, "seed": args.seed, "device": args.device}
    if args.stage == "vae":
        train_vae.train(args.out, compiled=args.compile, **common)
    elif args.stage == "decoder":
        train_vae.train_decoder(args.out, compiled=args.compile, **common)
    elif args.stage == "latents":
        write_latents(args, steps)
    elif args.stage == "dit":
        rates = {"rate": args.rate, "decay": args.decay}
        train_dit.train(args.out, words, compiled=args.compile, **rates, **common)
    elif args.stage in train_dit.LORAS:
        train_dit.train_lora(args.out, words, args.stage, **common)
    elif args.variant is None:
        export.export(args.out, args.to, words, args.checkpoint, args.share)
    elif re.fullmatch("[a-z0-9-]+", args.variant):
        export.export_variant(args.out, VARIANTS / args.variant, words, args.checkpoint)
    else:
        raise MinicosError(f"--variant {args.variant}: take a name of a-z, 0-9 and -")


def write_latents(args: argparse.Namespace, shards: int) -> None:
    table = mixture.sources()
    if args.family:
        trained = {source.family.name for source in table}
        if unknown := sorted(set(args.family) - trained):
            raise MinicosError(
                f"--family {unknown[0]} is not trained on: take one of {', '.join(sorted(trained))}"
            )
        table = tuple(source for source in table if source.family.name in args.family)
    part = re.fullmatch(r"(\d+)/(\d+)", args.part)
    if part is None or int(part[1]) >= int(part[2]):
        raise MinicosError(f"--part {args.part}: k/n, with k from 0 to n - 1")
    data.write(
        train_vae.finished(args.out).to(args.device),
        args.out / ("latents-one-answer" if args.one_answer else "latents"),
        table,
        seed=args.seed,
        shards=shards,
        part=int(part[1]),
        parts=int(part[2]),
        compiled=args.compile,
        one=args.one_answer,
    )


def prepare(folder: Path, model: str | None = None) -> Tokenizer:
    """The tokenizer of `folder`, which a first call may begin with the weights of a model. Words
    are only ever added to it.

    Raises MinicosError if the folder began otherwise.
    """
    path, record = folder / "tokenizer.json", folder / "begin.json"
    begun = path.exists()
    if begun and model and (began := read_json(record)["model"]) != model:
        raise MinicosError(f"{folder} began with {began}, not with {model}: take another --out")
    source = path if begun else TOKENIZER
    known = tokenizer.words(tokenizer.tokens(tokenizers.Tokenizer.from_file(str(source))))
    if not begun:
        write_json(record, {"model": model})
        if model:
            wan = load(model, device="cpu")
            train_vae.adopt(folder, wan.vae)
            words = Tokenizer(tokenizer.build(known), train_dit.CFG.text_len)
            train_dit.adopt(folder, wan, words)
    replace_file(path, lambda to: tokenizer.build(known).save(str(to)))
    return Tokenizer.load(path, train_dit.CFG.text_len)


if __name__ == "__main__":
    main()
