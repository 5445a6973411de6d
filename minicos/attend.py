"""Attention with hooks on the keys that a query may attend to, and on the attention weights.

Two hook points of every attention are computed only if a hook is registered on them:

    allowed  b n l t  bool     the keys that each query may attend to; initially all
    pattern  b n l t  float32  softmax(q k^T / sqrt(k)) over the allowed keys

A third, `lse` (b n l, float32), is read-only: log sum exp(q k^T / sqrt(k)) over all keys. It is a
by-product of the pass itself if PyTorch computes it and no hook intervenes.

Without interventions, attention is the model's own operation, and observing hooks do not change a
single bit. If a hook returns other keys, the softmax runs over these keys only, and a query without
any key gets zeros. If a hook returns another pattern, the heads are the product of it and v.

The l x t matrix of a long video does not fit into memory. Then these two points are called several
times in a pass, each time for consecutive queries, and `site.tokens` gives the range of queries.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from minicos import measures
from minicos.attention import WITH_LSE
from minicos.errors import MinicosError
from minicos.hooks import Hooks, Site

MOST_PAIRS = 1 << 28  # queries times keys in one call: 268 MB of bools
MOST_WEIGHTS = 1 << 26  # entries of a pattern in one call, samples and heads included: 268 MB


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Tensor],
    hooks: Hooks,
    suffix: str = "",
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(k)) v under the hooks on `allowed` and `pattern`: q b n l k, k and v
    b n t k -> b n l k.

    Args:
        attention: the operation to use if no hook intervenes.
        suffix: appended to the names of the two points, for the second attention of a module.
        mask: the keys that are allowed initially (bool, broadcast to b n l t), passed to
            `attention` as `attn_mask`; None: all.
    """
    whole = attention if mask is None else partial(attention, attn_mask=mask)
    if not hooks:
        return whole(q, k, v)
    heads = _limited(q, k, v, attention, hooks, suffix, mask)
    if not hooks.watches(name := f"lse{suffix}"):
        return whole(q, k, v) if heads is None else heads
    if heads is None and mask is None and attention in WITH_LSE:
        heads, lse = WITH_LSE[attention](q, k, v)
    else:
        heads = whole(q, k, v) if heads is None else heads
        lse = measures.log_sum_exp(q, k)
    if hooks.replaced(name, lse) is not None:
        raise MinicosError(
            f"a hook on {name} returned a tensor, and nothing is computed from that point: replace "
            "allowed or pattern"
        )
    return heads


def _limited(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: Callable[..., Tensor],
    hooks: Hooks,
    suffix: str,
    mask: Tensor | None,
) -> Tensor | None:
    """The heads under the hooks on `allowed` and `pattern`; None if these changed nothing."""
    names = f"allowed{suffix}", f"pattern{suffix}"
    limit, shown = (hooks.watches(name) for name in names)
    if not (limit or shown):
        return None
    if mask is not None:
        mask = mask.expand(*q.shape[:3], k.shape[2])
    blocks = [*_blocks(q, k, shown)]
    masks = [None if mask is None else mask[:, :, rows] for rows in blocks]
    parts = [
        _block(q[:, :, rows], k, v, hooks.at(tokens=rows), names, seen)
        for rows, seen in zip(blocks, masks, strict=True)
    ]
    if all(part is None for part in parts):
        return None
    for i, (rows, seen) in enumerate(zip(blocks, masks, strict=True)):
        if parts[i] is None:
            some = attention if seen is None else partial(attention, attn_mask=seen)
            parts[i] = some(q[:, :, rows], k, v)
    return torch.cat([part for part in parts if part is not None], dim=2)


def pattern(q: Tensor, k: Tensor, allowed: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(k)) over the allowed keys (bool b n l t, None: all), with zeros for a
    query without keys: q b n l k, k b n t k -> b n l t float32.
    """
    scores = (q.float() @ k.float().mT) * q.shape[-1] ** -0.5
    if allowed is None:
        return scores.softmax(-1)
    seen, blind = _left(allowed)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(blind, 0)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attention over the allowed keys (bool, b n l t or of size 1 along b and n), with zeros for a
    query without keys: -> b n l k.
    """
    seen, blind = _left(allowed)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).masked_fill(blind, 0)


def _left(allowed: Tensor) -> tuple[Tensor, Tensor]:
    """The allowed keys, and a mask of queries that have none. Such queries are given all keys,
    since a softmax over nothing is NaN, and their result must be set to zero.
    """
    blind = ~allowed.any(-1, keepdim=True)
    return allowed | blind, blind


def _blocks(q: Tensor, k: Tensor, shown: bool) -> Iterator[slice]:
    """Slices of consecutive queries that fit into memory; `slice(None)` if all do."""
    b, n, length, _ = q.shape
    rows = MOST_PAIRS // k.shape[2]
    if shown:
        rows = min(rows, MOST_WEIGHTS // (b * n * k.shape[2]))
    if rows >= length:
        yield slice(None)
        return
    for start in range(0, length, max(1, rows)):
        yield slice(start, min(length, start + max(1, rows)))


def _block(
    q: Tensor, k: Tensor, v: Tensor, hooks: Hooks, names: tuple[str, str], mask: Tensor | None
) -> Tensor | None:
    """The heads of some queries; None if hooks changed nothing."""
    one = torch.ones((), dtype=torch.bool, device=q.device)
    everything = one.expand(*q.shape[:3], k.shape[2]) if mask is None else mask
    allowed = hooks(names[0], everything)
    free = allowed is everything
    if hooks.watches(names[1]):
        weights = pattern(q, k, mask if free else allowed)
        if (changed := hooks.replaced(names[1], weights)) is not None:
            return (changed @ v.float()).to(v.dtype)
    return None if free else masked_attention(q, k, v, thin(allowed))


def earlier_frames(allowed: Tensor, site: Site) -> Tensor:
    """A hook on `allowed`: of the allowed keys, those in the query's own and earlier latent
    frames.
    """
    frame = torch.arange(allowed.shape[3], device=allowed.device) // (site.grid[1] * site.grid[2])
    return allowed & (frame <= frame[site.tokens, None])


def thin(allowed: Tensor) -> Tensor:
    """Undo the expansion of a tensor along samples and heads."""
    for axis in (0, 1):
        if allowed.stride(axis) == 0:
            allowed = allowed.narrow(axis, 0, 1)
    return allowed
