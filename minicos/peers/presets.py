"""The peers as data: their names, and ways of sampling them. Imports neither torch nor diffusers.

A preset names the code that it follows: "diffusers" the defaults of the pipeline, "official" the
authors' own code, "harness" the benchmark runs of the paper (weights.md says what that costs). The
official code of LTX-2 uses one noise schedule for all sizes, diffusers one for each size: with an
equal number of steps they differ in noise, so compare curves over sigma, not over steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from minicos.config import Preset
from minicos.errors import MinicosError

_BOTH = ("high", "low")  # a peer has one network, called high


@dataclass(frozen=True, kw_only=True)
class PeerPreset(Preset):
    """A way of sampling a peer. A video has the preset's frames and size, or with an area that many
    pixels in its picture's aspect ratio, so that nothing is distorted or padded.
    """

    # fields that do not apply -> the reason
    fixed: ClassVar[Mapping[str, str]] = {"boundary": "it has one network"}

    def changed(self, **changes: Any) -> Self:
        """See `Preset.changed`. Raises MinicosError also for what this family does not have."""
        for name, why in self.fixed.items():
            if changes.get(name, getattr(self, name)) != getattr(self, name):
                raise MinicosError(f"{name} {changes[name]} has no place in this model: {why}")
        if changes.get("solver", "euler") != "euler":
            raise MinicosError(
                f"this model is stepped by euler, as its pipeline does, not by {changes['solver']}"
            )
        return super().changed(**changes)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class CogVideoXPreset(PeerPreset):
    """The preset of CogVideoX."""

    fixed: ClassVar[Mapping[str, str]] = {**PeerPreset.fixed, "shift": "its scheduler has none"}


@dataclass(frozen=True, kw_only=True)
class HunyuanPreset(PeerPreset):
    """The preset of HunyuanVideo. Guidance by a second pass is diffusers' true_cfg_scale."""

    embedded: float = 6.0  # guidance as a number that the network receives, if it takes one


@dataclass(frozen=True, kw_only=True)
class LTX2Preset(PeerPreset):
    """LTX-2 has up to four passes per step: cond, uncond, "stg" (in some blocks tokens attend only
    to themselves) and "modality" (video and sound do not attend to each other).
    """

    by_size: bool = True  # the shift depends on the number of tokens, as in diffusers
    audio_guidance: float | None = None  # for the sound; None: the video's
    stg: float = 0.0  # strength of spatio-temporal guidance
    stg_blocks: tuple[int, ...] = (28,)
    modality: float = 1.0  # 1: no such pass
    rescale: float = 0.0  # degree of guidance rescaling (arXiv:2305.08891, 3.4)
    image_crf: int = 0  # H.264 compression of the first frame before encoding; 0: none

    @property
    def branches(self) -> tuple[str, ...]:
        guided = self.guided or self.audio_guidance not in (None, 1)
        more = {"uncond": guided, "stg": self.stg != 0, "modality": self.modality != 1}
        return ("cond", *(name for name, there in more.items() if there))

    def changed(self, **changes: Any) -> Self:
        if "shift" in changes:
            changes.setdefault("by_size", False)
        return super().changed(**changes)


def _made(cls: type[PeerPreset], steps: int, shift: float, guidance: float, **more: Any) -> Any:
    given = {"negative_prompt": "", "image": "channels", "resize": "pil", **more}
    return cls("euler", steps, shift, dict.fromkeys(_BOTH, guidance), **given)


def _pixels(height: int, width: int) -> dict[str, Any]:
    return {"size": (height, width), "area": height * width}


_COG15 = _made(CogVideoXPreset, 50, 1.0, 6.0, **_pixels(768, 1360), frames=81, fps=16)
_COG = _made(CogVideoXPreset, 50, 1.0, 6.0, **_pixels(480, 720), frames=49, fps=8)
_HUNYUAN = _made(HunyuanPreset, 50, 7.0, 1.0, **_pixels(720, 1280), frames=129, fps=24)
_HUNYUAN15 = _made(PeerPreset, 50, 5.0, 6.0, **_pixels(480, 848), frames=121, fps=24)
_LTX = {**_pixels(512, 768), "frames": 121, "fps": 24, "image": "imposed", "image_crf": 33}
_GUIDED = {"audio_guidance": 7.0, "stg": 1.0, "modality": 3.0, "rescale": 0.7}
_SHIFT = math.exp(2.05)  # of the official code: that of 4096 tokens, for every size
_LTX20 = _made(LTX2Preset, 30, _SHIFT, 3.0, **_LTX, **_GUIDED, stg_blocks=(29,))
_LTX23 = _LTX20.changed(stg_blocks=(28,))
_HARNESS = _made(LTX2Preset, 30, _SHIFT, 3.0, **{**_LTX, "fps": 25}, by_size=False)

