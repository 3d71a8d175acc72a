"""compare.html as a browser has it: every switch is clicked, in a headless chromium where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from tests.trainer.view.runs_made_up import made_up
from trainer.view.comparison import read_run, set_apart, write_pages

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = "<img src=x onerror=fail()>"
# What the script below finds out stands in the title at last.
CLICKS = """
const seen = { errors: [] };
window.fail = () => seen.errors.push("a stranger's text ran");
addEventListener("error", (event) => seen.errors.push(event.message));
const chart = document.querySelector("#chart svg");
chart.setPointerCapture = () => {};  // there is no such pointer
const now = () => ({
  curves: Number(chart.dataset.curves),
  x: chart.dataset.x,
  path: chart.querySelector("path.curve")?.getAttribute("d"),
  labels: [...chart.querySelectorAll("text.x")].map((t) => t.textContent),
  ys: [...chart.querySelectorAll("text.y")].map((t) => t.getAttribute("y")),
  circles: chart.querySelectorAll("circle").length,
  hollow: chart.querySelectorAll("circle.bound").length,
  entropy: chart.querySelector(".entropy-name")?.textContent,
  told: document.getElementById("told").textContent,
  pressed: [...document.querySelectorAll("button[aria-pressed=true][data-set]")].map((b) => b.dataset.value),
  whole: !document.getElementById("whole").disabled,
});
const click = (selector) => document.querySelector(selector).click();
const box = chart.getBoundingClientRect();
const send = (kind, x, y) => chart.dispatchEvent(new PointerEvent(kind, {
  clientX: box.left + x * box.width, clientY: box.top + y * box.height, pointerType: "mouse", button: 0 }));
seen.start = now();
seen.keys = [...document.querySelectorAll("#keys button")].map((b) => b.textContent);
for (const axis of ["bytes", "flops", "seconds", "tokens"]) {
  click(`[data-set=axis][data-value=${axis}]`);
  seen[axis] = now();
}
click("[data-turn=logx]"); seen.linear = now(); click("[data-turn=logx]");
click("[data-turn=logy]"); seen.logy = now(); click("[data-turn=logy]");
click("[data-turn=apart]"); seen.apart = now(); click("[data-turn=apart]");
click("[data-value=training]"); seen.training = now();
const slider = document.getElementById("smooth");
slider.value = 0.9; slider.dispatchEvent(new Event("input")); seen.smooth = now();
slider.value = 0; slider.dispatchEvent(new Event("input"));
click("[data-value=held_out]");
send("pointermove", 0.5, 0.5);
seen.tip = [...document.querySelectorAll("#tip div")].map((d) => d.textContent);
seen.strong = chart.querySelectorAll("path.strong").length;
seen.lit = document.querySelectorAll("tr.lit").length;
send("pointerleave", 0, 0);
seen.left = document.getElementById("tip").hidden;
send("pointerdown", 0.3, 0.2); send("pointermove", 0.5, 0.6); send("pointerup", 0.6, 0.7);
seen.zoomed = now();
click("#whole"); seen.whole = now();
click("#keys button"); seen.hidden = now(); click("#keys button"); seen.back = now();
const heads = [...document.querySelectorAll(".runs")][0].querySelectorAll("thead th");
const names = () => [...document.querySelector(".runs").tBodies[0].rows].map((r) => r.cells[0].textContent);
seen.rows = names();
const score = [...heads].find((h) => h.textContent === "bits per byte");
score.click(); seen.up = names(); score.click(); seen.down = names();
dispatchEvent(new Event("beforeprint")); seen.open = document.querySelectorAll("details:not([open])").length;
dispatchEvent(new Event("afterprint")); seen.closed = document.querySelectorAll("details:not([open])").length;
seen.images = document.querySelectorAll("img").length;
seen.wide = document.documentElement.scrollWidth - innerWidth;
document.title = JSON.stringify(seen);
"""


def in_a_browser(page, script, folder, width):
    probe = folder / "probe.html"
    probe.write_text(page.replace("</body>", f"<script>{script}</script></body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    words += [f"--window-size={width},900", "--dump-dom", probe.as_uri()]
    done = subprocess.run([str(BROWSER), *words], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout, re.S)[1]))


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH")
@pytest.mark.parametrize("width", [1280, 500])
def test_every_switch_does_what_it_says(tmp_path, width):
    bound = {"kind": "bound", "standard_error": 0.02, "estimator": "the masked bound"}
    folders = [
        made_up(tmp_path / "a", bits=2.5),
        made_up(tmp_path / "b", bits=2.25, type_="mdl", score=bound),
        made_up(tmp_path / "c", bits=2.0, data={"content": "other"}),
        made_up(tmp_path / "d", bits=3.0, config={"seed": 2}),
        made_up(tmp_path / "e", bits=3.5, manifest={"environment": {"device": "A100"}}, sample=EVIL),
    ]
    runs = [read_run(folder, folder.name + EVIL) for folder in folders]
    set_apart(runs)
    write_pages(tmp_path / "compare.html", "five", runs, "here")
    seen = in_a_browser((tmp_path / "compare.html").read_text(), CLICKS, tmp_path, width)
    assert seen["errors"] == [] and seen["images"] == 0 and seen["wide"] <= 0

    start = seen["start"]
    assert (start["curves"], start["circles"], start["hollow"]) == (4, 16, 4)
    assert start["pressed"] == ["held_out", "tokens"] and start["labels"][-1] == "tokens"
    assert start["entropy"] == "entropy of the text 1.500"
    assert start["told"] == "1 run set apart, see below, not drawn."
    assert seen["keys"] == [f"≤ b{EVIL}", "gpt2 (4 runs)"]
    for axis, name, most in (
        ("bytes", "bytes of text", 8000),
        ("flops", "FLOPs", 256_000),
        ("tokens", "tokens", 2560),
    ):
        low, high = map(float, seen[axis]["x"].split())
        assert seen[axis]["labels"][-1] == name and low < most / 4 and most < high < 1.1 * most
    assert seen["seconds"]["curves"] == 3 and "1 run not drawn over time" in seen["seconds"]["told"]
    assert seen["tokens"] == start

    assert seen["linear"]["x"].split()[0] == "0" and seen["linear"]["path"] != start["path"]
    assert seen["logy"]["ys"] != start["ys"]
    assert seen["apart"]["curves"] == 5 and seen["apart"]["told"] == ""
    assert seen["training"]["curves"] == 4 and seen["training"]["circles"] == 0
    assert seen["smooth"]["path"] != seen["training"]["path"]

    head, *lines = seen["tip"]
    assert head.endswith(" tokens") and len(lines) == 4
    assert [line[0] for line in lines] == ["b", "a", "d", "e"], "the best first"
    assert lines[0].startswith(f"b{EVIL}≤ 2.") and seen["strong"] == seen["lit"] == 1 and seen["left"]

    low, high = map(float, seen["zoomed"]["x"].split())
    assert (
        float(start["x"].split()[0]) < low < high < float(start["x"].split()[1]) and seen["zoomed"]["whole"]
    )
    assert seen["whole"] == start
    assert seen["hidden"]["curves"] == 3 and seen["back"]["curves"] == 4

    assert [name[0] for name in seen["rows"]] == [name[0] for name in seen["up"]] == ["b", "a", "d", "e"]
    assert [name[0] for name in seen["down"]] == ["e", "d", "a", "b"]
    assert seen["open"] == 0 and seen["closed"] == 3
