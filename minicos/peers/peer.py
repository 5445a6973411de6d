"""`Peer`: a diffusers pipeline as a `Model`, and the interface of a family of pipelines.

The pipeline prepares (prepare.py), our loop denoises: a step calls the pipeline's transformer, with
hooks that exist for the duration of the call (foreign.py). So prompts, pictures, masks and
positions are those of diffusers, while the loop, resuming, lockstep runs and all studies are those
of `minicos`.

Everything is expressed as flow matching, x = (1 - sigma) x0 + sigma noise and velocity = noise -
x0, in latents b c f h w. A family translates: `received` and `arguments` between latents and a call
of the transformer, `velocities` from its output. It never repeats what its pipeline prepares.
"""

from abc import abstractmethod
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from minicos.condition import Condition, check_frames, fit, frame_size
from minicos.errors import MinicosError, warn
from minicos.hooks import Hooks
from minicos.media import Picture, as_image, to_uint8
from minicos.ops import REFERENCE, Ops
from minicos.peers.foreign import Places, hooked
from minicos.peers.prepare import Call, prepared
from minicos.peers.presets import PRESETS, PeerPreset, get_preset
from minicos.precision import undisturbed
from minicos.sample import VIDEO, Latents, Moment, classifier_free, draw_noise
from minicos.schedule import Schedule
from minicos.tiles import Tiles, check_side
from minicos.video_model import VideoModel
from minicos.wan import UNUSED_NEGATIVE

