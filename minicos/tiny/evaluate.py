"""Judge the embedded model on held-out puzzles: `python -m minicos.tiny.evaluate [--json FILE]`, some minutes on two cores.

Puzzles come from the test split, which no training stage has drawn from (a hash of the picture decides). Every video is sampled
with the tiny preset, 20 Euler steps at guidance 1, and scored from its pixels alone. The VAE is judged by PSNR on drawn answers
and by the oracle: the share of its reconstructions that the scorer still accepts.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from minicos import puzzles
from minicos.errors import MinicosError
from minicos.media import to_float, to_uint8
from minicos.pipeline import Wan, load
from minicos.runs import progress, write_json

TASKS = {  # name in the report -> kind and grid sizes
    "maze_3x3": ("maze", (3,)),
    "maze_4x4": ("maze", (4,)),
    "goal": ("goal", (3, 4)),
    "mark": ("mark", (3, 4)),
    "memory": ("memory", (3, 4)),
    "turn": ("turn", (4,)),
}
BATCH = 25


def batches(n: int, split: str) -> Iterator[tuple[str, list[puzzles.Puzzle]]]:
    """(task, puzzles of one size), BATCH at a time; n puzzles of each task, shared evenly between its sizes."""
    for task, (kind, sizes) in TASKS.items():
        for k, size in enumerate(sizes):
            share = n * (k + 1) // len(sizes) - n * k // len(sizes)
            chosen = puzzles.distinct(kind, share, size, split)
            for start in range(0, len(chosen), BATCH):
                yield task, chosen[start : start + BATCH]


def solve(wan: Wan, batch: list[puzzles.Puzzle], seed: int) -> np.ndarray:
    """One video for each puzzle: uint8 (n 13 h w 3)."""
    images = torch.stack(
        [torch.from_numpy(p.first_frame()).permute(2, 0, 1).float() / 255 for p in batch]
    )
    condition = wan.condition([p.prompt for p in batch], images)
    latent = None
    for step in wan.sample(condition, seed=seed):
        latent = step.next
    return wan.decode(latent)


@torch.no_grad()
def reconstruct(wan: Wan, batch: list[puzzles.Puzzle]) -> tuple[list[float], list[bool]]:
    """PSNR in dB and verdict of each first answer after encoding and decoding."""
    videos = torch.stack([to_float(p.draw(0)) for p in batch]).to(wan.device)
    back = wan.vae.decode(wan.vae.encode(videos, chunk=12), chunk=4)
    error = (back - videos).square().mean(dim=(1, 2, 3, 4))
    verdicts = [p.score(to_uint8(video)).solved for p, video in zip(batch, back, strict=True)]
    return (10 * torch.log10(4 / error)).tolist(), verdicts


def evaluate(wan: Wan, n: int, *, split: str = "test", seed: int = 0) -> dict[str, float | int]:
    """Rates in 0..1 for each task, PSNR in dB, oracle rate, and n, the number of puzzles of each task."""
    solved: dict[str, list[bool]] = {task: [] for task in TASKS}
    psnr: list[float] = []
    oracle: list[bool] = []
    work = list(batches(n, split))
    for index, (task, batch) in enumerate(progress(work, len(work), "evaluate")):
        videos = solve(wan, batch, seed + BATCH * index)
        solved[task] += [p.score(video).solved for p, video in zip(batch, videos, strict=True)]
        quality, verdicts = reconstruct(wan, batch)
        psnr += quality
        oracle += verdicts
    rates = {task: round(float(np.mean(v)), 4) for task, v in solved.items()}
    return {
        "vae_psnr_db": round(float(np.mean(psnr)), 2),
        "vae_oracle": round(float(np.mean(oracle)), 4),
        **rates,
        "n": n,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minicos.tiny.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=200, help="puzzles of each kind (default: 200)")
    parser.add_argument("--split", choices=puzzles.SPLITS, default="test")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--json", type=Path, help="write the scores here as well")
    args = parser.parse_args()
    if args.n < 1:
        parser.error(f"--n {args.n}: at least one puzzle of each kind")
    try:
        scores = evaluate(load(args.model), args.n, split=args.split, seed=args.seed)
    except (MinicosError, ValueError) as error:
        parser.error(str(error))
    for name, value in scores.items():
        print(f"{name:12} {value}")
    if args.json:
        write_json(args.json, scores)


if __name__ == "__main__":
    main()
