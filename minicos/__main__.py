"""The `minicos` command, also `python -m minicos`."""

import io
import os
import sys

from minicos import signals


def main() -> int:
    signals.start()
    _open_closed_streams()
    # Figures are files, so no backend is needed; matplotlib fails to import if it is unknown.
    os.environ.pop("MPLBACKEND", None)
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets its code
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    from minicos import cli

    return cli.main()


def _open_closed_streams() -> None:
    """Connect streams that the caller closed (`>&-`) to nothing: Python has None in their place,
    and the next file to be opened would get their number, and with it what libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


if __name__ == "__main__":
    sys.exit(main())
