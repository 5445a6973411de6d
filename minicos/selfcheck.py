"""Check that a model's weights run correctly here, and report it for an issue.

    print(as_text(selfcheck(minicos.load("Wan2.2-I2V-A14B"))))

The report says what was opened, whether it agrees with diffusers layer by layer, and the outcome of
one short run: finite, resumable bit for bit, within the planned memory.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minicos import attention, cost
from minicos.analysis.tools.record import record
from minicos.errors import MinicosError
from minicos.runs import Run, environment
from minicos.verify import peers, verify
from minicos.wan import Wan

PROMPT = "a ball rolls to the right"
STEPS, FRAMES = 3, 9  # enough for both experts, and for frames that depend on each other
GRID = (3, 4, 6)  # token grid of the comparison


def selfcheck(
    wan: Wan, files: Mapping[str, str] | None = None, frames: int = FRAMES
) -> dict[str, Any]:
    """Check a model. Returns a report of numbers, strings and tables, with the verdict as `ok`.

    Args:
        files: the model's files with their sizes or checksums, copied into the report.
        frames: of the short run.
    """
    try:
        with TemporaryDirectory() as folder:
            run = _short_run(wan, Path(folder), frames)
    except MinicosError as error:  # such as a latent that is no longer finite
        run = {"stopped": str(error)}
    report: dict[str, Any] = {
        "versions": _versions(),
        "machine": _machine(wan),
        "model": _model(wan),
        "files": dict(files or {}),
        "agreement": _agreement(wan),
        "run": run,
    }
    agrees = report["agreement"]["ok"]
    report["ok"] = bool(agrees and run.get("finite") and run.get("resumed bit for bit"))
    return report


def as_text(report: Mapping[str, Any], indent: str = "") -> str:
    """The report as lines of `name: value`, tables indented."""
    lines = []
    for name, value in report.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", as_text(value, f"{indent}  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return "\n".join(line for line in lines if line)


def _versions() -> dict[str, str]:
    found = environment()
    try:
        return found | {peer.__name__: peer.__version__ for peer in peers()}
    except MinicosError as error:
        return found | {"peers": str(error)}


def _machine(wan: Wan) -> dict[str, str]:
    """The device, and its measured speed on matrix products."""
    device = wan.device
    if device.type != "cuda":
        name = f"{torch.get_num_threads()} threads"
    else:
        about = torch.cuda.get_device_properties(device)
        name = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    speed = cost.throughput(device, wan.dtype)
    return {
        "device": f"{device} ({name})",
        "matrix products": f"{speed / 1e12:.2f} TFLOP/s in {str(wan.dtype).removeprefix('torch.')}",
        "attention": attention.describe(wan.ops),
    }


def _model(wan: Wan) -> dict[str, object]:
    return {
        "what": " ".join(repr(wan).split()),
        "weights": wan.weights,
        "loras": ", ".join(map(str, wan.loras)) or "none",
        "notes": "; ".join(wan.notes) or "none",
        "residency": wan.residency.plan.residency,
    }


def _agreement(wan: Wan) -> dict[str, object]:
    """The largest error of each network against diffusers and transformers, or why there is no
    comparison. What is not compared is not ok, unless these are not installed: then nothing
    disagrees.
    """
    try:
        peers()
    except MinicosError as error:
        return {"ok": True, "not compared": str(error)}
    try:
        parts = list(verify(wan, GRID))
    except MinicosError as error:
        return {"ok": False, "not compared": str(error)}
    found: dict[str, object] = {
        "ok": all(part.parted is None and not part.skipped for part in parts)
    }
    for part in parts:
        if part.skipped:
            found[part.name] = part.skipped
        elif part.parted is not None:
            row = part.parted
            found[part.name] = (
                f"parts at {row.point}: {row.rel_l2:.1e}, allowed {row.tolerance:.1e}"
            )
        else:
            worst = max(part.rows, key=lambda row: row.rel_l2)
            found[part.name] = f"{len(part.rows)} points, worst {worst.rel_l2:.1e} at {worst.point}"
    return found


def _short_run(wan: Wan, folder: Path, frames: int) -> dict[str, object]:
    """A few steps, saved and resumed; memory and time compared with the plan."""
    short = wan.with_preset(steps=STEPS, frames=frames)
    condition = short.condition(PROMPT, *_pictures(short))
    noise = short.noise(condition, 0)
    if wan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(wan.device)
    begin = time.monotonic()
    latent = record(
        short, condition, Run.open(folder / "whole", {"weights": wan.weights}), [], noise
    )
    seconds = (time.monotonic() - begin) / STEPS
    begin = time.monotonic()
    video = short.decode(latent)[0]
    decoding = time.monotonic() - begin
    return {
        "of": f"{STEPS} steps, {len(video)} frames of {video.shape[2]}x{video.shape[1]}",
        "finite": bool(torch.isfinite(latent).all()),
        "mean and spread of the latent": f"{latent.mean():.3f}, {latent.std():.3f}",
        "mean level of the frames": f"{np.mean(video):.1f} of 255",
        "resumed bit for bit": _resumed(short, condition, folder / "resumed", noise, latent),
        "seconds a step": round(seconds, 2),
        "seconds of decoding": round(decoding, 2),
        "memory": _memory(wan),
    }


def _pictures(wan: Wan) -> tuple[np.ndarray, ...]:
    """A drawn first frame, if the model takes one: a ball on a floor."""
    if not wan.preset.takes_image:
        return ()
    height, width = wan.preset.size
    y, x = np.mgrid[:height, :width]
    frame = np.where(y[..., None] > 0.7 * height, 120, 220) * np.ones(3)
    ball = (x - 0.2 * width) ** 2 + (y - 0.6 * height) ** 2 < (0.1 * height) ** 2
    frame[ball] = (200, 40, 40)
    return (frame.astype(np.uint8),)


def _resumed(wan: Wan, condition: Any, folder: Path, noise: Tensor, whole: Tensor) -> bool:
    """Whether a run stopped after its first step and resumed from disk ends at the same bits."""
    run = Run.open(folder, {"weights": wan.weights})
    steps = wan.sample(condition, noise=noise)
    first = next(steps)
    run.save_tensors("steps/000.safetensors", {"next": first.next, **first.state.tensors()})
    steps.close()  # type: ignore[attr-defined]
    return torch.equal(record(wan, condition, run, [], noise), whole)


def _memory(wan: Wan) -> str:
    plan = wan.residency.plan
    if wan.device.type != "cuda":
        return f"{plan.weights / 2**30:.2f} GiB of weights"
    peak = torch.cuda.max_memory_allocated(wan.device) / 2**30
    return f"peak {peak:.2f} GiB, planned {plan.peak / 2**30:.2f} GiB"
