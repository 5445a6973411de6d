"""The mathematics of the network as pure functions, and `Ops`, the bundle of them that a model is built with.

This file is the definition of *correct*: the Triton kernels in `minicos.kernels` carry the same names and signatures and
are tested against it. Each function says where it rounds, because a fused kernel has to round in the same places.
Letters: b batch, l tokens (= f h w, the token grid), d width, n heads, k head width, t text rows, and g: the number of
distinct timesteps of a sample, 1 or f (when frames have their own), each of which serves l / g consecutive tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let float32 convolutions compute in float32 (a context, or a decorator of a function that is no generator).

    On CUDA torch computes them in TF32 by default, with 10 bits of mantissa, and the VAE is promised in float32. The
    setting is the process's; whatever it was is put back. Matrix products are float32 unless the user has asked for TF32
    (`torch.set_float32_matmul_precision`), and that choice is left alone.
    """
    cudnn = torch.backends.cudnn
    switch = cudnn, "allow_tf32"
    try:
        before, exact = getattr(*switch), False
    except RuntimeError:  # torch does not read its older switch once the newer ones have been used
        switch = cudnn.conv, "fp32_precision"
        before, exact = getattr(*switch), "ieee"
    setattr(*switch, exact)
    try:
        yield
    finally:
        setattr(*switch, before)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """[cos | sin] features of timesteps in 0..1000, in float64: (...) -> (... dim). wan/modules/model.py, sinusoidal_embedding_1d."""
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0, time_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 3D rotary embedding, each (l, k/2) float32, angles built in float64 on the host.

    The k/2 pairs of a head are shared out between frame, height and width as k/2 - 2(k/6), k/6, k/6; each axis has its own
    full range of frequencies. wan/modules/model.py, rope_params and rope_apply.

    time_skip (ChronoEdit): where there are exactly two frames, the second stands at this position instead of 1.
    """
    pairs = head_dim // 2
    shares = (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3)
    angles = []
    for axis, (size, share) in enumerate(zip(grid, shares, strict=True)):
        frequency = theta ** (-torch.arange(share, dtype=torch.float64) / share)
        position = torch.arange(size, dtype=torch.float64)
        if axis == 0 and size == 2 and time_skip is not None:
            position *= time_skip
        angle = position[:, None] * frequency
        angles.append(angle.view([size if a == axis else 1 for a in range(3)] + [share]).expand(*grid, share))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis: computed in float32, rounded to x's dtype before the weight, as the official code does."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def rms_rope(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, angles: tuple[Tensor, Tensor], heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """RMS norm over the full width, then the rotation of each head, of q and of k: b l d -> b n l k, rounded to their dtype at the end.

    Pairs are interleaved: (x[2j], x[2j+1]) turns by angle j. Rotated in float32.
    """
    cos, sin = (a.to(q.device) for a in angles)
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = rearrange(rms_norm(x, weight, eps).float(), "b l (n k two) -> two b n l k", n=heads, two=2)
        pairs = torch.stack([y[0] * cos - y[1] * sin, y[0] * sin + y[1] * cos], dim=-1)
        turned.append(pairs.flatten(-2).to(x.dtype))
    return turned[0], turned[1]


def layer_norm(x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """Layer norm over the last axis: computed in float32, rounded to x's dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """layer_norm(x) (1 + scale) + shift, in float32, rounded to `dtype` at the end; x b l d, scale and shift b g d."""
    y = _per_timestep(layer_norm(x, eps).float(), scale)
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(dtype)


def gated_add(
    x: Tensor, y: Tensor, gate: Tensor | None, dtype: torch.dtype = torch.float32, energy: Tensor | None = None
) -> Tensor:
    """x + y gate, in float32, rounded to `dtype` at the end; x and y b l d, gate b g d, or None: x + y.

    `energy`, where given, receives the token energy of the result, rounded as it is: (b l) float32.
    """
    y = y.float() if gate is None else (_per_timestep(y.float(), gate) * gate.unsqueeze(2)).flatten(1, 2)
    out = (x.float() + y).to(dtype)
    if energy is not None:
        token_energy(out, energy)
    return out