# Prompts -> arguments of a pipeline that replace `prompt`, such as prompt_embeds.
Embed = Callable[[list[str]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class PeerCondition(Condition):
    """The condition of a peer: for each branch with inputs of its own, the arguments with which the
    pipeline calls its transformer.
    """

    calls: Mapping[str, Call]  # "cond", and "uncond" if there is guidance

    def __repr__(self) -> str:
        call = self.calls["cond"].items()
        given = [f"{k} {tuple(x.shape)}" for k, x in call if isinstance(x, Tensor)]
        return (
            f"{type(self).__name__} for latents {tuple(self.shape)}, the first frame "
            f"{'an input' if self.first is None else 'imposed'}\n"
            f"  calls of the transformer: {' and '.join(self.calls)}\n  {', '.join(given)}"
        )

    def branch(self, name: str) -> Call:
        """The call of "cond" or "uncond". Raises MinicosError without a negative prompt."""
        if name not in self.calls:
            raise MinicosError(
                "guidance needs a negative prompt, and this condition has none: make it again "
                "under the preset that guides"
            )
        return self.calls[name]

    def take(self, index: Tensor | Sequence[int]) -> Self:
        index, count = torch.as_tensor(index), self.shape[0]

        def some(x: Any) -> Any:
            batched = isinstance(x, Tensor) and x.ndim and len(x) == count
            return x[index.to(x.device)] if batched else x

        calls = {name: {k: some(v) for k, v in call.items()} for name, call in self.calls.items()}
        return replace(super().take(index), calls=calls)


@dataclass(frozen=True, repr=False)
class Peer(VideoModel):
    """A family of pipelines overrides `places`, and whatever differs from the usual case: latents
    b c f h w, a picture concatenated to them along the channels, flow matching by Euler's method.

    Dimensions in a `Call` are the transformer's; everything else is b c f h w.
    """

    pipe: Any
    variant: str
    preset: Any  # a PeerPreset, or a subclass for the family
    weights: str = ""  # fingerprint of the files, which runs record
    embed: Embed | None = None  # replaces the pipeline's text encoders
    # Seed of random choices of the pipeline: CogVideoX samples the picture's latent.
    picture_seed: int = 0
    placement: str = "resident"  # where the weights are; diffusers moves them
    tile: int | None = None  # pixels of a side of what is decoded at a time; None: whole frames
    notes: tuple[str, ...] = ()
    experts: tuple[str, ...] = field(default=("high",), init=False)

    # The arguments of the transformer that change from step to step.
    moving: ClassVar[frozenset[str]] = frozenset({"hidden_states", "timestep"})
    layout: ClassVar[str] = "b c f h w"  # of the transformer's input and output

    # -- what a family defines, with defaults for the usual case -----------------------------------

    @abstractmethod
    def places(self, text: int) -> Places:
        """The hook points; `text` is the number of text rows that attend jointly with the video."""

    def shape(self, call: Call) -> tuple[int, int, int, int, int]:
        """b c f h w of the video's latents in a call."""
        b, _, f, h, w = self.ours(call["hidden_states"]).shape
        return b, self.pipe.transformer.config.out_channels, f, h, w

    def received(self, call: Call) -> Latents:
        """The latents in a call, in float32: the inverse of `arguments`."""
        return {VIDEO: self.ours(call["hidden_states"])[:, : self.shape(call)[1]].float()}

    def arguments(self, call: Call, latents: Latents, moment: Moment) -> Call:
        """The call with these latents and the noise level of this moment; by default they replace
        the first channels of the input.
        """
        beside = self.ours(call["hidden_states"])
        x = latents[VIDEO].to(beside.dtype)
        x = torch.cat([x, beside[:, x.shape[1] :]], dim=1)
        timestep = torch.full_like(call["timestep"], moment.timestep)
        return {**call, "hidden_states": self.theirs(x), "timestep": timestep}

    def velocities(self, answer: tuple[Tensor, ...], latents: Latents, moment: Moment) -> Latents:
        """The velocities in the transformer's output for such a call, float32."""
        return {VIDEO: self.ours(answer[0].float())}

    def silence(self, call: Call) -> tuple[Tensor, ...]:
        """Zeros in the shapes of the transformer's output for a call."""
        return (self.theirs(call["hidden_states"].new_zeros(self.shape(call))),)

    def schedule(self) -> Schedule:
        """Evenly spaced levels from 1, shifted as the preset says."""
        levels = torch.linspace(1, 0, self.preset.steps + 1, dtype=torch.float64)[:-1]
        return self.flow(levels, shift=self.preset.shift)

    def pixels(self, latent: Tensor) -> Tensor:
        """The decoded video of latents, without its `lead`: b 3 F H W in [-1, 1]."""
        vae = self.pipe.vae
        video = vae.decode((latent / vae.config.scaling_factor).to(vae.dtype)).sample
        return video[:, :, self.stride[0] * self.lead :].float()

    @property
    def stride(self) -> tuple[int, int, int]:
        side = self.pipe.vae_scale_factor_spatial
        return self.pipe.vae_scale_factor_temporal, side, side

    def given(self, guided: bool) -> dict[str, Any]:
        """The pipeline's own arguments for this preset, with its guidance or without."""
        return {"guidance_scale": self._strength if guided else 1.0}

    def parts(self, guided: bool) -> dict[str, Any]:
        """Attributes of the pipeline that are replaced while it prepares, and in `verify`."""
        return {}

    def imposes(self) -> bool:
        """Whether the first latent frame is fixed."""
        return False

    def unprompted(self, cond: Call, texts: list[str], pictures: Tensor) -> Call:
        """The call of the unprompted branch, from that of the prompted one and the negative
        prompts.
        """
        return self.prepared(texts, pictures)

    def start(self, noise: Tensor, call: Call) -> Tensor:
        """The initial latents of a run, from Gaussian noise."""
        return noise

    def skipped(self, branch: str) -> Container[str]:
        """The attentions, by the names of `places`, that a pass does not compute."""
        return ()

    def pictured(self, condition: PeerCondition) -> tuple[int, ...]:
        return (0,)

    @property
    def lead(self) -> int:
        """Latent frames at the front that are not shown: padding, or discarded after decoding."""
        return 0

    # -- as a `Model` ------------------------------------------------------------------------------

    def branches(self, expert: str, condition: PeerCondition) -> tuple[str, ...]:
        if "uncond" in self.preset.branches:
            condition.branch("uncond")  # raises if there is no negative prompt
        return self.preset.branches

    def velocity(
        self, latents: Latents, moment: Moment, branch: str, condition: PeerCondition, hooks: Hooks
    ) -> Latents:
        network, call = self.pipe.transformer, self.called(condition, branch)
        hooks = hooks.at(grid=self.grid(condition.shape))
        places = self.places(self.text_rows(call)) if hooks else Places()
        given = self.arguments(call, latents, moment)
        with hooked(network, places, hooks, skipped=self.skipped(branch)):
            answer = network(**{**given, "return_dict": False})
        found = self.velocities(answer, latents, moment)
        return {**found, VIDEO: hooks("velocity", found[VIDEO])}

    def called(self, condition: PeerCondition, branch: str) -> Call:
        """The call of a branch."""
        return condition.branch(branch)

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        return classifier_free(passes, self._strength)

    @property
    def _strength(self) -> float:
        return self.preset.guidance["high"]

    @property
    def points(self) -> Mapping[str, str]:
        return self.places(0).shapes | {"velocity": "b c f h w"}

    @property
    def depth(self) -> int:
        network = self.pipe.transformer
        return len(network.transformer_blocks) + len(
            getattr(network, "single_transformer_blocks", ())
        )

    @property
    def sublayers(self) -> tuple[str, ...]:
        names = ("self_attn", "cross_attn", "ffn")
        everywhere = range(self.depth)
        return tuple(s for s in names if all(f"blocks.{k}.{s}" in self.points for k in everywhere))

    @property
    def patch(self) -> tuple[int, int, int]:
        config = self.pipe.transformer.config
        return config.get("patch_size_t") or 1, config.patch_size, config.patch_size

    def grid(self, shape: Sequence[int]) -> tuple[int, int, int]:
        f, h, w = (size // patch for size, patch in zip(shape[2:], self.patch, strict=True))
        return f, h, w

    def frames_behind(self, frame: int) -> range:
        return super().frames_behind(frame - self.lead) if frame >= self.lead else range(0)

    def frames_behind_token(self, frame: int) -> range:
        patch = self.patch[0]
        behind = [self.frames_behind(frame * patch + i) for i in range(patch)]
        shown = [one for frames in behind for one in frames]
        return range(shown[0], shown[-1] + 1) if shown else range(0)

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(s for s in ("text", "joint", "audio") if f"blocks.0.{s}" in self.points)

    @undisturbed()
    def noise(self, condition: Condition, seed: int | Sequence[int]) -> Tensor:
        on_card = self.preset.noise_device == "cuda"
        source = self.device if on_card else torch.device("cpu")
        drawn = draw_noise(condition.shape, seed, source).to(self.device)
        return self.start(drawn, condition.branch("cond"))  # type: ignore[attr-defined]

    # -- called by commands ------------------------------------------------------------------------

    @property
    def presets(self) -> tuple[str, ...]:
        """The ways of sampling it by name, the default first."""
        return tuple(PRESETS[self.variant])

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipe._execution_device)

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.transformer.dtype

    @property
    def decode_dtype(self) -> torch.dtype:
        return self.pipe.vae.dtype

    @property
    def ops(self) -> Ops:
        """What studies compute with. Its network attends by torch's own function, which returns no
        log sum exp.
        """
        return replace(REFERENCE, self_attention=F.scaled_dot_product_attention)

    def with_preset(self, name: str | None = None, **changes: Any) -> Self:
        """The same pipeline under another preset, or with some of its fields changed."""
        chosen: PeerPreset = self.preset if name is None else get_preset(self.variant, name)
        chosen = chosen.changed(**changes)
        if chosen.noise_device == "cuda" and self.device.type != "cuda":
            raise MinicosError(f"noise on 'cuda' needs a card, and this model is on {self.device}")
        return replace(self, preset=chosen)

    def __repr__(self) -> str:
        p = self.preset
        return (
            f"{type(self).__name__}: {self.variant}, {self.depth} blocks, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.placement} on {self.device}\n"
            f"  preset: {p.solver}, {p.steps} steps, guidance {self._strength:g}\n"
            f"  videos: {p.frames} frames, {p.fps} per second, {p.size[1]}x{p.size[0]} pixels"
        )

    # -- from prompt and picture to a condition ----------------------------------------------------

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
    ) -> PeerCondition:
        """The condition of a video: one prompt or several, and a first frame for all or one for
        each.

        Args:
            prompt: as in `Wan.condition`.
            image: as in `Wan.condition`.
            negative: as in `Wan.condition`.
            frames: the preset's, since noise levels may depend on it; change it by `with_preset`.
            size: likewise.

        Raises:
            MinicosError: the model does not take one of these, or a picture has another shape.
        """
        several = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        prompts: list[str | None] = [*prompt] if several else [prompt]  # type: ignore[list-item, misc]
        p = self.preset
        p.check_inputs(self.variant, prompts, image is not None, last is not None)
        if (frames or p.frames, tuple(size or p.size)) != (p.frames, tuple(p.size)):
            raise MinicosError(
                f"this model is set to {p.frames} frames of {p.size[1]}x{p.size[0]} pixels: take "
                "with_preset(frames=..., size=...)"
            )
        if image is None:
            raise MinicosError(f"{self.variant} makes a video from a first frame: give an image")
        pictures = self._pictures(image, len(prompts))
        self.check()
        if negative is not None and not p.guided:
            warn(UNUSED_NEGATIVE)
        texts = [text or "" for text in prompts]
        cond = self.prepared(texts, pictures)
        calls = {"cond": cond}
        if p.guided:
            texts = [p.negative_prompt if negative is None else negative] * len(texts)
            calls["uncond"] = self.unprompted(cond, texts, pictures)
        first = self.received(cond)[VIDEO][:, :, :1] if self.imposes() else None
        return PeerCondition(shape=self.shape(cond), first=first, calls=calls)

    def check(self) -> None:
        """Raise MinicosError for frames and a size that the model cannot make."""
        check_frames(self.preset.frames, self.stride[0])
        check_side(self.tile, self.stride[1])

    def compressed(self, pictures: Tensor) -> Tensor:
        """First frames (b 3 h w in [0, 1]), prepared for the model before the resize."""
        return pictures

    def shown(self, pictures: Tensor) -> Any:
        """First frames (b 3 H W in [0, 1]) in the form that the pipeline takes."""
        return pictures

    def text_rows(self, call: Call) -> int:
        """The number of text rows that attend jointly with the video."""
        return call["encoder_hidden_states"].shape[1]

    def words(self, condition: PeerCondition, branch: str) -> int | None:
        """See `Model.words`. With joint attention, no token attends to later rows."""
        return self.text_rows(condition.branch(branch))

    def prepared(self, texts: list[str], pictures: Tensor, **more: Any) -> Call:
        """The arguments with which the pipeline calls its transformer for some prompts and
        pictures; `more` are further arguments of the pipeline.
        """
        given = {**self.asked(texts, pictures), **self.given(guided=False), **more}
        return prepared(self.pipe, self.silence, self.moving, given, self.parts(guided=False))

    def arguments_of_a_run(self, texts: list[str], pictures: Tensor) -> Call:
        """The arguments with which the pipeline itself makes a video under the preset."""
        given = {**self.asked(texts, pictures), **self.given(guided=True)}
        if self.preset.guided:
            negative = self._words([self.preset.negative_prompt] * len(texts))
            given |= {f"negative_{name}": value for name, value in negative.items()}
        return given

    def asked(self, texts: list[str], pictures: Tensor) -> dict[str, Any]:
        """The pipeline's arguments for a video of these prompts and pictures, without guidance."""
        # A generator for each sample, so that it is the same alone and in a batch.
        drawn = [torch.Generator().manual_seed(self.picture_seed) for _ in texts]
        p = self.preset
        return {
            **self._words(texts),
            "image": self.shown(pictures),
            "height": p.size[0],
            "width": p.size[1],
            "num_frames": p.frames,
            "num_inference_steps": max(2, p.steps),
            "generator": drawn,
            "output_type": "latent",
        }

    def _words(self, texts: list[str]) -> Mapping[str, Any]:
        return {"prompt": texts} if self.embed is None else self.embed(texts)

    def _pictures(self, image: Picture, count: int) -> Tensor:
        """First frames in the preset's size: b 3 H W in [0, 1], on the host."""
        given, size = as_image(image), tuple(self.preset.size)
        batch = (given if given.ndim == 4 else given[None]).cpu().float()
        h, w = batch.shape[-2:]
        height, width = self.fitting((h, w))
        if (height, width) != size:
            raise MinicosError(
                f"a picture of {w}x{h} pixels would be distorted to {size[1]}x{size[0]}: take "
                f"with_preset(size=({height}, {width})), or area=None to distort it"
            )
        batch = self.compressed(batch)
        if (h, w) != size:
            batch = fit(batch, size, self.preset.resize) / 2 + 0.5
        return batch.expand(count, -1, -1, -1)

    def fitting(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a video with a picture's aspect ratio and about the preset's area."""
        size: tuple[int, int] = tuple(self.preset.size)
        if self.preset.area is None or image_hw == size:
            return size
        return frame_size(image_hw, self.preset.area, self.stride[1], self.patch[1])

    def decode(self, latent: Tensor) -> np.ndarray:
        """Latents (b c f h w) -> uint8 (b F H W 3)."""
        side = self.stride[1]
        tiles = Tiles((latent.shape[-2], latent.shape[-1]), self.tile, side)
        with undisturbed():
            video = tiles(lambda x, _: self.pixels(x), latent.to(self.device), after=side)
        return np.stack([to_uint8(one) for one in video])

    def frames(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Decode one latent (c f h w): uint8 (frames H W 3)."""
        yield self.decode(latent[None])[0]

    # -- for families ------------------------------------------------------------------------------

    def ours(self, x: Tensor) -> Tensor:
        """The transformer's input or output as b c f h w."""
        return rearrange(x, f"{self.layout} -> b c f h w")

    def theirs(self, x: Tensor) -> Tensor:
        """Latents b c f h w in the transformer's layout."""
        return rearrange(x, f"b c f h w -> {self.layout}")

    def flow(
        self, sigmas: Tensor, *, mu: float | None = None, shift: float | None = None
    ) -> Schedule:
        """The schedule of a FlowMatchEulerDiscreteScheduler, whose step is Euler's.

        Args:
            sigmas: evenly spaced noise levels, float64.
            mu: log of the shift, for schedulers whose shift depends on the size.
            shift: for other schedulers, instead of their own.
        """
        scheduler = deepcopy(self.pipe.scheduler)
        kind, config = type(scheduler).__name__, scheduler.config
        odd = [k for k in ("stochastic_sampling", "invert_sigmas") if config.get(k)]
        if kind != "FlowMatchEulerDiscreteScheduler" or odd:
            raise MinicosError(
                f"{' with '.join([kind, *odd])} does not step by Euler's method: set pipe.scheduler"
                " to the FlowMatchEulerDiscreteScheduler of its repository"
            )
        if shift is not None:
            scheduler.set_shift(shift)
        scheduler.set_timesteps(sigmas=sigmas.tolist(), **({} if mu is None else {"mu": mu}))
        return Schedule(
            "euler", tuple(scheduler.timesteps.tolist()), tuple(scheduler.sigmas.tolist())
        )


def as_pil(pictures: Tensor) -> list[Image.Image]:
    """First frames (b 3 H W in [0, 1]) with 8 bits per colour."""
    levels = pictures.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in levels]


def numbers_of(x: Tensor) -> Iterator[int]:
    """A seed for each sample of some noise, derived from its bytes, so that what is drawn with it
    belongs to the sample, whatever its batch.
    """
    for row in x.detach().float().cpu():
        yield int.from_bytes(sha256(row.numpy().tobytes()).digest()[:7], "little")
