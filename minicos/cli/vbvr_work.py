"""What `minicos vbvr` does before there is anything to score: the work list from the options, and
the models that process it.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from minicos.cli import opening, run_folder, values
from minicos.config import DiTConfig, VAEConfig
from minicos.errors import MinicosError, warn

if TYPE_CHECKING:
    from minicos.journal import Journal
    from minicos.vbvr.cases import Sample
    from minicos.vbvr.conditions import Arm
    from minicos.vbvr.estimate import Model
    from minicos.vbvr.generate import Maker, Making
    from minicos.vbvr.work import Shard, Unit
    from minicos.wan import Wan
    from minicos.weights.layouts import Layout

VARIANTS = {"4step": "Wan2.2-I2V-A14B-4step", "vbvr-lora": "VBVR-Wan2.2"}  # --weights -> variant


class Plan(NamedTuple):
    """The weights that some conditions need: the options that open them, their files, the cost of a
    pass, and the sizes of their videos.
    """

    args: argparse.Namespace
    files: "Layout"
    model: "Model"
    sizes: "Making"


def plan(args: argparse.Namespace, name: str, files: "Layout") -> Plan:
    """The weights with a name: "" for those of --model, else those of --weights with this name, if
    there are any.
    """
    from minicos.vbvr.estimate import Model
    from minicos.vbvr.generate import Making

    given = {entry[0]: [_lora(one) for one in entry[1:]] for entry in args.weights}
    if unknown := sorted(set(given) - set(VARIANTS)):
        raise MinicosError(f"--weights {unknown[0]}: the name is one of {', '.join(VARIANTS)}.")
    if name in given:
        own = {"variant": VARIANTS[name], "lora": given[name], "preset": None}
        args = argparse.Namespace(**{**vars(args), **own})
        files = opening.layout(args)
    elif name == "4step" and args.model.partition(":")[0] == "tiny":  # it is in the package
        args = argparse.Namespace(**{**vars(args), "model": "tiny:distilled", "preset": None})
        files = opening.layout(args)
    longest = args.frames  # a limit here
    args = argparse.Namespace(**{**vars(args), "frames": None})
    dit, vae = files.experts["high"].config, files.vae.config
    if not isinstance(dit, DiTConfig) or not isinstance(vae, VAEConfig):
        raise MinicosError(f"{args.model} is not a video model.")
    preset = opening.plan(args, files)
    sizes = Making.of(files, preset, args.area, longest)
    return Plan(args, files, Model(dit, vae, preset), sizes)


def _lora(text: str) -> tuple[str, tuple[str, float]]:
    try:
        return values.lora(text)
    except argparse.ArgumentTypeError as error:
        raise MinicosError(f"--weights: {error}.") from None


def every(
    args: argparse.Namespace, arms: "Sequence[Arm]", plans: Mapping[str, Plan]
) -> dict[str, list[int]]:
    """For each condition, the steps whose clean estimates are written. Raises MinicosError for a
    step that no run has.
    """
    steps = {a.name: a.steps(plans[a.weights].model.preset) for a in arms if not a.baseline}
    if args.every is None or not steps:
        return {}
    most = max(steps.values())
    asked = range(most) if args.every == "all" else opening.within(args.every, most, "--every ")
    return {name: [step for step in asked or () if step < count] for name, count in steps.items()}


def listed(
    args: argparse.Namespace,
    arms: "Sequence[Arm]",
    samples: "Mapping[str, Sample]",
    plans: Mapping[str, Plan],
    part: "Shard",
) -> "tuple[Maker, list[Unit]]":
    """Who makes the units, and the units."""
    from minicos.vbvr.finished import Finished
    from minicos.vbvr.generate import Maker
    from minicos.vbvr.work import Job, units

    seeds = args.seeds or [args.seed]
    named = {arm.name: arm for arm in arms}
    maker = Maker(
        Finished(args.out, part.name),
        samples,
        named,
        every=every(args, arms, plans),
        main_seed=seeds[0],
        own_seeds=args.puzzles is not None,
    )
    made, still = {}, {}
    for arm in arms:
        if arm.baseline:
            still[arm.name] = [Job(s.name, (0, *s.size)) for s in samples.values()]
        else:
            made[arm.name] = [plans[arm.weights].sizes.job(s, arm) for s in samples.values()]
    return maker, [*units(made, seeds, _batch(args)), *units(still, seeds[:1], 1)]


def _batch(args: argparse.Namespace) -> int:
    """Samples per pass: many if a single pass is too small to use the whole processor."""
    return args.batch or (10 if args.model.partition(":")[0] == "tiny" else 1)


def make(
    args: argparse.Namespace,
    maker: "Maker",
    mine: "Sequence[Unit]",
    plans: Mapping[str, Plan],
    part: "Shard",
    journal: "Journal | None",
) -> "dict[Unit, str]":
    """Make the videos of this process, one model at a time; returns failures with reasons."""
    from minicos.vbvr import estimate, work
    from minicos.vbvr.conditions import check

    failed: dict[Unit, str] = {}
    waiting = dict.fromkeys(maker.left(mine))
    outlines = {name: opening.outline(one.args, one.files) for name, one in plans.items()}
    for unit in waiting:  # all of them before the first is made, which can take days
        arm = maker.arms[unit.condition]
        outline = outlines[arm.weights]
        if outline is not None and not arm.baseline:
            check(outline, arm, unit.shape[0])
    prices = {
        unit: estimate.operations(
            plans[maker.arms[unit.condition].weights].model,
            unit,
            maker.arms[unit.condition],
            bool(maker.every.get(unit.condition)),
        )
        for unit in mine
    }
    done = len(mine) - len(waiting)
    tell = work.Progress(prices, [unit for unit in mine if unit not in waiting], part)
    for name, one in plans.items():
        left = [unit for unit in waiting if maker.arms[unit.condition].weights == name]
        if again := maker.damaged(left):
            warn(
                f"{len(again)} videos in {args.out} are made again, {again[0].name} first: they "
                "are damaged, or no checksum says that they are not"
            )
        run = [unit for unit in left if not maker.arms[unit.condition].baseline]
        models: dict[str, Wan] = {}
        if run:
            models[name] = opening.load_wan(one.args, one.files)
            _record(one.args, name, models[name], args, maker, part)
        own = replace(maker, models=models)

        def logged(unit: "Unit", own: "Maker" = own) -> None:
            own.make(unit)
            if journal is not None:
                journal.add({"run": str(args.out), "what": "vbvr", "made": str(unit)})

        lost = work.attempt(left, logged, done=done, retries=args.retries, tell=tell)
        done += len(left) - len(lost)
        failed |= lost
    return failed


def _record(
    args: argparse.Namespace,
    name: str,
    wan: "Wan",
    top: argparse.Namespace,
    maker: "Maker",
    part: "Shard",
) -> None:
    """Record how the videos are made, and refuse a folder whose videos were made differently.

    Every shard has its own record, since a run folder belongs to one process; all must agree.
    """
    from minicos.runs import read_json

    place = top.out / "made_with" / (name or "model")
    opened = argparse.Namespace(**{**vars(args), "out": place / part.name, "jsonl": None})
    settings = {
        "area": top.area,
        "frames at most": top.frames,
        "batch": _batch(top),
        "every": sorted({step for steps in maker.every.values() for step in steps}),
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
