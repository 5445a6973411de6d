"""Attention knockout: what may not flow does not, and everything else is as it was."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minicos import attend as attending
from minicos.analysis.attention import Attention
from minicos.analysis.knockout import Causal, Flow, Knockout, Scattered, Text, Tokens, scrambled
from minicos.cli.knockout import read, resolve
from minicos.cli.knockout import where as shown
from minicos.dit import DiT
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks, Site
from minicos.open import load
from minicos.ops import Ops, attention

GRID = (3, 2, 3)
LENGTH, ROWS = 18, 5


@pytest.fixture(scope="module")
def network(small_dit) -> DiT:
    return small_dit(num_layers=3)


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    latent, text = (torch.randn(2, *shape, generator=draw) for shape in ((4, 3, 4, 6), (ROWS, 8)))
    return latent, torch.tensor([700.0, 300.0]), text


def streams(network: DiT, inputs, hooks: Hooks = NO_HOOKS) -> list[Tensor]:
    """The stream after each block."""
    seen: list[Tensor] = []
    network(*inputs, hooks=hooks.on("blocks.*", lambda x, site: seen.append(x)))
    return seen


def mask(cut, keys: int = LENGTH) -> Tensor:
    return cut.forbidden(torch.arange(LENGTH), GRID, keys)


axis = lambda size: st.none() | st.sets(st.integers(0, size - 1), min_size=1).map(tuple)  # noqa: E731
tokens = st.builds(Tokens, axis(3), axis(2), axis(3), outside=st.booleans())
flows = st.builds(Flow, tokens, tokens)
layers = st.sets(st.integers(0, 2), min_size=1).map(tuple)


# -- which pairs -----------------------------------------------------------------------------------


@given(chosen=tokens)
def test_tokens_are_those_of_the_frames_rows_and_columns(chosen):
    expected = [
        (
            (chosen.frames is None or f in chosen.frames)
            and (chosen.rows is None or h in chosen.rows)
            and (chosen.columns is None or w in chosen.columns)
        )
        != chosen.outside
        for f in range(3)
        for h in range(2)
        for w in range(3)
    ]
    assert chosen.on(GRID).tolist() == expected
    assert (chosen.on(GRID) ^ chosen.others.on(GRID)).all()


def test_tokens_by_a_tensor():
    where = torch.zeros(1, 2, 3, dtype=torch.bool)
    where[0, 1, 2] = True
    assert Tokens(where=where).on(GRID).nonzero().flatten().tolist() == [5, 11, 17]
    assert Tokens((1,), where=where).on(GRID).nonzero().flatten().tolist() == [11]


@given(cut=flows)
def test_a_flow_forbids_every_pair_of_target_and_source(cut):
    source, target = cut.source.on(GRID), cut.target.on(GRID)
    assert torch.equal(mask(cut), torch.outer(target, source))
    count = int(target.sum() * source.sum())
    for knockout in (Knockout(cut), Knockout(cut).control()):
        assert (knockout.pairs(GRID), knockout.cuts(GRID)) == (count, count > 0)


def test_causal_forbids_later_frames():
    frame = torch.arange(LENGTH) // 6
    assert torch.equal(mask(Causal()), frame[:, None] < frame[None])


@given(cut=flows | st.just(Causal()), seed=st.integers(0, 2**62))
def test_the_control_forbids_the_same_queries_as_many_keys(cut, seed):
    control = mask(Scattered(cut, seed))
    assert torch.equal(control.sum(1), mask(cut).sum(1))
    assert torch.equal(
        control[7:9], Scattered(cut, seed).forbidden(torch.arange(7, 9), GRID, LENGTH)
    )


def test_the_control_is_random_and_the_seed_decides():
    cut = Flow(Tokens((0,)), Tokens((2,)))
    drawn = torch.stack([mask(Scattered(cut, seed)) for seed in range(600)])
    share = drawn[:, 12:].float().mean(0)  # of each pair: 6 of 18
    assert (share - 1 / 3).abs().max() < 0.1  # measured 0.053; five standard deviations are 0.096
    numbers = scrambled(torch.arange(10_000), 3)
    assert len(numbers.unique()) == 10_000
    assert abs((numbers > 0).float().mean() - 0.5) < 0.02


# -- in a network ----------------------------------------------------------------------------------


@settings(max_examples=20)
@given(cut=flows, chosen=layers, data=st.data())
def test_what_is_cut_does_not_flow(cut, chosen, data, network, inputs):
    """Change the source's keys and values in the cut layers as you like: the target's attention
    does not move by a bit.
    """
    knockout = Knockout(cut, chosen)
    source, target = cut.source.on(GRID), cut.target.on(GRID)

    def disturb(x: Tensor, site: Site) -> Tensor:
        return torch.where(source[:, None], x + 3, x)

    def heads(disturbed: bool) -> list[Tensor]:
        seen = []
        hooks = knockout.hooks()
        layer = chosen[0]  # the others see what this one has changed
        for name in "kv" if disturbed else "":
            hooks = hooks.on(f"blocks.{layer}.self_attn.{name}", disturb)
        hooks = hooks.on(f"blocks.{layer}.self_attn.heads", lambda x, site: seen.append(x))
        network(*inputs, hooks=hooks)
        return seen

    (plain,), (moved,) = heads(False), heads(True)
    assert torch.equal(plain[:, :, target], moved[:, :, target])
    if source.any() and not target.all():
        others = ~target
        assert not torch.equal(plain[:, :, others], moved[:, :, others])


def test_a_source_that_is_cut_from_all_others_is_without_influence(network, inputs):
    """In all layers: whatever the source's tokens are, the rest of the video does not know."""
    source = Tokens((0,))
    x, time, text = inputs
    other = x.clone()
    other[:, :, 0] = 5 * torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(3))
    for cut, same in ((Flow(source, source.others), True), (Flow(source, Tokens((1,))), False)):
        hooks = Knockout(cut).hooks()
        a, b = (network(latent, time, text, hooks=hooks)[:, :, 1:] for latent in (x, other))
        assert torch.equal(a, b) == same


