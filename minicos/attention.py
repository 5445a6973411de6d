"""Which of PyTorch's backends computes attention on a card, chosen once, when a model is loaded.
What it computes is `ops.attention`.

From 2.11 on PyTorch itself takes cuDNN's attention where that is fastest, and is left to choose.
Before, it takes FlashAttention 2; on Hopper and datacentre Blackwell cuDNN's is said to be much
faster (bfloat16, heads of 128, long rows: about 600 against 350 TFLOP/s, pytorch#142132), so there
it is asked first. A backend that cannot serve a call, as cuDNN cannot serve float32, leaves it to
the next. Rows whose number is no multiple of 128 stay with PyTorch's own order: the cuDNN of those
versions may give wrong numbers for them (pytorch#169849).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicos.ops import Ops, attention

ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CARDS = ((9, 0), (10, 0), (10, 3))  # compute capabilities: H100 and H200, B200, B300
CHOOSES = "2.11"  # the first PyTorch that takes cuDNN's attention by itself
TILE = 128  # rows


def cudnn_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attention` by the first backend in ORDER that can; an `sdpa_kernel` around the call has
    no say.
    """
    if q.shape[2] % TILE or k.shape[2] % TILE:
        return attention(q, k, v)
    with sdpa_kernel(ORDER, set_priority=True):
        return attention(q, k, v)


def best(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The attention for a device: `cudnn_first` or `ops.attention`."""
    if (
        device.type != "cuda"
        or torch.version.cuda is None
        or not torch.backends.cudnn.is_available()
        or torch.__version__ >= CHOOSES  # by numbers, as TorchVersion compares
    ):
        return attention
    return cudnn_first if torch.cuda.get_device_capability(device) in CARDS else attention


def with_best(ops: Ops, device: torch.device) -> Ops:
    """The bundle with the attention for a device; one that somebody else has put in stays."""
    chosen = best(device)
    cross = chosen if ops.attention is attention else ops.attention
    within = chosen if ops.self_attention is attention else ops.self_attention
    return replace(ops, attention=cross, self_attention=within)


def describe(ops: Ops) -> str:
    """Which attention a bundle computes with, for people and for run.json."""
    known = {
        attention: "scaled_dot_product_attention",
        cudnn_first: "scaled_dot_product_attention, cuDNN first",
    }
    return known.get(
        ops.self_attention, getattr(ops.self_attention, "__qualname__", str(ops.self_attention))
    )
