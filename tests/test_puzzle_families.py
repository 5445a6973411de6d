"""Families of puzzles: each passes the truth, and nothing else: not
its foils, not a blur, not noise.
"""

from functools import cache
from itertools import combinations, product

import numpy as np
import pytest

from minicos import cli, puzzles
from minicos.errors import MinicosError
from minicos.media import load_image
from minicos.puzzles import CATEGORIES, FAMILIES, PROMPTS, SPLITS, WORDS, Knobs, Puzzle, draw

N = 4  # puzzles of each family
SOME = 3  # answers and foils of each puzzle

each_family = pytest.mark.parametrize("name", FAMILIES)


@cache
def some(name: str) -> tuple[Puzzle, ...]:
    return tuple(FAMILIES[name].draw(seed, "train") for seed in range(N))


def videos(p: Puzzle) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Some valid answers of a puzzle, the last among them, and some foils."""
    valid = len(p.candidates)
    right = sorted({*range(min(SOME, valid)), valid - 1})
    wrong = range(valid, valid + min(SOME, len(p.foils)))
    return [p.draw(i) for i in right], [p.draw(i) for i in wrong]


def mix(*parts: tuple[float, np.ndarray]) -> np.ndarray:
    """A weighted mean of videos, in uint8."""
    return draw.to_uint8(sum(np.float32(w) * video for w, video in parts))


def like_a_vae(video: np.ndarray) -> np.ndarray:
    """A little blur and noise: 25-30 dB, worse than the embedded VAE."""
    noise = np.random.default_rng(0).normal(0, 5, video.shape)
    soft = 0.6 * video + 0.4 * draw.box_blur(video, 3)
    return np.clip(soft + noise + 0.5, 0, 255).astype(np.uint8)


@each_family
def test_a_puzzle_is_a_pure_function_of_its_seed_and_keeps_to_its_split(name):
    family = FAMILIES[name]
    for split in SPLITS:
        p = family.draw(1, split)
        assert p == family.draw(1, split) and puzzles.split_of(p.key) == split
        assert (p.composition in p.held_out) == family.held_out
    with pytest.raises(MinicosError, match="train, dev, test"):
        family.draw(0, "validation")


@each_family
def test_words_and_knobs(name):
    family = FAMILIES[name]
    assert family.category in CATEGORIES and family.domain in ("in", "out")
    for p in some(name):
        assert p.prompt in p.prompts and p.prompt in PROMPTS and len(p.prompt.split()) <= 10
        assert set(p.prompt.split()) <= set(WORDS)
        assert 1 <= len(p.candidates) <= p.ambiguity and p.depth >= 1
        if family.knobs.k == 1:
            assert p.ambiguity == 1
        if family.knobs.s is not None:
            assert p.depth >= family.knobs.s
        if family.knobs.d is not None:
            assert p.distractors >= family.knobs.d


@each_family
def test_every_answer_and_foil_begins_with_the_picture_and_differs_later(name):
    for p in some(name):
        right, wrong = videos(p)
        side = p.size * draw.CELL
        for video in right + wrong:
            assert video.shape == (p.frames, side, side, 3) and video.dtype == np.uint8
            assert (video[0] == p.first_frame()).all()
        for a, b in combinations(right + wrong, 2):
            assert draw.differs(a, b).sum((1, 2)).max() > 12


@each_family
def test_truth_scores_one_also_through_a_vae(name):
    for p in some(name):
        for video in videos(p)[0]:
            score = p.score(video)
            assert score.solved and not score.detail and score.score == pytest.approx(1)
            assert p.score(like_a_vae(video)).solved


@each_family
def test_stills_and_noise_score_little(name):
    noise = np.random.default_rng(0)
    for p in some(name):
        video = p.draw(0)
        grain = noise.integers(0, 256, video.shape, dtype=np.uint8)
        for wrong in (np.repeat(video[:1], len(video), 0), grain, np.full_like(video, 128)):
            score = p.score(wrong)
            assert score.score <= 0.3 and not score.solved and score.detail


@each_family
def test_foils_fail_and_are_recognised(name):
    for p in some(name):
        for i, video in enumerate(videos(p)[1]):
            score = p.score(video)
            assert not score.solved and score.answer is None and score.score < 0.95
            assert score.foil == i


@each_family
def test_a_blur_fails(name):
    """The mean of all answers, as one step from pure noise gives it, and milder mixtures of two."""
    for p in some(name):
        right, wrong = videos(p)
        still = np.repeat(right[0][:1], len(right[0]), 0)
        blurs = [mix((0.5, right[0]), (0.5, still))]
        if p.ambiguity > 1:
            every = [p.draw(i) for i in range(min(len(p.candidates), 24))]
            blurs.append(mix(*((1 / len(every), video) for video in every)))
        for a, b in combinations(right, 2):
            blurs.append(mix((0.6, a), (0.4, b)))
        for i, (a, b) in enumerate(product(right, wrong)):
            w = 0.5 + 0.1 * (i % 2)
            blurs.append(mix((w, a), (1 - w, b)))
        for blur in blurs:
            assert not p.score(blur).solved


def test_unknown_names_and_knobs_are_refused():
    with pytest.raises(MinicosError, match="unknown family 'sudoku'"):
        puzzles.family("sudoku")
    with pytest.raises(MinicosError, match="mark has no knob k"):
        puzzles.make("mark", 0, knobs=Knobs(k=2))


def test_prompts_need_few_words():
    assert len(set(PROMPTS)) == len(PROMPTS) and len(WORDS) <= 80


def test_the_verb_lists_families_and_writes_a_folder_for_each_puzzle(tmp_path, capsys):
    assert cli.main(["puzzles", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FAMILIES)
    command = ["puzzles", "--kind", "mark", "--n", "2", "--split", "dev", "--out", str(tmp_path)]
    assert cli.main(command) == 0 and cli.main([*command, "--size", "3"]) == 0
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == ["mark-own_3x3_dev", "mark_4x4_dev"]
    prompt = (tmp_path / "mark_4x4_dev/00001/prompt.txt").read_text().strip()
    assert prompt == FAMILIES["mark"].draw(1, "dev").prompt
    height, width = load_image(tmp_path / "mark_4x4_dev.png").shape[1:]
    assert height == 2 * 2 * (64 + 8) and width == 2 * 11 * (64 + 8)
    assert cli.main([*command, "--k", "2"]) == 2
    assert "mark has no knob k" in capsys.readouterr().err