def test_causal_frames_do_not_know_what_follows(network, inputs):
    x, time, text = inputs
    other = x.clone()
    other[:, :, 2] += 4
    hooks = Knockout(Causal()).hooks()
    a, b = (network(latent, time, text, hooks=hooks) for latent in (x, other))
    assert torch.equal(a[:, :, :2], b[:, :, :2]) and not torch.equal(a[:, :, 2], b[:, :, 2])


def test_a_frame_causal_network_is_one_with_this_knockout(small_dit, inputs):
    plain, causal = small_dit(num_layers=3), small_dit(num_layers=3, frame_causal=True)
    expected = streams(plain, inputs, Knockout(Causal()).hooks())
    assert all(map(torch.equal, streams(causal, inputs), expected))
    # hooks find these keys gone, and other cuts come on top
    for cut in (Causal(), Flow(Tokens((0,)), Tokens((2,)))):
        both = Knockout(Causal()).hooks() + Knockout(cut).hooks()
        found = streams(causal, inputs, Knockout(cut).hooks())
        assert all(map(torch.equal, found, streams(plain, inputs, both)))
    seen: list[Tensor] = []
    hooks = NO_HOOKS.on("blocks.0.self_attn.allowed", lambda x, site: seen.append(x[0, 0]))
    streams(causal, inputs, hooks)
    assert torch.equal(seen[0], ~mask(Causal()))


def test_text_is_cut_from_a_frame(network, inputs):
    x, time, text = inputs
    other = text.clone()
    other[:, 1:3] += 2
    hooks = Knockout(Flow(Text((1, 2)), Tokens((1,)))).hooks()
    hooks += Knockout(Flow(Tokens((0, 2)), Tokens((1,)))).hooks()  # nor by way of other frames
    a, b = (network(x, time, rows, hooks=hooks) for rows in (text, other))
    assert torch.equal(a[:, :, 1], b[:, :, 1]) and not torch.equal(a[:, :, 0], b[:, :, 0])


