"""The tokenizer and the UMT5 text encoder (official wan/modules/t5.py and tokenizers.py).

A prompt is cleaned, cut into tokens and padded to `text_len`; the encoder maps each token to a row
that depends on its context. The encoder is a T5: residual blocks of attention and a gated
feed-forward, without biases and without positions in the embedding. Instead, every block adds to
its attention scores a learned number for each head and *distance* between two tokens. `encode` sets
rows beyond the prompt to zero; the diffusion transformer attends to those rows too.

Module and attribute names are those of the official checkpoint. The official clamp against overflow
in float16 is omitted, since it has no effect in bfloat16 and float32.
"""

import html
import math
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import ftfy
import tokenizers
import torch
from einops import rearrange
from tokenizers.pre_tokenizers import Sequence, WhitespaceSplit
from torch import Tensor, nn

from minicos.config import TextConfig
from minicos.errors import MinicosError
from minicos.ops import rms_norm
from minicos.weights.files import reading
from minicos.weights.tokens import REMEDY, read_tokenizer

PAD, EOS = 0, 1  # token ids, common to all tokenizers of the family


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=1e-6)


class GELU(nn.Module):
    """The tanh approximation as separate operations: in bfloat16 it rounds after each of them, as
    the official code does.
    """

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


class FeedForward(nn.Module):
    """fc2(fc1(x) * gelu(gate(x)))."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(cfg.dim, cfg.dim_ffn, bias=False), GELU())
        self.fc1 = nn.Linear(cfg.dim, cfg.dim_ffn, bias=False)
        self.fc2 = nn.Linear(cfg.dim_ffn, cfg.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x) * self.gate(x))


class RelativePosition(nn.Module):
    """A learned number for each head and distance from query to key; large distances share a
    bucket (`buckets`).
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.embedding = nn.Embedding(cfg.num_buckets, cfg.num_heads)

    def forward(self, length: int) -> Tensor:
        """The biases, 1 n q k, computed once per distance and viewed as a matrix."""
        index = distances(length, self.embedding.num_embeddings, self.embedding.weight.device)
        each = self.embedding(index).T.contiguous()  # n (2 length - 1)
        return each.unfold(1, length, 1).flip(1).unsqueeze(0)


@lru_cache(maxsize=4)
def distances(length: int, num_buckets: int, device: torch.device) -> Tensor:
    """The buckets of all distances between `length` tokens, from -(length - 1) upwards. They are
    the same in all blocks and are computed on the host.
    """
    return buckets(torch.arange(1 - length, length, device="cpu"), num_buckets).to(device)


def buckets(distance: Tensor, num_buckets: int, max_distance: int = 128) -> Tensor:
    """The bucket of each distance (key - query). Half of the buckets are for keys to the right. In
    each half, the first half is exact (0, 1, 2, ...), and the rest grows evenly in log distance up
    to `max_distance`; all larger distances share the last bucket.

    Computed on the host in float32, so that distances whose logarithm is an integer (16, 32, 64)
    are rounded equally on every device.
    """
    side = num_buckets // 2
    exact = side // 2
    far = distance.abs()
    # 0 at `exact`, 1 at `max_distance`
    scale = torch.log(far.float() / exact) / math.log(max_distance / exact)
    coarse = (exact + (scale * (side - exact)).long()).clamp(max=side - 1)
    return (distance > 0) * side + torch.where(far < exact, far, coarse)


class Attention(nn.Module):
    """softmax(q k^T + bias) v without the factor 1 / sqrt(k). Scores and weights have x's dtype,
    the softmax is float32.
    """

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.q, self.k, self.v = (nn.Linear(cfg.dim, cfg.dim_attn, bias=False) for _ in range(3))
        self.o = nn.Linear(cfg.dim_attn, cfg.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor, padding: Tensor) -> Tensor:
        """x (b t d), bias (1 n t t), padding (b 1 1 t; True: masked out) -> b t d."""
        q, k, v = (
            rearrange(layer(x), "b t (n k) -> b n t k", n=self.num_heads)
            for layer in (self.q, self.k, self.v)
        )
        scores = (q @ k.mT + bias).masked_fill_(padding, torch.finfo(x.dtype).min)  # b n t t
        weights = scores.float().softmax(dim=-1).to(x.dtype)
        return self.o(rearrange(weights @ v, "b n t k -> b t (n k)"))


