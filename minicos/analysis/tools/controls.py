"""The untrained control network: what a measure shows of any network."""

from dataclasses import replace

import torch

from minicos.dit import DiT
from minicos.video_model import VideoModel
from minicos.wan import Wan, as_wan


def untrained(model: VideoModel, seed: int = 0) -> Wan:
    """The same architecture with random weights, as PyTorch draws them; the global random state is
    not changed.
    """
    wan = as_wan(model, "the untrained control")
    like = wan.experts["high"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DiT(wan.cfg, residual_dtype=like.residual_dtype, time_skip=like.time_skip)
    network = network.requires_grad_(False).to(wan.device, wan.dtype).eval()
    return replace(wan, experts=dict.fromkeys(wan.experts, network))
