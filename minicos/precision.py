"""Float32 where it is promised: a guard against TF32, and TF32 where it was chosen."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let float32 convolutions compute in float32 (a context, or a decorator of a function that is
    no generator). On CUDA torch computes them in TF32 by default, with 10 bits of mantissa.
    """
    with tf32_convolutions(False):
        yield


@contextmanager
def tf32_convolutions(allowed: bool) -> Iterator[None]:
    """Let float32 convolutions on CUDA compute in TF32, or not. The setting is the process's;
    whatever it was is put back. Matrix products are float32 by default (`undisturbed`).
    """
    cudnn: Any = torch.backends.cudnn
    switch: tuple[Any, str] = (cudnn, "allow_tf32")
    chosen: object = allowed
    try:
        before = getattr(*switch)
    except RuntimeError:  # torch does not read its older switch once the newer ones have been used
        switch = cudnn.conv, "fp32_precision"
        before, chosen = getattr(*switch), "tf32" if allowed else "ieee"
    setattr(*switch, chosen)
    try:
        yield
    finally:
        setattr(*switch, before)


@contextmanager
def undisturbed(grad: bool = False) -> Iterator[None]:
    """Compute as torch does by itself (a context, or a decorator of a function that is no
    generator).

    Inside, what others have set for the whole process counts for nothing: default device and dtype,
    autocast, inference mode, lower precision of float32 products. All of it is put back. Gradients
    are off unless `grad`.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():  # what is made in it could not be edited elsewhere
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
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        yield
