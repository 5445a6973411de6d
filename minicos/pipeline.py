"""`Wan`: a model ready to run: experts, VAE, text encoder and a preset, from one folder.

wan = minicos.load("tiny")
condition = wan.condition("solve the maze", image)
for step in wan.sample(condition, seed=0):
    watch(step.x0)
video = wan.decode(step.next)
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minicos import schedule
from minicos.condition import Condition, check_frames, frame_size, image_channels, resize
from minicos.config import VARIANTS, Preset
from minicos.config import preset as presets
from minicos.dit import FLOAT32, DiT, points
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS, Hooks
from minicos.media import to_uint8
from minicos.sample import Step, sample
from minicos.text import TextEncoder, Tokenizer, encode
from minicos.vae import VAE
from minicos.weights import layouts
from minicos.weights.load import load_into
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

    @cached_property
    def points(self) -> dict[str, str]:
        """Every hook point and its shape in letters."""
        return points(self.experts["high"].cfg)

    @property
    def device(self) -> torch.device:
        return next(self.experts["high"].parameters()).device

    @property
    def takes_image(self) -> bool:
        """Whether the first frame is given, by channel concatenation."""
        cfg = self.experts["high"].cfg
        return cfg.in_dim > cfg.out_dim

    def with_preset(self, name: str | None = None, **changes: object) -> "Wan":
        """The same networks under another preset, or with some of its fields changed: `with_preset(steps=10)`."""
        base = self.preset if name is None else presets(self.variant, name)
        return replace(self, preset=replace(base, **changes))

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

        image   (3 H W) or (b 3 H W) in [0, 1]; resized as the preset's size rule says
        frames  4n + 1, the preset's by default
        size    (height, width) in pixels for text-to-video; with an image, its aspect ratio decides
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
            image = (image if image.ndim == 4 else image[None]).to(self.device) * 2 - 1
            height, width = frame_size(tuple(image.shape[-2:]), self.preset.area, stride[1])
            y = image_channels(self.vae, resize(image, height, width), frames).expand(len(prompts), -1, -1, -1, -1)
        else:
            height, width = size or frame_size((480, 832), self.preset.area, stride[1])
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
            raise MinicosError(f"{len(seeds)} seeds for {count} samples")
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
        return np.stack([to_uint8(video) for video in self.vae.decode(latent.to(self.device), chunk=latent.shape[2])])

    def generate(self, prompt: str, image: Tensor | None = None, *, seed: int = 0, **options: object) -> np.ndarray:
        """One video, start to end: uint8 (F H W 3). `options` are those of `condition`."""
        (last,) = deque(self.sample(self.condition(prompt, image, **options), seed=seed), maxlen=1)
        return self.decode(last.next)[0]


EMBEDDED = Path(__file__).parent / "tiny" / "weights"


def load(
    model: str | Path = "tiny",
    *,
    preset: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Wan:
    """Open a model: "tiny", the one inside the package, or a folder in the official layout.

    device  a CUDA card if there is one, else the CPU
    dtype   of the matrices: bfloat16 on a card, float32 on the CPU by default; what `dit.FLOAT32` names stays in float32
    Raises MinicosError naming file and key when anything is missing, unknown or of another shape. Nothing is downloaded.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    layout = layouts.official(EMBEDDED if model == "tiny" else Path(model))
    variant = _variant(layout, model)
    chosen = presets(variant, preset)
    residual = getattr(torch, chosen.residual) if dtype != torch.float32 else torch.float32

    def policy(name: str) -> torch.dtype:
        return torch.float32 if any(part in name for part in FLOAT32) else dtype

    experts = {}
    for name, part in layout.experts.items():
        with torch.device("meta"):
            experts[name] = DiT(part.config, residual=residual)
        lora = () if part.lora is None else (read_lora(part.lora),)
        load_into(experts[name], part.files, dtype=policy, device=device, lora=lora)
    text_cfg, vae_cfg = layouts.text_config(layout.text), layouts.vae_config(layout.vae)
    with torch.device("meta"):
        vae, text = VAE(vae_cfg), TextEncoder(text_cfg)
    load_into(vae, layout.vae, dtype=torch.float32, device=device)
    load_into(text, layout.text, dtype=dtype, device=device)
    return Wan(variant, chosen, experts, vae, text, Tokenizer.load(layout.tokenizer, text_cfg.text_len))


def _variant(layout: layouts.Layout, model: str | Path) -> str:
    """The variant that the shapes and the number of experts name."""
    config, two = layout.experts["high"].config, len(layout.experts) > 1
    for name, known in VARIANTS.items():
        if known == config and (("2.2" in name) == two or name == "tiny"):
            return name
    raise MinicosError(
        f"{model}: no variant has width {config.dim}, {config.num_layers} layers and {config.in_dim} input channels."
    )
