"""Kill the ranks of `minicos vbvr` at random moments and continue: nothing may be lost, nothing
made twice, and no byte may differ from what one process makes.

    python -m tests.kill_ranks --n 100

Each trial starts one, two or three processes on one folder, with the variables that torchrun sets;
ends some or all of them at moments that nothing fixes; perhaps does so again with another number of
processes; and then lets one process finish. Videos, tables and scores must be those of one process
that was left alone, videos that were finished must not have been made again, and nothing half
written may be left. Processes are forks of this one, which has the modules; `tests/kill.py` kills
commands while they start, too.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from hashlib import sha256
from pathlib import Path

import torch

from minicos import cli
from minicos.folder_lock import LOCK
from minicos.runs import CHECKSUMS, PART
from minicos.vbvr import finished

COMMAND = "vbvr --puzzles 3 --condition plain static --solver euler --steps 2 --batch 1"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)


def start(out: Path, rank: int = 0, ranks: int = 1) -> int:
    """One process of a group, as torchrun would start it; its id."""
    child = os.fork()
    if child:
        return child
    log = os.open(out.with_name(f"{out.name}-{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    code = 1
    try:
        os.chdir(out.parent)  # pages name the command, which is the same in every folder
        code = cli.main([*COMMAND.split(), "--every", "0", "--out", out.name])
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file except those that name a process or its time."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
        and path.name not in (LOCK, CHECKSUMS)
        and not {"made_with", finished.FOLDER} & {*path.parts}
    }


def videos(folder: Path) -> dict[Path, int]:
    """The finished videos with the time at which each was written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.mp4")
        if PART not in str(path) and "puzzles" not in path.parts
    }


def lost(out: Path, whole: dict[str, str], seconds: float, seed: int) -> str | None:
    """One trial; returns what went wrong, if anything."""
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 1, 2))):
        ranks = chance.choice((1, 2, 2, 3))
        group = [start(out, rank, ranks) for rank in range(ranks)]
        time.sleep(chance.uniform(0, 1.2 * seconds))
        for process in chance.sample(group, chance.randint(1, ranks)):
            os.kill(process, chance.choice(SIGNALS))
        for rank, code in enumerate(map(wait, group)):
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                return f"exit {code}: {out.with_name(f'{out.name}-{rank}.log').read_text()[-300:]}"
    before = videos(out)
    if code := wait(start(out)):
        return f"exit {code} at the end: {out.with_name(f'{out.name}-0.log').read_text()[-300:]}"
    after, found = videos(out), contents(out)
    if again := [path.name for path, when in before.items() if after.get(path) != when]:
        return f"made again: {again}"
    if wrong := {k for k in found.keys() | whole.keys() if found.get(k) != whole.get(k)}:
        return f"other files or bytes: {sorted(wrong)}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="trials (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        work, begin = Path(name), time.monotonic()
        if code := wait(start(_out(work / "whole"))):
            sys.exit(f"exit {code} undisturbed: {(work / 'whole/out-0.log').read_text()[-500:]}")
        seconds, whole = time.monotonic() - begin, contents(work / "whole/out")
        print(f"{len(whole)} files in {seconds:.0f} s, undisturbed", flush=True)
        for i in range(args.n):
            failed = lost(_out(work / f"trial-{i}"), whole, seconds, args.seed + i)
            wrong += failed is not None
            print(f"{i + 1:4} {failed or 'same'}", flush=True)
    print(f"{wrong} of {args.n} lost something or differ")
    return int(bool(wrong))


def _out(folder: Path) -> Path:
    folder.mkdir()
    return folder / "out"


if __name__ == "__main__":
    sys.exit(main())
