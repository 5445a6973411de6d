"""What analyses measure inside a network, as pure functions: token energies, means over seeds, and
where attention goes.

Like `ops`, this file defines what is correct, and uses the same letters. `ops.Ops` bundles these
functions with those of the network; most have a Triton kernel in `minicos.kernels`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

MOST_SCORES = 1 << 26  # attention scores held at a time: 268 MB


def token_energy(x: Tensor, out: Tensor | None = None) -> Tensor:
    """The L2 norm of every token over its channels, accumulated in float32: (... l d) -> (... l)
    float32. This is the paper's token energy.

    `out`, if given, receives the result and is returned, e.g. a row of a buffer over steps and
    layers.
    """
    if (
        out is not None and out.shape != x.shape[:-1]
    ):  # torch would resize it and overwrite the rows that follow
        raise ValueError(
            f"token_energy: out must be float32 {tuple(x.shape[:-1])}, not {tuple(out.shape)}"
        )
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32, out=out)


def stream_energy(x: Tensor, before: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """Three energies of every token of residual streams, computed in float32: ||x||,
    ||(x - mean) kept|| and ||x - before||.

    Args:
        x: the stream after a block, ... l d.
        before: the stream before the block, ... l d.
        mean: a token to subtract, ... d float32.
        kept: a factor for each channel, 0 for the excluded ones, ... d float32.

    Returns:
        The three energies, 3 ... l float32.
    """
    h = x.float()
    parts = h, (h - mean.unsqueeze(-2)) * kept.unsqueeze(-2), h - before.float()
    return torch.stack([token_energy(part) for part in parts])


def latent_mean(x: Tensor, seeds: int, alpha: float = 1.0, out: Tensor | None = None) -> Tensor:
    """h <- (1 - alpha) h + alpha mean(h), with the mean over the seeds of each case: (case seed)
    ... -> the same shape and dtype.

    The batch axis holds the `seeds` rows of the first case, then those of the second, and so on.
    Rows are summed in order and blended in float32, and rounded to x's dtype once, at the end. With
    alpha = 0 or seeds = 1 the result is x, bit for bit. `out`, if given, receives the result and is
    returned; it may be x itself.
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
    """`attention`, and the log sum exp(q k^T / sqrt(k)) of every row (natural logarithm) from the
    same pass, for `attention_mass`.

    Uses the backend that SDPA would choose here, and respects an enclosing `sdpa_kernel`. The
    logarithms are computed separately, at the cost of another q k^T, if the backend does not return
    them (math) or pads the heads (on a GPU: widths that are not multiples of 8).

    Args:
        q: queries, b n l k.
        k: keys, b n t k.
        v: values, b n t k.

    Returns:
        The heads, b n l k, and the logarithms, b n l float32.
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
        lse = lse[..., : q.shape[2]]  # l was padded to a multiple of 32
    else:
        heads, lse = F.scaled_dot_product_attention(q, k, v), log_sum_exp(q, k)
    return heads, lse


def log_sum_exp(q: Tensor, k: Tensor) -> Tensor:
    """log sum exp(q k^T / sqrt(k)) of every row, natural logarithm: b n l k, b n t k -> b n l."""
    rows = max(1, MOST_SCORES // (k[..., 0].numel()))
    return torch.cat([_scores(some, k).logsumexp(-1) for some in q.split(rows, 2)], dim=2)


def attention_mass(
    q: Tensor, k: Tensor, frames: int, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where attention goes, computed exactly, one frame of queries at a time.

    With p = softmax(q k^T / sqrt(k)), the first result is the mass that every key receives, summed
    over queries (it sums to l). The second is the share of each query frame's attention that goes
    to each key frame (rows sum to 1). Queries are divided into `frames` equal frames, and so are
    keys if there are as many of them as queries; otherwise (text) all keys count as one frame.

    Args:
        q: queries, b n l k.
        k: keys, b n t k.
        frames: number of query frames f.
        lse: log sum exp(q k^T / sqrt(k)) of every row, natural, b n l float32, if the forward pass
            has computed it (`attention_with_lse`). Then p = exp(q k^T / sqrt(k) - lse), and the
            sums are as accurate as these logarithms.

    Returns:
        Mass received by each key, b n t, and shares between frames, b n f f', both float32.
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
    """Indices of `queries` random rows of every frame of q (b n l k), without repetition: b n f
    queries, ascending, int64 in 0..l/f.

    Rows are drawn independently for every sample and head, so that the errors of heads are
    independent, on the generator's device (default: CPU). A standard error needs two queries per
    frame, unless the frame has only one.
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
    """Estimate `attention_mass` from some queries of every frame, those of `stratified` (b n f r).

    The estimates are unbiased, and the cost is r f / l of the exact computation. With s^2 the
    variance (r - 1) over the drawn queries of a frame, and N = l/f: Var(received) = sum over frames
    of N^2 (1 - r/N) s^2 / r, and Var(share) = (1 - r/N) s^2 / r (Cochran, Sampling Techniques,
    chapters 2 and 5; 0 if all queries are drawn). Intervals of two standard errors cover 95 % if
    many queries of a frame contribute to a mass, and fewer if few queries dominate it: a key that
    no drawn query attends to has both estimate and error near 0.

    Returns:
        The estimates (b n t, b n f f') and their standard errors (b n t, b n f f'), float32.
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
