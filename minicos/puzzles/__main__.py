"""`python -m minicos.puzzles`: the same as `minicos puzzles`."""

import sys

from minicos.cli import main

if __name__ == "__main__":
    sys.exit(main(["puzzles", *sys.argv[1:]]))
