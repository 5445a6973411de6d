"""Numbers as they are found, one JSON object per line: `--jsonl FILE`, for pandas, W&B or
TensorBoard.

    {"run": "runs/noise", "part": "000/step_5", "case": 3, "apart": 0.91, "solved": 0.0}
    {"run": "runs/steps", "part": "steps", "step": 7, "sigma": 0.94, "next": {"mean": 0.01, ...}}
    {"run": "runs/noise", "what": "noise", "number": "D: ...", "value": 0.63, "low": 0.58, ...}

The cases of a study (or the steps of a single run) come first, each as soon as its batch is
finished, then the numbers, table rows and curve points of the result. A value is a number, a short
list, or mean, deviation and shape of a longer one. Several runs and processes may append to one
file; each line is written whole, in one call. A line that is already in the file is not written
again, so a run that was killed and restarted leaves neither gaps nor duplicates.

    pandas.read_json("numbers.jsonl", lines=True)
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from hashlib import blake2b
from math import isfinite
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor

from minicos.errors import MinicosError

FEW = 64  # longest list that is written in full


class Journal:
    """A file of JSON lines. Raises MinicosError if the file cannot be written or holds something
    else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        check(self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._seen = _lines(self.path)
        except OSError as error:
            raise _refused(self.path, error) from error

    def add(self, line: Mapping[str, object]) -> None:
        """Append a line unless the file contains it. Raises MinicosError if the disk refuses."""
        raw = json.dumps(plain(line), ensure_ascii=False, default=str).encode() + b"\n"
        if (name := _name(raw)) in self._seen:
            return
        try:
            with self.path.open("ab", buffering=0) as file:  # one write, so lines never mix
                if file.write(raw) != len(raw):
                    raise OSError("the line was cut")
        except OSError as error:
            raise _refused(self.path, error) from error
        self._seen.add(name)


def check(path: Path) -> None:
    """Raise MinicosError if lines cannot be added to this file; nothing is made or changed."""
    check_place(path, "--jsonl")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(1) not in (b"", b"{"):
                raise MinicosError(f"{path} does not hold lines of JSON. Choose another --jsonl.")


def check_place(path: Path, option: str) -> None:
    """Raise MinicosError if no file can be written at a path, which is the value of an option."""
    there = path if path.exists() else nearest(path.parent)
    if path.is_dir() or (there != path and not there.is_dir()):
        raise MinicosError(f"{path} is not a file, and cannot be one. Choose another {option}.")
    if not os.access(there, os.W_OK):
        raise MinicosError(f"cannot write {path}: no permission. Choose another {option}.")


def nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())


def rows(tensors: Mapping[str, Tensor], count: int) -> Iterator[dict[str, object]]:
    """The values of each of `count` cases: those of tensors whose first axis is the cases, and
    scalars that apply to all cases.
    """
    for case in range(count):
        yield {k: brief(v[case] if v.ndim else v) for k, v in sorted(tensors.items())}


def brief(values: Tensor) -> object:
    """Values for a line: a number, a short list, or mean, deviation and shape of many values."""
    if values.numel() <= FEW:
        return values.tolist()
    whole = values.double()
    found = {"mean": whole.mean().item(), "deviation": whole.std(correction=0).item()}
    return found | {"shape": list(values.shape)}


def plain(value: Any) -> Any:
    """The value as JSON types: numpy numbers become Python's, and non-finite numbers null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [plain(v) for v in value]
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return value if not isinstance(value, float) else float(value) if isfinite(value) else None


def _lines(path: Path) -> set[bytes]:
    """Digests of the lines of a file; an incomplete last line is removed."""
    if not path.exists() or not path.stat().st_size:
        path.touch()
        return set()
    with path.open("r+b") as file:
        seen, end = set(), 0
        for line in file:
            if not line.startswith(b"{"):
                raise MinicosError(f"{path} does not hold lines of JSON. Choose another --jsonl.")
            if line.endswith(b"\n"):
                seen.add(_name(line))
                end += len(line)
        if end < os.fstat(file.fileno()).st_size:
            file.truncate(end)
    return seen


def _name(line: bytes) -> bytes:
    return blake2b(line, digest_size=16).digest()


def _refused(path: Path, error: OSError) -> MinicosError:
    return MinicosError(
        f"cannot write {path}: {error.strerror or error}. Free the space or choose another --jsonl."
    )
