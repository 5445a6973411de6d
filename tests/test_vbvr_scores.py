"""The external scorer and the tables: a stand-in checkout, failures, means, intervals over
tasks.
"""

import csv
import json
import math
import sys

import numpy as np
import pytest

from minicos.analysis import result
from minicos.errors import MinicosError
from minicos.vbvr import cases, evalkit, puzzles, score, steps, table, tree
from minicos.vbvr.published import BENCH, COLUMNS, MARK, PRO, SOURCES, Published
from minicos.vbvr.steps import Estimates
from tests.vbvr_samples import bench, sample

SCRIPT = """
import json, os, re, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
videos, samples = given["--model_path"], []
for folder in sorted(os.listdir(videos)):
    for task in sorted(os.listdir(os.path.join(videos, folder))):
        for file in sorted(os.listdir(os.path.join(videos, folder, task))):
            path = os.path.join(videos, folder, task, file)
            broken = os.path.getsize(path) == 0
            samples.append({"folder": folder, "task_name": task, "video_file": file, "score": 0.0 if broken else SCORE,
                            "error": "Cannot open video" if broken else None})
name = os.path.basename(videos)
with open(os.path.join(given["--output_dir"], name + "_vbvr_results.json"), "w") as out:
    json.dump({"samples": samples}, out)
sys.exit(CODE)
"""


def checkout(folder, opencv="4.10.0", value="0.25", code="0", script="run_evaluation.py"):
    """A checkout whose scorer gives every video the same score, with an OpenCV of this version."""
    folder.mkdir()
    (folder / "cv2.py").write_text(f"__version__ = {opencv!r}")
    (folder / "tqdm.py").write_text("")
    text = SCRIPT.replace("SCORE", value).replace("CODE", code)
    (folder / script).write_text(text)
    return folder


@pytest.fixture
def found(tmp_path):
    return cases.read(bench(tmp_path / "data", 2))


@pytest.fixture
def videos(tmp_path, found):
    for one in found.samples:
        place = tree.path(tmp_path / "plain", one.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"video")
    return tmp_path / "plain"


def test_scores_failures_and_what_was_left_out(tmp_path, found, videos):
    kit = evalkit.find(checkout(tmp_path / "kit"), sys.executable)
    names = [one.name for one in found.samples]
    tree.path(videos, names[0]).write_bytes(b"")
    tree.path(videos, names[1]).unlink()
    scored = evalkit.score(kit, videos, found.root, names)
    assert scored.scores == dict.fromkeys(names[2:], 0.25)
    assert (
        scored.failed[names[0]] == "Cannot open video" and "left it out" in scored.failed[names[1]]
    )


@pytest.mark.parametrize(
    ("version", "fits"), [("4.14.0", True), ("5.0.0", False), ("5.1.0-pre", False)]
)
def test_opencv_5_is_refused(tmp_path, version, fits):
    folder = checkout(tmp_path / "kit", opencv=version)
    if fits:
        assert evalkit.find(folder, sys.executable).opencv == version
    else:
        with pytest.raises(MinicosError, match=r"opencv-python-headless<5"):
            evalkit.find(folder, sys.executable)


def test_a_scorer_that_is_absent_or_fails(tmp_path, found, videos):
    with pytest.raises(MinicosError, match=r"run_evaluation\.py"):
        evalkit.find(tmp_path, sys.executable)
    with pytest.raises(MinicosError, match="--evalkit-python"):
        evalkit.find(checkout(tmp_path / "a"), tmp_path / "nothing")
    (tmp_path / "a" / "cv2.py").write_text("import nothing_of_this_name")
    with pytest.raises(MinicosError, match="nothing_of_this_name"):
        evalkit.find(tmp_path / "a", sys.executable)
    kit = evalkit.find(checkout(tmp_path / "b", code="3"), sys.executable)
    with pytest.raises(MinicosError, match="exit code 3"):
        evalkit.score(kit, videos, found.root, [])


@pytest.mark.parametrize(
    "result",
    [
        [],
        {},
        {"samples": [{}]},
        {
            "samples": [
                {"folder": "a", "task_name": "b", "video_file": 1, "score": 0, "error": None}
            ]
        },
    ],
)
def test_results_of_another_form(result):
    with pytest.raises(MinicosError, match="another form"):
        evalkit.parse(result, [])


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
def test_a_score_that_is_none(value):
    one = {
        "folder": "a",
        "task_name": "b",
        "video_file": "00000.mp4",
        "score": value,
        "error": None,
    }
    scored = evalkit.parse({"samples": [one]}, ["a/b/00000"])
    assert not scored.scores and list(scored.failed) == ["a/b/00000"]


