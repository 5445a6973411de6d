"""LoRA files: small changes to a network's weights, in the five spellings found in the wild, merged while loading.

A LoRA holds, for a weight W (out in), two thin matrices: W += strength * alpha / rank * up @ down, with up (out rank) and
down (rank in). Producers differ in prefix, in the names of the two, in the network's naming, and in whether an alpha is
stored (none means alpha = rank). Some also store whole differences of small parameters. Each file is read into one form,
a table from official parameter names to changes; a key that is not understood is an error, never skipped.

    DiffSynth   blocks.0.self_attn.q.lora_A.default.weight                    PEFT, diffusers   transformer.blocks.0.attn1.to_q.lora_A.weight
    ComfyUI     diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha         musubi   lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
    lightx2v    as ComfyUI without alpha, with .diff (weight), .diff_b (bias), .diff_m (modulation)
"""  # noqa: E501

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minicos.errors import MinicosError
from minicos.runs import replace_file
from minicos.weights.header import Header, read_header
from minicos.weights.names import LORA_KEY, lora_dialect, lora_module

FACTORS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}
WHOLE = {
    "diff": "weight",
    "diff_b": "bias",
    "diff_m": "modulation",
}  # key ending -> the parameter that it changes


@dataclass(frozen=True)
class LowRank:
    """The change scale * up @ down of a matrix: up (out rank), down (rank in)."""

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def add(self, tensor: Tensor, strength: float) -> Tensor:
        """tensor + strength * change, float32, with no matrix in between."""
        up, down = (factor.to(tensor.device).float() for factor in (self.up, self.down))
        return torch.addmm(tensor, up, down, alpha=strength * self.scale)


@dataclass(frozen=True)
class Whole:
    """A change stored as it is, of a parameter's own shape."""

    value: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def add(self, tensor: Tensor, strength: float) -> Tensor:
        """tensor + strength * change, float32."""
        return tensor.add(self.value.to(tensor.device).float(), alpha=strength)


Delta = LowRank | Whole


@dataclass(frozen=True)
class Lora:
    """Changes of official parameters, and how strongly they are applied."""

    path: Path
    dialect: str  # "diffsynth" | "lightx2v" | "comfy" | "peft" | "musubi"
    deltas: Mapping[str, Delta]  # official parameter name -> change
    strength: float = 1.0

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise MinicosError unless every change has a parameter of its shape in `shapes`."""
        for name, delta in self.deltas.items():
            if name not in shapes:
                raise MinicosError(
                    f"{self.path} changes {name}, which this network lacks. Is the LoRA for another variant?"
                )
            if tuple(shapes[name]) != tuple(delta.shape):
                raise MinicosError(
                    f"{self.path}: the change of {name} is {tuple(delta.shape)}, and the parameter {tuple(shapes[name])}. "
                    "Is the LoRA for another variant?"
                )

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor` (float32, the official parameter `name`) with its change added; the same tensor where there is none."""
        delta = self.deltas.get(name)
        return tensor if delta is None else delta.add(tensor, self.strength)


@dataclass(frozen=True)
class Applied:
    """The record of a LoRA that was merged."""

    expert: str
    file: str
    dialect: str
    ranks: tuple[
        int, ...
    ]  # of its thin matrices, each once; empty where there are only whole differences
    strength: float
    tensors: int  # parameters changed

    @classmethod
    def of(cls, expert: str, lora: Lora) -> "Applied":
        ranks = {
            delta.down.shape[0] for delta in lora.deltas.values() if isinstance(delta, LowRank)
        }
        return cls(
            expert,
            str(lora.path),
            lora.dialect,
            tuple(sorted(ranks)),
            lora.strength,
            len(lora.deltas),
        )

    def __str__(self) -> str:
        rank = f"rank {', '.join(map(str, self.ranks))}" if self.ranks else "whole differences"
        changes = (
            f"{self.tensors} tensors changed ({self.dialect}, {rank}, strength {self.strength:g})"
        )
        return f"{self.expert}: {Path(self.file).name}: {changes}"


