"""The supported pipeline families, and `minicos.from_diffusers`."""

from typing import Any

from torch import Tensor, nn

from minicos.errors import MinicosError
from minicos.peers import presets, wan
from minicos.peers.cogvideox import CogVideoX
from minicos.peers.hunyuan import HunyuanVideo
from minicos.peers.hunyuan15 import HunyuanVideo15
from minicos.peers.ltx2 import LTX2
from minicos.peers.peer import Embed, Peer
from minicos.wan import Wan

FAMILIES: dict[str, type[Peer]] = {  # by the class of the pipeline
    "CogVideoXImageToVideoPipeline": CogVideoX,
    "HunyuanVideoImageToVideoPipeline": HunyuanVideo,
    "HunyuanVideo15ImageToVideoPipeline": HunyuanVideo15,
    "LTX2ImageToVideoPipeline": LTX2,
}


def from_diffusers(
    pipe: Any, *, variant: str | None = None, preset: str | None = None, embed: Embed | None = None
) -> Wan | Peer:
    """Wrap a diffusers pipeline in memory as a model of minicos. The pipeline is not changed.

    Args:
        pipe: an object of a class in `wan.PIPELINES` or `FAMILIES`.
        variant: for Wan, the variant if shapes cannot identify it, as in `minicos.load`:
            "VBVR-Wan2.2", ...
        preset: for other families, a way of sampling (`presets.PRESETS`); default: the pipeline's.
        embed: for other families, a replacement for missing text encoders: prompts -> arguments of
            the pipeline such as prompt_embeds.

    Raises:
        MinicosError: the pipeline has another class, or its weights cannot be used in place.
    """
    kind = type(pipe).__name__
    if kind in wan.PIPELINES:
        if preset is not None or embed is not None:
            raise MinicosError("a Wan pipeline has its own preset and text encoder: leave them out")
        return wan.from_pipeline(pipe, variant)
    if kind in presets.WITH_IMAGE:
        remedy = f"diffusers.{presets.WITH_IMAGE[kind]}(**pipe.components)"  # from_pipe would cast
        raise MinicosError(f"{kind} takes no first frame: give {remedy}, which shares its weights")
    if kind not in FAMILIES:
        known = ", ".join((*wan.PIPELINES, *FAMILIES))
        raise MinicosError(f"{kind} is not a pipeline that minicos supports: take one of {known}")
    if variant is not None:
        raise MinicosError(f"{kind} says itself which variant it is: leave it out")
    found = presets.variant(kind, pipe.transformer.config)
    weights = wan.fingerprint({"high": _tensors(pipe.transformer)})
    chosen = presets.get_preset(found, preset)
    return FAMILIES[kind](pipe, found, chosen, weights, embed)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a network. If it is streamed to the card module by module, its own are empty,
    and accelerate keeps them aside.
    """
    found = dict(network.state_dict())
    for key in [key for key, x in found.items() if x.is_meta]:
        place, _, name = key.rpartition(".")
        hook = getattr(network.get_submodule(place), "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if aside := getattr(one, "weights_map", None):
                found[key] = aside[name]
        if found[key].is_meta:
            raise MinicosError(f"{type(network).__name__} has no weights ({key}): load them first")
    return found