def test_a_tree_is_scored_once_until_it_changes(tmp_path, found, videos):
    samples = {one.name: one for one in found.samples}
    kit = evalkit.find(checkout(tmp_path / "kit"), sys.executable)

    def run():
        return score.trees({"plain": videos}, samples, tmp_path / "scores", found.root, kit)[
            "score"
        ]["plain"]

    first = run()
    script = tmp_path / "kit" / "run_evaluation.py"
    works = script.read_text()
    script.write_text("raise SystemExit(1)")
    assert run() == first  # not scored again
    tree.path(videos, found.samples[0].name).write_bytes(b"another")
    broken = run()  # a failing scorer affects nothing else, and is tried again
    assert not broken.scores and all("exit code 1" in why for why in broken.failed.values())
    script.write_text(works)
    assert run() == first


def scores(found, **by_condition):
    samples = {one.name: one for one in found.samples}
    return table.Scores(
        {k: dict(zip(samples, v, strict=False)) for k, v in by_condition.items()},
        samples,
        {k: {} for k in by_condition},
    )


def test_an_interval_is_over_tasks():
    values, tasks = [0.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b"]
    interval = table.clustered(values, tasks)
    assert (interval.value, interval.low, interval.high, interval.n) == (0.5, 0.0, 1.0, 4)
    many = table.clustered(np.repeat([0.4, 0.6], 200), [f"{i}" for i in range(400)])
    assert many.low > 0.48 and many.high < 0.52  # the same values in tasks of their own are surer
    assert math.isnan(table.clustered([0.5, 0.7], ["a", "a"]).low)
    none = table.clustered([0.0] * 100, [f"{i % 50}" for i in range(100)])
    assert none.low == 0 and 0.05 < none.high < 0.1  # 50 tasks may have missed one in 14
    equal = table.clustered([0.0] * 100, [f"{i % 50}" for i in range(100)], signed=True)
    assert (equal.low, equal.high) == (-none.high, none.high)


@pytest.mark.parametrize("tasks", [10, 40])
def test_an_interval_over_tasks_covers_the_truth(tasks):
    """Tasks of unequal size and difficulty."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        sizes = rng.integers(3, 8, tasks)
        rates = np.repeat(rng.beta(1, 2, tasks), sizes)
        names = np.repeat(np.arange(tasks).astype(str), sizes)
        found = table.clustered((rng.random(len(rates)) < rates).astype(float), names)
        covered += found.low <= 1 / 3 <= found.high
    assert 0.92 < covered / 400 < 0.98


def test_differences_are_paired_and_only_over_samples_that_both_have(found):
    both = scores(found, plain=[0.1, 0.2, 0.8, 0.9], ensemble=[0.2, 0.3, 0.9])
    (row,) = table.differences(both, "plain")
    assert row["Overall"].value == pytest.approx(0.1) and row["Overall"].n == 3
    rows = {row["condition"]: row for row in table.overview(both)}
    assert rows["plain"]["scored"] == "4 of 4" and rows["ensemble"]["scored"] == "3 of 4"
    assert rows["plain"]["ID"].value == pytest.approx(0.15)
    assert rows["plain"]["OOD Transformation"] == pytest.approx(0.85)
    number = {n.name: n for n in table.numbers(both, "plain")}["score: ensemble minus plain"]
    assert number.value == pytest.approx(0.1) and number.resolvable >= 0


def test_files(tmp_path, found):
    made = scores(found, plain=[0.1, 0.2, 0.8, 0.9], ensemble=[0.2, 0.3, 0.9, 0.9])
    report = table.result(made, "plain", {"samples": 4}, table.reference(pro=False))
    report = table.write(tmp_path, made, "plain", report)
    assert "table.png" in report.files
    assert all((tmp_path / name).stat().st_size for name in report.files)
    text = (tmp_path / "table.md").read_text()
    assert (
        MARK in text
        and "suspicious" in text
        and "arXiv 2602.20159" in text
        and "| ensemble |" in text
    )
    rows = list(csv.DictReader((tmp_path / "differences.csv").open()))
    assert float(rows[0]["Overall"]) == pytest.approx(0.075) and "Overall low" in rows[0]
    assert {row["domain"] for row in csv.DictReader((tmp_path / "tasks.csv").open())} == {
        "ID",
        "OOD",
    }
    run = result.Run(tmp_path, {})
    result.write(run, report)
    assert json.loads((tmp_path / "results.json").read_text())["what"] == "vbvr"


def test_a_spreadsheet_computes_nothing():
    assert table.to_csv([{"condition": "=1+1"}, {"condition": "@x"}]) == "condition\n'=1+1\n'@x\n"


def test_suspicious_rows():
    doubtful = {row.name for row in BENCH if row.suspicions}
    assert doubtful == {"VBVR-Wan2.2, 33 frames"}
    assert Published("x", {"Overall": 0.5, "ID": 0.9, "OOD": 0.3}, "").suspicions
    assert Published("x", {"OOD Spatiality": -0.1}, "").suspicions == (
        "OOD Spatiality is outside 0 to 1",
    )
    means = {"Overall": 0.5, "ID": 0.6, "OOD": 0.4}
    assert not Published("x", means | {"ID Knowledge": 0.5, "ID Spatiality": 0.7}, "").suspicions
    assert Published("x", means | {"ID Knowledge": 0.5, "ID Spatiality": 0.55}, "").suspicions


@pytest.mark.parametrize("rows", [BENCH, PRO])
def test_published_rows_fit_the_columns_and_are_named_once(rows):
    assert len({row.name for row in rows}) == len(rows)
    assert all(set(row.scores) <= set(COLUMNS) and row.source[0] in SOURCES for row in rows)
    assert all(abs(value) <= 1 for row in rows for value in row.scores.values())


def test_the_scorer_of_pro_bench(tmp_path, found):
    """Its script, its requirements, and results that count missing videos."""
    folder = checkout(tmp_path / "pro", script="run_evaluation_video.py")
    for name in ("scipy", "skimage", "norfair", "easyocr"):
        (folder / f"{name}.py").write_text("")
    (folder / "numpy.py").write_text("__version__ = '1.26.4'")
    (folder / "PIL.py").write_text("")
    kit = evalkit.find(folder, sys.executable)
    assert kit.scorer is evalkit.PRO
    with pytest.raises(MinicosError, match="VBVR-EvalKit"):
        evalkit.check(kit, found.samples)
    for one in found.samples:
        (found.root / one.name / "metadata.json").write_text('{"parameters": {"scale": 3}}')
    pro = cases.read(found.root)
    evalkit.check(kit, pro.samples)
    assert [one.category for one in found.samples] == ["Knowledge"] * 2 + ["Transformation"] * 2
    with pytest.raises(MinicosError, match="VBVR-Pro-Bench"):
        evalkit.check(evalkit.find(checkout(tmp_path / "kit"), sys.executable), pro.samples)
    (folder / "numpy.py").write_text("__version__ = '2.1.0'")
    with pytest.raises(MinicosError, match=r"numpy<2"):
        evalkit.find(folder, sys.executable)


def test_a_task_may_have_another_category_in_pro_bench(tmp_path):
    changed = next(name for name, task in cases.tasks().items() if task.category != task.pro)
    sample(tmp_path / cases.tasks()[changed].split / changed / "00000")
    (one,) = cases.read(tmp_path).samples
    assert one.category == cases.tasks()[changed].category and not one.pro
    (tmp_path / one.name / "metadata.json").write_text('{"family": "maze", "seed": 1}')
    (one,) = cases.read(tmp_path).samples
    assert one.pro and one.category == cases.tasks()[changed].pro and not puzzles.known(one)


def test_what_was_not_wanted_is_no_failure():
    one = {
        "folder": "a",
        "task_name": "b",
        "video_file": "00001.mp4",
        "score": 0.0,
        "error": "no prediction",
    }
    scored = evalkit.parse({"samples": [one]}, ["a/b/00000"])
    assert list(scored.failed) == ["a/b/00000"]


def test_the_chain_of_steps(tmp_path, found):
    """Each step against the end, paired, over the sigma at which it begins."""
    made = scores(
        found,
        plain=[0.5, 0.5, 1.0, 1.0],
        **{"plain/steps/step_009": [0.5, 0.5, 0.5, 0.5], "plain/steps/step_000": [0.0, 0.0, 0.5]},
    )
    trees = {
        "plain/steps/step_009": Estimates("plain", 9, 0.8),
        "plain/steps/step_000": Estimates("plain", 0, 1.0),
    }
    rows = steps.rows(made, trees)
    assert [(row["step"], row["sigma"], row["scored"]) for row in rows] == [
        (0, 1.0, "3 of 4"),
        (9, 0.8, "4 of 4"),
        ("end", 0.0, "4 of 4"),
    ]
    assert rows[0]["minus the end"].value == pytest.approx(-0.5) and rows[0]["minus the end"].n == 3
    (curve,) = steps.curves(rows)
    assert curve.x == (1.0, 0.8, 0.0) and curve.value == pytest.approx((1 / 6, 0.5, 0.75))
    (number,) = steps.numbers(rows)
    assert "step 0 minus the end" in number.name and number.value == pytest.approx(-0.5)
    steps.draw(tmp_path / "steps.png", [curve], {"static": 0.2})
    assert (tmp_path / "steps.png").stat().st_size
