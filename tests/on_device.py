"""Where the tests of a kernel run: compiled on a GPU where there is one, and everywhere in Triton's
interpreter.

Whether Triton interprets is settled when it is imported (`TRITON_INTERPRET=1`), for its own library
too, and another test may have imported it by then. So the files `tests/test_kernel_*.py` also run
in a process of their own (`tests/interpreter.py`); without that variable, what is marked
`on_device` is for a GPU. The interpreter takes 15 to 40 ms for each row of a tensor, so inputs have
few: at least two samples, and, where rows are short, two timesteps of two tokens each.
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minicos

triton = pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")
if (
    find_spec("minicos.kernels") is None
):  # a checkout that is not installed: this folder's parent holds `kernels`
    minicos.__path__.append(str(Path(__file__).parents[1]))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# the interpreter truncates bfloat16 instead
ROUNDED = [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16]
compiled = pytest.mark.skipif(INTERPRETED, reason="about the compiled kernel")


def on_device(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def tokens(width: int) -> int:
    """How many tokens a sample has in a test of rows of this width."""
    return 4 if width <= 300 else 2


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


VIEWS = {
    "tokens": lambda x: x[:, 1:5],
    "every other token": lambda x: x[:, ::2],
    "channels": lambda x: x[:, :4, 4:],
    "every other channel": lambda x: x[:, :4, ::2],
    "tokens by batch": lambda x: x[:, :4].transpose(0, 1),
}


def view(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Some b l d cut from a tensor that is NaN everywhere else; l and d are even."""
    x = VIEWS[name](nan(2, 8, 64, dtype=dtype))
    return x.copy_(randn(*x.shape, seed=seed))


def far_apart(*shape: int) -> Tensor:
    """A bfloat16 (1, 3, d) whose tokens are 2^30 elements apart: the third lies past 2^31. Of
    these 4 GiB, three pages are touched.
    """
    x = torch.empty(2**31 + 512, dtype=torch.bfloat16, device=DEVICE).as_strided(
        shape, (0, 2**30, 1)
    )
    return x.copy_(randn(*shape))


def modulations(*shape: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Six float32 b g d, as a block has them: rows of one tensor b g 6 d."""
    return randn(*shape[:2], 6, shape[2], seed=100 + seed).unbind(2)


def poisoned(op, *args, **options):
    """op(...), with NaN in elements of its result that are not written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch,
            "empty",
            lambda *shape, **kinds: torch.full(
                torch.Size(*shape) if len(shape) == 1 else shape, math.nan, **kinds
            ),
        )
        return op(*args, **options)


def differing(actual: Tensor, expected: Tensor) -> float:
    """The share of elements whose values are not the same."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return (actual != expected).double().mean().item()


def ptx(
    kernel,
    signature: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...],
    **options,
) -> str:
    """What a kernel becomes on Hopper, see `for_hopper`."""
    return for_hopper(kernel, signature, constants, aligned, **options)["ptx"]


def for_hopper(
    kernel,
    signature: dict[str, str],
    constants: dict[str, object],
    aligned: tuple[str, ...],
    **options,
) -> dict[str, str]:
    """What a kernel becomes at each stage ("ttgir", "ptx", ...), compiled without a card.

    signature  type of each argument that is not an i32, such as "*bf16"
    constants  values of its constexpr arguments; they may also stand among the options, as in a
               launch
    aligned    arguments that are multiples of 16 (of pointers: bytes)
    """
    constants = constants | {
        name: options.pop(name) for name in kernel.arg_names if name in options
    }
    types = signature | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options=options).asm
