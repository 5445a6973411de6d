"""A model as one object: what loading returns and refuses, and what a run depends on."""

import copy
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import minicos
from minicos import config, schedule
from minicos.condition import image_channels, resize
from minicos.dit import FLOAT32
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.media import to_uint8
from minicos.open import load
from minicos.text import TextEncoder
from minicos.tiny.lora import save_lora
from minicos.weights import lora
from minicos.weights.inspect import inspect
from minicos.weights.layouts import EMBEDDED
from tests import golden
from tests.golden import rel_l2, rel_max

DIT = "high_noise_model/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def wan(toy):
    return load(toy, device="cpu").with_preset(steps=3)


@cache
def image(seed: int = 0, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))


def last(wan, condition, **options) -> torch.Tensor:
    *_, step = wan.sample(condition, **options)
    return step.next


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """The largest difference in levels."""
    return np.abs(a.astype(int) - b).max()


# -- loading ---------------------------------------------------------------------------------------


def test_importing_minicos_does_not_import_torch():
    code = "import sys, minicos\nassert dir(minicos)\nprint('torch' in sys.modules, 'numpy' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert (done.stdout, done.stderr) == ("False False\n", "")
    assert all(hasattr(minicos, name) for name in minicos.__all__)
    assert set(minicos.__all__) == {*minicos._HOME, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        minicos.laod  # noqa: B018


def test_type_checkers_and_pdoc_see_the_names_that_are_imported_on_first_use():
    code = "import sys; sys.modules['pdoc'] = sys\nimport minicos\nprint(*sorted(vars(minicos).keys() & set(minicos.__all__)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == sorted(minicos.__all__), done.stderr
    assert {*minicos._HOME, "__version__"} == {*minicos.__all__}


def test_the_embedded_model():
    wan = load("tiny", device="cpu")
    two = (EMBEDDED / "low_noise_model").is_dir()  # comes with the second stage of its training
    assert wan.variant == "tiny"
    assert set(wan.experts) == ({"high", "low"} if two else {"high"})
    assert wan.expert_name(900) == "high"
    assert wan.expert_name(899) == ("low" if two else "high")
    assert wan.preset == config.get_preset("tiny", "tiny")
    assert wan.preset.takes_image
    assert len(wan.points) == 4 + 23 * 12
    assert (wan.device.type, wan.dtype) == ("cpu", torch.float32)
    assert wan.tokenizer.unknown_words("Solve the maze") == []
    assert wan.vae.cfg == replace(config.TINY_VAE, mean=wan.vae.cfg.mean, std=wan.vae.cfg.std)
    for network in (*wan.experts.values(), wan.vae, wan.text):
        assert all(
            p.dtype == torch.float32 and not p.requires_grad and p.isfinite().all()
            for p in network.parameters()
        )
    video = wan.with_preset(steps=1).generate("solve the maze", image(0, 64, 48))
    assert (video.shape, video.dtype) == ((13, 64, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def two_experts(toy, tmp_path_factory):
    """The toy with a low-noise expert: a LoRA on one matrix."""
    folder = tmp_path_factory.mktemp("two")
    for path in toy.iterdir():
        (folder / path.name).symlink_to(path)
    draw = torch.Generator().manual_seed(0)
    delta = lora.LowRank(torch.randn(128, 4, generator=draw), torch.randn(4, 128, generator=draw))
    save_lora(folder / "low_noise_model/lora.safetensors", {"blocks.3.self_attn.q.weight": delta})
    return folder, delta


def test_a_low_noise_expert_can_be_a_lora_on_the_other(two_experts, wan):
    folder, delta = two_experts
    both = load(folder, device="cpu")
    assert both.variant == "tiny"
    high, low = (both.experts[name].state_dict() for name in ("high", "low"))
    for name, weight in wan.experts["high"].state_dict().items():
        assert torch.equal(high[name], weight)
        if name == "blocks.3.self_attn.q.weight":
            assert rel_max(low[name] - weight, delta.up @ delta.down) < 2e-7  # measured 3.4e-8
        else:
            assert torch.equal(low[name], weight)
    assert "LoRA of rank 4" in " ".join(inspect(folder).notes)

    names = [step.expert for step in both.sample(both.condition("turn the l", image()))]
    assert names == ["high" if t >= 900 else "low" for t in both.schedule().timesteps]
    assert set(names) == {"high", "low"}
    assert not torch.equal(
        *(last(w, w.condition("turn the l", image())) for w in (both, wan.with_preset("tiny")))
    )
    handed_over = both.with_preset(boundary=0.5)
    assert [handed_over.expert_name(t) for t in (500, 499)] == ["high", "low"]


@pytest.mark.parametrize("name", ["tiny", "cos"])
def test_dtypes(name, toy, wan):
    narrow = load(toy, device="cpu", dtype=torch.bfloat16, preset=name).with_preset(steps=1)
    for key, p in narrow.experts["high"].named_parameters():
        assert p.dtype == (
            torch.float32 if any(part in key for part in FLOAT32) else torch.bfloat16
        ), key
    assert {p.dtype for p in narrow.vae.parameters()} == {narrow.decode_dtype} == {torch.float32}
    assert {p.dtype for p in narrow.text.parameters()} == {torch.bfloat16}
    assert narrow.dtype == torch.bfloat16

    stream = []
    hooks = Hooks().on("blocks.11", lambda x, site: stream.append(x.dtype))
    for a, b in zip(
        *(w.sample(w.condition("turn the l", image()), hooks=hooks) for w in (narrow, wan)),
        strict=False,
    ):
        assert a.velocity_cond.dtype == a.next.dtype == torch.float32
        assert rel_max(a.velocity_cond, b.velocity_cond) < 0.03  # measured 0.0031 and 0.0096
    assert stream[0] == getattr(torch, narrow.preset.residual_dtype)


def test_a_loop_in_bfloat16_is_the_papers_tools_by_hand():
    """As DiffSynth's pipeline has it: latents, velocities, guidance and timestep in bfloat16. And
    how far from a loop in float32 it ends.
    """
    cos = load("tiny", device="cpu", dtype=torch.bfloat16, preset="cos").with_preset(steps=8)
    tools = cos.with_preset(loop_dtype="bfloat16")
    condition = cos.condition("solve the maze", image(), frames=5)
    x, sigmas = cos.noise(condition, 0).bfloat16(), torch.tensor(cos.schedule().sigmas)
    for i, step in enumerate(tools.sample(condition, seed=0)):
        time = (1000 * sigmas[i]).bfloat16()
        assert step.timestep == time.item()
        dit = tools.experts[step.expert]
        cond, uncond = (
            dit(x.float(), time.view(1, 1), text, condition.y).bfloat16()
            for text in (condition.text, condition.text_null)
        )
        x = x + (uncond + 5.0 * (cond - uncond)) * (sigmas[i + 1] - sigmas[i])
        assert torch.equal(step.next, x.float())
    assert 1e-3 < rel_l2(last(tools, condition), last(cos, condition)) < 0.3


def test_a_residual_stream_of_another_dtype_needs_loading(toy):
    narrow = load(toy, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(MinicosError, match="residual stream in bfloat16"):
        narrow.with_preset("cos")
    assert narrow.with_preset("official").preset.solver == "unipc"


def test_shards_are_found_by_their_index(toy, wan, tmp_path):
    for path in toy.iterdir():
        if path.name != "high_noise_model":
            (tmp_path / path.name).symlink_to(path)
    folder = tmp_path / "high_noise_model"
    folder.mkdir()
    (folder / "config.json").write_bytes((toy / "high_noise_model/config.json").read_bytes())
    tensors, shards = load_file(toy / DIT), {}
    for i, key in enumerate(tensors):
        shards.setdefault(f"diffusion_pytorch_model-0000{i % 3 + 1}-of-00003.safetensors", {})[
            key
        ] = tensors[key]
    for name, part in shards.items():
        save_file(part, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": weight_map})
    )
    sharded = load(tmp_path, device="cpu")
    expected = wan.experts["high"].state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in sharded.experts["high"].state_dict().items())
    next(iter(folder.glob("*-00002-*"))).unlink()
    with pytest.raises(MinicosError, match=r"00002-of-00003\.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("residency", ["resident", "swap", "stream", "disk"])
def test_copies_of_a_model(residency):
    model = load("tiny", device="cpu", residency=residency)
    for copied in (lambda: copy.deepcopy(model), lambda: pickle.loads(pickle.dumps(model))):
        if residency == "resident":
            assert copied().preset == model.preset
        else:
            with pytest.raises(MinicosError, match=f"residency '{residency}' is neither copied"):
                copied()


@pytest.mark.parametrize("part", ["Wan2.1_VAE.safetensors", "google/umt5-xxl/tokenizer.json", DIT])
def test_a_link_to_a_file_that_is_gone(toy, tmp_path, part):
    """As in a cache of the Hub whose blobs were deleted."""
    shutil.copytree(toy, tmp_path / "toy")
    (link := tmp_path / "toy" / part).unlink()
    link.symlink_to("blob")
    with pytest.raises(MinicosError, match=f"{re.escape(str(link))} is a link to blob, which does"):
        load(tmp_path / "toy")


def test_a_lone_expert_of_a_pair_is_refused(toy, monkeypatch):
    monkeypatch.setitem(config.EXPERTS, "tiny", (2,))
    with pytest.raises(
        MinicosError,
        match=r"tiny has two experts, and only one is here \(the high-noise one\).*--part low=FILE",
    ):
        load(toy)


def test_weights_are_told_apart(toy, two_experts, wan, tmp_path):
    assert load(toy).weights == wan.weights != ""
    assert load(two_experts[0]).weights != wan.weights
    for path in toy.iterdir():
        (tmp_path / path.name).symlink_to(path)
    name = "models_t5_umt5-xxl-enc-bf16.safetensors"
    (tmp_path / name).unlink()
    data = bytearray((toy / name).read_bytes())
    data[-1] ^= 1
    (tmp_path / name).write_bytes(data)
    assert load(tmp_path).weights != wan.weights


# -- presets ---------------------------------------------------------------------------------------


def test_models_steps_and_conditions_print_as_three_lines(wan):
    condition = wan.condition("turn the l", image())
    step = next(wan.sample(condition))
    for thing in (wan, step, condition):
        lines = repr(thing).splitlines()
        assert len(lines) == 3
        assert max(map(len, lines)) < 140
    assert wan.variant in repr(wan)
    assert f"{step.sigma:.4g}" in repr(step)
    assert str(tuple(condition.text.shape)) in repr(condition)


def test_a_preset_has_no_other_fields(wan):
    with pytest.raises(MinicosError, match="a preset has no 'stps'; did you mean steps"):
        wan.with_preset(stps=10)


def test_with_preset_shares_the_networks(wan):
    cos = wan.with_preset("cos")
    assert cos.experts is wan.experts
    assert (cos.preset.solver, cos.preset.steps, cos.preset.guidance) == (
        "euler",
        50,
        {"high": 5.0, "low": 5.0},
    )
    assert len(cos.schedule()) == 50
    assert wan.preset.steps == 3
    official = wan.with_preset("official", steps=7, shift=2.0)
    assert official.schedule() == schedule.make("unipc", 7, 2.0)
    assert official.with_preset(steps=8).preset == replace(official.preset, steps=8)
    with pytest.raises(MinicosError, match="'best': take one of tiny, official, cos, 4step"):
        wan.with_preset("best")


@pytest.mark.parametrize("variant", config.VARIANTS)
def test_every_preset_of_every_variant_has_a_schedule(variant):
    for name, preset in config.PRESETS[variant].items():
        assert config.get_preset(variant, name) is preset
        made = schedule.make(preset.solver, preset.steps, preset.shift)
        assert len(made) == preset.steps
        assert preset.frames % 4 == 1
        if preset.boundary:
            assert {schedule.expert_name(t, preset.boundary) for t in made.timesteps} == {
                "high",
                "low",
            }
    assert config.get_preset(variant) is next(iter(config.PRESETS[variant].values()))


# -- conditions and noise --------------------------------------------------------------------------


def test_the_condition_of_a_picture(wan):
    condition = wan.condition("solve the maze", image(0, 48, 32), frames=9)
    assert condition.shape == (1, 16, 3, 6, 4)
    assert condition.y.shape == (1, 20, 3, 6, 4)
    assert condition.text.shape == (1, 16, 64)
    assert condition.text_null is None  # guidance 1
    assert torch.equal(condition.y[:, :4, 0], torch.ones(1, 4, 6, 4))
    assert not condition.y[:, :4, 1:].any()
    clip = torch.zeros(1, 3, 9, 48, 32)
    clip[:, :, 0] = image(0, 48, 32) * 2 - 1
    assert rel_max(condition.y[:, 4:], wan.vae.encode(clip)) < 1e-6  # measured 0

    cos = wan.with_preset("cos")
    silent, said = (
        cos.condition("solve the maze", image(), negative=n).text_null for n in (None, "turn the l")
    )
    assert torch.equal(said, wan.condition("turn the l", image()).text)
    assert not torch.equal(silent, said)


def test_an_area_resizes_the_picture(wan):
    condition = wan.with_preset(area=32 * 32).condition("turn the l", image(0, 64, 128))
    assert condition.shape[-2:] == (2, 4)


BAD = [
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": ["turn the l", "\n"]}, "prompt is empty"),
    ({"image": None}, "give an image"),
    ({"image": image(0, 40, 32)}, "32x40 pixels; both sides must be multiples of 16, e.g. 32x"),
    ({"image": image()[0]}, "float .3 h w. in .0, 1."),
    ({"image": image().permute(1, 2, 0)}, "float .3 h w. in .0, 1."),
    ({"image": image().mul(255).byte()}, "not torch.uint8"),
    ({"image": image() * 255}, "values are .* to .*: scale them to 0..1"),
    ({"image": image() * 2 - 1}, "scale them"),
    ({"image": image() * torch.nan}, "values are nan"),
    ({"image": torch.stack([image()] * 2)}, "one for all prompts or one for each"),
    ({"frames": 12}, "4n [+] 1 frames"),
    ({"frames": 0}, "4n [+] 1 frames"),
    ({"frames": -3}, "4n [+] 1 frames"),
    ({"size": (32, 32)}, "its aspect ratio decides the size"),
]


@pytest.mark.parametrize(("change", "says"), BAD)
def test_a_bad_condition_is_refused(change, says, wan):
    with pytest.raises(MinicosError, match=says):
        wan.condition(**{"prompt": "turn the l", "image": image(), **change})


def test_text_to_video_takes_a_size_and_no_picture(wan):
    text = wan.with_preset(image="none")
    assert (text.preset.takes_image, text.preset.needs_image) == (False, False)
    assert text.condition("turn the l", size=(32, 48)).shape == (1, 16, 4, 4, 6)
    assert text.condition("turn the l", frames=1).shape == (1, 16, 1, 8, 8)
    with pytest.raises(MinicosError, match="takes no image"):
        text.condition("turn the l", image())
    with pytest.raises(MinicosError, match="size of 32x40: both sides must be multiples of 16"):
        text.condition("turn the l", size=(32, 40))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4))
def test_noise_belongs_to_its_seed_alone(wan, seeds):
    condition = wan.condition(["turn the l"] * len(seeds), image())
    together = wan.noise(condition, seeds)
    single = wan.condition("turn the l", image())
    for one, seed in zip(together, seeds, strict=True):
        assert torch.equal(one, wan.noise(single, seed)[0])
    assert together.shape == condition.shape


def test_seeds(wan):
    pair = wan.condition(["turn the l"] * 2, image())
    assert torch.equal(wan.noise(pair, 5), wan.noise(pair, [5, 6]))
    assert abs(wan.noise(pair, 5).std() - 1) < 0.1
    for seed, says in (
        ([1], "1 seeds for 2 samples"),
        (-1, "seed -1"),
        ([0, 2**63], "take a number from 0 to"),
    ):
        with pytest.raises(MinicosError, match=says):
            wan.noise(pair, seed)
    for device, says in (
        ("cuda", "needs a CUDA card, and this model is on cpu"),
        ("gpu", "noise_device is 'gpu': it must be one of cpu, cuda"),
    ):
        with pytest.raises(MinicosError, match=says):
            wan.with_preset(noise_device=device)


# -- running ---------------------------------------------------------------------------------------


def test_a_batch_of_two_is_two_singles(wan):
    prompts, images = ["solve the maze", "turn the l"], torch.stack([image(0), image(1)])
    both = last(wan, wan.condition(prompts, images), seed=[3, 9])
    for i, seed in enumerate((3, 9)):
        alone = last(wan, wan.condition(prompts[i], images[i]), seed=seed)
        assert rel_max(both[i : i + 1], alone) < 1e-6  # measured 2.2e-7
    assert rel_max(both[:1], both[1:]) > 0.1
    video = wan.decode(both)
    assert (video.shape, video.dtype) == ((2, 13, 32, 32, 3), np.uint8)
    assert np.array_equal(video[1], wan.decode(both[1:])[0])


def test_generate_is_condition_sample_and_decode(wan):
    video = wan.generate("solve the maze", image(), seed=4, frames=9)
    latent = last(wan, wan.condition("solve the maze", image(), frames=9), seed=4)
    assert np.array_equal(video, wan.decode(latent)[0])
    assert (video.shape, video.dtype) == ((9, 32, 32, 3), np.uint8)
    assert np.array_equal(video, np.concatenate(list(wan.frames(latent[0]))))
    whole = to_uint8(wan.vae.decode(latent, chunk=99)[0])
    assert apart(video, whole) <= 1
    assert not np.array_equal(video, wan.generate("solve the maze", image(), seed=5, frames=9))


def test_an_unknown_hook_point_is_told_before_anything_runs(wan):
    condition = wan.condition("turn the l", image())
    with pytest.raises(
        MinicosError, match=r"no hook point matches 'blocks.12.ffn'; did you mean .*blocks.11.ffn"
    ):
        wan.sample(
            condition, hooks=Hooks().on("blocks.12.ffn", print)
        )  # the call, not the first step
    with pytest.raises(MinicosError, match="steps is 0"):
        wan.with_preset(steps=0).sample(condition)


def test_a_device_that_is_not_there(toy):
    for name in ("gpu", "meta", "cuda:99"):
        with pytest.raises(MinicosError, match=f"no device '{name}'"):
            load(toy, device=name)


# -- Wan2.2-TI2V-5B --------------------------------------------------------------------------------

LOOPS, TI2V = golden.read("loops"), golden.read("conditioning")
TI2V_DIT = golden.config(config.DiTConfig, "dit_ti2v")
TI2V_VAE = replace(config.VAE22, dim=4, dec_dim=6)


@pytest.fixture(scope="module")
def ti2v(toy, tmp_path_factory):
    """The golden networks in a folder as the official repository has it, with a random text
    encoder.
    """
    folder = tmp_path_factory.mktemp("ti2v")
    (folder / "google").symlink_to(toy / "google")
    save_file(golden.read("dit_ti2v.weights"), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text('{"model_type": "ti2v"}')
    torch.save(golden.read("vae22.weights"), folder / "Wan2.2_VAE.pth")
    text = replace(config.TINY_TEXT, dim=TI2V_DIT.text_dim, text_len=512)
    path = folder / "models_t5_umt5-xxl-enc-bf16.safetensors"
    save_file(TextEncoder(text).state_dict(), path, {"config": json.dumps(asdict(text))})
    return folder


@pytest.fixture
def small_ti2v(ti2v, monkeypatch):
    """The folder opened where the variant has the golden networks' widths."""
    monkeypatch.setitem(config.VARIANTS, "Wan2.2-TI2V-5B", TI2V_DIT)
    return load(ti2v, device="cpu").with_preset(area=6144, size=(64, 96), frames=9, steps=2)


def test_ti2v_loads_from_an_official_folder(small_ti2v):
    assert small_ti2v.variant == "Wan2.2-TI2V-5B"
    assert set(small_ti2v.experts) == {"high"}
    assert small_ti2v.vae.cfg == TI2V_VAE
    assert small_ti2v.preset.image == "imposed"
    assert (small_ti2v.preset.takes_image, small_ti2v.preset.needs_image) == (True, False)


def test_ti2v_generates_from_text_and_from_an_image(small_ti2v):
    wan, picture = small_ti2v, TI2V["ti2v.image_u8"].permute(2, 0, 1) / 255
    condition = wan.condition("turn the l", picture)
    assert condition.y is None
    assert condition.shape == (1, 48, 3, 4, 6)
    assert rel_max(condition.first[0], LOOPS["ti2v.z"]) < 8e-7  # measured 2.1e-7
    told = []
    time = Hooks().on("time", lambda x, site: told.append(x))
    for step in wan.sample(condition, hooks=time):
        assert torch.equal(step.next[:, :, :1], condition.first)
    assert [x.shape[1] for x in told] == [3] * 4  # one timestep per frame, two branches, two steps
    assert all(torch.equal(x[:, 0], told[0][:, 0]) and torch.equal(x[:, 1], x[:, 2]) for x in told)
    assert not torch.equal(told[0][:, 1], told[0][:, 0])
    video = wan.decode(step.next)
    assert (video.shape, video.dtype) == ((1, 9, 64, 96, 3), np.uint8)
    still = wan.vae.decode(condition.first)[0]
    assert (
        apart(video[0, :1], to_uint8(still)) <= 1
    )  # the first frame is the image, as the VAE has it
    assert np.array_equal(wan.generate("turn the l", picture), video[0])

    silent = wan.condition("turn the l")
    assert silent.first is None
    assert silent.y is None
    assert silent.shape == condition.shape
    assert wan.condition("turn the l", size=(32, 64)).shape == (1, 48, 3, 2, 4)
    with pytest.raises(MinicosError, match="size of 48x64: both sides must be multiples of 32"):
        wan.condition("turn the l", size=(48, 64))
    told.clear()
    *_, step = wan.sample(silent, hooks=time)
    assert {x.shape[1] for x in told} == {1}
    assert wan.decode(step.next).shape == (1, 9, 64, 96, 3)


def test_ti2v_makes_the_official_latents_of_an_image(small_ti2v, padded):
    """From the picture to the last step; only the rows of text are given, since the golden loop
    has no text encoder.
    """
    wan = small_ti2v.with_preset(steps=6)
    assert (wan.preset.solver, wan.preset.shift, wan.preset.guidance["high"]) == ("unipc", 5.0, 5.0)
    condition = wan.condition("turn the l", TI2V["ti2v.image_u8"].permute(2, 0, 1) / 255)
    text, null = (padded(LOOPS[f"ti2v.context{end}"]) for end in ("", "_null"))
    condition = replace(condition, text=text, text_null=null)
    for step in wan.sample(condition, noise=LOOPS["ti2v.noise"][None]):
        assert rel_max(step.next[0], LOOPS["ti2v.latents"][step.index]) < 8e-6  # measured 2.0e-6


def test_ti2v_takes_a_batch_of_images(small_ti2v):
    pictures = torch.rand(2, 3, 45, 70, generator=torch.Generator().manual_seed(0))
    both = small_ti2v.condition(["turn the l", "solve the maze"], pictures)
    assert both.first.shape == (2, 48, 1, 4, 6)
    alone = small_ti2v.condition("solve the maze", pictures[1])
    assert rel_max(both.first[1:], alone.first) < 2e-6  # measured 3.4e-7


def test_large_frames_are_decoded_in_tiles(small_ti2v):
    latent = small_ti2v.vae.encode(
        torch.rand(1, 3, 5, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    whole, one = small_ti2v.decode(latent), replace(small_ti2v, tile=96).decode(latent)
    assert np.array_equal(whole, one)
    cut = replace(small_ti2v, tile=48)
    tiled = cut.decode(latent)
    assert tiled.shape == whole.shape
    assert not np.array_equal(tiled, whole)
    assert np.array_equal(tiled[0], np.concatenate(list(cut.frames(latent[0]))))


def test_a_vae_of_the_other_generation_is_refused(toy, ti2v, tmp_path, monkeypatch):
    monkeypatch.setitem(config.VARIANTS, "Wan2.2-TI2V-5B", TI2V_DIT)
    for path in ti2v.iterdir():
        if "VAE" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "Wan2.1_VAE.safetensors").symlink_to(toy / "Wan2.1_VAE.safetensors")
    with pytest.raises(
        MinicosError,
        match=r"Wan2\.1_VAE\.safetensors has 16 latent channels, and Wan2\.2-TI2V-5B has 48",
    ):
        load(tmp_path)


# -- the image branch of Wan2.1 --------------------------------------------------------------------


@pytest.fixture(scope="module", params=["first frame", "first and last"])
def looking(request, toys21):
    """A model with an image branch and what it is given: a first frame, or first and last of
    different shapes.
    """
    pictures = {"image": image(0, 40, 56), "last": image(1, 60, 48)}
    two = request.param == "first and last"
    return load(toys21[request.param], device="cpu"), pictures if two else {
        "image": pictures["image"]
    }


def test_a_model_with_an_image_branch_is_recognised(looking):
    wan, pictures = looking
    cfg = wan.experts["high"].cfg
    assert wan.variant == ("toy first and last" if "last" in pictures else "toy first frame")
    assert wan.clip.cfg == config.CLIPConfig(dim=32, num_heads=2, num_layers=3)
    assert (cfg.images, cfg.image_dim) == (len(pictures), 32)
    assert len(wan.points) == 5 + 29 * cfg.num_layers
    assert all(not p.requires_grad for p in wan.clip.parameters())


def test_both_branches_look_at_the_pictures_in_their_own_size(looking):
    wan, pictures = looking
    condition = wan.condition("turn the l", **pictures)
    first, *last = (2 * picture[None] - 1 for picture in pictures.values())
    last = [end[..., 13:47, :] for end in last]  # 34 x 48 of 60 x 48 pixels, as 40 x 56
    assert torch.equal(condition.clip, torch.cat([wan.clip(end) for end in (first, *last)], dim=1))
    assert condition.clip.shape == (1, 257 * len(pictures), 32)
    assert condition.shape == (1, 16, 3, 4, 4)  # 32 x 48 pixels at most, in multiples of 16
    resized = [resize(end, 32, 32) for end in (first, *last)]
    assert torch.equal(condition.y, image_channels(wan.vae, resized[0], 9, *resized[1:]))

    seen = {}
    hooks = Hooks().on("image", lambda x, site: seen.setdefault(site.branch, []).append(x))
    step = next(wan.sample(condition, hooks=hooks))
    embedded = wan.experts["high"].img_emb(condition.clip)
    assert all(torch.equal(x, embedded) for branch in ("cond", "uncond") for x in seen[branch])
    timestep = torch.tensor([step.timestep])
    for branch, velocity in (("cond", step.velocity_cond), ("uncond", step.velocity_uncond)):
        given = condition.branch(branch), condition.y, condition.clip
        assert torch.equal(velocity, wan.experts["high"](step.x, timestep, *given))


def test_a_video_from_pictures(looking):
    wan, pictures = looking
    video = wan.generate("turn the l", **pictures, seed=1)
    assert (video.shape, video.dtype) == ((9, 32, 32, 3), np.uint8)
    others = pictures | {"image": image(5, 40, 56)}
    assert not np.array_equal(video, wan.generate("turn the l", **others, seed=1))
    condition = wan.condition("turn the l", **pictures)
    other = replace(
        condition, clip=wan.condition("turn the l", **others).clip
    )  # CLIP's input counts separately
    assert rel_max(last(wan, other), last(wan, condition)) > 1e-4


def test_prompts_and_pictures_of_a_batch(looking):
    """One picture may serve all prompts, together with one for each."""
    wan, pictures = looking
    many = torch.stack([image(0, 40, 56), image(7, 40, 56)])
    both = wan.condition(["turn the l", "solve the maze"], **pictures | {"image": many})
    for i, prompt in enumerate(("turn the l", "solve the maze")):
        alone = wan.condition(prompt, **pictures | {"image": many[i]})
        assert rel_max(both.clip[i : i + 1], alone.clip) < 1e-6  # measured 0
        assert rel_max(both.y[i : i + 1], alone.y) < 1e-6  # measured 2.8e-7


def test_narrow_models_look_in_float16(toys21, looking):
    wan, pictures = looking
    narrow = load(toys21[wan.variant.removeprefix("toy ")], device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.clip.parameters()} == {torch.float16}
    a, b = (w.condition("turn the l", **pictures).clip for w in (narrow, wan))
    assert a.dtype == torch.float32
    assert rel_max(a, b) < 1e-2  # measured 1.1e-3


def test_pictures_that_are_missing_or_needless(looking, wan):
    looks, pictures = looking
    if "last" in pictures:
        with pytest.raises(MinicosError, match="toy first and last needs a last frame"):
            looks.condition("turn the l", pictures["image"])
        with pytest.raises(MinicosError, match="give an image"):
            looks.condition("turn the l", last=pictures["last"])
    for model in (wan, *([] if "last" in pictures else [looks])):
        with pytest.raises(MinicosError, match="takes no last frame"):
            model.condition("turn the l", image(), last=image())


def test_a_folder_without_clip(toys21, tmp_path):
    folder = shutil.copytree(
        toys21["first frame"], tmp_path / "model", ignore=shutil.ignore_patterns("models_clip*")
    )
    with pytest.raises(
        MinicosError,
        match=r"comes without the image encoder.*models_clip_open-clip-xlm-roberta-large-vit-huge-14",
    ):
        load(folder, device="cpu")


def test_a_time_skip_is_what_networks_are_loaded_with(toys21, monkeypatch):
    plain = load(toys21["first frame"], device="cpu")
    with pytest.raises(MinicosError, match="time_skip 7, and these networks do not"):
        plain.with_preset(time_skip=7)
    edit = replace(config.PRESETS["ChronoEdit-14B"]["official"], steps=1, area=32 * 48)
    monkeypatch.setitem(config.PRESETS, plain.variant, {"official": edit})
    chrono = load(toys21["first frame"], device="cpu")
    assert chrono.experts["high"].time_skip == 7
    condition = chrono.condition("turn the l", image(0, 40, 56))
    assert condition.shape[2] == 2
    assert rel_max(last(plain.with_preset(steps=1), condition), last(chrono, condition)) > 1e-4
