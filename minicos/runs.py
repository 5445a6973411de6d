"""Run folders: what a command was asked to do, and what it has finished, on disk.

A run is a folder with a `run.json`. A command opens it, checks `run.has("step07.mp4")` before each
piece of work, and saves the results. If it is killed and started again with the same settings, it
continues. Four rules make that safe: files appear complete or not at all (`replace_file`); a folder
refuses settings other than its own; it has one owner at a time (`folder_lock`); and a file counts
as finished only if its checksum matches, so a file that a full disk or a power cut left empty or
damaged is made again. Checksums are stored in the folder in the format of `sha256sum --check`.
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
from numbers import Integral, Real
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
SCHEMA = 2  # of run folders; earlier ones had neither this number nor checksums
RECORD = "run.json"
CHECKSUMS = "checksums.sha256"
PART = ".part-"  # a file being written: .part-<host>-<pid>-<random>-<name>


def replace_file(
    path: Path, write: Callable[[Path], object], move: Callable[[Path, Path], object] = Path.replace
) -> None:
    """Let `write(temporary)` make a file and move it to `path` atomically, so that a killed run
    leaves no incomplete file there. Creates the folder if necessary.

    Raises:
        MinicosError: the disk refuses. Other exceptions of `write` are passed on.
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
    """A new name next to `path`, under which a file or folder is made before it is moved there.

    Removes files with such names that killed processes left behind.
    """
    name = path.name[-80:]
    sweep(path.parent, f"{PART}*-{escape(name)}")
    return path.with_name(f"{PART}{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{name}")


def sweep(folder: Path, pattern: str = f"**/{PART}*") -> None:
    """Remove unfinished files of killed processes below a folder, or those that match `pattern`."""
    for left in folder.glob(pattern):
        with suppress(OSError):  # another process may do the same
            if _abandoned(left):
                rmtree(left) if left.is_dir() else left.unlink()


def write_json(path: Path, value: Any, move: Callable[[Path, Path], object] = Path.replace) -> None:
    """Write readable JSON atomically."""
    text = as_json(value)
    replace_file(
        path, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"), move
    )


