"""The ideal observer as a model: Bayes' rule at every step, a valid answer at the end, and every
study that needs no hook inside a network runs on it.
"""

import pytest
import torch

from minicos.analysis import belief, commitment, counts, plant, recall, steps
from minicos.analysis.noise import study as noise
from minicos.analysis.options import (
    BeliefOptions,
    CommitmentOptions,
    CountsOptions,
    NoiseOptions,
    StepsOptions,
)
from minicos.analysis.tools import cases, posterior
from minicos.analysis.tools.observer import Observer
from minicos.errors import MinicosError
from minicos.hooks import Hooks
from minicos.open import load
from minicos.runs import Run


@pytest.fixture(scope="module")
def wan():
    return load("tiny", device="cpu").with_preset(steps=3)


@pytest.fixture(scope="module")
def observer(wan):
    return Observer.of(wan)


def test_its_estimate_is_the_posterior_mean_and_it_ends_at_an_answer(observer):
    batch = cases.held_out("maze", 2, size=3, keep=cases.ambiguous)
    answered = [posterior.answers(observer, case.puzzle) for case in batch]
    condition = cases.condition(observer, batch)
    for step in observer.sample(condition, noise=cases.noise(observer, condition, batch)):
        believed = observer.believes(step.x, step.sigma, condition)
        assert believed.sum(1).tolist() == pytest.approx([1, 1])
        for x, x0, w, z in zip(step.x, step.x0, believed, answered, strict=True):
            exact = posterior.weights(x, step.sigma, z)
            assert torch.allclose(w[: len(z)], exact, atol=1e-12)
            assert (x0 - posterior.mean(exact, z)).abs().max() < 1e-4
    for verdict in cases.scores(observer, step.next, batch):
        assert verdict.solved


def test_a_run_of_few_answers_is_the_same_beside_one_of_many(observer):
    """Padding of the batch never gets any weight."""
    few = cases.held_out("maze", 1, size=3, keep=lambda p: p.ambiguity == 2)
    many = cases.held_out("maze", 1, size=3, keep=lambda p: p.ambiguity > 2)
    together, alone = (cases.condition(observer, some) for some in (few + many, few))
    x = torch.randn(2, *together.shape[1:], generator=torch.Generator().manual_seed(0))
    believed = observer.believes(x, 0.9, together)[0]
    assert torch.allclose(believed[:2], observer.believes(x[:1], 0.9, alone)[0], atol=1e-12)
    assert (believed[2:] == 0).all()


def test_with_foils_it_takes_wrong_answers_for_possible(wan):
    batch = cases.held_out("mark", 1, size=3)
    puzzle = batch[0].puzzle
    credulous = cases.condition(Observer.of(wan, foils=True), batch)
    assert credulous.counts.tolist() == [len(puzzle.candidates) + len(puzzle.foils)]
    assert cases.condition(Observer.of(wan), batch).counts.tolist() == [len(puzzle.candidates)]


def test_hidden_frames_are_their_mean(observer):
    (case,) = cases.held_out("reveal-colour", 1)
    z = posterior.answers(observer, case.puzzle)
    assert (z[:, :, 2] == z[:1, :, 2]).all() and not (z[:, :, 1] == z[:1, :, 1]).all()


def test_it_has_no_network_to_look_into(observer):
    batch = cases.held_out("maze", 1, size=3)
    condition = cases.condition(observer, batch)
    with pytest.raises(MinicosError, match="blocks"):
        observer.sample(condition, hooks=Hooks().on("blocks.0", print))
    guided = observer.with_preset("cos", steps=2)
    assert guided.preset.guidance["high"] > 1
    (first, _) = guided.sample(condition)
    assert first.velocity_uncond is None


def test_lengths_are_those_of_the_puzzles(wan):
    (shell,) = cases.held_out("shell", 1)
    assert cases.frames(wan, [shell]) == shell.puzzle.frames == 17
    assert cases.frames(wan.with_preset(frames=9), [shell]) == 9
    mixed = cases.held_out("maze", 2) + cases.held_out("shell", 2)
    assert [len(batch) for batch in cases.batches(mixed)] == [2, 2]


def test_it_repairs_every_planted_answer_and_keeps_late_ones(observer):
    keep = lambda p: cases.ambiguous(p) and plant.has_foils(p)  # noqa: E731
    batch = cases.held_out("maze", 2, keep=keep)
    found = plant.outcomes(observer.with_preset(steps=4), batch, at=(3,))
    assert found["repaired"].tolist() == [[1], [1]]
    assert found["stayed wrong"].sum() == found["switched"].sum() == 0
    assert found["stayed valid"].tolist() == [[1], [1]]


def test_what_is_recalled_and_which_frames_show_it():
    (twice, cups, maze) = (cases.held_out(k, 1)[0].puzzle for k in ("reveal", "shell", "maze"))
    assert recall.frames(twice) == ((1,), (3,))
    assert recall.frames(cups) == ((2, 3), (4,))
    with pytest.raises(MinicosError, match="nothing is made up twice"):
        recall.frames(maze)


def test_an_observer_that_does_not_know_all_answers_is_refused(observer):
    with pytest.raises(MinicosError, match="lists 24 of"):
        cases.condition(observer, cases.held_out("count", 1, keep=lambda p: p.ambiguity > 24))


@pytest.mark.parametrize(
    ("study", "options"),
    [
        (belief.study, BeliefOptions(n=2, size=3)),
        (steps.study, StepsOptions(n=2, size=3)),
        (commitment.study, CommitmentOptions(n=2, size=3, at=(0, 1), count=2)),
        (counts.study, CountsOptions(n=2, size=3, counts=(1, 2))),
        (noise.study, NoiseOptions(n=2, size=3, at=(0, 1))),
    ],
)
def test_studies_run_on_it_unchanged(study, options, observer, tmp_path):
    found = study(observer, Run.open(tmp_path, {}), options)
    assert found.numbers
