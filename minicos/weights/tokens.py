"""Read a tokenizer.json safely, so that the file can neither hang nor crash the process that
encodes a prompt with it.

The library runs what the file describes: regular expressions, replacements that may lengthen text,
templates of any length. So the description is compared with the parts of tokenizers of this family
(UMT5, T5, the embedded model), and the result is tested before it is used.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from minicos.weights.files import read_bytes, reading, table

LIMIT = 1 << 26  # bytes; umt5-xxl's has 17 million
MODELS = ("Unigram", "WordLevel", "BPE")
NORMALISERS = (
    *("Precompiled", "Replace", "Strip", "StripAccents", "Lowercase", "Prepend", "Nmt"),
    *("NFC", "NFD", "NFKC", "NFKD", "BertNormalizer"),
)
PRE_TOKENIZERS = (
    *("Metaspace", "Whitespace", "WhitespaceSplit"),
    *("Punctuation", "Digits", "ByteLevel"),
)
SPACES = " {2,}"  # the only regular expression in a published tokenizer
REMEDY = "Take the tokenizer.json of umt5-xxl."
PROBES = ("", "a", "The quick brown fox, 123.", "é 中文 \u2603 \U0001f600 \x00", "</s> <pad>")


def read_tokenizer(path: str | Path) -> tokenizers.Tokenizer:
    """The tokenizer in a file. Raises MinicosError if the file is missing, damaged, or contains
    other parts than UMT5's.
    """
    text = read_bytes(path, LIMIT)
    with reading(path, "is not a tokenizer.json", REMEDY):
        _check(table(text))
        vocabulary = tokenizers.Tokenizer.from_str(text.decode("utf-8"))
        vocabulary.no_truncation()
        vocabulary.no_padding()
        for probe in PROBES:
            vocabulary.encode(probe)
    return vocabulary


def _check(given: Mapping[str, Any]) -> None:
    """Raise ValueError if a tokenizer contains parts that are not known to be harmless."""
    model = given.get("model")
    if not isinstance(model, dict) or (kind := model.get("type")) not in MODELS:
        kind = model.get("type") if isinstance(model, dict) else None
        raise ValueError(f"its model is {kind!r:.60}, not one of {', '.join(MODELS)}")
    unknown = {
        "Unigram": type(model.get("unk_id")) is int,
        "WordLevel": model.get("unk_token") in model.get("vocab", {}),
    }
    if not unknown.get(kind, True):
        raise ValueError("it has no token for unknown words (unk_id, unk_token)")
    if model.get("dropout"):
        raise ValueError("it drops pieces at random (dropout)")
    _check_numbers(model.get("vocab"), given.get("added_tokens") or [])
    for part, kinds in (("normalizer", NORMALISERS), ("pre_tokenizer", PRE_TOKENIZERS)):
        for one in _parts(given.get(part), part + "s", 0):
            if one.get("type") not in kinds:
                raise ValueError(
                    f"its {part} has a part {one.get('type')!r:.60}, which is not known"
                )
            if one["type"] == "Replace":
                _check_replacement(one)
            if any(isinstance(v, str) and len(v) > 1 << 20 for v in one.values()):
                raise ValueError(f"its {part} is too large")
    template = given.get("post_processor")
    if template is not None:
        lists = [template.get("single"), template.get("pair")]
        lists += [token.get("ids") for token in dict(template.get("special_tokens") or {}).values()]
        usual = template.get("type") == "TemplateProcessing"
        if not usual or not all(isinstance(one, list) and len(one) <= 16 for one in lists):
            raise ValueError(
                "what it puts around a prompt (post_processor) is not a short template"
            )


def _check_numbers(vocabulary: Any, added: Any) -> None:
    """Check that tokens are numbered 0, 1, 2, ...: each number is a row of the text encoder."""
    if not isinstance(vocabulary, list | dict) or not isinstance(added, list):
        raise ValueError("its vocabulary is neither a list nor a table")
    ids = range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
    numbers = set(ids)
    numbers |= {token.get("id") for token in added}
    if not all(type(number) is int for number in numbers):
        raise ValueError("its tokens are not numbered")
    last = max(numbers, default=-1)
    if min(numbers, default=0) < 0 or last != len(numbers) - 1:
        raise ValueError(f"it has {len(numbers):,} tokens, and their numbers end at {last:,}")


def _parts(given: Any, name: str, depth: int) -> Iterator[Mapping[str, Any]]:
    """The parts of a normaliser or pre-tokenizer, which may be nested sequences. Raises ValueError
    if there are too many.
    """
    if given is None:
        return
    if not isinstance(given, dict) or depth > 3:
        raise ValueError(f"its {name} are not a table, or nested too deeply")
    if given.get("type") != "Sequence":
        yield given
        return
    # the library's names for the parts of a sequence
    inside = given.get({"normalizers": "normalizers", "pre_tokenizers": "pretokenizers"}[name])
    if not isinstance(inside, list) or len(inside) > 8:
        raise ValueError(f"its {name} are a sequence of too many parts")
    for one in inside:
        yield from _parts(one, name, depth + 1)


def _check_replacement(given: Mapping[str, Any]) -> None:
    """A replacement may not lengthen the text, nor use a regular expression other than the
    published one.
    """
    pattern, content = given.get("pattern"), given.get("content")
    if not isinstance(pattern, dict) or not isinstance(content, str):
        raise ValueError("its normalizer has a replacement without pattern or content")
    sought = pattern.get("String")
    usual = pattern.get("Regex") == SPACES and len(content) <= 2
    if not usual and not (isinstance(sought, str) and 0 < len(sought) >= len(content)):
        raise ValueError(
            f"its normalizer replaces {str(pattern)[:60]} by {content[:20]!r}, which is not known"
        )