def as_json(value: Any) -> str:
    """Readable JSON: indented, unicode; see `_simple`."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=_simple) + "\n"


def _simple(value: Any) -> object:
    """A value that JSON lacks: numpy's numbers become Python's, all else becomes text."""
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else str(value)


def read_json(path: Path) -> Any:
    """Read JSON. Raises MinicosError if the file is missing or is not JSON."""
    try:
        return json.loads(_content(Path(path)))
    except (OSError, ValueError, RecursionError) as error:
        raise MinicosError(
            f"{path} cannot be read as JSON: {error}. Delete it to have it made again."
        ) from error


@dataclass(frozen=True)
class Run:
    """A run folder. `settings` determine the results and never change. Made by `Run.open`."""

    folder: Path
    settings: dict[str, Any]
    lock: FolderLock | None = field(default=None, compare=False, repr=False)
    journal: Journal | None = field(default=None, compare=False, repr=False)  # of --jsonl
    checksums: str = CHECKSUMS  # the file that holds them, in the folder

    @classmethod
    def open(
        cls,
        folder: str | Path,
        settings: dict[str, Any],
        facts: dict[str, Any] | None = None,
        journal: Journal | None = None,
    ) -> "Run":
        """Create the folder and its run.json, or open one with equal settings, and remove
        unfinished files of killed runs. The folder belongs to this process as long as the run is
        referenced.

        Args:
            settings: JSON values and paths, compared with those on disk.
            facts: device, dtype, attention backend and the like, stored together with versions and
                date, but not compared.

        Raises:
            MinicosError: the folder cannot be written, is in use by another process, holds a run
                with other settings or of another version of minicos, or holds files without a
                run.json. Or `folder` is no path, or JSON cannot hold `settings`.
        """
        folder, settings = _given(folder, settings)
        if folder.exists() and not folder.is_dir():
            raise MinicosError(f"{folder} is a file, not a folder. Choose another --out.")
        _check(folder, settings)  # before anything is written
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder, settings, hold(folder), journal)
        except (OSError, ValueError) as error:
            if isinstance(error, MinicosError):
                raise
            reason = getattr(error, "strerror", None) or error  # ValueError: a name with a NUL
            raise MinicosError(
                f"cannot write into {folder}: {reason}. Choose another --out."
            ) from error
        _check(folder, settings)  # again, now that this process owns the folder
        if not run.path(RECORD).exists():
            record = {"schema": SCHEMA, "settings": settings, **environment(), **(facts or {})}
            write_json(run.path(RECORD), record, _link)
            _check(folder, settings)
        sweep(folder)
        return run

    def add_sitting(self, seconds: float) -> None:
        """Record in run.json how long this process worked on the run, and its peak memory.

        A run that was interrupted has several sittings.
        """
        record = read_json(self.path(RECORD))
        one = {"seconds": round(seconds, 2), **_peak_memory()}
        record["sittings"] = [*record.get("sittings", ()), one]
        write_json(self.path(RECORD), record)

    def inside(self, name: str) -> "Run":
        """A subfolder for a part of the work, with its own checksums and the lock of this run."""
        return replace(self, folder=self.path(name))

    def log(self, line: Mapping[str, object]) -> None:
        """Add a line to the journal, if there is one."""
        if self.journal is not None:
            self.journal.add({"run": str(self.folder), **line})

    def path(self, name: str) -> Path:
        """The path of the file `name` ("steps/03.mp4") of this run, which need not exist yet."""
        return self.folder / name

    def has(self, name: str) -> bool:
        """Whether `name` is finished: it exists and matches its recorded checksum."""
        try:
            return self.recorded().get(name) == checksum(self.path(name))
        except OSError:
            return False

    def recorded(self) -> dict[str, str]:
        """Name -> checksum of every finished file. A line that a power cut left incomplete is
        ignored.
        """
        try:
            lines = _content(self.path(self.checksums)).decode(errors="replace").splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise MinicosError(
                f"{self.path(self.checksums)} cannot be read: {error.strerror}. Choose another "
                "--out: without it nothing says which files are whole."
            ) from error
        pairs = (line.partition("  ") for line in lines)
        return {name: checksum for checksum, _, name in pairs if len(checksum) == 64}

    def record(self, name: str) -> None:
        """Record a complete file `name` in the folder as finished. `save` does this by itself."""
        self._note(name, checksum(self.path(name)))

    def save(self, name: str, write: Callable[[Path], object]) -> None:
        """Let `write(temporary)` make the file `name` atomically, and record it.

        The checksum is recorded before the file is moved to its place: a kill between the two
        leaves a file that is missing or does not match, and never a finished file that is not
        recorded.
        """

        def move(temporary: Path, path: Path) -> None:
            self._note(name, checksum(temporary))
            temporary.replace(path)

        replace_file(self.path(name), write, move)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors of any shape and dtype as safetensors, atomically. Raises MinicosError for
        what is no tensor in memory.
        """
        for key, value in tensors.items():
            if not isinstance(value, Tensor) or value.is_meta:
                raise MinicosError(
                    f"{self.path(name)}: {key} is no tensor in memory: {value!r:.80}"
                )
        whole = {
            k: v.detach().cpu().clone(memory_format=torch.contiguous_format)
            for k, v in tensors.items()
        }
        self.save(name, lambda temporary: temporary.write_bytes(save(whole)))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `save_tensors`, on the CPU. Raises MinicosError if the file is missing or
        damaged.
        """
        return self._parsed(name, load)

    def save_json(self, name: str, value: Any) -> None:
        """Save a JSON value, atomically."""
        text = as_json(value)
        self.save(name, lambda temporary: temporary.write_text(text, "utf-8", "backslashreplace"))

    def load_json(self, name: str) -> Any:
        """The value of `save_json`. Raises MinicosError if the file is missing or damaged."""
        return self._parsed(name, json.loads)

    def _parsed(self, name: str, parse: Callable[[bytes], T]) -> T:
        """The parsed content of a finished file."""
        try:
            return parse(self._read(name))
        except MinicosError:
            raise
        except (ValueError, RecursionError, SafetensorError) as error:  # recorded by other means
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
        if self.recorded().get(name) != sha256(data).hexdigest():
            raise MinicosError(
                f"{path} is damaged or not of this run. Run the command again to have it made anew."
            )
        return data

    def _note(self, name: str, checksum: str) -> None:
        """Record the checksum of a file."""
        known = self.recorded()
        if known.get(name) == checksum:
            return
        file = self.path(self.checksums)
        lines = [f"{c}  {n}\n" for n, c in {**known, name: checksum}.items()]
        if name in known:
            replace_file(file, lambda temporary: temporary.write_bytes("".join(lines).encode()))
            return
        with file.open("ab") as end:
            end.write(lines[-1].encode())


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
    """The peak memory of this process, and of a CUDA card, in bytes."""
    peak = {}
    if resource is not None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak["peak_memory"] = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if torch.cuda.is_available():
        peak["peak_cuda_memory"] = torch.cuda.max_memory_allocated()
    return peak


class Progress:
    """Progress on stderr: a bar on a terminal, otherwise a line about every ten seconds. A single
    bar for all parts of a command estimates the total time.

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
        """Show on a terminal that work has begun."""
        if self._terminal and not self._open:
            _tell("\r" + _line(self.label, self.done, self.total, 0.0))
            self._open = True

    def skip(self, count: int) -> None:
        """Count parts that were finished earlier, without using them to estimate the time."""
        if self.total is not None:
            self.total -= count

    def tick(self) -> None:
        """Count one more part."""
        self.done += 1
        now = time.monotonic()
        last = self._terminal and self.done == self.total
        if now - self._told >= (0.1 if self._terminal else 10.0) or last:
            self._told, self._open = now, self._terminal
            line = _line(self.label, self.done, self.total, now - self._begin)
            _tell(f"\r{line}" if self._terminal else f"{line}\n")

    def close(self) -> None:
        """End the line on a terminal."""
        if self._open:
            _tell("\n")
        self._open = False


