"""Targets of `tests.fuzz`: weights, indices, configurations, tokenizers, pickles and LoRAs of a
small random model.
"""

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

import minicos
from minicos.config import TINY_TEXT, VAEConfig
from minicos.config import DiTConfig as Config
from minicos.dit import DiT
from minicos.text import TextEncoder
from minicos.tiny import tokenizer
from minicos.vae import VAE
from minicos.weights.inspect import describe, inspect
from tests.fuzz import Opened, target

STEM = "diffusion_pytorch_model.safetensors"
NASTY = [
    None,
    True,
    -1,
    0,
    1,
    3,
    1e308,
    -0.0,
    10**18,
    2**63,
    2**70,
    "",
    "x",
    "\ud800",
    "\x1b[31m\n",
    "9" * 5000,
    "../x",
    "/dev/zero",
    [],
    {},
    [[]],
    [None],
    {"a": 1},
    [0.0],
    ["a"] * 4,
    float("nan"),
    float("inf"),
    10**4400,
]
DIT = Config(
    in_dim=36, out_dim=16, dim=24, ffn_dim=32, num_heads=2, num_layers=2, text_dim=64, text_len=16
)
VAE_CONFIG = VAEConfig(dim=2, dim_mult=(1, 1, 2, 2), num_res_blocks=1)
PAIR = ("lora_A", "lora_B")


