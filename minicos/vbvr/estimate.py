"""The cost of a work list, before anything runs: videos, bytes on disk, operations and hours,
estimated from shapes alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from minicos import cost
from minicos.analysis import result
from minicos.config import DiTConfig, Preset, VAEConfig
from minicos.vbvr.cases import Sample
from minicos.vbvr.conditions import Arm
from minicos.vbvr.work import Unit

# of the written videos: .031 measured on 24 true videos of the benchmark, more for a model's
BITS_PER_PIXEL = 0.05


@dataclass(frozen=True)
class Model:
    """What determines the cost of a pass."""

    dit: DiTConfig
    vae: VAEConfig
    preset: Preset
    experts: int = 1


def operations(model: Model, unit: Unit, arm: Arm, every_step: bool = False) -> float:
    """Floating-point operations of a unit's passes through the transformer, without VAE and text
    encoder.
    """
    if arm.baseline:
        return 0.0
    frames, height, width = unit.shape
    t, h, w = model.vae.stride
    shape = (len(unit.samples), model.vae.z_dim, (frames - 1) // t + 1, height // h, width // w)
    branches = 1 if all(g == 1 for g in model.preset.guidance.values()) else 2
    passes = arm.passes(model.preset.steps, every_step) * branches
    return float(passes * cost.flops(model.dit, shape))


def size(unit: Unit, samples: Mapping[str, Sample], trees: int = 1) -> float:
    """Bytes of a unit's videos in `trees` trees (the final one, and one for each written step)."""
    pixels = sum(
        s.size[0] * s.size[1] * (s.frames or unit.shape[0])
        for s in map(samples.get, unit.samples)
        if s
    )
    return trees * pixels * BITS_PER_PIXEL / 8


@dataclass(frozen=True)
class Price:
    """The cost of one condition."""

    condition: str
    units: int
    videos: int
    bytes: float
    operations: float


def prices(
    models: Mapping[str, Model],
    arms: Sequence[Arm],
    units: Sequence[Unit],
    samples: Mapping[str, Sample],
    every_step: int = 0,
) -> list[Price]:
    """The cost of each condition. `models` are keyed by the weights of the conditions;
    `every_step` is the number of trees of steps that are also written.
    """
    out = []
    for arm in arms:
        own = [unit for unit in units if unit.condition == arm.name]
        work = sum(operations(models[arm.weights], unit, arm, every_step > 0) for unit in own)
        videos = sum(len(unit.samples) for unit in own) * (1 + every_step)
        room = sum(size(unit, samples, 1 + every_step) for unit in own)
        out.append(Price(arm.name, len(own), videos, room, work))
    return out


def table(rows: Sequence[Price], throughput: float) -> str:
    """Costs and their sum for a terminal; hours at `throughput` operations per second."""
    total = Price(
        "all",
        sum(row.units for row in rows),
        sum(row.videos for row in rows),
        sum(row.bytes for row in rows),
        sum(row.operations for row in rows),
    )
    lines: list[result.Row] = [
        {
            "condition": row.condition,
            "units": row.units,
            "videos": row.videos,
            "MB": round(row.bytes / 1e6, 1),
            "hours": row.operations / throughput / 3600,
        }
        for row in (*rows, total)
    ]
    return result.table(lines)
