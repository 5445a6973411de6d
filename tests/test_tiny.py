"""How the embedded model is trained, judged and shipped. Nothing here depends on how good its
weights are.
"""

import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from minicos import puzzles
from minicos.condition import image_channels
from minicos.config import TINY_TEXT, TINY_VAE, VARIANTS
from minicos.dit import DiT
from minicos.errors import MinicosError
from minicos.media import to_uint8
from minicos.open import load
from minicos.puzzles.reveal import SIDES
from minicos.text import TextEncoder, Tokenizer
from minicos.tiny import (
    data,
    evaluate,
    export,
    mixture,
    optim,
    tokenizer,
    train,
    train_dit,
    train_vae,
)
from minicos.vae import VAE
from minicos.weights import layouts
from minicos.weights.layouts import EMBEDDED
from minicos.weights.load import load_into
from tests.golden import rel_max

TOKENIZER = EMBEDDED / "google/umt5-xxl/tokenizer.json"


@pytest.fixture(scope="module")
def words():
    return Tokenizer.load(TOKENIZER, TINY_TEXT.text_len)


@pytest.fixture(scope="module")
def wan(toy):
    return load(toy, device="cpu")


# -- what ships ------------------------------------------------------------------------------------


def test_what_ships_is_small_and_complete():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    others = [path for path in layouts.EMBEDDED_VARIANTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14e6
    assert sum(path.stat().st_size for path in (*files, *others)) <= 26e6
    assert layouts.embedded_variants() == ("distilled", "frame-causal", "mid", "one-answer")
    names = {str(path.relative_to(EMBEDDED)) for path in files}
    low = {"low_noise_model/lora.safetensors"}  # comes with the second stage of training
    assert names - low == {
        "Wan2.1_VAE.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "high_noise_model/config.json",
        "high_noise_model/diffusion_pytorch_model.safetensors",
    }


def test_the_tokenizer_keeps_the_ids_that_ship_and_knows_every_prompt(tmp_path):
    shipped = tokenizer.tokens(tokenizers.Tokenizer.from_file(str(TOKENIZER)))
    grown = tokenizer.words(shipped)
    assert grown[: len(shipped)] == shipped
    assert (
        shipped[: len(tokenizer.SPECIAL + tokenizer.FIRST)] == tokenizer.SPECIAL + tokenizer.FIRST
    )
    tokenizer.build(grown).save(str(tmp_path / "tokenizer.json"))
    words = Tokenizer.load(tmp_path / "tokenizer.json", TINY_TEXT.text_len)
    for prompt in puzzles.PROMPTS:
        assert words.unknown_words(prompt) == []
        assert len(prompt.split()) < TINY_TEXT.text_len  # and the end token


def test_too_many_words_are_refused():
    with pytest.raises(ValueError, match="do not fit into the 96 rows"):
        tokenizer.build(tuple(f"w{i}" for i in range(97)))


# -- training data ---------------------------------------------------------------------------------


def test_the_mixture_covers_every_family_in_domain_and_no_other():
    table = mixture.sources()
    named = {source.family.name for source in table} | set(mixture.WITHIN)
    assert named >= {name for name, family in puzzles.FAMILIES.items() if family.domain == "in"}
    assert all(source.family.domain == "in" for source in table)
    assert all(not source.family.held_out for source in table)
    assert len({source.name for source in table}) == len(table)
    assert {1, 5, 9, 13, 17, 33} <= {source.frames for source in table}
    assert math.isclose(sum(mixture.shapes(table).values()), 1)
    assert mixture.source("maze/3", 1.0, 33).tokens == 81


@pytest.mark.parametrize(("step", "whole"), [(0, False), (98, True), (99, True)])
def test_a_batch_of_the_vae_depends_on_seed_and_step_alone(step, whole):
    batch = train_vae.batch(0, step, 100)
    np.random.default_rng(0).random()  # no shared state
    assert torch.equal(batch, train_vae.batch(0, step, 100))
    if whole:
        assert (batch.shape[3] // 16, batch.shape[2]) in mixture.shapes(mixture.sources())
    else:
        assert batch.shape == (8, 3, 13, 32, 32)
    assert batch.min() >= -1
    assert batch.max() <= 1
    others = (train_vae.batch(1, step, 100), train_vae.batch(0, (step + 1) % 100, 100))
    assert not any(batch.shape == o.shape and torch.equal(batch, o) for o in others)


@pytest.fixture
def quick_shards(monkeypatch):
    """Five clips a shard, and no compiler."""
    monkeypatch.setattr(data, "COMPILED", train_vae.EAGER)
    monkeypatch.setattr(data, "CLIPS", 5)


SOURCES = (
    mixture.source("maze-3x3", 0.5),
    mixture.source("goal", 0.3),
    mixture.source("maze/3", 0.2, 5),
)


def test_shards_and_the_pool(quick_shards, wan, tmp_path):
    folder, record = tmp_path / "latents", tmp_path / "shards.json"
    data.write(wan.vae, folder, SOURCES, seed=0, shards=2, part=1, parts=2)
    pool = data.Pool(folder, SOURCES, record)
    pool.refresh(0)
    halfway = len(pool)
    data.write(wan.vae, folder, SOURCES, seed=0, shards=2)
    files = sorted(folder.glob("*/*"))
    names = [str(path.relative_to(folder)) for path in files]
    assert names == [
        f"{s.name}/0000{i}.safetensors"
        for s in (SOURCES[1], *SOURCES[2:], SOURCES[0])
        for i in (0, 1)
    ]
    pool.refresh(50)
    pool.refresh(100)  # nothing is added twice
    assert 0 < halfway < len(pool) == sum(len(load_file(path)["x0"]) for path in files)
    assert sorted(pool.since.values()) == [0] * 3 + [50] * 3

    resumed = data.Pool(folder, SOURCES, record)  # sees what the first one saw at each step
    resumed.refresh(0)
    assert len(resumed) == halfway
    resumed.refresh(50)
    draws = [p.batch(np.random.default_rng(3), 1000) for p in (pool, resumed)]
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][2] == draws[1][2]

    for source in SOURCES:
        tensors = data.shard(wan.vae, source, 0, 1)
        stored = load_file(folder / source.name / "00001.safetensors")
        assert all(torch.equal(tensors[k], v) for k, v in stored.items())
        size, latents = source.family.size, (source.frames - 1) // 4 + 1
        assert tensors["x0"].shape[1:] == (16, latents, 2 * size, 2 * size)
        assert tensors["y"].shape[1:] == tensors["x0"].shape[1:]
        assert sorted(set(tensors["of"].tolist())) == list(range(len(tensors["y"])))
        assert len(tensors["x0"]) >= 5
        prompts = [tensors["prompts"][i] for i in tensors["prompt"].tolist()]
        assert set(prompts) <= set(source.family.puzzle.prompts)
        for x0, of in zip(tensors["x0"], tensors["of"].tolist(), strict=True):
            # a video starts with the picture that it answers
            apart = tensors["y"][:, :, 0].float() - x0[:, 0].float()
            assert apart.square().sum((1, 2, 3)).argmin() == of
    other = data.shard(wan.vae, SOURCES[0], 1, 0)
    assert not torch.equal(other["y"][0], data.shard(wan.vae, SOURCES[0], 0, 0)["y"][0])


def test_hidden_frames_of_reveal_tell_nothing(quick_shards, wan):
    """All 24 objects of a picture are drawn, and the latent frame that hides them is the same
    for each.
    """
    tensors = data.shard(wan.vae, mixture.source("reveal", 1.0), 0, 0)
    assert len(tensors["y"]) == 1
    assert len(tensors["x0"]) == 24
    x0 = tensors["x0"].float()
    assert torch.equal(x0[:, :, 2], x0[:1, :, 2].expand(24, -1, -1, -1))
    assert (x0[1:, :, 1] - x0[:1, :, 1]).abs().amax((1, 2, 3)).min() > 0
    held_out = {f"the {look}" for look in puzzles.PUZZLES["reveal"].held_out}
    assert not any(look in prompt for prompt in tensors["prompts"] for look in held_out)
    assert len(tensors["prompts"]) > 3  # named by nothing, by colour, by look
    begins = {next(w for w in p.split() if w in SIDES) for p in tensors["prompts"]}
    assert len(begins) == 2  # the same picture in both orders


def test_one_answer_alone_can_be_drawn():
    rng = np.random.default_rng(0)
    for name in ("maze", "reveal", "turn"):
        puzzle = puzzles.family(name).draw(0)
        drawn = data.answers(puzzle, rng, puzzle.frames, one=True)
        asked = (puzzle, *puzzle.variants())
        for prompt, video in drawn:
            first = next(p for p in asked if p.prompt == prompt).draw(0)
            assert np.array_equal(video, first), name
    assert len(data.answers(puzzles.family("maze").draw(0), rng, 13)) == 2


def test_lengths_other_than_the_own(wan):
    puzzle = puzzles.make("maze", 0, size=3)
    assert train_vae.film(puzzle, 0, 1).shape == (1, 48, 48, 3)
    long = train_vae.film(puzzle, 0, 33)
    assert long.shape == (33, 48, 48, 3)
    assert puzzle.score(long).solved
    assert np.array_equal(long[0], puzzle.first_frame())
    assert np.array_equal(train_vae.film(puzzle, 0, 13), puzzle.draw(0))


def test_latents_of_training_are_those_of_the_pipeline(quick_shards, wan):
    """In bfloat16 and in whole clips instead of chunks, but the same numbers."""
    puzzle = puzzles.make("maze", 0, size=3)
    grey = np.full((13, 48, 48, 3), 127.5, np.float32)
    grey[0] = puzzle.first_frame()
    latent = data.encode(wan.vae, [grey])
    assert latent.dtype == torch.float16
    image = torch.from_numpy(puzzle.first_frame()).permute(2, 0, 1)[None] / 127.5 - 1
    assert (
        rel_max(latent.float(), image_channels(wan.vae, image, 13)[:, 4:]) < 0.03
    )  # measured 0.0052


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """20 pictures of each source. x0 tells its source and its picture, and y tells its picture."""
    folder, which = tmp_path_factory.mktemp("pool"), torch.arange(20).view(-1, 1, 1, 1)
    for number, source in enumerate(SOURCES):
        latents, side = (source.frames - 1) // 4 + 1, 2 * source.family.size
        shape = (20, 16, latents, side, side)
        tensors = {"x0": torch.full(shape, float(number)).half(), "y": torch.zeros(shape).half()}
        tensors["x0"][:, 1], tensors["y"][:, 1] = which.flip(0), which
        tensors |= {
            "of": torch.arange(19, -1, -1, dtype=torch.int32),
            "prompt": torch.zeros(20).byte(),
        }
        (folder / source.name).mkdir()
        told = {"prompts": json.dumps([source.family.puzzle.prompts[0]])}
        save_file(tensors, folder / source.name / "00000.safetensors", told)
    pool = data.Pool(folder, SOURCES, folder / "shards.json")
    pool.refresh(0)
    return pool


def test_a_batch_of_the_dit_depends_on_seed_and_step_alone(pool):
    first, again, other = (train_dit.batch(pool, 0, step) for step in (7, 7, 8))
    assert all(torch.equal(first[i], again[i]) for i in (0, 1, 3, 4))
    assert first[2] == again[2]
    assert first[3].shape != other[3].shape or not torch.equal(first[3], other[3])
    assert not torch.equal(first[4], train_dit.batch(pool, 1, 7)[4])

    x0, y, prompts, noise, sigma = first
    assert x0.shape == noise.shape
    n = len(x0)
    assert abs(n * x0[0, 0].numel() / 4 - data.TOKENS) < 0.1 * data.TOKENS
    assert y.shape == (n, 20, *x0.shape[2:])
    assert torch.equal(y[:, :4, 0], torch.ones_like(y[:, :4, 0]))
    assert not y[:, :4, 1:].any()
    assert torch.equal(y[:, 5], x0[:, 1])  # the picture that the video answers
    sources = [SOURCES[int(number)] for number in x0[:, 0, 0, 0, 0]]
    for source, prompt in zip(sources, prompts, strict=True):
        assert prompt in ("", source.family.puzzle.prompts[0])
    assert sigma.shape == (n,)


def test_sources_and_dropped_prompts_have_their_shares(pool):
    seen = [train_dit.batch(pool, 0, step) for step in range(200)]
    dropped = np.mean([prompt == "" for _, _, prompts, _, _ in seen for prompt in prompts])
    assert abs(dropped - train_dit.DROP) < 0.01
    steps = [int(x0[0, 0, 0, 0, 0]) for x0, *_ in seen]  # no two of these sources have one shape
    for number, source in enumerate(SOURCES):
        assert abs(steps.count(number) / 200 - source.share) < 0.12, source.name


@given(st.integers(1, 40), st.integers(0, 100), st.floats(0.1, 1))
def test_noise_levels_are_stratified(n, seed, below):
    sigma = train_dit.noise_levels(n, np.random.default_rng(seed), below).double()
    assert ((sigma > 0) & (sigma < below + 1e-6)).all()
    u = sigma / (train_dit.SHIFT - (train_dit.SHIFT - 1) * sigma)  # invert the shift
    strata = (u / u.new_tensor(below / (3 - 2 * below)) * n).clamp(max=n - 1e-4)
    assert torch.equal((strata + 1e-5).floor().sort().values, torch.arange(n).double()) or n > 20


# -- networks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(words):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return train_dit.Student(words)


def test_an_untrained_student_predicts_nothing(student, pool):
    """The head starts at zero, so the loss is that of the velocity 0; and it learns through
    every residual branch.
    """
    x0, y, prompts, noise, sigma = train_dit.batch(pool, 0, 1)
    x0, y, prompts, noise, sigma = x0[:4], y[:4], prompts[:4], noise[:4], sigma[:4]
    loss = student.loss(x0, y, prompts, noise, sigma)
    assert rel_max(loss, (noise - x0).square().mean()) < 1e-6
    loss.backward()
    assert student.dit.head.head.weight.grad.abs().max() > 0
    student.zero_grad()
    matrices = {
        name for name, p in student.named_parameters() if train_dit.is_block_matrix(name, p)
    }
    assert (
        len(matrices) == 12 * 10 + 2 * 7
    )  # q k v o twice and two of the feed-forward; T5: q k v o, gate fc1 fc2
    assert not any("pos_embedding" in name or "modulation" in name for name in matrices)


def test_training_attention_is_attention():
    q, k, v = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.scaled_dot_product_attention(q, k, v)
    assert rel_max(train_dit.plain_attention(q, k, v), expected) < 1e-6


def test_an_untrained_vae_starts_with_a_narrow_posterior():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = VAE(TINY_VAE)
        train_vae.initialise(vae)
        _, logvar = vae.posterior(torch.zeros(1, 3, 1, 32, 32))
        assert abs(logvar.mean() + 6) < 1
        value = train_vae.loss(
            vae, train_vae.crops(np.random.default_rng(0), 1), torch.Generator().manual_seed(0)
        )
        assert value.isfinite()


def test_statistics_make_latents_standard(wan):
    again = VAE(replace(wan.vae.cfg, **train_vae.statistics(wan.vae, clips=6))).requires_grad_(
        False
    )
    again.load_state_dict(wan.vae.state_dict())
    rng, table = np.random.default_rng((1, 2**20)), mixture.sources()
    latents = torch.cat(
        [
            again.encode(train_vae.to_tensor(train_vae.clip(rng, table)[None]), chunk=12).flatten(2)
            for _ in range(6)
        ],
        2,
    )
    assert latents.mean((0, 2)).abs().max() < 0.05
    assert (latents.std((0, 2)) - 1).abs().max() < 0.05


# -- optimiser and loop ----------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 100))
def test_orthogonalise_leaves_directions_and_evens_out_sizes(rows, columns, seed):
    matrix = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    matrix = (
        u @ (s.clamp(min=0.1 * s.max()).diag_embed()) @ v
    )  # not singular: a direction of size 0 has none
    made = u.mT @ optim.orthogonalise(matrix) @ v.mT
    sizes = made.diagonal(dim1=1, dim2=2)
    assert sizes.min() > 0.5
    assert sizes.max() < 1.4
    assert (made - sizes.diag_embed()).abs().max() < 0.1


def test_muon_moves_by_its_rate_in_every_direction():
    kernel = nn.Parameter(torch.zeros(8, 2, 1, 2))  # a convolution; the matrix 8 x 4
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optim.Muon([kernel], lr=0.1).step()
    sizes = torch.linalg.svdvals(kernel.detach().flatten(1)) / (0.1 * 2**0.5)
    assert ((sizes > 0.5) & (sizes < 1.4)).all()
    assert (kernel * kernel.grad).sum() < 0  # downhill


def test_the_rate_rises_stays_and_falls():
    rates = [optim.rate(step, 100, 10, 0.5) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:51]) == {1.0}
    assert rates[51:] == pytest.approx([(100 - i) / 50 for i in range(51, 100)])