def add_norm(
    x: Tensor, y: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float,
    residual: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """gated_add(x, y, gate), rounded to `residual`, and the norm of that, rounded to `dtype`: what stands between two sub-layers.

    scale and shift b g d modulate the norm (`modulated_norm`); of shape d they are weight and bias of an affine one (`layer_norm`).
    """
    x = gated_add(x, y, gate, residual)
    affine = scale.ndim == 1
    return x, layer_norm(x, eps, scale, shift).to(dtype) if affine else modulated_norm(x, scale, shift, eps, dtype)


def _per_timestep(x: Tensor, modulation: Tensor) -> Tensor:
    """b l d -> b g (l/g) d, where modulation is b g d."""
    return x.unflatten(1, (modulation.shape[1], -1))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(k)) v over all keys: q b n l k, k and v b n t k -> b n l k."""
    return F.scaled_dot_product_attention(q, k, v)


self_attention = attention  # an op of its own, so that sequence parallelism is one op too


def token_energy(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The L2 norm of every token over its channels, accumulated in float32: (... l d) -> (... l) float32. The paper's token energy.

    `out`, where given, receives the result and is returned: a row of a buffer over steps and layers.
    """
    if out is not None and out.shape != x.shape[:-1]:  # torch would resize it, over the rows that follow
        raise ValueError(f"token_energy: out must be float32 {tuple(x.shape[:-1])}, not {tuple(out.shape)}")
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32, out=out)


def latent_mean(x: Tensor, seeds: int, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """h <- (1 - alpha) h + alpha mean(h), the mean taken over the seeds of each case: (case seed) ... -> the same shape and dtype.

    The batch axis holds the `seeds` rows of the first case, then those of the second, and so on. Rows are added in their order,
    divided and blended in float32; rounded once, to x's dtype, at the end. alpha = 0 and seeds = 1 give x, bit for bit. `out`,
    where given, receives the result and is returned; it may be x itself.
    """
    if seeds < 1 or len(x) % seeds:
        raise ValueError(f"latent_mean: {len(x)} rows are not whole cases of {seeds} seeds")
    if out is not None and (out.shape, out.dtype) != (x.shape, x.dtype):
        raise ValueError(f"latent_mean: out must be {x.dtype} {tuple(x.shape)}, not {out.dtype} {tuple(out.shape)}")
    y = x
    if seeds > 1 and alpha != 0:
        h = x.unflatten(0, (-1, seeds)).float()
        mean = sum(h.unbind(1)) / seeds
        y = ((1 - alpha) * h + alpha * mean.unsqueeze(1)).flatten(0, 1).to(x.dtype)
    return y if out is None or out is y else out.copy_(y)


def attention_mass(q: Tensor, k: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Where attention goes, exactly, one frame of queries at a time: q b n l k, k b n t k -> (b n t, b n f f'), float32.

    With p = softmax(q k^T / sqrt(k)), the first is the mass that every key receives, summed over queries (sums to l); the second
    the share of each query frame's attention that goes to each key frame (rows sum to 1). Queries are cut into `frames` equal
    frames and so are keys, if there are as many of them as queries; else (a text) all keys are one frame.
    """
    key_frames = frames if k.shape[2] == q.shape[2] else 1
    received = k.new_zeros(k.shape[:3], dtype=torch.float32)
    rows = []
    for query in q.unflatten(2, (frames, -1)).unbind(2):  # b n l/f k
        p = torch.softmax((query.float() @ k.float().mT) * q.shape[-1] ** -0.5, dim=-1)
        mass = p.sum(2)  # b n t
        received += mass
        rows.append(mass.unflatten(2, (key_frames, -1)).sum(-1) / query.shape[2])
    return received, torch.stack(rows, dim=2)


@dataclass(frozen=True)
class Ops:
    """The operations a model is built from. `REFERENCE` is this file; `with_kernels` swaps in every Triton twin that exists."""

    rms_rope: Callable[..., tuple[Tensor, Tensor]] = rms_rope
    modulated_norm: Callable[..., Tensor] = modulated_norm
    gated_add: Callable[..., Tensor] = gated_add
    add_norm: Callable[..., tuple[Tensor, Tensor]] = add_norm
    self_attention: Callable[..., Tensor] = self_attention
    attention: Callable[..., Tensor] = attention
    token_energy: Callable[..., Tensor] = token_energy
    latent_mean: Callable[..., Tensor] = latent_mean

    def with_kernels(self) -> "Ops":
        """The same bundle with Triton kernels in place. Raises ImportError where Triton is missing: the caller chose them."""
        from dataclasses import replace

        from minicos.kernels.add_norm import add_norm
        from minicos.kernels.gated_add import gated_add
        from minicos.kernels.modulated_norm import modulated_norm
        from minicos.kernels.rms_rope import rms_rope
        from minicos.kernels.token_energy import token_energy

        return replace(
            self,
            rms_rope=rms_rope,
            modulated_norm=modulated_norm,
            gated_add=gated_add,
            add_norm=add_norm,
            token_energy=token_energy,
        )


REFERENCE = Ops()
