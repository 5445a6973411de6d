"""Run folders: what a command was asked to do, and what it has finished, on disk.

A run is a folder with a `run.json`. A command opens it, asks `run.has("step07.mp4")` before each
piece of work and saves what it makes; killed at any moment and started again with the same
settings, it continues where it was. Four rules make that safe: files appear whole or not at all
(`replace_file`), a folder refuses settings other than its own, it has one owner at a time
(`folder_lock`), and a file is finished only where its checksum says so: one that a full disk or a
power cut left empty or damaged is made again. Checksums are kept beside the files, as `sha256sum
--check` reads them.
"""

import json
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field, replace
from errno import EINVAL
from glob import escape
from hashlib import file_digest, sha256
from pathlib import Path
from shutil import rmtree
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minicos import __version__
from minicos.errors import MinicosError
from minicos.folder_lock import FolderLock, hold
from minicos.journal import Journal
from minicos.signals import finishing

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

T = TypeVar("T")
SCHEMA = 2  # of run folders; those before had no number, and no checksums
RECORD = "run.json"
CHECKSUMS = "checksums.sha256"
PART = ".part-"  # a file being written: .part-<host>-<pid>-<random>-<name>


def replace_file(
    path: Path, write: Callable[[Path], object], move: Callable[[Path, Path], object] = Path.replace
) -> None:
    """Let `write(temporary)` make a file and move it to `path` in one step, so that a killed run
    leaves no half file there.

    Makes the folder if need be. Raises MinicosError where the disk refuses; what else `write`
    raises passes through.
    """
    path = Path(path)
    unfinished = temporary(path)
    try:
        with finishing():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            move(unfinished, path)
    except (OSError, SafetensorError) as error:
        raise MinicosError(
            f"cannot write {path}: {error}. Free the space or choose another place."
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """A new name beside `path`, under which a file or folder is made before it is moved there.

    What killed processes left under such names is removed.
    """
    name = path.name[-80:]
    sweep(path.parent, f"{PART}*-{escape(name)}")
    return path.with_name(f"{PART}{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{name}")


def sweep(folder: Path, pattern: str = f"**/{PART}*") -> None:
    """Remove what killed processes left half made below a folder, or what of it has such a name."""
    for left in folder.glob(pattern):
        with suppress(OSError):  # another process may sweep, too
            if _abandoned(left):
                rmtree(left) if left.is_dir() else left.unlink()


def write_json(path: Path, value: Any, move: Callable[[Path, Path], object] = Path.replace) -> None:
    """Write JSON for people in one step."""
    text = as_json(value)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), move)


