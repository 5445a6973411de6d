"""`minicos vbvr`: a model, or an intervention on it, over the samples of VBVR-Bench, and the
tables of its scores.
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from minicos.cli import opening, options, run_folder, values
from minicos.config import DiTConfig, VAEConfig
from minicos.errors import MinicosError

if TYPE_CHECKING:
    from minicos.vbvr.cases import Found, Sample
    from minicos.vbvr.conditions import Arm
    from minicos.vbvr.estimate import Model
    from minicos.vbvr.evalkit import Kit
    from minicos.vbvr.generate import Maker
    from minicos.vbvr.work import Shard, Unit
    from minicos.wan import Wan
    from minicos.weights.layouts import Layout

VARIANTS = {"4step": "Wan2.2-I2V-A14B-4step", "vbvr-lora": "VBVR-Wan2.2"}  # --weights -> what it is
NAME = re.compile(r"[A-Za-z0-9_-]{1,60}")
HELP = "Run a model over VBVR-Bench, or over the embedded model's own benchmark, and tabulate the scores."
EXAMPLES = """\
  minicos vbvr --puzzles 500 --condition plain ensemble                    the embedded model's own benchmark, nothing to install
  minicos vbvr --data VBVR-Bench --model Video-Reason/VBVR-Wan2.2 --condition plain ensemble noise:step=10 --evalkit VBVR-EvalKit
  torchrun --nproc-per-node 8 -m minicos vbvr --data VBVR-Bench ...      eight cards share the work list; srun does, too
  minicos vbvr --data VBVR-Bench ... --dry-run                             units, bytes and hours, before anything runs
  minicos vbvr --data VBVR-Bench --condition static truth --videos sora2=FOLDER --evalkit VBVR-EvalKit    other systems' videos
