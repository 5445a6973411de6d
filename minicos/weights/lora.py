"""LoRA files: small changes to a network's weights, in all common spellings, merged while loading.

A LoRA stores two thin matrices for a weight W (out in): W += strength * alpha / rank * up @ down,
with up (out rank) and down (rank in), for convolutions over flattened kernels. Producers differ in
prefix, in the names of the two matrices, in the network's naming, and in whether alpha is stored
(if not, alpha = rank). Some also store whole differences of parameters, or other products (LoHa,
LoKr). Each file is read into one form, a table from official parameter names to changes. A key that
is not understood is an error, and so is an unsupported kind of LoRA (DoRA, control LoRA, ...).

    DiffSynth        blocks.0.self_attn.q.lora_A.default.weight
    PEFT, diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight, .lora_B.bias; transformer_2. for
                     the low-noise expert
    ComfyUI          diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha
    lightx2v         like ComfyUI without alpha, with .diff (weight), .diff_b (bias), .diff_m
                     (modulation)
    musubi           lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
    LyCORIS          lycoris_blocks_0_self_attn_q.lokr_w1, .hada_w1_a, ...
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicos.errors import MinicosError
from minicos.weights.files import read_table, reading, table
from minicos.weights.header import Header, read_header
from minicos.weights.names import (
    ASIDE,
    CHANNELS,
    FIRST,
    IMAGE_BRANCH,
    IMAGES,
    INPUT,
    INPUTS,
    SECOND,
    UNREAD,
    WHOLE_PARAMETERS,
    article,
    lacking,
    lora_dialect,
    lora_key,
    stranger,
)

# Starts of training (PEFT's init_lora_weights) that change the model below the LoRA, too.
CONFIG = "adapter_config.json"
CHANGED = ("pissa", "olora", "corda", "loftq", "lora_ga")
WHOLE = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}  # piece -> what it changes


@dataclass(frozen=True)
class LowRank:
    """The change scale * up @ down: up (out rank), down (rank in), followed by the axes of a
    kernel for a convolution.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], *self.down.shape[1:]

    def add(self, tensor: Tensor, strength: float) -> Tensor:
        """tensor + strength * change, float32, without an intermediate matrix."""
        up, down = (factor.to(tensor.device).float().flatten(1) for factor in (self.up, self.down))
        flat = torch.addmm(tensor.flatten(1), up, down, alpha=strength * self.scale)
        return flat.view(tensor.shape)


@dataclass(frozen=True)
class Whole:
    """A change stored directly, in the parameter's shape."""

    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def add(self, tensor: Tensor, strength: float) -> Tensor:
        """tensor + strength * change, float32."""
        change = self.value.to(tensor.device).float().reshape(tensor.shape)
        return tensor.add(change, alpha=strength * self.scale)


@dataclass(frozen=True)
class Joined:
    """LoHa and LoKr: a change of this shape, made of two others as a product of their elements or
    a Kronecker product.
    """

    a: LowRank | Whole
    b: LowRank | Whole
    shape: tuple[int, ...]
    join: Callable[[Tensor, Tensor], Tensor]
    scale: float = 1.0

    def add(self, tensor: Tensor, strength: float) -> Tensor:
        """tensor + strength * change, float32."""
        a, b = (one.add(tensor.new_zeros(one.shape), 1.0).flatten(1) for one in (self.a, self.b))
        return tensor.add(self.join(a, b).view(tensor.shape), alpha=strength * self.scale)


Delta = LowRank | Whole | Joined


