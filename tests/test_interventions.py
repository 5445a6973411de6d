"""Several interventions and analyses in one pass: what changes nothing, what does not depend on
the order, killed and continued.
"""

from dataclasses import replace
from itertools import islice, permutations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicos.analysis.energy import Energy
from minicos.analysis.ensemble import share as ensemble
from minicos.analysis.ensemble.share import Ensemble
from minicos.analysis.knockout import Causal, Flow, Knockout, Tokens
from minicos.analysis.noise.edit import Noise, follow
from minicos.analysis.steps import Steps
from minicos.analysis.swap.states import Swap, lockstep
from minicos.analysis.tools.interventions import NO_INTERVENTIONS, Interventions
from minicos.analysis.tools.record import record, recorded
from minicos.errors import MinicosError
from minicos.hooks import NO_HOOKS
from minicos.open import load
from minicos.runs import Run

STEPS, SEEDS = 3, 3


def noised(edit: Noise) -> Interventions:
    return Interventions(edits=(edit,))


def swapped(give, swap: Swap, donor: str = "own") -> Interventions:
    return swap.intervention(give, donor)


LAYERS = (2, 3)


@pytest.fixture(scope="module")
def wan(toy):
    return load(toy, device="cpu").with_preset(
        "cos", steps=STEPS, guidance={"high": 1.0, "low": 1.0}, frames=5
    )


@pytest.fixture(scope="module")
def made(wan):
    """Conditions of B and A, and the noise."""
    image = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(0))
    take, give = (
        wan.condition([prompt] * SEEDS, image) for prompt in ("solve the maze", "mark the circle")
    )
    return take, give, wan.noise(take, 0)


def watched(
    wan, condition, noise, folder, changes=NO_INTERVENTIONS
) -> list[dict[str, torch.Tensor]]:
    """Everything saved of a run's steps."""
    run = Run.open(folder, {})
    record(wan, condition, run, [Steps(wan, ()), Energy((0,), sheets=("raw",))], noise, changes)
    return [run.load_tensors(f"steps/{i:03d}.safetensors") for i in range(len(wan.schedule()))]


def same(ours, theirs) -> bool:
    """Equal to the last bit, except for the data of donors."""
    seen = [
        [{k: v for k, v in step.items() if not k.startswith("donor")} for step in run]
        for run in (ours, theirs)
    ]
    assert all(a.keys() == b.keys() for a, b in zip(*seen, strict=True))
    return all(torch.equal(a[k], b[k]) for a, b in zip(*seen, strict=True) for k in a)


@pytest.fixture(scope="module")
def plain(wan, made, tmp_path_factory):
    return watched(wan, made[0], made[2], tmp_path_factory.mktemp("plain"))


NOTHING = Flow(Tokens(where=torch.zeros(1, 1, 1, dtype=torch.bool)))
NULLS = {
    "noise": lambda take: noised(Noise("null", (0, 2))),
    "own": lambda take: swapped(take, Swap(LAYERS, range(STEPS))),
    "same_x": lambda take: swapped(take, Swap((5,), range(1, 2)), "same_x"),
    "update": lambda take: swapped(take, Swap((4,), range(STEPS), what="ffn")),
    "seeds": lambda take: ensemble.intervention(Ensemble(LAYERS, "mix", seeds=SEEDS, alpha=0.0)),
    "one seed": lambda take: ensemble.intervention(
        Ensemble(LAYERS, "override", steps=(0, 2), seeds=1)
    ),
    "knockout": lambda take: Knockout(NOTHING, LAYERS).intervention(),
    "nothing": lambda take: NO_INTERVENTIONS,
}


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chosen=st.lists(st.sampled_from(sorted(NULLS)), min_size=1, max_size=3, unique=True))
def test_null_interventions_change_nothing(wan, made, plain, tmp_path_factory, chosen):
    changes = sum((NULLS[name](made[0]) for name in chosen), NO_INTERVENTIONS)
    assert same(watched(wan, made[0], made[2], tmp_path_factory.mktemp("null"), changes), plain)


def independent(give) -> list:
    """Interventions at different steps and layers: none sees what another has changed in the
    same place.
    """
    return [
        noised(Noise("replace", (2,), seed=5)),
        swapped(give, Swap((1,), range(1))),
        ensemble.intervention(Ensemble((6,), "lockstep", steps=(1,), seeds=SEEDS)),
        Knockout(Causal(), layers=(8,), steps=(1,)).intervention(),
    ]


def test_the_order_of_independent_interventions_does_not_matter(wan, made, plain, tmp_path):
    take, give, noise = made
    runs = [
        watched(wan, take, noise, tmp_path / str(i), sum(order, NO_INTERVENTIONS))
        for i, order in enumerate(islice(permutations(independent(give)), 0, None, 4))
    ]
    assert all(same(run, runs[0]) for run in runs[1:])
    assert not same(runs[0], plain)


def test_edits_are_made_in_order(wan, made, tmp_path):
    take, _, noise = made
    reseed, add = (
        noised(Noise("replace", (1,), seed=5)),
        noised(Noise("add", (1,), seed=6, dose=2.0)),
    )
    first, second = (
        watched(wan, take, noise, tmp_path / n, c)
        for n, c in (("a", reseed + add), ("b", add + reseed))
    )
    only = watched(wan, take, noise, tmp_path / "c", reseed)
    assert same(second, only)  # what is replaced later is lost
    assert not same(first, only)