PRESETS: dict[str, dict[str, PeerPreset]] = {
    "CogVideoX1.5-5B-I2V": {"diffusers": _COG15},
    "CogVideoX-5B-I2V": {"diffusers": _COG},
    "HunyuanVideo-I2V": {"diffusers": _HUNYUAN, "dynamic": _HUNYUAN.changed(shift=17.0)},
    "HunyuanVideo-I2V-33ch": {"diffusers": _HUNYUAN},
    "HunyuanVideo-1.5-I2V-480p": {"diffusers": _HUNYUAN15},
    "HunyuanVideo-1.5-I2V-720p": {
        "diffusers": _HUNYUAN15.changed(shift=7.0, size=(720, 1280), area=720 * 1280)
    },
    "LTX-2": {
        "diffusers": _LTX20,
        "official": _LTX20.changed(steps=40, by_size=False),
        "harness": _HARNESS,
    },
    "LTX-2.3": {"diffusers": _LTX23, "official": _LTX23.changed(by_size=False)},
}


def get_preset(variant: str, name: str | None = None) -> PeerPreset:
    """The preset of a peer, the first by default. Raises MinicosError naming those there are."""
    table = PRESETS[variant]
    name = name or next(iter(table))
    if name not in table:
        raise MinicosError(f"{variant} has no preset {name!r}: take one of {', '.join(table)}")
    return table[name]


def variant(pipeline: str, transformer: Mapping[str, Any]) -> str:
    """Which peer a pipeline's class and the configuration of its transformer make.

    Raises MinicosError for a class that is none of theirs.
    """
    if pipeline not in PIPELINES:
        raise unknown(pipeline)
    return PIPELINES[pipeline](transformer)


def unknown(pipeline: str) -> MinicosError:
    """The error for a class of pipelines that is none of the peers'."""
    known = ", ".join(PIPELINES)
    return MinicosError(f"there is no adapter for {pipeline} of diffusers: there are {known}")


def _cogvideox(transformer: Mapping[str, Any]) -> str:
    newer = transformer.get("patch_size_t") is not None
    return "CogVideoX1.5-5B-I2V" if newer else "CogVideoX-5B-I2V"


def _hunyuan(transformer: Mapping[str, Any]) -> str:
    concat = transformer.get("image_condition_type") == "latent_concat"
    return "HunyuanVideo-I2V-33ch" if concat else "HunyuanVideo-I2V"


def _hunyuan15(transformer: Mapping[str, Any]) -> str:
    return f"HunyuanVideo-1.5-I2V-{'720p' if transformer.get('target_size') == 960 else '480p'}"


def _ltx2(transformer: Mapping[str, Any]) -> str:
    later = [k for k, usual in _LTX23_NETWORK.items() if transformer.get(k, usual) != usual]
    if later:
        raise MinicosError(
            f"this network has {later[0]} {transformer[later[0]]}, as LTX-2.5 has: minicos has "
            "adapters for LTX-2 and LTX-2.3"
        )
    return "LTX-2.3" if transformer.get("cross_attn_mod") else "LTX-2"


_LTX23_NETWORK = {  # what LTX-2.5 changed
    "use_prompt_adaln_single": True,
    "ff_bias": True,
    "audio_ff_bias": True,
    "use_keyframes_abs_pos_embedding": False,
}

PIPELINES = {  # class of diffusers -> the name of its variant, from the transformer's config.json
    "CogVideoXImageToVideoPipeline": _cogvideox,
    "HunyuanVideoImageToVideoPipeline": _hunyuan,
    "HunyuanVideo15ImageToVideoPipeline": _hunyuan15,
    "LTX2ImageToVideoPipeline": _ltx2,
}
# Pipelines that need no first frame -> the one of the same parts that takes it. Repositories of
# LTX-2 name the former.
WITH_IMAGE = {"LTX2Pipeline": "LTX2ImageToVideoPipeline"}
