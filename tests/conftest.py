"""One thread, no deadlines, a visible skip for tests that need a GPU, and the networks that
several files share.
"""

import json
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from minicos.clip import CLIP
from minicos.config import PRESETS, TINY_TEXT, TINY_VAE, VARIANTS, CLIPConfig, DiTConfig, Preset
from minicos.dit import DiT
from minicos.plan import Plan
from minicos.runs import replace_file
from minicos.stream import Residency
from minicos.text import TextEncoder
from minicos.tiny import tokenizer
from minicos.vae import VAE
from minicos.wan import Wan
from tests import golden, interpreter

# the networks are tiny, and last bits then do not depend on the machine's cores
torch.set_num_threads(1)
settings.register_profile("minicos", deadline=None, max_examples=50)
settings.load_profile("minicos")


ALONE = "PYTEST_XDIST_WORKER" not in os.environ


def pytest_collection_modifyitems(items):
    # Alone, it comes last, so that it waits least; of several workers, one begins with it.
    items.sort(key=lambda item: (item.name == interpreter.WAITS) == ALONE)


def pytest_collection_finish(session):
    waits = session.items and session.items[-1].name == interpreter.WAITS
    if waits and ALONE and not session.config.option.collectonly:
        interpreter.start()


def pytest_sessionfinish():
    interpreter.stop()


@pytest.fixture
def bare_pictures(monkeypatch):
    """PNG files with nothing on them, for tests that are not about pictures: drawing takes most of
    the time of a command.
    """

    def save(figure, path):
        replace_file(path, lambda temporary: Image.new("RGB", (4, 3)).save(temporary, "PNG"))
        return path

    monkeypatch.setattr("minicos.analysis.tools.figures.save", save)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")


@cache
def _golden_dit(case: str) -> DiT:
    info = golden.info(case)
    tokens = {"i2v21": 257, "flf2v": 514}.get(info["config"]["model_type"], 0)
    network = DiT(replace(golden.config(DiTConfig, case), image_tokens=tokens)).requires_grad_(
        False
    )
    files = [file.removesuffix(".safetensors") for file in info["files"] if ".weights." in file]
    network.load_state_dict(
        {name: weight for file in files for name, weight in golden.read(file).items()}
    )
    return network


@pytest.fixture(scope="session")
def golden_dit():
    """case -> the network of a golden case. Shared: do not change it."""
    return _golden_dit


SMALL = DiTConfig(
    in_dim=4, out_dim=4, dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=8, text_len=5
)


@pytest.fixture(scope="session")
def small_dit():
    """seed, changes of its configuration -> a random network of two blocks that runs in a
    millisecond or two.
    """

    def make(seed: int = 0, **changes) -> DiT:
        network = DiT(replace(SMALL, **changes)).requires_grad_(False)
        draw = torch.Generator().manual_seed(seed)
        for name, p in network.named_parameters():
            size = 0.3 if p.ndim == 1 or "modulation" in name else p[0].numel() ** -0.5
            noise = size * torch.randn(p.shape, generator=draw)
            p.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
        return network

    return make


@pytest.fixture(scope="session")
def pair():
    """high, low, fields of a preset -> `Wan` with two experts, and the other parts too small to
    matter.
    """
    vae, text = VAE(replace(TINY_VAE, dim=4)), TextEncoder(TINY_TEXT)
    plain = Preset("euler", 20, 5.0, {"high": 1.0, "low": 1.0}, boundary=0.9)

    def make(high: DiT, low: DiT, **fields) -> Wan:
        experts, home = (
            {"high": high, "low": low},
            Residency(Plan("resident", torch.device("cpu"), ())),
        )
        return Wan("pair", replace(plain, **fields), experts, vae, text, None, home)

    return make


@pytest.fixture(scope="session")
def padded():
    """Text rows (rows d') padded with zeros to a length, as a batch of one."""

    def pad(rows: Tensor, length: int = 512) -> Tensor:
        return F.pad(rows, (0, 0, 0, length - len(rows)))[None]

    return pad


def write_official(
    folder: Path, dit: DiT, clip: CLIPConfig | None = None, expert: str = "."
) -> Path:
    """An official folder with random weights and a thin VAE, so that it is quick."""
    vae = replace(TINY_VAE, dim=4)
    networks = [
        (f"{expert}/diffusion_pytorch_model", dit, None),
        ("Wan2.1_VAE", VAE(vae), vae),
        ("models_t5_umt5-xxl-enc-bf16", TextEncoder(TINY_TEXT), TINY_TEXT),
    ]
    if clip:
        networks += [("models_clip_open-clip-xlm-roberta-large-vit-huge-14", CLIP(clip), clip)]
    for name, network, config in networks:
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            network.half().state_dict(),
            path,
            {"config": json.dumps(asdict(config))} if config else None,
        )
    (folder / expert / "config.json").write_text('{"num_heads": 4, "text_len": 16}')
    if expert == ".":  # next to the other networks, an index identifies the transformer's file
        index = {
            "weight_map": dict.fromkeys(dit.state_dict(), "diffusion_pytorch_model.safetensors")
        }
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "google/umt5-xxl").mkdir(parents=True)
    tokenizer.build().save(str(folder / "google/umt5-xxl/tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """A folder in the official layout with the embedded model's shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return write_official(
            tmp_path_factory.mktemp("toy"), DiT(VARIANTS["tiny"]), expert="high_noise_model"
        )


@pytest.fixture(scope="session")
def toys21(tmp_path_factory):
    """Folders like those of Wan2.1-I2V ("first frame") and FLF2V ("first and last"), whose
    variants are known while tests run.
    """
    folders = {}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, like in (
            ("first frame", "Wan2.1-I2V-14B"),
            ("first and last", "Wan2.1-FLF2V-14B"),
        ):
            tokens = VARIANTS[like].image_tokens
            cfg = replace(VARIANTS["tiny"], num_layers=2, image_tokens=tokens, image_dim=32)
            presets = {
                "official": replace(PRESETS[like]["official"], steps=2, area=32 * 48, frames=9)
            }
            patch.setitem(VARIANTS, f"toy {name}", cfg)
            patch.setitem(PRESETS, f"toy {name}", presets)
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            folders[name] = write_official(
                folder, DiT(cfg), CLIPConfig(dim=32, num_heads=2, num_layers=3)
            )
        yield folders
