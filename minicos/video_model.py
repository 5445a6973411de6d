"""`VideoModel`: a `Model` that makes a condition from a prompt, and a video from latents.

It declares everything that commands and studies need beyond `Model`. `Wan` and every diffusers
pipeline (`peers.Peer`) implement it, so code written for a `VideoModel` runs on both.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from minicos.condition import Condition
from minicos.config import Preset
from minicos.media import Picture
from minicos.ops import Ops
from minicos.sample import Model
from minicos.weights.lora import Applied


class VideoModel(Model):
    """Networks, and a preset that says how to sample from them."""

    variant: str
    preset: Preset
    experts: Collection[str]  # the names of its networks: "high", and perhaps "low"
    weights: str  # fingerprint of the files and LoRAs, which runs record
    notes: tuple[str, ...]  # on the files, such as the other models that they could be

    @property
    @abstractmethod
    def presets(self) -> tuple[str, ...]:
        """The names of the presets, the default first."""

    @abstractmethod
    def with_preset(self, name: str | None = None, **changes: Any) -> Self:
        """The same networks under another preset, or with some of its fields changed:
        `with_preset(steps=10)`. Raises MinicosError for changes that they do not support.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device on which it computes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the matrices."""

    @property
    @abstractmethod
    def placement(self) -> str:
        """The residency of the plan: where the weights are."""

    @property
    @abstractmethod
    def ops(self) -> Ops:
        """The operations that studies use."""

    @property
    def loras(self) -> tuple[Applied, ...]:
        """The LoRAs merged into its networks."""
        return ()

    # -- from prompt and picture to a video --------------------------------------------------------

    @abstractmethod
    def condition(
        self,
        prompt: str | Sequence[str | None] | None,
        image: Picture | None = None,
        *,
        last: Picture | None = None,
        negative: str | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Condition:
        """The condition of a video, in the model's subclass of `Condition`; see `Wan.condition`."""

    def rows(self, condition: Any, branch: str) -> int | None:
        """The number of text rows that a pass attends to, padding included; None without text."""
        return self.words(condition, branch)

    def latent_frames(self, frames: int) -> int:
        """How many latent frames a video of so many frames has."""
        return (frames - 1) // self.stride[0] + 1

    @abstractmethod
    def decode(self, latent: Tensor) -> np.ndarray:
        """Decode latents (b c f h w) to uint8 videos (b F H W 3)."""

    @abstractmethod
    def frames(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Decode one latent (c f h w), possibly piece by piece: uint8 (frames H W 3)."""

    @property
    @abstractmethod
    def decode_dtype(self) -> torch.dtype:
        """The dtype in which latents are decoded."""

    @property
    def decode_tf32(self) -> bool:
        """Whether the decoder uses TF32 convolutions (10 bits of mantissa)."""
        return False

    @property
    def tile(self) -> int | None:
        """Side in pixels of the tiles for decoding; None: whole frames."""
        return None

    def generate(
        self,
        prompt: str | None,
        image: Picture | None = None,
        *,
        last: Picture | None = None,
        seed: int = 0,
        negative: str | None = None,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> np.ndarray:
        """Make one video: uint8 (F H W 3). The arguments are those of `condition`."""
        condition = self.condition(
            prompt, image, last=last, negative=negative, frames=frames, size=size
        )
        (step,) = deque(self.sample(condition, seed=seed), maxlen=1)
        return self.decode(step.next)[0]
