"""The mathematics of the network as pure functions, and `Ops`, the bundle that a model uses.

This file defines what is correct: the Triton kernels in `minicos.kernels` have the same names and
signatures and are tested against it. Each function documents where it rounds, because a fused
kernel has to round in the same places. Letters: b batch, l tokens (= f h w, the token grid), d
width, n heads, k head width, t text rows, and g, the number of distinct timesteps of a sample: 1,
or f if each frame has its own. Each of the g timesteps applies to l / g consecutive tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minicos.measures import (
    attention_mass,
    attention_mass_sampled,
    latent_mean,
    stream_energy,
    token_energy,
)


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Time features [cos | sin] of timesteps in 0..1000, float64: (...) -> (... dim).

    Source: wan/modules/model.py, sinusoidal_embedding_1d.
    """
    half = dim // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=timestep.device) / half)
    angle = timestep.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0, time_skip: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 3D rotary embedding, each (l, k/2) float32.

    The k/2 pairs of a head are divided between frame, height and width as k/2 - 2(k/6), k/6 and
    k/6; each axis uses the full range of frequencies. Angles are computed in float64 on the host.
    Source: wan/modules/model.py, rope_params and rope_apply.

    Args:
        time_skip: position of the second frame if there are exactly two (ChronoEdit); None: 1.
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
        angles.append(
            angle.view([size if a == axis else 1 for a in range(3)] + [share]).expand(*grid, share)
        )
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * weight over the last axis.

    Computed in float32, rounded to x's dtype before the multiplication by the weight, as in the
    official code, and rounded to `dtype` at the end (None: the dtype of the product).
    """
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = y.to(x.dtype) * weight
    return y if dtype is None else y.to(dtype)


def rms_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    angles: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMS norm of q and k over the full width, then the rotation of each head: b l d -> b n l k.

    Pairs are interleaved: (x[2j], x[2j+1]) turns by angle j. Rotated in float32 and rounded to the
    dtype of q and k at the end.
    """
    cos, sin = (a.to(q.device).unsqueeze(1) for a in angles)  # l 1 k/2
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = rms_norm(x, weight, eps).float().unflatten(-1, (heads, -1, 2))  # b l n k/2 2
        even, odd = y.unbind(-1)
        # filled in two strides: on a CPU torch.stack takes longer than the rotation
        pairs = torch.empty_like(y)
        pairs[..., 0] = even * cos - odd * sin
        pairs[..., 1] = even * sin + odd * cos
        turned.append(pairs.to(x.dtype).flatten(-2).transpose(1, 2))  # b n l k
    return turned[0], turned[1]


def layer_norm(
    x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Layer norm over the last axis, computed in float32 and rounded to x's dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """layer_norm(x) (1 + scale) + shift, computed in float32 and rounded to `dtype`.

    x is b l d; scale and shift are b g d.
    """
    y = _per_timestep(layer_norm(x, eps).float(), scale)
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(dtype)


def gated_add(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    dtype: torch.dtype = torch.float32,
    energy: Tensor | None = None,
) -> Tensor:
    """x + gate y, computed in float32 and rounded to `dtype`; x and y b l d, gate b g d.

    `energy` (b l, float32), if given, receives the token energy of the rounded result.
    """
    gated = _per_timestep(y.float(), gate) * gate.unsqueeze(2)
    out = (x.float() + gated.flatten(1, 2)).to(dtype)
    if energy is not None:
        token_energy(out, energy)
    return out


def gated_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """x + gate y, rounded to `residual_dtype`, and the affine layer norm of it, rounded to `dtype`.

    x and y are b l d, gate is b g d, weight and bias are d.
    """
    x = gated_add(x, y, gate, residual_dtype)
    return x, layer_norm(x, eps, weight, bias).to(dtype)


def add_modulated_norm(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """x + y, rounded to `residual_dtype`, and the `modulated_norm` of it, rounded to `dtype`.

    x and y are b l d, scale and shift are b g d.
    """
    x = (x.float() + y.float()).to(residual_dtype)
    return x, modulated_norm(x, scale, shift, eps, dtype)


def _per_timestep(x: Tensor, modulation: Tensor) -> Tensor:
    """View b l d as b g (l/g) d, for a modulation b g d."""
    return x.unflatten(1, (modulation.shape[1], -1))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(k)) v over all keys: q b n l k, k and v b n t k -> b n l k."""
    return F.scaled_dot_product_attention(q, k, v)


self_attention = attention  # a separate op, so that sequence parallelism can replace it alone


@dataclass(frozen=True)
class Ops:
    """The operations that a model is built from, and those that analyses use to measure it.

    `REFERENCE` bundles this file and `measures`; `with_kernels` replaces every operation that has
    a Triton kernel.
    """

    rms_norm: Callable[..., Tensor] = rms_norm
    rms_rope: Callable[..., tuple[Tensor, Tensor]] = rms_rope
    modulated_norm: Callable[..., Tensor] = modulated_norm
    gated_add: Callable[..., Tensor] = gated_add
    gated_add_norm: Callable[..., tuple[Tensor, Tensor]] = gated_add_norm
    add_modulated_norm: Callable[..., tuple[Tensor, Tensor]] = add_modulated_norm
    self_attention: Callable[..., Tensor] = self_attention
    attention: Callable[..., Tensor] = attention
    token_energy: Callable[..., Tensor] = token_energy
    stream_energy: Callable[..., Tensor] = stream_energy
    latent_mean: Callable[..., Tensor] = latent_mean
    attention_mass: Callable[..., tuple[Tensor, Tensor]] = attention_mass
    attention_mass_sampled: Callable[..., tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = (
        attention_mass_sampled
    )

    def with_kernels(self) -> "Ops":
        """The same bundle with the Triton kernels. Raises ImportError if Triton is missing."""
        from minicos.kernels.add_norm import add_modulated_norm, gated_add_norm
        from minicos.kernels.attention_mass import attention_mass, attention_mass_sampled
        from minicos.kernels.gated_add import gated_add
        from minicos.kernels.latent_mean import latent_mean
        from minicos.kernels.modulated_norm import modulated_norm
        from minicos.kernels.rms_rope import rms_norm, rms_rope
        from minicos.kernels.token_energy import stream_energy, token_energy

        return replace(
            self,
            rms_norm=rms_norm,
            rms_rope=rms_rope,
            modulated_norm=modulated_norm,
            gated_add=gated_add,
            gated_add_norm=gated_add_norm,
            add_modulated_norm=add_modulated_norm,
            token_energy=token_energy,
            stream_energy=stream_energy,
            latent_mean=latent_mean,
            attention_mass=attention_mass,
            attention_mass_sampled=attention_mass_sampled,
        )


REFERENCE = Ops()
