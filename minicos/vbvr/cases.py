"""Samples on disk: a first frame and a prompt, and for benchmarks the true video.

Three layouts are read:

    VBVR-Bench, VBVR-Pro-Bench   SPLIT/TASK/NNNNN/{first_frame.png, prompt.txt, ground_truth.mp4,
                                 final_frame.png}
    exported puzzles             TASK/NNNNN/ with the same files
    any other folder             CASE/{one picture, prompt.txt}, at any depth; or NAME.png with
                                 NAME.txt

Names and contents are untrusted: a link that leaves the folder, a name that a terminal or a table
could misread, and a file of another kind are reported as problems, and never followed or used.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from PIL import Image

from minicos.errors import MinicosError
from minicos.media import load_image

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SPLITS = {"In-Domain_50": "In-Domain", "Out-of-Domain_50": "Out-of-Domain"}  # folder -> title
LONGEST_PROMPT = 1 << 16  # bytes
LARGEST_PICTURE = 1 << 26  # pixels


@dataclass(frozen=True)
class Sample:
    """One sample. `name` is its path below the root ("In-Domain_50/O-18_.../00000") and
    identifies it in every result.
    """

    name: str
    image: Path  # the first frame
    prompt: str
    size: tuple[int, int]  # height and width of the first frame
    truth: Path | None = None  # the true video
    frames: int | None = None  # number of frames of the true video
    metadata: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def split(self) -> str:
        """The folder of its split; "" if there are no splits."""
        parts = PurePosixPath(self.name).parts
        return parts[0] if parts[0] in SPLITS and len(parts) > 2 else ""

    @property
    def task(self) -> str:
        """The folder that contains it; "" for a sample at the top."""
        return PurePosixPath(self.name).parent.name

    @property
    def scale(self) -> int:
        """How often every pixel of the picture is repeated along a side, from the sample's
        metadata; 1 by default.
        """
        given = self.metadata.get("scale", 1)
        whole = isinstance(given, int) and given > 0 and not any(side % given for side in self.size)
        return given if whole else 1

    @property
    def category(self) -> str:
        """One of the benchmark's five categories, from its table of tasks or the sample's metadata;
        "" if unknown.
        """
        known = tasks().get(self.task)
        if known:
            return known.pro if self.pro else known.category
        given = self.metadata.get("category")
        return given if isinstance(given, str) else ""

    @property
    def pro(self) -> bool:
        """Whether it belongs to VBVR-Pro-Bench: a task of VBVR-Bench with a metadata.json."""
        return self.task in tasks() and bool(self.metadata)


@dataclass(frozen=True)
class Task:
    """One of the benchmark's 100 tasks."""

    split: str  # folder of the split
    category: str
    pro: str  # its category in VBVR-Pro-Bench, which differs from VBVR-Bench's


