"""The mathematics of the network as pure functions, and `Ops`, the bundle of them that a model is built with.

This file is the definition of *correct*: the Triton kernels in `minicos.kernels` carry the same names and signatures and
are tested against it. Each function says where it rounds, because a fused kernel has to round in the same places.
Letters: b batch, l tokens (= f h w, the token grid), d width, n heads, k head width, t text rows, and g: the number of
distinct timesteps of a sample, 1 or f (when frames have their own), each of which serves l / g consecutive tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend


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
        angles.append(
            angle.view([size if a == axis else 1 for a in range(3)] + [share]).expand(*grid, share)
        )
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis: computed in float32, rounded to x's dtype before the weight, as the official code does."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def rms_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    angles: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """RMS norm over the full width, then the rotation of each head, of q and of k: b l d -> b n l k, rounded to their dtype at the end.

    Pairs are interleaved: (x[2j], x[2j+1]) turns by angle j. Rotated in float32.
    """
    cos, sin = (a.to(q.device).unsqueeze(1) for a in angles)  # l 1 k/2
    turned = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        y = rms_norm(x, weight, eps).float().unflatten(-1, (heads, -1, 2))  # b l n k/2 2
        even, odd = y.unbind(-1)
        pairs = torch.empty_like(
            y
        )  # filled in two strides: on a CPU torch.stack takes longer than the rotation
        pairs[..., 0] = even * cos - odd * sin
        pairs[..., 1] = even * sin + odd * cos
        turned.append(pairs.to(x.dtype).flatten(-2).transpose(1, 2))  # b n l k
    return turned[0], turned[1]


def layer_norm(
    x: Tensor, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Layer norm over the last axis: computed in float32, rounded to x's dtype."""
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)


def modulated_norm(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """layer_norm(x) (1 + scale) + shift, in float32, rounded to `dtype` at the end; x b l d, scale and shift b g d."""
    y = _per_timestep(layer_norm(x, eps).float(), scale)
    return (y * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)).flatten(1, 2).to(dtype)


def gated_add(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    dtype: torch.dtype = torch.float32,
    energy: Tensor | None = None,
) -> Tensor:
    """x + y gate, in float32, rounded to `dtype` at the end; x and y b l d, gate b g d, or None: x + y.

    `energy`, where given, receives the token energy of the result, rounded as it is: (b l) float32.
    """
    gated = (
        y.float()
        if gate is None
        else (_per_timestep(y.float(), gate) * gate.unsqueeze(2)).flatten(1, 2)
    )
    out = (x.float() + gated).to(dtype)
    if energy is not None:
        token_energy(out, energy)
    return out


