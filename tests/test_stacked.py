"""Recorded values as one tensor with named axes."""

import pytest
import torch

from minicos.errors import MinicosError
from minicos.hooks import Hooks, Site
from minicos.record import Record


def recorded(axes: str = "b l") -> Record:
    record = Record(lambda x: x.norm(dim=-1), axes)
    for step in (3, 5):
        for branch in ("cond", "uncond"):
            for i in range(3):
                x = torch.full((2, 4, 9), float(100 * step + 10 * (branch == "cond") + i))
                record(x, Site(f"blocks.{i}", step=step, branch=branch))
    return record


def test_axes_are_named_and_values_found_by_their_labels():
    found = recorded().stack()
    assert found.axes == ("step", "branch", "point", "b", "l")
    assert found.values.shape == (2, 2, 3, 2, 4)
    assert found.labels == {
        "step": [3, 5],
        "branch": ["cond", "uncond"],
        "point": ["blocks.0", "blocks.1", "blocks.2"],
    }
    assert (found.at(step=5, branch="cond", point="blocks.2") == 3 * 512).all()
    assert (found.at(point="blocks.1", step=3)[1] == 3 * 301).all()
    assert found.at(branch="uncond").shape == (2, 3, 2, 4)
    assert repr(found) == "Stacked: step 2, branch 2, point 3, b 2, l 4; torch.float32"
    with pytest.raises(
        MinicosError, match=r"step 4 was not recorded; what was: step .3, 5., branch"
    ):
        found.at(step=4)


def test_numbers_are_stacked_and_what_is_no_number_is_refused():
    mean, shape = Record(lambda x: x.mean().item()), Record(lambda x: x.shape)
    for step in (0, 1):
        for record in (mean, shape):
            record(torch.full((2, 3), float(step)), Site("embed", step=step, branch="cond"))
    found = mean.stack()
    assert found.axes == ("step", "branch", "point") and found.values.flatten().tolist() == [0, 1]
    with pytest.raises(MinicosError, match="of embed, Size was recorded, which is no number"):
        shape.stack()
    for wrong in ((3, ""), (torch.norm, ("b", "l"))):
        with pytest.raises(MinicosError, match="a record takes a function of a tensor, and axes"):
            Record(*wrong)


def test_what_is_no_table_is_refused():
    with pytest.raises(MinicosError, match="nothing was recorded"):
        Record(lambda x: x).stack()
    missing, twice, unlike = recorded(), recorded(), recorded()
    missing.entries.pop()
    twice.entries.append(twice.entries[0])
    unlike.entries[0] = (unlike.entries[0][0], torch.zeros(3))
    with pytest.raises(MinicosError, match="some points twice"):
        twice.stack()
    for record in (missing, unlike):
        with pytest.raises(MinicosError, match="no table of 2 step x 2 branch x 3 point"):
            record.stack()
    with pytest.raises(MinicosError, match="axes 'b l d' for tensors of shape"):
        recorded("b l d").stack()
    assert recorded("").stack().axes[3:] == ("axis0", "axis1")


def test_what_is_kept_is_not_written_into_later():
    record, x = Record(lambda x: x[:, :2]), torch.ones(1, 3)
    hooks = Hooks().on("x", record) + Hooks().on("x", lambda x, site: x.zero_())
    hooks("x", x)
    assert record.entries[0][1].tolist() == [[1, 1]]


def test_a_record_says_what_it_holds():
    record = Record(lambda x: x)
    assert repr(record) == "Record: 0 entries"
    for step in range(2):
        for layer in range(5):
            record(torch.zeros(1), Site(f"blocks.{layer}", step=step))
    assert repr(record) == "Record: 10 entries of blocks.0, blocks.1, blocks.2 and 2 more, 2 steps"
