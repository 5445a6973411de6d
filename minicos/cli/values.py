"""The values of options: argparse types that turn text into numbers, with one-sentence errors.

Every bound of an option is here or in `config`. Bounds are far above practical values, and low
enough to refuse a typing error (`--steps 1000000000`) before any work begins.
"""

import argparse
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from minicos.config import LEAST_SHIFT, MOST_FRAMES, MOST_SHIFT, MOST_STEPS

T = TypeVar("T")
MOST_PUZZLES = 100_000  # also the bound of seeds, rows and other counts
MOST_PIXELS = 16_384  # of one side of a frame
MOST_SEED = 2**63 - 1  # the limit of torch's generators, minus room for one seed per sample
LARGEST = 1e6  # bound of guidance, shift and other factors


def or_none(read: Callable[[str], int]) -> Callable[[str], int | None]:
    """A type that accepts what `read` accepts, or the word none."""
    return lambda text: None if text.strip() == "none" else read(text)


def whole(low: int, high: int) -> Callable[[str], int]:
    """A type for whole numbers from `low` to `high`."""

    def read(text: str) -> int:
        digits = text.strip()
        if re.fullmatch(r"[+-]?[0-9]{1,30}", digits) and low <= (value := int(digits)) <= high:
            return value
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a whole number from {low} to {high}"
        )

    return read


positive = whole(1, MOST_PUZZLES)
steps = whole(1, MOST_STEPS)
frames = whole(1, MOST_FRAMES)
side = whole(1, MOST_PIXELS)
layer = whole(0, MOST_STEPS)
seed = whole(0, MOST_SEED - MOST_PUZZLES)


def indices(text: str) -> tuple[int, ...]:
    """Numbers of steps, layers or heads such as 0,5,19: sorted, without repetition. The run checks
    whether they exist.
    """
    if not re.fullmatch(r"\s*-?[0-9]{1,9}\s*(,\s*-?[0-9]{1,9}\s*)*", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a list of numbers such as 0,5,19")
    return tuple(sorted({int(part) for part in text.split(",")}))


def indices_or_none(text: str) -> tuple[int, ...]:
    """The same, or none of them."""
    return () if text.strip() == "none" else indices(text)


def indices_or_all(text: str) -> tuple[int, ...] | Literal["all"]:
    """The same, or all of them."""
    return "all" if text.strip() == "all" else indices(text)


def listed(read: Callable[[str], T], text: str) -> tuple[T, ...]:
    """Values of one type, separated by commas."""
    return tuple(read(part.strip()) for part in text.split(","))


def size(text: str) -> tuple[int, int]:
    """Height and width of "1280x720", which is written width first."""
    match = re.fullmatch(r"\s*([0-9]{1,5})x([0-9]{1,5})\s*", text)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < width <= MOST_PIXELS or not 0 < height <= MOST_PIXELS:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not width x height in pixels, such as 1280x720"
        )
    return height, width


def area(text: str) -> int:
    """The number of pixels of "1280x720"."""
    height, width = size(text)
    return height * width


def number(text: str) -> float:
    """A finite number of at most `LARGEST`."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number")
    if abs(value) > LARGEST:
        raise argparse.ArgumentTypeError(f"{shown(text)} is beyond {LARGEST:.0f}")
    return value


def positive_number(text: str) -> float:
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a positive number")
    return value


def shift(text: str) -> float:
    if not LEAST_SHIFT <= (value := positive_number(text)) <= MOST_SHIFT:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not a number from {LEAST_SHIFT:g} to {MOST_SHIFT:g}"
        )
    return value


def share(text: str) -> float:
    if not 0 < (value := number(text)) < 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number between 0 and 1, e.g. 0.9")
    return value


def guidance(text: str) -> dict[str, float]:
    """The guidance of each expert, from "5" or "high=4,low=3"."""
    if "=" not in text:
        return dict.fromkeys(("high", "low"), number(text))
    pairs = [part.partition("=") for part in text.split(",")]
    if sorted(name for name, _, _ in pairs) != ["high", "low"]:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not guidance for both experts: a number, or e.g. high=4,low=3"
        )
    return {name: number(value) for name, _, value in pairs}


def part(text: str) -> tuple[str, str]:
    """NAME=FILE. A shell leaves a ~ after the = as it is."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(
            f"{shown(text)} is not NAME=FILE, e.g. vae=Wan2.1_VAE.safetensors"
        )
    return name, os.path.expanduser(file)


def lora(text: str) -> tuple[str, tuple[str, float]]:
    """EXPERT=FILE, optionally with :STRENGTH. The text after the last colon is a strength if it is
    a number.
    """
    expert, file = part(text)
    path, _, ending = file.rpartition(":")
    try:
        strength = float(ending)
    except ValueError:
        path = ""  # C:\a.safetensors has a colon too
    if not path:
        return expert, (file, 1.0)
    if not math.isfinite(strength):
        raise argparse.ArgumentTypeError(f"{shown(text)}: the strength {ending} is not a number")
    return expert, (path, strength)


def path(text: str) -> Path:
    """A file or folder; empty text, e.g. from an unset shell variable, is an error.

    `~` becomes the home folder here too, since shells leave it in `--out=~/runs`.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a path")
    return Path(os.path.expanduser(text))


def name(text: str) -> str:
    """A name; empty text, e.g. from an unset shell variable, would choose the default."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a name")
    return text


def shown(text: str) -> str:
    """The given text, quoted and short enough for one line."""
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-10:]}")
