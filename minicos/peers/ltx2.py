"""LTX-2 and LTX-2.3, image-to-video with sound: 48 blocks with a video and an audio stream.

Tokens are latent pixels. The first latent frame is the picture's at every step, and its tokens have
timestep 0. The sound is denoised along with the video; in every block, video and sound attend to
each other. Its latent starts from its own noise, and an edit of the video latent leaves it
unchanged: information can bypass noise that is put into the video alone.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from minicos.peers.foreign import Attends, Places, Spot
from minicos.peers.peer import Peer, PeerCondition, numbers_of
from minicos.peers.prepare import Call
from minicos.sample import VIDEO, Latents, Moment
from minicos.schedule import Schedule

AUDIO = "audio"
VIDEO_SIDE = {
    "self_attn": "attn1",
    "cross_attn": "attn2",
    "from_audio": "audio_to_video_attn",
    "ffn": "ff",
}
AUDIO_SIDE = {
    "self_attn": "audio_attn1",
    "cross_attn": "audio_attn2",
    "from_video": "video_to_audio_attn",
    "ffn": "audio_ff",
}


@dataclass(frozen=True, repr=False)
class LTX2(Peer):
    """The LTX-2 family; its preset is a `LTX2Preset`."""

    moving: ClassVar[frozenset[str]] = frozenset(
        {"hidden_states", "audio_hidden_states", "timestep", "audio_timestep", "sigma"}
    )

    def shape(self, call: Call) -> tuple[int, int, int, int, int]:
        b, _, c = call["hidden_states"].shape
        return b, c, call["num_frames"], call["height"], call["width"]

    def received(self, call: Call) -> Latents:
        video = _unpacked(call["hidden_states"].float(), self.shape(call))
        return {VIDEO: video, AUDIO: call["audio_hidden_states"].float()}

    def arguments(self, call: Call, latents: Latents, moment: Moment) -> Call:
        x, dtype = latents[VIDEO], call["hidden_states"].dtype
        b, _, f, h, w = x.shape
        time = torch.full((b,), moment.timestep, device=x.device)
        each = time[:, None].repeat(1, f * h * w)
        each[:, : h * w] = 0  # the tokens of the picture
        return {
            **call,
            "hidden_states": rearrange(x, "b c f h w -> b (f h w) c").to(dtype),
            AUDIO_HIDDEN: latents[AUDIO].to(dtype),
            "timestep": each,
            "audio_timestep": time,
            "sigma": time,
        }

    def velocities(self, answer: tuple[Tensor, ...], latents: Latents, moment: Moment) -> Latents:
        video, audio = answer
        return {VIDEO: _unpacked(video.float(), latents[VIDEO].shape), AUDIO: audio.float()}

    def silence(self, call: Call) -> tuple[Tensor, ...]:
        return torch.zeros_like(call["hidden_states"]), torch.zeros_like(call[AUDIO_HIDDEN])

    def schedule(self) -> Schedule:
        config, p = self.pipe.scheduler.config, self.preset
        (t, sh, sw), (height, width) = self.stride, p.size
        tokens = ((p.frames - 1) // t + 1) * (height // sh) * (width // sw)
        least, most = config.base_image_seq_len, config.max_image_seq_len
        slope = (config.max_shift - config.base_shift) / (most - least)
        by_size = tokens * slope + config.base_shift - slope * least  # not clamped, as in diffusers
        mu = by_size if p.by_size else float(np.log(p.shift))
        return self.flow(torch.linspace(1, 1 / p.steps, p.steps, dtype=torch.float64), mu=mu)

    # -- guidance ----------------------------------------------------------------------------------

    def branches(self, expert: str, condition: PeerCondition) -> tuple[str, ...]:
        perturbed = self.pipe.transformer.config.perturbed_attn  # else "stg" is "cond"
        names = super().branches(expert, condition)
        return tuple(name for name in names if name != "stg" or perturbed)

    def called(self, condition: PeerCondition, branch: str) -> Call:
        if branch == "stg":
            blocks = list(self.preset.stg_blocks)
            return {**condition.branch("cond"), "spatio_temporal_guidance_blocks": blocks}
        if branch == "modality":
            return {**condition.branch("cond"), "isolate_modalities": True}
        return condition.branch(branch)

    def skipped(self, branch: str) -> Container[str]:
        crossing = {f"blocks.{k}.from_audio" for k in range(self.depth)}
        alone = {f"blocks.{k}.self_attn" for k in self.preset.stg_blocks}
        return {"modality": crossing, "stg": alone}.get(branch, ())

    def guide(self, passes: Mapping[str, Latents], latents: Latents, moment: Moment) -> Latents:
        """cond + (g - 1) (cond - uncond) + stg (cond - stg) + (modality - 1) (cond - modality),
        then partial rescaling (pipeline_ltx2_image2video.py).
        """
        p, found = self.preset, {}
        for name, cond in passes["cond"].items():
            weights = {
                "uncond": self._strengths[name] - 1,
                "stg": p.stg,
                "modality": p.modality - 1,
            }
            v = cond
            for branch, weight in weights.items():
                if branch in passes:
                    v = v + weight * (cond - passes[branch][name])
            found[name] = _rescaled(latents[name], v, cond, moment.sigma, p.rescale)
        return found

    @property
    def _strengths(self) -> dict[str, float]:
        audio = self.preset.audio_guidance
        return {VIDEO: self._strength, AUDIO: self._strength if audio is None else audio}

    def given(self, guided: bool) -> dict[str, Any]:
        p = self.preset
        terms = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
        terms |= {"guidance_rescale": 0.0}
        if guided:
            values = self._strength, p.stg, p.modality, p.rescale
            terms = dict(zip(terms, values, strict=True))
        sound = {f"audio_{name}": value for name, value in terms.items()}
        if guided:
            sound["audio_guidance_scale"] = self._strengths[AUDIO]
        blocks = {"spatio_temporal_guidance_blocks": list(p.stg_blocks)} if guided else {}
        return {**terms, **sound, **blocks, "frame_rate": float(p.fps), "image_crf": 0}

    # -- picture, sound and video ------------------------------------------------------------------

    def imposes(self) -> bool:
        return True

    def beside(self, noise: Tensor, condition: PeerCondition) -> Latents:
        """The sound's noise, derived from the video's, so that one seed determines both."""
        _, *rest = condition.branch("cond")[AUDIO_HIDDEN].shape
        each = [torch.Generator().manual_seed(seed) for seed in numbers_of(noise)]
        return {AUDIO: torch.stack([torch.randn(rest, generator=g) for g in each]).to(noise)}

    def compressed(self, pictures: Tensor) -> Tensor:
        """The frames after H.264 compression with `image_crf`, on which the model was trained."""
        if not self.preset.image_crf:
            return pictures
        from diffusers.pipelines.ltx2.utils import apply_image_conditioning_crf

        levels = pictures.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        done = [apply_image_conditioning_crf(one, self.preset.image_crf) for one in levels]
        return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).float() / 255

    def pixels(self, latent: Tensor) -> Tensor:
        vae = self.pipe.vae
        scale = vae.config.scaling_factor
        x = self.pipe._denormalize_latents(latent, vae.latents_mean, vae.latents_std, scale)
        time = torch.zeros(len(x)).to(x) if vae.config.timestep_conditioning else None
        return vae.decode(x.to(vae.dtype), time, return_dict=False)[0].float()

    def text_rows(self, call: Call) -> int:
        return 0  # video and text do not attend jointly

    def words(self, condition: PeerCondition, branch: str) -> int | None:
        return condition.branch(branch)["encoder_hidden_states"].shape[1]

    @property
    def stride(self) -> tuple[int, int, int]:
        side = self.pipe.vae_spatial_compression_ratio
        return self.pipe.vae_temporal_compression_ratio, side, side

    def places(self, text: int) -> Places:
        spots = {"embed": Spot("proj_in", "b l d"), "embed.audio": Spot("audio_proj_in", "b a d'")}
        attentions = {}
        for k in range(self.depth):
            ours, theirs = f"blocks.{k}", f"transformer_blocks.{k}"
            spots[ours] = Spot(theirs, "b l d", (0,))
            spots[f"{ours}.audio"] = Spot(theirs, "b a d'", (1,))
            for name, module in VIDEO_SIDE.items():
                spots[f"{ours}.{name}"] = Spot(f"{theirs}.{module}", "b l d")
            for name, module in AUDIO_SIDE.items():
                spots[f"{ours}.audio.{name}"] = Spot(f"{theirs}.{module}", "b a d'")
            for name in ("self_attn", "cross_attn", "from_audio"):
                attentions[f"{ours}.{name}"] = Attends(f"{theirs}.{VIDEO_SIDE[name]}")
        return Places(spots, attentions)


AUDIO_HIDDEN = "audio_hidden_states"


def _unpacked(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    _, _, f, h, w = shape
    return rearrange(x, "b (f h w) c -> b c f h w", f=f, h=h, w=w)


def _rescaled(x: Tensor, v: Tensor, cond: Tensor, sigma: float, share: float) -> Tensor:
    """A velocity whose clean estimate has the standard deviation of the unguided one, to the degree
    `share` (arXiv:2305.08891, 3.4).
    """
    if not share:
        return v
    x0, plain = x - sigma * v, x - sigma * cond
    axes = tuple(range(1, x.ndim))
    even = x0 * (plain.std(dim=axes, keepdim=True) / x0.std(dim=axes, keepdim=True))
    return (x - (share * even + (1 - share) * x0)) / sigma
