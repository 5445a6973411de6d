"""The `minicos` command, also `python -m minicos`."""

import sys

from minicos import signals


def main() -> int:
    signals.start()
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show a character gets its code
        stream.reconfigure(  # type: ignore[union-attr]
            errors="backslashreplace"
        )

    from minicos import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
