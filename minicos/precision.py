"""Float32 where it is promised: a guard against TF32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_tf32() -> Iterator[None]:
    """Let float32 convolutions compute in float32 (a context, or a decorator of a function that is no generator).

    On CUDA torch computes them in TF32 by default, with 10 bits of mantissa, and the VAE is promised in float32. The
    setting is the process's; whatever it was is put back. Matrix products are float32 unless the user has asked for TF32
    (`torch.set_float32_matmul_precision`), and that choice is left alone.
    """
    cudnn: Any = torch.backends.cudnn
    switch: tuple[Any, str] = (cudnn, "allow_tf32")
    exact: object = False
    try:
        before = getattr(*switch)
    except RuntimeError:  # torch does not read its older switch once the newer ones have been used
        switch = cudnn.conv, "fp32_precision"
        before, exact = getattr(*switch), "ieee"
    setattr(*switch, exact)
    try:
        yield
    finally:
        setattr(*switch, before)