def test_no_attention_at_all_is_zeros(network, inputs):
    seen: list[Tensor] = []
    hooks = Knockout(Flow(Text())).hooks()
    network(*inputs, hooks=hooks.on("blocks.*.cross_attn.heads", lambda x, site: seen.append(x)))
    assert len(seen) == 3 and not torch.stack(seen).any()


@given(cut=flows)
@settings(max_examples=10)
def test_what_forbids_nothing_changes_no_bit(cut, network, inputs):
    nothing = Flow(
        replace(cut.source, where=torch.zeros(1, 1, 1, dtype=torch.bool), outside=False), cut.target
    )
    plain, found = (streams(network, inputs, h) for h in (NO_HOOKS, Knockout(nothing).hooks()))
    assert all(map(torch.equal, plain, found))


@given(cut=flows | st.just(Causal()), chosen=layers)
@settings(max_examples=20)
def test_it_is_attention_with_minus_infinity(cut, chosen, small_dit, inputs):
    """A second network, whose own operation adds minus infinity to these scores."""
    forbidden = mask(cut)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) - 1 not in chosen:
            return attention(q, k, v)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(forbidden, -torch.inf).softmax(-1)
        return weights.masked_fill(forbidden.all(1)[:, None], 0) @ v

    calls: list[None] = []
    network, written = small_dit(num_layers=3), small_dit(num_layers=3)
    for block in written.blocks:
        block.self_attn.ops = Ops(self_attention=own)
    found, expected = (
        streams(network, inputs, Knockout(cut, chosen).hooks()),
        streams(written, inputs),
    )
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() < 2e-5 * b.abs().max()  # measured 2.2e-7


def test_only_the_masked_layers_leave_the_models_own_attention(small_dit, inputs):
    calls: list[None] = []
    network = small_dit(num_layers=3)
    for block in network.blocks:
        block.self_attn.ops = Ops(self_attention=lambda *x: calls.append(None) or attention(*x))
    network(*inputs, hooks=Knockout(Causal(), layers=(1,)).hooks())
    assert len(calls) == 2


def test_it_acts_where_and_when_it_is_meant_to(network, inputs):
    cut = Causal()
    plain = network(*inputs)
    meant = {"step": 2, "branch": "cond"}
    hooks = Knockout(cut, steps=range(2, 4), branch="cond").hooks()
    for where, acts in (
        (meant, True),
        (meant | {"step": 1}, False),
        (meant | {"branch": "uncond"}, False),
    ):
        assert torch.equal(network(*inputs, hooks=hooks.at(**where)), plain) != acts


def test_samples_and_heads_may_differ(network, inputs):
    """A user's hook forbids keys in one head of one sample; the knockout then forbids in all."""
    cut = Flow(Tokens((0,)), Tokens((1,)))

    def one(allowed: Tensor, site: Site) -> Tensor:
        left = allowed.clone()
        left[1, 0, :6] = False
        return left

    first = Hooks().on("blocks.0.self_attn.allowed", one)
    seen: list[Tensor] = []
    watch = Hooks().on("blocks.0.self_attn.pattern", lambda p, site: seen.append(p))
    network(*inputs, hooks=first + Knockout(cut).hooks() + watch)
    (p,) = seen
    assert not p[1, 0, :6].any() and p[0, 0, :6].all() and p[1, 1, :6].all()
    assert not p[:, :, 6:12, :6].any() and p[:, :, 6:12, 6:].all()


