"""Open a model: find its files, plan where its weights go, and read them.

`minicos.load` opens a whole model, `load_dit` a diffusion transformer alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from minicos import attention, cost
from minicos.clip import CLIP, load_clip
from minicos.condition import frame_size
from minicos.config import Preset, VAEConfig
from minicos.device import check_compiler, open_device, operations, warn_of_slow_convolutions
from minicos.dit import FLOAT32, DiT
from minicos.errors import MinicosError
from minicos.ops import Ops
from minicos.plan import DoesNotFit, Dtype, Plan, available, choose, measure
from minicos.precision import undisturbed
from minicos.stream import Residency
from minicos.text import TextEncoder, Tokenizer
from minicos.tiles import check_side
from minicos.vae import VAE
from minicos.wan import Wan, residual_dtype
from minicos.weights import layouts
from minicos.weights.layouts import Layout, LoraFiles
from minicos.weights.load import check, load_into, stored_bytes
from minicos.weights.lora import Applied, Lora
from minicos.weights.lora import read as read_lora

N = TypeVar("N", bound=nn.Module)


@undisturbed()
def load(
    model: str | Path | Layout = "tiny",
    *,
    variant: str | None = None,
    preset: str | Preset | None = None,
    parts: Mapping[str, str | Path] | None = None,
    lora: LoraFiles | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    decode_dtype: torch.dtype = torch.float32,
    decode_tf32: bool | None = None,
    download: bool = False,
    residency: str = "auto",
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    tell: Callable[[Plan], object] = lambda plan: None,
    ops: Ops | None = None,
    compile: bool = False,
) -> Wan:
    """Open a model.

    Args:
        model: "tiny" (the model inside the package), a folder in the official or the diffusers
            layout, a single file, the id of a repository on the Hub (looked up in the local cache),
            or a result of `layouts.find`.
        variant: the model's name if shapes cannot identify it: "VBVR-Wan2.2", "Wan2.1-T2V-14B", ...
            (see `config.VARIANTS` and `config.FINETUNES`).
        preset: a way of sampling: a name in `config.PRESETS` (default: the first of the variant),
            "diffusers" (as the configuration of a diffusers folder says), or a `Preset`.
        parts: files that are stored elsewhere, by name: {"low": ..., "vae": ..., "text": ...,
            "tokenizer": ..., "clip": ...}.
        lora: expert -> LoRA files, each with an optional strength: {"high": ["a.safetensors"],
            "low": [("b.safetensors", 0.5)]}. A model with one network has only "high". LoRAs are
            merged in float32, in this order.
        device: default: a CUDA card if there is one, else the CPU.
        dtype: dtype of the matrices; default: bfloat16 on a card, float32 on the CPU and for
            "tiny". Parameters named in `dit.FLOAT32` stay in float32.
        decode_dtype: dtype of the VAE's decoder. bfloat16 halves its memory, and decoded puzzles
            then have a PSNR of 56 dB relative to float32. The encoder always runs in float32.
        decode_tf32: whether a float32 decoder uses TF32 convolutions, as the official code does;
            default: on a card. This is several times as fast. On the embedded model's puzzles,
            pixels have a PSNR of at least 84 dB relative to float32 (TF32 simulated on a CPU).
        download: fetch a repository that is not in the cache, after printing its size. Without it,
            nothing is downloaded.
        residency: where the weights are kept (see `plan`): "resident", "swap", "stream", "disk", or
            "auto", the first of these that fits.
        frames: number of frames of the largest video to reserve memory for; default: the preset's.
        size: its size, as (height, width) or as a first frame; default: the preset's.
        tile: decode frames in square tiles with this side in pixels, which saves memory and changes
            values slightly; None: whole frames.
        tell: called with the plan before weights are read: `lambda plan: print(describe(plan))`.
        ops: the operations of experts and analyses. Default: Triton kernels on a CUDA card if they
            work, else `ops.REFERENCE`, with the best attention backend for the card (see
            `attention`). Kernels have no gradients: pass REFERENCE to differentiate.
        compile: compile the experts' blocks, whatever their residency. The first step takes
            minutes, later ones are faster, and the last bits of results differ. Hooks keep working:
            blocks with hooks inside them run eagerly.

    Raises:
        MinicosError: something is missing, unknown, not finite or of another shape (the message
            names file and key); the files do not identify the variant; the device does not exist;
            the memory does not suffice; or nothing can be compiled. Problems that show in file
            headers are reported before any tensor is read.
    """
    if not isinstance(model, Layout):
        model = layouts.find(model, variant=variant, parts=parts, lora=lora, download=download)
    layout: Layout = model
    chosen = (preset if isinstance(preset, Preset) else layout.preset(preset)).changed()
    device = open_device(device)
    if compile:
        check_compiler(device)
    dtype = dtype or (
        torch.float32 if device.type == "cpu" or layout.variant == "tiny" else torch.bfloat16
    )
    for name, given in (("dtype", dtype), ("decode_dtype", decode_dtype)):
        if given not in (torch.float32, torch.bfloat16):
            raise MinicosError(
                f"{name} is torch.float32 or torch.bfloat16, not {given}: the official networks "
                "overflow in others"
            )
    check_side(tile, layout.vae.config.stride[1])
    bundle = operations(device) if ops is None else attention.with_best(ops, device)
    networks = _on_meta(layout, chosen, dtype, decode_dtype, bundle)
    for one in networks.streamed:
        check(one.network, one.files, part=one.name)
    tokenizer = Tokenizer.load(layout.tokenizer, layout.text.config.text_len)
    if tokenizer.vocabulary.get_vocab_size() > layout.text.config.vocab_size:
        raise MinicosError(
            f"{layout.tokenizer} has more tokens than {layout.text.files[0]} knows "
            f"({layout.text.config.vocab_size}). "
            "Give the two of one model: --part tokenizer=FILE or --part text=FILE."
        )
    warn_of_slow_convolutions(device)
    video = _video(chosen, layout.vae.config, frames, size)
    want = _Wish(networks, chosen, device, dtype, residency, video, tile)
    try:
        plan = want.plan()
    except DoesNotFit as error:
        tell(error.plan)
        raise MinicosError(f"{error} {want.remedy()}") from error
    tell(plan)
    home = Residency(plan)
    for one in networks.streamed:
        read = load_into(
            one.network,
            one.files,
            part=one.name,
            dtype=one.dtype,
            device=device,
            lora=one.loras,
            check_finite=True,
            place=home.allocate(one.name, one.network, one.dtype),
            label=f"load {one.name}",
        )
        home.loaded(one.network, read)
    clip = None
    if networks.clip is not None:  # small, and its files need conversion: it stays on the device
        cfg, narrow = networks.clip.network.cfg, networks.clip.dtype("")
        clip = load_clip(networks.clip.files, cfg, dtype=narrow, device=device)
    for expert in networks.experts if compile else ():
        expert.network.compile_blocks()
    return Wan(
        layout.variant,
        chosen,
        {one.name: one.network for one in networks.experts},
        networks.vae.network,
        networks.text.network,
        tokenizer,
        home,
        layout.fingerprint(),
        clip,
        tile,
        notes=layout.notes,
        decode_tf32=device.type == "cuda" if decode_tf32 is None else decode_tf32,
        loras=tuple(Applied.of(one.name, lora) for one in networks.experts for lora in one.loras),
    )


@undisturbed()
def load_dit(
    model: str | Path, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DiT:
    """Open a diffusion transformer alone: one file or folder with its weights, in any layout and of
    any size that has Wan's architecture.

    Useful to test its internals. For example, `model` can be a folder written by `save_pretrained`
    of diffusers, without VAE and text encoder.

    Raises:
        MinicosError: as for `load`.
    """
    with torch.device("meta"):
        dit = DiT(layouts.dit_config(model))
    load_into(dit, layouts.locate(model), dtype=dtype, device=device, check_finite=True)
    return dit


@dataclass(frozen=True)
class _Network(Generic[N]):
    """A network on the meta device, and the source of its weights."""

    name: str  # "high" | "low" | "vae" | "text" | "clip"
    network: N
    files: tuple[Path, ...]
    dtype: Dtype  # of each parameter
    loras: tuple[Lora, ...] = ()


@dataclass(frozen=True)
class _Parts:
    """The networks of a model before their weights are loaded."""

    experts: tuple[_Network[DiT], ...]
    vae: _Network[VAE]
    text: _Network[TextEncoder]
    clip: _Network[CLIP] | None

    @property
    def streamed(self) -> list[_Network[Any]]:
        """The networks that a plan places, in the order in which they are loaded."""
        return [*self.experts, self.vae, self.text]

    @property
    def all(self) -> list[_Network[Any]]:
        return self.streamed + ([] if self.clip is None else [self.clip])


def _on_meta(
    layout: Layout, preset: Preset, dtype: torch.dtype, decode_dtype: torch.dtype, ops: Ops
) -> _Parts:
    """The networks of a model on the meta device. Raises MinicosError if a LoRA does not fit."""

    def policy(name: str) -> torch.dtype:
        return torch.float32 if any(part in name for part in FLOAT32) else dtype

    # The official code runs CLIP in float16.
    narrow = torch.float32 if dtype == torch.float32 else torch.float16
    stream, skip = residual_dtype(preset, dtype), preset.time_skip
    with torch.device("meta"):
        experts = [
            _Network(name, DiT(part.config, ops, stream, skip), part.files, policy)
            for name, part in layout.experts.items()
        ]
        vae = _Network("vae", VAE(layout.vae.config), layout.vae.files, _decoder_in(decode_dtype))
        text = _Network(
            "text", TextEncoder(layout.text.config), layout.text.files, lambda name: dtype
        )
        clip = None
        if layout.clip is not None:
            clip = _Network(
                "clip", CLIP(layout.clip.config), layout.clip.files, lambda name: narrow
            )
    merged = (_with_loras(one, layout.experts[one.name].loras) for one in experts)
    return _Parts(tuple(merged), vae, text, clip)


def _with_loras(one: _Network[DiT], files: Sequence[tuple[Path, float]]) -> _Network[DiT]:
    shapes = {key: tuple(tensor.shape) for key, tensor in one.network.state_dict().items()}
    loras = (read_lora(path, strength, expert=one.name) for path, strength in files)
    return replace(one, loras=tuple(lora.fitted(shapes) for lora in loras))


def _video(
    preset: Preset, cfg: VAEConfig, frames: int | None, size: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Frames, height and width of the video to reserve memory for."""
    height, width = size or preset.size
    if preset.image != "none" and preset.area is not None:
        height, width = frame_size((height, width), preset.area, cfg.stride[1], rule=preset.resize)
    return frames or preset.frames, height, width


