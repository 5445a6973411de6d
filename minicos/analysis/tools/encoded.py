"""A VAE that caches what it encodes.

Studies encode the same clips repeatedly: a first frame for every arm of an experiment, and the
answers of a puzzle for the network and for the ideal observer.
"""

from hashlib import blake2b
from typing import Self

import torch
from torch import Tensor

from minicos.config import VAEConfig
from minicos.vae import VAE

MOST = 5000  # clips in the cache: 100 MB for the embedded model


class EncodesOnce(VAE):
    """Returns the same latents as `VAE`, bit for bit on a CPU, where clips are encoded one by one.
    The last `MOST` latents are cached.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__(cfg)
        self.known: dict[bytes, Tensor] = {}  # digest of a clip -> its latent, oldest first

    @classmethod
    def of(cls, vae: VAE) -> Self:
        """A caching VAE with the weights of another VAE."""
        with torch.device("meta"):
            twin = cls(vae.cfg)
        twin.load_state_dict(vae.state_dict(), assign=True)
        return twin.requires_grad_(False)

    def encode(self, video: Tensor, chunk: int | None = None, tile: int | None = None) -> Tensor:
        return torch.cat([self._one(clip, chunk, tile) for clip in video.split(1)])

    def _one(self, clip: Tensor, chunk: int | None, tile: int | None) -> Tensor:
        pixels = clip.detach().cpu().contiguous()
        settings = repr((tuple(clip.shape), clip.dtype, clip.device, chunk, tile)).encode()
        key = blake2b(pixels.numpy().tobytes() + settings).digest()
        if key not in self.known:
            self.known[key] = super().encode(clip, chunk, tile)
            if len(self.known) > MOST:
                self.known.pop(next(iter(self.known)))
        return self.known[key]
