"""Where the tests of a kernel run: compiled on a GPU where there is one, and everywhere in Triton's interpreter.

Whether Triton interprets is settled when it is imported (`TRITON_INTERPRET=1`), for its own library too, and another test may
have imported it by then. So each file `tests/test_kernel_*.py` runs itself again in a process of its own (`interpret`); in the
first process, what is marked `on_device` is for a GPU.
"""

import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minicos

triton = pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")
if find_spec("minicos.kernels") is None:  # a checkout that is not installed: this folder's parent holds `kernels`
    minicos.__path__.append(str(Path(__file__).parents[1]))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
compiled = pytest.mark.skipif(INTERPRETED, reason="about the compiled kernel")


def on_device(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


def interpret(file: str) -> None:
    """Pass every test of a file in the interpreter, or fail with what pytest said."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=environment, cwd=Path(file).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, device=DEVICE, dtype=dtype)


def ptx(kernel, signature: dict[str, str], constants: dict[str, object], aligned: tuple[str, ...], **options) -> str:
    """What a kernel becomes on Hopper, see `for_hopper`."""
    return for_hopper(kernel, signature, constants, aligned, **options)["ptx"]


def for_hopper(
    kernel, signature: dict[str, str], constants: dict[str, object], aligned: tuple[str, ...], **options
) -> dict[str, str]:
    """What a kernel becomes at each stage ("ttgir", "ptx", ...), compiled without a card.

    signature  type of each argument that is not an i32, such as "*bf16"
    constants  values of its constexpr arguments; they may also stand among the options, as in a launch
    aligned    arguments that are multiples of 16 (of pointers: bytes)
    """
    constants = constants | {name: options.pop(name) for name in kernel.arg_names if name in options}
    types = signature | dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature={name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs=constants,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options=options).asm
