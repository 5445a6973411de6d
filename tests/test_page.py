"""The page of a run: the content of the file, and its behaviour in a real browser."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minicos.analysis.result import Curve as Curve_
from minicos.analysis.result import Interval, Number, Result, write
from minicos.analysis.tools.figures import grid, lines
from minicos.analysis.tools.shown import Where, list_interventions, save_videos
from minicos.errors import MinicosError
from minicos.media import save_image
from minicos.page import Clip, Curve, Map, Page, Picture, Series, Table, gather, render
from minicos.page.folders import Row, write_cases
from minicos.runs import Run
from tests.browser import CHROMIUM, DRIVER, browser

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver on the PATH"
)
HOSTILE = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    + f"\u202e{'W' * 300}\u2028"  # text that runs backwards, and a long word
)


def made(frames: int = 5, steps: int = 4, side: int = 32) -> Page:
    """A page with everything on it; the clip of step s is of the grey level 60 s + 5 f."""
    level = 60 * np.arange(steps)[:, None] + 5 * np.arange(frames)
    videos = np.broadcast_to(level[:, :, None, None, None], (steps, frames, side, side, 3))
    rng = np.random.default_rng(0)
    energy = rng.random((steps, 3, 2, 4, 4))
    energy[0, 0] = np.nan
    return Page(
        title="minicos steps",
        command=f"minicos steps --prompt '{HOSTILE}'",
        prompt=HOSTILE,
        summary="tiny",
        picture=np.zeros((side, side, 3), np.uint8),
        sigmas=[1.0, 0.9, 0.6, 0.3, 0.0],
        clips=[
            *(Clip(i, f"step {i}", v.astype(np.uint8), HOSTILE) for i, v in enumerate(videos)),
            Clip(None, HOSTILE, np.full((frames, side, side, 3), 7, np.uint8)),
        ],
        maps=[
            Map("Token energy", energy, range(steps), range(3), (2, 4, 4)),
            Map("Attention", rng.random((1, 1, 32, 32)), [1], [2], (2, 4, 4), kind="pairs"),
        ],
        curves=[
            Curve(
                "Answers alive",
                "denoising step",
                range(4),
                [Series(HOSTILE, [2, float("nan"), 1, 1])],
                follows="step",
                marks={"experts change": 2.0},
                levels={HOSTILE: 1.5},
            ),
            Curve(
                "Energy",
                "layer",
                range(3),
                [Series("e", [1, 2, 3], [0, 1, 2], [2, 3, 4])],
                follows="layer",
            ),
        ],
        marks=[Where("noise: replace", steps=[1, 2], frames=[1])],
        tables=[
            Table(
                HOSTILE,
                ["finding", HOSTILE],
                [("D", 0.31), (HOSTILE, float("inf")), ({"image": np.zeros((8, 8, 3), "u1")}, 1)],
            ),
            Table("Cases", ["case"], [({"href": "javascript:hacked=1//a", "text": HOSTILE},)]),
        ],
        pictures=[Picture(HOSTILE, b"")],
        settings={"steps": 4, "guidance": {"high": 1.0}},
        files=["video.mp4", HOSTILE],
        next=[("See attention", "minicos attention --puzzle maze")],
    )


def embedded(html: str) -> dict:
    """The data inside a page."""
    text = html.split('<script id="data" type="application/json">', 1)[1]
    return json.loads(text.split("</script>", 1)[0])


def test_text_of_a_run_never_becomes_markup():
    html = render(made())
    assert html.count("<script") == html.count("</script>") == 2
    assert embedded(html)["prompt"] == HOSTILE


def test_a_file_name_that_is_not_utf_8_fits_on_a_page():
    html = render(replace(made(), files=["\udcff.png"]))
    assert embedded(html.encode().decode())["files"] == ["\udcff.png"]


def test_arrays_are_quantised_between_their_own_ends():
    page = made()
    data = embedded(render(page))["maps"][0]
    values = page.maps[0].values.reshape(12, 32)
    assert data["low"][1:] == pytest.approx(values[1:].min(1), rel=1e-6)
    assert data["high"][1:] == pytest.approx(values[1:].max(1), rel=1e-6)
    assert data["low"][0] == data["high"][0] == 0  # a layer without a value


def test_nan_and_infinity_become_null():
    data = embedded(render(made()))
    assert data["curves"][0]["series"][0]["y"] == [2, None, 1, 1]
    assert data["tables"][0]["rows"][1][1] is None


def test_a_page_over_the_limit_is_thinned_and_says_so():
    rng = np.random.default_rng(1)
    clips = [Clip(i, str(i), rng.integers(0, 255, (9, 256, 256, 3), np.uint8)) for i in range(8)]
    full = render(Page("t", "c", clips=clips))
    html = render(Page("t", "c", clips=clips), limit=len(full) // 8)
    assert len(html.encode()) <= len(full) // 8
    data = embedded(html)
    assert data["thinned"].startswith("To keep the page small")
    assert [c["step"] for c in data["clips"]][-1] == 7  # the last step always stays


@pytest.mark.parametrize("share", [0.5, 0.05, 0.008])
def test_a_page_of_large_maps_stays_below_the_limit(share):
    """Layers are thinned as well as steps, and in the end maps are left out."""
    maps = [
        Map(f"map {i}", np.ones((8, 40, 3, 12, 20)), range(8), range(40), (3, 12, 20)) for i in "ab"
    ]
    page = Page("t", "c", maps=maps)
    frame = len(render(Page("t", "c")))
    limit = frame + int(share * (len(render(page)) - frame))
    html = render(page, limit)
    assert len(html.encode()) <= limit
    data = embedded(html)
    assert data["thinned"].startswith("To keep the page small")
    assert all(m["steps"][-1] == 7 and m["layers"][-1] == 39 for m in data["maps"])
    assert len(data["maps"]) == (2 if share > 0.01 else 1)


@needs_browser
def test_many_curves_show_one_band_at_a_time_and_sigma_falls(tmp_path: Path):
    series = [Series(f"s{k}", [k, k + 1], [k, k], [k + 1, k + 2]) for k in range(9)]
    curves = [
        Curve("many", "layer", [0, 1], series, follows="layer"),
        Curve("few", "sigma", [0.25, 1.0], [Series("t", [0, 1])], falling=True),
    ]
    page = tmp_path / "index.html"
    page.write_text(render(Page("t", "c", curves=curves)), encoding="utf-8")
    visible = (
        "return [...document.querySelectorAll('svg polygon')]"
        ".filter((p) => getComputedStyle(p).display !== 'none').length"
    )
    with browser(tmp_path / "profile") as window:
        window.open(page)
        assert window.run(visible) == 0
        point = "document.querySelectorAll('.legend span')[3].dispatchEvent(new Event('%s'));"
        assert window.run(point % "pointerenter" + visible) == 1
        assert window.run(point % "pointerleave" + visible) == 0
        dashes = "return [...document.querySelectorAll('svg')[0].querySelectorAll('polyline')].map((l) => l.getAttribute('stroke-dasharray'))"
        assert window.run(dashes) == ["none"] * 8 + ["5 3"]
        labels = (
            "return [...document.querySelectorAll('svg')[1].querySelectorAll('text')]"
            ".filter((t) => ['1', '0.25'].includes(t.textContent))"
            ".sort((a, b) => a.getAttribute('x') - b.getAttribute('x')).map((t) => t.textContent)"
        )
        assert window.run(labels)[-2:] == ["1", "0.25"]  # those of the x axis: 1 is at the left
        assert window.errors() == []


@needs_browser
def test_rows_of_a_table_are_cards_on_a_phone(tmp_path: Path):
    rows = [("a finding with a long name", 0.5, "0.4, 0.6", ""), ("another", 1, "", "note")]
    table = Table("Numbers", ["finding", "value", "95 % interval", "compared with"], rows)
    page = tmp_path / "index.html"
    page.write_text(render(Page("t", "minicos t", tables=[table])), encoding="utf-8")
    sizes = (
        "return [...document.querySelectorAll('.rows td')].filter((d) => d.offsetHeight)"
        ".map((d) => [d.textContent, getComputedStyle(d, '::before').content, d.scrollWidth <= d.clientWidth])"
    )
    with browser(tmp_path / "profile", 500) as window:
        window.open(page)
        shown = window.run(sizes)
    assert [text for text, _, _ in shown] == [
        *("a finding with a long name", "0.5", "0.4, 0.6"),
        *("another", "1", "note"),
    ]
    assert [name.strip('"') for _, name, _ in shown[1:3]] == ["value", "95 % interval"]
    assert all(fits for _, _, fits in shown)


@needs_browser
@pytest.mark.parametrize("width", [1200, 400])
def test_in_a_browser(tmp_path: Path, width: int):
    page = tmp_path / "index.html"
    page.write_text(render(made()), encoding="utf-8")
    with browser(tmp_path / "profile", width) as window:
        window.open(page)
        grey = "return document.getElementById('estimate').getContext('2d').getImageData(9,9,1,1).data[0]"
        assert window.run("return document.title") == "minicos: minicos steps"
        assert window.run(grey) == 180 + 20  # it opens at the last step and frame
        for name, value in (("step", 1), ("frame", 2)):
            window.run(
                f"let e = document.getElementById('{name}'); e.value = {value};"
                "e.dispatchEvent(new Event('input'))"
            )
        assert window.run(grey) == 60 + 10
        caption = "return document.getElementById('estimate-caption').textContent"
        assert "noise: replace here" in window.run(caption)
        assert window.run("return document.querySelectorAll('#step-track i').length") == 1
        assert window.run("return document.querySelectorAll('#curves rect').length") == 1
        reading = "return document.querySelector('#curves b').textContent"
        assert window.run(reading) == ""  # no value at step 1
        video = "document.querySelector('#videos button').click();"
        assert window.run(video + grey) == 7  # a result next to the steps is shown first
        window.run("document.querySelectorAll('#wall button')[3].click()")
        assert window.run(reading).strip() == "1"
        click = (
            "let c = document.getElementById('overlay'), b = c.getBoundingClientRect();"
            "c.dispatchEvent(new MouseEvent('click', {clientX: b.left + 5, clientY: b.top + 5}));"
            "return document.getElementById('overlay-caption').textContent"
        )
        assert "that this token gives" in window.run(click)
        assert "that this token receives" in window.run(click)
        before = window.run("return document.getElementById('overlay').toDataURL()")
        window.run(
            "let e = document.getElementById('map'); e.value = 0;"
            "e.dispatchEvent(new Event('change'))"
        )
        assert window.run("return document.getElementById('overlay').toDataURL()") != before
        assert window.run("return document.querySelector('td a').href").startswith("file:")
        assert window.run("return window.hacked === undefined")
        assert window.run("return !document.body.innerText.includes('\\u202e')")
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert window.run(wide) <= 0  # nothing sticks out, on a phone neither
        assert window.errors() == []


def test_a_study_s_folder_becomes_a_page(tmp_path: Path):
    """Numbers, tables, the curves stored with figures, listed videos and interventions; text stays
    text.
    """
    run = Run.open(
        tmp_path / HOSTILE[:60].replace("/", "_"), {"n": 2}, {"command": "minicos noise"}
    )
    found = Number("D", 0.5, 0.4, 0.6, 2, "D", HOSTILE)
    rows = [{"edit": HOSTILE, "D": Interval(0.5, 0.4, 0.6, 2)}]
    write(run, Result("noise", run.settings, [found], {"edits": rows}, files=["damage.png"]))
    far = Curve_("far", (0, 2), (1.0, 0.5), (0.9, float("nan")), (1.1, 0.6), "step that is noised")
    one = Curve_("near", (1,), (0.2,), x_label="step that is noised")
    lines(run.path("damage.png"), [far, one], y="D", title="Damage", levels={"another seed": 1.0})
    grid(run.path("matrix.png"), np.eye(3), x="later step", y="noised step", title="D")
    save_videos(run, {HOSTILE: np.zeros((5, 16, 16, 3), np.uint8)}, fps=16)
    list_interventions(run, [Where(HOSTILE, steps=(1, 2), layers=(3,))])
    html = gather.write(run).read_text(encoding="utf-8")
    assert html.count("<script") == 2
    data = embedded(html)
    (curve,) = data["curves"]
    assert (curve["follows"], curve["x"]) == ("step", [0, 1, 2])
    assert [s["y"] for s in curve["series"]] == [[1.0, None, 0.5], [None, 0.2, None]]
    assert curve["series"][0]["low"] == [0.9, None, None]
    assert curve["levels"] == [["another seed", 1.0]]
    assert [p["name"] for p in data["pictures"]] == ["matrix.png"]  # the other is a curve
    assert [clip["label"] for clip in data["clips"]] == [HOSTILE]
    assert data["marks"] == [{"label": HOSTILE, "steps": [1, 2], "frames": [], "layers": [3]}]
    numbers, edits = data["tables"]
    assert numbers["rows"] == [["D", 0.5, "0.400, 0.600", 2, "D", HOSTILE]]
    assert edits["rows"] == [[HOSTILE, "0.500 [0.400, 0.600]"]]
    assert data["next"]


@pytest.mark.parametrize(
    ("frames", "latents", "stride", "lead"),
    [(121, 16, 8, 0), (13, 4, 4, 0), (5, 2, 4, 0), (129, 33, 4, 1)],
)
def test_a_map_lies_over_the_frames_of_its_own_model(tmp_path: Path, frames, latents, stride, lead):
    settings = {"frames": frames, "prompt": "go"}
    run = Run.open(tmp_path, settings, {"command": "minicos energy", "lead": lead})
    run.save_tensors("energy.safetensors", {"cond.raw": torch.rand(1, 2, latents, 2, 2)})
    between = {"step0.received.1": torch.rand(latents, 2, 2)}
    run.save_tensors("attention.safetensors", between)
    data = embedded(gather.write(run).read_text(encoding="utf-8"))
    assert [(m["stride"], m["lead"]) for m in data["maps"]] == [(stride, lead)] * 2
    assert data["frames"] == frames - stride * lead


def test_a_model_names_the_branches_of_its_maps(tmp_path: Path):
    run = Run.open(tmp_path, {"frames": 5, "prompt": "go"}, {"command": "minicos energy"})
    energy = {f"{branch}.raw": torch.rand(1, 2, 2, 2, 2) for branch in ("uncond", "stg", "cond")}
    run.save_tensors("energy.safetensors", energy)
    data = embedded(gather.write(run).read_text(encoding="utf-8"))
    prompted, perturbed, unprompted = [m["name"] for m in data["maps"]]
    assert perturbed == f"{prompted}, stg branch"
    assert unprompted == f"{prompted}, unprompted branch"


def test_a_folder_of_cases_becomes_a_page(tmp_path: Path):
    """A row for each: its picture, its numbers, a link where there is a page, why it failed."""
    run = Run.open(tmp_path / "good", {}, {"command": "minicos noise"})
    write(run, Result("noise", {}, [Number("D", 0.5)], files=[]))
    save_image(run.path("first_frame.png"), np.zeros((16, 16, 3), np.uint8))
    gather.write(run)
    rows = [Row("good", HOSTILE), Row("bad", "", failed=HOSTILE)]
    html = write_cases(tmp_path, "noise", "minicos noise --cases x", rows).read_text("utf-8")
    assert html.count("<script") == 2
    (table,) = embedded(html)["tables"]
    assert table["columns"] == ["case", "given", "last frame", "prompt", "D", ""]
    good, bad = table["rows"]
    assert good[0] == {"href": "good/index.html", "text": "good"}
    assert good[1]["image"].startswith("data:image/png")
    assert good[2:] == [None, HOSTILE, "0.500", ""]
    assert bad == ["bad", None, None, "", "", HOSTILE]


def test_the_page_of_a_real_run(tmp_path: Path, monkeypatch):
    """The demo's folder, read back: every shown step, energy of every layer, the command and
    what to do next.
    """
    from minicos.cli import main

    monkeypatch.chdir(tmp_path)
    main(["demo", "--out", "seen"])
    data = embedded((tmp_path / "seen" / "index.html").read_text(encoding="utf-8"))
    assert data["prompt"] == "solve the maze"
    steps = [0, 1, 3, 5, 8, 11, 15, 19]
    assert [clip["step"] for clip in data["clips"]] == [*steps, None]  # and the result
    assert data["maps"][0]["name"] == "Token energy, centred"
    assert data["maps"][0]["grid"] == [4, 4, 4]
    assert len(data["sigmas"]) == 21
    assert data["curves"][0]["follows"] == "step"
    titles = " ".join(curve["title"] for curve in data["curves"])
    assert "Evidence for every valid route" in titles
    assert "How many of 2 right answers" in titles
    assert data["command"].startswith("minicos demo")
    assert all(item["command"].startswith("minicos ") for item in data["next"])


@pytest.mark.parametrize("sigmas", ["x", [{}], ["1"], [float("nan")], {"0": 1}, None])
def test_sigmas_that_are_no_numbers_are_refused_by_name(tmp_path: Path, sigmas):
    run = Run.open(tmp_path / "run", {"seed": 0})
    run.save_json("schedule.json", {"sigmas": sigmas})
    with pytest.raises(MinicosError, match=r"schedule\.json .*sigmas"):
        gather.gather(run)


@pytest.mark.parametrize("tensors", [{"other": torch.zeros(2, 4)}, {"moved": torch.zeros(2)}])
def test_a_convergence_without_its_table_is_refused_by_name(tmp_path: Path, tensors):
    run = Run.open(tmp_path / "run", {"seed": 0})
    run.save_tensors("convergence.safetensors", tensors)
    with pytest.raises(MinicosError, match=r"convergence\.safetensors .*moved"):
        gather.gather(run)


def test_files_are_listed_by_depth_and_without_records_of_processes(tmp_path):
    run = Run.open(tmp_path / "run", {})
    for name in ("a/b.png", "z.md", "made_with/model/shard-0-of-2/run.json", ".locks/x.json"):
        run.path(name).parent.mkdir(parents=True, exist_ok=True)
        run.path(name).write_bytes(b"")
    assert gather._files(run) == ["run.json", "z.md", "a/b.png"]
