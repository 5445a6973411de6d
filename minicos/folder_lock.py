"""One owner at a time for a folder: a lock that ends with its process, however that ends.

The lock is the operating system's, on a file `.lock` in the folder, so a process that is killed
leaves none behind. Linux carries it across machines on NFS, too. The file itself stays and names
the last owner.
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
    """Held from `hold` until the last reference to it is gone, or its process is."""

    def __init__(self, file: IO[str]):
        self.file = file
        self.process = os.getpid()

    def __reduce__(self) -> tuple:
        """A copy sent to another process holds nothing: the sender's lock serves its workers."""
        return (type(None), ())


# What this process holds. Opening a folder twice in one process, as notebooks do, takes the lock
# once.
_held: WeakValueDictionary[tuple[int, int], FolderLock] = WeakValueDictionary()


def hold(folder: Path) -> FolderLock | None:
    """Lock a folder that exists. None where its file system keeps no locks.

    Raises MinicosError where another process has it, and OSError where the folder cannot be
    written.
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
    file.write(json.dumps(about) + "\n")
    file.flush()
    return lock


def _lock(file: IO[str]) -> None:
    """Take the lock or raise BlockingIOError at once; another OSError says that there are no
    locks here.
    """
    if sys.platform == "win32":
        import msvcrt

        try:
            file.seek(1 << 20)  # bytes beyond the text: a locked byte cannot be read by others
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(str(error)) from error
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _owner(file: IO[str]) -> str:
    """Who holds it, as far as the file tells."""
    try:
        file.seek(0)
        about = json.loads(file.read(1000))
        host, since = str(about["host"])[:60], str(about["since"])[:20]
        return f" (process {int(about['process'])} on {host!r} since {since})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
