"""Reading samples: three layouts, and untrusted content."""

import json
import os
import shutil

import pytest

from minicos.errors import MinicosError
from minicos.media import save_image
from minicos.vbvr import cases
from tests.vbvr_samples import TASKS, bench, clip, sample


def test_the_tasks_are_the_benchmarks_hundred():
    splits = [task.split for task in cases.tasks().values()]
    assert len(splits) == 100 and splits.count("In-Domain_50") == 50
    inside = [t.category for t in cases.tasks().values() if t.split == "In-Domain_50"]
    assert {c: inside.count(c) for c in set(inside)} == {
        "Abstraction": 15,
        "Knowledge": 9,
        "Perception": 11,
        "Spatiality": 8,
        "Transformation": 7,
    }


def test_a_folder_of_the_benchmark(tmp_path):
    found = cases.read(bench(tmp_path))
    assert not found.problems and len(found.samples) == 4
    first = found.samples[0]
    assert first.name == f"In-Domain_50/{TASKS['In-Domain_50']}/00000"
    assert (first.split, first.task) == ("In-Domain_50", TASKS["In-Domain_50"])
    assert (first.category, first.frames, first.size) == ("Knowledge", 9, (48, 64))
    assert first.prompt == "Move the square."
    assert len(cases.missing(found)) == 496
    assert (cases.load_picture(first) == clip(9, 48, 64)[0]).all()


def test_the_folder_may_be_one_level_down_in_gt(tmp_path):
    bench(tmp_path / "GT", 1)
    assert cases.read(tmp_path).root == tmp_path / "GT"


def test_metadata_gives_the_category_where_the_task_is_unknown(tmp_path):
    sample(tmp_path / "In-Domain_50" / "new_task" / "00000")
    (tmp_path / "In-Domain_50/new_task/00000/metadata.json").write_text('{"category": "Knowledge"}')
    (one,) = cases.read(tmp_path).samples
    assert one.category == "Knowledge"


def test_any_folder_of_pictures_and_prompts(tmp_path):
    (tmp_path / "cat").mkdir()
    save_image(tmp_path / "cat" / "picture.png", clip(1, 32, 32)[0])
    (tmp_path / "cat" / "prompt.txt").write_text("the cat jumps")
    save_image(tmp_path / "dog.png", clip(1, 32, 48)[0])
    (tmp_path / "dog.txt").write_text("﻿the dog sits\n", encoding="utf-8")
    found = cases.read(tmp_path)
    assert {s.name: s.prompt for s in found.samples} == {
        "cat": "the cat jumps",
        "dog": "the dog sits",
    }
    assert all(s.truth is None and s.frames is None and s.split == "" for s in found.samples)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("first_frame.png", lambda path: path.write_bytes(path.read_bytes()[:60])),
        ("first_frame.png", lambda path: path.unlink()),
        ("prompt.txt", lambda path: path.write_bytes(b"\xff\xfe\x00")),
        ("prompt.txt", lambda path: path.write_text(" \n")),
        ("prompt.txt", lambda path: path.unlink()),
        ("ground_truth.mp4", lambda path: path.write_bytes(b"")),
        ("metadata.json", lambda path: path.write_text("[1]")),
        ("metadata.json", lambda path: path.write_text("[" * 100_000)),
    ],
)
def test_a_broken_sample_is_named_and_the_others_are_kept(tmp_path, name, spoil):
    root = bench(tmp_path, 2)
    broken = root / "In-Domain_50" / TASKS["In-Domain_50"] / "00001"
    spoil(broken / name)
    found = cases.read(root)
    assert len(found.samples) == 3
    assert list(found.problems) == [broken.relative_to(root).as_posix()]


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    root = bench(tmp_path / "data", 1)
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    prompt = root / "In-Domain_50" / TASKS["In-Domain_50"] / "00000" / "prompt.txt"
    prompt.unlink()
    prompt.symlink_to(secret)
    os.symlink(tmp_path, root / "In-Domain_50" / "up")
    found = cases.read(root)
    assert len(found.samples) == 1 and "link" in next(iter(found.problems.values()))


def test_a_snapshot_of_the_hub_is_made_of_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    bench(tmp_path / "real", 1)
    blobs.mkdir()
    for number, file in enumerate(sorted((tmp_path / "real").rglob("*.*"))):
        if file.is_file():
            there = snapshot / file.relative_to(tmp_path / "real")
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(file, blobs / str(number))
            there.symlink_to(blobs / str(number))
    assert len(cases.read(snapshot).samples) == 2


@pytest.mark.parametrize("name", ["a|b", "a<script>", "-rf", "a\nb", "a\x1b[31m", "`x`"])
def test_names_that_a_table_or_a_terminal_would_misread(tmp_path, name):
    sample(tmp_path / "In-Domain_50" / name / "00000")
    found = cases.read(tmp_path)
    assert not found.samples
    assert all(c.isprintable() and c not in "|<>`" for n in found.problems for c in n)


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_text("x")])
def test_a_folder_that_is_none(tmp_path, make):
    make(tmp_path / "there")
    with pytest.raises(MinicosError, match="there"):
        cases.read(tmp_path / "there")


def test_pixels_repeated_by_the_samples_own_word(tmp_path):
    sample(tmp_path / "x" / "00000", size=(64, 64))
    for given, scale in ((4, 4), (3, 1), ("4", 1), (0, 1)):
        (tmp_path / "x" / "00000" / "metadata.json").write_text(json.dumps({"scale": given}))
        assert cases.read(tmp_path).samples[0].scale == scale
