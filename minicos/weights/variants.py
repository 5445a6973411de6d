"""Identify a model: the only place where shapes, folders and the user's options become the name of
a variant.

Shapes give the architecture. The number of experts, and whether a single network is in a complete
folder or was given as a file, distinguish models with equal architectures. What no file shows
(`config.FINETUNES`) is never guessed: the plain variant is chosen, with a note, unless `--variant`
or a config.json names another.

A network of Wan's form in any other size is "like" the variant with the same inputs, which decides
how it is sampled.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from minicos.config import EXPERTS, FINETUNES, LIKE, VARIANTS, CLIPConfig, DiTConfig
from minicos.errors import MinicosError
from minicos.weights.configs import dit_config

Architecture = Mapping[str, Any]  # the fields of DiTConfig that follow from shapes


@dataclass(frozen=True)
class Evidence:
    """What files and folders tell about a model."""

    where: str  # for messages
    shapes: Architecture
    experts: tuple[str, ...]  # those of "high" and "low" that exist
    named: bool = False  # whether a folder or file name says which expert a single network is
    # whether it is the folder of a complete model, so that missing parts do not exist
    whole: bool = False
    family: str | None = None  # the model that a config.json names


def fitting(shapes: Architecture, count: int | None = None) -> list[str]:
    """The variants with this architecture; restricted to those with `count` networks, if there are
    any.
    """
    same = [
        name
        for name, cfg in VARIANTS.items()
        if shapes and all(getattr(cfg, k) == v for k, v in shapes.items())
    ]
    return [name for name in same if count in EXPERTS.get(name, (1,))] or same


def likely(evidence: Evidence) -> list[str]:
    """The variants that the evidence leaves open, without finetunes. There can be several for a
    single file.
    """
    pair = evidence.named or len(evidence.experts) > 1
    return fitting(evidence.shapes, 2 if pair else 1 if evidence.whole else None)


def finetunes(variant: str) -> list[str]:
    """The models that no file distinguishes from a variant."""
    return [name for name, base in FINETUNES.items() if base == variant]


def resolve(evidence: Evidence, asked: str | None = None) -> tuple[str, tuple[str, ...]]:
    """The name of the model, and notes on alternatives. `asked` is the user's `--variant`.

    Raises:
        MinicosError: the architecture belongs to no variant, `asked` is unknown or has other
            shapes, the answer is ambiguous, or there are too few or too many experts.
    """
    where, shapes = evidence.where, evidence.shapes
    open_ = likely(evidence)
    notes: tuple[str, ...] = ()
    asked = asked or evidence.family
    if asked is not None and asked not in VARIANTS and asked not in FINETUNES:
        raise MinicosError(
            f"there is no variant {asked!r}: take one of {', '.join([*VARIANTS, *FINETUNES])}."
        )
    if not open_:
        return _like(evidence, asked)
    if asked is not None:
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
        if others := " and ".join(finetunes(variant)):
            notes = (f"{others} have the same shapes: say so with --variant if it is one",)
    counts = EXPERTS.get(FINETUNES.get(variant, variant), (1,))
    if len(evidence.experts) not in counts:
        raise MinicosError(f"{where}: {_count(variant, evidence)}")
    return variant, notes


def _like(evidence: Evidence, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """The name of a network with a size of its own. Raises MinicosError if its inputs match no
    variant.
    """
    where, shapes = evidence.where, evidence.shapes
    inputs, outputs, images = shapes["in_dim"], shapes["out_dim"], shapes["image_tokens"]
    pair = len(evidence.experts) > 1
    if inputs not in (outputs, 2 * outputs + 4):
        raise MinicosError(
            f"{where} takes {inputs} input channels and gives {outputs}, as no Wan that minicos "
            "knows: "
            "it may be a control network (Wan-Fun-Control has 48 or 52). Take a text- or "
            "image-to-video network."
        )
    kinds = {0: "Wan2.2-I2V-A14B", 1: "Wan2.1-I2V-14B", 2: "Wan2.1-FLF2V-14B"}
    nearest = kinds[min(2, images // CLIPConfig().tokens)]
    if inputs == outputs:
        nearest = "Wan2.2-T2V-A14B" if pair else "Wan2.1-T2V-14B"
    if asked is not None:
        base = VARIANTS[FINETUNES.get(asked, asked)]
        if (base.in_dim > base.out_dim) != (
            inputs > outputs
        ) or base.images != images // CLIPConfig().tokens:
            raise MinicosError(f"{where} has not the inputs of {asked}: it is like {nearest}.")
        nearest = asked
    note = (
        f"its size is of no published model: it is sampled like {nearest}, --variant names another"
    )
    return LIKE + nearest, (note,)


def configure(
    variant: str, shapes: Architecture, given: Mapping[str, Any], where: str
) -> DiTConfig:
    """The variant's configuration, if config.json (`given`, in either spelling) agrees; for a
    network like it, its own configuration.
    """
    like = variant.startswith(LIKE)
    cfg = dit_config(shapes, given, where) if like else VARIANTS[FINETUNES.get(variant, variant)]
    known = {name: getattr(cfg, name) for name in ("num_heads", "eps", "text_len")}
    for name, value in (
        known | {"num_attention_heads": cfg.num_heads, "window_size": [-1, -1]}
    ).items():
        if given.get(name, value) != value:
            raise MinicosError(
                f"{where}: its config.json says {name} {given[name]!r}, and its shapes are those "
                f"of {variant}, which has {value}. Download the config.json again."
            )
    causal = given.get("frame_causal", False)
    if not isinstance(causal, bool):
        raise MinicosError(f"{where}: its config.json says frame_causal {causal!r:.40}, no bool")
    return replace(cfg, frame_causal=causal)


def _choices(names: list[str]) -> str:
    """Each possible variant with how to select it."""
    return " or ".join(
        f"one expert of {name} (then name the other, e.g. --part low=FILE)"
        if 1 not in EXPERTS.get(name, (1,))
        else f"{name} (then say --variant {name})"
        for name in names
    )


def _count(variant: str, evidence: Evidence) -> str:
    if len(evidence.experts) > 1:
        return (
            f"there are two experts, and {variant} has one network. Leave out --part low, or name "
            "another --variant."
        )
    there, missing = ("high", "low") if "high" in evidence.experts else ("low", "high")
    sure = "" if evidence.named else "taken as "
    return (
        f"{variant} has two experts, and only one is here ({sure}the {there}-noise one). "
        f"Name the other: --part {missing}=FILE."
    )
