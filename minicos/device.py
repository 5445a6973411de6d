"""What suits a device: the operations that networks and analyses compute with, and what this
PyTorch does badly on it.
"""

from functools import cache

import torch

from minicos import attention
from minicos.errors import MinicosError, warn
from minicos.ops import REFERENCE, Ops

AMPERE = (8, 0)  # the oldest compute capability whose tensor cores know bfloat16


def operations(device: torch.device, kernels: bool | None = None) -> Ops:
    """The attention that suits the device and, on a card, the Triton kernels.

    kernels  None: where they work; True: raise MinicosError where they do not; False: leave them
             out
    """
    ops = attention.with_best(REFERENCE, device)
    if kernels is False:
        return ops
    reason = obstacle(device)
    if reason and kernels:
        raise MinicosError(f"the kernels do not work here: {reason}. Leave them out.")
    return ops if reason else ops.with_kernels()


@cache
def obstacle(device: torch.device) -> str:
    """Why the Triton kernels do not work on a device; empty where they do. One small kernel is
    tried, since Triton looks for a C compiler only when it launches.
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
    except Exception as error:  # of many kinds, some of them from private modules
        return f"a trial failed ({(str(error).strip() or repr(error)).splitlines()[0]})"
    return "" if found == 2 else f"a trial gave {found} for 2"


def describe(ops: Ops, device: torch.device) -> str:
    """In one line, for people and for run.json: which operations, and which attention."""
    if with_kernels(ops):
        kind = "Triton kernels"
    else:
        reason = obstacle(device)
        kind = "PyTorch's" + (f" (no kernels: {reason})" if reason else " (kernels are off)")
    return f"{kind}; attention by {attention.describe(ops)}"


def with_kernels(ops: Ops) -> bool:
    """Whether the network computes with Triton kernels."""
    return ops.modulated_norm.__module__.startswith("minicos.kernels.")


def warn_of_slow_convolutions(device: torch.device) -> None:
    """PyTorch 2.9 does not hand 3D convolutions to cuDNN before 9.15: several times slower, with
    several times the memory (pytorch#166122, #166643).
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
