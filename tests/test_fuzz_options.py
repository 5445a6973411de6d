"""Options with any text in them: a sentence and exit code 2, before any work."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicos.cli import main

ABSURD = st.one_of(
    st.sampled_from(("nan", "inf", "-inf", "1e400", "-1", "0x10", "", " ", "1e-400,")),
    st.integers(min_value=10**8).map(str),
    st.integers(max_value=-1).map(str),
    st.text(st.characters(exclude_characters="0123456789", exclude_categories=["Cs", "N"])),
)
NUMBERS = ("--steps", "--frames", "--tile", "--shift", "--boundary", "--area")


@given(option=st.sampled_from(NUMBERS), value=ABSURD)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_absurd_values_are_refused_in_one_sentence(tmp_path, capsys, option, value):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--prompt", "solve the maze", f"{option}={value}", "--out", str(out)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.startswith(f"minicos: argument {option}: ")
    assert len(said) < 400
    assert not out.exists()


@pytest.mark.parametrize("option", ["--image", "--out"])
def test_an_empty_path_is_refused(capsys, option):
    """An unset shell variable must not mean the folder in which the command runs."""
    with pytest.raises(SystemExit):
        main(["generate", "--prompt", "solve the maze", f"{option}="])
    said = capsys.readouterr().err
    assert said.startswith(f"minicos: argument {option}: '' is not a path. ")
