"""Training data of the embedded DiT: puzzles drawn, encoded once by the embedded VAE, and kept in shards.

A shard holds pictures of one grid size: `y`, the latent of [picture, grey frames] that the network is conditioned on, and for one or
two answers (or prompts) of each picture `x0`, the latent of the video, `of`, which picture it answers, and `prompt`, which prompt.
Several answers of one picture are drawn at random among all valid ones: that is what makes several routes likely at high noise.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicos import puzzles
from minicos.condition import known_frames
from minicos.runs import replace_file
from minicos.tiny.train_vae import COMPILED, EAGER, to_tensor
from minicos.vae import VAE

PROMPTS = (
    "",
    "solve the maze",
    "mark the circle",
    "mark the triangle",
    "mark the square",
    "mark the cross",
    "go to the red goal",
    "go to the blue goal",
    "pass behind the wall",
    "turn the l",
)
KINDS = (
    "",
    "maze",
    "mark",
    "mark",
    "mark",
    "mark",
    "goal",
    "goal",
    "memory",
    "turn",
)  # of each prompt

# What is encoded and, later, drawn in training: (kind, size) -> share. Routes are learnt within 2,000 steps; carrying an object's
# identity behind a wall takes longer, and turning a shape longest, so later mixtures give these more room.
MIXTURES = {
    "first": {
        ("maze", 3): 0.12,
        ("maze", 4): 0.36,
        ("goal", 3): 0.07,
        ("goal", 4): 0.15,
        ("mark", 3): 0.03,
        ("mark", 4): 0.07,
        ("memory", 3): 0.03,
        ("memory", 4): 0.07,
        ("turn", 4): 0.10,
    },
    "second": {
        ("maze", 3): 0.06,
        ("maze", 4): 0.23,
        ("goal", 3): 0.04,
        ("goal", 4): 0.11,
        ("mark", 3): 0.02,
        ("mark", 4): 0.04,
        ("memory", 3): 0.08,
        ("memory", 4): 0.24,
        ("turn", 4): 0.18,
    },
    "third": {
        ("maze", 3): 0.04,
        ("maze", 4): 0.14,
        ("goal", 3): 0.03,
        ("goal", 4): 0.06,
        ("mark", 3): 0.01,
        ("mark", 4): 0.03,
        ("memory", 3): 0.07,
        ("memory", 4): 0.22,
        ("turn", 4): 0.40,
    },
    "fourth": {
        ("maze", 3): 0.04,
        ("maze", 4): 0.14,
        ("goal", 3): 0.02,
        ("goal", 4): 0.06,
        ("mark", 3): 0.01,
        ("mark", 4): 0.03,
        ("memory", 3): 0.04,
        ("memory", 4): 0.14,
        ("turn", 4): 0.52,
    },
    "memory and turn": {
        ("memory", 3): 0.12,
        ("memory", 4): 0.50,
        ("turn", 4): 0.38,
    },  # for encoding more of these alone
}
PLAN = (
    (0, "first"),
    (2000, "second"),
    (3000, "third"),
    (4200, "fourth"),
)  # from which step which mixture is drawn
Mixture = dict[tuple[str, int], float]
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
def shard(
    vae: VAE, mixture: Mixture, seed: int, index: int, compiled: bool = False
) -> tuple[int, dict[str, Tensor]]:
    """The grid size and the tensors of shard `index`, a pure function of its arguments."""
    rng = np.random.default_rng((seed, index))
    size, kinds, weights = draw_size(mixture, rng)
    firsts, videos, of, prompts = [], [], [], []
    for picture in range(PICTURES):
        kind = kinds[rng.choice(len(kinds), p=weights)]
        puzzle = puzzles.make(kind, int(rng.integers(2**40)), size=size, split="train")
        grey = np.full((puzzle.frames, *puzzle.first_frame().shape), 127.5, dtype=np.float32)
        grey[0] = puzzle.first_frame()
        firsts.append(grey)
        for prompt, video in answers(puzzle, rng):
            videos.append(video)
            of.append(picture)
            prompts.append(PROMPTS.index(prompt))
    return size, {
        "y": encode(vae, firsts, compiled),
        "x0": encode(vae, videos, compiled),
        "of": torch.tensor(of, dtype=torch.int32),
        "prompt": torch.tensor(prompts, dtype=torch.uint8),
    }


def planned(step: int) -> Mixture:
    """The mixture of a training step."""
    return MIXTURES[[name for start, name in PLAN if start <= step][-1]]


def draw_size(mixture: Mixture, rng: np.random.Generator) -> tuple[int, list[str], np.ndarray]:
    """A grid size drawn by its share, its kinds, and their shares within that size."""
    shares = {size: sum(v for (_, s), v in mixture.items() if s == size) for size in (3, 4)}
    size = int(rng.choice([3, 4], p=np.array([shares[3], shares[4]]) / sum(shares.values())))
    kinds = [kind for kind, s in mixture if s == size]
    return size, kinds, np.array([mixture[kind, size] for kind in kinds]) / shares[size]


def encode(vae: VAE, videos: list[np.ndarray], compiled: bool = False, batch: int = 8) -> Tensor:
    """Videos in 0..255 -> normalised latents in float16 (n 16 4 h w), encoded in bfloat16, whole clips at once.

    Batches are filled up to one size, for which the encoder may be compiled: twice as fast on a CPU, and the same network.
    """
    device = next(vae.parameters()).device
    encoder = (COMPILED if compiled else EAGER)[0]
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.cfg.mean, vae.cfg.std)
    )
    out = []
    for start in range(0, len(videos), batch):
        part = videos[start : start + batch]
        full = to_tensor(np.stack(part + [part[-1]] * (batch - len(part)))).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            mu = vae.conv1(encoder(vae, full), {}).chunk(2, dim=1)[0].float()
        out.append(((mu - mean) / std)[: len(part)].half().cpu())
    return torch.cat(out).contiguous()


def write(
    vae: VAE,
    folder: Path,
    mixture: str,
    *,
    seed: int,
    shards: int,
    part: int = 0,
    parts: int = 1,
    compiled: bool = False,
) -> None:
    """Write every `parts`-th shard from `part` on, skipping what is there: several processes may share the work."""
    first = 10_000 * list(MIXTURES).index(mixture)  # indices of different mixtures never meet
    for index in range(first + part, first + shards, parts):
        if not list(folder.glob(f"*x*-{index:05d}.safetensors")):
            size, tensors = shard(vae, MIXTURES[mixture], seed, index, compiled)
            replace_file(
                folder / f"{size}x{size}-{index:05d}.safetensors",
                lambda path, t=tensors: save_file(t, path),
            )
            print(f"shard {index - first + 1}/{shards}", flush=True)


class Pool:
    """All shards of a folder in memory, by kind and grid size; `refresh` takes in those written since."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: set[str] = set()
        self.samples: dict[tuple[str, int], list[tuple[Tensor, Tensor, int]]] = {}  # x0, y, prompt
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("[34]x[34]-*.safetensors")):
            if path.name not in self.seen:
                self.seen.add(path.name)
                size, tensors = int(path.name[0]), load_file(path)
                for x0, of, prompt in zip(
                    tensors["x0"], tensors["of"].tolist(), tensors["prompt"].tolist(), strict=True
                ):
                    self.samples.setdefault((KINDS[prompt], size), []).append(
                        (x0, tensors["y"][of], prompt)
                    )

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))

    def batch(
        self, rng: np.random.Generator, mixture: Mixture, n: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """n samples of one size: x0 (n 16 f h w), y (n 20 f h w) with the mask channels, prompt (n) int64."""
        size, kinds, weights = draw_size(mixture, rng)
        picks = []
        for k in rng.choice(len(kinds), size=n, p=weights):
            group = self.samples[kinds[k], size]
            picks.append(group[rng.integers(len(group))])
        x0, latent = (torch.stack([p[i] for p in picks]).float() for i in (0, 1))
        mask = known_frames(latent.shape).expand(n, -1, -1, -1, -1)
        return x0, torch.cat([mask, latent], dim=1), torch.tensor([p[2] for p in picks])