@dataclass(frozen=True)
class Lora:
    """Changes of official parameters, and the strength with which they are applied."""

    path: Path
    dialect: str  # "diffsynth", "lightx2v", "comfy", "peft", "musubi", "lycoris"
    deltas: Mapping[str, Delta]  # official parameter name -> change
    strength: float = 1.0
    notes: tuple[str, ...] = ()  # parts of the file that are not applied

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> "Lora":
        """The LoRA without changes of what the network with these shapes lacks and another Wan has,
        an image branch or input channels, and with notes that count them. LoRAs of one Wan are
        used with others, and files for Wan2.2 made by tools of Wan2.1 contain such changes.

        Raises:
            MinicosError: as for `check`.
        """
        others = {name: _other(name, tuple(d.shape), shapes) for name, d in self.deltas.items()}
        kept = {name: delta for name, delta in self.deltas.items() if not others[name]}
        notes = [
            f"{len(parts)} changes of {kind} ({', '.join(dict.fromkeys(parts))}) were left out"
            for kind in (IMAGES, INPUTS)
            if (parts := [part for what, part in filter(None, others.values()) if what == kind])
        ]
        fitted = replace(self, deltas=kept, notes=(*self.notes, *notes)) if kept else self
        fitted.check(shapes)
        return fitted

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise MinicosError unless every change has a parameter of its shape in `shapes`."""
        for name, delta in self.deltas.items():
            if name not in shapes:
                raise MinicosError(f"{self.path} changes {name}, {lacking(name)}")
            found, needed = tuple(delta.shape), tuple(shapes[name])
            if name == INPUT and found[2:] == needed[2:] and found[1] > needed[1]:
                raise MinicosError(
                    f"{self.path} is a control LoRA: it widens the network's input to {found[1]} "
                    "channels "
                    f"({needed[1]} here), and minicos does not read those. Take a LoRA without "
                    "control."
                )
            if found not in (
                needed,
                (needed[0], math.prod(needed[1:])),
            ):  # LyCORIS flattens kernels
                raise MinicosError(
                    f"{self.path}: the change of {name} is {found}, and the parameter {needed}. "
                    "Is the LoRA for another variant?"
                )

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` (float32, the official parameter `name`) with its change added; the same tensor
        if there is no change.
        """
        delta = self.deltas.get(name)
        return tensor if delta is None else delta.add(tensor, self.strength)


def _other(
    name: str, found: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """What is changed that another Wan has, and a network with these shapes not: kind and part."""
    if name not in shapes:
        parts = (part.strip(".") for part in IMAGE_BRANCH if part in f"{name}.")
        return next(((IMAGES, part) for part in parts), None)
    here = shapes[name]
    known = [(here[0], n, *here[2:]) for n in CHANNELS if name == INPUT and n != here[1]]
    return (INPUTS, f"{found[1]} channels, not {here[1]}") if found in known else None


@dataclass(frozen=True)
class Applied:
    """The record of a merged LoRA."""

    expert: str
    file: str
    dialect: str
    ranks: tuple[int, ...]  # of its thin matrices, without repetition; may be none
    strength: float
    tensors: int  # parameters changed
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, expert: str, lora: Lora) -> "Applied":
        ranks = {d.down.shape[0] for d in lora.deltas.values() if isinstance(d, LowRank)}
        return cls(
            expert,
            str(lora.path),
            lora.dialect,
            tuple(sorted(ranks)),
            lora.strength,
            len(lora.deltas),
            lora.notes,
        )

    def __str__(self) -> str:
        other = "LoHa or LoKr" if self.dialect == "lycoris" else "whole differences"
        rank = f"rank {', '.join(map(str, self.ranks))}" if self.ranks else other
        changes = (
            f"{self.tensors} tensors changed ({self.dialect}, {rank}, strength {self.strength:g})"
        )
        return "; ".join([f"{self.expert}: {Path(self.file).name}: {changes}", *self.notes])


def read(path: str | Path, strength: float = 1.0, expert: str = "high") -> Lora:
    """Read a LoRA file (.safetensors, or tensors in .pt). From a file for both experts, reads the
    changes for `expert`.

    Raises:
        MinicosError: a key does not fit, or the kind of LoRA is unsupported; the message names
            file and key.
    """
    from minicos.weights.load import DTYPES, open_tensors  # load imports this module

    header = read_header(path)
    dialect = lora_dialect(header.tensors)
    if dialect is None:
        raise MinicosError(
            f"{path} holds no LoRA: it has no lora_A, lora_down or diff. `minicos inspect {path}` "
            "says more."
        )
    chosen, notes = _for_expert(header, expert)
    tensor = open_tensors(header)
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)  # module -> down, up, alpha, diff ...
    for key, (module, piece) in chosen.items():
        if piece in parts[module]:
            raise MinicosError(
                f"{path}: the key {key!r} stands for a change that is already there. Remove one of "
                "them."
            )
        kind = DTYPES.get(stored := header.tensors[key].dtype)
        if kind is None or not (piece == "alpha" or kind.is_floating_point):
            raise MinicosError(
                f"{path}: {key} holds {'integers' if kind else 'numbers'} ({stored}), and minicos "
                "reads changes in ordinary floating point alone. Get the LoRA in bf16 or fp16."
            )
        parts[module][piece] = tensor(key)
    deltas: dict[str, Delta] = {}
    spelled = {module: key.rpartition(".lora_")[0] for key, (module, _) in chosen.items()}
    scale = _adapter_scale(header, spelled, SECOND if expert == "low" else FIRST)
    for module, found in parts.items():
        for name, delta in _deltas(module, found, scale, header.path):
            if name in deltas:
                raise MinicosError(
                    f"{path}: {module} changes {name} twice ({', '.join(sorted(found))}). "
                    "Get the file again."
                )
            deltas[name] = delta
    return Lora(header.path, dialect, deltas, strength, notes)


