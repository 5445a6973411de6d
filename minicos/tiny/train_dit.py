"""Train the embedded DiT with its text encoder, then LoRAs on it: its low-noise expert, variants.

Flow matching: x = (1 - sigma) x0 + sigma noise, target velocity noise - x0, mean squared error.
Noise levels are stratified over the batch and shifted towards noise (sigma = 3u / (1 + 2u)), where
routes are decided; a tenth of the prompts is dropped, so that guidance works. The first stage
trains on every noise level and becomes the high-noise expert. All others (`LORAS`) train low-rank
updates of its block matrices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from minicos.config import TINY_TEXT, VARIANTS, get_preset
from minicos.dit import DiT
from minicos.ops import REFERENCE, Ops
from minicos.runs import replace_file
from minicos.schedule import make
from minicos.text import TextEncoder, Tokenizer, encode
from minicos.tiny import optim
from minicos.tiny.data import Pool
from minicos.tiny.mixture import sources
from minicos.wan import Wan
from minicos.weights.lora import LowRank

CFG = VARIANTS["tiny"]
SHIFT, DROP = 3.0, 0.1
BOUNDARY = 0.9  # of the low-noise expert


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unfused attention: on a CPU, for a hundred tokens, its backward pass is faster than the fused
    one."""
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


TRAINING: Ops = replace(REFERENCE, attention=plain_attention, self_attention=plain_attention)


