"""HunyuanVideo, image-to-video: joint attention, with the text after the video.

Two networks share the pipeline. "token_replace": the first latent frame is the picture's at every
step. "latent_concat": the picture's latent and a mask are concatenated to x along the channels, and
the frames of the first latent are discarded after decoding. 20 blocks process video and text
separately, 40 more with shared weights; `blocks.k` counts both. Prompts also enter every block's
modulation and the head, pooled by CLIP, so no stream carries all that the network knows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minicos.peers.foreign import Places, joint_blocks
from minicos.peers.peer import Peer, PeerCondition, as_pil
from minicos.peers.prepare import Call

TEXT = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")


@dataclass(frozen=True, repr=False)
class HunyuanVideo(Peer):
    """The network receives guidance as a number (`HunyuanPreset.embedded`); a second pass is an
    option of the pipeline, off by default.
    """

    @property
    def concat(self) -> bool:
        """Whether the picture is concatenated to x."""
        return self.pipe.transformer.config.image_condition_type == "latent_concat"

    def given(self, guided: bool) -> dict[str, Any]:
        second = {"true_cfg_scale": self._strength} if guided else {}
        return {"guidance_scale": self.preset.embedded, **second}

    def imposes(self) -> bool:
        return not self.concat

    def start(self, noise: Tensor, call: Call) -> Tensor:
        """Noise mixed with a thousandth of the picture in every frame, as in the pipeline."""
        x, c = call["hidden_states"], noise.shape[1]
        picture = (x[:, c : 2 * c, :1] if self.concat else x[:, :, :1]).to(noise)
        share = torch.tensor(0.999).to(noise)  # rounded as there
        return noise * share + picture.repeat(1, 1, noise.shape[2], 1, 1) * (1 - share)

    def unprompted(self, cond: Call, texts: list[str], pictures: Tensor) -> Call:
        """Like the pipeline, show a black picture to the text encoder alone."""
        own = {} if self.embed is not None else {"image_embed_interleave": 2}
        black = self.prepared(texts, torch.zeros_like(pictures), **own)
        return {**cond, **{name: black[name] for name in TEXT}}

    def shown(self, pictures: Tensor) -> Any:
        if self.pipe.text_encoder is None:
            return pictures
        frames = as_pil(pictures)
        return frames[0] if len(frames) == 1 else frames

    def words(self, condition: PeerCondition, branch: str) -> int | None:
        return int(condition.branch(branch)["encoder_attention_mask"][0].sum())

    @property
    def stream_decides(self) -> bool:
        return False

    @property
    def lead(self) -> int:
        return int(self.concat)

    def places(self, text: int) -> Places:
        return joint_blocks(self.pipe.transformer, text)
