"""The families of pipelines that have an adapter, and `minicos.from_diffusers`."""

from typing import Any

from minicos.errors import MinicosError
from minicos.peers import presets, wan
from minicos.peers.cogvideox import CogVideoX
from minicos.peers.hunyuan import HunyuanVideo
from minicos.peers.ltx2 import LTX2
from minicos.peers.peer import Embed, Peer
from minicos.wan import Wan

FAMILIES: dict[str, type[Peer]] = {  # by the class of the pipeline
    "CogVideoXImageToVideoPipeline": CogVideoX,
    "HunyuanVideoImageToVideoPipeline": HunyuanVideo,
    "LTX2ImageToVideoPipeline": LTX2,
}


def from_diffusers(
    pipe: Any, *, variant: str | None = None, preset: str | None = None, embed: Embed | None = None
) -> Wan | Peer:
    """A pipeline of diffusers that is in memory, as a model of minicos; it is not changed.

    pipe     of a class in `wan.PIPELINES` or `FAMILIES`
    variant  of Wan, what shapes cannot tell, as for `minicos.load`: "VBVR-Wan2.2", ...
    preset   of the others, a way of sampling (`presets.PRESETS`), by default the pipeline's own
    embed    of the others, in the place of text encoders that are not there: prompts -> arguments
             of the pipeline such as prompt_embeds
    Raises MinicosError for a pipeline of another class, and where its weights cannot be used as
    they lie there.
    """
    kind = type(pipe).__name__
    if kind in wan.PIPELINES:
        if preset is not None or embed is not None:
            raise MinicosError("a Wan pipeline has its own preset and text encoder: leave them out")
        return wan.from_pipeline(pipe, variant)
    if kind not in FAMILIES:
        known = ", ".join((*wan.PIPELINES, *FAMILIES))
        raise MinicosError(f"{kind} is no pipeline that minicos knows: take one of {known}")
    if variant is not None:
        raise MinicosError(f"{kind} says itself which variant it is: leave it out")
    found = presets.variant(kind, pipe.transformer.config)
    weights = wan.fingerprint({"high": pipe.transformer.state_dict()})
    chosen = presets.get_preset(found, preset)
    return FAMILIES[kind](pipe, found, chosen, weights, embed)
