"""What analyses measure inside a network, as pure functions: energies of tokens, means over seeds,
where attention goes.

The definition of correct, like `ops`, and of the same letters; `ops.Ops` bundles these functions
with those of the network, and most have a Triton twin in `minicos.kernels`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

MOST_SCORES = 1 << 26  # numbers held at a time where scores are written down: 268 MB


def token_energy(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The L2 norm of every token over its channels, accumulated in float32: (... l d) -> (... l)
    float32. The paper's token energy.

    `out`, where given, receives the result and is returned: a row of a buffer over steps and
    layers.
    """
    if (
        out is not None and out.shape != x.shape[:-1]
    ):  # torch would resize it, over the rows that follow
        raise ValueError(
            f"token_energy: out must be float32 {tuple(x.shape[:-1])}, not {tuple(out.shape)}"
        )
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32, out=out)


def stream_energy(x: Tensor, before: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """Three energies of every token of a residual stream: ||x||, ||(x - mean) kept|| and
    ||x - before||, computed in float32.

    x and before l d: the stream after a block and before it; mean and kept d float32: a token to
    subtract, and a factor for each channel, 0 for those left out -> 3 l float32.
    """
    h = x.float()
    parts = h, (h - mean) * kept, h - before.float()
    return torch.stack([token_energy(part) for part in parts])


def latent_mean(x: Tensor, seeds: int, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """h <- (1 - alpha) h + alpha mean(h), the mean taken over the seeds of each case: (case seed)
    ... -> the same shape and dtype.

    The batch axis holds the `seeds` rows of the first case, then those of the second, and so on.
    Rows are added in their order, divided and blended in float32; rounded once, to x's dtype, at
    the end. alpha = 0 and seeds = 1 give x, bit for bit. `out`, where given, receives the result
    and is returned; it may be x itself.
    """
    if seeds < 1 or len(x) % seeds:
        raise ValueError(f"latent_mean: {len(x)} rows are not whole cases of {seeds} seeds")
    if out is not None and (out.shape, out.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"latent_mean: out must be {x.dtype} {tuple(x.shape)}, not {out.dtype} "
            f"{tuple(out.shape)}"
        )
    y = x
    if seeds > 1 and alpha != 0:
        h = x.unflatten(0, (-1, seeds)).float()
        mean = sum(h.unbind(1)) / seeds
        y = ((1 - alpha) * h + alpha * mean.unsqueeze(1)).flatten(0, 1).to(x.dtype)
    return y if out is None or out is y else out.copy_(y)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`attention` and, from the same pass, log sum exp(q k^T / sqrt(k)) of every row, natural, for
    `attention_mass`.

    q b n l k, k and v b n t k -> (b n l k, b n l float32). Asks the backend that SDPA would choose
    here, an enclosing `sdpa_kernel` included. Where that has no such output (math), or pads the
    heads (on a GPU: widths that are no multiple of 8), the logarithms are computed apart, which
    costs another q k^T.
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
        heads, lse = F.scaled_dot_product_attention(q, k, v), log_sum_exp(q, k)
    return heads, lse


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """log sum exp(q k^T / sqrt(k)) of every row, natural: q b n l k, k b n t k -> b n l float32."""
    rows = max(1, MOST_SCORES // (k[..., 0].numel()))
    return torch.cat([_scores(some, k).logsumexp(-1) for some in q.split(rows, 2)], dim=2)


def attention_mass(
    q: Tensor, k: Tensor, frames: int, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where attention goes, exactly, one frame of queries at a time: q b n l k, k b n t k -> (b n
    t, b n f f'), float32.

    With p = softmax(q k^T / sqrt(k)), the first is the mass that every key receives, summed over
    queries (sums to l); the second the share of each query frame's attention that goes to each key
    frame (rows sum to 1). Queries are cut into `frames` equal frames and so are keys, if there are
    as many of them as queries; else (a text) all keys are one frame.

    lse  log sum exp(q k^T / sqrt(k)) of every row, natural, b n l float32, where the forward has
         computed it (`attention_with_lse`): then p = exp(q k^T / sqrt(k) - lse), and sums are as
         good as these logarithms
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
    """Numbers of `queries` random rows of every frame of q (b n l k), none twice: b n f queries,
    ascending, int64 in 0..l/f.

    Drawn for every sample and head apart, so that errors of heads are independent, on the
    generator's device (default: CPU). A standard error needs two queries of a frame, unless it has
    but one.
    """
    size = q.shape[2] // frames
    if not min(2, size) <= queries <= size:
        raise ValueError(
            f"stratified: {queries} queries of frames of {size}; two or more, and at most all, can "
            "be drawn"
        )
    device = None if generator is None else generator.device
    draw = torch.rand(*q.shape[:2], frames, size, generator=generator, device=device)
    return draw.topk(queries).indices.sort().values.to(q.device)


def attention_mass_sampled(
    q: Tensor, k: Tensor, frames: int, rows: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`attention_mass` from some queries of every frame, those of `stratified` (b n f r): unbiased
    estimates, their standard errors.

    -> ((b n t, b n f f'), (b n t, b n f f')), float32. The cost is r f / l of the exact one. With
    s^2 the variance (r - 1) over the drawn queries of a frame, and N = l/f: Var(received) = sum
    over frames of N^2 (1 - r/N) s^2 / r, and Var(share) = (1 - r/N) s^2 / r (Cochran, Sampling
    Techniques, chapters 2 and 5; 0 where all are drawn). Intervals of two standard errors cover 95
    % where many queries of a frame share in a mass, and fewer where it is the work of a few: a key
    that none of the drawn looks at has estimate and error near 0.
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