def toy_training(folder, *, stop: int | None = None, steps: int = 11) -> nn.Module:
    """A few steps of a small network with both optimisers. `stop`: killed there."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    opts = optim.optimisers(model, lambda name, p: p.ndim == 2, muon_lr=0.02, adam_lr=0.01)

    def loss_at(step):
        if step == stop:
            raise KeyboardInterrupt
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x[:, :2].sin()).square().mean()

    optim.train(
        model, loss_at, opts, steps=steps, warmup=3, decay=0.5, ema=0.9, folder=folder, save_every=4
    )
    return model


def test_training_resumes_bit_for_bit(tmp_path):
    whole = toy_training(tmp_path / "whole")
    for stop in (2, 7, 10):  # before the first checkpoint, and twice behind one
        with pytest.raises(KeyboardInterrupt):
            toy_training(tmp_path / "broken", stop=stop)
    resumed = toy_training(tmp_path / "broken")
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    for name in ("averaged.safetensors", "checkpoint.safetensors"):
        a, b = (load_file(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    average = load_file(tmp_path / "whole/averaged.safetensors")
    assert not torch.equal(average["0.weight"], whole[0].weight)
    again = toy_training(tmp_path / "whole", stop=0)  # finished: no further step
    assert torch.equal(again[0].weight, whole[0].weight)


def test_snapshots_are_kept(tmp_path):
    model = nn.Linear(2, 1)
    opts = optim.optimisers(model, lambda name, p: p.ndim == 2, muon_lr=0.01, adam_lr=0.01)
    kwargs = {"steps": 5, "warmup": 1, "decay": 0.5, "ema": 0.9, "folder": tmp_path}
    optim.train(
        model,
        lambda step: model(torch.ones(1, 2)).square().mean(),
        opts,
        save_every=2,
        keep_every=4,
        **kwargs,
    )
    kept = load_file(tmp_path / "averaged-4.safetensors")
    assert not torch.equal(kept["weight"], load_file(tmp_path / "averaged.safetensors")["weight"])
    assert not (tmp_path / "averaged-2.safetensors").exists()


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    model = nn.Linear(1, 1)
    opts = optim.optimisers(model, lambda name, p: p.ndim == 2, muon_lr=1, adam_lr=1)
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        optim.train(
            model,
            lambda step: model.weight.sum() / 0,
            opts,
            steps=1,
            warmup=1,
            decay=1,
            ema=0,
            folder=tmp_path,
        )


def test_a_new_folder_begins_with_the_weights_of_a_model(tmp_path):
    wan, words = load("tiny", device="cpu"), train.prepare(tmp_path, "tiny")
    assert words.unknown_words("solve the maze") == []
    student = train_dit.Student(words)
    student.load_state_dict(load_file(tmp_path / "start.safetensors"))
    for name, value in wan.experts["high"].state_dict().items():
        assert torch.equal(student.dit.state_dict()[name], value)
    old, new = (m.token_embedding.weight for m in (wan.text, student.text))
    assert torch.equal(new[: len(old)], old)
    vae = train_vae.finished(tmp_path)
    assert vae.cfg == wan.vae.cfg
    assert all(
        torch.equal(a, b) for a, b in zip(vae.parameters(), wan.vae.parameters(), strict=True)
    )
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    train.prepare(tmp_path, "tiny")  # begun: existing files stay
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_decoder_can_be_averaged_with_the_one_that_it_began_as(tmp_path):
    torch.manual_seed(0)
    began, ended = (VAE(TINY_VAE).state_dict() for _ in range(2))
    train_vae.adopt(tmp_path, VAE(TINY_VAE))
    for stage, tensors in (("vae", began), ("decoder", ended)):
        (tmp_path / stage).mkdir(exist_ok=True)
        save_file(tensors, tmp_path / stage / "averaged.safetensors")
    for share in (0.0, 0.25, 1.0):
        for name, found in train_vae.averaged(tmp_path, share).state_dict().items():
            expected = (1 - share) * began[name] + share * ended[name]
            assert torch.allclose(found, expected, atol=1e-6), name


def test_training_refuses_what_does_not_fit(tmp_path):
    train.prepare(tmp_path)
    with pytest.raises(MinicosError, match="began with None, not with tiny"):
        train.prepare(tmp_path, "tiny")
    for options, told in (
        (["latents", "--family", "maze-5x5"], "--family maze-5x5 is not trained on"),
        (["latents", "--part", "2/2"], "--part 2/2: k/n"),
        (["export", "--variant", "../weights"], "--variant ../weights: take a name"),
    ):
        args = train.options().parse_args([*options, "--out", str(tmp_path)])
        with pytest.raises(MinicosError, match=re.escape(told)):
            train.run(args)


def test_words_that_puzzles_learn_later_are_appended(tmp_path, monkeypatch):
    train.prepare(tmp_path)
    old = tokenizer.tokens(tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")))
    monkeypatch.setattr(puzzles, "WORDS", (*puzzles.WORDS, "zebra"))
    grown = train.prepare(tmp_path)
    assert tokenizer.tokens(grown.vocabulary) == (*old, "zebra")


class Bent(torch.nn.Module):
    """A field whose velocity changes along the way: v = x sigma, of the given strength."""

    def __init__(self):
        super().__init__()
        self.strength = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, timestep, text, y):
        return self.strength * x * (timestep / 1000).view(-1, 1, 1, 1, 1)


def test_a_distilled_step_leads_where_the_steps_of_its_teacher_do(words, pool):
    student = train_dit.FewStepStudent(words)
    student.dit = Bent()
    x0, y, prompts, noise, sigma = train_dit.batch(pool, 0, 0)
    many, few = train_dit.levels("tiny"), train_dit.levels("4step")
    assert torch.equal(many[::5], few)
    expected = []
    for i in range(len(x0)):  # one after the other, with a plain loop
        piece = i % 4
        s, end = few[piece], few[piece + 1]
        x = start = (1 - s) * x0[i] + s * noise[i]
        for a, b in zip(many[5 * piece :][:5], many[5 * piece + 1 :], strict=False):
            x = x + (b - a) * x * a
        expected.append((start * s - (x - start) / (end - s)).square().mean())
    loss = student.loss(x0, y, prompts, noise, sigma)
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-4)
    loss.backward()  # the teacher is not trained
    assert student.dit.strength.grad is not None


def test_updates_can_be_switched_off_for_a_while(words):
    student = train_dit.Student(words)
    layer = student.dit.blocks[0].self_attn.q
    before = layer.weight.clone()
    updates = train_dit.with_updates(student, rank=2)
    assert len(updates) == 2 * 12 * 10
    with torch.no_grad():
        for update in updates:
            update.fill_(0.1)
    assert rel_max(layer.weight, before) > 0.01
    with train_dit.without_updates(student.dit):
        assert torch.equal(layer.weight, before)
    assert rel_max(layer.weight, before) > 0.01


# -- shipping --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student, words):
    """The checkpoints of all stages, untrained, and with updates that are not zero."""
    folder, draw = tmp_path_factory.mktemp("trained"), torch.Generator().manual_seed(0)
    averaged = {"vae": VAE(TINY_VAE).state_dict(), "dit": student.state_dict()}
    train.prepare(folder)  # the tokenizer
    for name, tensors in averaged.items():
        (folder / name).mkdir()
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / name / "averaged.safetensors"
        )
    updated = train_dit.finished(folder, words)
    train_dit.with_updates(updated, rank=16)
    low = {
        k: torch.randn(v.shape, generator=draw) / 16 if k.endswith(".up") else v
        for k, v in updated.state_dict().items()
    }
    for name in ("low", "frame-causal"):
        (folder / name).mkdir()
        save_file(
            {k: v.contiguous() for k, v in low.items()}, folder / name / "averaged.safetensors"
        )
    return folder, averaged, low


def test_export_writes_a_small_folder_that_loads_strictly(trained, words, tmp_path, monkeypatch):
    folder, averaged, low = trained
    monkeypatch.setattr(
        train_vae, "statistics", lambda vae: {"mean": TINY_VAE.mean, "std": TINY_VAE.std}
    )  # instead of a hundred clips
    export.export(folder, tmp_path, words)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 14e6
    wan = load(tmp_path, device="cpu")
    assert (wan.variant, set(wan.experts)) == ("tiny", {"high", "low"})
    assert wan.vae.cfg == TINY_VAE
    networks = (
        ("dit.", wan.experts["high"], averaged["dit"]),
        ("text.", wan.text, averaged["dit"]),
        ("", wan.vae, averaged["vae"]),
    )
    for prefix, network, expected in networks:
        for name, value in network.state_dict().items():
            assert torch.equal(value, expected[prefix + name].half().float()), name

    changed = 0
    for name, value in wan.experts["low"].state_dict().items():
        base = wan.experts["high"].get_parameter(name)
        marker = f"dit.{name.removesuffix('.weight')}.parametrizations.weight.0"
        if f"{marker}.up" in low:
            changed += 1
            assert (
                rel_max(value - base, low[f"{marker}.up"] @ low[f"{marker}.down"]) < 2e-3
            )  # float16
        else:
            assert torch.equal(value, base)
    assert changed == 12 * 10

    monkeypatch.setattr(layouts, "EMBEDDED", tmp_path)
    monkeypatch.setattr(layouts, "EMBEDDED_VARIANTS", tmp_path / "variants")
    export.export_variant(folder, tmp_path / "variants/mid", words, "dit/averaged")
    written = {path.name for path in (tmp_path / "variants/mid").iterdir()}
    assert written == {"high_noise_model"}  # the text encoder is that of the base
    variant = load("tiny:mid", device="cpu")
    assert set(variant.experts) == {"high"} and variant.vae.cfg == TINY_VAE
    weights = (w.experts["high"].state_dict() for w in (wan, variant))
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    causal = tmp_path / "variants/frame-causal"
    export.export_variant(folder, causal, words, "frame-causal/averaged")
    written = {path.name for path in (causal / "high_noise_model").iterdir()}
    assert written == {"config.json", "lora.safetensors"}
    variant = load("tiny:frame-causal", device="cpu")
    assert variant.cfg == replace(wan.cfg, frame_causal=True)
    weights = wan.experts["low"].state_dict(), variant.experts["high"].state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    earlier = {k: v + 1 if k.startswith("text.") else v for k, v in averaged["dit"].items()}
    save_file(earlier, folder / "dit/averaged-2000.safetensors")
    export.export_variant(folder, tmp_path / "variants/early", words, "dit/averaged-2000")
    own = load("tiny:early", device="cpu").text.state_dict()
    for name, value in wan.text.state_dict().items():
        assert torch.allclose(own[name], value + 1, atol=2e-3, rtol=2e-3)  # float16

    bad = tmp_path / "Wan2.1_VAE.safetensors"
    with pytest.raises(ValueError, match="not part of this"):
        load_into(DiT(VARIANTS["tiny"]), bad)
    text = TextEncoder(TINY_TEXT)
    load_into(text, tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors")
    assert all(map(torch.equal, text.state_dict().values(), wan.text.state_dict().values()))


# -- judging ---------------------------------------------------------------------------------------

NAMES = ("mark", "reveal-one", "maze-5x5")
ROW = ["category", "domain", "score", "solved", "truth", "static", "noise", "oracle", "n"]


def test_evaluate_reports_every_family(wan):
    means = partial(evaluate.judge, wan.with_preset(steps=1), n=1)
    report = evaluate.evaluate(means, 1, NAMES)
    assert sorted(report) == ["families", "in_domain", "out_of_domain", "vae_psnr_db"]
    assert list(report["families"]) == list(NAMES)
    for name, row in report["families"].items():
        assert sorted(row) == sorted(ROW)
        assert (row["truth"], row["solved"], row["oracle"]) == (1, 0, 0), name  # random weights
        assert max(row["static"], row["noise"]) <= 0.3
        assert row["n"] == 1
    means = [report["families"][name]["score"] for name in NAMES]
    assert report["in_domain"] == pytest.approx(np.mean(means[:2]), abs=1e-4)
    assert report["out_of_domain"] == pytest.approx(means[2], abs=1e-4)
    assert report["families"]["maze-5x5"]["domain"] == "out"
    assert 0 < report["vae_psnr_db"] < 20
    json.dumps(report)
    table = "\n".join(evaluate.lines(report))
    assert all(name in table for name in (*NAMES, "in_domain", "out_of_domain"))


def test_the_model_card_prints_the_scores_that_ship():
    report = json.loads((EMBEDDED.parent / "scores.json").read_text())
    assert list(report["families"]) == list(puzzles.FAMILIES)
    for name, row in report["families"].items():
        assert row["domain"] == puzzles.family(name).domain
        assert row["truth"] == 1
        assert max(row["static"], row["noise"]) <= 0.3
        assert row["n"] >= 50
    card = (EMBEDDED.parents[2] / "weights.md").read_text("utf-8")
    assert "\n".join(evaluate.card(report)) in card
    assert f"VAE: {report['vae_psnr_db']} dB" in card
    assert f"in domain score {report['in_domain']:.2f}" in card
    assert "\n".join(evaluate.variants_card(report)) in card
    assert set(report["variants"]) == set(layouts.embedded_variants())


def test_a_report_has_the_same_for_every_variant(wan, monkeypatch):
    def open_model(name, preset=None):
        opened.append(name)
        return wan.with_preset(steps=1)

    opened: list[str] = []
    monkeypatch.setattr(evaluate, "opened", open_model)
    report = evaluate.complete("tiny", 1, ["mid"], families=["mark"])
    assert opened == ["tiny", "tiny:mid"]
    row = report["variants"]["mid"]["families"]["mark"]
    assert sorted(row) == sorted(["category", "domain", "score", "solved", "n"])
    assert row["score"] == report["families"]["mark"]["score"]
    assert report["variants"]["mid"]["out_of_domain"] is None
    head, _, *rows = evaluate.variants_card(
        evaluate.complete("tiny", 1, ["mid"], families=["mark", "maze-5x5"])
    )
    assert [row.split("|")[1].strip() for row in rows] == ["`tiny`", "`tiny:mid`"]
    assert all(row.count("|") == head.count("|") for row in rows)


def test_evaluate_counts_what_is_solved(wan, monkeypatch):
    def solve(wan, batch, seed):
        """Right for the first of a batch; a still picture for all others."""
        still = [np.repeat(p.first_frame()[None], p.frames, axis=0) for p in batch[1:]]
        return np.stack([batch[0].draw(0), *still])

    monkeypatch.setattr(evaluate, "solve", solve)
    monkeypatch.setattr(evaluate, "BATCH", 2)
    family = puzzles.family("mark")
    found = evaluate.judge(wan, family, 4, vae=False)
    assert found["solved"] == 0.5
    assert 0.5 < found["score"] < 0.65


def test_solve_and_reconstruct(wan):
    batch = puzzles.distinct("mark", 2, 3)
    one = wan.with_preset(steps=1)
    videos = evaluate.solve(one, batch, seed=5)
    assert (videos.shape, videos.dtype) == ((2, 13, 48, 48, 3), np.uint8)
    image = torch.from_numpy(batch[1].first_frame()).permute(2, 0, 1) / 255
    alone = one.generate(batch[1].prompt, image, seed=6)
    assert np.abs(videos[1].astype(int) - alone).max() <= 2  # the batch moves last bits
    (shell,) = puzzles.family("shell").distinct(1)
    assert evaluate.solve(one, [shell], seed=0).shape == (1, shell.frames, 64, 64, 3)

    class Perfect:
        def encode(self, videos, chunk):
            return videos

        def decode(self, latents, chunk):
            off = torch.tensor([0.02, 2.0]).view(2, 1, 1, 1, 1)  # nearly right, and all white
            return latents + off

    drawn = np.stack([p.draw(0) for p in batch])
    found = evaluate.reconstruct(replace(wan, vae=Perfect()), batch, drawn)
    # 10 log10(2^2 / error^2)
    assert found["vae_psnr_db"] == pytest.approx([40.0, 0.0], abs=1e-3)
    assert found["oracle"] == [1, 0]
    assert batch[0].score(to_uint8(evaluate.to_float(drawn[0]))).solved


def test_held_out_puzzles_are_distinct_and_were_not_trained_on():
    for name in NAMES:
        family = puzzles.family(name)
        found = [p for batch in evaluate.batches(family, 30, "test") for p in batch]
        assert len({f"{p.key}: {p.prompt}" for p in found}) == 30
        assert {puzzles.split_of(p.key) for p in found} == {"test"}
        assert {(p.kind, p.size) for p in found} == {(family.puzzle.kind, family.size)}