def _unread(path: Path, kind: str, where: str) -> MinicosError:
    return MinicosError(
        f"{path} is {article(kind)} ({where}), which minicos does not read. "
        "Merge it into the model with the tool that made it, and open the merged model."
    )


def _for_expert(header: Header, expert: str) -> tuple[dict[str, tuple[str, str]], tuple[str, ...]]:
    """Key -> official module and piece, for the keys of this expert; and a note on those of the
    other.
    """
    found = {key: lora_key(key) for key in header.tensors}
    known = {key: parsed for key, parsed in found.items() if parsed is not None}
    for key, parsed in known.items():
        kind = UNREAD.get(parsed.piece)
        if parsed.bias and parsed.piece != "up":
            kind = "LoRA with a bias where none is known"
        if kind is not None:
            raise _unread(header.path, kind, key)
    if strange := next((key for key in found if key not in known), None):
        raise MinicosError(
            f"{header.path}: the key {strange!r} {stranger(strange)}. `minicos inspect` says what "
            "the file is; a LoRA for another network cannot be used."
        )
    sides = {parsed.low for parsed in known.values()}
    if sides == {True} and expert == "high":
        raise MinicosError(
            f"{header.path} is for the low-noise expert (its keys begin with transformer_2. or the "
            "like). "
            "Give it as --lora low=FILE."
        )
    other = [k for k, key in known.items() if len(sides) == 2 and key.low != (expert == "low")]
    name = "high" if expert == "low" else "low"
    notes = (f"its {len(other)} tensors for the {name}-noise expert are not for this one",)
    chosen = {
        key: (parsed.module, f"{parsed.piece}_bias" if parsed.bias else parsed.piece)
        for key, parsed in known.items()
        if key not in set(other) and parsed.piece != ASIDE
    }
    return chosen, notes if other else ()


Scale = Callable[[str, int], float]  # official module, rank -> alpha / rank


