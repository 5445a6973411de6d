"""A diffusers folder of a peer, read from JSON and headers alone, without torch or diffusers."""

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from minicos.errors import MinicosError
from minicos.peers import presets
from minicos.weights.files import read_table
from minicos.weights.header import Header, TensorInfo, read_headers
from minicos.weights.inspect import Checkpoint
from minicos.weights.layouts import sampled

# A component of the pipeline -> the part of the model that it belongs to, as a plan names them.
PARTS = {
    "transformer": "high",
    "text_encoder": "text",
    "text_encoder_2": "text",
    "connectors": "text",
    "image_encoder": "text",
    "vae": "vae",
    "audio_vae": "vae",
    "vocoder": "vae",
}
STRIDES = {  # video frames and pixels of a latent
    "CogVideoXImageToVideoPipeline": (4, 8, 8),
    "HunyuanVideoImageToVideoPipeline": (4, 8, 8),
    "HunyuanVideo15ImageToVideoPipeline": (4, 16, 16),
    "LTX2ImageToVideoPipeline": (8, 32, 32),
}
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
NOT_WAN = ("CogVideoX", "HunyuanVideo", "LTX")  # what names of other pipelines begin with


@dataclass(frozen=True)
class PeerFolder:
    """The counterpart of `minicos.weights.layouts.Layout` for peers."""

    path: Path
    pipeline: str  # class of diffusers
    variant: str
    transformer: Mapping[str, Any]  # its config.json
    notes: tuple[str, ...] = ()

    def preset(self, name: str | None = None) -> presets.PeerPreset:
        """A preset of the variant, the first by default."""
        return presets.get_preset(self.variant, name)

    @property
    def experts(self) -> tuple[str, ...]:
        """The name of its one network."""
        return ("high",)

    @property
    def depth(self) -> int:
        """The number of blocks of the network."""
        return self._number("num_layers") + int(self.transformer.get("num_single_layers", 0))

    @property
    def heads(self) -> int:
        """The number of heads of the video's attention."""
        return self._number("num_attention_heads")

    @property
    def width(self) -> int:
        """The width of the network."""
        return self.heads * self._number("attention_head_dim")

    @property
    def stride(self) -> tuple[int, int, int]:
        """Video frames and pixels of a latent, along f, h, w."""
        return STRIDES[self.pipeline]

    @property
    def token(self) -> tuple[int, int, int]:
        """Video frames and pixels of a token, along f, h, w."""
        side = self._number("patch_size")
        patch = self.transformer.get("patch_size_t") or 1, side, side
        t, h, w = (of * by for of, by in zip(self.stride, patch, strict=True))
        return t, h, w

    def check(self, frames: int, tile: int | None) -> None:
        """Raise MinicosError for options that the model does not support. The number of frames is
        checked together with the picture, by the model itself.
        """
        if tile is not None:
            from minicos.tiles import check_side

            check_side(tile, self.stride[1])

    @cached_property
    def headers(self) -> Mapping[str, tuple[Header, ...]]:
        """The headers of each component with weights. Raises MinicosError naming a missing or
        damaged file. In a folder with weights of two precisions, the plain ones are used.
        """
        found = {}
        for name in PARTS:
            place = self.path / name
            if place.is_dir():
                found[name] = tuple(read_headers(place))
        if "transformer" not in found:
            raise MinicosError(f"{self.path} has no transformer/ with weights. Download it again.")
        return found

    def fingerprint(self) -> str:
        """A fingerprint of the weights: a hash of samples of every file."""
        digest = sha256()
        for headers in self.headers.values():
            for header in headers:
                digest.update(sampled(header.path))
        return digest.hexdigest()[:16]

    def checkpoint(self) -> Checkpoint:
        """The description that `minicos inspect` prints."""
        infos = [info for headers in self.headers.values() for info in _infos(headers)]
        files = {
            name: tuple(str(header.path) for header in headers)
            for name, headers in self.headers.items()
        }
        return Checkpoint(
            path=str(self.path),
            variant=self.variant,
            layout="diffusers",
            expert=None,
            tensors=len(infos),
            parameters=sum(info.elements for info in infos),
            bytes=sum(header.size for headers in self.headers.values() for header in headers),
            dtypes=dict(Counter(info.dtype for info in infos).most_common()),
            architecture={"dim": self.width, "num_layers": self.depth, "num_heads": self.heads},
            parts=files,
            notes=(
                f"{self.pipeline} of diffusers; runs with the extra minicos[peers]",
                f"presets: {', '.join(presets.PRESETS[self.variant])}",
            ),
        )

    def elements(self) -> dict[str, dict[str, int]]:
        """Parameters by part ("high", "text", "vae") and block; "" for those outside blocks."""
        found: dict[str, dict[str, int]] = {}
        for name, headers in self.headers.items():
            counts = found.setdefault(PARTS[name], {})
            for header in headers:
                for key, info in header.tensors.items():
                    start = next((b for b in BLOCKS if key.startswith(b)), "")
                    block = start + key[len(start) :].partition(".")[0] if start else ""
                    counts[block] = counts.get(block, 0) + info.elements
        return found

    def _number(self, key: str) -> int:
        value = self.transformer.get(key)
        if type(value) is not int or not 0 < value < 1 << 20:
            raise MinicosError(
                f"{self.path / 'transformer/config.json'}: {key} is {value!r:.40}, and should be a "
                "number above 0. Download it again."
            )
        return value


def _infos(headers: tuple[Header, ...]) -> list[TensorInfo]:
    return [info for header in headers for info in header.tensors.values()]


def find(path: Path) -> PeerFolder | None:
    """The peer in a folder; None if the folder is not a diffusers folder of one. Raises
    MinicosError for other pipelines than those that can be run.
    """
    index = path / "model_index.json"
    pipeline = _pipeline(read_table(index)) if index.is_file() else None
    if pipeline is None:
        return None
    config = path / "transformer" / "config.json"
    given = read_table(config) if config.is_file() else None
    if given is None:
        raise MinicosError(f"{path} has no transformer/config.json. Download it again.")
    return PeerFolder(path, pipeline, presets.variant(pipeline, given), given)


def parts(repo: str, files: Container[str]) -> tuple[str, ...]:
    """The folders of a repository on the Hub that its pipeline is read from, "" for the repository
    itself; none if it is not a peer. Fetches its model_index.json.
    """
    from huggingface_hub import hf_hub_download

    if "model_index.json" not in files:
        return ()
    index = read_table(Path(hf_hub_download(repo, "model_index.json")))
    if _pipeline(index) is None:
        return ()
    given = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    return ("", *(name for name, entry in given.items() if any(entry)))


def _pipeline(index: Mapping[str, Any]) -> str | None:
    """The class with which a pipeline is opened; None if it may be one of Wan."""
    name = str(index.get("_class_name"))
    name = presets.WITH_IMAGE.get(name, name)
    if name not in presets.PIPELINES and name.startswith(NOT_WAN):
        raise presets.unknown(name)
    return name if name in presets.PIPELINES else None
