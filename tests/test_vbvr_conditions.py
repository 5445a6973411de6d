"""The conditions of the paper by name, and the price of each."""

import pytest
import torch

from minicos import load
from minicos.analysis.ensemble.share import Passes
from minicos.errors import MinicosError
from minicos.vbvr.conditions import (
    FORMS,
    OPTIONS,
    Batch,
    arm,
    check,
    described,
    expand,
    final,
    groups,
    image_batch,
)
from tests.vbvr_samples import clip

NAMES = (
    "plain",
    "ensemble",
    "ensemble:mode=lockstep,at=0-1",
    "noise:step=1",
    "noise:frame=1",
    "swap:layer=20",
)


@pytest.fixture(scope="module")
def wan():
    return load("tiny").with_preset(steps=3, area=None)


@pytest.fixture(scope="module")
def batch():
    pictures = [clip(1, 32, 48, seed)[0] for seed in (0, 1)]
    return Batch(
        ["solve the maze", "mark the circle"],
        image_batch(pictures),
        ["mark the circle", "solve the maze"],
        [1, 1],
        5,
    )


def test_names_are_folders_on_any_system():
    for name in NAMES:
        assert not set(arm(name).folder) & set(':,/\\*?"<>| ')
    folders = [one.folder for one in expand(tuple(groups(50)), 50)]
    assert len(folders) == len(set(folders))


def test_every_form_is_a_condition_and_every_kind_has_a_form():
    assert {arm(name).kind for name in FORMS} == set(OPTIONS)
    shown = {option for name in FORMS for option in arm(name).options}
    assert shown == {option for options in OPTIONS.values() for option in options}
    text = described(50)
    assert all(name in text for name in (*FORMS, *groups(50), "noise:step=45", "frames=97"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "nothing",
        "noise",
        "noise:step=a",
        "noise:step=3-1",
        "noise:flavour=1",
        "swap",
        "swap:layer=-1",
        "frames=32",
        "frames=0",
        "ensemble:seeds=1",
        "ensemble:mode=magic",
        "plain:step=1",
        "noise:step=999999999999",
        "steps=",
    ],
)
def test_names_that_are_none(name):
    with pytest.raises(MinicosError, match="condition"):
        arm(name)


@pytest.mark.parametrize(
    "name",
    [
        "noise:step=3",
        "noise:frame=2",
        "ensemble:at=3",
        "swap:layer=1,during=0-3",
        "4step",
        "vbvr-lora",
    ],
)
def test_what_a_run_does_not_have(wan, name):
    with pytest.raises(MinicosError, match=f"{name.partition(':')[0]}"):
        check(wan, arm(name), 5)


def test_noise_needs_euler(wan):
    with pytest.raises(MinicosError, match="--solver euler"):
        check(wan.with_preset(solver="unipc"), arm("noise:step=1"), 5)


def test_experiments_expand():
    assert [one.name for one in expand(["table-1", "plain"], 50)] == ["plain", "ensemble"]
    assert [one.frames for one in expand(["appendix-b"], 50)] == [1, 5, 9, 17, 33, 65, 97]
    noised = [one.options["step"][0] for one in expand(["figure-3"], 50) if "step" in one.options]
    assert noised == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_samples_one_by_one(wan, batch, name):
    together = final(wan, arm(name), batch)
    assert together.shape == (2, 16, 2, 4, 6) and together.isfinite().all()
    for i in range(2):
        one = Batch(
            batch.prompts[i : i + 1],
            batch.images[i : i + 1],
            batch.others[i : i + 1],
            batch.seeds[i : i + 1],
            5,
        )
        apart = (final(wan, arm(name), one) - together[i : i + 1]).abs().max()
        assert apart < 5e-5 * together.abs().max()  # 1e-6 measured: products of other shapes


@pytest.mark.parametrize("name", NAMES)
def test_watching_the_steps_changes_nothing(wan, batch, name):
    seen = {}
    watched = final(wan, arm(name), batch, lambda index, x0: seen.update({index: x0}))
    assert list(seen) == [0, 1, 2] and all(x0.shape == watched.shape for x0 in seen.values())
    assert (watched - final(wan, arm(name), batch)).abs().max() < 5e-5 * watched.abs().max()
    assert (
        seen[2] - watched
    ).abs().max() < 1e-5 * watched.abs().max()  # the last estimate is the video


def test_conditions_do_something(wan, batch):
    plain = final(wan, arm("plain"), batch)
    for name in NAMES[1:]:
        assert (final(wan, arm(name), batch) - plain).abs().max() > 1e-5, name
    assert torch.equal(final(wan, arm("steps=3"), batch), plain)
    assert torch.equal(final(wan, arm("plain"), batch), plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("watched", [False, True])
def test_prices(wan, batch, name, watched, monkeypatch):
    """`passes` counts passes through the network."""
    counted = Passes()
    sample = type(wan).sample

    def count(self, condition, **given):
        given["hooks"] = given["hooks"] + counted.hooks if "hooks" in given else counted.hooks
        return sample(self, condition, **given)

    monkeypatch.setattr(type(wan), "sample", count)
    final(wan, arm(name), batch, (lambda index, x0: None) if watched else None)
    assert counted.count == 2 * arm(name).passes(3, watched)