def _deltas(
    module: str, found: Mapping[str, Tensor], adapter: Scale, path: Path
) -> Iterable[tuple[str, Delta]]:
    """The changes of one module's parameters, from its pieces."""
    pieces = set(found) - {"alpha"}
    weight = f"{module}.weight"

    def wrong(what: str) -> MinicosError:
        return MinicosError(f"{path}: {module} {what}. Get the whole file.")

    def scale(rank: int) -> float:
        if "alpha" not in found:
            return adapter(module, rank)
        if found["alpha"].numel() != 1:
            raise MinicosError(f"{path}: the alpha of {module} is not one number. Get it again.")
        value = float(found["alpha"].item()) / max(1, rank)
        if not math.isfinite(value) or not value:
            raise MinicosError(
                f"{path}: the alpha of {module} is {value}, not a finite number other than 0. "
                "Get the file again."
            )
        return value

    def product(up: str, down: str, factor: float | None = None) -> LowRank:
        a, b = found[up], found[down]
        kernel = all(n == 1 for n in a.shape[2:])
        if min(a.ndim, b.ndim) < 2 or a.shape[1] != b.shape[0] or not kernel or not b.shape[0]:
            raise wrong(f"has up {tuple(a.shape)}, down {tuple(b.shape)}: ranks differ or are 0")
        return LowRank(a, b, scale(b.shape[0]) if factor is None else factor)

    if pieces & {"up", "down", "up_bias"}:
        if not {"up", "down"} <= pieces or pieces - {"up", "down", "up_bias", "diff_b", "diff_m"}:
            raise wrong(f"has {sorted(found)}, not one up and one down")
        delta = product("up", "down")
        yield weight, delta
        if "up_bias" in found:
            yield f"{module}.bias", Whole(found["up_bias"], delta.scale)
    elif any(piece.startswith("hada_") for piece in pieces):
        if pieces != {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}:
            raise wrong(f"has {sorted(found)}, not the four matrices of a LoHa")
        a, b = product("hada_w1_a", "hada_w1_b"), product("hada_w2_a", "hada_w2_b", 1.0)
        if a.shape != b.shape:
            raise wrong(f"has a LoHa of two shapes, {a.shape} and {b.shape}")
        yield weight, Joined(a, b, a.shape, torch.mul)
    elif any(piece.startswith("lokr_") for piece in pieces):
        sides: list[LowRank | Whole] = []
        for side in ("lokr_w1", "lokr_w2"):
            whole, factors = side in pieces, {f"{side}_a", f"{side}_b"} <= pieces
            if whole == factors or (whole and found[side].ndim < 2):
                raise wrong(f"has {sorted(found)}, not the two sides of a LoKr")
            sides.append(Whole(found[side]) if whole else product(f"{side}_a", f"{side}_b", 1.0))
        w1, w2 = sides
        shape = w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1], *w2.shape[2:]
        rank = next((one.down.shape[0] for one in (w2, w1) if isinstance(one, LowRank)), 0)
        factor = scale(rank) if rank or "alpha" not in found else 1.0  # LyCORIS ignores this one
        yield weight, Joined(w1, w2, shape, torch.kron, factor)
    for piece, leaf in WHOLE.items():
        if piece in found:
            alone = piece == "diff" and module.rpartition(".")[2] in WHOLE_PARAMETERS
            yield (module if alone else f"{module}.{leaf}"), Whole(found[piece])


def _adapter_scale(header: Header, spelled: Mapping[str, str], own: tuple[str, ...]) -> Scale:
    """alpha / rank as PEFT and diffusers write it into a file's metadata or next to it; 1 if they
    do not. The rank follows from the shapes; that of two whole matrices (0) is the stated `r`.

    Args:
        spelled: official module -> its spelling in the file and in PEFT's patterns.
        own: prefixes of this expert's keys, which are preferred in a file for both.

    Raises:
        MinicosError: the metadata are not understood.
    """
    about, where = _adapter_config(header)
    with reading(header.path, f"has {where} that cannot be understood", "Save it again."):
        keys = [key for key in about if key.startswith(own)] or [*about]
        about = {key.rpartition(".")[2]: about[key] for key in keys}
        if about.get("use_dora"):
            raise _unread(header.path, "DoRA", f"use_dora in {where}")
        if (start := str(about.get("init_lora_weights"))).lower().startswith(CHANGED):
            raise _unread(header.path, "LoRA on a changed model", f"{start:.40} in {where}")
        usual = about.get("lora_alpha", about.get("alpha"))  # the latter of LoHa and LoKr
        default = None if usual is None else _alpha(usual)
        whole = int(_alpha(about.get("r") or 1))
        patterns = {
            str(name).removeprefix("^").removesuffix("$").replace("\\.", "."): _alpha(value)
            for name, value in (about.get("alpha_pattern") or {}).items()
        }
        if any(set("*+?()[]|{}\\") & set(name) for name in patterns):
            raise ValueError("alpha_pattern is a regular expression")
        root = bool(about.get("use_rslora"))

    def scale(module: str, rank: int) -> float:
        rank = rank or whole
        names = f".{module}", f".{spelled[module]}"
        alpha = next(
            (v for k, v in patterns.items() if any(n.endswith(f".{k}") for n in names)), default
        )
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)

    return scale


def _alpha(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise ValueError(f"{str(value)[:40]!r} is not a rank or an alpha")
    return float(value)


def _adapter_config(header: Header) -> tuple[dict[str, Any], str]:
    """The adapter configuration in a LoRA's metadata or, by PEFT, in adapter_config.json next to
    it.
    """
    text, beside = header.metadata.get("lora_adapter_metadata"), header.path.parent / CONFIG
    if text is None and header.path.name.startswith("adapter_model.") and beside.exists():
        return read_table(beside), CONFIG
    with reading(header.path, "has adapter metadata that cannot be understood", "Save it again."):
        return table(text or "{}"), "adapter metadata"