class Block(nn.Module):
    """Attention and a gated feed-forward, each on a normed input with a residual connection."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.norm1 = RMSNorm(cfg.dim)
        self.attn = Attention(cfg)
        self.norm2 = RMSNorm(cfg.dim)
        self.ffn = FeedForward(cfg)
        self.pos_embedding = RelativePosition(cfg)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # b t d, b 1 1 t
        x = x + self.attn(self.norm1(x), self.pos_embedding(x.shape[1]), padding)
        return x + self.ffn(self.norm2(x))


class TextEncoder(nn.Module):
    """The UMT5 encoder (official `T5Encoder`, shared_pos=False)."""

    def __init__(self, cfg: TextConfig):
        super().__init__()
        self.cfg = cfg
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.dim)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.norm = RMSNorm(cfg.dim)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode token ids (b t) with a mask (b t; 0 for padding) to b t d. The values of padding
        rows are meaningless.
        """
        padding = (mask == 0)[:, None, None]
        x = self.token_embedding(ids)
        for block in self.blocks:
            x = block(x, padding)
        return self.norm(x)


def clean(prompt: str) -> str:
    """The official cleaning: repair mis-decoded text, resolve HTML entities twice, and replace
    every run of white space by one space.

    Repairs are those of ftfy, which include full-width punctuation, as in the official negative
    prompt.
    """
    prompt = ftfy.fix_text(re.sub(r"(?:\r?\n)+", "\n", prompt))  # line by line, which takes long
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer.json, and the length to which prompts are padded or truncated."""

    vocabulary: tokenizers.Tokenizer
    text_len: int

    @classmethod
    def load(cls, path: str | Path, text_len: int) -> "Tokenizer":
        """Read a tokenizer.json. Raises MinicosError with the file's name if it is missing, damaged
        or of another kind.
        """
        vocabulary = read_tokenizer(path)
        if vocabulary.encode("").ids != [EOS] or vocabulary.pre_tokenizer is None:
            raise MinicosError(
                f"{path} does not end a prompt with token {EOS}: it should be that of umt5-xxl."
            )
        # As in transformers 5. It matters only next to a literal "</s>", where the file's own
        # settings turn spaces into tokens.
        vocabulary.pre_tokenizer = Sequence([WhitespaceSplit(), vocabulary.pre_tokenizer])
        return cls(vocabulary, text_len)

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Clean and tokenize prompts: ids and mask (b t int64) with tokens, end token and padding.
        Long prompts are truncated.
        """
        ids = torch.full((len(prompts), self.text_len), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            with reading("the tokenizer", "cannot encode the prompt", REMEDY):
                words = self.vocabulary.encode(clean(prompt)).ids[:-1]
            tokens = [*words[: self.text_len - 1], EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask

    def cut_off(self, prompt: str) -> str:
        """The part of a prompt beyond `text_len` tokens, as written, which is cut off; empty if the
        prompt fits.
        """
        text = clean(prompt)
        encoding = self.vocabulary.encode(text)
        if len(encoding.ids) <= self.text_len:
            return ""
        return text[encoding.offsets[self.text_len - 1][0] :].strip()

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the vocabulary lacks, as written, in order. The encoder
        receives <unk> instead.
        """
        text, unknown = clean(prompt), self.vocabulary.token_to_id("<unk>")
        encoding = self.vocabulary.encode(text)
        return [
            text[slice(*at)]
            for token, at in zip(encoding.ids, encoding.offsets, strict=True)
            if token == unknown
        ]


def encode(encoder: TextEncoder, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Prompts -> b t d, exactly zero beyond each prompt's end (the official code trims rows, then
    pads with zeros). Equal prompts are encoded once.
    """
    each = list(dict.fromkeys(prompts))
    ids, mask = (x.to(encoder.token_embedding.weight.device) for x in tokenizer(each))
    rows = encoder(ids, mask).masked_fill(mask[..., None] == 0, 0)
    return rows if len(each) == len(prompts) else rows[[each.index(prompt) for prompt in prompts]]
