"""What energy and attention are: their numbers against plain definitions, on random networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minicos import ops, puzzles
from minicos.analysis.attention import Attention, words
from minicos.analysis.energy import Energy, centred, components, on_tokens, separation
from minicos.analysis.observe import observe, recorded
from minicos.hooks import Hooks
from minicos.pipeline import load
from minicos.runs import Run
from tests.golden import rel_max

STEPS = 2


@pytest.fixture(scope="module")
def wan(toy):
    return load(toy, device="cpu").with_preset("official", steps=STEPS)


@pytest.fixture(scope="module")
def condition(wan):
    return wan.condition(["solve the maze"] * 2, torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def run(tmp_path):
    return Run.open(tmp_path / "run", {})


def tensors(wan, condition, noise, *names) -> dict[str, torch.Tensor]:
    """Tensors of the first cond pass, first sample."""
    seen = {}

    def keep(x, site) -> None:
        seen[site.name] = x[0].clone()

    hooks = Hooks()
    for name in names:
        hooks = hooks.on(name, keep, step=0, branch="cond")
    next(wan.sample(condition, noise=noise, hooks=hooks))
    return seen


# -- energy -----------------------------------------------------------------------------------------------------------


def test_update_is_what_a_block_wrote(wan, condition, run):
    noise = wan.noise(condition, 0)
    observe(wan, condition, run, [Energy((0,))], noise)
    kept = recorded(run, "energy", STEPS)[0]
    seen = tensors(wan, condition, noise, "embed", "blocks.0", "blocks.5", "blocks.6")
    for layer, (before, after) in {0: ("embed", "blocks.0"), 6: ("blocks.5", "blocks.6")}.items():
        expected = (seen[after] - seen[before]).norm(dim=1).view(4, 2, 3)
        assert rel_max(kept["cond.update"][layer], expected) < 1e-6
        assert rel_max(kept["cond.centred"][layer], centred(seen[after]).view(4, 2, 3)) < 1e-6
        size = seen[after].abs().mean(0)
        assert torch.equal(kept["cond.channel"][layer].long(), size.argsort(descending=True)[:8])


def test_centred_energy_ignores_what_all_tokens_share_and_massive_channels():
    h = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    plain = centred(h)
    assert plain.median() == 1
    assert rel_max(centred(7 * h + torch.randn(40)), plain) < 1e-5  # neither scale nor the mean token counts
    massive = torch.cat([h, 1e4 * torch.randn(50, 1)], dim=1)
    assert rel_max(centred(massive), plain) < 1e-6


def test_energy_computes_with_the_models_operations(toy, condition, run):
    seen = []

    def counted(x):
        seen.append(x.shape)
        return ops.token_energy(x)

    wan = load(toy, device="cpu", ops=replace(ops.REFERENCE, token_energy=counted)).with_preset("cos", steps=1)
    observe(wan, condition, run, [Energy((), ops=wan.ops)], wan.noise(condition, 0))
    assert len(seen) == 2 * 12 * 3  # branches, layers, forms


def test_components_are_principal_and_sorted():
    draw = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(20, 20, generator=draw))[0][:3]
    h = torch.randn(200, 3, generator=draw) * torch.tensor([9.0, 4.0, 2.0]) @ axes + 5
    found = components(h)
    assert found.var(0).tolist() == pytest.approx(torch.linalg.eigvalsh(h.T.cov()).flip(0)[:3].tolist(), rel=1e-3)
    assert torch.equal(components(h), found)


def test_separation_tells_a_layer_that_sees_from_one_that_is_blind():
    mask = torch.zeros(2, 3, 3, dtype=torch.bool)
    mask[:, 1] = True
    blind = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)) * 0
    assert separation(torch.stack([mask.float(), -mask.float(), blind]), mask) == [1.0, 0.0, 0.5]


def test_masks_of_pixels_on_tokens():
    puzzle = puzzles.make("maze", 0, size=4)
    moving = on_tokens(puzzle.answer_mask(0), (4, 4, 4))
    assert moving.shape == (4, 4, 4)
    assert not moving[0].any()  # nothing differs from frame 0 in frame 0
    for r, c in puzzle.candidates[0][1:]:
        assert moving[3, r, c]
    assert torch.equal(on_tokens(puzzle.foreground(), (4, 4, 4))[0], on_tokens(puzzle.foreground(), (4, 4, 4))[3])


# -- attention --------------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(f=st.integers(1, 4), rows=st.integers(1, 6), n=st.integers(1, 3), seed=st.integers(0, 99))
def test_mass_against_the_whole_matrix(f, rows, n, seed):
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, n, f * rows, 8, generator=draw) for _ in range(2))
    received, between = ops.attention_mass(q, k, f)
    p = torch.softmax(q @ k.mT / 8**0.5, dim=-1)
    assert rel_max(received, p.sum(2)) < 1e-6
    expected = p.unflatten(3, (f, rows)).sum(-1).unflatten(2, (f, rows)).mean(3)
    assert rel_max(between, expected) < 1e-6
    assert received.sum(-1).allclose(torch.tensor(float(f * rows)), rtol=1e-5)
    assert between.sum(-1).allclose(torch.ones(()), rtol=1e-5)


def test_mass_on_a_text():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 12, 8, generator=draw), torch.randn(1, 2, 5, 8, generator=draw)
    received, between = ops.attention_mass(q, k, 3)
    assert rel_max(received, torch.softmax(q @ k.mT / 8**0.5, dim=-1).sum(2)) < 1e-6
    assert between.shape == (1, 2, 3, 1)


def test_attention_that_is_kept(wan, condition, run):
    noise = wan.noise(condition, 0)
    analysis = Attention((0, 7), (0,), words=words(condition, "cond"))
    observe(wan, condition, run, [analysis], noise)
    first, second = recorded(run, "attention", STEPS)
    assert not second  # step 1 was not asked for
    names = [f"blocks.7.{part}.{x}" for part in ("self_attn", "cross_attn") for x in "qk"]
    q, k, text_q, text_k = (tensors(wan, condition, noise, *names)[name] for name in names)
    p = torch.softmax(q @ k.mT * 32**-0.5, dim=-1).mean(0)
    assert rel_max(first["received.7"].flatten(), p.sum(0)) < 1e-5
    p = torch.softmax(text_q @ text_k.mT * 32**-0.5, dim=-1).mean(0)
    assert rel_max(first["text.7"], p.mean(0)) < 1e-5
    drawn = analysis.draw([first, second], run)
    assert drawn == [
        "attention/received_step_00.png", "attention_frames.png", "attention_padding.png", "attention.safetensors"
    ]  # fmt: skip
    assert all(run.has(name) for name in drawn)


def test_chosen_heads_are_averaged(wan, condition, tmp_path):
    noise, kept = wan.noise(condition, 0), {}
    for heads in ((0,), (2,), (0, 2)):
        run = Run.open(tmp_path / str(heads), {})
        observe(wan, condition, run, [Attention((3,), (0,), heads)], noise)
        kept[heads] = recorded(run, "attention", STEPS)[0]["between.3"]
    assert rel_max((kept[0,] + kept[2,]) / 2, kept[0, 2]) < 1e-6
    assert not np.allclose(kept[0,], kept[2,])


def test_words_of_a_prompt(wan, condition):
    assert words(condition, "cond") == 4  # solve the maze, and the end of the sentence
