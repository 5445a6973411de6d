"""The Hub: the local cache without a connection, and fetching only when asked, only what is
needed, told beforehand.
"""

import json
import os
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors

from minicos.errors import MinicosError
from minicos.open import load
from minicos.peers import folder
from minicos.weights import hub, layouts

SHA = "0123456789abcdef0123456789abcdef01234567"
I2V = {  # as the repository of Wan2.2-I2V-A14B lists it, with bytes
    ".gitattributes": 1_519,
    "README.md": 14_000,
    "assets/logo.png": 56_322,
    "examples/i2v_input.JPG": 250_628,
    "configuration.json": 43,
    "Wan2.1_VAE.pth": 507_609_880,
    "models_t5_umt5-xxl-enc-bf16.pth": 11_361_920_418,
    "google/umt5-xxl/spiece.model": 4_548_313,
    "google/umt5-xxl/tokenizer.json": 16_837_417,
    "google/umt5-xxl/tokenizer_config.json": 61_728,
    **{
        f"{expert}_noise_model/{name}": size
        for expert in ("high", "low")
        for name, size in (
            ("config.json", 250),
            ("diffusion_pytorch_model.safetensors.index.json", 96_805),
            ("diffusion_pytorch_model-00001-of-00002.safetensors", 9_000_000_000),
            ("diffusion_pytorch_model-00002-of-00002.safetensors", 8_000_000_000),
        )
    },
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network: opening a connection is an error."""

    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return tmp_path / "hub"


def store(cache, repo: str, source) -> None:
    """Put a folder into the cache as the Hub's library does: blobs, and a snapshot of links to
    them.
    """
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot = home / "snapshots" / SHA
    (home / "refs").mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "refs/main").write_text(SHA)
    for number, path in enumerate(p for p in sorted(source.rglob("*")) if p.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, home / "blobs" / f"{number:040x}")
        link.symlink_to(os.path.relpath(home / "blobs" / f"{number:040x}", link.parent))


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_model_in_the_cache_is_opened_without_a_connection(cache, toy, monkeypatch):
    store(cache, "some-one/toy", toy)
    wan = load("some-one/toy", device="cpu")
    assert wan.variant == "tiny"
    assert torch.equal(wan.vae.conv1.weight, load(toy, device="cpu").vae.conv1.weight)
    assert wan.weights == load(toy, device="cpu").weights
    assert layouts.dit_config("some-one/toy").dim == 128
    monkeypatch.setitem(
        hub.KNOWN, "some-one/toy", "VBVR-Wan2.2"
    )  # an id that identifies what no file shows
    with pytest.raises(MinicosError, match=r"has not the shapes of VBVR-Wan2\.2"):
        layouts.find("some-one/toy")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_repository_of_which_the_cache_has_a_part(cache, toy):
    store(cache, "some-one/toy", toy)
    home = cache / "models--some-one--toy"
    with pytest.raises(MinicosError, match=r"of the Hub's cache: give the id, owner/name"):
        layouts.find(home)
    (home / "snapshots" / SHA / "Wan2.1_VAE.safetensors").unlink()
    with pytest.raises(MinicosError, match=r"without the VAE .* fetch the rest .*: --download"):
        layouts.find("some-one/toy")
    config = home / "snapshots" / SHA / "high_noise_model/config.json"
    config.resolve().unlink()
    with pytest.raises(MinicosError, match=r"high_noise_model/config\.json is a link to .*blobs"):
        layouts.find("some-one/toy")


def test_a_model_that_is_not_in_the_cache(cache):
    for action in (load, layouts.find, layouts.dit_config, hub.cached):
        with pytest.raises(
            MinicosError, match=r"`minicos inspect Wan-AI/Wan2.2-I2V-A14B --download` fetches it"
        ) as error:
            action("Wan-AI/Wan2.2-I2V-A14B")
        assert str(error.value).count("\n") == 0
    assert not cache.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x/y",
        "a/../b",
        "a/..",
        "/etc/none/x",
        "a/b/c",
        "a--b/c",
        "a\\b/c",
        "a/b\0",
        "",
        "a/",
        "~/b",
        "a/ b",
    ],
)
def test_names_that_lead_elsewhere_are_no_ids(name, cache):
    assert not hub.is_id(name)
    with pytest.raises((MinicosError, ValueError)):
        layouts.locate(name or "/nowhere", download=True)
    assert not cache.exists()


def test_only_what_a_model_needs_is_fetched():
    def names(*files):
        return list(hub.needed("a/b", dict.fromkeys(files, 1)))

    wanted = hub.needed("Wan-AI/Wan2.2-I2V-A14B", I2V)
    assert set(wanted) == {
        name
        for name in I2V
        if name.startswith(("high", "low", "Wan2.1_VAE", "models_t5"))
        or name.endswith("/tokenizer.json")
    }
    assert (
        sum(wanted.values())
        == 34_000_000_000 + 2 * 97_055 + 507_609_880 + 11_361_920_418 + 16_837_417
    )
    files = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "assets/x.safetensors",
        "vae/config.json",
        *(
            f"{folder}/{name}"
            for folder in ("transformer", "transformer_2", "vae")
            for name in (
                "diffusion_pytorch_model.safetensors",
                "diffusion_pytorch_model.fp16.safetensors",
                "diffusion_pytorch_model.bin",
            )
        ),
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/model.fp16.safetensors.index.json",
        "tokenizer/tokenizer.json",
        "tokenizer/spiece.model",
    ]
    assert names(*files) == [
        "model_index.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer_2/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.json",
        "tokenizer/tokenizer.json",
    ]
    both = (
        "diffusion_pytorch_model.safetensors",
        "Wan2.1_VAE.pth",
        "Wan2.1_VAE.safetensors",
        "t5.pth",
    )
    assert names(*both) == sorted(set(both) - {"Wan2.1_VAE.pth"})
    assert names("model_index.json", "transformer/a.fp16.safetensors")[1:] == [
        "transformer/a.fp16.safetensors"
    ]  # there is no other
    with pytest.raises(
        MinicosError,
        match=r"a/b is not one whole model .* \(2 files of weights\).*`hf download a/b FILE`",
    ):
        names("split_files/a.safetensors", "split_files/b.safetensors")
    for bad in ("../x.json", "/etc/x.json", "a/../../x", "..\\x"):
        with pytest.raises(MinicosError, match="outside its folder"):
            names(bad)


LTX2 = {  # as the repository of LTX-2 has it, shortened, with bytes
    "model_index.json": 700,
    "README.md": 9_000,
    "ltx-2-19b-dev.safetensors": 43_000_000_000,
    "audio_vae/config.json": 400,
    "audio_vae/diffusion_pytorch_model.safetensors": 100,
    "connectors/config.json": 400,
    "connectors/diffusion_pytorch_model.safetensors": 1_000,
    "latent_upsampler/config.json": 400,
    "latent_upsampler/diffusion_pytorch_model.safetensors": 1_000_000_000,
    "scheduler/scheduler_config.json": 500,
    "text_encoder/config.json": 400,
    "text_encoder/generation_config.json": 100,
    "text_encoder/model.safetensors": 24_000_000_000,
    "text_encoder/model.fp16.safetensors": 24_000_000_000,
    "tokenizer/chat_template.jinja": 1_500,
    "tokenizer/tokenizer.json": 33_000_000,
    "tokenizer/tokenizer.model": 4_600_000,
    "tokenizer/tokenizer_config.json": 1_100_000,
    "transformer/config.json": 2_000,
    "transformer/diffusion_pytorch_model-00001-of-00001.safetensors": 37_000_000_000,
    "transformer/diffusion_pytorch_model.safetensors.index.json": 300_000,
    "vae/config.json": 2_000,
    "vae/diffusion_pytorch_model.safetensors": 2_400_000_000,
}


def test_a_model_that_diffusers_runs_is_fetched_with_all_parts_of_its_pipeline(
    cache, tmp_path, monkeypatch
):
    folders = {name.partition("/")[0] for name in LTX2 if "/" in name} - {"latent_upsampler"}
    index = {name: ["diffusers", "Some"] for name in folders} | {"processor": [None, None]}

    def fetched(kind):
        place = tmp_path / "model_index.json"
        place.write_text(json.dumps({"_class_name": kind, "is_causal": True, **index}))
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(place))
        return folder.parts("Lightricks/LTX-2", LTX2)

    parts = fetched("LTX2Pipeline")
    assert set(parts) == {"", *folders} and "processor" not in parts
    left_out = ("README", "ltx-2", "latent_upsampler", "text_encoder/model.fp16")
    assert set(hub.needed("Lightricks/LTX-2", LTX2, parts)) == {
        name for name in LTX2 if not name.startswith(left_out)
    }
    assert fetched("WanImageToVideoPipeline") == ()
    with pytest.raises(MinicosError, match="no adapter for LTX2ConditionPipeline of diffusers"):
        fetched("LTX2ConditionPipeline")
    monkeypatch.delattr(huggingface_hub, "hf_hub_download")
    assert folder.parts("Wan-AI/Wan2.2-I2V-A14B", I2V) == ()  # without asking


@pytest.fixture
def listed(monkeypatch):
    """A Hub that has one repository, `I2V`."""
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in I2V.items()]
    info = SimpleNamespace(sha=SHA, siblings=siblings)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, repo, **kw: info)


def test_fetching_tells_first_what_and_how_much(cache, listed, monkeypatch, capsys):
    asked = []

    def download(repo, allow_patterns):
        asked.append((repo, allow_patterns, capsys.readouterr().err))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    assert hub.fetch("Wan-AI/Wan2.2-I2V-A14B") == cache
    ((repo, patterns, told),) = asked
    assert repo == "Wan-AI/Wan2.2-I2V-A14B"
    assert f"fetching Wan-AI/Wan2.2-I2V-A14B, revision {SHA}:" in told
    assert all(name in told for name in patterns)
    assert "45,886,561,825  bytes in all" in told
    assert not any(name.startswith(("assets", "examples", "README")) for name in patterns)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(
        MinicosError, match=r"needs 45,886,561,825 bytes more, and .* has 1,000,000,000 free"
    ):
        hub.fetch("Wan-AI/Wan2.2-I2V-A14B")
    assert len(asked) == 1


def failure(kind: type[Exception], text: str) -> Exception:
    """The library's errors need a server's response; these have none."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            failure(errors.RepositoryNotFoundError, "404"),
            "the Hub has no repository no/body, or it is private",
        ),
        (
            failure(errors.GatedRepoError, "403"),
            "no/body is gated: accept its terms at https://huggingface.co/no/body",
        ),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (
            OSError(28, "No space left on device"),
            "could not be fetched .*No space left.*it continues",
        ),
        (
            ConnectionError("Name or service not known\nmore"),
            "could not be fetched .Name or service not known.",
        ),
    ],
)
def test_what_can_go_wrong_is_one_sentence(error, says, cache, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(MinicosError, match=says) as raised:
        load("no/body", download=True)
    assert "\n" not in str(raised.value)


def test_offline_mode_is_told_by_the_library_itself(cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MinicosError, match=r"no/body (cannot|could not) be fetched"):
        hub.fetch("no/body")
