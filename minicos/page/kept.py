"""The content of a run's own files, bounded and typed before a page shows it: a folder may be
damaged, or come from someone else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from minicos.errors import MinicosError
from minicos.media import load_image
from minicos.runs import Run

MOST = 1_000_000  # steps, layers, frames or frames per second; far beyond any run


def wrong(path: Path, what: str) -> MinicosError:
    """The error for an intact file with content that a run does not write."""
    return MinicosError(
        f"{path} is not what a run writes: {what}. Delete it and run the command again."
    )


def number(path: Path, values: Mapping[str, Any], name: str, default: float) -> float:
    """A positive number of a record; the default if it is missing or null."""
    value = values.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value <= MOST:
        raise wrong(path, f'"{name}" is a number above 0, not {str(value)[:40]!r}')
    return value


def objects(run: Run, file: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """The objects of a JSON list, each of which has these names; none if the file is missing."""
    found = run.load_json(file) if run.has(file) else []
    if not isinstance(found, list) or not all(
        isinstance(one, dict) and one.keys() >= {*names} for one in found
    ):
        raise wrong(run.path(file), f"it has to be a list of objects with {', '.join(names)}")
    return found


def indices(path: Path, values: object) -> list[int]:
    """A list of steps, frames or layers."""
    if not isinstance(values, list) or not all(type(i) is int and 0 <= i < MOST for i in values):
        raise wrong(
            path, f"steps, frames and layers are lists of indices, not {str(values)[:40]!r}"
        )
    return values


def inside(run: Run, file: str, name: object) -> Path:
    """A file of the run that is named in another of its files."""
    path = run.path(str(name))
    # `resolve` raises RuntimeError for a link to itself, `realpath` leaves it.
    if "\0" in str(name) or not Path(os.path.realpath(path)).is_relative_to(run.folder.resolve()):
        raise wrong(run.path(file), f"it names {str(name)[:80]!r}, which is not in the folder")
    return path


def table(run: Run, file: str, tensors: Mapping[str, Tensor], name: str, dims: int) -> np.ndarray:
    """A tensor of the run as floats, with this number of axes, none of them empty."""
    found = tensors.get(name)
    if found is None or found.ndim != dims or not found.numel() or found.is_complex():
        has = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
        raise wrong(run.path(file), f'"{name}" {has}, and has to be numbers with {dims} axes')
    return found.float().numpy()


def picture(path: Path) -> np.ndarray | None:
    """A picture of a run folder, uint8 (h w 3); None if it is missing."""
    if not path.exists():
        return None
    pixels = load_image(path).mul(255).round().byte()
    return pixels.permute(1, 2, 0).numpy()
