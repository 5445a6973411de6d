"""All experiments in one report: what a claim is, how a report is written, and that a killed run
ends at the same bytes.
"""

import json
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minicos.analysis import report
from minicos.analysis.claims import CLAIMS
from minicos.analysis.reproduce import FULL, SECTIONS, parts
from minicos.analysis.result import Number, Result
from minicos.analysis.tools import cases, controls, stats
from minicos.analysis.verdicts import FIELDS, NOT, OPEN, SUPPORTED
from minicos.cli import main, reproduce
from minicos.open import load
from tests.test_cli import posix, start, wait_for

ONLY = "energy,perception"  # two fast ones


def arguments(toy, out, workers: int) -> list[str]:
    return [
        "reproduce",
        "--model",
        str(toy),
        "--only",
        ONLY,
        "--n",
        "5",
        "--workers",
        str(workers),
        "--out",
        str(out),
    ]


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    assert main(arguments(toy, out, workers=1)) == 0
    return out


# -- the report ------------------------------------------------------------------------------------


def test_claims_are_complete_and_paths_are_relative(undisturbed, toy):
    claims = json.loads((undisturbed / "claims.json").read_text())
    text = (undisturbed / "report.md").read_text()
    assert [set(claim) for claim in claims] == [set(FIELDS)] * 3
    for claim in claims:
        assert claim["control"] and claim["claim"] in text
        assert claim["verdict"] in (SUPPORTED, NOT, OPEN)
        if claim["n"]:  # random weights answer nothing, so nothing is decided in their videos
            assert claim["low"] < claim["high"] and claim["n"] == 5
        else:
            assert claim["effect"] is None and claim["verdict"] == OPEN
    (head, *_) = [claim for claim in claims if "Late layers" in claim["claim"]]
    preset = "--steps 10 --decode-dtype bfloat16"
    assert head["command"] == f"minicos energy --n 5 {preset} --model {toy}"
    assert head["ideal"] == "n/a" and head["paper"] == "Fig. 6a"
    links = [line[line.index("(") + 1 : -1] for line in text.splitlines() if line.startswith("![")]
    assert links and all((undisturbed / link).stat().st_size > 1000 for link in links)
    assert text.index(report.CAVEAT) < text.index("## ")
    assert str(undisturbed) not in text
    page = (undisturbed / "index.html").read_text("utf-8")
    assert (
        page.index("Verdicts on headlines") < page.index(head["claim"]) < page.index("energy/mark")
    )


