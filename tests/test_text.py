"""The text encoder against the official outputs and transformers, the tokenizer against the
official token ids.
"""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minicos import puzzles
from minicos.config import NEGATIVE_PROMPT, TINY_TEXT, TextConfig
from minicos.errors import MinicosError
from minicos.text import TextEncoder, Tokenizer, buckets, clean, encode
from minicos.tiny import tokenizer as tiny
from tests import golden

CFG = replace(golden.config(TextConfig, "t5"), vocab_size=golden.info("t5")["config"]["vocab"])
TOKENS = json.loads((golden.FOLDER / "golden_tokens.json").read_text(encoding="utf-8"))
TINY_FILE = Path(tiny.__file__).parent / "weights/google/umt5-xxl/tokenizer.json"


def golden_encoder(scaling=()) -> TextEncoder:
    """The golden network, each weight times the factor of every pattern that finds its name."""
    weights = golden.read("t5.weights")
    for pattern, factor in scaling:
        weights = {key: w * factor if re.search(pattern, key) else w for key, w in weights.items()}
    encoder = TextEncoder(CFG).requires_grad_(False)
    encoder.load_state_dict(weights)  # strict: names and shapes are the official ones
    return encoder


# -- encoder ---------------------------------------------------------------------------------------


def test_golden_t5():
    case = golden.read("t5")
    rows = golden_encoder()(case["in.ids"], case["in.mask"])
    for i in range(2):
        expected = case[f"out.hidden_{i}"]
        assert golden.rel_max(rows[i, : len(expected)], expected) <= 5e-6  # measured 0


def test_golden_eps():
    """Tiny features in front of the norms: a wrong epsilon would show (5e-3 or more)."""
    powers = {"2**-10": 2.0**-10}
    scaling = [
        (pattern, powers[factor])
        for pattern, factor in golden.info("eps")["config"]["scaling"]["t5"]
    ]
    case, expected = golden.read("t5"), golden.read("eps")["t5.hidden"]
    rows = golden_encoder(scaling)(
        case["in.ids"][1:, : len(expected)], case["in.mask"][1:, : len(expected)]
    )
    assert golden.rel_max(rows[0], expected) <= 1e-4  # measured 0


def test_padding_changes_nothing():
    case = golden.read("t5")
    rows = golden_encoder()(case["in.ids"][1:, :9], case["in.mask"][1:, :9])
    assert golden.rel_max(rows[0], case["out.hidden_1"]) <= 5e-6  # measured 6.0e-7


def test_official_names_and_shapes():
    with torch.device("meta"):
        state = TextEncoder(TextConfig()).state_dict()
    assert len(state) == 242
    assert state["token_embedding.weight"].shape == (256384, 4096)
    block = {
        key.removeprefix("blocks.23."): tuple(w.shape)
        for key, w in state.items()
        if key.startswith("blocks.23.")
    }
    assert block == {
        "norm1.weight": (4096,),
        "norm2.weight": (4096,),
        "pos_embedding.embedding.weight": (32, 64),
        "attn.q.weight": (4096, 4096),
        "attn.k.weight": (4096, 4096),
        "attn.v.weight": (4096, 4096),
        "attn.o.weight": (4096, 4096),
        "ffn.gate.0.weight": (10240, 4096),
        "ffn.fc1.weight": (10240, 4096),
        "ffn.fc2.weight": (4096, 10240),
    }


def test_buckets():
    distance = torch.tensor([0, -1, -7, -8, -15, -16, -32, -64, -127, -128, -500, 1, 7, 8, 16, 500])
    assert buckets(distance, 32).tolist() == [
        0,
        1,
        7,
        8,
        9,
        10,
        12,
        14,
        15,
        15,
        15,
        17,
        23,
        24,
        26,
        31,
    ]