@dataclass(frozen=True)
class _Wish:
    """What a plan is made for: a model and the largest video."""

    parts: _Parts
    preset: Preset
    device: torch.device
    dtype: torch.dtype
    residency: str
    video: tuple[int, int, int]  # frames, height, width
    tile: int | None

    def plan(self) -> Plan:
        """The placement of every network; raises the errors of `plan.choose`."""
        parts, (frames, height, width) = self.parts, self.video
        cfg, vae = parts.experts[0].network.cfg, parts.vae
        t, sh, sw = vae.network.cfg.stride
        shape = (1, vae.network.cfg.z_dim, (frames - 1) // t + 1, height // sh, width // sw)
        work = cost.dit_memory(cfg, shape, self.dtype, residual_dtype(self.preset, self.dtype))
        decoded = min(self.tile or height, height), min(self.tile or width, width)
        decoding = cost.vae_memory(vae.network.cfg, *decoded, self.device, vae.dtype("decoder."))
        works = {"high": work, "low": work, "vae": decoding}
        sizes = []
        for one in parts.all:
            stored = stored_bytes(one.files, one.name)
            # bytes used in place, mapped from the file (CPU, without a cast)
            in_place = stored.get(one.dtype("blocks.0.ffn.0.weight"), 0)
            sizes.append(
                measure(
                    one.name,
                    one.network,
                    one.dtype,
                    work=works.get(one.name, 0),
                    mapped=in_place if self.device.type == "cpu" else 0,
                    stored=stored.total() if one in parts.experts else 0,
                )
            )
        return choose(
            self.residency,
            sizes,
            self.device,
            free=available(self.device),
            host=available(torch.device("cpu")),
            operations=len(self.preset.branches) * cost.flops(cfg, shape),
            dtype=self.dtype,
        )

    def remedy(self) -> str:
        """The smallest change that makes the model fit, as a sentence."""
        for words, wish in self.changed():
            with suppress(DoesNotFit):
                wish.plan()
                return f"It fits with {words}."
        return "No smaller video fits either: take a device, or a machine, with more memory."

    def changed(self) -> Iterator[tuple[str, "_Wish"]]:
        """Alternative wishes, the least costly to the user first."""
        narrow = replace(self.parts.vae, dtype=_decoder_in(torch.bfloat16))
        decoding = {
            "--tile 256": replace(self, tile=256),
            "--decode-dtype bfloat16": replace(self, parts=replace(self.parts, vae=narrow)),
        }
        if self.residency != "auto":
            yield "--residency auto", replace(self, residency="auto")
        yield from decoding.items()
        small = replace(decoding["--decode-dtype bfloat16"], tile=256, residency="auto")
        options = " and ".join(decoding)
        yield options, small
        stride, (frames, height, width) = self.parts.vae.network.cfg.stride, self.video
        for n in range(frames - stride[0], 0, -stride[0]):
            yield f"--frames {n}", replace(self, video=(n, height, width))
        step = stride[1] * self.parts.experts[0].network.cfg.patch_size[1]
        for share in range(9, 0, -1):
            h, w = (max(step, size * share // 10 // step * step) for size in (height, width))
            words = f"--height {h} --width {w}"
            yield words, replace(self, video=(frames, h, w))
            yield f"{words}, {options}", replace(small, video=(frames, h, w))


def _decoder_in(dtype: torch.dtype) -> Dtype:
    """The dtypes of a VAE with its decoder in this one; what conditions a model stays float32."""
    return lambda name: dtype if name.startswith("decoder.") else torch.float32
