"""Train the embedded model, stage by stage; each resumes where it was killed.

python -m minicos.tiny.train vae      --out FOLDER     the causal VAE
python -m minicos.tiny.train latents  --out FOLDER     draw puzzles and encode them (several at once: --part 0/2, --part 1/2)
python -m minicos.tiny.train decoder  --out FOLDER     more of the decoder alone, while the DiT already learns
python -m minicos.tiny.train dit      --out FOLDER     text encoder and DiT, from the shards that `latents` has written so far
python -m minicos.tiny.train low      --out FOLDER     the low-noise expert, a LoRA on the DiT
python -m minicos.tiny.train export   --out FOLDER     write it all in the official layout to minicos/tiny/weights
"""

import argparse
from pathlib import Path

import torch

from minicos.text import Tokenizer
from minicos.tiny import data, train_dit, train_vae

WEIGHTS = Path(__file__).parent / "weights"
STEPS = {"vae": 2400, "latents": 150, "decoder": 7600, "dit": 12600, "low": 700, "export": 0}


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
        "--mixture", choices=data.MIXTURES, default="first", help="which puzzles `latents` encodes"
    )
    parser.add_argument(
        "--part", default="0/1", help="k/n: of n processes that share the shards, this is number k"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="compile the VAE first: up to twice as fast"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    steps = args.steps or STEPS[args.stage]
    tokenizer = Tokenizer.load(
        WEIGHTS / "google" / "umt5-xxl" / "tokenizer.json", train_dit.CFG.text_len
    )
    if args.stage == "vae":
        train_vae.train(
            args.out, steps=steps, seed=args.seed, device=args.device, compiled=args.compile
        )
    elif args.stage == "decoder":
        train_vae.train_decoder(
            args.out, steps=steps, seed=args.seed, device=args.device, compiled=args.compile
        )
    elif args.stage == "latents":
        part, parts = map(int, args.part.split("/"))
        vae = train_vae.finished(args.out).to(args.device)
        data.write(
            vae,
            args.out / "latents",
            args.mixture,
            seed=args.seed,
            shards=steps,
            part=part,
            parts=parts,
            compiled=args.compile,
        )
    elif args.stage == "dit":
        train_dit.train(args.out, tokenizer, steps=steps, seed=args.seed, device=args.device)
    elif args.stage == "low":
        train_dit.train_low(args.out, tokenizer, steps=steps, seed=args.seed, device=args.device)
    else:
        from minicos.tiny.export import export

        export(args.out, WEIGHTS, tokenizer)


if __name__ == "__main__":
    main()