@pytest.mark.parametrize("most", [40, 1 << 28])
@pytest.mark.parametrize("queries", [None, 2])
def test_who_watches_attention_sees_what_is_left(most, queries, network, inputs, monkeypatch):
    """Also where a long video comes in blocks, and where a sample of queries was asked for."""
    monkeypatch.setattr(attending, "MOST_PAIRS", most)
    words = Flow(Text((1, 2)), Tokens((1,)))
    watch = Attention((0, 1), (0,), queries=queries)
    shown: dict[str, list[Tensor]] = {}
    look = Hooks().on(
        "blocks.0.*.pattern", lambda p, site: shown.setdefault(site.name, []).append(p)
    )
    cuts = Knockout(Causal(), layers=(0,)).hooks() + Knockout(words, layers=(0,)).hooks()
    hooks = (cuts + watch.hooks() + look).at(step=0, branch="cond")
    network(*inputs, hooks=hooks)
    kept = watch.keep(None, None)
    p, text = (
        torch.cat(shown[f"blocks.0.{name}_attn.pattern"], 2)[0].mean(0)
        for name in ("self", "cross")
    )
    between = p.view(3, 6, 3, 6).sum((1, 3)) / 6
    assert (kept["between.0"] - between).abs().max() < 1e-6
    assert (kept["received.0"].flatten() - p.sum(0)).abs().max() < 1e-5
    assert (kept["text.0"] - text.mean(0)).abs().max() < 1e-6
    assert not kept["between.0"].triu(1).any() and kept["between.1"].triu(1).any()


# -- what cannot be cut ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cut", "says"),
    [
        (Flow(Tokens((3,))), "there is no frame 3: this video has frames 0 to 2"),
        (Flow(Tokens(), Tokens(rows=(-1,))), "there is no row -1"),
        (Flow(Tokens(columns=(7,))), "no column 7: this video has columns 0 to 2"),
        (Flow(Text((5,))), "text rows .5.: this model reads rows 0 to 4"),
    ],
)
def test_what_is_not_there_is_told(cut, says, network, inputs):
    with pytest.raises(MinicosError, match=says):
        network(*inputs, hooks=Knockout(cut).hooks())


def test_a_layer_that_is_not_there_is_told_before_any_work(network):
    from minicos.points import points

    with pytest.raises(MinicosError, match=r"no hook point matches 'blocks.9.self_attn.allowed'"):
        Knockout(Causal(), layers=(9,)).hooks().check(points(network.cfg))


# -- on the command line ---------------------------------------------------------------------------

READ = {
    "frame:0 to frame:1-2": Knockout(Flow(Tokens((0,)), Tokens((1, 2)))),
    "frame:0 rows:0-1 columns:2 to all layers:0,3-4 steps:0-9 branch:uncond": Knockout(
        Flow(Tokens((0,), (0, 1), (2,)), Tokens()), (0, 3, 4), tuple(range(10)), "uncond"
    ),
    "text to rows:1": Knockout(Flow(Text(), Tokens(rows=(1,)))),
    "steps:all layers:all causal": Knockout(Causal()),
    "causal control:7": Knockout(Scattered(Causal(), 7)),
}


@pytest.mark.parametrize("words", READ)
def test_words_are_read(words):
    assert read(words.split(), 20, 12) == READ[words]


def test_words_of_the_prompt_become_rows():
    """In the prompted branch alone: in the other one, rows are other words."""
    wan, prompt = load("tiny", device="cpu"), "mark the circle"
    wan = replace(wan, tokenizer=replace(wan.tokenizer, text_len=6))
    for said, rows in (("word:Circle to all", (2,)), ("padding to frame:1 control:1", (4, 5))):
        parts = said.split()
        found = resolve(read(parts, 20, 12), parts, wan, prompt)
        assert found.branch == "cond"
        flow = found.cut.cut if isinstance(found.cut, Scattered) else found.cut
        assert flow.source == Text(rows)


@pytest.mark.parametrize(
    ("words", "frames", "layers"),
    [
        ("frame:0 to frame:1-3 layers:0-1", (1, 2, 3), (0, 1)),
        ("frame:0 to frame:2 control:0", (2,), ()),
        ("frame:0 to all", (), ()),
        ("causal", (), ()),
    ],
)
def test_a_page_marks_the_frames_that_see_less(words, frames, layers):
    parts = words.split()
    found = shown(read(parts, 10, 8), parts)
    assert (found.frames, tuple(found.layers)) == (frames, layers)
    assert found.label == f"knockout: {words}" and not found.steps
