"""HunyuanVideo-1.5, image-to-video: joint attention, with picture and text behind the video.

The rows that attend jointly with the video are SigLIP's of the picture, ByT5's of words in
quotation marks, and Qwen2.5-VL's of the prompt; the rows in use come first. The picture's latent
and a mask are concatenated to x along the channels. The pipeline derives the size of a video from
its picture, and takes guidance from a part of its own, the guider.
"""

from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minicos.errors import MinicosError
from minicos.peers.foreign import Places, joint_blocks
from minicos.peers.peer import Peer, PeerCondition, as_pil
from minicos.peers.prepare import Call

ROWS = ("image_embeds", "encoder_hidden_states_2", "encoder_hidden_states")
MASKS = ("encoder_attention_mask_2", "encoder_attention_mask")


@dataclass(frozen=True, repr=False)
class HunyuanVideo15(Peer):
    """The pipeline makes a video of one picture at a time, in the size of its preset."""

    def parts(self, guided: bool) -> dict[str, Any]:
        processor, guider = copy(self.pipe.video_processor), copy(self.pipe.guider)
        processor.calculate_default_height_width = lambda **picture: self.preset.size
        guider.guidance_scale = self._strength if guided else 1.0
        return {"guider": guider, "video_processor": processor}

    def given(self, guided: bool) -> dict[str, Any]:
        return {}

    def asked(self, texts: list[str], pictures: Tensor) -> dict[str, Any]:
        found = super().asked(texts, pictures)
        return {k: v for k, v in found.items() if k not in ("height", "width")}

    def prepared(self, texts: list[str], pictures: Tensor, **more: Any) -> Call:
        pairs = zip(texts, pictures, strict=True)
        each = [super(HunyuanVideo15, self).prepared([t], p[None], **more) for t, p in pairs]
        tensors = [k for k, v in each[0].items() if isinstance(v, Tensor)]
        return {**each[0], **{k: torch.cat([call[k] for call in each]) for k in tensors}}

    def shown(self, pictures: Tensor) -> Any:
        return as_pil(pictures)[0]

    def fitting(self, image_hw: tuple[int, int]) -> tuple[int, int]:
        if self.preset.area is None:
            return super().fitting(image_hw)
        pipe = self.pipe
        size = pipe.video_processor.calculate_default_height_width(*image_hw, pipe.target_size)
        return size[0], size[1]

    def check(self) -> None:
        super().check()
        guider = self.pipe.guider
        usual = {"guidance_rescale": 0, "use_original_formulation": False, "start": 0, "stop": 1}
        if type(guider).__name__ != "ClassifierFreeGuidance" or any(
            guider.config[k] != v for k, v in usual.items()
        ):
            raise MinicosError(
                "pipe.guider guides otherwise than by the difference of two passes at every step: "
                "set it to diffusers.ClassifierFreeGuidance()"
            )

    def text_rows(self, call: Call) -> int:
        return sum(call[name].shape[1] for name in ROWS)

    def words(self, condition: PeerCondition, branch: str) -> int | None:
        call = condition.branch(branch)
        return call["image_embeds"].shape[1] + sum(int(call[name][0].sum()) for name in MASKS)

    def places(self, text: int) -> Places:
        return joint_blocks(self.pipe.transformer, text)