def read(path: str | Path, strength: float = 1.0) -> Lora:
    """Read a LoRA file of any of the five dialects. Raises MinicosError naming the file and the key that does not fit."""
    header = read_header(path)
    try:
        with safe_open(header.path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in header.tensors}
    except (OSError, SafetensorError) as error:
        raise MinicosError(f"{path} cannot be read: {error}. Download it again.") from error
    parts: dict[str, dict[str, Tensor]] = defaultdict(
        dict
    )  # official module -> down, up, alpha, diff ...
    for key, tensor in tensors.items():
        match = LORA_KEY.fullmatch(key)
        module = match and lora_module(match[1])
        if not module:
            raise MinicosError(
                f"{path}: the key {key!r} is of no known LoRA dialect. Convert the file, e.g. with DiffSynth."
            )
        part = FACTORS.get(match[2]) or match[3] or match[4]
        if part in parts[module]:
            raise MinicosError(
                f"{path}: the key {key!r} stands for a change that is already there. Remove one of them."
            )
        parts[module][part] = tensor
    dialect = lora_dialect(header.tensors)
    if dialect is None:
        raise MinicosError(
            f"{path} holds no LoRA: it has no lora_A, lora_down or diff. `minicos inspect {path}` says more."
        )
    return Lora(header.path, dialect, dict(_deltas(parts, header)), strength)


def save(path: str | Path, deltas: Mapping[str, Delta], dtype: torch.dtype = torch.float32) -> None:
    """Write changes in the dialect of DiffSynth (whole differences as lightx2v spells them), in one step.

    `deltas`: official parameter name -> LowRank or Whole. A scale other than 1 goes into `up`.
    """
    tensors = {}
    for name, delta in deltas.items():
        module, _, leaf = name.rpartition(".")
        if isinstance(delta, LowRank):
            tensors[f"{module}.lora_A.default.weight"] = delta.down
            tensors[f"{module}.lora_B.default.weight"] = delta.scale * delta.up.float()
        else:
            ending = next(ending for ending, parameter in WHOLE.items() if parameter == leaf)
            tensors[f"{module}.{ending}"] = delta.value
    tensors = {k: t.detach().to("cpu", dtype, copy=True).contiguous() for k, t in tensors.items()}
    replace_file(Path(path), lambda temporary: save_file(tensors, temporary))


def _deltas(
    parts: Mapping[str, Mapping[str, Tensor]], header: Header
) -> Iterable[tuple[str, Delta]]:
    adapter_scale = _adapter_scale(header)
    for module, found in parts.items():
        if set(found) & {"up", "down", "alpha"}:
            if not {"up", "down"} <= set(found) or "diff" in found:
                raise MinicosError(
                    f"{header.path}: {module} has {sorted(found)}, not one up and one down. Get the whole file."
                )
            up, down = found["up"], found["down"]
            if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
                shapes = f"up {tuple(up.shape)} and down {tuple(down.shape)}"
                raise MinicosError(
                    f"{header.path}: {module} has {shapes}: their ranks differ. Get the file again."
                )
            if "alpha" in found and found["alpha"].numel() != 1:
                raise MinicosError(
                    f"{header.path}: the alpha of {module} is not one number. Get the file again."
                )
            scale = found["alpha"].item() / up.shape[1] if "alpha" in found else adapter_scale
            yield f"{module}.weight", LowRank(up, down, scale)
        for ending, leaf in WHOLE.items():
            if ending in found:
                yield f"{module}.{leaf}", Whole(found[ending])


def _adapter_scale(header: Header) -> float:
    """alpha / rank as diffusers writes it into a file's metadata; 1 where it does not. Raises MinicosError on variants."""
    try:
        about = json.loads(header.metadata.get("lora_adapter_metadata", "{}"))
        about = {key.rpartition(".")[2]: value for key, value in about.items()}
        variants = [
            k for k in ("alpha_pattern", "rank_pattern", "use_rslora", "use_dora") if about.get(k)
        ]
        scale = about["lora_alpha"] / about["r"] if "lora_alpha" in about else 1.0
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise MinicosError(
            f"{header.path}: its adapter metadata cannot be understood ({error!r}). Save it again."
        ) from error
    if variants:
        raise MinicosError(
            f"{header.path} uses {', '.join(variants)}, which minicos does not know. Save it without."
        )
    return float(scale)