class Student(nn.Module):
    """Text encoder and network, trained together."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.text = TextEncoder(TINY_TEXT)
        self.dit = DiT(CFG, ops=TRAINING)
        self.tokenizer = tokenizer
        initialise(self)

    def loss(
        self, x0: Tensor, y: Tensor, prompts: list[str], noise: Tensor, sigma: Tensor
    ) -> Tensor:
        """Mean squared error of the velocity; x0 b c f h w, sigma b."""
        text = encode(self.text, self.tokenizer, prompts)
        s = sigma.view(-1, 1, 1, 1, 1)
        velocity = self.dit((1 - s) * x0 + s * noise, 1000 * sigma, text, y)
        return (velocity - (noise - x0)).square().mean()


class FewStepStudent(Student):
    """One step of the student leads where several steps of its teacher do, which is the same
    network without its updates (one round of progressive distillation, arXiv:2202.00512).

    The 20 steps of the preset "tiny" are cut into four pieces, the steps of "4step". The target is
    the teacher's mean velocity along a piece, from noised training data.
    """

    def loss(
        self, x0: Tensor, y: Tensor, prompts: list[str], noise: Tensor, sigma: Tensor
    ) -> Tensor:
        """Mean squared error of the velocity over a piece; the pieces take turns over the batch,
        and `sigma` is not used."""
        text = encode(self.text, self.tokenizer, prompts)
        many, few = (levels(name).to(x0.device) for name in ("tiny", "4step"))
        each = (len(many) - 1) // (len(few) - 1)
        first = torch.arange(len(x0), device=x0.device) % (len(few) - 1) * each
        passed = [many[first + i].view(-1, 1, 1, 1, 1) for i in range(each + 1)]
        x = start = (1 - passed[0]) * x0 + passed[0] * noise
        with torch.no_grad(), without_updates(self.dit):
            for s, after in pairwise(passed):
                x = x + (after - s) * self.dit(x, 1000 * s.flatten(), text, y)
        velocity = self.dit(start, 1000 * passed[0].flatten(), text, y)
        return (velocity - (x - start) / (passed[-1] - passed[0])).square().mean()


def initialise(student: Student) -> None:
    """Xavier matrices as in the official code; every residual branch and the head start at zero."""
    for module in student.dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(student.dit.patch_embedding.weight.flatten(1))
    for name, p in student.dit.named_parameters():
        if name.endswith(("attn.o.weight", "ffn.2.weight")):
            nn.init.zeros_(p)
    nn.init.zeros_(student.dit.head.head.weight)


def noise_levels(n: int, rng: np.random.Generator, below: float = 1.0) -> Tensor:
    """n stratified sigmas in (0, below): sigma = 3u / (1 + 2u) for evenly spread u, cut at
    `below`."""
    top = below / (SHIFT - (SHIFT - 1) * below)  # the u that gives sigma = below
    u = (rng.permutation(n) + rng.random(n)) / n * top
    return torch.from_numpy(SHIFT * u / (1 + (SHIFT - 1) * u)).float()


def batch(
    pool: Pool, seed: int, step: int, below: float = 1.0
) -> tuple[Tensor, Tensor, list[str], Tensor, Tensor]:
    """The arguments of `Student.loss` for a training step."""
    rng = np.random.default_rng((seed, step))
    x0, y, prompts = pool.batch(rng)
    dropped = rng.random(len(prompts)) < DROP
    prompts = ["" if gone else prompt for prompt, gone in zip(prompts, dropped, strict=True)]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
    return x0, y, prompts, noise, noise_levels(len(x0), rng, below)


def is_block_matrix(name: str, p: nn.Parameter) -> bool:
    return ".blocks." in f".{name}" and p.ndim == 2 and "pos_embedding" not in name


def train(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    steps: int,
    seed: int,
    rate: float = 1.0,
    decay: float = 1 / 3,
    device: str = "cpu",
    compiled: bool = False,
) -> None:
    """First stage: all noise levels, into `folder`/dit, resuming; uses shards of `folder`/latents
    as they are written. Starts from `folder`/start.safetensors if that exists (see `adopt`).

    Args:
        rate: factor on the learning rates; below 1 for weights that are trained already.
        decay: share of the steps, at the end, in which the rates fall to 0.
    """
    torch.manual_seed(seed)
    student = Student(tokenizer)
    start = folder / "start.safetensors"
    if start.exists():
        student.load_state_dict(load_file(start))
    student.to(device)
    opts = optim.optimisers(student, is_block_matrix, muon_lr=8e-3 * rate, adam_lr=2e-3 * rate)
    fit(
        student,
        opts,
        folder,
        "dit",
        steps=steps,
        seed=seed,
        device=device,
        decay=decay,
        compiled=compiled,
    )


def fit(
    student: Student,
    opts: list[torch.optim.Optimizer],
    folder: Path,
    stage: str,
    *,
    steps: int,
    seed: int,
    device: str,
    below: float = 1.0,
    decay: float = 1 / 3,
    ema: float = 0.998,
    compiled: bool = False,
    latents: str = "latents",
) -> None:
    """Train on the pool of `folder`/`latents` into `folder`/`stage`, resuming."""
    pool = Pool(folder / latents, sources(), folder / stage / "shards.json")
    if compiled:
        for block in student.dit.blocks:
            block.compile(dynamic=True)  # one compilation serves every shape
    (folder / stage).mkdir(parents=True, exist_ok=True)

    def loss_at(step: int) -> Tensor:
        if step % 50 == 0 or not len(pool):
            pool.refresh(step)
        x0, y, prompts, noise, sigma = batch(pool, seed, step, below)
        x0, y, noise, sigma = (tensor.to(device) for tensor in (x0, y, noise, sigma))
        with optim.autocast(device):
            return student.loss(x0, y, prompts, noise, sigma)

    optim.train(
        student,
        loss_at,
        opts,
        steps=steps,
        warmup=100,
        decay=decay,
        ema=ema,
        folder=folder / stage,
        keep_every=2000,
        log=lambda step, loss: f"{len(pool)} clips",
    )


def adopt(folder: Path, wan: Wan, tokenizer: Tokenizer) -> None:
    """Start from a model's weights: its high-noise expert and text encoder, with new rows for words
    that it did not know."""
    torch.manual_seed(0)
    student = Student(tokenizer)
    known, rows = wan.text.state_dict(), student.text.token_embedding.weight.detach()
    old = known["token_embedding.weight"]
    rows.mul_(old.std())
    rows[: len(old)] = old
    tensors = {f"dit.{name}": value for name, value in wan.experts["high"].state_dict().items()}
    tensors |= {f"text.{name}": value for name, value in known.items()}
    tensors["text.token_embedding.weight"] = rows
    tensors = {name: value.float().contiguous() for name, value in tensors.items()}
    replace_file(folder / "start.safetensors", lambda path: save_file(tensors, path))


class LowRankUpdate(nn.Module):
    """W -> W + up down, the trainable form of a LoRA. `up` starts at zero."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.on = True
        self.down = nn.Parameter(torch.randn(rank, weight.shape[1]) / weight.shape[1] ** 0.5)
        self.up = nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down if self.on else weight