TRANSFORMERS = (  # official name -> transformers' name
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (
        r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.",
    ),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [
        ("eager", torch.float32, 1e-6),  # measured 0
        ("sdpa", torch.float32, 5e-6),  # measured 1.8e-7
        (
            "eager",
            torch.bfloat16,
            2e-2,
        ),  # measured 4.0e-3: its softmax is in bfloat16; the official code gives 0
    ],
)
def test_transformers(attention, dtype, tolerance):
    transformers = pytest.importorskip("transformers")
    cfg = TextConfig(vocab_size=50, dim=48, dim_attn=64, dim_ffn=96, num_heads=4, num_layers=3)
    torch.manual_seed(0)
    ours = TextEncoder(cfg).to(dtype).requires_grad_(False)
    shape = {
        "vocab_size": 50,
        "d_model": 48,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 3,
        "num_heads": 4,
    }
    config = transformers.UMT5Config(
        **shape, feed_forward_proj="gated-gelu", attn_implementation=attention
    )
    theirs = transformers.UMT5EncoderModel(config)
    state = {}
    for key, weight in ours.state_dict().items():
        (name,) = {
            re.sub(pattern, name, key) for pattern, name in TRANSFORMERS if re.search(pattern, key)
        }
        state[name] = weight
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"encoder.embed_tokens.weight"}
    theirs = theirs.to(dtype).eval()

    ids = torch.randint(3, 50, (2, 200))
    mask = (torch.arange(200) < torch.tensor([[200], [30]])).long()
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).last_hidden_state
    actual = ours(ids, mask)
    assert actual.dtype == dtype
    assert golden.rel_max(actual[mask == 1].float(), expected[mask == 1].float()) <= tolerance


def test_gradients_reach_every_parameter():
    encoder, tokenizer = TextEncoder(TINY_TEXT), Tokenizer.load(TINY_FILE, TINY_TEXT.text_len)
    rows = encode(encoder, tokenizer, ["solve the maze", "go to the red goal"])
    (rows * torch.randn_like(rows)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in encoder.parameters())
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_encode_zeroes_what_is_beyond_the_prompt():
    tokenizer = Tokenizer.load(TINY_FILE, 16)
    prompts = ["turn the l", "", "mark " * 40]
    rows = encode(TextEncoder(TINY_TEXT), tokenizer, prompts)
    assert rows.shape == (3, 16, 64)
    for row, length in zip(rows, (4, 1, 16), strict=True):
        assert not row[length:].any()
        assert row[:length].abs().amax(dim=1).min() > 0
    alone = encode(TextEncoder(TINY_TEXT), tokenizer, prompts[:1])
    assert alone.shape == (1, 16, 64)


def test_equal_prompts_are_encoded_once():
    tokenizer, encoder, seen = Tokenizer.load(TINY_FILE, 16), TextEncoder(TINY_TEXT), []
    encoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    prompts = ["turn the l", "solve the maze", "turn the l"]
    rows = encode(encoder, tokenizer, prompts)
    assert seen == [2]
    assert torch.equal(rows[2], rows[0])
    for row, prompt in zip(rows, prompts, strict=True):
        assert golden.rel_max(row, encode(encoder, tokenizer, [prompt])[0]) < 1e-6  # measured 0


def test_encode_never_lets_padding_through():
    """Even where the encoder makes NaN of padding."""

    class Poisoned(nn.Module):
        def __init__(self):
            super().__init__()
            self.token_embedding = nn.Embedding(1, 1)

        def forward(self, ids, mask):
            return mask[..., None] / mask[..., None].float()

    rows = encode(Poisoned(), Tokenizer.load(TINY_FILE, 16), ["solve the maze"])
    assert rows[0, :, 0].tolist() == [1.0] * 4 + [0.0] * 12


# -- tokenizer -------------------------------------------------------------------------------------


def real_tokenizer() -> Path | None:
    """MINICOS_UMT5_TOKENIZER, or a copy in the cache of the Hugging Face Hub."""
    if named := os.environ.get("MINICOS_UMT5_TOKENIZER"):
        return Path(named)
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    patterns = (
        "models--Wan-AI--Wan2*/snapshots/*/google/umt5-xxl/tokenizer.json",
        "models--Wan-AI--Wan2*-Diffusers/snapshots/*/tokenizer/tokenizer.json",
        "models--google--umt5-xxl/snapshots/*/tokenizer.json",
    )
    return next((path for pattern in patterns for path in sorted(hub.glob(pattern))), None)


