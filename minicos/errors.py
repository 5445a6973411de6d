"""The exception for mistakes that a user can fix, and the warning. The command line prints either
in one line.
"""

import difflib
import warnings
from collections.abc import Iterable

LONGEST = 2000  # characters of a message; names in files can have any length


class MinicosError(ValueError):
    """A mistake that a user can fix. The message names the problem and then the remedy.

    Many messages contain names from files, so every message is made printable (`printable`).
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class SampleError(MinicosError):
    """A mistake in one sample, such as a damaged file, which says nothing about the others."""


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a lack of memory. Recognised by name, since the type is torch's and torch may
    not be imported.
    """
    kind = type(error).__name__
    return kind in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in str(error)


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with control characters, lone surrogates and the like escaped, and shortened in the
    middle if it is too long.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The end of a sentence, "; did you mean steps?", or "" if no name is similar."""
    near = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else ""


class MinicosWarning(UserWarning):
    """Something requested was left out or replaced; the work continues."""


def warn(message: str) -> None:
    """Issue a MinicosWarning that points at the line that called minicos."""
    warnings.warn(MinicosWarning(printable(message)), stacklevel=3)
