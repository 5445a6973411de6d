"""Train the embedded model: `python -m minicos.tiny.train STAGE --out FOLDER`; every stage resumes where it was killed."""

import argparse
from pathlib import Path

import torch


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minicos.tiny.train", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True)
    vae = stages.add_parser("vae", help="the causal VAE (about 20 minutes on one core)")
    vae.add_argument("--steps", type=int, default=2400)
    vae.add_argument("--compile", action="store_true", help="compile encoder and decoder first")
    for stage in (vae,):
        stage.add_argument("--out", type=Path, required=True)
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    if args.stage == "vae":
        from minicos.tiny import train_vae

        train_vae.train(args.out / "vae", steps=args.steps, seed=args.seed, compiled=args.compile)


if __name__ == "__main__":
    main()
