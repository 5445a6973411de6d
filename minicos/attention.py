"""The choice of PyTorch's attention backend on a card, made once, when a model is loaded. The
computation itself is `ops.attention`.

From version 2.11 on, PyTorch chooses cuDNN's attention by itself where that is fastest. Earlier
versions choose FlashAttention 2. On Hopper and datacentre Blackwell, cuDNN's is reported to be much
faster (bfloat16, heads of 128, long rows: about 600 against 350 TFLOP/s, pytorch#142132), so it
comes first there. A backend that does not support a call, such as cuDNN in float32, is skipped.
If the number of rows is not a multiple of 128, PyTorch's own order is kept: the cuDNN of those
versions may give wrong results (pytorch#169849).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicos.measures import attention_with_lse
from minicos.ops import Ops, attention

ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CARDS = ((9, 0), (10, 0), (10, 3))  # compute capabilities: H100 and H200, B200, B300
CHOOSES = "2.11"  # the first PyTorch that chooses cuDNN's attention by itself
TILE = 128  # rows


def _order(q: Tensor, k: Tensor) -> AbstractContextManager[None]:
    """A context in which ORDER decides; PyTorch's own order where rows are not whole tiles."""
    return (
        nullcontext()
        if q.shape[2] % TILE or k.shape[2] % TILE
        else sdpa_kernel(ORDER, set_priority=True)
    )


def cudnn_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`ops.attention` by the first backend in ORDER that supports it; an enclosing `sdpa_kernel` is
    ignored.
    """
    with _order(q, k):
        return attention(q, k, v)


def cudnn_first_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`cudnn_first`, and the logarithms of `measures.attention_with_lse` from the same pass."""
    with _order(q, k):
        return attention_with_lse(q, k, v)


# attention -> the same, which also returns log sum exp as a by-product
WITH_LSE = {attention: attention_with_lse, cudnn_first: cudnn_first_with_lse}


def best(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The best attention for a device: `cudnn_first` or `ops.attention`."""
    if (
        device.type != "cuda"
        or torch.version.cuda is None
        or not torch.backends.cudnn.is_available()
        or torch.__version__ >= CHOOSES  # TorchVersion compares numerically
    ):
        return attention
    return cudnn_first if torch.cuda.get_device_capability(device) in CARDS else attention


def with_best(ops: Ops, device: torch.device) -> Ops:
    """The bundle with the best attention for a device; a custom one is kept."""
    chosen = best(device)
    cross = chosen if ops.attention is attention else ops.attention
    within = chosen if ops.self_attention is attention else ops.self_attention
    return replace(ops, attention=cross, self_attention=within)


def describe(ops: Ops) -> str:
    """The attention of a bundle in words, for people and for run.json."""
    known = {
        attention: "scaled_dot_product_attention",
        cudnn_first: "scaled_dot_product_attention, cuDNN first",
    }
    return known.get(
        ops.self_attention, getattr(ops.self_attention, "__qualname__", str(ops.self_attention))
    )
