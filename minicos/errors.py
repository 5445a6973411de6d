"""The one exception for mistakes a user can mend. The command line prints it and exits with code 2."""


class MinicosError(ValueError):
    """One sentence that names the thing that is wrong, and one that says what to do about it."""
