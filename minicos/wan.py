"""`Wan`: a model that is ready to run: experts, VAE, text encoder and a preset.

```python
wan = minicos.load("tiny")
condition = wan.condition("solve the maze", image)
for step in wan.sample(condition, seed=0):
    watch(step.x0)
video = wan.decode(step.next)
```
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicos import schedule
from minicos.checks import check_latent
from minicos.clip import CLIP
from minicos.condition import (
    Condition,
    WanCondition,
    check_frames,
    check_size,
    crop_like,
    fit,
    frame_size,
    image_channels,
)
from minicos.config import LIKE, PRESETS, DiTConfig, Preset, get_preset
from minicos.dit import DiT
from minicos.errors import MinicosError, warn
from minicos.hooks import Hooks
from minicos.media import Picture, as_image, to_uint8
from minicos.ops import REFERENCE, Ops
from minicos.points import points
from minicos.precision import tf32_convolutions, undisturbed
from minicos.sample import VIDEO, Latents, Moment, classifier_free, draw_noise
from minicos.stream import Residency
from minicos.text import TextEncoder, Tokenizer, encode
from minicos.vae import VAE
from minicos.video_model import VideoModel
from minicos.weights.lora import Applied


@dataclass(frozen=True, repr=False)
class Wan(VideoModel):
    """The networks of a model and a way to sample from them. `with_preset` returns the same
    networks with another way of sampling.
    """

    variant: str
    preset: Preset
    experts: dict[str, DiT]  # "high", and "low" if there are two
    vae: VAE
    text: TextEncoder
    tokenizer: Tokenizer
    residency: Residency  # where the networks are; call `residency.to_device` before using one
    weights: str = ""  # fingerprint of the files and LoRAs, which runs record
    clip: CLIP | None = None  # image encoder of Wan2.1's image-to-video models
    tile: int | None = None  # side in pixels of the tiles for decoding; None: whole frames
    loras: tuple[Applied, ...] = ()  # the LoRAs merged into the experts
    notes: tuple[str, ...] = ()  # on the files, such as the other models that they could be
    decode_tf32: bool = False  # convolutions of the decoder in TF32 (10 bits of mantissa)

    @property
    def cfg(self) -> DiTConfig:
        """The configuration of the diffusion transformer, which the experts share."""
        return self.experts["high"].cfg

    @property
    def device(self) -> torch.device:
        """The device of the networks."""
        return self.residency.plan.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices; parameters named in `dit.FLOAT32` are float32."""
        return self.experts["high"].dtype

    @property
    def presets(self) -> tuple[str, ...]:
        """The names of the presets, the default first."""
        return tuple(PRESETS[self.variant.removeprefix(LIKE)])

    @property
    def placement(self) -> str:
        """The residency of the plan: where the weights are."""
        return self.residency.plan.residency

    @property
    def decode_dtype(self) -> torch.dtype:
        """The dtype in which the VAE decodes."""
        return self.vae.decoder.conv1.weight.dtype

    @property
    def ops(self) -> Ops:
        """The operations that the experts are built from; analyses use the same ones."""
        return self.experts["high"].ops

    def with_preset(self, name: str | None = None, **changes: Any) -> "Wan":
        """The same networks under another preset, or with some of its fields changed:
        `with_preset(steps=10)`.

        Raises:
            MinicosError: presets have no such field, or these networks or their device do not
                support the preset.
        """
        chosen = (self.preset if name is None else get_preset(self.variant, name)).changed(
            **changes
        )
        dit = self.experts["high"]
        if chosen.noise_device == "cuda" and self.device.type != "cuda":
            raise MinicosError(
                f"the official CUDA noise needs a CUDA card, and this model is on {self.device}"
            )
        if chosen.time_skip != dit.time_skip:
            raise MinicosError(
                f"this preset has time_skip {chosen.time_skip}, and these networks do not: load "
                "them with it"
            )
        if residual_dtype(chosen, self.dtype) != dit.residual_dtype:
            raise MinicosError(
                f"this preset keeps the residual stream in {chosen.residual_dtype}, and these "
                "networks do not:"
                " load them with it"
            )
        return replace(self, preset=chosen)

    def __getstate__(self) -> dict[str, Any]:
        """For copies, and for another process. Raises MinicosError unless weights are resident:
        others are views of one large tensor, which each of them would bring along.
        """
        if self.placement != "resident":
            raise MinicosError(
                f"a model whose weights are kept by residency {self.placement!r} is neither copied "
                "nor sent to another process: open it there, or fork after opening"
            )
        return vars(self)

    def __repr__(self) -> str:
        plan, cfg, p = self.residency.plan, self.cfg, self.preset
        guidance = ", ".join(f"{name} {p.guidance.get(name, 1)}" for name in self.experts)
        boundary = "" if len(self.experts) == 1 else f", boundary {p.boundary}"
        return (
            f"Wan: {self.variant}, {' and '.join(self.experts)} expert of {cfg.num_layers} blocks "
            f"of width {cfg.dim},"
            f" {str(self.dtype).removeprefix('torch.')}, {plan.residency} on {plan.device}\n"
            f"  preset: {p.solver}, {p.steps} steps, shift {p.shift:g}, guidance "
            f"{guidance}{boundary}\n"
            f"  videos: {p.frames} frames, {p.fps} per second; image: {p.image}"
        )

    # -- as a `Model` ------------------------------------------------------------------------------

    def schedule(self) -> schedule.Schedule:
        levels = schedule.make(self.preset.solver, self.preset.steps, self.preset.shift)
        dtype = self._loop_dtype
        return levels if dtype == torch.float32 else schedule.rounded(levels, dtype)

    def expert_name(self, timestep: float) -> str:
        boundary = self.preset.boundary if len(self.experts) > 1 else None
        return schedule.expert_name(timestep, boundary)

    def branches(self, expert: str, condition: WanCondition) -> tuple[str, ...]:
        if self._strength(expert) == 1:
            return ("cond",)
        condition.branch("uncond")  # raises if there is no negative prompt
        return "cond", "uncond"

    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: WanCondition, hooks: Hooks
    ) -> Latents:
        return {VIDEO: self.run_network(latents[VIDEO], moment, branch, condition, hooks)}

    def run_network(
        self,
        x: Tensor,
        moment: Moment,
        branch: str,
        condition: WanCondition,
        hooks: Hooks,
        stop_at_layer: int | None = None,
    ) -> Tensor:
        """The velocity of one pass, or the stream that enters a layer; see `DiT.forward`."""
        text, dit = condition.branch(branch), self.residency.to_device(self.experts[moment.expert])
        # 1 g, on the host, where the sinusoid is computed
        time = condition.per_frame(moment.timestep)[0, :, :, 0, 0].expand(len(x), -1)
        return dit(
            x, time, text, condition.y, condition.clip, hooks=hooks, stop_at_layer=stop_at_layer
        )

    def check_differentiable(self) -> None:
        if self.residency.plan.residency != "resident":
            raise MinicosError(
                "gradients need weights that stay in place until the backward pass: load the model"
                " with residency='resident'"
            )
        by_hand = replace(REFERENCE, attention=self.ops.attention)
        if replace(self.ops, self_attention=by_hand.self_attention) != by_hand:
            raise MinicosError(
                "gradients do not flow through the Triton kernels: load the model with"
                " ops=minicos.ops.REFERENCE"
            )

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        dtype, strength = self._loop_dtype, self._strength(moment.expert)
        narrow = {b: {k: v.to(dtype) for k, v in answer.items()} for b, answer in passes.items()}
        return {k: v.float() for k, v in classifier_free(narrow, strength).items()}

    @property
    def _loop_dtype(self) -> torch.dtype:
        return getattr(torch, self.preset.loop_dtype)

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

    def pictured(self, condition: WanCondition) -> tuple[int, ...]:
        if condition.y is None:
            return super().pictured(condition)
        # 1 in the mask's four channels: the first frame, perhaps the last
        return tuple(condition.y[0, :4].amax(dim=(0, 2, 3)).nonzero().flatten().tolist())

    def words(self, condition: WanCondition, branch: str) -> int | None:
        return int(condition.branch(branch)[0].any(-1).sum())

    def rows(self, condition: WanCondition, branch: str) -> int:
        return condition.branch(branch).shape[1]

    def noise(self, condition: Condition, seed: int | Sequence[int]) -> Tensor:
        """Gaussian noise in the shape of the latents, drawn on the preset's `noise_device`; see
        `sample.draw_noise`.
        """
        return draw_noise(
            condition.shape, seed, self.device if self.preset.noise_device == "cuda" else "cpu"
        ).to(self.device)

    # -- from prompt and image to a video ----------------------------------------------------------

    @undisturbed()
    def condition(
        self,
        prompt: str | Sequence[str | None] | None,
        image: Picture | None = None,
        *,
        last: Picture | None = None,
        negative: str | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> WanCondition:
        """The condition of a video: one prompt or several and, for image-to-video, a first frame
        for each.

        Warns about words that the tokenizer does not know, about the truncation of a long prompt,
        and about a negative prompt that has no effect at guidance 1.

        Args:
            prompt: text, or several texts; None for an unprompted control.
            image: a path, a PIL image, a uint8 array (H W 3), or a float tensor (3 H W) or (b 3 H
                W) in [0, 1]; one for all prompts or one for each. The preset's `resize` decides
                how it is resized.
            last: a last frame in the same forms, for models that take one; it is cropped around its
                centre to the aspect ratio of the first frame.
            negative: the negative prompt; by default the preset's.
            frames: number of video frames, 4n + 1; by default the preset's.
            size: (height, width) in pixels if there is no image, by default the preset's. With an
                image, its aspect ratio decides.

        Raises:
            MinicosError: the prompt is empty, an image is missing or not accepted, or a size or
                number of frames is not divisible as required.
        """
        prompts: list[str | None] = (
            [*prompt] if isinstance(prompt, Sequence) and not isinstance(prompt, str) else [prompt]
        )
        self.preset.check_inputs(self.variant, prompts, image is not None, last is not None)
        asked = self.preset.changed(
            negative_prompt=self.preset.negative_prompt if negative is None else negative,
            size=self.preset.size if size is None else size,
        )
        frames = self.preset.frames if frames is None else frames
        check_frames(frames, self.stride[0])
        ends = _batches([as_image(end) for end in (image, last) if end is not None], len(prompts))
        height, width = self._frame_size(ends, size)
        y, first, clip = self._images(ends, frames, (height, width), len(prompts))
        t, sh, sw = self.stride
        texts, guided = [text or "" for text in prompts], self.preset.guided
        if negative is not None and not guided:
            warn(UNUSED_NEGATIVE)
        usual = get_preset(self.variant).negative_prompt  # no warning for the published one
        negative = asked.negative_prompt
        self._warn_of_lost_words([*texts, negative] if guided and negative != usual else texts)
        encoder = self.residency.to_device(self.text)
        null = encode(encoder, self.tokenizer, [negative] * len(prompts)) if guided else None
        return WanCondition(
            text=encode(encoder, self.tokenizer, texts),
            text_null=null,
            shape=(
                len(prompts),
                self.vae.cfg.z_dim,
                int(frames - 1) // t + 1,
                height // sh,
                width // sw,
            ),
            y=y,
            first=first,
            clip=clip,
        )

    def _warn_of_lost_words(self, prompts: list[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            if words := dict.fromkeys(self.tokenizer.unknown_words(prompt)):
                warn(f"the model does not know the words {', '.join(words)}")
            if tail := self.tokenizer.cut_off(prompt):
                warn(
                    f"the prompt is longer than the {self.tokenizer.text_len} tokens that the "
                    "model reads:"
                    f" {tail[:200]!r} is cut off"
                )

    def _frame_size(self, ends: list[Tensor], size: tuple[int, int] | None) -> tuple[int, int]:
        """Height and width in pixels of the video."""
        (_, stride, _), (_, patch, _) = self.stride, self.cfg.patch_size
        if ends and size is not None:
            raise MinicosError(
                "with an image, its aspect ratio decides the size: change the preset's area instead"
            )
        if ends:
            height, width = ends[0].shape[-2:]
            return frame_size((height, width), self.preset.area, stride, patch, self.preset.resize)
        height, width = size or self.preset.size
        check_size(height, width, stride * patch)
        return height, width

    def _images(
        self, ends: list[Tensor], frames: int, size: tuple[int, int], b: int
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """y, first and clip of a condition, from a first frame or from a first and a last one, as
        the preset requires.
        """
        if not ends:
            return None, None, None
        y = first = clip = None
        fitted = [fit(end, size, self.preset.resize).to(self.device) for end in ends]
        vae = self.residency.to_device(self.vae)
        if self.preset.image == "imposed":
            first = vae.encode(fitted[0].unsqueeze(2)).expand(b, -1, -1, -1, -1)
        else:
            y = image_channels(vae, fitted[0], frames, *fitted[1:]).expand(b, -1, -1, -1, -1)
        if self.clip is not None:  # CLIP receives the image in its original size
            clip = torch.cat([self.clip(2 * end - 1) for end in ends], dim=1).expand(b, -1, -1)
        return y, first, clip

    def frames(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Decode one latent (c f h w) piece by piece: uint8 (frames H W 3). A long video is never
        in memory as a whole.
        """
        batch = latent[None] if isinstance(latent, Tensor) else latent  # refused by name
        return (to_uint8(part[0]) for part in self._pixels(batch))

    def decode(self, latent: Tensor) -> np.ndarray:
        """Decode latents (b c f h w) to uint8 videos (b F H W 3)."""
        pieces = [np.stack([to_uint8(video) for video in part]) for part in self._pixels(latent)]
        return np.concatenate(pieces, axis=1)

    def _pixels(self, latent: Tensor) -> Iterator[Tensor]:
        """The pieces of `VAE.stream` on the device. Another network may take the VAE's place on the
        device between two of them. Raises MinicosError if the latent cannot be decoded.
        """
        check_latent(latent, self.vae.cfg.z_dim)
        with undisturbed():
            pieces = self.residency.to_device(self.vae).stream(
                latent.to(self.device), tile=self.tile
            )
        while True:
            with undisturbed(), tf32_convolutions(self.decode_tf32):
                self.residency.to_device(self.vae)
                part = next(pieces, None)
            if part is None:
                return
            yield part


UNUSED_NEGATIVE = (
    "the negative prompt is not used: guidance is 1, so there is no second pass that it could steer"
)
_points = cache(points)  # shared by all presets of a model


def residual_dtype(preset: Preset, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream: the preset's if the matrices are narrower than float32."""
    return torch.float32 if dtype == torch.float32 else getattr(torch, preset.residual_dtype)


def as_wan(model: VideoModel, what: str) -> Wan:
    """The model, for `what` needs more of it than a `VideoModel` has. Raises MinicosError for one
    that diffusers runs.
    """
    if not isinstance(model, Wan):
        raise MinicosError(f"{what} is for Wan, and {model.variant} is run by diffusers")
    return model


def _batches(ends: list[Tensor], count: int) -> list[Tensor]:
    """First and last frames as batches of equal length, 1 or count, with the last ones cropped to
    the shape of the first.
    """
    ends = [_checked(end, count) for end in ends]
    ends[1:] = [crop_like(end, ends[0]) for end in ends[1:]]
    if len({len(end) for end in ends}) > 1:  # one is shared by all prompts, the other is not
        ends = [end.expand(count, -1, -1, -1) for end in ends]
    return ends


def _checked(image: Tensor, count: int) -> Tensor:
    """The first frames as a batch (1 or count, 3 H W), validated."""
    if image.requires_grad:
        raise MinicosError("gradients do not flow from a run to its first frame: detach the image")
    batch = image if image.ndim == 4 else image[None]
    if (
        batch.ndim != 4
        or batch.shape[1] != 3
        or len(batch) not in (1, count)
        or not image.is_floating_point()
        or not image.numel()
    ):
        raise MinicosError(
            "an image is float (3 h w) in [0, 1], one for all prompts or one for each, not "
            f"{image.dtype} {tuple(image.shape)}"
        )
    low, high = image.min().item(), image.max().item()
    if not (low >= 0 and high <= 1):
        raise MinicosError(f"the image's values are {low:.3g} to {high:.3g}: scale them to 0..1")
    return batch