@cache
def tasks() -> dict[str, Task]:
    """The tasks of VBVR-Bench, and of VBVR-Pro-Bench, by the names of their folders."""
    lines = (files("minicos.vbvr") / "tasks.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return {name: Task(split, category, pro) for split, category, pro, name in rows}


@dataclass(frozen=True)
class Found:
    """The content of a folder."""

    root: Path
    samples: tuple[Sample, ...]
    problems: dict[str, str]  # name of a sample that cannot be used -> reason

    def __post_init__(self) -> None:
        names = [sample.name for sample in self.samples]
        if len(set(names)) != len(names):
            raise MinicosError(f"{self.root} holds two samples of one name. Rename one.")


def read(folder: str | Path, truth: bool = True) -> Found:
    """All samples of a folder, ordered by name. Every picture is decoded once, so that a damaged
    one is found now.

    Args:
        truth: also read the headers of the true videos (their frame counts).

    Raises:
        MinicosError: the folder is missing, or contains nothing like a sample.
    """
    root = Path(folder)
    if not root.is_dir():
        raise MinicosError(f"{root} is not a folder. Give the folder that holds the samples.")
    inner = root / "GT"  # some copies of the benchmark have the two splits one level down
    if inner.is_dir() and any((inner / split).is_dir() for split in SPLITS):
        root = inner
    samples, problems = [], {}
    for name, place in sorted(_places(root)):
        try:
            samples.append(_sample(root, name, place, truth))
        except MinicosError as error:
            problems[printable(name)] = str(error)
    if not samples and not problems:
        raise MinicosError(
            f"{root} holds no samples: no folder with a picture and a prompt.txt, and no NAME.png "
            "beside a NAME.txt."
        )
    return Found(root, tuple(samples), problems)


def missing(found: Found) -> list[str]:
    """The samples of VBVR-Bench (100 tasks, five of each) that this folder lacks."""
    there = {sample.name for sample in found.samples}
    every = (f"{t.split}/{name}/{i:05d}" for name, t in tasks().items() for i in range(5))
    return [name for name in every if name not in there]


def other(samples: Sequence[Sample], sample: Sample) -> str:
    """The prompt of the next sample with another prompt, cyclically, as a swap needs; its own if
    all are equal.
    """
    place = samples.index(sample)
    turned = (*samples[place + 1 :], *samples[:place])
    return next((one.prompt for one in turned if one.prompt != sample.prompt), sample.prompt)


def load_picture(sample: Sample) -> np.ndarray:
    """A sample's first frame: uint8 (h w 3)."""
    return (load_image(sample.image) * 255).round().byte().permute(1, 2, 0).numpy()


def printable(text: str) -> str:
    """Untrusted text for a terminal or a table: control characters and Markdown or HTML markup are
    escaped.
    """
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    for mark in "|<>`":
        shown = shown.replace(mark, f"\\x{ord(mark):02x}")
    return shown


@dataclass(frozen=True)
class _Place:
    """The files of one sample."""

    picture: Path | None
    prompt: Path
    folder: Path | None = None  # its own folder, if it has one


def _places(root: Path) -> Iterator[tuple[str, _Place]]:
    """Every place that looks like a sample, with its name: folders that hold a prompt.txt or a
    first frame, and pairs of files.
    """
    for path, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        folder = Path(path)
        below = folder.relative_to(root).as_posix()
        pictures = sorted(n for n in names if Path(n).suffix.lower() in PICTURES)
        first = [n for n in pictures if Path(n).stem == "first_frame"]
        if "prompt.txt" in names or first:
            others = [n for n in pictures if Path(n).stem != "final_frame"]
            chosen = first or others
            one = folder / chosen[0] if len(chosen) == 1 else None
            yield ("." if below == "." else below), _Place(one, folder / "prompt.txt", folder)
            folders.clear()
            continue
        for name in pictures:
            text = Path(name).with_suffix(".txt").name
            if text in names:
                stem = PurePosixPath(below, Path(name).stem).as_posix()
                yield stem, _Place(folder / name, folder / text)


def _sample(root: Path, name: str, place: _Place, truth: bool) -> Sample:
    """Read one sample. Raises MinicosError naming the file that cannot be used."""
    if printable(name) != name or any(part.startswith("-") for part in PurePosixPath(name).parts):
        raise MinicosError(
            "the name has characters that a table or a terminal would misread. Rename it."
        )
    if place.picture is None:
        raise MinicosError(
            "no first_frame.png, and not exactly one other picture. Add the first frame."
        )
    prompt = _text(_inside(root, place.prompt))
    image = _inside(root, place.picture)
    size = _picture(image)
    video, metadata = None, {}
    if place.folder is not None:
        there = place.folder / "ground_truth.mp4"
        video = _inside(root, there) if truth and there.exists() else None
        metadata = _metadata(root, place.folder / "metadata.json")
    frames = None if video is None else _frames(video)
    return Sample(root.name if name == "." else name, image, prompt, size, video, frames, metadata)


def _inside(root: Path, path: Path) -> Path:
    """The path, if it is a file inside the root, also after following links.

    A snapshot in the Hub's cache consists of links to blobs two levels up, which are accepted.
    """
    home = root.resolve()
    if home.parent.name == "snapshots":
        home = home.parent.parent
    # `resolve` raises RuntimeError for a link to itself, `realpath` leaves it.
    if not Path(os.path.realpath(path)).is_relative_to(home):
        raise MinicosError(
            f"{printable(path.name)} is a link out of the folder. Copy the file instead."
        )
    if not path.is_file():
        raise MinicosError(f"{printable(path.name)} is missing.")
    return path


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(LONGEST_PROMPT + 1)
        prompt = raw.decode("utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise MinicosError(f"{path.name} cannot be read as UTF-8: {error}.") from error
    if not prompt or len(raw) > LONGEST_PROMPT:
        raise MinicosError(f"{path.name} is empty or longer than {LONGEST_PROMPT} bytes.")
    return prompt


def _picture(path: Path) -> tuple[int, int]:
    """Height and width of a picture, which must decode completely."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST_PICTURE:
                raise MinicosError(
                    f"{path.name} has {width}x{height} pixels, more than {LARGEST_PICTURE}."
                )
            image.load()
    except MinicosError:
        raise
    except (
        Exception
    ) as error:  # PIL raises SyntaxError, struct.error, OSError ... for a broken file
        raise MinicosError(f"{path.name} cannot be decoded: {error}.") from error
    return height, width


def _frames(path: Path) -> int:
    """Frames of a video, counted as packets, which needs no decoding."""
    try:
        with (
            path.open("rb") as file,
            av.open(file, options={"protocol_whitelist": "data"}) as video,
        ):
            assert isinstance(video, InputContainer)
            count = sum(packet.size > 0 for packet in video.demux(video=0))
    except (av.FFmpegError, OSError, IndexError) as error:
        raise MinicosError(f"{path.name} cannot be read: {error}.") from error
    if not count:
        raise MinicosError(f"{path.name} holds no frames.")
    return count


def _metadata(root: Path, path: Path) -> dict[str, Any]:
    """metadata.json of VBVR-Pro-Bench, unchanged; {} if there is none."""
    if not path.exists():
        return {}
    try:
        value = json.loads(_inside(root, path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MinicosError(f"{path.name} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise MinicosError(f"{path.name} is not a JSON object.")
    return value
