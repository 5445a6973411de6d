"""Training data of the embedded DiT: puzzles, encoded once by the embedded VAE, stored in shards.

A shard holds pictures of one source (see `mixture`), so of one grid size and length: `y`, the
latent of [picture, grey frames] on which the network is conditioned; and for some answers (or
prompts) of each picture `x0`, the latent of the video, `of`, the picture that it answers, and
`prompt`, an index into the prompts in the shard's metadata. Answers are drawn at random from all
valid ones, which makes several of them likely at high noise.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from minicos.condition import known_frames
from minicos.puzzles import Puzzle
from minicos.puzzles.reveal import Reveal
from minicos.runs import read_json, replace_file, write_json
from minicos.tiny import optim
from minicos.tiny.mixture import Source, shapes
from minicos.tiny.train_vae import COMPILED, EAGER, film, to_tensor
from minicos.vae import VAE

CLIPS = 256  # fewest clips of a shard
TOKENS = 4096  # tokens of a training batch, approximately


def answers(
    puzzle: Puzzle, rng: np.random.Generator, frames: int, one: bool = False
) -> list[tuple[str, np.ndarray]]:
    """Two (prompt, video) of one picture; all answers where the kind is `reveal`.

    The second has another prompt where the picture admits one, else another answer, at random. With
    `one`, only the first of the valid answers to a prompt is ever drawn.
    """
    others = puzzle.variants()
    if isinstance(puzzle, Reveal) and not one:
        # both orders of the sides, so that the text encoder has to tell them apart
        orders = rng.integers(2, size=len(puzzle.candidates))
        asked = [(puzzle, *others)[k] for k in orders]
        return [(told(p, i, rng), film(p, i, frames)) for i, p in enumerate(asked)]
    if others:
        asked = [puzzle, others[int(rng.integers(len(others)))]]
        picks = [(p, 0 if one else int(rng.integers(len(p.candidates)))) for p in asked]
    else:
        order = [0] if one else rng.permutation(len(puzzle.candidates))[:2]
        picks = [(puzzle, int(i)) for i in order]
    return [(p.prompt, film(p, i, frames)) for p, i in picks]


def told(puzzle: Reveal, i: int, rng: np.random.Generator) -> str:
    """A prompt that answer i obeys: half of the time the puzzle's own, else one that names its
    colour, or its look if that is not held out.
    """
    shape, colour = puzzle.candidates[i][0]
    named = (puzzle.named, puzzle.named, f"{colour} object", f"{colour} {shape}")[rng.integers(4)]
    asked = replace(puzzle, named=named)
    return puzzle.prompt if asked.composition in puzzle.held_out else asked.prompt


def shared_frames(videos: np.ndarray) -> np.ndarray:
    """Which latent frames look the same in all answers of a picture (never the first): bool (latent
    frames,), from the videos of all answers, uint8 (n f h w 3).

    Four pixel frames make a latent frame. If answers look the same, the encoder may still
    distinguish them through its memory; training on the mean over all answers removes this leak.
    """
    same = (videos == videos[:1]).all(axis=(0, 2, 3, 4))
    return np.array([False, *same[1:].reshape(-1, 4).all(axis=1)])


@torch.no_grad()
def shard(
    vae: VAE, source: Source, seed: int, index: int, compiled: bool = False, one: bool = False
) -> dict[str, Any]:
    """The tensors of shard `index`, and its "prompts"; depends only on the arguments."""
    rng = np.random.default_rng((seed, index, *source.name.encode()))
    firsts: list[np.ndarray] = []
    videos: list[np.ndarray] = []
    groups: list[range] = []
    prompts: list[str] = []
    while len(videos) < CLIPS:
        puzzle = source.family.draw(int(rng.integers(2**40)), split="train")
        chosen = answers(puzzle, rng, source.frames, one)
        grey = np.full((source.frames, *puzzle.first_frame().shape), 127.5, dtype=np.float32)
        grey[0] = puzzle.first_frame()
        firsts.append(grey)
        groups.append(range(len(videos), len(videos) + len(chosen)))
        prompts += [prompt for prompt, _ in chosen]
        videos += [video for _, video in chosen]
    x0 = encode(vae, videos, compiled)
    if source.family.puzzle is Reveal and not one:
        for group in groups:
            same = torch.from_numpy(shared_frames(np.stack([videos[i] for i in group])))
            part = x0[group[0] : group[-1] + 1]
            part[:, :, same] = part[:, :, same].float().mean(0, keepdim=True).half()
    names = sorted(set(prompts))
    return {
        "y": encode(vae, firsts, compiled),
        "x0": x0,
        "of": torch.tensor([i for i, group in enumerate(groups) for _ in group], dtype=torch.int32),
        "prompt": torch.tensor([names.index(prompt) for prompt in prompts], dtype=torch.uint8),
        "prompts": names,
    }


def encode(
    vae: VAE, videos: Sequence[np.ndarray], compiled: bool = False, batch: int = 8
) -> Tensor:
    """Encode videos in 0..255 to normalised float16 latents (n 16 f h w), whole clips
    at a time.

    Batches are padded to one size, for which the encoder may be compiled: twice as fast on a CPU,
    and the same network.
    """
    device = next(vae.parameters()).device
    encoder = (COMPILED if compiled else EAGER)[0]
    mean, std = (
        torch.tensor(v, device=device).view(1, -1, 1, 1, 1) for v in (vae.cfg.mean, vae.cfg.std)
    )
    out = []
    for start in range(0, len(videos), batch):
        part = list(videos[start : start + batch])
        full = to_tensor(np.stack(part + [part[-1]] * (batch - len(part)))).to(device)
        with optim.autocast(device.type):
            mu = vae.conv1(encoder(vae, full), {}).chunk(2, dim=1)[0].float()
        out.append(((mu - mean) / std)[: len(part)].half().cpu())
    return torch.cat(out).contiguous()


def write(
    vae: VAE,
    folder: Path,
    sources: Iterable[Source],
    *,
    seed: int,
    shards: int,
    part: int = 0,
    parts: int = 1,
    compiled: bool = False,
    one: bool = False,
) -> None:
    """Write shards 0..shards-1 of each source, skipping what is there.

    Of several processes, number `part` of `parts` writes its own share of them.

    The first shards of all sources come first, so that training can begin early.
    """
    table = tuple(sources)
    for index in range(part, shards, parts):
        for source in table:
            path = folder / source.name / f"{index:05d}.safetensors"
            if not path.exists():
                tensors = shard(vae, source, seed, index, compiled and source.tokens >= 64, one)
                metadata = {"prompts": json.dumps(tensors.pop("prompts"))}
                replace_file(path, partial(_save, tensors, metadata))
                print(f"{source.name} {index + 1}/{shards}: {len(tensors['x0'])} clips", flush=True)


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    save_file(tensors, path, metadata)


class Pool:
    """The shards of a folder in memory, by source. `refresh` adds those written since.

    `record` stores the step at which each shard was first used, and a resumed run uses it from the
    same step on. So the run is the same, whatever was written in between.
    """

    def __init__(self, folder: Path, sources: Iterable[Source], record: Path):
        self.folder, self.record = folder, record
        self.sources = tuple(sources)
        self.since: dict[str, int] = read_json(record) if record.exists() else {}
        self.seen: set[str] = set()
        self.samples: dict[str, list[tuple[Tensor, Tensor, str]]] = {}  # x0, y, prompt

    def refresh(self, step: int) -> None:
        """Add the shards due at `step`; shards that no step has used are due now."""
        there = {
            f"{source.name}/{path.name}": path
            for source in self.sources
            for path in sorted((self.folder / source.name).glob("*.safetensors"))
        }
        if new := {name: step for name in there if name not in self.since}:
            self.since |= new
            write_json(self.record, self.since)
        due = sorted((at, name) for name, at in self.since.items() if at <= step)
        for _, name in due:
            if name in there and name not in self.seen:
                self.seen.add(name)
                self._add(name.partition("/")[0], there[name])

    def _add(self, source: str, path: Path) -> None:
        with safe_open(path, "pt") as file:
            names = json.loads(file.metadata()["prompts"])
        tensors = load_file(path)
        self.samples.setdefault(source, []).extend(
            (x0, tensors["y"][of], names[prompt])
            for x0, of, prompt in zip(
                tensors["x0"], tensors["of"].tolist(), tensors["prompt"].tolist(), strict=True
            )
        )

    def __len__(self) -> int:
        return sum(map(len, self.samples.values()))

    def batch(
        self, rng: np.random.Generator, tokens: int = TOKENS
    ) -> tuple[Tensor, Tensor, list[str]]:
        """Samples of one shape, about `tokens` tokens: x0 (n 16 f h w), y (n 20 f h w), prompts
        (n). y holds the mask channels and the latent on which the network is conditioned.
        """
        there = [source for source in self.sources if source.name in self.samples]
        odds = shapes(there)
        shape = list(odds)[rng.choice(len(odds), p=list(odds.values()))]
        alike = [source for source in there if source.shape == shape]
        shares = np.array([source.share for source in alike])
        n = max(8, round(tokens / alike[0].tokens / 8) * 8)
        picks = []
        for k in rng.choice(len(alike), size=n, p=shares / shares.sum()):
            group = self.samples[alike[k].name]
            picks.append(group[rng.integers(len(group))])
        x0 = torch.stack([pick[0] for pick in picks]).float()
        latent = torch.stack([pick[1] for pick in picks]).float()
        mask = known_frames(latent.shape).expand(n, -1, -1, -1, -1)
        return x0, torch.cat([mask, latent], dim=1), [pick[2] for pick in picks]
