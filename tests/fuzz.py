"""Damaged and malicious inputs, made from good ones at random: each must open, or be refused in
a sentence.

    python -m tests.fuzz --n 10000                  every target in turn; ends with the numbers of
                                                    each verdict
    python -m tests.fuzz --only pickle --seed 417   one input again, with what it does

A target (`@target`) writes one mutated input into an empty folder and returns the call that opens
it. The command runs them in child processes with limits of processor time and memory, so that a
hang or a blow-up is found and counted, too.
"""

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minicos.errors import MinicosError

Opened = Callable[[], object]
Make = Callable[[random.Random, Path], Opened]
Names = Callable[[str, Path], bool]
SECONDS = 10  # processor time for one input
MEMORY = 3 << 30  # bytes of address space in addition to the initial process


def _names_file(message: str, folder: Path) -> bool:
    return str(folder) in message or len(message) > 1500  # the middle of a long one is left out


@dataclass(frozen=True)
class Target:
    make: Make  # (random numbers, empty folder) -> the call that opens what it has written there
    names: Names  # whether a message names what is wrong


TARGETS: dict[str, Target] = {}


def target(name: str, names: Names = _names_file) -> Callable[[Make], Make]:
    """Register a function as the `make` of a target."""

    def register(make: Make) -> Make:
        TARGETS[name] = Target(make, names)
        return make

    return register


def attempt(name: str, seed: int, folder: Path) -> str:
    """What an input does: "opened", "refused", or what is wrong with how it is refused."""
    try:
        TARGETS[name].make(random.Random(seed), folder)()
        return "opened"
    except MinicosError as error:
        return judge(str(error), folder, TARGETS[name].names)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"TRACEBACK {type(error).__name__}: {str(error)[:200]!a} at {where.filename}:{where.lineno}"


def judge(message: str, folder: Path, names: Names) -> str:
    """A good refusal names what is wrong, can be printed, and is neither empty nor "internal"."""
    if not message.isprintable() or "internal error" in message.lower():
        return f"MESSAGE {message[:200]!a}"
    if not names(message, folder):
        return f"UNNAMED {message[:200]!a}"
    return "refused"


def main() -> int:
    from tests import fuzz_files, fuzz_media, fuzz_options, fuzz_runs  # noqa: F401  (register)

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first input")
    parser.add_argument("--seed", type=int, help="one input of the target --only, in this process")
    parser.add_argument("--only", choices=sorted(TARGETS))
    args = parser.parse_args()
    names = [args.only] if args.only else sorted(TARGETS)
    warnings.simplefilter("ignore")
    if args.seed is not None:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[names[0]].make(random.Random(args.seed), Path(folder))()
        return 0
    jobs = [(names[i % len(names)], i) for i in range(args.first, args.first + args.n)]
    verdicts: Counter[str] = Counter()
    for name, seed, verdict in run(jobs):
        word = verdict.split(" ")[0]
        verdicts[word] += 1
        if word not in ("opened", "refused"):
            print(f"--only {name} --seed {seed}: {verdict}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items())))
    return bool(verdicts.keys() - {"opened", "refused"})


def run(jobs: list[tuple[str, int]]) -> Iterator[tuple[str, int, str]]:
    """Name, seed and verdict of every input."""
    while jobs:
        done = 0
        for done, verdict in enumerate(_batch(jobs), 1):
            yield *jobs[done - 1], verdict
        jobs = jobs[done:]


def _batch(jobs: list[tuple[str, int]]) -> Iterator[str]:
    """The verdicts of the first jobs, until a child process that runs them has to be replaced."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(jobs, writing)
    os.close(writing)
    count = 0
    with os.fdopen(reading, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            count += 1
            yield line.rstrip("\n")
    _, status = os.waitpid(child, 0)
    if count < len(jobs):
        hung = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        yield f"HANG beyond {SECONDS} s" if hung else f"DIED with status {status}"


def _child(jobs: list[tuple[str, int]], writing: int) -> None:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # panics of Rust are printed there
    with tempfile.TemporaryDirectory() as name:
        for target_name, seed in jobs:
            folder = Path(name) / "input"
            folder.mkdir()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(30 * SECONDS)  # in case it waits forever
            verdict = attempt(target_name, seed, folder)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.alarm(0)
            os.write(writing, f"{verdict}\n".encode("utf-8", "replace"))
            shutil.rmtree(folder)
    os._exit(0)


if __name__ == "__main__":
    from tests import fuzz  # so that targets register in the module that they import

    sys.exit(fuzz.main())
