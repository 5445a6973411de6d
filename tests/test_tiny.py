"""How the embedded model is trained, judged and shipped. Nothing here depends on how good its weights are."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from minicos import puzzles
from minicos.condition import image_channels
from minicos.config import TINY_TEXT, TINY_VAE, VARIANTS
from minicos.dit import DiT
from minicos.media import to_uint8
from minicos.pipeline import load
from minicos.text import TextEncoder, Tokenizer
from minicos.tiny import data, evaluate, export, optim, tokenizer, train_dit, train_vae
from minicos.vae import VAE
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


# -- what ships -------------------------------------------------------------------------------------------------------


def test_what_ships_is_small_and_complete():
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 14e6
    names = {str(path.relative_to(EMBEDDED)) for path in files}
    low = {"low_noise_model/lora.safetensors"}  # comes with the second stage of training
    assert names - low == {
        "Wan2.1_VAE.safetensors",
        "models_t5_umt5-xxl-enc-bf16.safetensors",
        "google/umt5-xxl/tokenizer.json",
        "high_noise_model/config.json",
        "high_noise_model/diffusion_pytorch_model.safetensors",
    }


def test_the_tokenizer_that_ships_is_the_one_that_is_built(words, tmp_path):
    tokenizer.build().save(str(tmp_path / "tokenizer.json"))
    assert json.loads(TOKENIZER.read_text()) == json.loads(
        (tmp_path / "tokenizer.json").read_text()
    )
    for kind in puzzles.KINDS:
        for seed in range(5):
            puzzle = puzzles.make(kind, seed, size=4)
            for each in (puzzle, *puzzle.variants()):
                assert words.unknown_words(each.prompt) == []
                assert data.KINDS[data.PROMPTS.index(each.prompt)] == kind


# -- training data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "shape"), [(0, (8, 3, 13, 32, 32)), (98, (3, 3, 13, 48, 48)), (99, (3, 3, 13, 64, 64))]
)
def test_a_batch_of_the_vae_depends_on_seed_and_step_alone(step, shape):
    batch = train_vae.batch(0, step, 100)
    np.random.default_rng(0).random()  # no state that others share
    assert torch.equal(batch, train_vae.batch(0, step, 100))
    assert batch.shape == shape
    assert batch.min() >= -1
    assert batch.max() <= 1
    assert not torch.equal(batch, train_vae.batch(1, step, 100))
    assert not torch.equal(
        batch, train_vae.batch(0, step - 2, 100) if step else train_vae.batch(0, 1, 100)
    )


@pytest.fixture
def quick_shards(monkeypatch):
    """Three pictures a shard, and no compiler."""
    monkeypatch.setattr(data, "COMPILED", train_vae.EAGER)
    monkeypatch.setattr(data, "PICTURES", 3)


def test_shards_and_the_pool(quick_shards, wan, tmp_path):
    mixture = data.MIXTURES["first"]
    data.write(wan.vae, tmp_path, "first", seed=0, shards=3, part=1, parts=2)
    pool = data.Pool(tmp_path)
    halfway = len(pool)
    data.write(wan.vae, tmp_path, "first", seed=0, shards=3)
    files = sorted(tmp_path.iterdir())
    assert sorted(path.name[4:9] for path in files) == ["00000", "00001", "00002"]
    pool.refresh()
    pool.refresh()  # nothing is taken in twice
    assert 0 < halfway < len(pool) == sum(len(load_file(path)["x0"]) for path in files)

    for path in files:
        size, tensors = data.shard(wan.vae, mixture, 0, int(path.name[4:9]))
        assert path.name.startswith(f"{size}x{size}-")
        assert all(torch.equal(tensors[k], v) for k, v in load_file(path).items())
        assert tensors["x0"].shape[1:] == tensors["y"].shape[1:] == (16, 4, 2 * size, 2 * size)
        assert sorted(set(tensors["of"].tolist())) == list(range(len(tensors["y"]))) == [0, 1, 2]
        for x0, of in zip(
            tensors["x0"], tensors["of"], strict=True
        ):  # a video starts with the picture that it answers
            nearest = (
                (tensors["y"][:, :, 0].float() - x0[:, 0].float()).square().sum((1, 2, 3)).argmin()
            )
            assert nearest == of
    assert not torch.equal(
        *(data.shard(wan.vae, mixture, seed, 0)[1]["y"][0, :, 0, :6, :6] for seed in (0, 1))
    )


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
    """Every kind and size, 20 pictures of each. x0 tells its prompt and its picture, and y tells its picture."""
    folder, which = tmp_path_factory.mktemp("pool"), torch.arange(20).view(-1, 1, 1, 1)
    for i, prompt in enumerate([*range(1, 10)] * 2):
        size = 3 + i // 9
        shape = (20, 16, 4, 2 * size, 2 * size)
        tensors = {"x0": torch.full(shape, float(prompt)).half(), "y": torch.zeros(shape).half()}
        tensors["x0"][:, 1], tensors["y"][:, 1] = which.flip(0), which
        tensors |= {
            "of": torch.arange(19, -1, -1, dtype=torch.int32),
            "prompt": torch.full((20,), prompt).byte(),
        }
        save_file(tensors, folder / f"{size}x{size}-{i:05}.safetensors")
    return data.Pool(folder)


def test_a_batch_of_the_dit_depends_on_seed_and_step_alone(pool):
    first, again, other = (train_dit.batch(pool, 0, step, 64) for step in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[3], other[3]) if first[3].shape == other[3].shape else True
    assert not torch.equal(first[4], other[4])
    assert not torch.equal(first[4], train_dit.batch(pool, 1, 7, 64)[4])

    x0, y, prompt, noise, sigma = first
    assert x0.shape == noise.shape
    assert y.shape == (64, 20, *x0.shape[2:])
    assert torch.equal(y[:, :4, 0], torch.ones_like(y[:, :4, 0]))
    assert not y[:, :4, 1:].any()
    assert torch.equal(y[:, 5], x0[:, 1])  # the picture that the video answers
    told = prompt > 0  # the others' prompts were dropped
    assert torch.equal(x0[told, 0, 0, 0, 0], prompt[told].float())
    assert sigma.shape == (64,)


def test_mixtures_and_dropped_prompts_have_their_shares(pool):
    seen = [train_dit.batch(pool, 0, step, 256) for step in range(30)]
    dropped = np.mean([(prompt == 0).float().mean().item() for _, _, prompt, _, _ in seen])
    assert abs(dropped - train_dit.DROP) < 0.02
    kinds = [data.KINDS[int(k)] for x0, *_ in seen for k in x0[:, 0, 0, 0, 0]]
    for kind in puzzles.KINDS:
        share = sum(v for (k, _), v in data.MIXTURES["first"].items() if k == kind)
        assert abs(kinds.count(kind) / len(kinds) - share) < 0.06, kind  # a batch is of one size
    for mixture in data.MIXTURES.values():
        assert math.isclose(sum(mixture.values()), 1)


@given(st.integers(1, 40), st.integers(0, 100), st.floats(0.1, 1))
def test_noise_levels_are_stratified(n, seed, below):
    sigma = train_dit.noise_levels(n, np.random.default_rng(seed), below).double()
    assert ((sigma > 0) & (sigma < below + 1e-6)).all()
    u = sigma / (train_dit.SHIFT - (train_dit.SHIFT - 1) * sigma)  # undo the shift
    strata = (u / u.new_tensor(below / (3 - 2 * below)) * n).clamp(max=n - 1e-4)
    assert torch.equal((strata + 1e-5).floor().sort().values, torch.arange(n).double()) or n > 20


# -- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(words):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return train_dit.Student(words)


def test_an_untrained_student_predicts_nothing(student, pool):
    """The head starts at zero, so the loss is that of the velocity 0; and it learns through every residual branch."""
    x0, y, prompt, noise, sigma = train_dit.batch(pool, 0, 1, 4)
    loss = student.loss(x0, y, prompt, noise, sigma)
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
    rng = np.random.default_rng((1, 2**20))
    latents = torch.cat(
        [
            again.encode(train_vae.to_tensor(train_vae.clip(rng)[None]), chunk=12).flatten(2)
            for _ in range(6)
        ],
        2,
    )
    assert latents.mean((0, 2)).abs().max() < 0.05
    assert (latents.std((0, 2)) - 1).abs().max() < 0.05


# -- optimiser and loop -------------------------------------------------------------------------------------------------


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
    again = toy_training(tmp_path / "whole", stop=0)  # finished: not a step more
    assert torch.equal(again[0].weight, whole[0].weight)


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


# -- shipping ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, student, words):
    """The checkpoints of all stages, untrained, and with updates that are not zero."""
    folder, draw = tmp_path_factory.mktemp("trained"), torch.Generator().manual_seed(0)
    averaged = {"vae": VAE(TINY_VAE).state_dict(), "dit": student.state_dict()}
    for name, tensors in averaged.items():
        (folder / name).mkdir()
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, folder / name / "averaged.safetensors"
        )
    updated = train_dit.with_updates(train_dit.finished(folder, words))
    low = {
        k: torch.randn(v.shape, generator=draw) / 16 if k.endswith(".up") else v
        for k, v in updated.state_dict().items()
    }
    (folder / "low").mkdir()
    save_file({k: v.contiguous() for k, v in low.items()}, folder / "low/averaged.safetensors")
    return folder, averaged, low


def test_export_writes_a_small_folder_that_loads_strictly(trained, words, tmp_path, monkeypatch):
    folder, averaged, low = trained
    monkeypatch.setattr(
        train_vae, "statistics", lambda vae: {"mean": TINY_VAE.mean, "std": TINY_VAE.std}
    )  # a hundred clips otherwise
    path = tmp_path / "google/umt5-xxl/tokenizer.json"
    path.parent.mkdir(parents=True)
    tokenizer.build().save(str(path))
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

    bad = tmp_path / "Wan2.1_VAE.safetensors"
    with pytest.raises(ValueError, match="not part of this"):
        load_into(DiT(VARIANTS["tiny"]), bad)
    assert (
        load_into(
            TextEncoder(TINY_TEXT), tmp_path / "models_t5_umt5-xxl-enc-bf16.safetensors"
        ).parameters
        > 0
    )


# -- judging ----------------------------------------------------------------------------------------------------------

KEYS = ["vae_psnr_db", "vae_oracle", "maze_3x3", "maze_4x4", "goal", "mark", "memory", "turn", "n"]


def test_evaluate_reports_every_task(wan):
    report = evaluate.evaluate(wan.with_preset(steps=1), 2)
    assert sorted(report) == sorted(KEYS)
    assert report["n"] == 2
    assert {report[key] for key in KEYS[1:-1]} == {0.0}  # random weights solve nothing
    assert 0 < report["vae_psnr_db"] < 20
    json.dumps(report)


def test_evaluate_counts_what_is_solved(wan, monkeypatch):
    def solve(wan, batch, seed):
        """Right for mazes; for the others right for the first of a batch of two, and a still picture for the second."""
        videos = [p.draw(0) for p in batch]
        if batch[0].kind != "maze":
            videos[1:] = [np.repeat(p.first_frame()[None], 13, axis=0) for p in batch[1:]]
        return np.stack(videos)

    monkeypatch.setattr(evaluate, "solve", solve)
    monkeypatch.setattr(evaluate, "reconstruct", lambda wan, batch: ([30.0, 50.0], [True, False]))
    report = evaluate.evaluate(wan, 4)
    assert report == {
        "vae_psnr_db": 40.0,
        "vae_oracle": 0.5,
        "maze_3x3": 1.0,
        "maze_4x4": 1.0,
        "goal": 0.5,
        "mark": 0.5,
        "memory": 0.5,
        "turn": 0.25,
        "n": 4,
    }


def test_solve_and_reconstruct(wan):
    batch = puzzles.distinct("mark", 2, 3)
    one = wan.with_preset(steps=1)
    videos = evaluate.solve(one, batch, seed=5)
    assert (videos.shape, videos.dtype) == ((2, 13, 48, 48, 3), np.uint8)
    image = torch.from_numpy(batch[1].first_frame()).permute(2, 0, 1) / 255
    alone = one.generate(batch[1].prompt, image, seed=6)
    assert np.abs(videos[1].astype(int) - alone).max() <= 2  # the batch moves last bits

    class Perfect:
        def encode(self, videos, chunk):
            return videos

        def decode(self, latents, chunk):
            return latents + torch.tensor([0.02, 2.0]).view(
                2, 1, 1, 1, 1
            )  # nearly right, and all white

    psnr, verdicts = evaluate.reconstruct(replace(wan, vae=Perfect()), batch)
    assert psnr == pytest.approx([40.0, 0.0], abs=1e-3)  # 10 log10(2^2 / error^2)
    assert verdicts == [True, False]
    assert batch[0].score(to_uint8(evaluate.to_float(batch[0].draw(0)))).solved


def test_held_out_puzzles_are_distinct_and_were_not_trained_on():
    found = [(task, puzzle) for task, batch in evaluate.batches(4, "test") for puzzle in batch]
    names = [f"{puzzle.key}: {puzzle.prompt}" for _, puzzle in found]
    assert len(set(names)) == len(names)
    assert {puzzles.split_of(puzzle.key) for _, puzzle in found} == {"test"}
    for task, (kind, sizes) in evaluate.TASKS.items():
        sized = [puzzle.size for t, puzzle in found if t == task and puzzle.kind == kind]
        assert sorted(sized) == sorted(size for size in sizes for _ in range(4 // len(sizes)))
