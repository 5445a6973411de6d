"""Write puzzles as files: `python -m minicos.puzzles --kind maze --size 4 --n 10 --out FOLDER`.

Each becomes a folder in the layout of VBVR-Bench: first_frame.png, final_frame.png, ground_truth.mp4, prompt.txt.
"""

import argparse
from pathlib import Path

from minicos import puzzles
from minicos.errors import MinicosError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minicos.puzzles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kind",
        choices=puzzles.KINDS,
        action="append",
        help="may be given more than once (default: all)",
    )
    parser.add_argument("--size", type=int, default=4, help="cells along a side (default: 4)")
    parser.add_argument("--split", choices=puzzles.SPLITS, default="test", help="(default: test)")
    parser.add_argument("--n", type=int, default=5, help="puzzles of each kind (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("puzzles"), help="(default: puzzles)")
    args = parser.parse_args()
    try:
        todo = [
            (
                args.out / f"{kind}_{args.size}x{args.size}_{args.split}" / f"{seed:05d}",
                puzzles.make(kind, seed, args.size, args.split),
            )
            for kind in args.kind or puzzles.KINDS
            for seed in range(args.n)
        ]
    except MinicosError as error:
        parser.error(str(error))
    for folder, puzzle in todo:
        if not folder.exists():
            puzzles.export(puzzle, 0, folder)
        print(folder)


if __name__ == "__main__":
    main()