@posix
def test_a_killed_run_ends_at_the_same_bytes(undisturbed, toy, tmp_path):
    """kill -9 at a moment that nothing fixes, two workers being busy; the rerun is in one
    process. Workers end with their parent.
    """
    process = start("-m", "minicos", *arguments(toy, tmp_path, workers=2))
    wait_for(tmp_path / "energy/mark/trained/000.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # ends when the last of them has closed its end of the pipe
    kept = os.stat(tmp_path / "energy/mark/trained/000.safetensors").st_mtime_ns
    assert main(arguments(toy, tmp_path, workers=1)) == 0
    assert os.stat(tmp_path / "energy/mark/trained/000.safetensors").st_mtime_ns == kept
    names = sorted(
        p.relative_to(undisturbed)
        for p in undisturbed.rglob("*")
        if p.suffix in (".md", ".png", ".json")
    )
    for name in names:
        if name.name != "run.json":  # date and command
            assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_a_finished_run_only_writes_the_report(undisturbed, toy, capsys):
    before = (undisturbed / "report.md").read_bytes()
    (undisturbed / "report.md").unlink()
    assert main(arguments(toy, undisturbed, workers=1)) == 0
    assert (undisturbed / "report.md").read_bytes() == before
    assert "Late layers are busy with the answer" in capsys.readouterr().out
    main([*arguments(toy, undisturbed, workers=1), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == json.loads((undisturbed / "claims.json").read_text())


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--n", "3"], "--n 3"),
        (["--n", "5", "--full"], "not allowed"),
        (["--only", "swaps"], "no experiment 'swaps'"),
    ],
)
def test_mistakes_in_one_sentence(argv, words, tmp_path, capsys):
    try:
        code = main(["reproduce", "--out", str(tmp_path / "new"), *argv])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_full_adds_to_the_same_headlines():
    """The appendix of --full has folders of its own and keeps what its parts set themselves."""
    short, full = parts(100), parts(FULL)
    for name, some in full.items():
        assert [p.name for p in some][: len(short[name])] == [p.name for p in short[name]]
        assert len({p.name for p in some}) == len(some)
    (guided,) = [p for p in full["swap"] if p.name == "guided"]
    assert guided.preset == {"steps": 10, "guidance": 5}
    assert "--steps 10 --guidance 5" in guided.command()


def test_the_command_knows_every_section():
    assert tuple(SECTIONS) == reproduce.SECTIONS


# -- numbers ---------------------------------------------------------------------------------------


def test_a_difference_leaves_out_what_has_no_value_and_says_its_power():
    a, b = np.array([1.0, 2.0, np.nan, 4.0]), np.array([0.0, 0.0, 0.0, 1.0])
    found = stats.difference("more", a, b, "b")
    assert found.n == 3 and found.value == 2.0
    assert found.resolvable == stats.resolvable(np.std([1, 2, 3]), 3)
    assert np.isnan(stats.difference("same", b, b, "b").resolvable)


def test_numbers_without_a_value_are_null_in_json_and_said_in_the_report(tmp_path):
    (part, *_) = parts(5)["energy"]
    names = {claim.number for claim in CLAIMS if claim.part == "energy/mark"}
    numbers = [stats.mean(name, np.array([np.nan])) for name in names]
    numbers.append(Number("turns", float("inf"), 3.0, float("inf"), 5, note="the last layer"))
    report.write(tmp_path, {"energy": [(part, Result("energy", {}, numbers))]}, "About.", "tiny")
    first, second = json.loads((tmp_path / "claims.json").read_text())
    assert first["effect"] is None and first["low"] is None and first["n"] == 0
    assert first["verdict"] == second["verdict"] == OPEN
    assert "| turns | never [3.000, never] | 5 |" in (tmp_path / "report.md").read_text()


def test_unpaired_means():
    rng = np.random.default_rng(0)
    a, b = rng.normal(1, 1, 400), rng.normal(0, 1, 300)
    found = stats.unpaired(a, b)
    width = 1.96 * (a.var() / 400 + b.var() / 300) ** 0.5
    assert found.value == a.mean() - b.mean() and found.n == 300
    assert found.high - found.value == pytest.approx(width, rel=0.05)  # measured: 1 %


# -- cases and controls ----------------------------------------------------------------------------


@given(st.integers(4, 400), st.sampled_from([4, 10, 25]))
def test_batches_keep_order_and_leave_no_small_rest(n, most):
    some = [cases.Case("mark the circle", seed=i) for i in range(n)]
    made = cases.batches(some, most)
    assert [case.seed for batch in made for case in batch] == list(range(n))
    sizes = {len(batch) for batch in made}
    assert max(sizes) <= most and max(sizes) - min(sizes) <= 1 and len(made) == -(-n // most)


def test_the_untrained_network_has_the_same_shape_and_other_weights(toy):
    wan = load(toy, device="cpu")
    torch.manual_seed(7)
    random, state = controls.untrained(wan), torch.get_rng_state()
    again = controls.untrained(wan)
    assert torch.equal(state, torch.get_rng_state())  # the global random state is unchanged
    ours, theirs, same = (w.experts["high"].state_dict() for w in (wan, random, again))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(theirs[k], same[k]) for k in theirs)
    assert not torch.equal(
        ours["blocks.0.self_attn.q.weight"], theirs["blocks.0.self_attn.q.weight"]
    )
