"""Kill real commands at random moments, start-up included, and continue them: nothing may be lost
and no byte may differ.

    python -m tests.kill --n 100

Each trial starts a command that writes files; ends it at a moment that nothing fixes, by kill -9,
Ctrl-C or SIGTERM; runs the same command again, perhaps to be killed once more; and compares every
file with those of a run that was left alone. Finished steps and cases must not have been computed
again. Commands run on one thread, so that last bits agree. One in four is a process of its own, so
that it may also be ended while it starts.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from minicos import cli
from minicos.folder_lock import LOCK
from minicos.media import save_image
from minicos.puzzles import export, make
from minicos.runs import CHECKSUMS, RECORD
from tests import peers

OWN = ("--prompt", "solve the maze", "--image", "../maze.png", "--steps", "4", "--frames", "5")
PUZZLE = ("--size", "3", "--n", "1", "--steps", "2")
COMMANDS = {  # every verb that writes, in each of its forms
    "generate": ("generate", *OWN),
    "generate-cases": ("generate", "--cases", "../cases", "--steps", "2", "--frames", "5"),
    "steps": ("steps", *OWN, "--at", "0,2", "--also", "energy"),
    "steps-puzzles": ("steps", *PUZZLE),
    "energy": ("energy", *OWN, "--at", "0", "--preset", "cos"),
    "energy-puzzles": ("energy", *PUZZLE),
    "attention": ("attention", *OWN, "--at", "1", "--layers", "0,3"),
    "attention-puzzles": ("attention", *PUZZLE),
    "run": ("run", *OWN, "--x0", "--at", "1", "--noise", "step:1", "--seeds", "2"),
    "noise": ("noise", *PUZZLE, "--others", "1"),
    "frames": ("frames", *PUZZLE, "--others", "1", "--counts", "5", "--points", "1"),
    "distilled": ("distilled", *PUZZLE, "--others", "1", "--counts", "2,3", "--points", "1"),
    "swap": ("swap", *PUZZLE, "--puzzle", "mark", "--at", "0,5"),
    "ensemble": ("ensemble", *PUZZLE, "--n", "2", "--choose", "0", "--modes", "update", "--seeds", "2"),
    "commitment": ("commitment", *PUZZLE, "--at", "0,1", "--count", "2"),
    "belief": ("belief", *PUZZLE),
    "plant": ("plant", *PUZZLE, "--at", "0"),
    "recall": ("recall", "--n", "1", "--steps", "2"),
    "behaviours": ("behaviours", "--n", "2", "--rows", "4", "--size", "3", "--steps", "2"),
    "counts": ("counts", "--size", "3", "--n", "1", "--counts", "1,2", "--lengths", "5"),
    "reproduce": ("reproduce", "--only", "energy,steps", "--n", "5", "--workers", "2"),
    "vbvr": ("vbvr", "--puzzles", "2", "--condition", "plain", "static", "--steps", "2", "--every", "0"),
    "capture": ("capture", "--cases", "../cases", "--points", "blocks.6", "--frames", "5", "--steps", "2"),
    "puzzles": ("puzzles", "--kind", "maze", "--kind", "goal", "--n", "2", "--size", "3"),
    "selfcheck": ("selfcheck",),
    "demo": ("demo", "--steps", "4"),
    "peer": ("steps", *OWN, "--model", "../cog", "--frames", "9", "--area", "48x48", "--at", "0"),
}  # fmt: skip
UNTESTED = {"bench": "it writes times"}
OUT = "out"  # in a folder of its own for each trial
TIMED = ("report.txt", "report.json")  # of selfcheck: they hold times
FRESH = 0.25  # of the trials
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def command(name: str) -> list[str]:
    return [*COMMANDS[name], "--out", OUT]


def start(name: str, work: Path, fresh: bool) -> int:
    """Start a command in this folder; its process. A fresh one imports its modules as a user's
    does, the others are forks of this process, which has them. What it says goes to `log`.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.chdir(work)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored by a shell's background jobs
    if fresh:
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        given = [sys.executable, "-m", "minicos", *command(name)]
        os.execve(sys.executable, given, {**os.environ, **environment})
    code = 1
    try:
        code = cli.main(command(name))
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def finish(name: str, work: Path) -> str | None:
    """Run a command to its end in this folder; returns what went wrong, if anything."""
    code = wait(start(name, work, fresh=False))
    return None if code == 0 else f"exit {code}: {(work / 'log').read_text()[-500:]}"


