"""One layer of the large networks at its real width, in float32 and in bfloat16: the text encoder
against transformers' and a block of A14B against diffusers', with the same random weights.

A layer fits on a laptop, unlike the networks. Both sides run whole networks with one layer, so
embeddings and head count for both. The text encoder reads 512 rows, 60 of them words; the block has
512 tokens on a card and 128 on a CPU, and 512 text rows. transformers computes attention eagerly or
by SDPA; both are measured, and the faster one is the peer, by name.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minicos.bench.forward import plain
from minicos.bench.measure import Line, alternate, attempt, ceilings, rate
from minicos.bench.networks import A14B, QUICK, Subject, random_dit
from minicos.config import TINY_TEXT, TextConfig
from minicos.device import operations
from minicos.text import TextEncoder
from minicos.verify import transformers_umt5

DTYPES = (torch.float32, torch.bfloat16)
WORDS = 60  # of 512 rows


def lines(device: torch.device, quick: bool = False) -> Iterator[Line]:
    for what, measured in (("UMT5-XXL layer", _text), ("A14B block", _block)):
        for dtype in DTYPES:
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            yield attempt(name, partial(measured, name, device, dtype, quick))


def _text(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> Line:
    cfg = TINY_TEXT if quick else TextConfig()
    ours = random_text(replace(cfg, num_layers=1, vocab_size=100), device, dtype)
    peers = {f"transformers, {how}": them for how, them in peer_settings(ours).items()}
    length = cfg.text_len
    ids = torch.arange(length, device=device)[None] % 98 + 2
    mask = (torch.arange(length, device=device) < WORDS)[None].long()
    sides = {peer: partial(theirs, ids, mask) for peer, theirs in peers.items()}
    matrices = sum(p.numel() for p in ours.blocks.parameters() if p.ndim == 2)
    flops = 2 * length * (matrices + 2 * length * cfg.dim_attn)
    return _line(name, partial(ours, ids, mask), sides, flops, device, dtype, quick)


def peer_settings(ours: TextEncoder) -> dict[str, Any]:
    """transformers' encoder with the weights of `ours`, by its way of computing attention."""
    found: dict[str, Any] = {"eager": transformers_umt5(ours)}
    if getattr(found["eager"], "_supports_sdpa", False):
        found["sdpa"] = transformers_umt5(ours)
        found["sdpa"].set_attn_implementation("sdpa")
    return found


def random_text(cfg: TextConfig, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """A text encoder with random weights, scaled so that activations stay near 1."""
    with torch.device("meta"):
        network = TextEncoder(cfg).requires_grad_(False)
    draw = torch.Generator(device).manual_seed(0)
    state = {}
    for name, p in network.named_parameters():
        size = 0.1 if p.ndim == 1 else p.shape[1] ** -0.5
        noise = torch.randn(p.shape, generator=draw, device=device, dtype=dtype) * size
        state[name] = noise + 1 if p.ndim == 1 else noise
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def _block(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> Line:
    cfg = replace(QUICK if quick else A14B, num_layers=1)
    draw = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw, device=device)

    side = 4 if quick else 32 if device.type == "cuda" else 16  # 512 tokens on a card, 128 on a CPU
    grid = (2, side, side)  # of latents
    dit = random_dit(cfg, device, dtype, operations(device))
    channels = cfg.in_dim - cfg.out_dim
    text, y = randn(cfg.text_len, cfg.text_dim), randn(channels, *grid)
    s = Subject(name, dit, randn(cfg.out_dim, *grid), torch.full((1, 1), 937.0), text, y)
    ours, theirs = plain(s)
    return _line(name, ours, {"diffusers": theirs}, s.flops, device, dtype, quick)


def _line(
    name: str,
    ours: Callable[[], object],
    peers: Mapping[str, Callable[[], object]],
    flops: int,
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
) -> Line:
    """Against the fastest of the peers."""
    ms, *others = alternate(
        ours, *peers.values(), device=device, repeats=2 if quick else 9, label="" if quick else name
    )
    theirs, peer = min(zip(others, peers, strict=True))
    share = ceilings(device, dtype).of_matmul(flops, ms)
    return Line(name, ms, peer, theirs, share, rate(flops, ms))
