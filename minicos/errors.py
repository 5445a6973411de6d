"""The one exception for mistakes a user can mend. The command line prints it and exits with code 2."""

import difflib
from collections.abc import Iterable


class MinicosError(ValueError):
    """One sentence that names the thing that is wrong, and one that says what to do about it."""


def suggest(wanted: str, names: Iterable[str]) -> str:
    """The end of an error's first sentence: "; did you mean steps?", or nothing where no name is near."""
    near = difflib.get_close_matches(wanted, list(names), n=3, cutoff=0.4)
    return f"; did you mean {', '.join(near)}?" if near else ""