def kill(name: str, work: Path, chance: random.Random, whole: "Undisturbed") -> str | None:
    """Start a command and end it at a random moment; returns what went wrong, if anything."""
    number, fresh = chance.choice(SIGNALS), chance.random() < FRESH
    process = start(name, work, fresh)
    time.sleep(chance.uniform(0, 1.1 * (whole.seconds + fresh * whole.imports)))
    os.kill(process, number)
    code = wait(process)
    lines = (work / "log").read_text().replace("\r", "\n").splitlines()
    if code in (0, -signal.SIGKILL, -number):  # the last: before our first line
        return None
    if code != 128 + number or not lines or not lines[-1].startswith("minicos: st"):
        return f"{number.name}: exit {code}, last line {lines[-1:]}"
    if any("Traceback" in line for line in lines):
        return f"{number.name}: a traceback"
    return None


def contents(work: Path) -> dict[str, bytes]:
    """Every file that a command wrote, except those that name its process and time."""
    folder = work / OUT
    return {
        str(path.relative_to(folder)): _timeless(path)
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != LOCK and path.name not in (LOCK, CHECKSUMS)
    }


def _timeless(path: Path) -> bytes:
    if path.name == RECORD:
        record = json.loads(path.read_bytes())
        return json.dumps([record["schema"], record["settings"]]).encode()
    return b"" if path.name in TIMED else path.read_bytes()


def finished_work(work: Path) -> dict[Path, int]:
    """The numbered steps, cases and shards on disk, with the time at which each was written."""
    return {path: path.stat().st_mtime_ns for path in work.glob(f"{OUT}/*/**/[0-9]*.safetensors")}


@dataclass(frozen=True)
class Undisturbed:
    """What a command does that is left alone: its files, how long it takes, and how long a fresh
    process takes for its imports.
    """

    files: dict[str, bytes]
    seconds: float
    imports: float

    @classmethod
    def of(cls, name: str, work: Path, imports: float) -> "Undisturbed":
        begin = time.monotonic()
        if wrong := finish(name, work):
            sys.exit(f"{name} fails undisturbed: {wrong}")
        return cls(contents(work), time.monotonic() - begin, imports)


def trial(name: str, work: Path, whole: Undisturbed, seed: int) -> str | None:
    """One command, killed once or twice and continued; returns what went wrong, if anything."""
    chance = random.Random(seed)
    for _ in range(chance.choice((1, 1, 2))):
        if wrong := kill(name, work, chance, whole):
            return wrong
    before = finished_work(work)
    if wrong := finish(name, work):
        return wrong
    after, found = finished_work(work), contents(work)
    if again := [path.name for path, when in before.items() if after.get(path) != when]:
        return f"computed again: {again}"
    if found.keys() != whole.files.keys():
        return f"other files: {sorted(found.keys() ^ whole.files.keys())}"
    if differ := [file for file in found if found[file] != whole.files[file]]:
        return f"other bytes: {differ}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="trials (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    whole: dict[str, Undisturbed] = {}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        place, maze = Path(folder), make("maze", 0, size=3, split="test")
        save_image(place / "maze.png", maze.first_frame())
        export(maze, 0, place / "cases" / "00000")
        if "peer" in args.only:  # needs diffusers
            peers.saved(place / "cog")
        begin = time.monotonic()
        wait(start("puzzles", _folder(place, "imports"), fresh=True))
        imports = time.monotonic() - begin
        for i in range(args.n):
            name = args.only[i % len(args.only)]
            if name not in whole:
                whole[name] = Undisturbed.of(name, _folder(place, name), imports)
            lost = trial(name, _folder(place, f"{name}-{i}"), whole[name], args.seed + i)
            wrong += lost is not None
            print(f"{i + 1:4} {name:17} {lost or 'same'}", flush=True)
    print(f"{wrong} of {args.n} lost something or differ")
    return int(bool(wrong))


def _folder(place: Path, name: str) -> Path:
    """A new folder to run a command in: it is in no option, so that files may differ in nothing."""
    folder = place / name
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