def progress(items: Iterable[T], total: int | None = None, label: str = "") -> Iterator[T]:
    """Yield `items` and show the progress, see `Progress`."""
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
    """Progress with elapsed and remaining time: `denoise [####....] 20/40  1:02, 1:02 left`."""
    if not total:
        return f"{label} {done}  {_clock(elapsed)}"
    filled = round(24 * min(done / total, 1))
    left = f", {_clock(elapsed / done * (total - done))} left" if 0 < done < total else ""
    return f"{label} [{'#' * filled:.<24}] {done}/{total}  {_clock(elapsed)}{left:<14}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _given(folder: object, settings: object) -> tuple[Path, dict[str, Any]]:
    """What `Run.open` was given, with settings as JSON holds them."""
    try:
        path = Path(folder)  # type: ignore[arg-type]
        path.exists()  # raises for a name that is too long
        held = dict(settings)  # type: ignore[call-overload]
        return path, json.loads(json.dumps(held, default=_simple))
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise MinicosError(
            f"a run is made of a folder and a dictionary of settings, not {folder!r:.80} and "
            f"{settings!r:.80}: {error}"
        ) from error


def _check(folder: Path, settings: dict[str, Any]) -> None:
    """Raise MinicosError unless the folder holds a run with these settings, or can become one."""
    listed = sorted(folder.iterdir()) if folder.exists() else []
    if (folder / RECORD).exists():  # looked for after listing: another command may be writing it
        _same_settings(folder, settings)
        return
    for found in listed:
        if not found.name.startswith("."):  # a new run.json would claim it under any settings
            raise MinicosError(
                f"{folder} holds {found.name!r} and no {RECORD} that says which run it is of. "
                "Choose another --out."
            )


def _link(temporary: Path, path: Path) -> None:
    """Move a file to `path` unless one is already there, which is kept; safe without locks."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        temporary.replace(path)


def _content(path: Path) -> bytes:
    """The bytes of a file. Raises OSError also for a pipe or a device, which would never end."""
    return _regular(path).read_bytes()


def _regular(path: Path) -> Path:
    if path.exists() and not path.is_file():
        raise OSError(EINVAL, "it is not a regular file")
    return path


def checksum(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal. Raises OSError, also for what is no regular file."""
    with _regular(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise MinicosError unless the run in the folder has this version and these settings."""
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
        if old != new and (said := json.dumps(old)) != (asked := json.dumps(new)):  # NaN is NaN
            raise MinicosError(
                f"{folder} holds a run with {name} = {said}, and this one has {name} = {asked}. "
                "Choose another --out or delete the folder."
            )


def _host() -> str:
    return "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40]


def _abandoned(unfinished: Path) -> bool:
    """Whether the process that was writing this file is gone. If that cannot be determined, a file
    counts as abandoned after a day without a change.
    """
    host, pid, *_ = (*unfinished.name.removeprefix(PART).split("-"), "", "")
    if os.name == "posix" and host == _host() and pid.isdigit():
        return not _alive(int(pid))
    return time.time() - unfinished.stat().st_mtime > 24 * 3600


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 only checks
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
