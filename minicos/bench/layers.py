"""One layer of the large networks at its real width, in float32 and in bfloat16: the text encoder
against transformers' and a block of A14B against diffusers', with the same random weights.

A layer fits on a laptop, unlike the networks. Both sides run whole networks with one layer, so
embeddings and head count for both.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

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
    theirs = transformers_umt5(ours)
    length = cfg.text_len
    ids = torch.arange(length, device=device)[None] % 98 + 2
    mask = (torch.arange(length, device=device) < WORDS)[None].long()
    sides = partial(ours, ids, mask), partial(theirs, ids, mask)
    matrices = sum(p.numel() for p in ours.blocks.parameters() if p.ndim == 2)
    flops = 2 * length * (matrices + 2 * length * cfg.dim_attn)
    return _line(name, sides, "transformers", flops, device, dtype, quick)


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
    return _line(name, plain(s), "diffusers", s.flops, device, dtype, quick)


def _line(
    name: str,
    sides: tuple[Callable[[], object], Callable[[], object]],
    peer: str,
    flops: int,
    device: torch.device,
    dtype: torch.dtype,
    quick: bool,
) -> Line:
    ours, theirs = alternate(
        *sides, device=device, repeats=2 if quick else 9, label="" if quick else name
    )
    share = ceilings(device, dtype).of_matmul(flops, ours)
    return Line(name, ours, peer, theirs, share, rate(flops, ours))