@cache
def model() -> dict[str, bytes]:
    """The files of a good model in the layout of diffusers, with official names: path ->
    content.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit, vae, text = DiT(DIT), VAE(VAE_CONFIG), TextEncoder(replace(TINY_TEXT, num_layers=2))
    config = {"config": json.dumps(asdict(VAE_CONFIG))}
    heads = {"num_heads": 2, "text_len": 16, "eps": 1e-6, "_class_name": "WanModel"}
    low = {key: value * 0.5 for key, value in dit.state_dict().items()}
    statistics = {"latents_mean": VAE_CONFIG.mean, "latents_std": VAE_CONFIG.std}
    words = tokenizer.build().to_str()
    return {
        f"transformer/{STEM}": save(dit.state_dict()),
        f"transformer_2/{STEM}": save(low),
        f"vae/{STEM}": save(vae.state_dict(), config),
        "text_encoder/model.safetensors": save(text.state_dict()),
        "tokenizer/tokenizer.json": words.encode(),
        "transformer/config.json": json.dumps(heads).encode(),
        "transformer_2/config.json": json.dumps(heads).encode(),
        "vae/config.json": json.dumps(statistics).encode(),
        "model_index.json": json.dumps({"transformer_2": ["diffusers", "WanModel"]}).encode(),
    }


def opened(folder: Path, **options: Any) -> Opened:
    """Inspect the model in a folder, open it, and encode a prompt."""

    def run() -> None:
        for name in ("transformer", "vae", "text_encoder", "."):
            with suppress(minicos.MinicosError):
                describe(inspect(folder / name))
        wan = minicos.load(folder, device="cpu", **options)
        wan.tokenizer(["solve the maze", "\u2603 unknown"])

    return run


def write(folder: Path, changed: dict[str, bytes | None]) -> None:
    """The model with some files replaced (or left out)."""
    for name, content in (model() | changed).items():
        if content is not None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def flipped(draw: random.Random, content: bytes, begin: int = 0, end: int | None = None) -> bytes:
    """Some bytes changed, cut off or put in."""
    data = bytearray(content)
    end = min(len(data), end or len(data))
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(begin, max(begin + 1, end))
        match draw.randrange(4):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[place : place + draw.choice((1, 1, 8, len(data)))]
            case 2:
                data[place:place] = draw.randbytes(draw.choice((1, 4, 200)))
            case 3:
                data[place : place + 1] = draw.choice((b"9", b"-", b"{", b'"', b"\0", b"e9", b"."))
    return bytes(data)


def changed(draw: random.Random, value: Any, depth: int = 0) -> Any:
    """A JSON value with one of its parts exchanged, omitted, repeated or renamed."""
    if not isinstance(value, dict | list) or not value or (depth and draw.random() < 0.15):
        deep: Any = 1
        for _ in range(draw.choice((2, 50, 200))):
            deep = [deep]
        return draw.choice([*NASTY, deep])
    copy: Any = value.copy()
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    match draw.randrange(6):
        case 0:
            del copy[key]
        case 1 if isinstance(value, list):
            copy += [value[key]] * draw.choice((1, 3, 1000))
        case 1:
            name = draw.choice(["", "x", "\ud800", "blocks.100000000.x.y", f"{key}.1000000000.x"])
            copy[name] = copy.pop(key)
        case _:
            copy[key] = changed(draw, value[key], depth + 1)
    return copy


def dumped(draw: random.Random, value: Any) -> bytes:
    """As JSON; sometimes also damaged as text, or nested too deeply for parsers."""
    import sys

    sys.set_int_max_str_digits(0)
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    sys.set_int_max_str_digits(4300)
    if draw.random() < 0.05:
        return draw.choice((b"[", b'{"a":')) * 100_000
    return flipped(draw, text) if draw.random() < 0.2 else text


def rewritten(content: bytes, change: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """A safetensors file with its header changed."""
    (length,) = struct.unpack("<Q", content[:8])
    text = json.dumps(change(json.loads(content[8 : 8 + length]))).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def part(draw: random.Random) -> str:
    return draw.choice([name for name in model() if name.endswith(".safetensors")])


@target("bytes")
def damaged_bytes(draw: random.Random, folder: Path) -> Opened:
    """A file of weights with bytes changed, mostly in its header."""
    name = part(draw)
    content = model()[name]
    (length,) = struct.unpack("<Q", content[:8])
    write(folder, {name: flipped(draw, content, 0, draw.choice((8 + length, 8 + length, None)))})
    return opened(folder)


@target("header")
def damaged_header(draw: random.Random, folder: Path) -> Opened:
    """Names, shapes and dtypes that are valid JSON but wrong, with their bytes at the end."""

    def change(header: dict[str, Any]) -> dict[str, Any]:
        names = [name for name in header if name != "__metadata__"]
        end = max(header[name]["data_offsets"][1] for name in names)
        for _ in range(draw.randint(1, 3)):
            old = draw.choice(names)
            if draw.random() < 0.5 and old in header:
                header[odd_name(draw, old)] = header.pop(old)
            else:
                shape = draw.choice(([0], [0, 10**9], [0] * 40, [10**12, 0, 10**12]))
                header[odd_name(draw, old)] = {
                    "dtype": draw.choice(("F32", "F8_E4M3", "U8", "F4", "I64", "BOOL")),
                    "shape": shape,
                    "data_offsets": [end, end],
                }
        return header

    name = part(draw)
    write(folder, {name: rewritten(model()[name], change)})
    return opened(folder)


def odd_name(draw: random.Random, name: str) -> str:
    ends = [
        "",
        ".1000000000.x",
        ".comfy_quant",
        ".weight_scale",
        ".absmax",
        ".lora_A.weight",
        ".lokr_w1",
        ".alpha",
        ".diff",
        "\x1b[2J\n",
        "\u202e",
        "x" * 2000,
    ]
    starts = [
        "",
        "blocks.100000000.",
        "vae.",
        "model.diffusion_model.",
        "text_encoders.",
        "vace_blocks.",
        "encoder.downsamples.1000000000.",
        "module." * 30,
        "lora_unet_",
        "decoder.up_blocks.7.resnets.9.",
    ]
    return (
        draw.choice(starts)
        + draw.choice([name, name, "", name[: len(name) // 2]])
        + draw.choice(ends)
    )


@target("metadata")
def damaged_metadata(draw: random.Random, folder: Path) -> Opened:
    """The configuration that a VAE carries."""
    name = f"vae/{STEM}"

    def change(header: dict[str, Any]) -> dict[str, Any]:
        config = json.loads(header["__metadata__"]["config"])
        text = dumped(draw, changed(draw, config)).decode("utf-8", "replace")
        return header | {"__metadata__": {"config": text}}

    write(folder, {name: rewritten(model()[name], change)})
    return opened(folder)


@target("config")
def damaged_config(draw: random.Random, folder: Path) -> Opened:
    """config.json of a network, or model_index.json."""
    names = [name for name in model() if name.endswith(("config.json", "index.json"))]
    name = draw.choice(names)
    write(folder, {name: dumped(draw, changed(draw, json.loads(model()[name])))})
    return opened(folder)


@target("tokenizer")
def damaged_tokenizer(draw: random.Random, folder: Path) -> Opened:
    name = "tokenizer/tokenizer.json"
    value = json.loads(model()[name])
    if draw.random() < 0.5:
        kinds = [
            "Precompiled",
            "Replace",
            "Prepend",
            "Sequence",
            "Split",
            "Metaspace",
            "Strip",
            "ByteLevel",
            "Nope",
        ]
        patterns = {"Regex": "(a+)+$"}, {"Regex": " {2,}"}, {"String": "e"}, {"String": ""}
        one = {
            "type": draw.choice(kinds),
            "pattern": draw.choice(patterns),
            "content": "e" * draw.choice((0, 1, 9, 100_000)),
            "precompiled_charsmap": draw.choice(("AAAA", "", "!", "A" * 400)),
            "replacement": draw.choice(("\u2581", "", "ab")),
            **{"prepend": "x", "behavior": "Isolated", "invert": False, "prepend_scheme": "always"},
            **{"add_prefix_space": True, "strip_left": True, "strip_right": True},
        }
        where, inside = draw.choice(
            (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
        )
        many = {"type": "Sequence", inside: [one] * draw.choice((1, 3, 40))}
        value[where] = draw.choice((one, many))
    if draw.random() < 0.3:
        vocabularies = [["a", 0.0]], {}, {"</s>": 1, "a": 0}, [["a", None]] * 3
        value["model"] = {
            "type": draw.choice(("Unigram", "BPE", "WordPiece", "WordLevel")),
            "vocab": draw.choice(vocabularies),
            "unk_id": draw.choice((None, 0, 5, -1)),
            "merges": draw.choice(([], ["a b"], [["a", "a"]])),
            "unk_token": "a",
        }
    write(folder, {name: dumped(draw, changed(draw, value) if draw.random() < 0.7 else value)})
    return opened(folder)


@target("index")
def damaged_index(draw: random.Random, folder: Path) -> Opened:
    """An index of shards, and shards that are links or folders."""
    content = model()[f"transformer/{STEM}"]
    (length,) = struct.unpack("<Q", content[:8])
    names = [name for name in json.loads(content[8 : 8 + length]) if name != "__metadata__"]
    file = "model-00001-of-00001.safetensors"
    index = changed(draw, {"metadata": {}, "weight_map": dict.fromkeys(names, file)})
    write(
        folder,
        {
            f"transformer/{STEM}": None,
            f"transformer/{file}": content,
            f"transformer/{STEM}.index.json": dumped(draw, index),
        },
    )
    shard = folder / "transformer" / file
    match draw.randrange(6):
        case 0:
            shard.unlink()
            shard.symlink_to(draw.choice((shard.name, "/dev/zero", "..", "/etc/hostname")))
        case 1:
            shard.unlink()
            shard.mkdir()
    return opened(folder)


@target("pickle")
def damaged_pickle(draw: random.Random, folder: Path) -> Opened:
    """A PyTorch file: its bytes, its pickle, or a pickle of something else."""
    tensors = {
        "conv1.weight": torch.zeros(2, 2, 1, 1, 1),
        "conv1.bias": torch.zeros(2),
        "n": torch.tensor(3),
    }
    inside = {"generator": {"x": {"y": tensors}}}
    odd = ({"state_dict": tensors}, {"a": tensors, "b": 1}, inside, [tensors])
    buffer = io.BytesIO()
    torch.save(draw.choice((tensors, *odd)), buffer)
    content = buffer.getvalue()
    content = flipped(draw, content) if draw.random() < 0.3 else _with_pickle(draw, buffer)
    write(folder, {f"vae/{STEM}": None, "vae/model.pth": content, "vae/config.json": None})
    return opened(folder)


def _with_pickle(draw: random.Random, archive: io.BytesIO) -> bytes:
    """The archive with its pickle damaged or exchanged."""
    values = ({"a": 1}, frozenset([1]), {1, 2}, [[]] * 9, 2**3000, b"x" * 99, {"a": 1j}, range(9))
    knot = b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s."  # a key whose hash would take forever
    odd = draw.choice((knot, *(pickle.dumps(v, protocol=draw.choice((2, 4))) for v in values)))
    out = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(out, "w") as target_file:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                data = odd if draw.random() < 0.3 else flipped(draw, data)
            target_file.writestr(entry.filename, data)
    return out.getvalue()


MODULES = (
    *(
        "transformer.blocks.0.attn1.to_q",
        "transformer_2.blocks.0.attn2.to_v",
        "lora_unet_blocks_0_ffn_0",
    ),
    *(
        "diffusion_model.blocks.1.self_attn.k",
        "lycoris_blocks_1_self_attn_o",
        "blocks.0",
        "head.head",
    ),
    *("patch_embedding", "blocks.0.cross_attn.k_img", "blocks.999999999.ffn.0", "img_emb.proj.1"),
)
PIECES = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight", "alpha"),
    *(("diff", "diff_b"), ("diff_m",), ("oft_blocks",), ("w_norm",), ("lokr_w1", "lokr_w2")),
    ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
    ("lora_A.weight", "lora_B.bias"),
)
TALL = ("lora_B.weight", "lora_up.weight", "hada_w1_a", "hada_w2_a", "lokr_w1_a")
SHAPES = ((), (24,), (0, 24), (2, 0), (3, 3, 3), (12, 12), (1, 6, 24))
KINDS = (*[torch.float32] * 3, torch.bfloat16, torch.int64, torch.float8_e4m3fn)


@target("lora")
def damaged_lora(draw: random.Random, folder: Path) -> Opened:
    """Names, shapes, numbers and metadata of a LoRA."""
    write(folder, {})
    tensors: dict[str, torch.Tensor] = {}
    for _ in range(draw.randint(1, 4)):
        module = draw.choice(MODULES)
        for piece in draw.choice(PIECES):
            good = (24, 2) if piece in TALL else (2, 24)
            shape = good if draw.random() < 0.7 else draw.choice(SHAPES)
            value = draw.choice((0.0, 0.0, float("nan"), float("inf"), 1e38))
            kind = draw.choice(KINDS)
            value = 3.0 if kind == torch.int64 else value
            tensors[f"{module}.{piece}"] = torch.full(shape, value).to(kind)
    about = {
        "transformer.r": 4,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"to_q": 1},
    }
    text = dumped(draw, changed(draw, about)).decode("utf-8", "replace")
    content = save(tensors, {"lora_adapter_metadata": text} if draw.random() < 0.5 else None)
    file = folder / draw.choice(("lora.safetensors", "lora_HIGH.pt"))
    file.write_bytes(flipped(draw, content) if draw.random() < 0.1 else content)
    lora = {draw.choice(("high", "low")): [(file, draw.choice((1.0, 0.5, -1.0)))]}
    return opened(folder, lora=lora)
