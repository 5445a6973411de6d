"""Attention with hooks on its keys and its pattern: exact, and unchanged without interventions."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minicos import attend as attending
from minicos.attend import attend, masked_attention, pattern
from minicos.errors import MinicosError
from minicos.hooks import Hooks, Site
from minicos.ops import attention


def drawn(b: int, n: int, queries: int, keys: int, width: int = 8, seed: int = 0):
    """q, k and v."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (queries, width), (keys, width), (keys, width)
    return tuple(torch.randn(b, n, *shape, generator=draw) for shape in shapes)


def by_definition(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """In float64, one query at a time, over its allowed keys only."""
    q, k, v, out = q.double(), k.double(), v.double(), torch.zeros_like(q, dtype=torch.double)
    for b, n, i in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = allowed[b, n, i]
        if seen.any():
            weights = torch.softmax(k[b, n, seen] @ q[b, n, i] / q.shape[-1] ** 0.5, 0)
            out[b, n, i] = weights @ v[b, n, seen]
    return out


def limited(allowed: Tensor) -> Hooks:
    """A hook that leaves these keys, for any queries."""
    return Hooks().on("allowed", lambda x, site: x & allowed[:, :, site.tokens])


sizes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 9))


@given(size=sizes, seed=st.integers(0, 99), density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_the_softmax_runs_over_what_is_left(size, seed, density):
    """Also for queries that have one key, or none: these get zeros."""
    b, n, length, keys = size
    q, k, v = drawn(b, n, length, keys, seed=seed)
    draw = torch.Generator().manual_seed(seed + 100)
    allowed = torch.rand(b, n, length, keys, generator=draw) < density
    expected = by_definition(q, k, v, allowed)
    for found in (
        masked_attention(q, k, v, allowed),
        attend(q, k, v, attention, limited(allowed)),
        pattern(q, k, allowed) @ v,
        attend(q, k, v, attention, limited(allowed).on("pattern", lambda p, site: p.clone())),
    ):
        assert (found - expected).abs().max() < 5e-6  # measured 3.7e-7
    assert not masked_attention(q, k, v, allowed)[~allowed.any(-1)].any()


def test_scores_that_underflow_do_not_matter():
    """The remaining keys have a softmax of their own, however small their share was."""
    q, k, v = drawn(1, 1, 3, 4)
    k[:, :, 0] = q[:, :, :1].mean(2) * 1e4  # takes the whole softmax of query 0
    allowed = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    allowed[..., 0] = False
    expected = by_definition(q, k, v, allowed)
    assert (attend(q, k, v, attention, limited(allowed)) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("most", [1, 10, 40, 1 << 28])
def test_a_matrix_that_does_not_fit_comes_in_blocks(most, monkeypatch):
    q, k, v = drawn(2, 2, 7, 5)
    allowed = torch.rand(2, 2, 7, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    whole = attend(q, k, v, attention, limited(allowed))
    shown = pattern(q, k, allowed)
    monkeypatch.setattr(attending, "MOST_PAIRS", most)
    monkeypatch.setattr(attending, "MOST_WEIGHTS", 4 * most)
    seen: list[Tensor] = []

    def see(p: Tensor, site: Site) -> None:
        assert torch.equal(
            torch.arange(7)[site.tokens], torch.arange(7)[len(rows(seen)) :][: p.shape[2]]
        )
        seen.append(p)

    def rows(parts: list[Tensor]) -> list[int]:
        return [i for part in parts for i in range(part.shape[2])]

    found = attend(q, k, v, attention, limited(allowed).on("pattern", see))
    assert (found - whole).abs().max() < 1e-6  # measured 2.4e-7
    assert (torch.cat(seen, dim=2) - shown).abs().max() < 1e-6
    assert len(seen) == {1: 7, 10: 4, 40: 1}.get(most, 1)


@pytest.mark.parametrize("most", [10, 1 << 28])
def test_who_only_looks_changes_no_bit(most, monkeypatch):
    monkeypatch.setattr(attending, "MOST_PAIRS", most)
    q, k, v = drawn(2, 2, 7, 5)
    calls = []
    counted = lambda *args: calls.append(args) or attention(*args)  # noqa: E731
    plain = attend(q, k, v, counted, Hooks().on("heads", print))
    for name in ("allowed", "pattern"):
        for look in (lambda x, site: None, lambda x, site: x):
            assert torch.equal(attend(q, k, v, counted, Hooks().on(name, look)), plain)
    assert len(calls) == 5  # always the model's own operation, once


def test_nothing_is_computed_for_nobody(monkeypatch):
    monkeypatch.setattr(attending, "pattern", None)
    q, k, v = drawn(1, 2, 3, 4)
    hooks = Hooks().on("q", print).on("allowed", lambda x, site: None).on("pattern_img", print)
    assert torch.equal(attend(q, k, v, attention, hooks), attention(q, k, v))


def test_a_pattern_can_be_replaced_also_in_place():
    q, k, v = drawn(2, 2, 3, 5)
    uniform = v.mean(2, keepdim=True).expand(-1, -1, 3, -1)

    def silently(p: Tensor, site: Site) -> None:
        p.fill_(0.2)

    for change in (lambda p, site: torch.full_like(p, 0.2), lambda p, site: p.fill_(0.2), silently):
        with torch.inference_mode(change is silently):
            found = attend(q, k, v, attention, Hooks().on("pattern", change))
        assert (found - uniform).abs().max() < 1e-6


def test_a_pattern_keeps_to_the_models_own_mask():
    q, k, v = drawn(2, 3, 5, 9)
    mask = (torch.arange(9) < 6).expand(2, 1, 1, 9)
    seen = []
    watched = Hooks().on("pattern", lambda p, site: seen.append(p))
    heads = attend(q, k, v, F.scaled_dot_product_attention, watched, mask=mask)
    assert torch.equal(seen[0], pattern(q, k, mask.expand(2, 3, 5, 9)))
    assert not seen[0][..., 6:].any()
    same = attend(
        q, k, v, F.scaled_dot_product_attention, limited(mask.expand(2, 3, 5, 9)), mask=mask
    )
    assert (same - heads).abs().max() < 5e-6  # measured 0


def test_hooks_on_keys_compose():
    """Each forbids keys in addition to the one before it."""
    q, k, v = drawn(1, 2, 6, 6)
    first, second = (
        torch.rand(1, 2, 6, 6, generator=torch.Generator().manual_seed(i)) < 0.7 for i in range(2)
    )
    both = attend(q, k, v, attention, limited(first) + limited(second))
    assert torch.equal(both, attend(q, k, v, attention, limited(first & second)))


def test_gradients_flow_through_what_is_left_and_are_numbers():
    q, k, v = (x.double().requires_grad_() for x in drawn(1, 1, 3, 4, width=3))
    allowed = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)[None, None]
    assert torch.autograd.gradcheck(lambda *x: masked_attention(*x, allowed), (q, k, v))
    grown = lambda q, k: pattern(q, k, allowed).double()  # noqa: E731
    a, b = torch.autograd.grad(grown(q, k)[..., 0].sum(), (q, k))
    assert (
        torch.isfinite(a).all()
        and torch.isfinite(b).all()
        and a[0, 0, 0].any()
        and not a[0, 0, 1].any()
    )


# -- logarithms, to be read ------------------------------------------------------------------------


def seen_lse(hooks: Hooks, attention=attention, mask=None) -> tuple[Tensor, Tensor]:
    """The heads, and what a hook on `lse` sees."""
    seen = []
    hooks = hooks.on("lse", lambda x, site: seen.append(x))
    heads = attend(*drawn(2, 3, 5, 9), attention, hooks, mask=mask)
    (lse,) = seen
    return heads, lse


def test_logarithms_are_those_of_all_keys_and_change_nothing():
    """By the pass itself, and separately with another attention or an intervention."""
    q, k, v = drawn(2, 3, 5, 9)
    expected = (q.double() @ k.double().mT / 8**0.5).logsumexp(-1)
    allowed = torch.ones(2, 3, 5, 9, dtype=torch.bool)
    allowed[..., 0] = False
    for hooks, op, heads in (
        (Hooks(), attention, attention(q, k, v)),
        (Hooks().on("allowed", lambda x, site: None), attention, attention(q, k, v)),
        (Hooks(), lambda q, k, v: v[:, :, :5], v[:, :, :5]),
        (limited(allowed), attention, masked_attention(q, k, v, allowed)),
    ):
        found, lse = seen_lse(hooks, op)
        assert torch.equal(found, heads)
        assert (lse - expected).abs().max() < 1e-5  # measured 2.2e-7
        assert lse.dtype == torch.float32


def test_logarithms_cannot_be_replaced():
    with pytest.raises(MinicosError, match="replace allowed or pattern"):
        attend(*drawn(1, 1, 4, 4), attention, Hooks().on("lse", lambda x, site: x + 1))
