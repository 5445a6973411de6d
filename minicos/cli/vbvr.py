"""`minicos vbvr`: run a model, or an intervention on it, on the samples of VBVR-Bench, and tabulate
the scores.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from minicos.cli import opening, options, run_folder, study, values, vbvr_work
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.journal import Journal
    from minicos.vbvr.cases import Found, Sample
    from minicos.vbvr.conditions import Arm
    from minicos.vbvr.evalkit import Kit, Scored
    from minicos.vbvr.generate import Maker, Making
    from minicos.vbvr.steps import Estimates
    from minicos.vbvr.work import Shard, Unit
    from minicos.weights.layouts import Layout

NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
HELP = (
    "Run a model on VBVR-Bench, or the embedded model on its own puzzles, and tabulate the scores."
)
EXAMPLES = """\
  # the embedded model's own benchmark, nothing to install
  minicos vbvr --puzzles 50 --condition plain ensemble
  minicos vbvr --data VBVR-Bench --model Video-Reason/VBVR-Wan2.2 --evalkit VBVR-EvalKit \\
    --condition plain ensemble noise:step=10
  # eight cards share the work list; srun also works
  torchrun --nproc-per-node 8 -m minicos vbvr --data VBVR-Bench ...
  # number of videos, bytes and hours, before anything runs
  minicos vbvr --data VBVR-Bench ... --dry-run
  # the score of every step's clean estimate, over sigma
  minicos vbvr --puzzles 10 --condition plain static truth --every all
  # other systems' videos
  minicos vbvr --data VBVR-Bench --condition static truth --evalkit VBVR-EvalKit \\
    --videos sora2=FOLDER
