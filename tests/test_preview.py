"""The preview: a linear picture of the clean estimate, fitted from the VAE, rewritten each step."""

import numpy as np
import pytest
import torch

from minicos import puzzles
from minicos.analysis.tools import preview
from minicos.analysis.tools.preview import Linear, Preview, fit, linear, scenes, strip
from minicos.analysis.tools.record import record
from minicos.media import load_image, to_float
from minicos.open import load
from minicos.runs import Run


@pytest.fixture(scope="module")
def tiny():
    return load("tiny", device="cpu").with_preset(steps=2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_an_affine_vae_is_inverted_exactly():
    """Cells of 2 x 2 pixels whose latents are an invertible affine image of them."""
    draw = torch.Generator().manual_seed(0)
    mix, shift = torch.randn(12, 12, generator=draw), torch.randn(12, generator=draw)
    clips = torch.rand(12, 3, 1, 8, 8, generator=draw) * 2 - 1
    cells = clips.view(12, 3, 1, 4, 2, 4, 2).permute(0, 2, 3, 5, 4, 6, 1).reshape(12, 1, 4, 4, 12)
    z = (cells @ mix + shift).movedim(-1, 1)

    class Affine:
        class cfg:
            stride = (4, 2, 2)

        class decoder:
            conv1 = torch.nn.Conv2d(1, 1, 1)

        def __init__(self):
            self.left = list(z)

        def encode(self, clip):
            return self.left.pop(0)[None]

    found = fit(Affine(), clips)
    expected = ((clips[0] + 1) * 127.5).round().permute(1, 2, 3, 0)
    assert np.abs(found(z[0]).astype(int) - expected.numpy()).max() <= 1  # rounding alone


def test_the_preview_of_a_puzzle_looks_like_it(tiny):
    """Held-out puzzles: the linear picture explains most of what the frames vary."""
    shown = linear(tiny)
    videos = [puzzles.FAMILIES[name].draw(0, "test").draw(0) for name in ("maze", "mark")]
    for video in videos:
        latent = tiny.vae.encode(to_float(video)[None])[0]
        frames = video[[0, 4, 8, 12]].astype(float)
        error = ((shown(latent) - frames) ** 2).mean()
        assert error < 0.5 * frames.var()  # measured about 0.37 and 0.2


def test_the_map_is_fitted_once(tiny, monkeypatch):
    first = linear(tiny)
    monkeypatch.setattr(preview, "fit", None)  # would raise
    assert torch.equal(linear(tiny).weight, first.weight)
    (kept,) = preview._cache().iterdir()
    kept.write_bytes(b"damaged")
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept.parents[1]))
    assert torch.equal(linear(tiny).weight, first.weight)


def test_every_step_rewrites_one_picture(tiny, tmp_path):
    puzzle = puzzles.FAMILIES["maze"].draw(0, "test")
    condition = tiny.condition(puzzle.prompt, puzzle.first_frame())
    seen = []

    class Watched(Preview):
        def keep(self, step, run):
            kept = super().keep(step, run)
            seen.append(run.path("preview.png").read_bytes())
            return kept

    run = Run.open(tmp_path / "run", {})
    record(tiny, condition, run, [Watched(tiny)], tiny.noise(condition, 0))
    assert len(set(seen)) == 2
    assert load_image(run.path("preview.png")).shape == (3, 18 + 128, 4 * 128)


def test_scenes_and_strips():
    clips = scenes(2, 5, 16)
    assert clips.shape == (2, 3, 5, 16, 16)
    assert clips.abs().max() <= 1
    assert not torch.equal(clips[0], clips[1])
    wide = strip(np.zeros((21, 30, 200, 3), np.uint8), "step 3")
    assert wide.shape == (18 + 30, 7 * 200, 3)
    assert Linear(torch.zeros(4 * 9 + 1, 12), 2)(torch.zeros(4, 2, 3, 3)).shape == (2, 6, 6, 3)
