"""`Outline`: the facts that the options of a study are checked against."""

from collections.abc import Collection, Sequence
from typing import Any, Protocol, Self

from minicos.config import Preset


class Outline(Protocol):
    """The facts about a run that decide whether its options are possible. Every `VideoModel` has
    them. For Wan, file headers contain them, so options are refused before weights are read.
    """

    @property
    def variant(self) -> str:
        """The name of the model."""

    @property
    def preset(self) -> Preset:
        """The way of sampling."""

    @property
    def experts(self) -> Collection[str]:
        """The names of its networks: "high", and perhaps "low"."""

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames, and pixels in height and width, per latent: (f, h, w)."""

    @property
    def depth(self) -> int:
        """The number of blocks of the network."""

    @property
    def sublayers(self) -> tuple[str, ...]:
        """The sub-layers of a block, see `sample.Model`."""

    @property
    def streams(self) -> tuple[str, ...]:
        """Further streams through the blocks, see `sample.Model`."""

    @property
    def stream_decides(self) -> bool:
        """Whether the last block's stream determines the velocity, see `sample.Model`."""

    @property
    def loras(self) -> Sequence[object]:
        """The LoRAs merged into its networks."""

    def with_preset(self, **changes: Any) -> Self:
        """The same model with some fields of its preset changed."""

    def latent_frames(self, frames: int) -> int:
        """How many latent frames a video of so many frames has."""
