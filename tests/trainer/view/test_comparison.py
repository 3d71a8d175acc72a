"""compare.html and compare.md: which runs compare, what is drawn of them, and what a stranger's text can do there."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest

from tests.trainer.view.runs_made_up import made_up
from tests.trainer.view.test_report import Page
from trainer.view.comparison import read_run, set_apart, write_pages
from trainer.view.comparison.runs import Curve
from trainer.view.comparison.table import groups_of
from trainer.view.comparison.thinning import packed, thinned

EVIL = "<script>alert(1)</script>&{{DATA}}`|\u202e\x1b[2J"


def read(folder):
    return read_run(folder, folder.name)


def apart(*folders):
    runs = [read(folder) for folder in folders]
    set_apart(runs)
    return [run.apart for run in runs]


def pages(tmp_path, *folders):
    runs = [read(folder) for folder in folders]
    set_apart(runs)
    write_pages(tmp_path / "compare.html", "Runs", runs, "here")
    return (tmp_path / "compare.html").read_text(), (tmp_path / "compare.md").read_text()


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


# --- which compare --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"data": {"content": "b"}}, "another held-out text"),
        (
            {"score": {"documents": 2, "bytes": 700}},
            "scored on 2 documents of 700 bytes, the others scored on 3 documents of 900 bytes",
        ),
        (
            {"score": {"of": "answers"}},
            "scored on 3 documents of 900 bytes, of chats the answers alone, "
            "the others scored on 3 documents of 900 bytes",
        ),
        ({"summary": {"precision": "bf16"}}, "scored in bf16, the others scored in fp32"),
        ({"score": {"lossy_documents": 1}}, "tokens do not give the text back"),
        ({"score": {"non_causal_routing": True}}, "choices saw later tokens"),
        ({"score": {"comparable": False}}, "scored on a part chosen by tokens"),
    ],
)
def test_a_run_that_does_not_compare_is_set_apart_with_the_reason(tmp_path, other, why):
    alike = [made_up(tmp_path / name) for name in ("a", "b")]
    odd = made_up(tmp_path / "odd", bits=0.5, **other)
    assert apart(*alike, odd) == ["", "", why]
    page, markdown = pages(tmp_path, odd, *alike)
    assert page.index("<h2>Runs ") < page.index("<h2>Set apart") < page.index(f"not comparable: {why}")
    assert (
        markdown.index("## Runs") < markdown.index("## Set apart") < markdown.index(f"not comparable: {why}")
    )
    drawn = {run["name"]: run["apart"] for run in data_of(page)["runs"]}
    assert drawn == {"a": False, "b": False, "odd": True}


def test_bounds_compare_with_exact_scores_and_are_marked(tmp_path):
    bound = {
        "kind": "bound",
        "standard_error": 0.02,
        "estimator": "the masked bound of 8 steps; 4 noise draws per row",
    }
    folders = [made_up(tmp_path / "a"), made_up(tmp_path / "b", type_="mdl", bits=1.9, score=bound)]
    assert apart(*folders) == ["", ""]
    page, markdown = pages(tmp_path, *folders)
    assert "≤ 1.900 ± 0.020" in page and "≤ 1.900 ± 0.020" in markdown
    assert [run["bound"] for run in data_of(page)["runs"]] == [True, False]


def test_bounds_of_one_architecture_compare_where_they_are_estimated_alike(tmp_path):
    def bound(name, estimator):
        return made_up(tmp_path / name, type_="mdl", score={"kind": "bound", "estimator": estimator})

    a, b = (
        bound("a", "the masked bound of 8 steps; 4 draws"),
        bound("b", "the masked bound of 16 steps; 2 draws"),
    )
    c = bound("c", "the any-order bound")
    assert apart(a, b, c) == [
        "",
        "",
        "estimated by the any-order bound, the others estimated by the masked bound of 8 steps",
    ]


def test_earlier_runs_compare_by_the_digest_that_they_have(tmp_path):
    old = made_up(tmp_path / "old", data={"content": None})
    other = made_up(tmp_path / "other", data={"content": None, "fingerprint": "g"})
    assert apart(made_up(tmp_path / "new"), old, other) == ["", "", "another held-out text"]


def test_seconds_compare_on_a_machine_of_its_own(tmp_path):
    def at(name, begin, end, host="here", device="cpu"):
        where = {"host": host, "began": begin, "environment": {"device": device}}
        return read(made_up(tmp_path / name, manifest=where, summary={"ended": end}))

    runs = [
        at("a", 10, 20),
        at("b", 15, 25),
        at("c", 21, 30, "there"),
        at("d", 30, 40),
        at("e", 50, 60, device="A100"),
    ]
    set_apart(runs)
    assert [run.slow for run in runs] == [
        "shared the machine with b",
        "shared the machine with a",
        "",
        "",
        "ran on A100, ? threads, 1 processes",
    ]
    assert not any(run.apart for run in runs), "their scores compare"


def test_scores_on_the_way_compare_where_they_are_of_the_same_documents(tmp_path):
    runs = [read(made_up(tmp_path / name, along=along)) for name, along in (("a", 3), ("b", 3), ("c", 2))]
    set_apart(runs)
    assert [(run.apart, run.aside) for run in runs] == [
        ("", ""),
        ("", ""),
        ("", "scores on the way are of other documents"),
    ]


def test_a_run_that_was_cut_short_has_the_score_of_its_last_evaluation(tmp_path):
    folder = made_up(tmp_path / "a")
    (folder / "summary.json").unlink()
    run = read(folder)
    assert (run.state, run.score["bits_per_byte"], run.score["documents"]) == ("unfinished", 2 + 5 / 40, 3)
    assert run.why == "unfinished: this is the score of step 40"


def test_a_size_that_misses_what_it_was_to_meet_is_marked(tmp_path):
    near = made_up(tmp_path / "near", summary={"match": {"target": 100, "found": 101, "error": 0.01}})
    far = made_up(tmp_path / "far", summary={"match": {"target": 100, "found": 96, "error": -0.04}})
    page, _ = pages(tmp_path, near, far)
    assert page.count("misses the target of match by 4.0%") == page.count("misses the target") == 1


# --- curves ---------------------------------------------------------------------------------------------


def test_scores_of_earlier_runs_stand_between_the_lines_of_training(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    lines = [
        {"step": 2, "tokens": 200, "bytes": 400, "loss": 1.0, "bits_per_byte": 4.0, "seconds": 1.0},
        {"step": 1, "tokens": 100, "seconds": 0.5, "val_bits_per_byte": 3.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "manifest.json").write_text(json.dumps({"flops_per_token": {"training": 5.0}}))
    found = read(folder).held_out
    assert {axis: values.tolist() for axis, values in found.spent.items()} == {
        "tokens": [100],
        "bytes": [200],
        "flops": [500],
        "seconds": [0.5],
    }


@pytest.mark.parametrize("points", [8, 9, 50, 333])
def test_a_thinned_curve_keeps_the_lowest_and_the_highest(points):
    bits = np.random.default_rng(0).normal(3.0, 0.1, 10_000)
    bits[[17, 7_000]] = 9.0, 0.5  # a spike and a dip of one point
    steps = np.arange(1.0, 10_001)
    curve = thinned(Curve(bits, dict.fromkeys(("tokens", "bytes", "flops", "seconds"), steps)), points)
    assert len(curve) <= points
    assert (curve.bits.max(), curve.bits.min()) == (9.0, 0.5)
    assert curve.spent["tokens"][[0, -1]].tolist() == [1, 10_000]
    early = (curve.spent["tokens"] <= 100).sum()
    assert early >= len(curve) / 6, "an axis may be logarithmic"


def test_a_packed_curve_is_what_it_was():
    bits = np.array([8.0, 3.5, 2.25, 2.0])
    spent = {
        "tokens": np.array([64.0, 640.0, 6400.0, 64000.0]),
        "bytes": np.array([128.0, 1280.0, 12800.0, 128000.0]),
        "flops": np.array([np.nan, 1.0, 2.0, 3.0]),
        "seconds": np.array([1.0, 4.0, 7.0, 100.0]),
    }
    found = packed(Curve(bits, spent))
    assert found.keys() == {"bits", "tokens", "bytes", "seconds"} and found["bytes"] == [128.0, 128000.0, "="]

    def unpacked(name):
        low, high, text = found[name]
        share = np.frombuffer(base64.b64decode(text), "<u2") / 65535
        return low + (high - low) * share if name == "bits" else low * (high / low) ** share

    assert unpacked("bits") == pytest.approx(bits, abs=1e-4)
    for name in ("tokens", "seconds"):
        assert unpacked(name) == pytest.approx(spent[name], rel=1e-3)


# --- the pages ------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else_and_says_what_each_run_cost(tmp_path):
    folders = [
        made_up(tmp_path / "one", bits=2.5, config={"learning_rate": 0.02}),
        made_up(tmp_path / "two", bits=2.25, type_="vanilla"),
    ]
    page, markdown = pages(tmp_path, *folders)
    parsed = Page(page.replace("<input ", "<meta "))
    assert not {tag for tag, _ in parsed.tags} & {"link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in parsed.tags if {"src", "href"} & attrs.keys()]
    assert not re.search(r"https?://|\burl\((?!#)|@import|fetch\(", page)
    assert page.index("two</td>") < page.index("one</td>"), "the best first"
    for text in (
        "2.250",
        "70 (50 active)",
        "32",
        "1.00GB",
        "20s",
        "128",
        "31",
        "once upon a time",
    ):
        assert text in page and text in markdown.replace("\\", ""), text
    assert "matrix 60 · scalar 10" in page
    assert data_of(page)["entropy"] == [1.5] and "Entropy of the text: 1.500" in markdown
    assert "<th>learning_rate</th><td>0.01</td><td>0.02</td>" in page
    assert "| learning\\_rate | 0.01: two; 0.02: one |" in markdown


def test_unlike_contexts_are_said(tmp_path):
    alike = [made_up(tmp_path / name, score={"context_bytes": 512.0}) for name in "ab"]
    page, markdown = pages(tmp_path, *alike)
    assert "context" not in page.split("<script")[0].split("</style>")[1] and "context" not in markdown
    page, markdown = pages(tmp_path, *alike, made_up(tmp_path / "c", score={"context_bytes": 2048.0}))
    assert "not all see as much of the text before" in page and "512B" in page and "2.05kB" in page
    assert "| context |" in markdown and "2.05kB" in markdown


def test_what_strangers_wrote_is_text(tmp_path):
    folder = made_up(tmp_path / "a", type_=EVIL, sample=EVIL, config={"input_file": EVIL})
    runs = [read_run(folder, EVIL), read(made_up(tmp_path / "b"))]
    set_apart(runs)
    write_pages(tmp_path / "compare.html", EVIL, runs, EVIL)
    page = (tmp_path / "compare.html").read_text()
    assert "<script>alert" not in page and page.count("</script>") == 2
    assert "\u202e" not in page and "\x1b" not in page
    assert data_of(page)["runs"][0]["name"].startswith("<script>alert(1)</script>&{{DATA}}`|")
    text = (tmp_path / "compare.md").read_text()
    fenced = re.search(r"^```text\n.*?^```$", text, re.S | re.M)[0]
    assert "<script>" not in text.replace(fenced, "").replace("\\<script\\>", "") and "\x1b" not in text
    assert all(
        line.count("|") - line.count("\\|") in (0, line.count(" | ") + 2) for line in text.splitlines()[:12]
    )


def test_seeds_of_one_configuration_are_one_group(tmp_path):
    runs = [
        read(made_up(tmp_path / f"{rate}-{seed}", config={"learning_rate": rate, "seed": seed}))
        for rate in (0.1, 0.2)
        for seed in (1, 2)
    ]
    runs.append(read(made_up(tmp_path / "other", type_="mamba")))
    assert [group.name for group in groups_of(runs)] == [
        "gpt2 learning_rate 0.1 (2 seeds)",
        "gpt2 learning_rate 0.2 (2 seeds)",
        "other",
    ]


def test_a_page_of_many_long_runs_stays_small_and_says_so(tmp_path):
    few = read(made_up(tmp_path / "a", points=2000, sample=EVIL * 300))
    runs = []
    for number in range(230):
        run = read_run(few.path, f"{number} {EVIL * 9}", curves=False)
        run.held_out, run.training, run.sample = few.held_out, few.training, few.sample
        run.config = {"type": "gpt2", "learning_rate": number, "input_file": EVIL * (number % 9)}
        runs.append(run)
    set_apart(runs)
    write_pages(tmp_path / "compare.html", "many", runs, "here")
    page = (tmp_path / "compare.html").read_text()
    assert len(page.encode()) < 500_000
    assert "The best 200 of 230 runs are on this page" in page
    assert re.search(r"Of 400 curves of up to 2,000 points, \d+ each are drawn", data_of(page)["thinned"])
