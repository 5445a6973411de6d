"""A VAE that caches what it encodes and decodes.

Studies encode the same clips repeatedly: a first frame for every arm of an experiment, and the
answers of a puzzle for the network and for the ideal observer. They also decode the same latents
again: those of runs that nothing changed, and of the clean runs that parts of a study share.
"""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Self, TypeVar

import torch
from torch import Tensor

from minicos.config import VAEConfig
from minicos.vae import VAE, at_once, wide

V = TypeVar("V")
MOST = 5000  # latents in the cache: 100 MB for the embedded model
MOST_VIDEOS = 500  # videos in the cache: 160 MB for the embedded model in bfloat16


class CodesOnce(VAE):
    """Returns the same latents and videos as `VAE`, bit for bit on a CPU, where clips pass one by
    one; on a card, batches of latents are decoded without the cache. The last `MOST` latents and
    `MOST_VIDEOS` videos are cached.
    """

    def __init__(self, cfg: VAEConfig):
        super().__init__(cfg)
        self.latents: dict[bytes, Tensor] = {}  # digest of a clip -> its latent, oldest first
        self.videos: dict[bytes, list[Tensor]] = {}  # digest of a latent -> the pieces of its video

    @classmethod
    def of(cls, vae: VAE) -> Self:
        """A caching VAE with the weights of another VAE."""
        with torch.device("meta"):
            twin = cls(vae.cfg)
        twin.load_state_dict(vae.state_dict(), assign=True)
        return twin.requires_grad_(False)

    def encode(self, video: Tensor, chunk: int | None = None, tile: int | None = None) -> Tensor:
        encode = super().encode

        def one(clip: Tensor) -> Tensor:
            return _once(self.latents, MOST, (clip, chunk, tile), lambda: encode(clip, chunk, tile))

        return torch.cat([one(clip) for clip in video.split(1)])

    def stream(
        self, latent: Tensor, chunk: int | None = None, tile: int | None = None
    ) -> Iterator[Tensor]:
        if chunk is None:
            chunk = at_once(*(self.cfg.stride[1] * side for side in latent.shape[-2:]))
        pieces = super().stream(latent, chunk, tile)  # of a batch, calls this method for each clip
        if len(latent) > 1:
            return pieces
        dtype = self.decoder.conv1.weight.dtype  # pieces are exact in it

        def once() -> Iterator[Tensor]:  # decodes where the first piece is asked for
            kept = _once(
                self.videos,
                MOST_VIDEOS,
                (latent, chunk, tile),
                lambda: [piece.to(dtype) for piece in pieces],
            )
            yield from (wide(piece) if dtype != torch.float32 else piece.clone() for piece in kept)

        return once()


def _once(known: dict[bytes, V], most: int, given: tuple, compute: Callable[[], V]) -> V:
    """`compute()`, or what it gave before for the same tensor and settings (`given`)."""
    tensor, *settings = given
    content = tensor.detach().cpu().contiguous()
    about = repr((tuple(tensor.shape), tensor.dtype, tensor.device, settings)).encode()
    key = blake2b(content.numpy().tobytes() + about).digest()
    if key not in known:
        known[key] = compute()
        if len(known) > most:
            known.pop(next(iter(known)))
    return known[key]