def add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    residual: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """gated_add(x, y, gate), rounded to `residual`, and the norm of that, rounded to `dtype`: what stands between two sub-layers.

    scale and shift b g d modulate the norm (`modulated_norm`); of shape d they are weight and bias of an affine one (`layer_norm`).
    """
    x = gated_add(x, y, gate, residual)
    affine = scale.ndim == 1
    return x, layer_norm(x, eps, scale, shift).to(dtype) if affine else modulated_norm(
        x, scale, shift, eps, dtype
    )


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
    if (
        out is not None and out.shape != x.shape[:-1]
    ):  # torch would resize it, over the rows that follow
        raise ValueError(
            f"token_energy: out must be float32 {tuple(x.shape[:-1])}, not {tuple(out.shape)}"
        )
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
        raise ValueError(
            f"latent_mean: out must be {x.dtype} {tuple(x.shape)}, not {out.dtype} {tuple(out.shape)}"
        )
    y = x
    if seeds > 1 and alpha != 0:
        h = x.unflatten(0, (-1, seeds)).float()
        mean = sum(h.unbind(1)) / seeds
        y = ((1 - alpha) * h + alpha * mean.unsqueeze(1)).flatten(0, 1).to(x.dtype)
    return y if out is None or out is y else out.copy_(y)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` and, from the same pass, log sum exp(q k^T / sqrt(k)) of every row, natural, for `attention_mass`.

    q b n l k, k and v b n t k -> (b n l k, b n l float32). Asks the backend that SDPA would choose here, an enclosing
    `sdpa_kernel` included. Where that has no such output (math), or pads the heads (on a GPU: widths that are no multiple of 8),
    the logarithms are computed apart, which costs another q k^T.
    """
    aten, backend = torch.ops.aten, SDPBackend(torch._fused_sdp_choice(q, k, v))
    if q.is_cuda and q.shape[-1] % 8:
        backend = SDPBackend.MATH
    if backend == SDPBackend.FLASH_ATTENTION and q.device.type == "cpu":
        heads, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif backend == SDPBackend.FLASH_ATTENTION:
        heads, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v)
    elif backend == SDPBackend.CUDNN_ATTENTION:
        heads, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        lse = lse.view(q.shape[:3])  # b n l 1
    elif backend == SDPBackend.EFFICIENT_ATTENTION:
        heads, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)
        lse = lse[..., : q.shape[2]]  # l is padded to a multiple of 32
    else:
        heads, lse = (
            attention(q, k, v),
            torch.cat([_scores(row, k).logsumexp(-1) for row in q.split(1024, 2)], dim=2),
        )
    return heads, lse


def attention_mass(
    q: Tensor, k: Tensor, frames: int, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where attention goes, exactly, one frame of queries at a time: q b n l k, k b n t k -> (b n t, b n f f'), float32.

    With p = softmax(q k^T / sqrt(k)), the first is the mass that every key receives, summed over queries (sums to l); the second
    the share of each query frame's attention that goes to each key frame (rows sum to 1). Queries are cut into `frames` equal
    frames and so are keys, if there are as many of them as queries; else (a text) all keys are one frame.

    lse  log sum exp(q k^T / sqrt(k)) of every row, natural, b n l float32, where the forward has computed it
         (`attention_with_lse`): then p = exp(q k^T / sqrt(k) - lse), and sums are as good as these logarithms
    """
    key_frames = frames if k.shape[2] == q.shape[2] else 1
    received = k.new_zeros(k.shape[:3], dtype=torch.float32)
    rows = []
    logs = [None] * frames if lse is None else lse.unflatten(2, (frames, -1)).unbind(2)
    for query, log in zip(q.unflatten(2, (frames, -1)).unbind(2), logs, strict=True):  # b n l/f k
        scores = _scores(query, k)
        p = torch.softmax(scores, dim=-1) if log is None else (scores - log.unsqueeze(-1)).exp()
        mass = p.sum(2)  # b n t
        received += mass
        rows.append(mass.unflatten(2, (key_frames, -1)).sum(-1) / query.shape[2])
    return received, torch.stack(rows, dim=2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return (q.float() @ k.float().mT) * q.shape[-1] ** -0.5


def stratified(
    q: Tensor, frames: int, queries: int, generator: torch.Generator | None = None
) -> Tensor:
    """Numbers of `queries` random rows of every frame of q (b n l k), none twice: b n f queries, ascending, int64 in 0..l/f.

    Drawn for every sample and head apart, so that errors of heads are independent, on the generator's device (default: CPU).
    A standard error needs two queries of a frame, unless it has but one.
    """
    size = q.shape[2] // frames
    if not min(2, size) <= queries <= size:
        raise ValueError(
            f"stratified: {queries} queries of frames of {size}; two or more, and at most all, can be drawn"
        )
    device = None if generator is None else generator.device
    draw = torch.rand(*q.shape[:2], frames, size, generator=generator, device=device)
    return draw.topk(queries).indices.sort().values.to(q.device)


def attention_mass_sampled(
    q: Tensor, k: Tensor, frames: int, rows: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`attention_mass` from some queries of every frame, those of `stratified` (b n f r): unbiased estimates, their standard errors.

    -> ((b n t, b n f f'), (b n t, b n f f')), float32. The cost is r f / l of the exact one. With s^2 the variance (r - 1) over
    the drawn queries of a frame, and N = l/f: Var(received) = sum over frames of N^2 (1 - r/N) s^2 / r, and Var(share) =
    (1 - r/N) s^2 / r (Cochran, Sampling Techniques, chapters 2 and 5; 0 where all are drawn). Intervals of two standard
    errors cover 95 % where many queries of a frame share in a mass, and fewer where it is the work of a few: a key that none of
    the drawn looks at has estimate and error near 0.
    """
    key_frames = frames if k.shape[2] == q.shape[2] else 1
    size, count = q.shape[2] // frames, rows.shape[-1]
    left = (1 - count / size) / count
    drawn = q.unflatten(2, (frames, -1)).gather(
        3, rows.unsqueeze(-1).expand(-1, -1, -1, -1, q.shape[-1])
    )  # b n f r k
    received = k.new_zeros(k.shape[:3], dtype=torch.float32)
    variance, shares, errors = torch.zeros_like(received), [], []
    for query in drawn.unbind(2):
        p = torch.softmax(_scores(query, k), dim=-1)  # b n r t
        share = p.unflatten(3, (key_frames, -1)).sum(-1)  # b n r f'
        received += p.mean(2) * size
        variance += p.var(2, correction=min(1, count - 1)) * (size**2 * left)
        shares.append(share.mean(2))
        errors.append((share.var(2, correction=min(1, count - 1)) * left).sqrt())
    return (received, torch.stack(shares, dim=2)), (variance.sqrt(), torch.stack(errors, dim=2))


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
    attention_mass: Callable[..., tuple[Tensor, Tensor]] = attention_mass
    attention_mass_sampled: Callable[..., tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = (
        attention_mass_sampled
    )

    def with_kernels(self) -> "Ops":
        """The same bundle with Triton kernels in place. Raises ImportError where Triton is missing: the caller chose them."""
        from minicos.kernels.add_norm import add_norm
        from minicos.kernels.attention_mass import attention_mass, attention_mass_sampled
        from minicos.kernels.gated_add import gated_add
        from minicos.kernels.latent_mean import latent_mean
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
            latent_mean=latent_mean,
            attention_mass=attention_mass,
            attention_mass_sampled=attention_mass_sampled,
        )


REFERENCE = Ops()
