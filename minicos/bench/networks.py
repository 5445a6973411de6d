"""The networks that are measured: A14B's shapes with random weights on a card, the embedded
model's network on a CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from minicos import cost
from minicos.config import VARIANTS, DiTConfig
from minicos.device import check_compiler, operations
from minicos.dit import FLOAT32, DiT
from minicos.hooks import NO_HOOKS, Hooks
from minicos.open import load
from minicos.ops import REFERENCE, Ops

A14B = VARIANTS["Wan2.2-I2V-A14B"]
QUICK = replace(VARIANTS["tiny"], num_layers=2, dim=64, ffn_dim=96, num_heads=2)


@dataclass(frozen=True)
class Subject:
    """A network and the arguments of a pass, those of `DiT.forward`."""

    name: str
    dit: DiT
    x: Tensor  # b c f h w
    timestep: Tensor  # b 1, on the host, where the sinusoid is built
    text: Tensor  # b t d'
    y: Tensor  # b 20 f h w

    @property
    def given(self) -> tuple[Tensor, ...]:
        return self.x, self.timestep, self.text, self.y

    def run(self, hooks: Hooks = NO_HOOKS) -> Tensor:
        return self.dit(*self.given, hooks=hooks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""
        return self.dit.dtype

    @property
    def flops(self) -> int:
        return cost.flops(self.dit.cfg, self.x.shape)


def subject(device: torch.device, quick: bool = False, batch: int = 1) -> Subject:
    """The network to measure on a device: A14B at 832x480x81 on a card, the embedded model at
    64x64x13 on a CPU. It is created once and used for every batch size.

    Raises:
        MinicosError: its kernels are not available.
    """
    name, dit, latent = _network(device, quick)
    cfg, draw = dit.cfg, torch.Generator(device).manual_seed(batch)

    def randn(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw, device=device)

    text = randn(cfg.text_len, cfg.text_dim)
    text[:, cfg.text_len // 4 :] = 0  # padding, which takes part in attention
    y = randn(cfg.in_dim - cfg.out_dim, *latent)
    return Subject(
        name if batch == 1 else f"{name}, batch {batch}",
        dit,
        randn(cfg.out_dim, *latent),
        torch.full((batch, 1), 937.0),
        text,
        y,
    )


@cache
def _network(device: torch.device, quick: bool) -> tuple[str, DiT, tuple[int, int, int]]:
    ops = operations(device)
    if quick:
        return "quick", random_dit(QUICK, device, torch.float32, ops), (2, 4, 6)
    if device.type == "cuda":
        return "A14B 832x480x81", random_dit(A14B, device, torch.bfloat16, ops), (21, 60, 104)
    return "tiny 64x64x13", load("tiny", device=device, ops=ops).experts["high"], (4, 8, 8)


def random_dit(
    cfg: DiTConfig, device: torch.device, dtype: torch.dtype, ops: Ops = REFERENCE
) -> DiT:
    """A network with random weights, made on the device, in the official precision: residual
    stream and `FLOAT32` in float32.
    """
    with torch.device("meta"):
        dit = DiT(cfg, ops).requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    state = {
        name: _weight(
            name, p, draw, torch.float32 if any(part in name for part in FLOAT32) else dtype
        )
        for name, p in dit.named_parameters()
    }
    dit.load_state_dict(state, assign=True)
    return dit.requires_grad_(False)


def _weight(name: str, like: Tensor, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    """A random weight, scaled so that activations stay near 1 through any number of layers."""
    size = 0.1 if like.ndim == 1 or "modulation" in name else like[0].numel() ** -0.5
    noise = torch.randn(like.shape, generator=draw, device=draw.device, dtype=dtype) * size
    return noise + 1 if "norm" in name and name.endswith("weight") else noise


def compiled(s: Subject) -> Callable[[], Tensor]:
    """A pass of the same network with compiled blocks; the network itself is not changed. Raises
    MinicosError if nothing can be compiled.
    """
    check_compiler(s.x.device)
    with torch.device("meta"):
        twin = DiT(s.dit.cfg, s.dit.ops, s.dit.residual_dtype)
    twin.load_state_dict(s.dit.state_dict(), assign=True)
    twin.requires_grad_(False).compile_blocks()
    return lambda: twin(*s.given)
