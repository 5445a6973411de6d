"""CogVideoX and CogVideoX1.5, image-to-video: joint attention, with the text before the video.

The network predicts v = alpha noise - s x0 at x' = alpha x0 + s noise, with alpha^2 + s^2 = 1. With

    sigma = s / (alpha + s),   x = x' / (alpha + s),   velocity = (alpha + s) v + (s - alpha) x'

this is exactly a flow-matching model: x0 = x - sigma velocity = alpha x' - s v, and the scheduler's
DDIM step is an Euler step in sigma. For pure noise (alpha = 0), x = x'.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from minicos.errors import MinicosError
from minicos.peers.foreign import Attends, Places, Spot, joint
from minicos.peers.peer import Peer, PeerCondition
from minicos.peers.prepare import Call
from minicos.sample import VIDEO, Latents, Moment
from minicos.schedule import Schedule


@dataclass(frozen=True, repr=False)
class CogVideoX(Peer):
    """The picture's latent is concatenated to x along the channels, in latent frame 0. If that is
    padding, the next one is the video's first and shows the picture, too.
    """

    layout: ClassVar[str] = "b f c h w"

    def received(self, call: Call) -> Latents:
        bar = self.pipe.scheduler.alphas_cumprod[int(call["timestep"][0])].double()
        scale = float(bar.sqrt() + (1 - bar).sqrt())  # alpha + s
        return {VIDEO: super().received(call)[VIDEO] / scale}

    def arguments(self, call: Call, latents: Latents, moment: Moment) -> Call:
        return super().arguments(
            call, {VIDEO: latents[VIDEO] * sum(rotation(moment.sigma))}, moment
        )

    def velocities(self, answer: tuple[Tensor, ...], latents: Latents, moment: Moment) -> Latents:
        alpha, s = rotation(moment.sigma)
        v = super().velocities(answer, latents, moment)[VIDEO]
        return {VIDEO: (alpha + s) * v + (s - alpha) * (alpha + s) * latents[VIDEO]}

    def schedule(self) -> Schedule:
        """Levels and timesteps of CogVideoXDDIMScheduler. Raises MinicosError for a number of steps
        whose ends would not be the next steps' beginnings.
        """
        scheduler, steps = self.pipe.scheduler, self.preset.steps
        config = scheduler.config
        if type(scheduler).__name__ != "CogVideoXDDIMScheduler":
            raise MinicosError(
                f"{type(scheduler).__name__} adds noise in every step, or steps otherwise: set "
                "pipe.scheduler to CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)"
            )
        whole = config.num_train_timesteps
        if whole % steps or config.timestep_spacing != "trailing":
            raise MinicosError(
                f"{steps} steps: CogVideoX takes a divisor of {whole}, such as 50 or 40"
            )
        times = range(whole - 1, -1, -(whole // steps))
        bars = [*(scheduler.alphas_cumprod[t] for t in times), scheduler.final_alpha_cumprod]
        bar = torch.as_tensor(bars).double()
        levels = (1 - bar).sqrt() / (bar.sqrt() + (1 - bar).sqrt())  # s / (alpha + s)
        return Schedule("euler", tuple(times), tuple(levels.float().tolist()))

    def pixels(self, latent: Tensor) -> Tensor:
        shown = latent[:, :, self.lead :].to(self.pipe.vae.dtype)
        return self.pipe.decode_latents(self.theirs(shown)).float()

    @property
    def lead(self) -> int:
        """Padding at the front, if a token covers two latent frames."""
        return -super().latent_frames(self.preset.frames) % self.patch[0]

    def pictured(self, condition: PeerCondition) -> tuple[int, ...]:
        return tuple(range(self.lead + 1))

    def latent_frames(self, frames: int) -> int:
        shown = super().latent_frames(frames)
        return shown + -shown % self.patch[0]

    def check(self) -> None:
        """Rotary positions of CogVideoX1.5 are a table of the size that it was trained at, and
        CogVideoX-5B-I2V learned one position for each token.
        """
        super().check()
        config, (height, width) = self.pipe.transformer.config, self.preset.size
        most = config.sample_height * self.stride[1], config.sample_width * self.stride[2]
        trained = f"{most[1]}x{most[0]} pixels"
        if config.use_learned_positional_embeddings:
            length = config.sample_frames
            if (height, width) != most or self.preset.frames != length:
                raise MinicosError(
                    f"{self.variant} makes videos of {trained} and {length} frames alone, not "
                    f"{self.preset.frames} frames of {width}x{height}: give a picture of that shape"
                )
        table = self.patch[0] > 1 and config.use_rotary_positional_embeddings
        if table and (height > most[0] or width > most[1]):
            raise MinicosError(
                f"{self.variant} makes videos of at most {trained}, not {width}x{height}: take a "
                "smaller size"
            )

    def places(self, text: int) -> Places:
        before, after = slice(None, text), slice(text, None)
        spots = {
            "embed": Spot("patch_embed", "b l d", rows=after),
            "text": Spot("patch_embed", "b t d", rows=before),
        }
        attentions = {}
        for k in range(self.depth):
            ours, theirs = f"blocks.{k}", f"transformer_blocks.{k}"
            attention, ffn = f"{theirs}.attn1", f"{theirs}.ff"
            spots |= joint(ours, theirs, text) | joint(f"{ours}.self_attn", attention, text)
            spots[f"{ours}.ffn"] = Spot(ffn, "b l d", rows=after)
            spots[f"{ours}.ffn.text"] = Spot(ffn, "b t d", rows=before)
            attentions[f"{ours}.self_attn"] = Attends(attention, video=after)
        return Places(spots, attentions)


def rotation(sigma: float) -> tuple[float, float]:
    """alpha and s of x' = alpha x0 + s noise at sigma = s / (alpha + s)."""
    norm = (sigma**2 + (1 - sigma) ** 2) ** 0.5
    return (1 - sigma) / norm, sigma / norm
