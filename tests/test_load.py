"""Loading: strict, cast by name, from any layout; and LoRAs of five dialects, merged in float32
on the way.
"""

import itertools
import json
import math
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from minicos import open as opening
from minicos.config import DiTConfig, VAEConfig
from minicos.dit import FLOAT32, DiT
from minicos.errors import MinicosError
from minicos.tiny.lora import save_lora
from minicos.vae import VAE
from minicos.weights import layouts, lora
from minicos.weights import load as loading
from minicos.weights.archive import MAX_PICKLE
from minicos.weights.header import read_header
from minicos.weights.inspect import inspect
from minicos.weights.load import load_into
from minicos.weights.names import VAE_DIFFUSERS, translate
from tests import golden

TEXT = Path("models_t5_umt5-xxl-enc-bf16.safetensors")  # in the embedded model's folder

# --------------------------------------------------------------------------------------------------
# load


def test_a_text_encoder_under_the_names_of_llama_cpp_is_named(tmp_path):
    file = tmp_path / "umt5.safetensors"
    save_file({"token_embd.weight": torch.zeros(9, 8)}, file)
    with pytest.raises(MinicosError, match=r"umt5\.safetensors is .*llama\.cpp's names"):
        layouts.find("tiny", parts={"text": file})


def test_a_tensor_too_many_in_the_last_file_is_named_before_any_is_read(tmp_path, monkeypatch):
    """Also where the vocabulary does not fit either, which follows from it."""
    tensors = load_file(layouts.EMBEDDED / TEXT)
    tensors["blocks.100000000.x.y"] = torch.zeros(0)
    with safe_open(layouts.EMBEDDED / TEXT, "pt") as file:
        about = json.loads(file.metadata()["config"]) | {"vocab_size": 9}
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:9].clone()
    save_file(tensors, tmp_path / "text.safetensors", {"config": json.dumps(about)})
    monkeypatch.setattr(opening, "load_into", lambda *given, **named: pytest.fail("a file is read"))
    with pytest.raises(MinicosError, match=r"text\.safetensors: blocks\.100000000\.x\.y is not"):
        opening.load("tiny", device="cpu", parts={"text": tmp_path / "text.safetensors"})


def network(width: int = 3) -> nn.Module:
    """A network on the meta device, with a buffer."""
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Linear(2, width), nn.BatchNorm1d(width, affine=False), nn.Dropout()
        )
    return module


def weights(width: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "0.weight": torch.randn(width, 2),
        "0.bias": torch.randn(width),
        "1.running_mean": torch.randn(width),
        "1.running_var": torch.rand(width),
        "1.num_batches_tracked": torch.tensor(7),
    }


@pytest.mark.parametrize("form", ["file", "pth", "wrapped pth", "shards", "list", "prefixed"])
def test_load(tmp_path, form):
    tensors, source = weights(), tmp_path
    halves = [dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])]
    if form in ("pth", "wrapped pth"):
        torch.save(tensors if form == "pth" else {"model_state": tensors}, tmp_path / "a.pth")
    elif form in ("shards", "list"):
        for name, half in zip("xy", halves, strict=True):
            save_file(half, tmp_path / f"{name}.safetensors")
        source = [tmp_path / "x.safetensors", str(tmp_path / "y.safetensors")]
        if form == "shards":
            names = {
                key: f"{name}.safetensors"
                for name, half in zip("xy", halves, strict=True)
                for key in half
            }
            (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
            source = str(tmp_path)
    else:
        save_file(
            {
                f"model.diffusion_model.{k}" if form == "prefixed" else k: v
                for k, v in tensors.items()
            },
            tmp_path / "a.safetensors",
        )
    module = network()
    load_into(module, source, check_finite=True)
    assert not any(p.is_meta for p in module.parameters())
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    module(torch.zeros(1, 2))


def test_load_casts_by_name(tmp_path):
    save_file(weights(), tmp_path / "a.safetensors")
    load_into(
        module := network(),
        tmp_path,
        dtype=lambda name: torch.bfloat16 if name == "0.weight" else None,
    )
    assert {k: v.dtype for k, v in module.state_dict().items()} == {
        "0.weight": torch.bfloat16,
        "0.bias": torch.float32,
        "1.running_mean": torch.float32,
        "1.running_var": torch.float32,
        "1.num_batches_tracked": torch.int64,
    }


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"0.bias": None}, r"needs 0\.bias, which is not there"),
        (
            {"0.bias": None, "0.weight": None, "1.running_mean": None, "1.running_var": None},
            "and 1 more",
        ),
        ({"0.more": torch.zeros(1)}, r"0\.more is not part of this Sequential"),
        (
            {"0.weight": torch.zeros(4, 2)},
            r"0\.weight is \[4, 2\], and this Sequential needs \[3, 2\]",
        ),
        ({"model.0.bias": torch.zeros(3)}, r"is 0\.bias, which .* holds too"),
        ({"0.scale_weight": torch.zeros(2)}, r"0\.weight has factors of shape \[2\]"),
        (
            {"9.scale_weight": torch.zeros(1)},
            r"9\.scale_weight is a factor of 9\.weight, which is not",
        ),
        ({"0.bias": torch.tensor([0, math.nan, 0])}, r"0\.bias holds NaN"),
    ],
)
def test_load_is_strict(tmp_path, change, says):
    tensors = {k: v for k, v in {**weights(), **change}.items() if v is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=says) as error:
        load_into(network(), tmp_path, check_finite=True)
    assert "a.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (3, "holds a int"),
        ([torch.zeros(1)], "holds a list"),
        ({"a": 1}, "no table of tensors but 'a'"),
        ({"a": torch.zeros(1), "b": 1}, "'b' is a int, not a tensor"),
        ({"a": {"x": 1}, "b": {}}, "no table of tensors but 'a', 'b'"),
        (b"PK\x03\x04 broken", "not a whole PyTorch archive"),
    ],
)
def test_archives_of_anything_but_tensors_are_refused(tmp_path, content, says):
    path = tmp_path / "a.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(MinicosError, match=says):
        load_into(network(), path)


