"""Cases, batches of them, and what an experiment keeps of each batch."""

import numpy as np
import pytest
import torch

from minicos import puzzles
from minicos.analysis.tools import cases
from minicos.analysis.tools.cases import Case
from minicos.open import load
from minicos.runs import Run


def test_distinct_puzzles_are_of_their_split():
    found = puzzles.distinct("maze", 30, 3, "test")
    assert len({p.key for p in found}) == 30
    assert all(puzzles.split_of(p.key) == "test" for p in found)
    assert puzzles.distinct("maze", 10, 3, "test") == found[:10]


def test_a_split_holds_only_so_many():
    with pytest.raises(ValueError, match="not 60 distinct turn"):
        puzzles.distinct("turn", 60, 3, "test")  # there are 46


def test_batches_keep_order_and_sizes_apart():
    made = [*cases.held_out("mark", 7, size=3), *cases.held_out("mark", 5, size=4)]
    together = cases.batches(made, most=3)
    assert [case for batch in together for case in batch] == made
    assert all(
        len(batch) <= 3 and len({case.image.shape for case in batch}) == 1 for batch in together
    )
    assert [case.seed for case in made] == [*range(7), *range(5)]


def test_a_case_is_its_puzzles_picture_and_prompt(toy):
    wan = load(toy, device="cpu")
    batch = cases.held_out("mark", 2, size=3)
    condition = cases.condition(wan, batch)
    again = wan.condition([c.puzzle.prompt for c in batch], torch.stack([c.image for c in batch]))
    assert torch.equal(condition.y, again.y)
    assert torch.equal(condition.text, again.text)
    noise = cases.noise(wan, condition, batch, offset=100)
    assert torch.equal(noise[1], wan.noise(condition, [100, 101])[1])
    assert [s.solved for s in cases.scores(wan, noise, batch)] == [False, False]


def test_collect_computes_each_batch_once(tmp_path):
    work = cases.batches(cases.held_out("mark", 5, size=3), most=2)
    seen = []

    def compute(batch: list[Case]):
        seen.append(len(batch))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {"seed": torch.tensor([case.seed for case in batch])}

    run = Run.open(tmp_path / "run", {})
    with pytest.raises(KeyboardInterrupt):
        cases.collect(run, "seeds", work, compute)
    out = cases.collect(run, "seeds", work, compute)
    assert seen == [1, 2, 2, 2]  # the first two were kept
    assert np.array_equal(out["seed"], [0, 1, 2, 3, 4])
