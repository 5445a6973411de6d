"""Run folders: what a command was asked to do, and what it has finished, on disk.

A run is a folder with a `run.json`. A command opens it, asks `run.has("step07.mp4")` before each piece of work and saves
what it makes; killed at any moment and started again with the same settings, it continues where it was. Two rules make
that safe: files appear whole or not at all (`replace_file`), and a folder refuses settings other than its own.
"""

import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from minicos import __version__
from minicos.errors import MinicosError

T = TypeVar("T")
PART = ".part-"  # a file being written: .part-<host>-<pid>-<random>-<name>


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary)` make a file and move it to `path` in one step, so that a killed run leaves no half file there.

    Makes the folder if need be. Raises MinicosError where the disk refuses; what else `write` raises passes through.
    """
    path = Path(path)
    temporary = path.with_name(
        f"{PART}{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{path.name[-80:]}"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise MinicosError(
            f"cannot write {path}: {error}. Free the space or choose another place."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people (indented, unicode), in one step. Paths become strings."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Read JSON. Raises MinicosError where the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MinicosError(
            f"{path} cannot be read as JSON: {error}. Delete it to have it made again."
        ) from error


@dataclass(frozen=True)
class Run:
    """A run folder. `settings` decide the results and never change; `open` is how one is made."""

    folder: Path
    settings: dict[str, Any]

    @classmethod
    def open(
        cls, folder: str | Path, settings: dict[str, Any], facts: dict[str, Any] | None = None
    ) -> "Run":
        """Create the folder with its run.json, or enter one that has equal settings, and sweep what killed runs left.

        `settings` (JSON values and paths) are compared with those on disk; `facts` (device, dtype, attention backend ...)
        are written down beside the versions and the date, and are not compared.
        Raises MinicosError where the folder cannot be written or holds a run with other settings.
        """
        folder = Path(folder)
        settings = json.loads(json.dumps(settings, default=str))
        record = folder / "run.json"
        if folder.exists() and not folder.is_dir():
            raise MinicosError(f"{folder} is a file, not a folder. Choose another --out.")
        if record.exists():
            _same_settings(folder, read_json(record), settings)
            if not os.access(folder, os.W_OK):
                raise MinicosError(f"cannot write into {folder}. Choose another --out.")
        else:
            write_json(record, {"settings": settings, **environment(), **(facts or {})})
        for left in folder.rglob(f"{PART}*"):
            if _abandoned(left):
                left.unlink(missing_ok=True)
        return cls(folder, settings)

    def path(self, name: str) -> Path:
        """Where the file `name` ("steps/03.mp4") of this run is or will be."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Is `name` finished? Files appear whole, so existing is finished."""
        return self.path(name).exists()

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors of any shape and dtype as safetensors, in one step."""
        whole = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        }
        replace_file(self.path(name), lambda temporary: temporary.write_bytes(save(whole)))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `save_tensors`, on the CPU. Raises MinicosError where the file is missing or damaged."""
        try:
            return load_file(self.path(name))
        except (OSError, SafetensorError) as error:
            raise MinicosError(
                f"{self.path(name)} cannot be read: {error}. Delete it and run again."
            ) from error

    def save_json(self, name: str, value: Any) -> None:
        write_json(self.path(name), value)

    def load_json(self, name: str) -> Any:
        return read_json(self.path(name))


def environment() -> dict[str, str]:
    """The versions that a result depends on, and the date."""
    return {
        "minicos": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def progress(items: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield `items` and tell stderr how far it is: a bar on a terminal, elsewhere a line every ten seconds or so."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    terminal = sys.stderr.isatty()
    begin = told = time.monotonic()
    try:
        for done, item in enumerate(items):
            if terminal and not done:
                _tell("\r" + _line(label, 0, total, 0.0))
            yield item
            now = time.monotonic()
            if now - told >= (0.1 if terminal else 10.0) or (terminal and done + 1 == total):
                told = now
                line = _line(label, done + 1, total, now - begin)
                _tell(f"\r{line}" if terminal else f"{line}\n")
    finally:
        if terminal:
            _tell("\n")


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _line(label: str, done: int, total: int | None, elapsed: float) -> str:
    """How far it is: `denoise [############............] 20/40  1:02 + 1:02`, the times spent and expected."""
    if not total:
        return f"{label} {done}  {_clock(elapsed)}"
    filled = round(24 * min(done / total, 1))
    left = f" + {_clock(elapsed / done * (total - done))}" if 0 < done < total else ""
    return f"{label} [{'#' * filled:.<24}] {done}/{total}  {_clock(elapsed)}{left:<10}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _same_settings(folder: Path, record: Any, settings: dict[str, Any]) -> None:
    there = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(there, dict):
        raise MinicosError(
            f"{folder / 'run.json'} is not the record of a run. Choose another --out or delete {folder}."
        )
    for name in sorted({*there, *settings}):
        old, new = there.get(name), settings.get(name)
        if old != new:
            raise MinicosError(
                f"{folder} holds a run with {name} = {json.dumps(old)}, and this one has {name} = {json.dumps(new)}. "
                "Choose another --out or delete the folder."
            )


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]


def _abandoned(temporary: Path) -> bool:
    """Was this file being written by a process that is gone? Where that cannot be known, a day without a change says so."""
    host, pid, *_ = (*temporary.name.removeprefix(PART).split("-"), "", "")
    if os.name == "posix" and host == _host() and pid.isdigit():
        return not _alive(int(pid))
    return time.time() - temporary.stat().st_mtime > 24 * 3600


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
