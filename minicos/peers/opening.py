"""Open a diffusers folder of a peer: plan where its weights go, and let diffusers read them."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from minicos.config import Preset
from minicos.errors import MinicosError
from minicos.open import check_compiler, open_device
from minicos.peers.families import FAMILIES
from minicos.peers.folder import PeerFolder
from minicos.peers.peer import Peer
from minicos.plan import Part, Plan, available, choose

EXTRA = "the models of diffusers need the extra: `pip install 'minicos[peers]'`"
WORK = 10  # activations per token while a block runs, in units of the network's width, roughly


def diffusers() -> ModuleType:
    """The library. Raises MinicosError if it is not installed."""
    try:
        import diffusers
        import transformers  # noqa: F401  (its text encoders)
    except ImportError as error:
        raise MinicosError(f"{EXTRA} ({str(error).splitlines()[0]})") from error
    return diffusers


def open_peer(
    folder: PeerFolder,
    preset: Preset,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    residency: str = "auto",
    compile: bool = False,
    tell: Callable[[Plan], object] = lambda plan: None,
) -> Peer:
    """Open a peer under a preset.

    Only safetensors are read, no code of the repository is run, and nothing is downloaded.

    Args:
        dtype: dtype of all its networks; default: bfloat16 on a card, float32 on the CPU.
        residency: "resident"; "swap" and "stream" are diffusers' model and sequential offloading,
            which need accelerate; "auto" is the first that fits (see `plan`).
        compile: compile the transformer's repeated blocks.
        tell: called with the plan before weights are read.

    Raises:
        MinicosError: diffusers is missing or lacks the model, or memory does not suffice.
    """
    library = diffusers()
    kind = getattr(library, folder.pipeline, None)
    if kind is None:
        raise MinicosError(
            f"diffusers {library.__version__} has no {folder.pipeline}: `pip install -U diffusers`"
        )
    place = open_device(device)
    if compile:
        check_compiler(place)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    plan = _plan(folder, preset, place, dtype, residency)
    tell(plan)
    try:
        pipe = kind.from_pretrained(
            folder.path, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise MinicosError(f"{folder.path}: diffusers cannot open it ({reason})") from error
    _place(pipe, plan)
    if compile:
        pipe.transformer.compile_repeated_blocks()
    return FAMILIES[folder.pipeline](
        pipe, folder.variant, preset, folder.fingerprint(), placement=plan.residency
    )


def points(folder: PeerFolder) -> dict[str, str]:
    """Every hook point of a peer and its shape in letters; no weights are read."""
    library = diffusers()
    kind = getattr(library, str(folder.transformer.get("_class_name")), None)
    if kind is None:
        raise MinicosError(
            f"diffusers {library.__version__} has no {folder.transformer.get('_class_name')}: "
            "`pip install -U diffusers`"
        )
    with torch.device("meta"):
        network = kind.from_config(dict(folder.transformer))
    pipe = SimpleNamespace(transformer=network)
    return dict(FAMILIES[folder.pipeline](pipe, folder.variant, folder.preset()).points)


def _place(pipe: Any, plan: Plan) -> None:
    if plan.residency == "resident":
        pipe.to(plan.device)
        return
    if plan.device.type == "cpu":
        raise MinicosError("--residency swap and stream are for cards: leave it out")
    offload = {"swap": pipe.enable_model_cpu_offload, "stream": pipe.enable_sequential_cpu_offload}
    try:
        offload[plan.residency](device=plan.device)
    except ImportError as error:
        raise MinicosError(
            f"--residency {plan.residency} is diffusers' offloading, which needs accelerate: "
            "`pip install accelerate`"
        ) from error


def _plan(
    folder: PeerFolder, preset: Preset, device: torch.device, dtype: torch.dtype, residency: str
) -> Plan:
    """The placement of the weights. The memory of the VAE's decoder is unknown and not included."""
    t, sh, sw = STRIDES[folder.variant]
    height, width = preset.size
    tokens = ((preset.frames - 1) // t + 1) * math.ceil(height / sh) * math.ceil(width / sw)
    parts = []
    for name, counts in folder.elements().items():
        blocks = [n * dtype.itemsize for block, n in counts.items() if block]
        work = WORK * tokens * folder.width * dtype.itemsize if name == "high" else 0
        whole = sum(counts.values()) * dtype.itemsize
        parts.append(Part(name, whole, work, sum(blocks), max(blocks, default=0)))
    host, free = available(torch.device("cpu")), available(device)
    plan = choose(residency, parts, device, free=free, host=host, dtype=dtype)
    return _sequential(plan) if plan.residency == "stream" else plan


def _sequential(plan: Plan) -> Plan:
    """The plan if diffusers streams every network, including the text encoders."""
    parts = [replace(part, placement="stream") for part in plan.parts]
    return replace(plan, parts=tuple(parts))


# Video frames and pixels per token, for the plan's estimate.
STRIDES = {
    "CogVideoX1.5-5B-I2V": (8, 16, 16),
    "CogVideoX-5B-I2V": (4, 16, 16),
    "HunyuanVideo-I2V": (4, 16, 16),
    "HunyuanVideo-I2V-33ch": (4, 16, 16),
    "LTX-2": (8, 32, 32),
    "LTX-2.3": (8, 32, 32),
}
