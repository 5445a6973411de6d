"""The hook points of a network, found by running it, so that the table of `minicos points` is
always up to date.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minicos.config import DiTConfig
from minicos.dit import DiT
from minicos.hooks import Hooks, Site

LETTERS = {  # of the shapes
    "b": "samples",
    "c f h w": "a latent",
    "l": "tokens, frame by frame, row by row",
    "t": "text tokens",
    "m": "image tokens",
    "d": "width",
    "n": "heads",
    "k": "channels of a head",
    "e": "hidden width of the feed forward",
    "g": "timesteps: one, or one for each latent frame",
}


def points(cfg: DiTConfig) -> dict[str, str]:
    """Every hook point of a network and its shape in letters, e.g. {"blocks.0.ffn": "b l d"}.

    Runs one block on the meta device; all blocks have the same points.
    """
    sizes = {
        "b": 2,
        "c": 17,
        "f": 3,
        "h": 10,
        "w": 14,
        "l": 105,
        "n": 11,
        "k": 8,
        "d": 88,
        "t": 19,
        "e": 23,
        "g": 1,
        "6": 6,
    }
    sizes["m"] = cfg.image_tokens
    letters = {size: letter for letter, size in sizes.items()}
    small = replace(
        cfg,
        in_dim=17,
        out_dim=17,
        dim=88,
        num_heads=11,
        ffn_dim=23,
        num_layers=1,
        text_dim=8,
        text_len=19,
        image_dim=8,
    )
    found: dict[str, str] = {}

    def note(x: Tensor, site: Site) -> None:
        found[site.name] = " ".join(letters[size] for size in x.shape)

    everything = Hooks()
    for depth in range(1, 5):
        everything = everything.on(".".join("*" * depth), note)
    with torch.device("meta"):
        clip = torch.empty(2, cfg.image_tokens, 8) if cfg.image_tokens else None
        DiT(small)(
            torch.empty(2, 17, 3, 10, 14),
            torch.empty(2),
            torch.empty(2, 19, 8),
            clip=clip,
            hooks=everything,
        )
    velocity = found.pop("velocity")
    block = {name: shape for name, shape in found.items() if name.startswith("blocks.0")}
    for i in range(1, cfg.num_layers):
        found |= {
            name.replace("blocks.0", f"blocks.{i}", 1): shape for name, shape in block.items()
        }
    return found | {"velocity": velocity}
