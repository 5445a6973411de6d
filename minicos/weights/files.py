"""Reading files that may be damaged or malicious: only regular files with a bounded size, and every
error names its file.

`reading` turns all exceptions of other libraries into MinicosError. Does not import torch.
"""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minicos.errors import MinicosError

TABLE = 1 << 25  # bytes of a config.json or an index; published ones have at most a megabyte
PANIC = "PanicException"  # a panic in Rust; not an Exception, and not of a public type


@contextmanager
def reading(
    path: object, wrong: str = "cannot be read", remedy: str = "Download it again."
) -> Iterator[None]:
    """Turn exceptions of a library that reads `path` into "<path> <wrong>: <cause>. <remedy>"."""
    try:
        yield
    except MinicosError:
        raise
    except OSError as error:
        raise MinicosError(f"{path} cannot be read: {cause(error)}. Check the path.") from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise  # Ctrl-C and the like
        raise MinicosError(f"{path} {wrong}: {cause(error)}. {remedy}") from error


@contextmanager
def about(path: object) -> Iterator[None]:
    """Prefix the path to error messages that do not contain it."""
    try:
        yield
    except MinicosError as error:
        raise MinicosError(f"{path}: {error}") from error


def cause(error: BaseException) -> str:
    """The first line of an error's message without a full stop, or its type if it has none."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    text = str(getattr(error, "strerror", None) or error).strip().splitlines()
    first = (text[0] if text else "").removeprefix("Error while deserializing header: ").strip(" .")
    if any(
        one in first for one in ("ncomplete metadata", "MetadataIncomplete", "requires a buffer")
    ):
        return "it is cut off, or longer than its header says"
    if isinstance(error, KeyError):
        return f"{first} is missing"
    return first or type(error).__name__


def regular(path: str | Path) -> Path:
    """The path, if it is a regular file (or a link to one). Raises MinicosError otherwise: a pipe
    or a device would never end.
    """
    path = Path(path)
    with reading(path):
        if path.is_symlink() and not path.exists():
            raise MinicosError(
                f"{path} is a link to {path.readlink()}, which does not exist. Download it again."
            )
        mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise MinicosError(f"{path} is a folder, not a file. Name the file.")
    if not stat.S_ISREG(mode):
        raise MinicosError(f"{path} is not a regular file but a pipe or a device. Name a file.")
    return path


def read_bytes(path: str | Path, limit: int) -> bytes:
    """The content of a regular file. Raises MinicosError if it has more than `limit` bytes."""
    path = regular(path)
    with reading(path), path.open("rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise MinicosError(f"{path} has more than {limit:,} bytes. Download it again.")
    return text


def read_table(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file. Raises MinicosError if it is too large, damaged or not an
    object.
    """
    with reading(path, "is not a table in JSON"):
        return table(read_bytes(path, TABLE))


def table(text: str | bytes) -> dict[str, Any]:
    """The object in a JSON text, without NaN and infinities. Raises ValueError, or RecursionError
    if it is nested too deeply.
    """
    found = json.loads(text, parse_constant=_refuse)
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}")
    return found


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not a number")
