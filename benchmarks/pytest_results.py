"""A plugin of pytest: the result of each test as a line of JSON, written as soon as it is known, so that whoever is
stopped has the rest: `pytest -p benchmarks.pytest_results --results FILE`"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

import pytest

__all__ = ["figures"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, required=True, help="where a line for each test goes")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # the one that workers of xdist report to
        config.pluginmanager.register(_Writer(config.getoption("--results").open("w", encoding="utf-8")))


class _Writer:
    def __init__(self, file: TextIO) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        line: dict[str, Any] = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
        }
        if report.failed:
            line["why"] = getattr(report.longrepr, "reprcrash", None) or report.longreprtext
            line["why"] = str(getattr(line["why"], "message", line["why"])).partition("\n")[0]
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_unconfigure(self) -> None:
        self.file.close()


def figures(file: Path) -> dict[str, Any]:
    """What the lines come to: numbers of tests and of skipped ones, what failed and why, seconds."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {
        "tests": len({line["test"] for line in lines}),
        "skipped": len({line["test"] for line in lines if line["outcome"] == "skipped"}),
        "failed": {line["test"]: line["why"] for line in lines if line["outcome"] == "failed"},
        "seconds": sum(line["seconds"] for line in lines),
    }
