"""`VideoModel`: a `Model` with the way from a prompt to its condition, and from latents to a video.

All that commands and studies ask for beyond `Model`. `Wan` is one, and so is every pipeline of
diffusers (`peers.Peer`): whatever is written for a `VideoModel` runs on both.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
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
    """Networks and a preset: the way they are run."""

    variant: str
    preset: Preset
    weights: str  # fingerprint of the files, LoRAs included, which runs remember
    notes: tuple[str, ...]  # what else the files could be

    @property
    @abstractmethod
    def presets(self) -> tuple[str, ...]:
        """The ways of sampling it by name, the default first."""

    @abstractmethod
    def with_preset(self, name: str | None = None, **changes: Any) -> Self:
        """The same networks under another preset, or with some of its fields changed:
        `with_preset(steps=10)`. Raises MinicosError for what they cannot serve.
        """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the matrices."""

    @property
    @abstractmethod
    def placement(self) -> str:
        """Where the weights are: the name of the plan's residency."""

    @property
    @abstractmethod
    def ops(self) -> Ops:
        """What studies compute with."""

    @property
    def loras(self) -> tuple[Applied, ...]:
        """What was merged into its networks."""
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
        """What to make: a `Condition` of its own kind; see `Wan.condition`."""

    def rows(self, condition: Any, branch: str) -> int | None:
        """How many rows of text a pass looks at, padding included; None where there is no text."""
        return self.words(condition, branch)

    @abstractmethod
    def decode(self, latent: Tensor) -> np.ndarray:
        """Latents (b c f h w) -> uint8 (b F H W 3)."""

    @abstractmethod
    def frames(self, latent: Tensor) -> Iterator[np.ndarray]:
        """Decode one latent (c f h w), perhaps piece by piece: uint8 (frames H W 3)."""

    @property
    @abstractmethod
    def decode_dtype(self) -> torch.dtype:
        """In which latents are decoded."""

    @property
    def decode_tf32(self) -> bool:
        """Whether convolutions of the decoder are in TF32 (10 bits of mantissa)."""
        return False

    @property
    def tile(self) -> int | None:
        """Pixels a side of the tiles in which frames are decoded; None: whole."""
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
