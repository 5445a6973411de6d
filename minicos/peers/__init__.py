"""Models that diffusers runs, behind minicos' contract: the same loop, hooks and studies.

import diffusers, minicos
model = minicos.from_diffusers(diffusers.DiffusionPipeline.from_pretrained(...))

A Wan pipeline becomes a `minicos.Wan` on the very weights that are in memory (wan.py).

Needs the extra `minicos[peers]`. Nothing here imports diffusers before a pipeline is at hand.
"""

from typing import Any

from minicos.errors import MinicosError
from minicos.peers import wan
from minicos.wan import Wan


def from_diffusers(pipe: Any, *, variant: str | None = None) -> Wan:
    """A pipeline of diffusers that is in memory, as a model of minicos; the pipeline is not changed.

    pipe     a WanPipeline or a WanImageToVideoPipeline
    variant  what shapes cannot tell, as for `minicos.load`: "VBVR-Wan2.2", ...
    Raises MinicosError for a pipeline of another class, one without all of its parts, and for
    weights that are offloaded, quantised or under a LoRA that is not merged.
    """
    kind = type(pipe).__name__
    if kind in wan.PIPELINES:
        return wan.from_pipeline(pipe, variant)
    known = ", ".join(wan.PIPELINES)
    raise MinicosError(f"{kind} is no pipeline that minicos knows: take one of {known}")