def test_each_alone_is_its_own_experiment(wan, made, tmp_path):
    take, give, noise = made
    edit, swap, e = (
        Noise("replace", (1,), seed=5),
        Swap((3,), range(2)),
        Ensemble(LAYERS, "update", seeds=SEEDS),
    )
    *_, (step, _) = follow(wan, take, noise, edit)
    assert torch.equal(
        watched(wan, take, noise, tmp_path / "noise", noised(edit))[-1]["next"], step.next
    )
    for donor in ("own", "same_x"):
        *_, (step,) = lockstep(wan, give, take, noise, [swap], donor=donor)
        ours = watched(wan, take, noise, tmp_path / donor, swapped(give, swap, donor))
        assert torch.equal(ours[-1]["next"], step.next)
    alone = ensemble.run(wan, take, noise, Ensemble(LAYERS, "update", seeds=SEEDS, carrier=None))
    assert torch.equal(
        watched(wan, take, noise, tmp_path / "share", ensemble.intervention(e))[-1]["next"], alone
    )


@pytest.mark.parametrize("mode", ensemble.TWO_PASS)
@pytest.mark.parametrize("branches", [("cond",), ("cond", "uncond")])
def test_an_ensemble_of_two_passes_is_its_own_experiment(toy, made, tmp_path, mode, branches):
    take, give, noise = made
    guided = load(toy, device="cpu").with_preset(
        "official", steps=STEPS, guidance={"high": 5.0, "low": 5.0}, frames=5
    )
    take = replace(take, text_null=give.text)
    e = Ensemble(LAYERS, mode, steps=(0, 2), seeds=SEEDS, branches=branches, carrier=None)
    ours = watched(
        guided, take, noise, tmp_path, ensemble.intervention(e)
    )  # UniPC, whose history no first pass may enter
    assert torch.equal(ours[-1]["next"], ensemble.run(guided, take, noise, e))


def test_a_first_pass_is_made_under_the_interventions_before_it(wan, made, tmp_path):
    take, give, noise = made
    swap, edit = Swap((1,), range(STEPS)), noised(Noise("replace", (1,), seed=5))
    mean, lockstep_mean = (
        ensemble.intervention(Ensemble((6,), mode, steps=(1, 2), seeds=SEEDS, carrier=None))
        for mode in ("override", "lockstep")
    )
    after = watched(wan, take, noise, tmp_path / "after", edit + (swapped(give, swap) + mean))
    assert same(
        after, watched(wan, take, noise, tmp_path / "same", (edit + swapped(give, swap)) + mean)
    )
    assert same(
        after,
        watched(wan, take, noise, tmp_path / "once", edit + swapped(give, swap) + lockstep_mean),
    )
    before = watched(wan, take, noise, tmp_path / "before", edit + mean + swapped(give, swap))
    assert not same(after, before)  # its first pass saw no swap


@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_ensemble_of_two_passes_continues_to_the_last_bit(wan, made, tmp_path, killed):
    take, give, noise = made

    def changes():
        return swapped(give, Swap((1,), range(STEPS))) + ensemble.intervention(
            Ensemble((6,), "override", steps=range(STEPS), seeds=SEEDS)
        )

    whole = watched(wan, take, noise, tmp_path / "whole", changes())
    watched(wan, take, noise, tmp_path / "killed", changes())
    for i in range(killed, STEPS):
        (tmp_path / f"killed/steps/{i:03d}.safetensors").unlink()
    assert same(watched(wan, take, noise, tmp_path / "killed", changes()), whole)


def test_analyses_see_what_interventions_did(wan, made, tmp_path):
    take, give, noise = made
    run = Run.open(tmp_path, {})
    record(wan, take, run, [Energy((0,))], noise, swapped(give, Swap((3,), range(1))))
    a, b = Run.open(tmp_path / "a", {}), Run.open(tmp_path / "b", {})
    record(wan, give, a, [Energy((0,))], noise)
    record(wan, take, b, [Energy((0,))], noise)
    swapped_raw, a_raw, b_raw = (recorded(r, "energy", 1)[0]["cond.raw"] for r in (run, a, b))
    assert torch.equal(swapped_raw[:3], b_raw[:3])
    assert torch.equal(swapped_raw[3], a_raw[3])
    assert not torch.equal(swapped_raw[4], b_raw[4])


@pytest.mark.parametrize("solver", ["euler", "unipc"])
@pytest.mark.parametrize("donor", ["own", "same_x"])
@pytest.mark.parametrize("killed", [1, 2])
def test_a_killed_run_continues_to_the_last_bit(wan, made, tmp_path, solver, donor, killed):
    take, give, noise = made
    wan = wan.with_preset(solver=solver)

    def changes():
        return noised(Noise("renoise", (0, 1), seed=5)) + swapped(
            give, Swap((3,), range(STEPS)), donor
        )

    whole = watched(wan, take, noise, tmp_path / "whole", changes())
    watched(wan, take, noise, tmp_path / "killed", changes())
    for i in range(killed, STEPS):
        (tmp_path / f"killed/steps/{i:03d}.safetensors").unlink()
    again = watched(wan, take, noise, tmp_path / "killed", changes())
    assert all(torch.equal(a[k], b[k]) for a, b in zip(again, whole, strict=True) for k in b)


def test_mistakes(wan, made):
    give = made[1]
    with pytest.raises(MinicosError, match="no donor 'mine'"):
        swapped(give, Swap((3,), range(1)), "mine")
    with pytest.raises(MinicosError, match="not made of hooks alone"):
        ensemble.intervention(Ensemble((), "x0", seeds=SEEDS))
    assert ensemble.intervention(Ensemble(LAYERS, "lockstep", seeds=1)).hooks is NO_HOOKS
