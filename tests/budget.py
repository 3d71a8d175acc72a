"""CPU seconds of the fast tier by architecture and by file: `python -m tests.budget [pytest arguments]`

CPU seconds rather than wall seconds, as these do not depend on how many workers there are or who else is at work on the
machine. A fixture is charged to the test that builds it (a shared one to the first that asks); processes that a test
starts and waits for are charged to the test. What a worker spends before its first test (interpreter, imports,
collection) belongs to no file and stands apart.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator
from pathlib import PurePath

import pytest

from models import ARCHITECTURES

LIMIT = 15  # CPU seconds an architecture may cost in the fast tier
DEAR = 1.0  # tests that cost as much are listed one by one
# A family: architectures with the same adapter module, named as its package is ("diffusion") or the module ("default").
_FAMILY_OF = {t: re.split(r"[.:]", row.adapter)[1] for t, row in ARCHITECTURES.items()}
_ALSO = {"dit": "diffusion"}  # words in a test file's path that mean a family and are not its name


def cpu() -> tuple[float, float]:
    """CPU seconds of this process (all threads), and of the processes it started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time(), children.ru_utime + children.ru_stime


def owners(nodeid: str) -> tuple[str, list[str]]:
    """How a test belongs to architectures, and to which: "contract", "own", "family" (shared), or "" (to none).

    An architecture's are the tests parametrised with its type, and the files that carry its type in their name or
    folder. Files that carry a family's name are shared by its members in equal parts.
    """
    path, _, name = nodeid.partition("::")
    for word in re.findall(r"\w+", name.partition("[")[2]):
        if word in ARCHITECTURES:
            return ("contract" if "contract" in PurePath(path).parts else "own"), [word]
    if own := _last_named(path, ARCHITECTURES):
        return "own", [own]
    if family := _last_named(path, {*_FAMILY_OF.values(), *_ALSO}):
        return "family", [t for t, f in _FAMILY_OF.items() if f == _ALSO.get(family, family)]
    return "", []


def _last_named(path: str, names: Collection[str]) -> str | None:
    """Of these names, of one word or several, the last that stands in the path."""
    words = [w for part in PurePath(path).with_suffix("").parts[1:] for w in part.split("_")]
    spans = ("_".join(words[begin:end]) for end in range(len(words), 0, -1) for begin in range(end))
    return next((span for span in spans if span in names), None)


class Budget:
    """Measures in the process that runs the tests, adds up and prints in the one that started them."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.worker = hasattr(config, "workerinput")
        self.began = time.monotonic()
        self.before: float | None = None  # CPU seconds up to the first test
        self.tests: dict[str, dict[str, float]] = {}
        self.workers: dict[str, dict[str, float]] = {}

    # --- where tests run

    def pytest_collection_finish(self) -> None:
        """Torch imports its compiler when the first optimizer is made, for over a second: no test's fault."""
        if self.worker or not self.config.getoption("numprocesses", None):
            import torch._dynamo  # noqa: F401

    def _measured(self, item: pytest.Item, phase: str) -> Generator:
        if self.before is None:
            self.before = sum(cpu())
        own, children = cpu()
        try:
            return (yield)
        finally:
            own, children = (b - a for a, b in zip((own, children), cpu(), strict=True))
            if phase == "setup":
                item.user_properties.append(("cpu", {}))
            spent = dict(item.user_properties)["cpu"]
            spent[phase] = own + children
            spent["processes"] = spent.get("processes", 0.0) + children

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator:
        return (yield from self._measured(item, "setup"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator:
        return (yield from self._measured(item, "call"))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator:
        return (yield from self._measured(item, "teardown"))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        total = sum(cpu())
        spent = {"before": total if self.before is None else self.before, "total": total}
        if self.worker:
            session.config.workeroutput["budget"] = spent  # type: ignore[attr-defined]
        elif self.before is not None:  # -n 0
            self.workers["main"] = spent

    # --- where they were started from

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node, error) -> None:
        if "budget" in getattr(node, "workeroutput", {}):
            self.workers[node.gateway.id] = node.workeroutput["budget"]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and not self.worker:
            # `[...@group]`: xdist names the group in the id it schedules by.
            self.tests[report.nodeid.partition("@")[0]] = dict(report.user_properties)["cpu"]

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section("CPU seconds")
        for line in [*self._architectures(), "", *self._files(), "", *self._dear(), "", *self._sums()]:
            terminalreporter.write_line(line)

    def _architectures(self) -> Iterator[str]:
        ways = ("contract", "own", "family")
        table = {t: dict.fromkeys(ways, 0.0) for t in ARCHITECTURES}
        rest = 0.0
        for nodeid, spent in self.tests.items():
            way, members = owners(nodeid)
            if not members:
                rest += _sum(spent)
            for type_ in members:
                table[type_][way] += _sum(spent) / len(members)
        yield f"{'architecture':<20}{'total':>9}{'contract':>10}{'own':>8}{'share of family':>18}"
        for type_, row in sorted(table.items(), key=lambda item: -sum(item[1].values())):
            total = sum(row.values())
            over = f"  over {LIMIT}" if total > LIMIT else ""
            yield (
                f"{type_:<20}{total:>9.1f}{row['contract']:>10.1f}{row['own']:>8.1f}{row['family']:>18.1f}{over}"
            )
        yield f"{'all of them':<20}{sum(sum(row.values()) for row in table.values()):>9.1f}"
        yield f"{'none in particular':<20}{rest:>9.1f}"

    def _files(self) -> Iterator[str]:
        files: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for nodeid, spent in self.tests.items():
            file = files[nodeid.partition("::")[0]]
            file["tests"] += 1
            file["total"] += _sum(spent)
            for key, value in spent.items():
                file[key] += value
        columns = ("total", "setup", "call", "teardown", "processes")
        yield f"{'file':<56}{'tests':>6}" + "".join(f"{c:>10}" for c in columns)
        for name, file in sorted(files.items(), key=lambda item: -item[1]["total"]):
            yield f"{name:<56}{file['tests']:>6.0f}" + "".join(f"{file[c]:>10.2f}" for c in columns)

    def _dear(self) -> Iterator[str]:
        yield f"tests of {DEAR:.0f} CPU second and more (with fixtures that they were the first to ask for)"
        for nodeid, spent in sorted(self.tests.items(), key=lambda item: -_sum(item[1])):
            if _sum(spent) >= DEAR:
                yield f"{_sum(spent):>7.2f}  {nodeid}"

    def _sums(self) -> Iterator[str]:
        tests = sum(map(_sum, self.tests.values()))
        total = sum(w["total"] for w in self.workers.values())
        before = sum(w["before"] for w in self.workers.values())
        for name, spent in sorted(self.workers.items()):
            yield f"{name}: {spent['before']:.1f} before the first test, {spent['total']:.1f} in all"
        yield (
            f"{len(self.tests)} tests {tests:.1f} + before the first {before:.1f} + around them "
            f"{total - before - tests:.1f} = {total:.1f} CPU seconds, {time.monotonic() - self.began:.1f} seconds"
        )


def _sum(spent: dict[str, float]) -> float:
    return sum(spent.get(phase, 0.0) for phase in ("setup", "call", "teardown"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Budget(config), "budget-of-cpu")


if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "tests.budget", *sys.argv[1:]]))