writes OUT/<condition>/<split>/<task>/NNNNN.mp4, table.md, *.csv, table.png, steps.png and
results.json; run again to continue
"""
CONDITIONS = """\
--condition takes plain, ensemble, ensemble:window=0-9, noise:step=10, noise:frame=2, swap:layer=20, frames=33, steps=4, static, truth;
4step and vbvr-lora with their weights (--weights 4step high=FILE low=FILE); or a whole experiment of the paper:
table-1, appendix-a (windows of the ensemble), appendix-b (frame counts), appendix-c (4 steps), figure-3 (noise); see --list-conditions
"""


def add(verbs) -> None:
    parser = options.add_parser(verbs, "vbvr", HELP, f"{EXAMPLES}\n{CONDITIONS}", run)
    data = parser.add_argument_group("samples")
    data.add_argument(
        "--data",
        type=values.path,
        help="a folder of VBVR-Bench, VBVR-Pro-Bench, or of pictures with prompts",
    )
    data.add_argument(
        "--puzzles",
        type=values.positive,
        metavar="N",
        help="or N held-out puzzles of all families, e.g. 500",
    )
    data.add_argument(
        "--limit", type=values.positive, metavar="N", help="only the first N samples of each task"
    )
    data.add_argument(
        "--condition",
        nargs="+",
        default=["plain"],
        metavar="NAME",
        help="what to do, see below (default: plain)",
    )
    data.add_argument(
        "--list-conditions", action="store_true", help="explain each condition, and stop"
    )
    data.add_argument(
        "--weights",
        nargs="+",
        action="append",
        default=[],
        metavar="NAME EXPERT=FILE",
        help="LoRA files of 4step or vbvr-lora",
    )
    data.add_argument(
        "--seeds",
        type=values.seed,
        nargs="+",
        help="seeds of the noise (default: --seed); each except the first has its own trees",
    )
    data.add_argument(
        "--every",
        type=values.indices_or_all,
        metavar="STEPS",
        help="also write and score the clean estimates of these steps, e.g. 0,5,19, or all",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch",
        type=values.positive,
        help="samples per pass (default: 1; the embedded model: 10)",
    )
    work.add_argument(
        "--area",
        type=values.area,
        metavar="WxH",
        help="most pixels in a frame, e.g. 832x480 (default: the preset's, or the sample's own)",
    )
    work.add_argument(
        "--frames", type=values.frames, help="most frames (default: as many as the true video)"
    )
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="make only this part of the list (default: as torchrun or srun say, or all)",
    )
    work.add_argument(
        "--retries",
        type=values.whole(0, 10),
        default=1,
        help="further attempts for a video that failed (default: 1)",
    )
    work.add_argument("--dry-run", action="store_true", help="print the cost, and stop")
    work.add_argument(
        "--tflops",
        type=values.positive_number,
        help="for --dry-run: 10^12 operations per second (default: measured here)",
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--evalkit",
        type=values.path,
        metavar="PATH",
        help="a checkout of Video-Reason/VBVR-EvalKit (or VBVR-Pro-Bench), which scores --data",
    )
    scores.add_argument(
        "--evalkit-python",
        type=values.path,
        metavar="FILE",
        help="the Python that runs it (default: its own .venv, or this one)",
    )
    scores.add_argument(
        "--videos",
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="score these trees of videos, too",
    )
    scores.add_argument(
        "--base", help="the condition that others are compared with (default: the first)"
    )
    scores.add_argument(
        "--published", action="store_true", help="add published numbers of other models as rows"
    )
    study.add_json(parser)
    options.add_model_options(parser, out="runs/vbvr", seed=1)
    options.add_jsonl(parser)


def run(args: argparse.Namespace) -> int:
    from minicos.vbvr import work

    part = work.shard(args.shard, os.environ)
    _choose_card(args, part)
    files = opening.layout(args)
    if args.list_conditions:
        from minicos.vbvr.conditions import described

        print(described(_steps(args, files)))
        return 0
    if (args.data is None) == (args.puzzles is None):
        raise MinicosError(
            "give --data FOLDER, or --puzzles N for the embedded model's own benchmark."
        )
    if args.published and args.data is None:
        raise MinicosError("--published is of VBVR-Bench: leave it out, or give --data.")
    if any(seed == other for seed, other in pairwise(sorted(args.seeds or ()))):
        raise MinicosError("--seeds holds a seed twice; give each once.")
    arms = _arms(args, files)
    kit = _kit(args)
    names = dict.fromkeys(arm.weights for arm in arms)
    plans = {name: vbvr_work.plan(args, name, files) for name in names}
    found = _samples(args, [plans[arm.weights].sizes for arm in arms if not arm.baseline])
    samples = {sample.name: sample for sample in found.samples}
    if kit is not None:
        _fits(kit, found)
    maker, every = vbvr_work.listed(args, arms, samples, plans, part)
    trees = _trees(args, arms, maker)
    estimates = dict(_estimates(args, arms, maker, plans))
    mine = part.of(every)
    if args.dry_run:
        _price(args, plans, arms, mine, samples, max(map(len, maker.every.values()), default=0))
        return 0
    journal = run_folder.journal(args)
    lock = work.hold(args.out, part)
    failed = vbvr_work.make(args, maker, mine, plans, part, journal)
    del lock
    for unit, why in failed.items():
        print(f"minicos: failed: {unit}: {why}", file=sys.stderr)
    if failed:  # no other process is working, and the tables show what there is
        work.wait_for_others(args.out, part)
    elif left := maker.left(every):
        print(
            f"{len(left)} of {len(every)} units are not finished; when all are, run the same "
            "command "
            "once more for the tables."
        )
        return 0
    unscored = _score(args, part, trees, estimates, samples, kit, journal)
    return int(bool(failed or unscored or found.problems))


def _choose_card(args: argparse.Namespace, part: "Shard") -> None:
    """Choose one card per process of a machine, unless the user names one."""
    import torch

    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{part.local % torch.cuda.device_count()}"


def _steps(args: argparse.Namespace, files: "Layout") -> int:
    return args.steps or files.preset(args.preset).steps


def _arms(args: argparse.Namespace, files: "Layout") -> "list[Arm]":
    from minicos.vbvr.conditions import expand

    return expand(args.condition, _steps(args, files))


def _kit(args: argparse.Namespace) -> "Kit | None":
    """The scorer, tested before hours of work depend on it."""
    from minicos.vbvr import evalkit

    if args.evalkit is None or args.dry_run:
        return None
    return evalkit.find(args.evalkit, args.evalkit_python)


def _fits(kit: "Kit", found: "Found") -> None:
    from minicos.vbvr import evalkit

    evalkit.check(kit, found.samples)


def _samples(args: argparse.Namespace, sizes: "Sequence[Making]") -> "Found":
    """The samples of the options; prints which cannot be used, or made in these sizes, and which of
    the benchmark are missing.
    """
    from minicos.vbvr import cases, generate, puzzles

    if args.puzzles is not None and args.dry_run:
        found = puzzles.planned(args.out / "puzzles", args.puzzles)
    else:
        if args.puzzles is not None:
            puzzles.write(args.out / "puzzles", args.puzzles)
        found = cases.read(args.data or args.out / "puzzles")
    found = generate.fitting(found, dict.fromkeys(sizes))
    for name, why in found.problems.items():
        print(f"minicos: {name}: {why}", file=sys.stderr)
    if not found.samples:
        raise MinicosError(f"{found.root} holds no sample that can be used.")
    absent = (
        cases.missing(found)
        if args.data and any(s.task in cases.tasks() for s in found.samples)
        else []
    )
    if absent:
        print(
            f"minicos: {len(absent)} of the benchmark's 500 samples are not in {found.root}",
            file=sys.stderr,
        )
    if args.limit is None:
        return found
    tasks = groupby(found.samples, key=lambda sample: (sample.split, sample.task))
    kept = tuple(one for _, group in tasks for one in list(group)[: args.limit])
    return replace(found, samples=kept)


def _price(
    args: argparse.Namespace,
    plans: "Mapping[str, vbvr_work.Plan]",
    arms: "Sequence[Arm]",
    mine: "Sequence[Unit]",
    samples: "Mapping[str, Sample]",
    every_step: int,
) -> None:
    """Print what this process's units would cost."""
    import torch

    from minicos import cost
    from minicos.vbvr import estimate

    models = {name: plan.model for name, plan in plans.items()}
    device = torch.device(args.device or "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    speed = args.tflops * 1e12 if args.tflops else cost.throughput(device, dtype)
    print(estimate.table(estimate.prices(models, arms, mine, samples, every_step), speed))
    print(
        f"estimates at {speed / 1e12:.3g} * 10^12 operations a second, of the transformer's "
        "passes alone; nothing was run"
    )


def _score(
    args: argparse.Namespace,
    part: "Shard",
    trees: Mapping[str, Path],
    estimates: "Mapping[str, Estimates]",
    samples: "Mapping[str, Sample]",
    kit: "Kit | None",
    journal: "Journal | None",
) -> int:
    """Score every tree, write and print the tables; returns the number of unscored videos."""
    from minicos.analysis import result
    from minicos.page import gather
    from minicos.runs import Run, read_json
    from minicos.vbvr import puzzles, score, table, work

    if kit is None and not all(puzzles.known(sample) for sample in samples.values()):
        print(
            f"videos are in {args.out}; give --evalkit PATH (a checkout of VBVR-EvalKit) to score "
            "them"
        )
        return 0
    try:
        lock = work.hold(args.out, work.SCORES)
    except MinicosError:
        if part.count == 1:
            raise
        print("all units are finished; another process is at the scores and tables")
        return 0
    base = args.base or next(iter(trees))
    scorer = "built in" if kit is None else f"{kit.scorer.name} with OpenCV {kit.opencv}"
    settings = {"samples": len(samples), "scorer": scorer, "base": base, "trees": list(trees)}
    run = Run(args.out, settings, lock, journal)

    def log(name: str, kinds: "Mapping[str, Scored]") -> None:
        for line in score.lines(name, kinds, estimates):
            run.log(line)

    folders = {**trees, **{name: args.out / name for name in estimates}}
    root = args.data or args.out / "puzzles"
    found = score.trees(folders, samples, args.out / "scores", root, kit, log)
    pro = any(sample.pro for sample in samples.values())
    references = table.reference(pro) if args.published else []
    place = sys.stderr if args.json else sys.stdout
    numbers = {}
    # Pages list the files of the folder: they come after the tables of all kinds.
    for kind, where, made in [*score.report(found, samples, run, base, references, estimates)]:
        numbers[kind] = read_json(where / result.FILE)
        for name in ("scores", "differences", "steps") if not args.json else ():
            if made.tables.get(name):
                print(f"\n{kind}: {name}\n{result.table(table.brief(made.tables[name]))}")
        print(f"\n{where / 'table.md'}", file=place)
        about = {"command": args.command, "settings": settings}
        page = gather.write(Run(where, settings), about)
        print(f"{page}  (open it in a browser)", file=place)
    if args.json:
        print(json.dumps(numbers, ensure_ascii=False))
    failed = {name: one.failed for name, one in found["score"].items()}
    for name, ones in failed.items():
        _tell(name, ones)
    return sum(map(len, failed.values()))


def _tell(name: str, failed: Mapping[str, str]) -> None:
    """Print which videos of a tree have no score, and why: one line per reason."""
    for why, count in Counter(failed.values()).items():
        first = next(sample for sample, reason in failed.items() if reason == why)
        more = f" and {count - 1} more" if count > 1 else ""
        print(f"minicos: no score: {name}: {first}{more}: {why}", file=sys.stderr)


def _trees(args: argparse.Namespace, arms: "Sequence[Arm]", maker: "Maker") -> dict[str, Path]:
    """The trees to score: one for each condition and seed, and those of --videos."""
    trees = {}
    for arm in arms:
        for seed in (args.seeds or [args.seed])[: 1 if arm.baseline else None]:
            trees[maker.tree(arm, seed)] = args.out / maker.tree(arm, seed)
    for text in args.videos:
        name, _, folder = text.partition("=")
        if not NAME.fullmatch(name) or name in trees or not Path(folder).is_dir():
            raise MinicosError(
                f"--videos {text}: give NAME=FOLDER, with a name of its own (letters, digits, - "
                "and _) and a folder that exists."
            )
        trees[name] = Path(folder)
    if args.base is not None and args.base not in trees:
        raise MinicosError(f"--base {args.base}: it is none of {', '.join(trees)}.")
    return trees


def _estimates(
    args: argparse.Namespace,
    arms: "Sequence[Arm]",
    maker: "Maker",
    plans: "Mapping[str, vbvr_work.Plan]",
) -> "Iterator[tuple[str, Estimates]]":
    """The trees of clean estimates for every condition and seed, with their steps."""
    from minicos import schedule
    from minicos.vbvr.steps import Estimates

    for arm in arms:
        if arm.baseline:
            continue
        preset = plans[arm.weights].model.preset
        sigmas = schedule.make(preset.solver, arm.steps(preset), preset.shift).sigmas
        for seed in args.seeds or [args.seed]:
            of = maker.tree(arm, seed)
            for step in maker.every.get(arm.name, ()):
                yield f"{of}/steps/step_{step:03d}", Estimates(of, step, sigmas[step])
