"""The cost of a pass in operations and memory, computed from shapes alone. These are the estimates
of the plan that is printed before a run.

Letters: l tokens, d width, t text rows, m image rows, g distinct timesteps of a sample.
"""

import time
from collections.abc import Callable, Sequence

import torch

from minicos.config import DiTConfig, VAEConfig
from minicos.vae import at_once


def tokens(cfg: DiTConfig, shape: Sequence[int]) -> int:
    """l, the number of tokens of one sample with latents b c f h w."""
    _, _, f, h, w = shape
    pf, ph, pw = cfg.patch_size
    return (f // pf) * (h // ph) * (w // pw)


def flops(cfg: DiTConfig, shape: Sequence[int], times: int = 1) -> int:
    """Floating-point operations of one forward pass: matrix products, convolution and attention,
    with a multiplication and an addition counted as two. Element-wise operations are not counted,
    as in torch's FlopCounterMode, against which this is tested.

    Args:
        shape: b c f h w of the latents.
        times: g, distinct timesteps of a sample: 1, or f if the first frame has its own.
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
    """Bytes that a forward pass needs in addition to the weights, without kernels.

    This is the larger of two peaks inside a block: the rotation of q and k (float32 copies of
    them), and the two wide tensors of the feed-forward. The residual stream counts twice. Derived
    from the tensors that the reference code keeps alive, and tested against torch's allocations.
    """
    narrow, wide = dtype.itemsize, 2 * residual.itemsize + 4
    rotation = wide + (23 if 4 in (narrow, residual.itemsize) else 25)
    feed_forward = wide + (narrow if narrow < 4 else 0) + 2 * narrow * cfg.ffn_dim / cfg.dim
    return int(shape[0] * tokens(cfg, shape) * cfg.dim * max(rotation, feed_forward))


# Memory that decoding holds at its peak, in units of the widest activation, by generation: as torch
# allocates it, and if torch has to unfold convolutions. A test measures both. Workspace of a card's
# convolutions is not included.
DECODING = {"2.1": (12.8, 38.5), "2.2": (20.7, 71.5)}


def vae_memory(
    cfg: VAEConfig,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Bytes that decoding a clip needs in addition to the weights, in the chunks of `vae.at_once`:
    `DECODING` times the widest activation.

    The decoder's last stage has its base width of channels at full size (divided by the patch size
    in version 2.2).
    """
    frames = cfg.stride[0] * at_once(height, width)
    area = (height // cfg.patch_size) * (width // cfg.patch_size)
    widest = frames * area * (cfg.dec_dim or cfg.dim) * dtype.itemsize
    direct, unfolded = DECODING["2.2" if cfg.stage_shortcuts else "2.1"]
    # oneDNN does not unfold convolutions; in bfloat16 it serves only some processors
    onednn = dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return int((unfolded if device.type == "cpu" and not onednn else direct) * widest)


def throughput(
    device: torch.device, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Floating-point operations per second of matrix products on random numbers, measured here in a
    fraction of a second. `clock` gives seconds.
    """
    size = 512 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def seconds(repeats: int) -> float:
        begin = clock()
        for _ in range(repeats):
            c = a @ b.mT  # as in a linear layer; in bfloat16 some processors are slower otherwise
        c[0, 0].item()  # waits until the device has finished
        return clock() - begin

    seconds(1)  # the first call selects and loads kernels
    return 5 * 2 * size**3 / min(seconds(5) for _ in range(3))
