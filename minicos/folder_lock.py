"""A lock that gives a folder one owner at a time, and ends with its process.

The operating system holds the lock, on a file `.lock` in the folder, so a killed process leaves
none behind. On Linux it also works between machines over NFS. The file itself remains and names the
last owner.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from minicos.errors import MinicosError

LOCK = ".lock"


class FolderLock:
    """Held from `hold` until the last reference to it, or its process, is gone."""

    def __init__(self, file: IO[str]):
        self.file = file
        self.process = os.getpid()

    def __del__(self) -> None:
        self.file.close()

    def __reduce__(self) -> tuple:
        """A copy sent to another process holds no lock: the sender's lock covers its workers."""
        return (type(None), ())


# The locks of this process. Opening a folder twice in one process, as notebooks do, takes one lock.
_held: WeakValueDictionary[tuple[int, int], FolderLock] = WeakValueDictionary()


def hold(folder: Path) -> FolderLock | None:
    """Lock an existing folder. Returns None if its file system does not support locks.

    Raises:
        MinicosError: another process holds the lock.
        OSError: the folder cannot be written.
    """
    file = (folder / LOCK).open("a+", encoding="utf-8")
    status = os.fstat(file.fileno())
    mine = _held.get((status.st_dev, status.st_ino))
    if mine is not None and mine.process == os.getpid():  # not one inherited by a fork
        file.close()
        return mine
    try:
        _lock(file)
    except BlockingIOError:
        owner = _owner(file)
        file.close()
        raise MinicosError(
            f"{folder} is in use by another command{owner}. Wait until it ends, stop it, or choose "
            "another --out."
        ) from None
    except OSError:
        file.close()
        return None
    lock = _held[status.st_dev, status.st_ino] = FolderLock(file)
    about = {
        "process": os.getpid(),
        "host": platform.node(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    file.truncate(0)
    # without a buffer: on a full disk, closing the file would write it once more, and fail
    os.write(file.fileno(), f"{json.dumps(about)}\n".encode())
    return lock


def _lock(file: IO[str]) -> None:
    """Take the lock or raise BlockingIOError immediately; any other OSError means that locks are
    not supported.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            file.seek(1 << 20)  # beyond the text, since others cannot read a locked byte
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(str(error)) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(file: IO[str]) -> str:
    """The owner as recorded in the file, for messages."""
    try:
        file.seek(0)
        about = json.loads(file.read(1000))
        host, since = str(about["host"])[:60], str(about["since"])[:20]
        return f" (process {int(about['process'])} on {host!r} since {since})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
