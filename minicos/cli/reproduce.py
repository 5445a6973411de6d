"""`minicos reproduce`: every claim of the paper on the embedded model, and one report."""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.cli import options, run_folder, study, values
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.runs import Run

EXAMPLES = """\
  minicos reproduce  # every claim, under 10 minutes on 2 cores
  minicos reproduce --only noise,swap --n 20  # some sections, with few puzzles
  minicos reproduce --full --out runs/full  # 1,000 puzzles for each headline: hours
  python -m minicos.analysis.verdicts runs/reproduce/claims.json  # the headlines as a table
  python -m minicos.analysis.verdicts one/claims.json other/claims.json  # same verdicts?
writes index.html, report.md with its figures, and claims.json: for every claim the effect with its
95 % interval, the ideal observer's value, n, control, verdict, and the command that gives the
number. Sections run in parallel, one per core. If the command is killed, run it again to continue.
"""
SECTIONS = (  # as in `analysis/reproduce.py`, which imports torch
    "belief",
    "steps",
    "counts",
    "commitment",
    "correction",
    "memory",
    "perception",
    "noise",
    "energy",
    "swap",
    "ensemble",
    "frames",
    "variants",
)


def add(verbs) -> None:
    parser = options.add_parser(
        verbs,
        "reproduce",
        "Every claim of the paper with its verdict, in one report.",
        EXAMPLES,
        run,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--n",
        type=values.positive,
        help="puzzles of a headline (default: 100); the most expensive studies use half or a "
        "quarter",
    )
    size.add_argument("--full", action="store_true", help="1,000 puzzles: hours")
    parser.add_argument(
        "--only",
        type=sections,
        default=SECTIONS,
        help=f"some of {','.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=values.whole(0, values.MOST_PUZZLES),
        default=0,
        help="seed of the noise (default: 0)",
    )
    parser.add_argument(
        "--model",
        default="tiny",
        help="the embedded model (default), or a folder with a model trained in the same way",
    )
    parser.add_argument(
        "--workers", type=values.positive, help="sections at a time (default: one per core)"
    )
    parser.add_argument(
        "--out",
        type=values.path,
        default=Path("runs/reproduce"),
        help="run folder; run again to continue (default: runs/reproduce)",
    )
    study.add_json(parser)
    options.add_jsonl(parser)


def sections(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(
            f"no experiment {unknown[0]!r}: take some of {', '.join(SECTIONS)}"
        )
    return names


def run(args: argparse.Namespace) -> None:
    from minicos.analysis import report
    from minicos.analysis.reproduce import AT_LEAST, FULL, N, make, parts
    from minicos.analysis.reproduce import SECTIONS as SECTION
    from minicos.analysis.result import table
    from minicos.analysis.verdicts import table as verdicts
    from minicos.open import load
    from minicos.page.folders import write_sections
    from minicos.runs import Run, read_json

    n = FULL if args.full else args.n or N
    if n < AT_LEAST:
        raise MinicosError(f"--n {n}: the controls need {AT_LEAST} puzzles or more")
    wan = load(args.model, device="cpu")
    if wan.variant != "tiny":
        raise MinicosError(
            f"the puzzles are for the embedded model, not {wan.variant}; the other commands take "
            "it with --model"
        )
    if args.model != "tiny" and "variants" in args.only:
        if args.only == ("variants",):
            raise MinicosError(
                "--only variants: these are the embedded model's, so without --model"
            )
        args.only = tuple(name for name in args.only if name != "variants")
        print("minicos: without variants, which only the embedded model has", file=sys.stderr)
    settings = {"model": wan.variant, "weights": wan.weights, "n": n, "seed": args.seed}
    facts = {"command": args.command, "model_path": args.model}
    folder = Run.open(args.out, settings, facts, run_folder.journal(args))
    begin, spent = time.monotonic(), 0.0
    print(
        f"minicos: {', '.join(args.only)}: a line for each as it is done",
        file=sys.stderr,
        flush=True,
    )
    for name, seconds in compute(args, folder, n):
        spent += seconds
        print(f"{name:12} {seconds:6.0f} s of a core", file=sys.stderr, flush=True)
    found = {
        name: list(
            zip(parts(n, args.seed)[name], make(wan, folder, name, n, args.seed), strict=True)
        )
        for name in SECTIONS
        if name in args.only
    }
    about = f"Made by `{_command(args, args.only, n)}` with minicos's `{wan.variant}` model, weights `{wan.weights}`."
    judged = report.write(folder.folder, found, about, args.model)
    sections = {
        SECTION[name].title: [
            (f"{name}/{part.name}", part.command(args.model), made) for part, made in studies
        ]
        for name, studies in found.items()
    }
    rows = {
        title: verdicts([f.line() for f in judged if f.claim.headline is head])
        for title, head in (("Verdicts on headlines", True), ("Verdicts on other claims", False))
    }
    page = write_sections(folder, args.command, about, rows, sections)
    folder.add_sitting(time.monotonic() - begin)
    if args.json:
        print(json.dumps(read_json(folder.path("claims.json")), ensure_ascii=False))
    elif judged:
        print(table(verdicts([finding.line() for finding in judged])))
    print(
        f"\n{time.monotonic() - begin:.0f} s, {spent:.0f} s of cores: {folder.path('report.md')}  "
        f"{folder.path('claims.json')}  {page}",
        file=sys.stderr if args.json else sys.stdout,
    )


def compute(args: argparse.Namespace, folder: "Run", n: int) -> Iterator[tuple[str, float]]:
    """Run the sections in processes with one thread each, the longest first; yields (name, seconds)
    when they are done.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    from minicos.analysis.reproduce import SECTIONS, work

    order = sorted(args.only, key=lambda name: -SECTIONS[name].seconds)
    workers = min(len(order), args.workers or cores())
    tasks = [(args.model, folder, name, n, args.seed) for name in order]
    if workers == 1:
        yield from (work(*task) for task in tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_live_with_parent) as pool:
        jobs = [pool.submit(work, *task) for task in tasks]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:  # Ctrl-C, or a section that failed: do not wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _live_with_parent() -> None:
    """End a worker with its parent process, and leave Ctrl-C to the parent."""
    import multiprocessing
    import signal
    import threading

    def follow() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  several progress bars in one terminal; mistakes come back as exceptions
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=follow, daemon=True).start()


def _command(args: argparse.Namespace, names: tuple[str, ...], n: int) -> str:
    options = {
        "--model": args.model * (args.model != "tiny"),
        "--only": ",".join(names) * (names != SECTIONS),
        "--n": n,
        "--seed": args.seed,
    }
    return " ".join(
        ["minicos reproduce", *(f"{name} {value}" for name, value in options.items() if value)]
    )
