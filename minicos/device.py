"""Choices that depend on the device: whether it is there, the operations of networks and analyses,
and warnings about what this PyTorch does badly.
"""

from functools import cache

import torch

from minicos import attention
from minicos.errors import MinicosError, warn
from minicos.ops import REFERENCE, Ops

AMPERE = (8, 0)  # the oldest compute capability whose tensor cores support bfloat16


def open_device(name: str | torch.device | None) -> torch.device:
    """The device, after a trial: torch accepts names of devices that are not there."""
    try:
        if name is None:
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise MinicosError(
            f"this machine or this PyTorch has no device {str(name)!r}: take another --device "
            "(device=), or none"
        ) from error
    return device


def check_compiler(device: torch.device) -> None:
    """Compile something small now: torch looks for a compiler only when the first block runs."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, some defined in private modules
        reason = str(error).strip().splitlines()[0]
        raise MinicosError(
            f"torch.compile does not work here ({reason}). It needs a C++ compiler such as g++ or "
            "clang and, on a card, Triton;"
            " without it leave out --compile."
        ) from error


def operations(device: torch.device, kernels: bool | None = None) -> Ops:
    """The best attention for the device and, on a card, the Triton kernels.

    Args:
        kernels: None: use them if they work; True: raise MinicosError if they do not; False: do not
            use them.
    """
    ops = attention.with_best(REFERENCE, device)
    if kernels is False:
        return ops
    reason = obstacle(device)
    if reason and kernels:
        raise MinicosError(
            f"the kernels do not work here: {reason}. Leave out --kernels (kernels=True)."
        )
    return ops if reason else ops.with_kernels()


@cache
def obstacle(device: torch.device) -> str:
    """Why the Triton kernels do not work on a device; empty if they do. A small kernel is run,
    since Triton looks for a C compiler only at launch.
    """
    if device.type != "cuda":
        return f"they need a CUDA card, and this is {device.type}"
    if torch.version.cuda is None:
        return "they are written for NVIDIA's cards"
    if (capability := torch.cuda.get_device_capability(device)) < AMPERE:
        have, need = (".".join(map(str, c)) for c in (capability, AMPERE))
        return f"they need compute capability {need}, and this card has {have}"
    try:
        x = torch.ones(1, 1, 4, device=device)
        found = REFERENCE.with_kernels().token_energy(x).item()
    except ImportError as error:
        return f"Triton is missing ({error})"
    except Exception as error:  # of many kinds, some defined in private modules
        return f"a trial failed ({(str(error).strip() or repr(error)).splitlines()[0]})"
    return "" if found == 2 else f"a trial gave {found} for 2"


def describe(ops: Ops, device: torch.device) -> str:
    """One line for people and for run.json: which operations, and which attention."""
    if with_kernels(ops):
        kind = "Triton kernels"
    else:
        reason = obstacle(device)
        kind = "PyTorch's" + (f" (no kernels: {reason})" if reason else " (kernels are off)")
    return f"{kind}; attention by {attention.describe(ops)}"


def with_kernels(ops: Ops) -> bool:
    """Whether a network uses Triton kernels."""
    return ops.modulated_norm.__module__.startswith("minicos.kernels.")


def warn_of_slow_convolutions(device: torch.device) -> None:
    """Warn if PyTorch 2.9 has a cuDNN before 9.15: it then does not use cuDNN for 3D convolutions,
    which takes several times as long and as much memory (pytorch#166122, #166643).
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return
    number, cudnn = torch.__version__.split("+")[0], torch.backends.cudnn.version() or 0
    if number == "2.9.0" or (number == "2.9.1" and cudnn < 91500):
        major = torch.version.cuda.split(".")[0]
        warn(
            f"PyTorch {number} computes 3D convolutions slowly here and with much memory, so the "
            "VAE suffers: install PyTorch 2.10 or newer, or 2.9.1 with "
            f"`pip install -U 'nvidia-cudnn-cu{major}>=9.15'`"
        )
