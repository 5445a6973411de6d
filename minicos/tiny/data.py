"""Training data of the embedded DiT: puzzles drawn, encoded once by the embedded VAE, and kept in shards.

A shard holds pictures of one grid size: `y`, the latent of [picture, grey frames] that the network is conditioned on, and for one or
two answers (or prompts) of each picture `x0`, the latent of the video, `of`, which picture it answers, and `prompt`, which prompt.
Several answers of one picture are drawn at random among all valid ones: that is what makes several routes likely at high noise.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicos import puzzles
from minicos.runs import replace_file
from minicos.tiny.train_vae import COMPILED, to_tensor
from minicos.vae import VAE

PROMPTS = (
    "", "solve the maze", "mark the circle", "mark the triangle", "mark the square", "mark the cross",
    "go to the red goal", "go to the blue goal", "pass behind the wall", "turn the l",
)  # fmt: skip
MIXTURE = {  # (kind, size) -> share of the pictures
    ("maze", 3): 0.12, ("maze", 4): 0.36, ("goal", 3): 0.07, ("goal", 4): 0.15, ("mark", 3): 0.03, ("mark", 4): 0.07,
    ("memory", 3): 0.03, ("memory", 4): 0.07, ("turn", 3): 0.03, ("turn", 4): 0.07,
}  # fmt: skip
PICTURES = 128  # per shard


def answers(puzzle: puzzles.Puzzle, rng: np.random.Generator) -> list[tuple[str, np.ndarray]]:
    """Up to two (prompt, video) of one picture: another prompt where there is one, else another answer, at random."""
    others = puzzle.variants()
    if others:
        chosen = [puzzle, others[rng.integers(len(others))]]
        return [(p.prompt, p.draw(int(rng.integers(len(p.candidates))))) for p in chosen]
    picks = rng.permutation(len(puzzle.candidates))[:2]
    return [(puzzle.prompt, puzzle.draw(int(i))) for i in picks]


@torch.no_grad()
def shard(vae: VAE, seed: int, index: int) -> tuple[int, dict[str, Tensor]]:
    """The grid size and the tensors of shard `index`, a pure function of its arguments."""
    rng = np.random.default_rng((seed, index))
    size = int(rng.choice([3, 4], p=[share(3), share(4)]))
    kinds = [kind for kind, s in MIXTURE if s == size]
    weights = np.array([MIXTURE[kind, size] for kind in kinds])
    firsts, videos, of, prompts = [], [], [], []
    for picture in range(PICTURES):
        kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        puzzle = puzzles.make(kind, int(rng.integers(2**40)), size=size, split="train")
        grey = np.full((puzzle.frames, *puzzle.first_frame().shape), 127.5, dtype=np.float32)
        grey[0] = puzzle.first_frame()
        firsts.append(grey)
        for prompt, video in answers(puzzle, rng):
            videos.append(video)
            of.append(picture)
            prompts.append(PROMPTS.index(prompt))
    return size, {
        "y": encode(vae, firsts), "x0": encode(vae, videos),
        "of": torch.tensor(of, dtype=torch.int32), "prompt": torch.tensor(prompts, dtype=torch.uint8),
    }  # fmt: skip


def share(size: int) -> float:
    return sum(v for (_, s), v in MIXTURE.items() if s == size)


def encode(vae: VAE, videos: list[np.ndarray], batch: int = 8) -> Tensor:
    """Videos in 0..255 -> normalised latents in float16 (n 16 4 h w), encoded in bfloat16, whole clips at once.

    Batches are filled up to one size, since the encoder is compiled for it: twice as fast, and the same network.
    """
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.cfg.mean, vae.cfg.std))
    out = []
    for start in range(0, len(videos), batch):
        part = videos[start : start + batch]
        full = to_tensor(np.stack(part + [part[-1]] * (batch - len(part))))
        with torch.autocast("cpu", torch.bfloat16):
            mu = vae.conv1(COMPILED[0](vae, full), {}).chunk(2, dim=1)[0].float()
        out.append(((mu - mean) / std)[: len(part)].half())
    return torch.cat(out)


def write(vae: VAE, folder: Path, *, seed: int, shards: int, part: int = 0, parts: int = 1) -> None:
    """Write every `parts`-th shard from `part` on, skipping what is there: several processes may share the work."""
    for index in range(part, shards, parts):
        if list(folder.glob(f"*x*-{index:05d}.safetensors")):
            continue
        size, tensors = shard(vae, seed, index)
        replace_file(folder / f"{size}x{size}-{index:05d}.safetensors", lambda path, t=tensors: save_file(t, path))
        if index % 20 == part:
            print(f"shard {index}/{shards}", flush=True)


@dataclass
class Pool:
    """All shards of a folder in memory, one list of samples per grid size; `refresh` takes in those written since."""

    folder: Path

    def __post_init__(self):
        self.seen: set[str] = set()
        self.x0: dict[int, list[Tensor]] = {3: [], 4: []}
        self.y: dict[int, list[Tensor]] = {3: [], 4: []}
        self.prompt: dict[int, list[int]] = {3: [], 4: []}

    def refresh(self) -> "Pool":
        for path in sorted(self.folder.glob("[34]x[34]-*.safetensors")):
            if path.name not in self.seen:
                self.seen.add(path.name)
                size, tensors = int(path.name[0]), load_file(path)
                self.x0[size] += list(tensors["x0"])
                self.y[size] += [tensors["y"][i] for i in tensors["of"].tolist()]
                self.prompt[size] += tensors["prompt"].tolist()
        return self

    def __len__(self) -> int:
        return sum(len(v) for v in self.x0.values())

    def batch(self, rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """n samples of one size: x0 (n 16 f h w), y (n 20 f h w) with the mask channels, prompt (n) int64."""
        counts = np.array([len(self.x0[3]), len(self.x0[4])])
        size = (3, 4)[rng.choice(2, p=counts / counts.sum())]
        pick = rng.integers(len(self.x0[size]), size=n)
        x0 = torch.stack([self.x0[size][i] for i in pick]).float()
        latent = torch.stack([self.y[size][i] for i in pick]).float()
        mask = torch.zeros_like(latent[:, :4])
        mask[:, :, 0] = 1
        return x0, torch.cat([mask, latent], dim=1), torch.tensor([self.prompt[size][i] for i in pick])