def test_a_pickle_of_endless_instructions_is_refused_before_it_is_run(tmp_path):
    with zipfile.ZipFile(path := tmp_path / "many.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N" + b"\x85" * MAX_PICKLE + b".")
    with pytest.raises(MinicosError, match="with one of no sensible size"):
        read_header(path)


def test_an_archive_of_endless_entries_is_refused_before_they_are_listed(tmp_path):
    """It has a data.pkl in front, so that only the number of entries is wrong."""
    with zipfile.ZipFile(path := tmp_path / "many.pth", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    content = path.read_bytes()
    at, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entry = content[at:end]
    count = MAX_PICKLE // len(entry) + 1
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, count * len(entry), at, 0)
    path.write_bytes(content[:at] + entry * count + tail)
    with pytest.raises(MinicosError, match="a list of its entries has 4,194,"):
        read_header(path)


def test_load_of_a_foreign_layout_and_its_unknown_key(tmp_path):
    tensors = golden.read("vae21.weights")
    foreign = {translate(k, VAE_DIFFUSERS): v for k, v in tensors.items()}
    save_file(foreign, tmp_path / "a.safetensors")
    with torch.device("meta"):
        vae = VAE(golden.config(VAEConfig, "vae21"))
    load_into(vae, tmp_path)
    assert all(torch.equal(v, tensors[k]) for k, v in vae.state_dict().items())
    save_file({**foreign, "encoder.odd": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=r"a\.safetensors: the key 'encoder\.odd'"):
        load_into(vae, tmp_path)


def test_fp8_scaled_is_unpacked_in_float32(tmp_path):
    tensors = weights()
    small = (tensors["0.weight"] * 100).to(torch.float8_e4m3fn)
    tensors |= {
        "0.weight": small,
        "0.scale_weight": torch.tensor(0.01),
        "0.scale_input": torch.tensor(3.0),
    }
    save_file(
        {**tensors, "scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)},
        tmp_path / "a.safetensors",
    )
    load_into(module := network(), tmp_path)
    assert torch.equal(module[0].weight, small.float() * 0.01)
    assert inspect(tmp_path).layout == "comfy_fp8_scaled"


@pytest.mark.parametrize("rows", [1, 3], ids=["one factor", "one for each row"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_factor_of_0_is_for_rows_of_zeros_alone(rows, dtype, tmp_path):
    numbers, factors = torch.ones(3, 2), torch.ones(rows, 1)
    numbers[0] = factors[0] = 0
    numbers *= rows > 1

    def load(numbers: torch.Tensor) -> torch.Tensor:
        stored = {**weights(), "0.weight": numbers.to(dtype), "0.weight_scale": factors}
        save_file(stored, tmp_path / "a.safetensors")
        load_into(module := network(), tmp_path)
        return module[0].weight

    assert torch.equal(load(numbers), numbers)
    with pytest.raises(
        MinicosError, match=r"a\.safetensors: 0\.weight_scale holds 0, .* 0\.weight"
    ):
        load(numbers + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_matrix_of_zeros_is_told(dtype, tmp_path):
    """As in a download that was interrupted, in a file made at its full size."""
    stored = {name: x.to(dtype) for name, x in weights().items() if name[0] == "0"}
    for weight, told in ((stored["0.weight"], False), (torch.zeros(3, 2, dtype=dtype), True)):
        save_file({**weights(), **stored, "0.weight": weight}, tmp_path / "a.safetensors")
        with warnings.catch_warnings(record=True) as given:
            load_into(network(), tmp_path, check_finite=True)
        found = [str(one.message) for one in given]
        assert ["0.weight holds zeros alone, and is one of 1" in one for one in found] == [
            True
        ] * told


def test_golden_fp8_scaled(padded):
    """A file as ComfyUI writes it, through the loader to the official velocity."""
    data, path = golden.read("fp8_scaled"), golden.FOLDER / "fp8_scaled.weights.safetensors"
    with torch.device("meta"):
        dit = DiT(golden.config(DiTConfig, "fp8_scaled"))
    load_into(dit, path, dtype=torch.float32)
    text = padded(data["in.context_0"], dit.cfg.text_len)
    for t, expected in zip(data["in.t"], data["out.velocity"], strict=True):
        assert golden.rel_max(dit(data["in.x"], t, text), expected) < 2.5e-6  # measured 6.9e-7


# --------------------------------------------------------------------------------------------------
# lora

DIALECTS = ["diffsynth", "lightx2v", "comfy", "peft", "musubi"]
EXPECTED = load_file(golden.FOLDER / "lora_expected.safetensors")
STATS = json.loads((golden.FOLDER / "lora_delta_stats.json").read_text())


def read_lora(dialect: str, strength: float = 1.0) -> lora.Lora:
    return lora.read(golden.FOLDER / f"lora_{dialect}.safetensors", strength)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_lora_deltas(dialect):
    found = read_lora(dialect)
    assert found.dialect == dialect
    assert set(found.deltas) == set(STATS[dialect])
    for name, delta in found.deltas.items():
        merged = found.merge(name, torch.zeros(delta.shape))
        assert merged.double().sum().item() == pytest.approx(STATS[dialect][name]["sum"], abs=1e-4)
        assert merged.double().norm().item() == pytest.approx(STATS[dialect][name]["l2"], rel=1e-6)
        rows = EXPECTED.get(f"{dialect}.delta_rows0to3.{name}")
        if rows is not None:
            assert (merged[: len(rows)] - rows).abs().max() <= 1e-6
    untouched = torch.ones(2)
    assert found.merge("blocks.0.nothing", untouched) is untouched


@pytest.fixture(scope="module")
def i2v(tmp_path_factory):
    """The golden network as a file, its inputs, and a function that runs it with LoRAs."""
    path = tmp_path_factory.mktemp("i2v") / "a.safetensors"
    save_file(golden.read("dit_i2v.weights"), path)
    cfg, given_ = golden.config(DiTConfig, "dit_i2v"), golden.read("dit_i2v")
    text = torch.zeros(1, cfg.text_len, cfg.text_dim)
    text[0, : len(given_["in.context_0"])] = given_["in.context_0"]

    @torch.no_grad()
    def run(loras, **options):
        with torch.device("meta"):
            dit = DiT(cfg)
        load_into(dit, path, lora=loras, **options)
        return dit(given_["in.x"], given_["in.t"][0], text, given_["in.y"])

    return run


@pytest.mark.parametrize("dialect", DIALECTS)
def test_velocity_with_a_lora(i2v, dialect):
    changes = read_lora(dialect)
    velocity = i2v(changes)
    assert len(changes.deltas) == len(STATS[dialect])
    assert golden.rel_max(velocity, EXPECTED[f"{dialect}.velocity"]) <= 1e-5


def test_strengths_add_up(i2v):
    expected = EXPECTED["lightx2v.velocity_strength0.5"]
    assert golden.rel_max(i2v(read_lora("lightx2v", 0.5)), expected) <= 1e-5
    assert golden.rel_max(i2v([read_lora("lightx2v", 0.25)] * 2), expected) <= 1e-5


def test_lora_is_merged_before_the_cast(i2v):
    """float32 weights + delta, then bfloat16 for the matrices: not delta in bfloat16."""
    velocity = i2v(
        read_lora("comfy"),
        dtype=lambda name: torch.float32 if any(n in name for n in FLOAT32) else torch.bfloat16,
    )
    assert golden.rel_l2(velocity, EXPECTED["comfy.velocity"]) <= 2e-2


def test_lora_saved_and_read_again(tmp_path):
    for dialect in DIALECTS:
        found = read_lora(dialect)
        save_lora(tmp_path / "a.safetensors", found.deltas)
        again = lora.read(tmp_path / "a.safetensors")
        assert set(again.deltas) == set(found.deltas)
        for name, delta in found.deltas.items():
            zero = torch.zeros(delta.shape)
            assert (again.merge(name, zero) - found.merge(name, zero)).abs().max() <= 1e-6
    keys = read_header(golden.FOLDER / "lora_diffsynth.safetensors").tensors
    save_lora(tmp_path / "a.safetensors", read_lora("diffsynth").deltas, torch.bfloat16)
    assert {
        k: (i.dtype, i.shape) for k, i in read_header(tmp_path / "a.safetensors").tensors.items()
    } == {k: (i.dtype, i.shape) for k, i in keys.items()}


A, B = torch.ones(2, 8), torch.ones(4, 2)
Q = "blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.lora_magnitude_vector": A + 1},
            "lora_magnitude_vector",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.weight": A + 1},
            rf"a set of whole weights \({Q}\.weight\)",
        ),
        ({"lora_unet_blocks_0_odd.lora_down.weight": A}, "lora_unet_blocks_0_odd"),
        ({"transformer.blocks.0.attn1.odd.lora_A.weight": A}, r"attn1\.odd"),
        ({f"{Q}.lora_A.weight": A}, rf"{Q} has \['down'\]"),
        ({f"{Q}.alpha": torch.tensor(1.0)}, "holds no LoRA"),
        ({}, "holds no LoRA"),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": torch.ones(2)},
            "not one number",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.diff": B + 1},
            "not one up and one down",
        ),
        (
            {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": torch.ones(4, 3)},
            r"up \(4, 3\), down \(2, 8\): ranks differ",
        ),
        ({f"{Q}.lora_A.weight": A[0], f"{Q}.lora_B.weight": B}, r"down \(8,\)"),
        (
            {f"{Q}.lora_A.weight": A, f"diffusion_model.{Q}.lora_down.weight": A + 1},
            "already there",
        ),
    ],
)
def test_lora_files_are_read_completely_or_not_at_all(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(MinicosError, match=says) as error:
        lora.read(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(error.value)


def test_lora_for_another_network_is_refused(i2v, tmp_path):
    for name, says in (
        ("blocks.7.self_attn.q", "which this network lacks"),
        (Q, r"is \(4, 8\), and the parameter \(128, 128\)"),
    ):
        save_lora(tmp_path / "a.safetensors", {f"{name}.weight": lora.LowRank(B, A)})
        with pytest.raises(MinicosError, match=rf"a\.safetensors.*{name}.*{says}"):
            i2v(lora.read(tmp_path / "a.safetensors"))


def test_alpha_in_the_metadata_of_diffusers(tmp_path):
    tensors = {f"transformer.{Q}.lora_A.weight": A, f"transformer.{Q}.lora_B.weight": B}

    def read(about: str) -> lora.Lora:
        save_file(tensors, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": about})
        return lora.read(tmp_path / "a.safetensors")

    found = read(
        json.dumps(
            {"transformer.lora_alpha": 8, "transformer.r": 2, "transformer.alpha_pattern": {}}
        )
    )
    assert found.deltas[f"{Q}.weight"].scale == 4
    with pytest.raises(MinicosError, match="use_dora"):
        read(
            json.dumps(
                {"transformer.lora_alpha": 8, "transformer.r": 2, "transformer.use_dora": True}
            )
        )
    for about in ("{", "[]", '{"lora_alpha": NaN}', '{"lora_alpha": -1}'):
        with pytest.raises(MinicosError, match="adapter metadata"):
            read(about)


# --------------------------------------------------------------------------------------------------
# threads, memory


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Shards with tensors of every kind: float32, bfloat16, scaled fp8, a number, nothing at
    all; and what they should become.
    """
    folder, draw = tmp_path_factory.mktemp("mixed"), torch.Generator().manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(70 + i, 64, generator=draw) for i in range(12)}
    tensors |= {
        "1.weight": tensors["1.weight"].bfloat16(),
        "2.weight": tensors["2.weight"].to(torch.float8_e4m3fn),
    }
    factors = {"2.scale_weight": torch.tensor(0.5)}
    names = list(tensors)
    for file, part in (("a", names[:5]), ("b", names[5:])):
        save_file(
            {k: tensors[k] for k in part} | (factors if file == "a" else {}),
            folder / f"{file}.safetensors",
        )
    deltas = {
        f"{i}.weight": lora.LowRank(
            torch.randn(70 + i, 4, generator=draw), torch.randn(4, 64, generator=draw)
        )
        for i in (2, 7)
    }
    save_lora(folder / "lora", deltas)
    return folder, lora.read(folder / "lora")


def stack() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(64, 70 + i, bias=False) for i in range(12)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_the_result_does_not_depend_on_pieces(mixed, dtype, monkeypatch):
    folder, changes = mixed
    files = [folder / "a.safetensors", folder / "b.safetensors"]
    load_into(expected := stack(), files, dtype=dtype, lora=changes)
    monkeypatch.setattr("minicos.weights.load.PIECE", 1024)  # less than any matrix
    load_into(module := stack(), files, dtype=dtype, lora=changes)
    for (name, a), b in zip(
        module.state_dict().items(), expected.state_dict().values(), strict=True
    ):
        assert a.dtype == (dtype or {"1.weight": torch.bfloat16}.get(name, torch.float32))
        assert torch.equal(a, b), name
    stored = load_file(files[0])
    whole = stored["2.weight"].float() * 0.5
    merged = changes.merge("2.weight", whole).to(
        dtype or torch.float32
    )  # unpacked, merged, cast, in this order
    assert torch.equal(expected[2].weight, merged)
    assert torch.equal(expected[0].weight, stored["0.weight"].to(dtype or torch.float32))


def test_a_place_of_ones_own(mixed):
    folder, _ = mixed
    places = {}

    def place(name, shape, dtype):
        return places.setdefault(name, torch.full(shape, torch.nan, dtype=dtype))

    load_into(module := stack(), [folder / "a.safetensors", folder / "b.safetensors"], place=place)
    assert all(p.data_ptr() == places[name].data_ptr() for name, p in module.named_parameters())
    assert all(p.isfinite().all() for p in module.parameters())


def test_unchanged_tensors_stay_in_their_file(mixed):
    """On a CPU they are views of it: writing to the file shows."""
    folder, _ = mixed
    save_file(
        {f"{i}.weight": torch.zeros(70 + i, 64) for i in range(12)},
        file := folder / "c.safetensors",
    )
    load_into(module := stack(), file, dtype=torch.float32)
    with file.open("r+b") as f:
        f.seek(-4, 2)
        f.write(b"\0\0\x80\x3f")  # 1.0, the very last number
    assert sum(p.sum().item() for p in module.parameters()) == 1


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    save_file(
        {f"{i}.weight": torch.zeros(70 + i, 64) for i in range(12)},
        path := tmp_path / "a.safetensors",
    )
    check = loading._check

    def shrink(*args):
        check(*args)
        os.truncate(path, 100_000)

    monkeypatch.setattr(loading, "_check", shrink)
    with pytest.raises(MinicosError, match=r"a\.safetensors has become shorter"):
        load_into(stack(), path, dtype=torch.bfloat16)


def test_not_a_number_is_found_wherever_it_is():
    for dtype, rows in itertools.product((torch.float32, torch.bfloat16, torch.float16), (4, 1003)):
        x = torch.full((rows, 5), 6e4, dtype=dtype)  # finite, though a float16 sum of them is not
        assert loading._finite(x)
        for bad in (math.nan, math.inf, -math.inf):
            y = x.clone()
            y[3, 2] = bad
            assert not loading._finite(y)
    assert loading._finite(torch.full((3,), 3e38))  # finite, though its sum is not
    assert loading._finite(torch.full((3,), 3e38, dtype=torch.bfloat16))
    assert loading._finite(torch.zeros(0))


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="Linux tells how much memory is anonymous"
)
def test_loading_takes_little_memory_beyond_the_weights(tmp_path):
    """289 MB of float32 in eight shards, cast to bfloat16. The full measurement is `python -m
    tests.measure_load`.
    """
    command = [
        sys.executable,
        "-m",
        "tests.measure_load",
        "--variant",
        "Wan2.1-T2V-1.3B",
        "--layers",
        "1",
        "--shard",
        "50000000",
    ]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)], capture_output=True, text=True, cwd=root
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["shards"] > 4
    assert not list(tmp_path.iterdir())
    assert found["over"] < 20e6  # measured 16 kB; the weights take 179 MB, the files 289 MB
