"""Contexts that control the precision of float32: a guard against TF32, and TF32 if chosen. And
whether bfloat16 is fast on this processor.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from threading import Lock
from typing import Any

import torch


@cache
def fast_bfloat16() -> bool:
    """Whether this processor has instructions for bfloat16, or for wide enough vectors. On others,
    products of matrices take about 9 times as long as in float32, and convolutions 40 times.
    """
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute float32 convolutions in float32 (a context, or a decorator of a function that is not
    a generator). On CUDA torch uses TF32 by default, with 10 bits of mantissa.
    """
    with _WITHOUT_TF32:
        yield


class Shared:
    """A context of process-wide settings: the first of overlapping threads enters it, and the last
    leaves it. If each did both, one would restore what another had set.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[None]]):
        self.make, self.lock, self.inside = make, Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.context = self.make()
                self.context.__enter__()
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.context.__exit__(None, None, None)


@contextmanager
def tf32_convolutions(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 convolutions on CUDA. This is a process-wide setting; the
    previous value is restored. Matrix products are float32 by default (`undisturbed`).
    """
    cudnn: Any = torch.backends.cudnn
    switch: tuple[Any, str] = (cudnn, "allow_tf32")
    chosen: object = allowed
    try:
        before = getattr(*switch)
    except RuntimeError:  # torch refuses to read its older switch after the newer ones were used
        switch = cudnn.conv, "fp32_precision"
        before, chosen = _own(cudnn.conv), "tf32" if allowed else "ieee"
    setattr(*switch, chosen)
    try:
        yield
    finally:
        setattr(*switch, before)


@contextmanager
def undisturbed(grad: bool = False) -> Iterator[None]:
    """Compute with torch's defaults (a context, or a decorator of a function that is not a
    generator).

    Overrides process-wide settings: default device and dtype, autocast, inference mode and reduced
    precision of float32 products. All of them are restored. Gradients are off unless `grad`.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # tensors made in it could not be edited outside
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        stack.enter_context(without_tf32())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(FLOAT32_PRODUCTS)
        yield


@contextmanager
def _float32_products() -> Iterator[None]:
    """Multiply float32 in float32, whatever the caller chose by torch's older switch or by its
    newer ones, which PyTorch 2.8 lacks. All of them are restored.
    """
    backends: Any = torch.backends
    places = [(backends.cuda, "matmul"), (backends.cudnn, "conv")]
    places += [(backends.mkldnn, "matmul"), (backends.mkldnn, "conv")]
    newer = [getattr(*one) for one in places if hasattr(backends, "fp32_precision")]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # the newer ones were used
        older = ""
    if older == "highest" and all(one.fp32_precision in ("none", "ieee") for one in newer):
        yield
        return
    before = [(one, _own(one)) for one in newer]
    torch.set_float32_matmul_precision("highest")
    for one in newer:
        one.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older)
        for one, chosen in before:
            one.fp32_precision = chosen


def _own(switch: Any) -> str:
    """The switch's own value: what it shows, unless that changes with the switch of all
    backends.
    """
    every: Any = torch.backends
    shown, general = switch.fp32_precision, every.fp32_precision
    every.fp32_precision = "tf32" if shown == "ieee" else "ieee"
    own = shown if switch.fp32_precision == shown else "none"
    every.fp32_precision = general
    return own


_WITHOUT_TF32 = Shared(partial(tf32_convolutions, False))
FLOAT32_PRODUCTS = Shared(_float32_products)
