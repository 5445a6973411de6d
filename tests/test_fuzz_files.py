"""Damaged and hostile files open or are refused in a sentence.

The inputs here are the same in every run, so that a failure belongs to the change at hand;
`python -m tests.fuzz` tries many more, with limits.
"""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fuzz, fuzz_files, fuzz_media, fuzz_options, fuzz_runs  # noqa: F401  (register)


@pytest.mark.parametrize("name", fuzz.TARGETS)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=10, deadline=None, database=None, derandomize=True)
def test_a_damaged_input_opens_or_is_refused(name, seed):
    with tempfile.TemporaryDirectory() as folder:
        assert fuzz.attempt(name, seed, Path(folder)) in ("opened", "refused")


def test_the_good_model_opens(tmp_path):
    """What is damaged above is sound by itself."""
    fuzz_files.write(tmp_path, {})
    fuzz_files.opened(tmp_path)()