@pytest.fixture(scope="module")
def umt5() -> Tokenizer:
    if (path := real_tokenizer()) is None:
        pytest.skip("no UMT5 tokenizer here: set MINICOS_UMT5_TOKENIZER to its tokenizer.json")
    return Tokenizer.load(path, 512)


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case["prompt"][:20])
def test_golden_tokens(umt5, case):
    (ids,), (mask,) = umt5([case["prompt"]])
    assert ids[mask == 1].tolist() == case["ids"]
    assert len(ids) == 512
    assert not ids[len(case["ids"]) :].any()
    assert mask.sum() == len(case["ids"])


def test_golden_negative_prompt(umt5):
    assert TOKENS[1]["prompt"] == NEGATIVE_PROMPT
    assert umt5.unknown_words(NEGATIVE_PROMPT) == []
    assert umt5.unknown_words("a cat \U00013080") == ["\U00013080"]


@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case["prompt"][:20])
def test_golden_cleaning(case):
    assert clean(case["prompt"]) == case["cleaned"]


def test_entities_are_resolved_twice():
    """Only a "<" in the prompt shows it: without one, ftfy resolves entities, too."""
    assert (
        clean("if a < b, turn &amp;lt;left&amp;gt; &amp;amp;amp; go")
        == "if a < b, turn <left> &amp; go"
    )
    assert clean("a &amp;lt; b") == "a < b"


def test_tiny_file_is_the_one_built_of_its_words():
    shipped = type(tiny.build()).from_file(str(TINY_FILE))
    assert shipped.to_str() == tiny.build(tiny.tokens(shipped)).to_str()
    vocabulary = tiny.build().get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert len(vocabulary) <= TINY_TEXT.vocab_size
    assert [vocabulary[token] for token in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]


@pytest.mark.parametrize("kind", puzzles.KINDS)
def test_tiny_knows_every_puzzle(kind):
    tokenizer = Tokenizer.load(TINY_FILE, TINY_TEXT.text_len)
    for seed in range(20):
        prompt = puzzles.make(kind, seed).prompt
        _, mask = tokenizer([prompt])
        assert tokenizer.unknown_words(prompt) == []
        assert mask.sum() == len(prompt.split()) + 1 <= TINY_TEXT.text_len


def test_tiny_tokens():
    tokenizer = Tokenizer.load(TINY_FILE, 8)
    ids, mask = tokenizer(["  Solve the\nMAZE ", "mark the elephant", "l " * 20])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [
        [3, 4, 5, 1, 0, 0, 0, 0],
        [6, 4, 2, 1, 0, 0, 0, 0],
        [tiny.words().index("l")] * 7 + [1],
    ]
    assert mask.sum(dim=1).tolist() == [4, 4, 8]
    assert tokenizer.unknown_words("Mark the Elephant and the cat") == ["Elephant", "cat"]
    assert tokenizer.unknown_words("l " * 20 + "dog") == ["dog"]
    assert tokenizer.unknown_words("mark the caf&amp;eacute;") == ["café"]  # as it is read
    assert tokenizer.cut_off("l " * 6 + "the &amp;lt;  maze") == "< maze"


@given(st.text(max_size=60))
@settings(max_examples=100, deadline=None)
def test_any_text_becomes_tokens(prompt):
    (ids,), (mask,) = Tokenizer.load(TINY_FILE, 8)([prompt])
    length = int(mask.sum())
    assert 1 <= length <= 8
    assert mask[:length].all()
    assert ids[length - 1] == 1
    assert not ids[length:].any()
    assert ids.max() < TINY_TEXT.vocab_size


def test_bad_files_are_named(tmp_path):
    for name, content in (("absent.json", None), ("broken.json", "{"), ("other.json", "{}")):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        with pytest.raises(MinicosError, match=name):
            Tokenizer.load(path, 16)
    other = tiny.build()
    other.post_processor = None
    other.save(str(tmp_path / "endless.json"))
    with pytest.raises(ValueError, match=r"endless\.json does not end a prompt with token 1"):
        Tokenizer.load(tmp_path / "endless.json", 16)
