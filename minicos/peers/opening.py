"""Open a diffusers folder of a peer: plan where its weights go, and let diffusers read them."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from minicos.config import Preset
from minicos.device import check_compiler, open_device
from minicos.errors import MinicosError
from minicos.peers.decoding import peak
from minicos.peers.families import FAMILIES
from minicos.peers.folder import PeerFolder
from minicos.peers.peer import Peer
from minicos.plan import Part, Plan, available, choose
from minicos.weights.files import read_table

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
    tile: int | None = None,
    tell: Callable[[Plan], object] = lambda plan: None,
) -> Peer:
    """Open a peer under a preset.

    Only safetensors are read, no code of the repository is run, and nothing is downloaded.

    Args:
        dtype: dtype of all its networks; default: bfloat16 on a card, float32 on the CPU.
        residency: "resident"; "swap" and "stream" are diffusers' model and sequential offloading,
            which need accelerate; "auto" is the first that fits (see `plan`).
        compile: compile the transformer's repeated blocks.
        tile: decode frames in tiles of so many pixels a side.
        tell: called with the plan before weights are read.

    Raises:
        MinicosError: diffusers is missing or lacks the model, or memory does not suffice.
    """
    kind = _known(folder.pipeline)
    place = open_device(device)
    if compile:
        check_compiler(place)
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    plan = _plan(folder, preset, place, dtype, residency, tile)
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
        pipe, folder.variant, preset, folder.fingerprint(), placement=plan.residency, tile=tile
    )


def points(folder: PeerFolder) -> dict[str, str]:
    """Every hook point of a peer and its shape in letters; no weights are read."""
    kind = _known(folder.transformer.get("_class_name"))
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
    folder: PeerFolder,
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    residency: str,
    tile: int | None,
) -> Plan:
    """The placement of the weights."""
    t, sh, sw = folder.token
    height, width = preset.size
    tokens = ((preset.frames - 1) // t + 1) * math.ceil(height / sh) * math.ceil(width / sw)
    work = {"high": WORK * tokens * folder.width, "vae": _decoding(folder, preset, tile)}
    parts = []
    for name, counts in folder.elements().items():
        blocks = [n * dtype.itemsize for block, n in counts.items() if block]
        whole, extra = (n * dtype.itemsize for n in (sum(counts.values()), work.get(name, 0)))
        parts.append(Part(name, whole, extra, sum(blocks), max(blocks, default=0)))
    host, free = available(torch.device("cpu")), available(device)
    plan = choose(residency, parts, device, free=free, host=host, dtype=dtype)
    if plan.residency == "resident" and plan.host:  # diffusers offloads every network or none
        plan = choose("swap", parts, device, free=free, host=host, dtype=dtype)
    return _sequential(plan) if plan.residency == "stream" else plan


def _decoding(folder: PeerFolder, preset: Preset, tile: int | None) -> int:
    """How many numbers the VAE holds, at most, while it decodes a video: those of the video and of
    one tile.
    """
    config = read_table(folder.path / "vae" / "config.json")
    kind = _known(config.get("_class_name"))
    (t, sh, sw), (height, width) = folder.stride, preset.size
    whole = 3 * preset.frames * height * width
    if tile is not None:
        height, width = min(height, tile), min(width, tile)
    with torch.device("meta"):
        vae = kind.from_config(config)
        shape = ((preset.frames - 1) // t + 1, math.ceil(height / sh), math.ceil(width / sw))
        latent = torch.empty(1, vae.config.latent_channels, *shape)
        held = peak(vae, latent)
    return held // latent.element_size() + (0 if tile is None else 2 * whole)


def _known(name: object) -> Any:
    """A class of diffusers. Raises MinicosError where the one that is installed has it not."""
    library = diffusers()
    kind = getattr(library, str(name), None)
    if kind is None:
        raise MinicosError(
            f"diffusers {library.__version__} has no {name}: `pip install -U diffusers`"
        )
    return kind


def _sequential(plan: Plan) -> Plan:
    """The plan if diffusers streams every network, including the text encoders."""
    parts = [replace(part, placement="stream") for part in plan.parts]
    return replace(plan, parts=tuple(parts))
