"""Ctrl-C and SIGTERM: one line and exit code 130 or 143, from the first line of ours to the last.

`start` is in force while modules are imported, `handled` while a command runs. Files appear whole
or not at all (`runs.replace_file`), so a process may be left at any moment; SIGTERM, with which
schedulers announce a kill, waits for the file that is being written (`finishing`). This file
imports nothing heavy: nothing is imported before it.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is Ctrl-C."""


def start() -> None:
    """Until `handled`, a signal ends the process: an import may lose an exception."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


@contextmanager
def handled() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM `Terminated`; a second signal ends the process. Puts
    handlers back.

    Outside the main thread, where signals are not Python's to handle, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing() -> Iterator[None]:
    """While a file is written, SIGTERM waits until it is there. Ctrl-C does not: its half file
    is removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _write.files += 1
    try:
        yield
    finally:
        _write.files -= 1
    if _write.terminated and not _write.files:
        _write.terminated = False
        raise Terminated


class _Write:
    """What the main thread is writing: signals belong to the process, and so does this."""

    files = 0
    terminated = False  # meanwhile


_write = _Write()


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    if _importing(frame):
        _leave(number, frame)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if not _write.files:
        raise Terminated
    _write.terminated = True


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"minicos: stopped.\n")
    os._exit(128 + number)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
