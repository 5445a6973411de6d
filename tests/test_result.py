"""What studies leave on disk: `results.json` returns what was written, and refuses what it
does not know.
"""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicos.analysis import result
from minicos.analysis.result import Curve, Interval, Number, Result
from minicos.errors import MinicosError
from minicos.runs import Run

values = st.floats(-1e6, 1e6)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
intervals = st.builds(Interval, values, values, values, st.integers(0, 1000))
cells = names | st.integers(-9, 9) | st.booleans() | st.none() | values | intervals
results = st.builds(
    Result,
    what=names,
    settings=st.dictionaries(names, names | st.integers() | st.lists(st.integers(), max_size=3)),
    numbers=st.lists(st.builds(Number, names, values, unit=names, note=names), max_size=3).map(
        tuple
    ),
    tables=st.dictionaries(
        names,
        st.lists(st.dictionaries(names, cells, max_size=3), max_size=3).map(tuple),
        max_size=2,
    ),
    curves=st.lists(
        st.builds(Curve, names, st.lists(st.floats(0, 9)).map(tuple), st.lists(values).map(tuple)),
        max_size=2,
    ).map(tuple),
    files=st.lists(names, max_size=3).map(tuple),
)


@given(results)
def test_what_is_written_is_read(tmp_path_factory, found):
    run = Run.open(tmp_path_factory.mktemp("run"), {})
    result.write(run, found)
    assert result.read(run.folder) == result.read(run.path(result.FILE)) == found


def test_what_has_no_value_is_null(tmp_path):
    run = Run.open(tmp_path, {})
    found = Result(
        "swap",
        {"n": np.int64(3), "at": (0, 5)},
        (Number("turns", math.inf, 3.0, math.inf, 5),),
        {
            "arms": [
                {"arm": "own", "rate": Interval(math.nan, math.nan, math.nan, 0), "p": math.nan}
            ]
        },
    )
    result.write(run, found)
    kept = json.loads(
        run.path(result.FILE).read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert kept["schema"] == result.SCHEMA and kept["settings"] == {"n": 3, "at": [0, 5]}
    assert kept["numbers"][0]["value"] is None and kept["numbers"][0]["low"] == 3.0
    again = result.read(run.folder)
    assert math.isnan(again.number("turns").value) and again.number("turns").low == 3.0
    assert str(found.number("turns")) == "never [3.000, never]"
    assert str(again.tables["arms"][0]["rate"]) == "-"
    with pytest.raises(KeyError, match="no number 'turned' in turns"):
        found.number("turned")


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ('{"schema": 0}', "has schema 0, and this version reads 1"),
        ('{"rows": []}', "has schema None"),
        ("[]", "has schema None"),
        ('{"schema": 1, "what": "noise"}', "not the result of a study"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, kept, says):
    (tmp_path / result.FILE).write_text(kept)
    with pytest.raises(MinicosError, match=says):
        result.read(tmp_path)


def test_tables_align_and_leave_out_empty_columns():
    rows = [
        {"arm": "plain", "rate": Interval(0.5, 0.25, 0.75, 4), "p": None, "passes": 20},
        {"arm": "override|20-29", "rate": None, "D": 0.0008},
    ]
    assert result.table(rows).splitlines() == [
        "arm             rate                  passes  D",
        "plain           0.500 [0.250, 0.750]  20      -",
        "override|20-29  -                     -       0.0008",
    ]
    assert result.markdown(rows).splitlines()[-1] == "| override\\|20-29 | - | - | 0.0008 |"
    numbers = (Number("gain", 0.1, 0.0, 0.2, 100, note="plain"),)
    assert (
        result.Result("ensemble", {}, numbers, {"arms": rows})
        .text()
        .startswith("      value [95 %]")
    )