writes OUT/<condition>/<split>/<task>/NNNNN.mp4, table.md, *.csv, table.png and results.json; run again to continue
"""
CONDITIONS = """\
--condition takes plain, ensemble, ensemble:window=0-9, noise:step=10, noise:frame=2, swap:layer=20, frames=33, steps=4, static, truth;
4step and vbvr-lora with their weights (--weights 4step high=FILE low=FILE); or a whole experiment:
table-1 (plain, ensemble), windows, figure-3 (noise at steps and frames), appendix-b (frame counts), appendix-c (plain, 4step)
"""


def add(verbs) -> None:
    parser = options.add_parser(verbs, "vbvr", HELP, f"{EXAMPLES}\n{CONDITIONS}", run)
    data = parser.add_argument_group("samples")
    data.add_argument(
        "--data",
        type=Path,
        help="a folder of VBVR-Bench, VBVR-Pro-Bench, or of pictures with prompts",
    )
    data.add_argument(
        "--puzzles",
        type=values.positive,
        metavar="N",
        help="or N held-out puzzles over all families, e.g. 500",
    )
    data.add_argument(
        "--limit", type=values.positive, metavar="N", help="the first N samples of each task alone"
    )
    data.add_argument(
        "--condition",
        nargs="+",
        default=["plain"],
        metavar="NAME",
        help="what to do, see below (default: plain)",
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
        help="of the noise (default: --seed); each but the first has its own trees",
    )
    data.add_argument(
        "--every",
        type=values.indices,
        metavar="STEPS",
        help="also write the clean estimates of these steps as trees",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--batch",
        type=values.positive,
        help="samples in one pass (default: 1; the embedded model: 10)",
    )
    work.add_argument(
        "--area",
        type=values.area,
        metavar="WxH",
        help="at most so many pixels in a frame, e.g. 832x480 (default: the preset's, or the "
        "sample's own)",
    )
    work.add_argument(
        "--frames", type=values.frames, help="frames at most (default: as many as the true video)"
    )
    work.add_argument(
        "--shard",
        metavar="I/N",
        help="make this part of the list alone (default: what torchrun or srun say, or all)",
    )
    work.add_argument(
        "--retries",
        type=values.whole(0, 10),
        default=1,
        help="further attempts for a unit that failed (default: 1)",
    )
    work.add_argument("--dry-run", action="store_true", help="say what it would cost, and stop")
    work.add_argument(
        "--tflops",
        type=values.positive_number,
        help="of --dry-run: 10^12 operations a second (default: measured here)",
    )
    scores = parser.add_argument_group("scores")
    scores.add_argument(
        "--evalkit",
        type=Path,
        metavar="PATH",
        help="a checkout of Video-Reason/VBVR-EvalKit, which scores --data",
    )
    scores.add_argument(
        "--evalkit-python",
        type=Path,
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
        "--base", help="the condition that others are held against (default: the first)"
    )
    scores.add_argument(
        "--published", action="store_true", help="add the papers' numbers as reference rows"
    )
    options.add_model_options(parser, out="runs/vbvr", seed=1)


def run(args: argparse.Namespace) -> int:
    from minicos.vbvr import estimate, work

    part = work.shard(args.shard, os.environ)
    _choose_card(args, part)
    if (args.data is None) == (args.puzzles is None):
        raise MinicosError(
            "give --data FOLDER, or --puzzles N for the embedded model's own benchmark."
        )
    if any(seed == other for seed, other in pairwise(sorted(args.seeds or ()))):
        raise MinicosError("--seeds holds a seed twice; give each once.")
    files = opening.layout(args)
    arms = _arms(args, files)
    kit = _kit(args)
    found = _samples(args)
    samples = {sample.name: sample for sample in found.samples}
    plans = {name: _plan(args, name, files) for name in dict.fromkeys(arm.weights for arm in arms)}
    maker, every = _work(args, arms, samples, plans)
    trees = _trees(args, arms, maker)
    mine = part.of(every)
    if args.dry_run:
        models = {name: plan.model for name, plan in plans.items()}
        rows = estimate.prices(models, arms, mine, samples, len(args.every or ()))
        speed = args.tflops * 1e12 if args.tflops else _speed(args)
        print(estimate.table(rows, speed))
        print(
            f"estimates at {speed / 1e12:.3g} * 10^12 operations a second, of the transformer's "
            "passes alone; nothing was run"
        )
        return 0
    with work.alone(args.out, part):
        failed = _make(args, maker, mine, plans, part)
    for unit, why in failed.items():
        print(f"minicos: failed: {unit}: {why}", file=sys.stderr)
    left = sum(not maker.finished(unit) for unit in every)
    if left and part.count > 1:
        print(
            f"{left} of {len(every)} units are not finished; when all are, run the same command "
            "once more for the tables."
        )
        return int(bool(failed))
    unscored = _score(args, trees, samples, kit)
    return int(bool(failed or unscored or found.problems))


def _choose_card(args: argparse.Namespace, part: "Shard") -> None:
    """One card for each process of a machine, where the user names none."""
    import torch

    if args.device is None and torch.cuda.is_available():
        args.device = f"cuda:{part.local % torch.cuda.device_count()}"


def _arms(args: argparse.Namespace, files: "Layout") -> "list[Arm]":
    from minicos.vbvr.conditions import expand

    return expand(args.condition, args.steps or files.preset(args.preset).steps)


def _kit(args: argparse.Namespace) -> "Kit | None":
    """The scorer, tried out before hours of work depend on it."""
    from minicos.vbvr import evalkit

    if args.evalkit is None or args.dry_run:
        return None
    return evalkit.find(args.evalkit, args.evalkit_python)


def _samples(args: argparse.Namespace) -> "Found":
    """The samples of the options; what cannot be used, and what the benchmark has and the folder
    does not, is told.
    """
    from minicos.vbvr import cases, puzzles

    if args.puzzles is not None:
        puzzles.write(args.out / "puzzles", args.puzzles)
    found = cases.read(args.data or args.out / "puzzles")
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


class Plan(NamedTuple):
    """The weights that some conditions ask for: the options that open them, their files, and
    what a pass costs.
    """

    args: argparse.Namespace
    files: "Layout"
    model: "Model"


def _plan(args: argparse.Namespace, name: str, files: "Layout") -> Plan:
    """The weights of a name: "" those of --model, else those of --weights under this name, if it
    gives any.
    """
    from minicos.vbvr.estimate import Model

    given = {entry[0]: [_lora(one) for one in entry[1:]] for entry in args.weights}
    if unknown := sorted(set(given) - set(VARIANTS)):
        raise MinicosError(f"--weights {unknown[0]}: the name is one of {', '.join(VARIANTS)}.")
    if name in given:
        own = {"variant": VARIANTS[name], "lora": given[name], "preset": None}
        args = argparse.Namespace(**{**vars(args), **own})
        files = opening.layout(args)
    args = argparse.Namespace(**{**vars(args), "frames": None})  # here --frames is a limit
    dit, vae = files.experts["high"].config, files.vae.config
    if not isinstance(dit, DiTConfig) or not isinstance(vae, VAEConfig):
        raise MinicosError(f"{args.model} is not a video model.")
    return Plan(args, files, Model(dit, vae, opening.plan(args, files)))


def _lora(text: str) -> tuple[str, tuple[str, float]]:
    try:
        return values.lora(text)
    except argparse.ArgumentTypeError as error:
        raise MinicosError(f"--weights: {error}.") from None


def _work(
    args: argparse.Namespace,
    arms: "Sequence[Arm]",
    samples: "Mapping[str, Sample]",
    plans: Mapping[str, Plan],
) -> "tuple[Maker, list[Unit]]":
    """Who makes the units, and the units."""
    from minicos.vbvr.generate import Maker, Making
    from minicos.vbvr.work import Job, units

    sizes = {}
    for name, plan in plans.items():
        sizes[name] = Making.of(plan.files, plan.model.preset, args.area, args.frames)
    seeds = args.seeds or [args.seed]
    named = {arm.name: arm for arm in arms}
    maker = Maker(
        args.out,
        samples,
        named,
        every=args.every or (),
        main_seed=seeds[0],
        own_seeds=args.puzzles is not None,
    )
    made, still = {}, {}
    for arm in arms:
        if arm.baseline:
            still[arm.name] = [Job(s.name, (0, *s.size)) for s in samples.values()]
        else:
            made[arm.name] = [sizes[arm.weights].job(s, arm) for s in samples.values()]
    return maker, [*units(made, seeds, _batch(args)), *units(still, seeds[:1], 1)]


def _batch(args: argparse.Namespace) -> int:
    """Samples in one pass: many where a pass is too small to fill the processor."""
    return args.batch or (10 if args.model.partition(":")[0] == "tiny" else 1)


def _speed(args: argparse.Namespace) -> float:
    import torch

    from minicos import cost

    device = torch.device(args.device or "cpu")
    return cost.throughput(device, torch.float32 if device.type == "cpu" else torch.bfloat16)


def _make(
    args: argparse.Namespace,
    maker: "Maker",
    mine: "Sequence[Unit]",
    plans: Mapping[str, Plan],
    part: "Shard",
) -> "dict[Unit, str]":
    """Make this process's units, a model at a time. Returns what failed, and why."""
    from minicos.vbvr import estimate, work
    from minicos.vbvr.conditions import check

    failed: dict[Unit, str] = {}
    for name, plan in plans.items():
        units = [unit for unit in mine if maker.arms[unit.condition].weights == name]
        left = [unit for unit in units if not maker.finished(unit)]
        run = [unit for unit in left if not maker.arms[unit.condition].baseline]
        models: dict[str, Wan] = {}
        if run:
            models[name] = opening.load(plan.args, plan.files)
            for unit in run:
                check(models[name], maker.arms[unit.condition], unit.shape[0])
            _record(plan.args, name, models[name], args, part)
        prices = {
            unit: estimate.operations(
                plan.model, unit, maker.arms[unit.condition], bool(args.every)
            )
            for unit in units
        }
        tell = work.Progress(prices, [unit for unit in units if unit not in left], part)
        own = replace(maker, models=models)
        failed |= work.attempt(units, own.finished, own.make, retries=args.retries, tell=tell)
    return failed


