"""Ctrl-C and SIGTERM, from our first line on: one line, 130 or 143, and complete files."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minicos import runs, signals
from minicos.cli import main
from tests.test_cli import posix, start

pytestmark = posix


def test_a_signal_while_modules_are_imported_is_one_line():
    """At several moments of a start that takes a second or so: none shows a traceback."""
    for number, delay in ((signal.SIGINT, 0.3), (signal.SIGTERM, 0.6), (signal.SIGINT, 1.0)):
        process = start(
            "-c",
            "import sys; from minicos import signals; signals.start(); print('on', flush=True)\n"
            "from minicos.__main__ import main; sys.argv[1:] = ['generate', '--prompt', 'x']; "
            "sys.exit(main())",
        )
        assert process.stdout.readline() == "on\n"
        time.sleep(delay)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        if process.returncode != 2:  # it ended before, with the error that an image is needed
            assert process.returncode == 128 + number
            assert err.startswith("minicos: stopped")
        assert err.count("\n") == 1


def test_sigterm_waits_for_the_file_and_ctrl_c_does_not(tmp_path):
    def write(number):
        def now(temporary):
            temporary.write_text("half")
            signal.raise_signal(number)
            temporary.write_text("whole")

        return now

    with pytest.raises(signals.Terminated), signals.handled():
        runs.replace_file(tmp_path / "a", write(signal.SIGTERM))
    assert (tmp_path / "a").read_text() == "whole"
    with pytest.raises(KeyboardInterrupt), signals.handled():
        runs.replace_file(tmp_path / "b", write(signal.SIGINT))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, signals.Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_that_a_library_turns_into_another_error(number, raised):
    """As safetensors does, when the signal arrives while it makes a tensor."""

    def library():
        try:
            signal.raise_signal(number)
        except BaseException:
            raise TypeError("could not determine the shape") from None

    with pytest.raises(raised), signals.handled():
        library()
    with pytest.raises(TypeError), signals.handled():
        raise TypeError  # without a signal it stays what it is


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_destructor_is_not_lost(number):
    """Python prints what is raised there, and goes on."""
    process = start(
        "-c",
        "import signal; from minicos import signals\n"
        f"class Dying:\n    def __del__(self): signal.raise_signal({int(number)})\n"
        "with signals.handled(): Dying(); print('went on')",
    )
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, "", "minicos: stopped.\n")


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    hook = sys.unraisablehook
    assert main(["points"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert sys.unraisablehook is hook


@pytest.mark.parametrize("argument", [b"--prompt=\xff", b"\xe9t\xe9.png"])
def test_arguments_that_are_not_text_are_refused(argument):
    done = subprocess.run(
        [sys.executable, "-m", "minicos", "generate", argument], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("minicos: the argument '")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name != "posix", reason="shells of POSIX close streams so")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_caller_closed(closed):
    given = f'exec "$0" -m minicos generate --prompt x --image "no such file" {closed}'
    ended = subprocess.run(["sh", "-c", given, sys.executable], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == ("2>&-" not in closed)


def test_a_backend_of_matplotlib_that_does_not_exist_is_of_no_consequence():
    """Figures are files: importing matplotlib would fail, after all the work was done."""
    draw = (
        "import sys; from minicos.__main__ import main; sys.argv[1:] = ['points']; main()\n"
        "from minicos.analysis.tools import figures"
    )
    given = os.environ | {"MPLBACKEND": "nosuch"}
    done = subprocess.run([sys.executable, "-c", draw], env=given, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
