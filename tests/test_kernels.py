"""Every kernel against its reference in Triton's interpreter: see `tests/interpreter.py`."""

import pytest

from tests import interpreter

pytest.importorskip("triton", reason="needs Triton, which exists for Linux only")


def test_every_kernel_in_the_interpreter():
    code, said = interpreter.finish()
    assert code == 0, said
    assert " passed" in said
