"""Train the embedded model, stage by stage; each resumes where it was killed.

python -m minicos.tiny.train vae      --out FOLDER     the causal VAE
python -m minicos.tiny.train latents  --out FOLDER     draw puzzles and encode them (several at once: --part 0/2, --part 1/2)
python -m minicos.tiny.train decoder  --out FOLDER     more of the decoder alone, while the DiT already learns
python -m minicos.tiny.train dit      --out FOLDER     text encoder and DiT, from the shards that `latents` has written so far
python -m minicos.tiny.train low      --out FOLDER     the low-noise expert, a LoRA on the DiT
python -m minicos.tiny.train one-answer --out FOLDER   a variant: the DiT trained on, with one answer (first: latents --one-answer)
python -m minicos.tiny.train export   --out FOLDER     write it all in the official layout to minicos/tiny/weights

With `--resume-from MODEL` a new FOLDER begins with the VAE, text encoder and high-noise expert of MODEL ("tiny" or a folder) and
with fresh optimisers: the stage `vae` is then not needed. FOLDER should lie outside the work tree. To stop early, run `dit` again
with `--steps` a few hundred above the step reached: the rate then falls to zero over these.
"""

import argparse
from pathlib import Path

import tokenizers
import torch

from minicos.open import load
from minicos.runs import replace_file
from minicos.text import Tokenizer
from minicos.tiny import data, mixture, tokenizer, train_dit, train_vae

WEIGHTS = Path(__file__).parent / "weights"
VARIANTS = Path(__file__).parent / "variants"
TOKENIZER = WEIGHTS / "google" / "umt5-xxl" / "tokenizer.json"
STEPS = {
    "vae": 2400,
    "latents": 40,
    "decoder": 3000,
    "dit": 24000,
    "low": 700,
    "one-answer": 1500,
    "export": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minicos.tiny.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STEPS)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of checkpoints, logs and latents"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="training steps, or shards for `latents`; a default for each stage",
    )
    parser.add_argument(
        "--resume-from", metavar="MODEL", help="a model that a new --out begins with"
    )
    parser.add_argument(
        "--family",
        action="append",
        help="for `latents`: encode puzzles of this family alone; may be given more than once",
    )
    parser.add_argument(
        "--part", default="0/1", help="k/n: of n processes that share the shards, this is number k"
    )
    parser.add_argument(
        "--one-answer", action="store_true", help="for `latents`: the first valid answer alone"
    )
    parser.add_argument("--to", type=Path, default=WEIGHTS, help="where `export` writes")
    parser.add_argument("--variant", help="for `export`: what `tiny:VARIANT` will open")
    parser.add_argument(
        "--checkpoint",
        default="dit/averaged",
        help="for `export`: another one of --out, such as dit/averaged-4000",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="compile the networks: minutes at first, then faster"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    steps = args.steps or STEPS[args.stage]
    words = prepare(args.out, args.resume_from)
    common = {"steps": steps, "seed": args.seed, "device": args.device}
    if args.stage == "vae":
        train_vae.train(args.out, compiled=args.compile, **common)
    elif args.stage == "decoder":
        train_vae.train_decoder(args.out, compiled=args.compile, **common)
    elif args.stage == "latents":
        part, parts = map(int, args.part.split("/"))
        data.write(
            train_vae.finished(args.out).to(args.device),
            args.out / ("latents-one-answer" if args.one_answer else "latents"),
            [s for s in mixture.sources() if not args.family or s.family.name in args.family],
            seed=args.seed,
            shards=steps,
            part=part,
            parts=parts,
            compiled=args.compile,
            one=args.one_answer,
        )
    elif args.stage == "dit":
        train_dit.train(args.out, words, compiled=args.compile, **common)
    elif args.stage == "one-answer":
        train_dit.train_one_answer(args.out, words, compiled=args.compile, **common)
    elif args.stage == "low":
        train_dit.train_low(args.out, words, **common)
    else:
        from minicos.tiny.export import export, export_variant

        if args.variant:
            export_variant(args.out, VARIANTS / args.variant, words, args.checkpoint)
        else:
            export(args.out, args.to, words, args.checkpoint)


def prepare(folder: Path, model: str | None = None) -> Tokenizer:
    """The tokenizer of `folder`, which is new at first and may begin with the weights of a model; words are only ever added to it."""
    path = folder / "tokenizer.json"
    begun = path.exists()
    source = path if begun else TOKENIZER
    known = tokenizer.words(tokenizer.tokens(tokenizers.Tokenizer.from_file(str(source))))
    folder.mkdir(parents=True, exist_ok=True)
    if not begun and model:
        wan = load(model, device="cpu")
        train_vae.adopt(folder, wan.vae)
        words = Tokenizer(tokenizer.build(known), train_dit.CFG.text_len)
        train_dit.adopt(folder, wan, words)
    replace_file(path, lambda to: tokenizer.build(known).save(str(to)))
    return Tokenizer.load(path, train_dit.CFG.text_len)


if __name__ == "__main__":
    main()
