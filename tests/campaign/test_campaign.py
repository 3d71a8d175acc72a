"""A campaign sees what it is there to see, its figures add up, and a share of each is tried here."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.campaign import jail
from tests.campaign.__main__ import CAMPAIGNS, main
from tests.campaign.configs import CAMPAIGN, Case
from tests.campaign.configs import try_ as try_config
from tests.campaign.figures import Figures, Found
from tests.campaign.jail import Campaign, Stopped, run


@dataclass
class Act:
    kind: str


def _compute():
    while True:
        pass


ACTS = {
    "nothing": lambda: None,
    "open": lambda: Path("new").write_text("x"),
    "remove": lambda: Path("bait.py").unlink(),
    "process": lambda: subprocess.run(["true"]),
    "system": lambda: os.system("true"),
    "import": lambda: importlib.import_module("bait"),
    "read": lambda: Path("bait.py").read_text(),
    "compute": _compute,
    "wait": lambda: time.sleep(1000),
    "leave": lambda: os._exit(3),
}
EXPECTED = {
    **{"nothing": "ok", "read": "ok", "open": "touched file", "remove": "touched file"},
    **{"process": "executed code", "system": "executed code", "import": "executed code"},
    **{"compute": "hang", "wait": "hang", "leave": "traceback"},
}


def _try(case, folder, watch):
    (folder / "bait.py").write_text("")
    sys.path.insert(0, str(folder))
    watch.arm(folder, writes=False)
    with contextlib.suppress(Stopped):
        ACTS[case.kind]()
    return (watch.seen.outcome, str(watch.seen)) if watch.seen else ("ok", "")


def test_what_a_case_does_is_seen_and_the_next_ones_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(jail, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(jail, "WALL_SECONDS", 1)
    kinds = [*ACTS]
    campaign = Campaign(lambda seed, number: Act(kinds[number]), _try, ("ok",))
    found = list(run(campaign, 0, range(len(kinds)), tmp_path))
    assert {f.kind: f.outcome for f in found} == EXPECTED
    assert sorted(f.case for f in found) == [*range(len(kinds))]


def test_within_its_folder_a_case_may_write_where_it_is_meant_to(tmp_path):
    def write(case, folder, watch):
        watch.arm(folder, writes=True)
        for place in ("new", case.kind):
            try:
                Path(place).write_text("x")
            except Stopped:
                return "stopped", ""
        return "ok", ""

    places = ["inner", "../outer", str(tmp_path / "outer")]
    campaign = Campaign(lambda seed, number: Act(places[number]), write, ("ok",))
    assert [f.outcome for f in run(campaign, 0, range(3), tmp_path)] == ["ok", "stopped", "stopped"]
    assert not [*tmp_path.rglob("outer")]


def test_a_case_may_start_and_end_the_programs_that_are_named(tmp_path):
    def start(case, folder, watch):
        watch.arm(folder, writes=False, programs=("sleep 9",))
        with contextlib.suppress(Stopped), subprocess.Popen(case.kind.split()) as program:
            program.kill()
        return ("ok", "") if watch.seen is None else (watch.seen.outcome, "")

    commands = ["sleep 9", "sleep 99"]
    campaign = Campaign(lambda seed, number: Act(commands[number]), start, ("ok",))
    assert [f.outcome for f in run(campaign, 0, range(2), tmp_path)] == ["ok", "executed code"]


def test_no_case_begins_when_time_is_over(tmp_path, monkeypatch):
    def ends(case, folder, watch):
        (tmp_path / f"ended-{folder.name}").touch()
        return "ok", ""

    clock = SimpleNamespace(monotonic=lambda: len(list(tmp_path.glob("ended-*"))))  # a second for each case
    monkeypatch.setattr(jail, "time", clock)
    for life in (1, 200):
        campaign = Campaign(lambda seed, number: Act("nothing"), ends, ("ok",), life=life)
        end = clock.monotonic() + 2.5
        assert len(list(run(campaign, 0, range(1000 * life, 1 << 31), tmp_path, end=end))) == 3
    assert list(run(campaign, 0, range(9), tmp_path, end=0)) == []


def test_figures_of_seeds_add_up_and_a_case_counts_once(tmp_path):
    path = tmp_path / "figures.json"
    for seed, outcome in [(1, "ok"), (2, "hang"), (2, "ok"), (3, "hang")]:
        figures = Figures.read(path, "configs")
        for case in (0, 1):
            figures.add(seed, Found(case, "bytes" if case else "run", outcome, counts={"kills": 1 + seed}))
        figures.write(path)
    figures = Figures.read(path, "configs")
    assert figures.outcomes() == {"bytes": {"hang": 1, "ok": 2}, "run": {"hang": 1, "ok": 2}}
    assert figures.counts() == {"kills": 18}
    assert [f.outcome for f in figures.bad(("ok",))] == ["hang"] * 2
    assert "6 cases of 3 seeds, 2 of them bad" in figures.table(("ok",))
    with pytest.raises(ValueError, match="figures of configs"):
        Figures.read(path, "kills")


def test_a_case_is_its_seed_and_number():
    assert str(CAMPAIGN.make(3, 8)) == str(CAMPAIGN.make(3, 8)) != str(CAMPAIGN.make(4, 8))


def test_code_that_a_loader_runs_is_seen(tmp_path, monkeypatch):
    """A loader that has become one that runs what it reads."""
    from configs.formats import legacy_py

    def load(path, where):
        exec(path.read_text(encoding="utf-8"))

    monkeypatch.setattr(legacy_py, "load", load)
    case = Case("tree", {"mine.py": b"import bait", "bait.py": b""}, ["--hydra_model_cfg=mine.py"])
    campaign = Campaign(lambda seed, number: case, try_config, CAMPAIGN.good)
    (found,) = run(campaign, 0, range(1), tmp_path)
    assert found.outcome == "executed code"


# Cases of each: together at most two minutes.
SHARES = {"configs": 300, "kills": 10, "folders": 12, "commands": 100}


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMPAIGNS)
def test_a_share_of_each_campaign_finds_nothing(name, capsys):
    cases = str(SHARES[name])
    assert main([name, "--cases", cases, "--seed", "20"]) == 0, capsys.readouterr().out
