"""The one exception for mistakes a user can fix, and the one warning. The command line prints
both in one line.
"""

import difflib
import warnings
from collections.abc import Iterable

LONGEST = 2000  # characters of a message; a file may hold names of any length


class MinicosError(ValueError):
    """One sentence that names what is wrong, and one that says what to do about it.

    Names from files are part of many messages, so a message is made printable here (`printable`).
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


def printable(text: str, longest: int = LONGEST) -> str:
    """`text` with control characters, lone surrogates and the like escaped, and its middle left
    out if it is too long.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]} ... {text[-longest // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The end of an error's first sentence: "; did you mean steps?", or nothing where no name is
    near.
    """
    near = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else ""


class MinicosWarning(UserWarning):
    """Something that was asked for is left out or replaced, and the work goes on."""


def warn(message: str) -> None:
    """Warn of it, at the line that called minicos's function."""
    warnings.warn(MinicosWarning(printable(message)), stacklevel=3)
