"""Kill real commands at random moments, start-up included, and continue them: nothing may be lost
and no byte may differ.

    python -m tests.kill --n 100

Each trial starts a command that writes a run folder, as a user does; ends it at a moment that
nothing fixes, by kill -9, Ctrl-C or SIGTERM; runs the same command again, perhaps to be killed once
more; and compares every file with those of a run that was left alone. Finished steps must not have
been computed again. Commands run on one thread, so that last bits agree.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from minicos import cli
from minicos.folder_lock import LOCK
from minicos.media import save_image
from minicos.puzzles import make
from minicos.runs import CHECKSUMS, PART, RECORD

PROMPT = ("--prompt", "solve the maze", "--image", "maze.png", "--steps", "4", "--frames", "5")
PUZZLE = ("--size", "3", "--n", "1", "--steps", "2")
COMMANDS = {  # every verb that writes a run folder
    "generate": PROMPT,
    "steps": (*PROMPT, "--at", "0,2", "--also", "energy"),
    "energy": (*PROMPT, "--at", "0", "--preset", "cos"),
    "attention": (*PROMPT, "--at", "1", "--layers", "0,3"),
    "run": (*PROMPT, "--x0", "--at", "1", "--noise", "step:1", "--seeds", "2"),
    "noise": (*PUZZLE, "--others", "1"),
    "frames": (*PUZZLE, "--others", "1", "--counts", "5", "--points", "1"),
    "distilled": (*PUZZLE, "--others", "1", "--counts", "2,3", "--points", "1"),
    "swap": (*PUZZLE, "--puzzle", "mark", "--at", "0,5"),
    "ensemble": (*PUZZLE, "--puzzle", "maze", "--choose", "0", "--modes", "update", "--seeds", "2"),
    "commitment": (*PUZZLE, "--at", "0,1", "--count", "2"),
    "belief": PUZZLE,
    "demo": ("--steps", "4"),
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM)


def command(verb: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "minicos", verb, *COMMANDS[verb], "--out", str(out)]


def start(verb: str, out: Path, work: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        command(verb, out),
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def finish(verb: str, out: Path, work: Path) -> str | None:
    """Run a command to its end, in a fork of this process, which has its modules; what went
    wrong, if anything did.
    """
    log = work / "log"
    child = os.fork()
    if not child:
        os.chdir(work)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = 1
        try:
            code = cli.main([verb, *COMMANDS[verb], "--out", str(out)])
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == 0 else f"exit {code}: {log.read_text()[-500:]}"


def kill(verb: str, out: Path, work: Path, chance: random.Random, longest: float) -> str | None:
    """Start a command and end it at a random moment; what went wrong, if anything did."""
    number = chance.choice(SIGNALS)
    process = start(verb, out, work)
    try:
        process.wait(chance.uniform(0, longest))
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    _, err = process.communicate()
    lines = err.decode().replace("\r", "\n").splitlines()
    if process.returncode in (0, -signal.SIGKILL) or number == signal.SIGKILL:
        return None
    if process.returncode == -number:  # before the first line of ours
        return None
    if process.returncode != 128 + number or not lines or not lines[-1].startswith("minicos: st"):
        return f"{number.name}: exit {process.returncode}, last line {lines[-1:]}"
    if any("Traceback" in line for line in lines):
        return f"{number.name}: a traceback"
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, but for what names this process and its time."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (LOCK, CHECKSUMS)
    }
    record = json.loads(files[RECORD])
    return files | {RECORD: json.dumps([record["schema"], record["settings"]]).encode()}


def finished_steps(folder: Path) -> dict[Path, int]:
    """The steps that are on disk, with the time at which each was written."""
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("steps/*.safetensors")
        if not path.name.startswith(PART)
    }


def trial(verb: str, work: Path, whole: dict[str, bytes], seconds: float, seed: int) -> str | None:
    """One command, killed once or twice and continued; what went wrong, if anything did."""
    chance, out = random.Random(seed), work / f"trial-{seed}"
    for _ in range(chance.choice((1, 1, 2))):
        before = finished_steps(out)
        if wrong := kill(verb, out, work, chance, 1.1 * seconds):
            return wrong
    before = finished_steps(out)
    if wrong := finish(verb, out, work):
        return wrong
    after, found = finished_steps(out), contents(out)
    if again := [path.name for path, when in before.items() if after.get(path) != when]:
        return f"computed again: {again}"
    if found.keys() != whole.keys():
        return f"other files: {sorted(found.keys() ^ whole.keys())}"
    if differ := [name for name in whole if found[name] != whole[name]]:
        return f"other bytes: {differ}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100, help="trials (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    wrong = Counter()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_image(work / "maze.png", make("maze", 0, size=3, split="test").first_frame())
        whole, seconds = {}, {}
        for i in range(args.n):
            verb = args.only[i % len(args.only)]
            if verb not in whole:
                if failed := finish(verb, work / verb, work):
                    print(f"{verb} fails undisturbed: {failed}")
                    return 1
                whole[verb], begin = contents(work / verb), time.monotonic()
                start(verb, work / f"{verb}-timed", work).communicate()
                seconds[verb] = time.monotonic() - begin
            failed = trial(verb, work, whole[verb], seconds[verb], args.seed + i)
            wrong[verb] += failed is not None
            print(f"{i + 1:4} {verb:10} {failed or 'same'}", flush=True)
    print(f"{sum(wrong.values())} of {args.n} lost something or differ")
    return int(bool(sum(wrong.values())))


if __name__ == "__main__":
    sys.exit(main())
