"""What a pass costs, counted from shapes alone: operations and memory. Estimates for the plan that
is printed before a run.

Letters: l tokens, d width, t text rows, m image rows, g distinct timesteps of a sample.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from minicos.config import DiTConfig, VAEConfig


def tokens(cfg: DiTConfig, shape: Sequence[int]) -> int:
    """l, the tokens of one sample with latents b c f h w."""
    _, _, f, h, w = shape
    pf, ph, pw = cfg.patch_size
    return (f // pf) * (h // ph) * (w // pw)


def flops(cfg: DiTConfig, shape: Sequence[int], times: int = 1) -> int:
    """Floating-point operations of one forward pass (a product and a sum count two): matrix
    products, convolution, attention.

    shape  b c f h w of the latents
    times  g, distinct timesteps of a sample: 1, or f where the first frame has its own
    Element-wise work is left out, as in torch's FlopCounterMode, with which a test compares.
    """
    d, t, m, l, (pf, ph, pw) = (  # noqa: E741
        cfg.dim,
        cfg.text_len,
        cfg.image_tokens,
        tokens(cfg, shape),
        cfg.patch_size,
    )
    embed = (
        l * d * cfg.in_dim * pf * ph * pw
        + t * (cfg.text_dim + d) * d
        + times * (cfg.freq_dim + 7 * d) * d
    )
    image = m * (cfg.image_dim + d) * cfg.image_dim
    self_attention = 4 * l * d * d + 2 * l * l * d
    cross_attention = 2 * l * d * d + 2 * (t + m) * d * d + 2 * l * (t + m) * d
    feed_forward = 2 * l * d * cfg.ffn_dim
    head = l * d * pf * ph * pw * cfg.out_dim
    return (
        2
        * shape[0]
        * (
            embed
            + image
            + cfg.num_layers * (self_attention + cross_attention + feed_forward)
            + head
        )
    )


def dit_memory(
    cfg: DiTConfig, shape: Sequence[int], dtype: torch.dtype, residual: torch.dtype
) -> int:
    """Bytes that a forward pass needs beside the weights, without kernels: the larger of two peaks
    of a block.

    Rotating q and k (float32 copies of them), and the two wide tensors of the feed-forward; the
    residual stream is there twice. Counted from what the reference code holds alive; a test
    compares with what torch allocates.
    """
    narrow, wide = dtype.itemsize, 2 * residual.itemsize + 4
    rotation = wide + (23 if 4 in (narrow, residual.itemsize) else 25)
    feed_forward = wide + (narrow if narrow < 4 else 0) + 2 * narrow * cfg.ffn_dim / cfg.dim
    return int(shape[0] * tokens(cfg, shape) * cfg.dim * max(rotation, feed_forward))


# What decoding holds alive at its worst moment, in units of the widest activation, by generation:
# as torch allocates it, and where torch has to unfold convolutions. A test measures both; what a
# card's convolutions take for themselves is not in them.
DECODING = {"2.1": (12.8, 38.5), "2.2": (20.7, 71.5)}


def vae_memory(
    cfg: VAEConfig,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that decoding a clip needs beside the weights, one latent frame at a time; `DECODING`
    times the widest activation.

    The decoder's last stage has its base width of channels at full size (folded by the patch size
    in 2.2).
    """
    frames, *_ = cfg.stride
    area = (height // cfg.patch_size) * (width // cfg.patch_size)
    widest = frames * area * (cfg.dec_dim or cfg.dim) * dtype.itemsize
    direct, unfolded = DECODING["2.2" if cfg.stage_shortcuts else "2.1"]
    onednn = (
        dtype == torch.float32 and torch.backends.mkldnn.is_available()
    )  # in bfloat16 not on every processor
    return int((unfolded if device.type == "cpu" and not onednn else direct) * widest)


def throughput(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of matrix products, measured here in a fraction of a
    second, on random numbers.
    """
    size = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            c = a @ b
        _wait_for(c)
        return time.perf_counter() - begin

    seconds(1)  # the first call chooses and loads kernels
    return 5 * 2 * size**3 / min(seconds(5) for _ in range(3))


def _wait_for(x: Tensor) -> None:
    """Until the device has computed it: reading one element of the result waits for all that
    came before.
    """
    x[0, 0].item()
