"""Python, what must be installed, and what may be: whether it can be imported, and what installs it. The lists are
those of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

from trainer.doctor.importing import broken
from trainer.doctor.lines import ROOT, Line, note, ok, problem

__all__ = ["check"]

PIP = f"{sys.executable} -m pip install"
# Distributions whose module has another name than they have with underscores.
MODULES = {
    "hydra-core": "hydra",
    "liger-kernel": "liger_kernel.ops",
    "fla-core": "fla",
    "jupyterlab": "jupyterlab",
    **{
        f"hydra-{name}": f"hydra_plugins.hydra_{name.replace('-', '_')}"
        for name in (
            "submitit-launcher",
            "joblib-launcher",
            "ray-launcher",
            "rq-launcher",
            "optuna-sweeper",
            "ax-sweeper",
            "nevergrad-sweeper",
        )
    },
}
FOR_DEVELOPERS = "dev"  # the extra that pytest needs; `pytest` says so


def check() -> Iterator[Line]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield ok("mytrainer", f"{project['version']} in {ROOT}")
    yield _python(project["requires-python"])
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != FOR_DEVELOPERS}
    every = [*project["dependencies"], *(wanted for extra in extras.values() for wanted in extra)]
    here = {name: version for wanted in every if (version := _version(name := _name(wanted)))}
    why_not = broken([_module(name) for name in here])
    for wanted in project["dependencies"]:
        yield _required(wanted, here, why_not)
    for extra, list_ in extras.items():
        yield _optional(extra, list_, here, why_not)


def _python(required: str) -> Line:
    version, least = platform.python_version(), required.removeprefix(">=")
    if sys.version_info[:2] < tuple(map(int, least.split("."))):
        return problem("python", f"{version} is older than {least}", f"install Python {least} or later")
    return ok("python", f"{version} ({sys.executable})")


def _name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return found.group()


def _module(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _misfit(requirement: str, version: str) -> str:
    """What of the requirement an installed version does not meet; "" if it meets all, or nobody can say."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return ""
    wanted = Requirement(requirement)
    return "" if wanted.specifier.contains(version, prereleases=True) else str(wanted.specifier)


def _required(requirement: str, here: dict[str, str], why_not: dict[str, str]) -> Line:
    name = _name(requirement)
    if name not in here:
        return problem(name, "is not installed", f"in {ROOT}: {PIP} -e .")
    if why := why_not.get(_module(name)):
        again = f'{PIP} --force-reinstall "{requirement}"'
        return problem(name, f"{here[name]} cannot be imported: {why}", again)
    if wanted := _misfit(requirement, here[name]):
        return problem(name, f"{here[name]} was not tested; {wanted} was", f'{PIP} "{requirement}"')
    return ok(name, here[name])


def _optional(extra: str, wanted: list[str], here: dict[str, str], why_not: dict[str, str]) -> Line:
    """One line for all that an extra brings."""
    said: list[str] = []
    bad: list[str] = []
    missing = False
    for requirement in wanted:
        name = _name(requirement)
        version: Any = here.get(name)
        if version is None:
            missing = True
            said.append(f"{name} is not installed")
        elif why := why_not.get(_module(name)):
            bad.append(f"{name} {version} cannot be imported: {why}")
        elif misfit := _misfit(requirement, version):
            bad.append(f"{name} {version} was not tested; {misfit} was")
        else:
            said.append(f"{name} {version}")
    text, about = ", ".join([*bad, *said]), f"optional: {extra}"
    install = f'{PIP} -e "{ROOT}[{extra}]"'
    if extra == "gpu-build":
        install += " --no-build-isolation"
    if bad:
        return problem(about, text, f"{install} --upgrade; or uninstall what is not needed")
    return note(about, text, install) if missing else ok(about, text)
