"""The tests of the kernels in Triton's interpreter: one process for all of them, which runs while
the other tests do.

Whether Triton interprets is settled when it is imported, so this cannot be the process of the other
tests. `conftest` starts it when `tests/test_kernels.py`, which waits for it, is among what is run.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
WAITS = "test_every_kernel_in_the_interpreter"  # the name of the test that waits

_running: list[tuple[subprocess.Popen, Path]] = []


def start() -> None:
    """Run every `tests/test_kernel_*.py` in the interpreter, and go on."""
    if _running:
        return
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    files = sorted(map(str, FOLDER.glob("test_kernel_*.py")))
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    with tempfile.NamedTemporaryFile(suffix=".txt", delete=False) as output:
        process = subprocess.Popen(
            command, env=environment, cwd=FOLDER.parent, stdout=output, stderr=subprocess.STDOUT
        )
    _running.append((process, Path(output.name)))


def finish() -> tuple[int, str]:
    """Wait until they are done: pytest's exit code and output."""
    start()  # where several processes share the tests, only now
    process, output = _running[0]
    return process.wait(), output.read_text()


def stop() -> None:
    """End running processes, and leave no file behind."""
    for process, output in _running:
        process.kill()
        process.wait()
        output.unlink()
    _running.clear()
