"""Ctrl-C and SIGTERM print one line and exit with code 130 or 143, at any point of a command.

`start` is active while modules are imported, `handled` while a command runs. Files appear complete
or not at all (`runs.replace_file`), so a process may end at any moment; SIGTERM, which schedulers
send before a kill, waits for the file that is being written (`finishing`). This file is imported
first, so it imports nothing heavy.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType


class Terminated(BaseException):
    """Raised on SIGTERM, as KeyboardInterrupt is on Ctrl-C."""


def start() -> None:
    """Until `handled`, a signal ends the process, since an import may swallow an exception."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)


@contextmanager
def handled() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt and SIGTERM raise `Terminated`; a second signal ends the
    process. The previous handlers are restored.

    A library in C may replace the exception that a handler raises by one of its own (safetensors
    does: "could not determine the shape"). After a signal, any error counts as that signal. In a
    destructor, where Python prints exceptions and drops them, a signal ends the process.

    Does nothing outside the main thread, where Python cannot handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, _interrupt)
    hook = sys.unraisablehook
    sys.unraisablehook = partial(_dropped, hook)
    _state.arrived = None
    try:
        yield
    except Exception as error:
        if _state.arrived is None:
            raise
        raise _state.arrived from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextmanager
def finishing() -> Iterator[None]:
    """Delay SIGTERM while a file is written. Ctrl-C removes the incomplete file instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.files += 1
    try:
        yield
    finally:
        _state.files -= 1
    if _state.terminated and not _state.files:
        _state.terminated = False
        raise Terminated


class _State:
    """What the handlers know of the main thread; a class, since signals belong to the process."""

    files = 0
    terminated = False  # SIGTERM arrived meanwhile
    arrived: type[BaseException] | None = None  # what the last signal raises


_state = _State()


def _interrupt(number: int, frame: FrameType | None) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _leave)
    if _importing(frame):
        _leave(number, frame)
    _state.arrived = KeyboardInterrupt if number == signal.SIGINT else Terminated
    if number == signal.SIGINT or not _state.files:
        raise _state.arrived
    _state.terminated = True


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"minicos: stopped.\n")
    os._exit(128 + number)


def _dropped(
    hook: Callable[["sys.UnraisableHookArgs"], object], unraisable: "sys.UnraisableHookArgs"
) -> None:
    for number, raised in ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)):
        if unraisable.exc_type is raised:
            _leave(number, None)
    hook(unraisable)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