def as_json(value: Any) -> str:
    """JSON for people: indented, unicode. Paths become strings."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"


def read_json(path: Path) -> Any:
    """Read JSON. Raises MinicosError where the file is missing or is not JSON."""
    try:
        return json.loads(_content(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise MinicosError(
            f"{path} cannot be read as JSON: {error}. Delete it to have it made again."
        ) from error


@dataclass(frozen=True)
class Run:
    """A run folder. `settings` decide the results and never change; `open` is how one is made."""

    folder: Path
    settings: dict[str, Any]
    lock: FolderLock | None = field(default=None, compare=False, repr=False)
    journal: Journal | None = field(default=None, compare=False, repr=False)  # of --jsonl

    @classmethod
    def open(
        cls,
        folder: str | Path,
        settings: dict[str, Any],
        facts: dict[str, Any] | None = None,
        journal: Journal | None = None,
    ) -> "Run":
        """Create the folder with its run.json, or enter one that has equal settings, and sweep what
        killed runs left.

        `settings` (JSON values and paths) are compared with those on disk; `facts` (device, dtype,
        attention backend ...) are written down with the versions and the date, and are not
        compared. The folder is this process's as long as the run is referred to. Raises
        MinicosError where the folder cannot be written, is in use by another process, holds a run
        with other settings or of another version of minicos, or files of which no run.json says
        what they are.
        """
        folder = Path(folder)
        settings = json.loads(json.dumps(settings, default=str))
        if folder.exists() and not folder.is_dir():
            raise MinicosError(f"{folder} is a file, not a folder. Choose another --out.")
        _check(folder, settings)  # before anything is made
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, settings, hold(folder), journal)
        except OSError as error:
            raise MinicosError(
                f"cannot write into {folder}: {error.strerror or error}. Choose another --out."
            ) from error
        _check(folder, settings)  # again, now that nobody else writes
        if not run.path(RECORD).exists():
            record = {"schema": SCHEMA, "settings": settings, **environment(), **(facts or {})}
            write_json(run.path(RECORD), record, _link)
            _check(folder, settings)
        sweep(folder)
        return run

    def add_sitting(self, seconds: float) -> None:
        """Write down in run.json how long this process worked on the run, and its peak of memory.

        A run that was interrupted has several sittings.
        """
        record = read_json(self.path(RECORD))
        one = {"seconds": round(seconds, 2), **_peak_memory()}
        record["sittings"] = [*record.get("sittings", ()), one]
        write_json(self.path(RECORD), record)

    def inside(self, name: str) -> "Run":
        """A folder in this one for a part of the work, with checksums of its own and the lock of
        the whole.
        """
        return replace(self, folder=self.path(name))

    def log(self, line: Mapping[str, object]) -> None:
        """Add a line to the journal, if there is one."""
        if self.journal is not None:
            self.journal.add({"run": str(self.folder), **line})

    def path(self, name: str) -> Path:
        """Where the file `name` ("steps/03.mp4") of this run is or will be."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Is `name` finished? Only where it is what was recorded, to the last byte."""
        try:
            return self._checksums().get(name) == _checksum(self.path(name))
        except OSError:
            return False

    def record(self, name: str) -> None:
        """Declare `name`, which lies in the folder whole, finished. What `save` makes is so
        already.
        """
        self._note(name, _checksum(self.path(name)))

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write(temporary)` make the file `name`, in one step, and record it.

        The checksum is written down before the file is moved to its place: a kill between the two
        leaves a file that is missing or does not match, never one that is finished and not
        recorded.
        """

        def move(temporary: Path, path: Path) -> None:
            self._note(name, _checksum(temporary))
            temporary.replace(path)

        replace_file(self.path(name), write, move)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors of any shape and dtype as safetensors, in one step."""
        whole = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        }
        self.save(name, lambda temporary: temporary.write_bytes(save(whole)))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `save_tensors`, on the CPU. Raises MinicosError where the file is
        missing or damaged.
        """
        return self._parsed(name, load)

    def save_json(self, name: str, value: Any) -> None:
        text = as_json(value)
        self.save(name, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def load_json(self, name: str) -> Any:
        """The value of `save_json`. Raises MinicosError where the file is missing or damaged."""
        return self._parsed(name, json.loads)

    def _parsed(self, name: str, parse: Callable[[bytes], T]) -> T:
        """What a finished file holds."""
        try:
            return parse(self._read(name))
        except MinicosError:
            raise
        except (ValueError, RecursionError, SafetensorError) as error:  # others made its checksum
            raise MinicosError(
                f"{self.path(name)} cannot be read: {error}. Delete it to have it made again."
            ) from error

    def _read(self, name: str) -> bytes:
        path = self.path(name)
        try:
            data = _content(path)
        except OSError as error:
            raise MinicosError(
                f"{path} cannot be read: {error.strerror or error}. Run the command again to have "
                "it made."
            ) from error
        if self._checksums().get(name) != sha256(data).hexdigest():
            raise MinicosError(
                f"{path} is damaged or not of this run. Run the command again to have it made anew."
            )
        return data

    def _note(self, name: str, checksum: str) -> None:
        """Write down the checksum of a file."""
        known = self._checksums()
        if known.get(name) == checksum:
            return
        file = self.path(CHECKSUMS)
        lines = [f"{c}  {n}\n" for n, c in {**known, name: checksum}.items()]
        if name in known:
            replace_file(file, lambda temporary: temporary.write_bytes("".join(lines).encode()))
            return
        with file.open("ab") as end:
            end.write(lines[-1].encode())

    def _checksums(self) -> dict[str, str]:
        """Name -> checksum of every finished file. A line that a power cut left broken counts
        for nothing.
        """
        try:
            lines = _content(self.path(CHECKSUMS)).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise MinicosError(
                f"{self.path(CHECKSUMS)} cannot be read: {error.strerror}. Choose another --out: "
                "without it nothing says which files are whole."
            ) from error
        pairs = (line.partition("  ") for line in lines)
        return {name: checksum for checksum, _, name in pairs if len(checksum) == 64}


def environment() -> dict[str, str]:
    """The versions that a result depends on, and the date."""
    return {
        "minicos": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def _peak_memory() -> dict[str, int]:
    """The most bytes that this process held, and the most of a CUDA card that it used."""
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_memory"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        peak["peak_cuda_memory"] = torch.cuda.max_memory_allocated()
    return peak


class Progress:
    """How far a command is, told on stderr: a bar on a terminal, elsewhere a line every ten seconds
    or so. One for all parts of a command says how long the whole still takes.

    with Progress(2 * len(work), "belief") as bar:
        for batch in work: ...; bar.tick()
    """

    def __init__(self, total: int | None, label: str = ""):
        self.total, self.label, self.done = total, label, 0
        self._terminal = sys.stderr.isatty()
        self._begin = self._told = time.monotonic()
        self._open = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def begin(self) -> None:
        """Show a terminal that work has begun."""
        if self._terminal and not self._open:
            _tell("\r" + _line(self.label, self.done, self.total, 0.0))
            self._open = True

    def skip(self, count: int) -> None:
        """Parts that were finished before: they say nothing about the time that is left."""
        if self.total is not None:
            self.total -= count

    def tick(self) -> None:
        """One more part is done."""
        self.done += 1
        now = time.monotonic()
        last = self._terminal and self.done == self.total
        if now - self._told >= (0.1 if self._terminal else 10.0) or last:
            self._told, self._open = now, self._terminal
            line = _line(self.label, self.done, self.total, now - self._begin)
            _tell(f"\r{line}" if self._terminal else f"{line}\n")

    def close(self) -> None:
        """End the line of a terminal."""
        if self._open:
            _tell("\n")
        self._open = False


def progress(items: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield `items` and tell how far it is, see `Progress`."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    with Progress(total, label) as bar:
        for item in items:
            bar.begin()
            yield item
            bar.tick()


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _line(label: str, done: int, total: int | None, elapsed: float) -> str:
    """How far it is, times spent and expected included: `denoise [####....] 20/40  1:02 + 1:02`."""
    if not total:
        return f"{label} {done}  {_clock(elapsed)}"
    filled = round(24 * min(done / total, 1))
    left = f" + {_clock(elapsed / done * (total - done))}" if 0 < done < total else ""
    return f"{label} [{'#' * filled:.<24}] {done}/{total}  {_clock(elapsed)}{left:<10}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _check(folder: Path, settings: dict[str, Any]) -> None:
    """Raise MinicosError unless the folder is that of a run with these settings, or can become
    it.
    """
    if (folder / RECORD).exists():
        _same_settings(folder, settings)
        return
    for found in sorted(folder.iterdir()) if folder.exists() else ():
        if not found.name.startswith("."):  # a run.json made now would claim it for any settings
            raise MinicosError(
                f"{folder} holds {found.name!r} and no {RECORD} that says which run it is of. "
                "Choose another --out."
            )


def _link(temporary: Path, path: Path) -> None:
    """Move a file to `path` unless another is there: that one stays, also where there are no
    locks.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        temporary.replace(path)


def _content(path: Path) -> bytes:
    """The bytes of a file. Raises OSError, also for a pipe or a device, which would never end."""
    return _regular(path).read_bytes()


def _regular(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise OSError(EINVAL, "it is not a regular file")
    return path


def _checksum(path: Path) -> str:
    with _regular(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise MinicosError unless the run in the folder is of this version and has these settings."""
    try:
        record = json.loads(_content(folder / RECORD))
    except (OSError, ValueError, RecursionError) as error:
        raise MinicosError(
            f"{folder / RECORD} cannot be read: {error}. Choose another --out: without it nothing "
            "says what the files are."
        ) from error
    there = record.get("settings") if isinstance(record, dict) else None
    if not isinstance(there, dict):
        raise MinicosError(f"{folder / RECORD} is not the record of a run. Choose another --out.")
    if (schema := record.get("schema", 1)) != SCHEMA:
        maker = record.get("minicos", "unknown")
        raise MinicosError(
            f"{folder} was made by minicos {maker} with run folders of schema {schema}, and this "
            f"version reads {SCHEMA}. "
            "Choose another --out, or finish it with that version."
        )
    for name in sorted({*there, *settings}):
        old, new = there.get(name), settings.get(name)
        if old != new:
            raise MinicosError(
                f"{folder} holds a run with {name} = {json.dumps(old)}, and this one has {name} = "
                f"{json.dumps(new)}. "
                "Choose another --out or delete the folder."
            )


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]


def _abandoned(unfinished: Path) -> bool:
    """Was this file being written by a process that is gone? Where that cannot be known, a day
    without a change says so.
    """
    host, pid, *_ = (*unfinished.name.removeprefix(PART).split("-"), "", "")
    if os.name == "posix" and host == _host() and pid.isdigit():
        return not _alive(int(pid))
    return time.time() - unfinished.stat().st_mtime > 24 * 3600


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
