"""Which model is this? The one place where shapes, folders and the user's word are turned into the name of a variant.

Shapes give the architecture. Whether there are two experts, and whether a lone network stands in a whole folder or was
handed over as a file, tells apart what shares an architecture. What no file can tell (`config.FINETUNES`) is never guessed:
the plain variant is taken with a note, unless `--variant` or a config.json names another.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicos.config import EXPERTS, FINETUNES, VARIANTS, DiTConfig
from minicos.errors import MinicosError

Architecture = Mapping[str, Any]  # those fields of DiTConfig that shapes tell


@dataclass(frozen=True)
class Evidence:
    """What files and folders say about a model."""

    where: str  # for messages
    shapes: Architecture
    experts: tuple[str, ...]  # of "high" and "low", those that are there
    named: bool = False  # does a folder or file name say which expert a lone network is?
    whole: bool = (
        False  # is it the folder of a complete model, so that what is not there does not exist?
    )
    family: str | None = None  # a model that a config.json names


def architecture(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The fields of DiTConfig that the shapes of official names tell: all but heads, text length and eps. Empty where this is no DiT."""
    modules = (
        "patch_embedding",
        "text_embedding.0",
        "time_embedding.0",
        "blocks.0.ffn.0",
        "head.head",
    )
    found = [shapes[f"{name}.weight"] for name in modules if f"{name}.weight" in shapes]
    if [len(shape) for shape in found] != [5, 2, 2, 2, 2]:
        return {}
    patch, text, time, ffn, head = found
    return {
        "in_dim": patch[1],
        "out_dim": head[0] // max(1, patch[2] * patch[3] * patch[4]),
        "dim": patch[0],
        "ffn_dim": ffn[0],
        "num_layers": 1
        + max(
            int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d{1,6})\.", name))
        ),
        "text_dim": text[1],
        "freq_dim": time[1],
        "patch_size": tuple(patch[2:]),
        "image_tokens": 514
        if "img_emb.emb_pos" in shapes
        else 257 * ("img_emb.proj.0.weight" in shapes),
    }


def fitting(shapes: Architecture, count: int | None = None) -> list[str]:
    """The variants of this architecture; of those only the ones with `count` networks, where there are such."""
    same = [
        name
        for name, cfg in VARIANTS.items()
        if shapes and all(getattr(cfg, k) == v for k, v in shapes.items())
    ]
    return [name for name in same if count in EXPERTS.get(name, (1,))] or same


def likely(evidence: Evidence) -> list[str]:
    """The variants that the evidence leaves open, finetunes aside. Several where a lone file does not say."""
    pair = evidence.named or len(evidence.experts) > 1
    return fitting(evidence.shapes, 2 if pair else 1 if evidence.whole else None)


def finetunes(variant: str) -> list[str]:
    """The models that differ from a variant in nothing that a file shows."""
    return [name for name, base in FINETUNES.items() if base == variant]


def resolve(evidence: Evidence, asked: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The name of the model, and notes on what else it could be.

    `asked` is the user's `--variant`. Raises MinicosError where the architecture is of no variant, where `asked` is unknown
    or has other shapes, where an answer is missing, and where an expert is missing or one too many.
    """
    where, shapes = evidence.where, evidence.shapes
    open_, notes = likely(evidence), ()
    if not open_:
        told = "width {dim}, {num_layers} layers and {in_dim} input channels".format(**shapes)
        raise MinicosError(f"{where}: no variant has {told}. Try `minicos inspect`.")
    asked = asked or evidence.family
    if asked is not None:
        if asked not in VARIANTS and asked not in FINETUNES:
            raise MinicosError(
                f"there is no variant {asked!r}: take one of {', '.join([*VARIANTS, *FINETUNES])}."
            )
        if FINETUNES.get(asked, asked) not in fitting(shapes):
            fits = [name for base in fitting(shapes) for name in (base, *finetunes(base))]
            raise MinicosError(
                f"{where} has not the shapes of {asked}: it can be {' or '.join(fits)}."
            )
        variant = asked
    elif len(open_) > 1:
        raise MinicosError(
            f"{where} can be {_choices(open_)}: nothing in its files tells them apart."
        )
    else:
        variant = open_[0]
        others = finetunes(variant)
        notes = (
            (f"{' and '.join(others)} have the same shapes: say so with --variant if it is one",)
            if others
            else ()
        )
    counts = EXPERTS.get(FINETUNES.get(variant, variant), (1,))
    if len(evidence.experts) not in counts:
        raise MinicosError(f"{where}: {_count(variant, evidence)}")
    return variant, notes


def configure(variant: str, given: Mapping[str, Any], where: str) -> DiTConfig:
    """The variant's configuration, after a look whether config.json (`given`, in either spelling) agrees with it."""
    cfg = VARIANTS[FINETUNES.get(variant, variant)]
    for name, spellings in {
        "num_heads": ("num_heads", "num_attention_heads"),
        "eps": ("eps",),
        "text_len": ("text_len",),
    }.items():
        for spelling in spellings:
            if given.get(spelling, getattr(cfg, name)) != getattr(cfg, name):
                raise MinicosError(
                    f"{where}: its config.json says {spelling} {given[spelling]!r}, and its shapes are those of "
                    f"{variant}, which has {getattr(cfg, name)}. Download the config.json again."
                )
    return cfg


def _choices(names: list[str]) -> str:
    """Each possible variant with what makes it that one."""
    return " or ".join(
        f"one expert of {name} (then name the other, e.g. --part low=FILE)"
        if 1 not in EXPERTS.get(name, (1,))
        else f"{name} (then say --variant {name})"
        for name in names
    )


def _count(variant: str, evidence: Evidence) -> str:
    if len(evidence.experts) > 1:
        return f"there are two experts, and {variant} has one network. Leave out --part low, or name another --variant."
    there, missing = ("high", "low") if "high" in evidence.experts else ("low", "high")
    sure = "" if evidence.named else "taken as "
    return (
        f"{variant} has two experts, and only one is here ({sure}the {there}-noise one). "
        f"Name the other: --part {missing}=FILE."
    )