@contextmanager
def without_updates(network: nn.Module) -> Iterator[None]:
    """Run the network as it was before its low-rank updates."""
    updates = [module for module in network.modules() if isinstance(module, LowRankUpdate)]
    try:
        for update in updates:
            update.on = False
        yield
    finally:
        for update in updates:
            update.on = True


def levels(preset: str) -> Tensor:
    """The noise levels of a preset of the embedded model, from 1 to 0 (steps + 1,)."""
    how = get_preset("tiny", preset)
    return torch.tensor(make(how.solver, how.steps, how.shift).sigmas)


def finished(
    folder: Path, tokenizer: Tokenizer, name: str = "dit/averaged", kind: type[Student] = Student
) -> Student:
    """The averaged weights of the first stage, or of an earlier step: "dit/averaged-4000". Before
    the first stage has begun, the weights that it starts from."""
    student = kind(tokenizer).requires_grad_(False)
    path = folder / f"{name}.safetensors"
    begun = path.exists() or (folder / "dit").exists()
    student.load_state_dict(load_file(path if begun else folder / "start.safetensors"))
    return student


def with_updates(student: Student, rank: int) -> list[nn.Parameter]:
    """Add a trainable LowRankUpdate to every block matrix, and return the parameters of all."""
    updates: list[nn.Parameter] = []
    for block in student.dit.blocks:
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                update = LowRankUpdate(layer.weight, rank)
                parametrize.register_parametrization(layer, "weight", update)
                updates += update.parameters()
        # never updated; but the activations of blocks without gradients are computed twice
        block.modulation.requires_grad_(True)
    return updates


@dataclass(frozen=True)
class LoraStage:
    """How a LoRA on the finished first stage is trained."""

    rank: int = 24
    below: float = 1.0  # the noise levels that it is trained on: (0, below)
    latents: str = "latents"  # the folder with its training data
    student: type[Student] = Student
    frame_causal: bool = False


LORAS: dict[str, LoraStage] = {
    "low": LoraStage(rank=16, below=BOUNDARY),
    # only one answer to every prompt: its early steps must not show several candidates, so it is
    # the positive control for analyses that count them
    "one-answer": LoraStage(latents="latents-one-answer"),
    # 20 steps of the first stage in 4
    "distilled": LoraStage(student=FewStepStudent),
    # no frame reads a later one: the network that a chain of frames would need
    "frame-causal": LoraStage(frame_causal=True),
}


def train_lora(
    folder: Path, tokenizer: Tokenizer, stage: str, *, steps: int, seed: int, device: str = "cpu"
) -> None:
    """A stage of `LORAS`, into `folder`/`stage`, resuming."""
    torch.manual_seed(seed)
    how = LORAS[stage]
    student = finished(folder, tokenizer, kind=how.student)
    student.dit.cfg = replace(CFG, frame_causal=how.frame_causal)
    updates = with_updates(student.to(device), how.rank)
    opts: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(updates, 1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    fit(
        student.to(device),
        opts,
        folder,
        stage,
        steps=steps,
        seed=seed + 1 + [*LORAS].index(stage),
        device=device,
        below=how.below,
        decay=0.7,
        ema=0.99,
        latents=how.latents,
    )


def trained_updates(folder: Path, stage: str) -> dict[str, LowRank]:
    """The result of a stage of `LORAS`: official parameter name -> LowRank."""
    tensors = load_file(folder / stage / "averaged.safetensors")
    marker = ".parametrizations.weight.0.up"
    modules = [key.removesuffix(marker) for key in tensors if key.endswith(marker)]
    return {
        f"{m.removeprefix('dit.')}.weight": LowRank(
            tensors[m + marker], tensors[m + marker.replace("up", "down")]
        )
        for m in modules
    }
