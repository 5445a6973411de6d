"""`Wan`: a model ready to run: experts, VAE, text encoder and a preset.

wan = minicos.load("tiny")
condition = wan.condition("solve the maze", image)
for step in wan.sample(condition, seed=0):
    watch(step.x0)
video = wan.decode(step.next)
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicos import schedule
from minicos.condition import Condition, check_frames, frame_size, image_channels, resize
from minicos.config import Preset
from minicos.config import preset as presets
from minicos.dit import FLOAT32, DiT, points
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import to_uint8
from minicos.sample import Step, sample
from minicos.text import TextEncoder, Tokenizer, encode
from minicos.vae import VAE
from minicos.weights import layouts
from minicos.weights.layouts import Layout, LoraFiles
from minicos.weights.load import load_into
from minicos.weights.lora import Applied
from minicos.weights.lora import read as read_lora


@dataclass(frozen=True)
class Wan:
    """Networks and the way they are run. `with_preset` gives the same networks another way of sampling."""

    variant: str
    preset: Preset
    experts: dict[str, DiT]  # "high", and "low" where there are two
    vae: VAE
    text: TextEncoder
    tokenizer: Tokenizer
    weights: str = ""  # fingerprint of the files, LoRAs included, which runs remember
    loras: tuple[Applied, ...] = ()  # what was merged into the experts
    notes: tuple[str, ...] = ()  # what else the files could be

    @property
    def points(self) -> Mapping[str, str]:
        """Every hook point and its shape in letters."""
        return _points(self.experts["high"].cfg)

    @property
    def device(self) -> torch.device:
        return next(self.experts["high"].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices; what `dit.FLOAT32` names is float32."""
        return self.experts["high"].blocks[0].ffn[0].weight.dtype

    @property
    def takes_image(self) -> bool:
        """Whether the first frame is given, by channel concatenation."""
        cfg = self.experts["high"].cfg
        return cfg.in_dim > cfg.out_dim

    def with_preset(self, name: str | None = None, **changes: object) -> "Wan":
        """The same networks under another preset, or with some of its fields changed: `with_preset(steps=10)`."""
        chosen = replace(self.preset if name is None else presets(self.variant, name), **changes)
        if _residual(chosen, self.dtype) != self.experts["high"].blocks[0].residual:
            raise MinicosError(
                f"this preset keeps the residual stream in {chosen.residual}, and these networks do not: load them with it"
            )
        return replace(self, preset=chosen)

    def schedule(self) -> schedule.Schedule:
        return schedule.make(self.preset.solver, self.preset.steps, self.preset.shift)

    def expert(self, timestep: float) -> tuple[str, DiT]:
        """The expert that serves a timestep, with its name."""
        name = schedule.expert(timestep, self.preset.boundary if len(self.experts) > 1 else None)
        return name, self.experts[name]

    @torch.no_grad()
    def condition(
        self, prompt: str | list[str], image: Tensor | None = None, *, negative: str | None = None, frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Condition:  # fmt: skip
        """What to make: one prompt or several, and for image-to-video a first frame for each.

        image   (3 H W) or (b 3 H W) in [0, 1], one for all prompts or one for each; resized as the preset's size rule says
        frames  4n + 1, the preset's by default
        size    (height, width) in pixels for text-to-video, (480, 832) by default; with an image, its aspect ratio decides
        Raises MinicosError for an empty prompt, a missing or needless image, sizes or frame counts that do not divide.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(p.strip() for p in prompts):
            raise MinicosError("the prompt is empty; say what should happen, e.g. --prompt 'solve the maze'")
        frames = self.preset.frames if frames is None else frames
        stride = self.vae.cfg.stride
        check_frames(frames, stride[0])
        if self.takes_image and image is None:
            raise MinicosError(f"{self.variant} makes a video from a first frame: give an image")
        if image is not None and not self.takes_image:
            raise MinicosError(f"{self.variant} makes a video from text alone and takes no image")
        y = None
        if image is not None:
            if size is not None:
                raise MinicosError("with an image, its aspect ratio decides the size: change the preset's area instead")
            image = _checked(image, len(prompts)).cpu().float() * 2 - 1
            height, width = frame_size(tuple(image.shape[-2:]), self.preset.area, stride[1])
            image = resize(image, height, width).to(self.device)  # resized on the host, as the official code does
            y = image_channels(self.vae, image, frames).expand(len(prompts), -1, -1, -1, -1)
        else:
            height, width = size or (480, 832)
            if height % (2 * stride[1]) or width % (2 * stride[2]):
                raise MinicosError(f"a size of {height}x{width}: both sides must be multiples of {2 * stride[1]}")
        shape = (
            len(prompts),
            self.vae.cfg.z_dim,
            (frames - 1) // stride[0] + 1,
            height // stride[1],
            width // stride[2],
        )
        guided = any(g != 1 for g in self.preset.guidance.values())
        negative = self.preset.negative_prompt if negative is None else negative
        return Condition(
            text=encode(self.text, self.tokenizer, prompts),
            text_null=encode(self.text, self.tokenizer, [negative] * len(prompts)) if guided else None,
            shape=shape,
            y=y,
        )

    def noise(self, condition: Condition, seed: int | list[int]) -> Tensor:
        """Gaussian noise of the latents' shape, one seed for each sample (a number n means n, n + 1, ...); the same on every machine."""
        count = condition.shape[0]
        seeds = range(seed, seed + count) if isinstance(seed, int) else seed
        if len(seeds) != count:
            raise MinicosError(f"{len(seeds)} seeds for {count} samples: give one for each")
        if not all(0 <= s < 2**63 for s in seeds):
            raise MinicosError(f"seed {seed}: take a number from 0 to 2^63 - 1")
        each = [torch.randn(condition.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(each).to(self.device)

    def sample(
        self, condition: Condition, *, seed: int | list[int] = 0, noise: Tensor | None = None, hooks: Hooks = NO_HOOKS, start: int = 0,
        memory: object = None,
    ) -> Iterator[Step]:  # fmt: skip
        """The denoising loop under this preset; see `minicos.sample`. `noise` overrides `seed`."""
        noise = self.noise(condition, seed) if noise is None else noise
        return sample(
            self,
            noise,
            condition,
            schedule=self.schedule(),
            guidance=self.preset.guidance,
            hooks=hooks,
            start=start,
            memory=memory,
        )

    @torch.no_grad()
    def frames(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Decode one latent (c f h w) piece by piece: uint8 (frames H W 3), so that a long video never stands in memory whole."""
        for part in self.vae.stream(latent[None].to(self.device)):
            yield to_uint8(part[0])

    @torch.no_grad()
    def decode(self, latent: Tensor) -> np.ndarray:
        """Latents (b c f h w) -> uint8 (b F H W 3)."""
        pieces = [np.stack([to_uint8(video) for video in part]) for part in self.vae.stream(latent.to(self.device))]
        return np.concatenate(pieces, axis=1)

    def generate(
        self, prompt: str, image: Tensor | None = None, *, seed: int = 0, negative: str | None = None, frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:  # fmt: skip
        """One video, start to end: uint8 (F H W 3). Arguments are those of `condition`."""
        condition = self.condition(prompt, image, negative=negative, frames=frames, size=size)
        (last,) = deque(self.sample(condition, seed=seed), maxlen=1)
        return self.decode(last.next)[0]


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
    download: bool = False,
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
    download  fetch a repository that is not in the cache, after telling its size; without it, nothing is ever downloaded
    Raises MinicosError naming file and key when anything is missing, unknown, of another shape or not finite, when the files
    do not tell which variant they are, and for a device that is not there. What headers tell is refused before anything is read.
    """
    layout = (
        model
        if isinstance(model, Layout)
        else layouts.find(model, variant=variant, parts=parts, lora=lora, download=download)
    )
    chosen = presets(layout.variant, preset)
    device = _device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" or layout.variant == "tiny" else torch.bfloat16)
    if dtype not in (torch.float32, torch.bfloat16):
        raise MinicosError(
            f"dtype is torch.float32 or torch.bfloat16, not {dtype}: the official networks overflow in others"
        )
    tokenizer = Tokenizer.load(layout.tokenizer, layout.text.config.text_len)
    if tokenizer.vocabulary.get_vocab_size() > layout.text.config.vocab_size:
        raise MinicosError(
            f"{layout.tokenizer} has more tokens than {layout.text.files[0]} knows ({layout.text.config.vocab_size}). "
            "Give the two of one model: --part tokenizer=FILE or --part text=FILE."
        )
    with torch.device("meta"):
        experts = {name: DiT(part.config, residual=_residual(chosen, dtype)) for name, part in layout.experts.items()}
        vae, text = VAE(layout.vae.config), TextEncoder(layout.text.config)
    loras = {name: [read_lora(*one) for one in part.loras] for name, part in layout.experts.items()}
    for name, network in experts.items():
        shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
        for one in loras[name]:
            one.check(shapes)

    def policy(name: str) -> torch.dtype:
        return torch.float32 if any(part in name for part in FLOAT32) else dtype

    for name, network in experts.items():
        files = layout.experts[name].files
        load_into(network, files, dtype=policy, device=device, lora=loras[name], check_finite=True)
    load_into(vae, layout.vae.files, dtype=torch.float32, device=device, check_finite=True)
    load_into(text, layout.text.files, dtype=dtype, device=device, check_finite=True)
    applied = tuple(Applied.of(name, one) for name in experts for one in loras[name])
    return Wan(
        layout.variant, chosen, experts, vae, text, tokenizer, layout.fingerprint(), loras=applied, notes=layout.notes
    )


def _device(name: str | torch.device | None) -> torch.device:
    """The device, tried out: a name that torch knows need not be a device that is there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MinicosError(
            f"this machine or this PyTorch has no device {str(name)!r}: take another, or none"
        ) from error
    return device


def _residual(preset: Preset, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream: the preset's choice counts where matrices are narrow."""
    return torch.float32 if dtype == torch.float32 else getattr(torch, preset.residual)


def _checked(image: Tensor, count: int) -> Tensor:
    """The first frames as a batch (1 or count, 3 H W)."""
    batch = image if image.ndim == 4 else image[None]
    if batch.ndim != 4 or batch.shape[1] != 3 or len(batch) not in (1, count) or not image.is_floating_point():
        raise MinicosError(
            f"an image is float (3 h w) in [0, 1], one for all prompts or one for each, not {image.dtype} {tuple(image.shape)}"
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):
        raise MinicosError(f"the image's values are {low:.3g} to {high:.3g}: scale them to 0..1")
    return batch