def _record(
    args: argparse.Namespace, name: str, wan: "Wan", top: argparse.Namespace, part: "Shard"
) -> None:
    """Write down what the videos are made with, and refuse a folder whose videos were made with
    something else.

    Every shard has a record of its own, since a run folder belongs to one process; all must agree.
    """
    from minicos.runs import read_json

    place = top.out / "made_with" / (name or "model")
    opened = argparse.Namespace(
        **{**vars(args), "out": place / f"shard-{part.index}-of-{part.count}"}
    )
    settings = {
        "area": top.area,
        "frames at most": top.frames,
        "batch": _batch(top),
        "every": top.every,
        "main seed": (top.seeds or [top.seed])[0],
    }
    own = run_folder.open_run(opened, wan, [], **settings)
    for record in sorted(place.glob("shard-*/run.json")):
        there = read_json(record).get("settings", {})
        for key in sorted({*there, *own.settings}):
            if there.get(key) != own.settings.get(key):
                raise MinicosError(
                    f"{top.out} holds videos made with {key} = {there.get(key)!r}, and this run has"
                    f" {own.settings.get(key)!r}. Choose another --out."
                )


def _score(
    args: argparse.Namespace,
    trees: Mapping[str, Path],
    samples: "Mapping[str, Sample]",
    kit: "Kit | None",
) -> int:
    """Score every tree, write and print the tables, and return how many videos have no score."""
    from minicos.analysis import result
    from minicos.vbvr import puzzles, score, table

    if kit is None and not all(puzzles.known(sample) for sample in samples.values()):
        print(
            f"videos are in {args.out}; give --evalkit PATH (a checkout of VBVR-EvalKit) to score "
            "them"
        )
        return 0
    base = args.base or next(iter(trees))
    root = args.data or args.out / "puzzles"
    found = score.trees(trees, samples, args.out / "scores", root, kit)
    scorer = "built in" if kit is None else f"EvalKit with OpenCV {kit.opencv}"
    settings = {"samples": len(samples), "scorer": scorer, "base": base, "trees": list(trees)}
    for kind, where, made in score.report(found, samples, args.out, base, settings, args.published):
        for name in ("scores", "differences"):
            if made.tables[name]:
                print(f"\n{kind}: {name}\n{result.table(table.brief(made.tables[name]))}")
        print(f"\n{where / 'table.md'}")
    failed = {name: one.failed for name, one in found["score"].items()}
    for name, ones in failed.items():
        for sample, why in ones.items():
            print(f"minicos: no score: {name}: {sample}: {why}", file=sys.stderr)
    return sum(map(len, failed.values()))


def _trees(args: argparse.Namespace, arms: "Sequence[Arm]", maker: "Maker") -> dict[str, Path]:
    """What is scored: a tree for each condition and seed, and those of --videos."""
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
