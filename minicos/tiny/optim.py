"""Common parts of the embedded model's training runs: optimiser, learning-rate curve, averaging,
checkpoints, and the loop."""

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minicos.precision import fast_bfloat16
from minicos.runs import replace_file


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised matrix updates (Jordan et al. 2024): all directions of a kernel
    learn equally fast.

    Takes parameters of two or more dimensions; a convolution kernel counts as the matrix (out, in *
    kernel).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            # matrices of one shape are processed together
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in alike.items():
                updates = orthogonalise(
                    torch.stack([self._nesterov(p, group["momentum"]).flatten(1) for p in params])
                )
                for p, update in zip(params, updates, strict=True):
                    p.add_(
                        update.view_as(p), alpha=-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                    )

    def _nesterov(self, p: nn.Parameter, momentum: float) -> Tensor:
        assert p.grad is not None
        average = self.state[p].setdefault("momentum", torch.zeros_like(p))
        average.lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(average, momentum)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrices with singular values near one, by the quintic Newton-Schulz iteration
    of Muon, in bfloat16 where that is fast: n rows columns."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda or fast_bfloat16() else torch.float32)
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).to(x.dtype)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


def optimisers(
    model: nn.Module, muon: Callable[[str, nn.Parameter], bool], muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon for the parameters that `muon(name, parameter)` selects, AdamW for the others; frozen
    parameters are excluded."""
    chosen: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (chosen if muon(name, p) else rest).append(p)
    return [
        Muon(chosen, muon_lr),
        torch.optim.AdamW(rest, adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=False),
    ]


def autocast(device: str) -> torch.autocast:
    """bfloat16 where it is fast: on a card ("cuda"), and on processors with instructions for it."""
    enabled = device != "cpu" or fast_bfloat16()
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


def rate(step: int, steps: int, warmup: int, decay: float) -> float:
    """Factor on the learning rate: linear warm-up, constant, linear to zero over the last `decay`
    share of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def train(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    opts: list[torch.optim.Optimizer],
    *,
    steps: int,
    warmup: int,
    decay: float,
    ema: float,
    folder: Path,
    save_every: int = 1000,
    save_seconds: float = 300,
    keep_every: int | None = None,
    log: Callable[[int, float], str] = lambda step, loss: "",
) -> None:
    """Run the loop to `steps`, resuming from `folder`. Data must depend on the step alone, so that
    a resumed run continues the same one.

    A checkpoint is written every `save_every` steps and every `save_seconds`. Leaves
    `folder/averaged.safetensors`, the exponential average of the parameters, and
    `folder/log.jsonl`; every `keep_every` steps the average is also kept as
    averaged-STEP.safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start = _resume(folder, model, average, opts)
    base = [[g["lr"] for g in o.param_groups] for o in opts]
    total, since, clock = 0.0, 0, time.monotonic()
    saved = clock
    for step in range(start, steps):
        for o, rates in zip(opts, base, strict=True):
            for group, lr in zip(o.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, steps, warmup, decay)
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [p for o in opts for g in o.param_groups for p in g["params"]], 1.0
        )
        for o in opts:
            o.step()
            o.zero_grad(set_to_none=True)
        keep = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(
                list(average.values()), list(model.state_dict().values()), 1 - keep
            )
        total, since = total + loss.item(), since + 1
        if not math.isfinite(total):
            raise FloatingPointError(f"the loss is not finite at step {step}")
        if (step + 1) % 50 == 0:
            seconds = (time.monotonic() - clock) / since
            line = {
                "step": step + 1,
                "loss": round(total / since, 6),
                "seconds_per_step": round(seconds, 3),
            }
            told = f"loss {total / since:.5f}  {seconds:.2f} s/step  {log(step, total / since)}"
            print(f"{step + 1:6d}/{steps}  {told}", flush=True)
            with (folder / "log.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            total, since, clock = 0.0, 0, time.monotonic()
        due = time.monotonic() - saved > save_seconds
        if due or (step + 1) % save_every == 0 or step + 1 == steps:
            _save(folder, model, average, opts, step + 1)
            if keep_every and (step + 1) % keep_every == 0:
                copy = folder / f"averaged-{step + 1}.safetensors"
                replace_file(copy, lambda path: save_file(average, path))
            saved = time.monotonic()


def _save(
    folder: Path,
    model: nn.Module,
    average: dict[str, Tensor],
    opts: list[torch.optim.Optimizer],
    step: int,
) -> None:
    tensors = {f"model.{k}": v.contiguous() for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v.contiguous() for k, v in average.items()}
    for i, o in enumerate(opts):
        for index, state in o.state_dict()["state"].items():
            tensors |= {
                f"optimiser.{i}.{index}.{k}": torch.as_tensor(v).contiguous()
                for k, v in state.items()
            }
    replace_file(
        folder / "checkpoint.safetensors",
        lambda path: save_file(tensors, path, metadata={"step": str(step)}),
    )
    replace_file(
        folder / "averaged.safetensors",
        lambda path: save_file({k: v.contiguous() for k, v in average.items()}, path),
    )


def _resume(
    folder: Path, model: nn.Module, average: dict[str, Tensor], opts: list[torch.optim.Optimizer]
) -> int:
    """Restore everything from the last checkpoint, if there is one; returns the step at which to
    continue."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    )
    for name in average:
        average[name].copy_(tensors[f"average.{name}"])
    for i, o in enumerate(opts):
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"optimiser.{i}."):
                _, _, index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
        o.load_state_dict({"state": state, "param_groups": o.state_dict()["param_groups"]})
    print(f"resuming at step {step}", flush=True)
    return step
