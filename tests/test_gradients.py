"""Gradients of a run: correct, through everything that a step does, or refused."""

from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from minicos.analysis.knockout import Causal, Knockout
from minicos.condition import WanCondition
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.ops import REFERENCE
from minicos.plan import Plan
from minicos.record import Record
from minicos.schedule import SOLVERS
from minicos.stream import Residency
from minicos.streams import stream

SHAPE = (1, 4, 2, 4, 4)


@pytest.fixture(scope="module")
def made(pair, small_dit):
    """Two experts under guidance, four steps; its condition and noise."""
    fields = {"steps": 4, "guidance": {"high": 3.0, "low": 2.0}, "shift": 2.0}
    wan = pair(small_dit(0), small_dit(1), **fields)
    draw = torch.Generator().manual_seed(1)
    noise, text, null = (
        torch.randn(*shape, generator=draw) for shape in (SHAPE, (1, 5, 8), (1, 5, 8))
    )
    return wan, WanCondition(text=text, text_null=null, shape=SHAPE), noise


def score(x: Tensor) -> Tensor:
    """Some number of a latent."""
    return (x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum()


def slope(function, x: Tensor, direction: Tensor, size: float = 1e-2) -> float:
    """The derivative along a direction, by central differences of fourth order."""
    at = [float(function(x + k * size * direction)) for k in (-2, -1, 1, 2)]
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * size)


def direction(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("what", ["noise", "text", "hook", "cut"])
def test_they_are_those_of_finite_differences(solver, what, made):
    """With respect to the noise, the prompt's rows and what a hook adds, through several steps, both
    experts, guidance and the solver; under a knockout, too.
    """
    wan, condition, noise = made
    wan = wan.with_preset(solver=solver)
    hooks = Knockout(Causal()).hooks() if what == "cut" else NO_HOOKS

    def final(given: Tensor, grad: bool = False) -> Tensor:
        own, x, inside = condition, noise, hooks
        if what == "text":
            own = replace(condition, text=given)
        elif what == "hook":
            inside = hooks.on("blocks.0.ffn", lambda h, site: h + given)
        else:
            x = given
        *_, last = wan.sample(own, noise=x, hooks=inside, grad=grad)
        return score(last.x0)

    start = {"text": condition.text, "hook": torch.zeros(24)}.get(what, noise)
    given = start.clone().requires_grad_()
    (found,) = torch.autograd.grad(final(given, grad=True), given)
    expected = slope(final, start, direction(start))
    ours = float((found * direction(start)).sum())
    assert ours == pytest.approx(expected, rel=1e-2)  # measured 1.5e-3 or less


def test_a_run_with_gradients_is_the_run_without(made):
    wan, condition, noise = made
    plain = list(wan.sample(condition, noise=noise))
    kept = list(wan.sample(condition, noise=noise.clone().requires_grad_(), grad=True))
    assert all(torch.equal(a.next, b.next) for a, b in zip(plain, kept, strict=True))
    assert all(step.next.requires_grad for step in kept) and not plain[0].next.requires_grad


def test_some_steps_alone(made):
    """Without up to a step, from there with."""
    wan, condition, noise = made
    *_, before = islice(wan.sample(condition, noise=noise), 2)
    x = before.next.requires_grad_()
    step = next(wan.sample(condition, noise=x, start=2, state=before.state, grad=True))
    (found,) = torch.autograd.grad(score(step.x0), x)
    assert found.any() and torch.isfinite(found).all()
    with torch.no_grad():  # the caller's setting has no effect
        assert next(wan.sample(condition, noise=x, start=2, grad=True)).next.requires_grad


def test_blocks_are_computed_again_but_hooks_run_once(made):
    wan, condition, noise = made
    record, inside = Record(lambda x: x), Record(lambda x: x)
    hooks = Hooks().on("blocks.*", record).on("blocks.1.ffn", inside)
    x, calls = noise.clone().requires_grad_(), []
    watched = [
        block.ffn[0].register_forward_pre_hook(lambda layer, given: calls.append(layer))
        for block in wan.experts["high"].blocks
    ]
    step = next(wan.sample(condition, noise=x, hooks=hooks, grad=True))
    score(step.x0).backward()
    for handle in watched:
        handle.remove()
    assert (len(record.entries), len(inside.entries)) == (4, 2)
    counts = [calls.count(block.ffn[0]) for block in wan.experts["high"].blocks]
    assert counts == [4, 2]  # two passes; block 0 again in the backward pass, the watched one not
    assert not any(kept.requires_grad for _, kept in record.entries)


# -- refused, never treated as constants -----------------------------------------------------------


@pytest.mark.parametrize("what", ["noise", "text", "next"])
def test_without_grad_nothing_may_expect_gradients(what, made):
    wan, condition, noise = made
    with pytest.raises(MinicosError, match="grad=True"):
        if what == "noise":
            wan.sample(condition, noise=noise.clone().requires_grad_())
        elif what == "text":
            own = replace(condition, text=condition.text.clone().requires_grad_())
            wan.sample(own, noise=noise)
        else:
            steps = wan.sample(condition, noise=noise)
            step = next(steps)
            step.next = step.next.requires_grad_()
            next(steps)


def test_weights_that_move_and_kernels_are_refused(made):
    wan, condition, noise = made
    away = replace(wan, residency=Residency(Plan("stream", torch.device("cpu"), ())))
    with pytest.raises(MinicosError, match="residency='resident'"):
        away.sample(condition, noise=noise, grad=True)
    fused = replace(REFERENCE, gated_add=lambda *x: REFERENCE.gated_add(*x))
    experts = {name: _with(dit, fused) for name, dit in wan.experts.items()}
    with pytest.raises(MinicosError, match="Triton kernels"):
        replace(wan, experts=experts).sample(condition, noise=noise, grad=True)
    own = replace(REFERENCE, self_attention=lambda *x: REFERENCE.self_attention(*x))
    experts = {name: _with(dit, own) for name, dit in wan.experts.items()}
    replace(wan, experts=experts).sample(condition, noise=noise, grad=True)


def _with(dit, ops):
    made = type(dit).__new__(type(dit))
    made.__dict__ = {**dit.__dict__, "ops": ops}
    return made


# -- the stream alone ------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pass_can_stop_at_a_layer(layer, made):
    wan, condition, noise = made
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, site: Site) -> None:
        seen[site.name] = x

    watch = Hooks().on("embed", keep).on("blocks.*", keep)
    seen.clear()
    next(
        wan.sample(
            condition, noise=noise, hooks=Hooks().on("embed", keep, branch="cond") + _blocks(keep)
        )
    )
    expected = dict(seen)
    seen.clear()
    found = stream(wan, noise, 0, condition, layer, hooks=watch)
    assert torch.equal(found, expected["embed" if layer == 0 else f"blocks.{layer - 1}"])
    assert [*seen] == ["embed", "blocks.0", "blocks.1"][: layer + 1]


def _blocks(hook) -> Hooks:
    return Hooks().on("blocks.*", hook, branch="cond")


def test_a_stream_carries_gradients(made):
    wan, condition, noise = made
    x = noise.clone().requires_grad_()
    stream(wan, x, 3, condition, 1, grad=True).sum().backward()
    assert x.grad is not None and x.grad.any()
    with pytest.raises(MinicosError, match="grad=True"):
        stream(wan, x, 3, condition, 1)
    for step, layer in ((4, 1), (0, 3), (-1, 0), (0, 1.0), (0.0, 1), (0, None)):
        with pytest.raises(MinicosError, match="this run has steps 0 to 3, and a stream enters"):
            stream(wan, noise, step, condition, layer)
