"""`Wan`: a model ready to run: experts, VAE, text encoder and a preset.

wan = minicos.load("tiny")
condition = wan.condition("solve the maze", image)
for step in wan.sample(condition, seed=0):
    watch(step.x0)
video = wan.decode(step.next)
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from minicos import attention, cost, schedule
from minicos.clip import CLIP, load_clip
from minicos.condition import WanCondition, check_frames, crop_like, fit, frame_size, image_channels
from minicos.config import DiTConfig, Preset, VAEConfig
from minicos.config import preset as presets
from minicos.dit import FLOAT32, DiT, points
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.media import to_uint8
from minicos.ops import REFERENCE, Ops, without_tf32
from minicos.plan import Plan, available, choose, measure
from minicos.sample import VIDEO, Latents, Model, Moment, classifier_free, draw_noise
from minicos.stream import Residency
from minicos.text import TextEncoder, Tokenizer, encode
from minicos.vae import VAE
from minicos.weights import layouts
from minicos.weights.layouts import Layout, LoraFiles
from minicos.weights.load import load_into, stored
from minicos.weights.lora import Applied, Lora
from minicos.weights.lora import read as read_lora


@dataclass(frozen=True)
class Wan(Model[WanCondition]):
    """Networks and the way they are run. `with_preset` gives the same networks another way of sampling."""

    variant: str
    preset: Preset
    experts: dict[str, DiT]  # "high", and "low" where there are two
    vae: VAE
    text: TextEncoder
    tokenizer: Tokenizer
    residency: Residency  # where the networks are: take one for use through `residency.to_device`
    weights: str = ""  # fingerprint of the files, LoRAs included, which runs remember
    clip: CLIP | None = None  # where the network looks at the image through it (Wan2.1)
    tile: int | None = (
        None  # side in pixels of the tiles in which frames are decoded (`tiles`); None: whole
    )
    loras: tuple[Applied, ...] = ()  # what was merged into the experts
    notes: tuple[str, ...] = ()  # what else the files could be

    @property
    def cfg(self) -> DiTConfig:
        """Of the diffusion transformer; experts share it."""
        return self.experts["high"].cfg

    @property
    def device(self) -> torch.device:
        return self.residency.plan.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; what `dit.FLOAT32` names is float32."""
        return self.experts["high"].blocks[0].ffn[0].weight.dtype

    @property
    def decode_dtype(self) -> torch.dtype:
        """In which the VAE decodes."""
        return self.vae.decoder.conv1.weight.dtype

    @property
    def ops(self) -> Ops:
        """The operations that the experts are built from; analyses compute with the same."""
        return self.experts["high"].blocks[0].ops

    @property
    def takes_image(self) -> bool:
        """Whether a first frame can be given."""
        return self.preset.image != "none"

    @property
    def needs_image(self) -> bool:
        """Whether a first frame must be given: TI2V also makes a video from text alone."""
        return self.preset.image not in ("none", "imposed")

    def with_preset(self, name: str | None = None, **changes: object) -> "Wan":
        """The same networks under another preset, or with some of its fields changed: `with_preset(steps=10)`.

        Raises MinicosError for a preset that these networks, or the device that they are on, cannot serve.
        """
        chosen = replace(self.preset if name is None else presets(self.variant, name), **changes)
        if chosen.noise_device not in ("cpu", "cuda"):
            raise MinicosError(f"noise is drawn on 'cpu' or 'cuda', not on {chosen.noise_device!r}")
        if chosen.noise_device == "cuda" and self.device.type != "cuda":
            raise MinicosError(
                f"the official CUDA noise needs a CUDA card, and this model is on {self.device}"
            )
        if chosen.time_skip != self.experts["high"].time_skip:
            raise MinicosError(
                f"this preset has time_skip {chosen.time_skip}, and these networks do not: load them with it"
            )
        if _residual(chosen, self.dtype) != self.experts["high"].blocks[0].residual:
            raise MinicosError(
                f"this preset keeps the residual stream in {chosen.residual}, and these networks do not: load them with it"
            )
        return replace(self, preset=chosen)

    # -- as a `Model` --------------------------------------------------------------------------------------------------

    def schedule(self) -> schedule.Schedule:
        return schedule.make(self.preset.solver, self.preset.steps, self.preset.shift)

    def expert_name(self, timestep: float) -> str:
        boundary = self.preset.boundary if len(self.experts) > 1 else None
        return schedule.expert_name(timestep, boundary)

    def branches(self, expert: str, condition: WanCondition) -> tuple[str, ...]:
        if self._strength(expert) == 1:
            return ("cond",)
        condition.branch("uncond")  # raises where there is no negative prompt
        return "cond", "uncond"

    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: WanCondition, hooks: Hooks
    ) -> Latents:
        x, text = latents[VIDEO], condition.branch(branch)
        dit = self.residency.to_device(self.experts[moment.expert])
        time = condition.per_frame(moment.timestep)[
            0, :, :, 0, 0
        ]  # 1 g, on the host, where the sinusoid is built
        time = time.expand(len(x), -1)
        return {VIDEO: dit(x, time, text, condition.y, condition.clip, hooks=hooks)}

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        return classifier_free(passes, self._strength(moment.expert))

    def _strength(self, expert: str) -> float:
        if expert not in self.preset.guidance:
            raise MinicosError(
                f"this run needs guidance for {expert}; it was given {self.preset.guidance}"
            )
        return self.preset.guidance[expert]

    @property
    def points(self) -> Mapping[str, str]:
        return _points(self.cfg)

    @property
    def depth(self) -> int:
        return self.cfg.num_layers

    @property
    def sublayers(self) -> tuple[str, ...]:
        return "self_attn", "cross_attn", "ffn"

    @property
    def stride(self) -> tuple[int, int, int]:
        return self.vae.cfg.stride

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        f, h, w = (
            size // patch for size, patch in zip(shape[2:], self.cfg.patch_size, strict=True)
        )
        return f, h, w

    def noise(self, condition: WanCondition, seed: int | Sequence[int]) -> Tensor:
        """Gaussian noise of the latents' shape, drawn on the preset's `noise_device`; see `sample.draw_noise`."""
        source = self.device if self.preset.noise_device == "cuda" else torch.device("cpu")
        return draw_noise(condition.shape, seed, source).to(self.device)

    # -- from prompt and image to a video ------------------------------------------------------------------------------

    @torch.no_grad()
    @without_tf32()
    def condition(
        self,
        prompt: str | list[str],
        image: Tensor | None = None,
        *,
        last: Tensor | None = None,
        negative: str | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> WanCondition:
        """What to make: one prompt or several, and for image-to-video a first frame for each.

        image   (3 H W) or (b 3 H W) in [0, 1], one for all prompts or one for each; made to fit as the preset's `resize` says
        last    a last frame, likewise, for models that lead from one to the other; its middle is cut to the shape of the first
        frames  4n + 1, the preset's by default
        size    (height, width) in pixels where there is no image, the preset's by default; with an image, its aspect ratio decides
        Raises MinicosError for an empty prompt, a missing or needless image, sizes or frame counts that do not divide.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(p.strip() for p in prompts):
            raise MinicosError(
                "the prompt is empty; say what should happen, e.g. --prompt 'solve the maze'"
            )
        frames = self.preset.frames if frames is None else frames
        stride, patch = self.vae.cfg.stride, self.cfg.patch_size
        check_frames(frames, stride[0])
        if self.needs_image and image is None:
            raise MinicosError(f"{self.variant} makes a video from a first frame: give an image")
        if image is not None and not self.takes_image:
            raise MinicosError(f"{self.variant} makes a video from text alone and takes no image")
        if (last is not None) != (self.preset.image == "first and last"):
            what = "needs a last frame, too: give one" if last is None else "takes no last frame"
            raise MinicosError(f"{self.variant} {what}")
        y = first = clip = None
        if image is not None:
            if size is not None:
                raise MinicosError(
                    "with an image, its aspect ratio decides the size: change the preset's area instead"
                )
            ends, rule = (
                [_checked(end, len(prompts)) for end in (image, last) if end is not None],
                self.preset.resize,
            )
            ends[1:] = [crop_like(end, ends[0]) for end in ends[1:]]
            if len({len(end) for end in ends}) > 1:  # one frame for all prompts, and one for each
                ends = [end.expand(len(prompts), -1, -1, -1) for end in ends]
            height, width = frame_size(
                tuple(ends[0].shape[-2:]), self.preset.area, stride[1], patch[1], rule
            )
            fitted = [fit(end, (height, width), rule).to(self.device) for end in ends]
            vae = self.residency.to_device(self.vae)
            if self.preset.image == "imposed":
                first = vae.encode(fitted[0].unsqueeze(2)).expand(len(prompts), -1, -1, -1, -1)
            else:
                y = image_channels(vae, fitted[0], frames, *fitted[1:]).expand(
                    len(prompts), -1, -1, -1, -1
                )
            if self.clip is not None:  # sees the image in its own size
                clip = torch.cat([self.clip(2 * end - 1) for end in ends], dim=1).expand(
                    len(prompts), -1, -1
                )
        else:
            height, width = size or self.preset.size
            step = stride[1] * patch[1]
            if height % step or width % step:
                raise MinicosError(
                    f"a size of {height}x{width}: both sides must be multiples of {step}"
                )
        shape = (
            len(prompts),
            self.vae.cfg.z_dim,
            (frames - 1) // stride[0] + 1,
            height // stride[1],
            width // stride[2],
        )
        guided = any(g != 1 for g in self.preset.guidance.values())
        negative = self.preset.negative_prompt if negative is None else negative
        encoder = self.residency.to_device(self.text)
        return WanCondition(
            text=encode(encoder, self.tokenizer, prompts),
            text_null=encode(encoder, self.tokenizer, [negative] * len(prompts))
            if guided
            else None,
            shape=shape,
            y=y,
            first=first,
            clip=clip,
        )

    @torch.no_grad()
    def frames(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Decode one latent (c f h w) piece by piece: uint8 (frames H W 3), so that a long video never stands in memory whole."""
        for part in self._pixels(latent[None]):
            yield to_uint8(part[0])

    @torch.no_grad()
    def decode(self, latent: Tensor) -> np.ndarray:
        """Latents (b c f h w) -> uint8 (b F H W 3)."""
        pieces = [np.stack([to_uint8(video) for video in part]) for part in self._pixels(latent)]
        return np.concatenate(pieces, axis=1)

    def _pixels(self, latent: Tensor) -> Iterator[Tensor]:
        """The pieces of `VAE.stream`, on the device. Between two of them another network may have taken the VAE's place."""
        with without_tf32():
            pieces = self.residency.to_device(self.vae).stream(
                latent.to(self.device), tile=self.tile
            )
        while True:
            self.residency.to_device(self.vae)
            with without_tf32():
                part = next(pieces, None)
            if part is None:
                return
            yield part

    def generate(
        self,
        prompt: str,
        image: Tensor | None = None,
        *,
        last: Tensor | None = None,
        seed: int = 0,
        negative: str | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """One video, start to end: uint8 (F H W 3). Arguments are those of `condition`."""
        condition = self.condition(
            prompt, image, last=last, negative=negative, frames=frames, size=size
        )
        (step,) = deque(self.sample(condition, seed=seed), maxlen=1)
        return self.decode(step.next)[0]


_points = cache(points)  # all presets of a model share them


def load(
    model: str | Path | Layout = "tiny",
    *,
    variant: str | None = None,
    preset: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    lora: LoraFiles | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    decode_dtype: torch.dtype = torch.float32,
    download: bool = False,
    residency: str = "auto",
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    tile: int | None = None,
    tell: Callable[[Plan], object] = lambda plan: None,
    ops: Ops = REFERENCE,
    compile: bool = False,
) -> Wan:
    """Open a model.

    model     "tiny" (the one inside the package), a folder in the official or the diffusers layout, a single file, or the id
              of a repository on the Hub, which is looked for in the local cache; or what `layouts.find` made of these
    variant   its name where shapes cannot tell it: "VBVR-Wan2.2", "Wan2.1-T2V-14B", ... (`config.VARIANTS`, `config.FINETUNES`)
    preset    a way of sampling it, by default the first of `config.PRESETS`
    parts     files that lie elsewhere, by name: {"low": ..., "vae": ..., "text": ..., "tokenizer": ..., "clip": ...}
    lora      expert -> LoRA files, each with a strength if you like: {"high": ["a.safetensors"], "low": [("b.safetensors", 0.5)]};
              a model of one network has only "high". They are merged in float32, in this order
    device    a CUDA card if there is one, else the CPU
    dtype     of the matrices: bfloat16 on a card, float32 on the CPU and for "tiny" by default; what `dit.FLOAT32` names stays in float32
    decode_dtype  of the VAE's decoder: bfloat16 halves its memory; puzzles decoded so are at 56 dB PSNR of float32. Encoding is in float32
    download  fetch a repository that is not in the cache, after telling its size; without it, nothing is ever downloaded
    residency     where the weights live (see `plan`): "resident", "swap", "stream", or "auto", the first of these that fits
    frames, size  of the largest video to make room for; the preset's by default. `size` is (height, width) or that of the first frame
    tile          decode frames in tiles of so many pixels a side, which takes less memory and changes values a little; None: whole
    tell          is called with the plan before any weight is read: `lambda plan: print(describe(plan))`
    ops           what the experts and analyses compute with: `REFERENCE.with_kernels()` takes the Triton kernels, which need a CUDA card;
              attention by the backend that suits the card (see `attention`)
    compile   compile the experts' blocks, wherever their weights live: the first step takes minutes, later ones less time, and
              last bits differ. Hooks fire all the same: a block that is watched inside runs eagerly
    Raises MinicosError naming file and key when anything is missing, unknown, of another shape or not finite, when the files
    do not tell which variant they are, for a device that is not there, where memory does not suffice, and where nothing can be
    compiled. What headers tell is refused before anything is read.
    """
    layout = model
    if not isinstance(model, Layout):
        layout = layouts.find(model, variant=variant, parts=parts, lora=lora, download=download)
    chosen = presets(layout.variant, preset)
    device = open_device(device)
    if compile:
        check_compiler(device)
    dtype = dtype or (
        torch.float32 if device.type == "cpu" or layout.variant == "tiny" else torch.bfloat16
    )
    for name, given in (("dtype", dtype), ("decode_dtype", decode_dtype)):
        if given not in (torch.float32, torch.bfloat16):
            raise MinicosError(
                f"{name} is torch.float32 or torch.bfloat16, not {given}: the official networks overflow in others"
            )
    tokenizer = Tokenizer.load(layout.tokenizer, layout.text.config.text_len)
    if tokenizer.vocabulary.get_vocab_size() > layout.text.config.vocab_size:
        raise MinicosError(
            f"{layout.tokenizer} has more tokens than {layout.text.files[0]} knows ({layout.text.config.vocab_size}). "
            "Give the two of one model: --part tokenizer=FILE or --part text=FILE."
        )
    networks = _networks(layout, chosen, dtype, decode_dtype, attention.with_best(ops, device))
    plan = _plan(
        networks,
        chosen,
        device,
        dtype,
        residency,
        _video(chosen, layout.vae.config, frames, size),
        tile,
    )
    tell(plan)
    home, clip = Residency(plan), None
    for one in networks:
        if one.name == "clip":  # small, and its files need a hand: it stays on the device
            clip = load_clip(one.files, layout.clip.config, dtype=one.dtype(""), device=device)
            continue
        load_into(
            one.network,
            one.files,
            dtype=one.dtype,
            device=device,
            lora=one.loras,
            check_finite=True,
            place=home.allocate(one.name, one.network, one.dtype),
            label=f"load {one.name}",
        )
    filled = {one.name: one.network for one in networks}
    for name in layout.experts if compile else ():
        filled[name].compile_blocks()
    return Wan(
        layout.variant,
        chosen,
        {name: filled[name] for name in layout.experts},
        filled["vae"],
        filled["text"],
        tokenizer,
        home,
        layout.fingerprint(),
        clip,
        tile,
        notes=layout.notes,
        loras=tuple(Applied.of(one.name, lora) for one in networks for lora in one.loras),
    )


@dataclass(frozen=True)
class _Network:
    """A network on the meta device, and what will fill it."""

    name: str  # "high" | "low" | "vae" | "text" | "clip"
    network: nn.Module
    files: tuple[Path, ...]
    dtype: Callable[[str], torch.dtype]  # of each parameter
    loras: tuple[Lora, ...] = ()


def _networks(
    layout: Layout, preset: Preset, dtype: torch.dtype, decode_dtype: torch.dtype, ops: Ops
) -> list[_Network]:
    """The networks of a model in the order in which they are loaded. Raises MinicosError where a LoRA does not fit its expert."""

    def policy(name: str) -> torch.dtype:
        return torch.float32 if any(part in name for part in FLOAT32) else dtype

    def vae_policy(name: str) -> torch.dtype:
        return decode_dtype if name.startswith("decoder.") else torch.float32

    narrow = (
        torch.float32 if dtype == torch.float32 else torch.float16
    )  # CLIP is run in float16, officially
    loras = {
        name: tuple(read_lora(*one) for one in part.loras) for name, part in layout.experts.items()
    }
    out = []
    with torch.device("meta"):
        for name, part in layout.experts.items():
            dit = DiT(
                part.config, ops, residual=_residual(preset, dtype), time_skip=preset.time_skip
            )
            out.append(_Network(name, dit, part.files, policy, loras[name]))
        out.append(_Network("vae", VAE(layout.vae.config), layout.vae.files, vae_policy))
        out.append(
            _Network("text", TextEncoder(layout.text.config), layout.text.files, lambda name: dtype)
        )
        if layout.clip is not None:
            out.append(
                _Network("clip", CLIP(layout.clip.config), layout.clip.files, lambda name: narrow)
            )
    for one in out:
        shapes = {key: tuple(tensor.shape) for key, tensor in one.network.state_dict().items()}
        for lora in one.loras:
            lora.check(shapes)
    return out


def _video(
    preset: Preset, cfg: VAEConfig, frames: int | None, size: tuple[int, int] | None
) -> tuple[int, int, int]:
    """Frames, height and width to make room for."""
    height, width = size or preset.size
    if preset.image != "none" and preset.area is not None:
        height, width = frame_size((height, width), preset.area, cfg.stride[1], rule=preset.resize)
    return frames or preset.frames, height, width


def _plan(
    networks: list[_Network],
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    residency: str,
    video: tuple[int, int, int],
    tile: int | None,
) -> Plan:
    """Which network goes where, for videos of this size: see `plan.choose`."""
    high, vae = networks[0].network, next(one for one in networks if one.name == "vae")
    (frames, height, width), cfg = video, vae.network.cfg
    stride = cfg.stride
    shape = (1, cfg.z_dim, (frames - 1) // stride[0] + 1, height // stride[1], width // stride[2])
    work = cost.dit_memory(high.cfg, shape, dtype, _residual(preset, dtype))
    decoded = min(tile or height, height), min(tile or width, width)
    works = {
        "high": work,
        "low": work,
        "vae": cost.vae_memory(cfg, *decoded, device, vae.dtype("decoder.")),
    }
    parts = []
    for one in networks:
        mapped = (
            stored(one.files).get(one.dtype("blocks.0.ffn.0.weight"), 0)
            if device.type == "cpu"
            else 0
        )
        parts.append(
            measure(one.name, one.network, one.dtype, work=works.get(one.name, 0), mapped=mapped)
        )
    passes = 1 if all(g == 1 for g in preset.guidance.values()) else 2
    return choose(
        residency,
        parts,
        device,
        free=available(device),
        host=available(torch.device("cpu")),
        operations=passes * cost.flops(high.cfg, shape),
        dtype=dtype,
    )


def open_device(name: str | torch.device | None) -> torch.device:
    """The device, tried out: a name that torch knows need not be a device that is there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MinicosError(
            f"this machine or this PyTorch has no device {str(name)!r}: take another, or none"
        ) from error
    return device


def check_compiler(device: torch.device) -> None:
    """Compile something small, now: torch looks for a compiler only when the first block runs."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, some of them from private modules
        reason = str(error).strip().splitlines()[0]
        raise MinicosError(
            f"torch.compile does not work here ({reason}). It needs a C++ compiler such as g++ or clang and, on a card, Triton;"
            " without it leave out --compile."
        ) from error


def _residual(preset: Preset, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream: the preset's choice counts where matrices are narrow."""
    return torch.float32 if dtype == torch.float32 else getattr(torch, preset.residual)


def _checked(image: Tensor, count: int) -> Tensor:
    """The first frames as a batch (1 or count, 3 H W)."""
    batch = image if image.ndim == 4 else image[None]
    if (
        batch.ndim != 4
        or batch.shape[1] != 3
        or len(batch) not in (1, count)
        or not image.is_floating_point()
    ):
        raise MinicosError(
            f"an image is float (3 h w) in [0, 1], one for all prompts or one for each, not {image.dtype} {tuple(image.shape)}"
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):
        raise MinicosError(f"the image's values are {low:.3g} to {high:.3g}: scale them to 0..1")
    return batch
