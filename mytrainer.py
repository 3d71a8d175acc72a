"""The front door: picks the command and hands over. `python mytrainer.py --help` says what there is."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIRED = ("torch", "hydra", "pydantic")  # by the first import of every command
COMMANDS = {
    "train": "trainer.commands.train:main",
    "generate": "trainer.commands.generate:main",
    "eval": "trainer.commands.evaluate:main",
    "export": "trainer.commands.export:main",
    "show": "trainer.commands.show:main",
    "show_configs": "trainer.commands.show:main",
    "bench": "trainer.commands.bench:main",
    "worker": "trainer.commands.launch:worker_main",  # started by us: one process of a run
}
RUNS = ("train", "worker")  # they go on where nobody reads what they print


def _import_paths() -> None:
    """Child processes (sweep jobs, workers) must find the project first, and the user's modules last."""
    old = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(ROOT), *(p for p in old if p), os.getcwd()]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    sys.path[:] = list(dict.fromkeys([str(ROOT), *sys.path, os.getcwd()]))


def main(argv: list[str]) -> int:
    """Run one command; the exit status is 0, 1 (a run failed), or 2 (the configuration is wrong)."""
    _import_paths()
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        print(
            f"error: {sys.executable} has no {', '.join(missing)}. In {ROOT}: pip install -e .",
            file=sys.stderr,
        )
        return 2
    # OpenMP threads that spin while they wait lose 5 to 80 times their speed when anything else runs on the
    # machine, and gain up to a third when nothing does. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from trainer import clock
    from trainer.view.stream import patient_streams

    if argv[:1] in (["--help"], ["-h"]) and argv[1:2] and argv[1] in COMMANDS:
        argv = [argv[1], argv[0], *argv[2:]]  # `--help train`, as other programs have it
    command = argv[0] if argv and argv[0] in COMMANDS else "train"
    if command != "worker":  # which counts from where its run was started
        clock.start()
    try:
        with patient_streams(raises=command not in RUNS):
            return _run(command, argv)
    except BrokenPipeError:  # the reader of our output (`| head`) has seen enough
        return 141


def _run(command: str, argv: list[str]) -> int:
    module, _, function = COMMANDS[command].partition(":")
    try:
        words = argv[1:] if argv and argv[0] == command else argv
        return getattr(importlib.import_module(module), function)(words) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise
    except Exception as error:
        explained = _explain(error, command)
        if explained is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        status, message = explained
        print(message, file=sys.stderr)
        return status


def _explain(error: Exception, command: str) -> tuple[int, str] | None:
    """(exit status, message) for what the user can mend, None for a fault of ours."""
    from configs.messages import ConfigError
    from trainer.errors import TrainingError, of_the_machine

    if isinstance(error, ConfigError):
        return 2, error.report()
    if isinstance(error, TrainingError):
        return 1, f"error: {error}"
    if machine := of_the_machine(error):
        return 1, f"error: {machine}"
    if command in RUNS:  # what can go wrong in a run is explained in trainer/commands/launch.py
        return None
    if isinstance(error, OSError) and error.filename:
        return 2, f"error: {error.filename}: {error.strerror}"
    return (2, f"error: {error}") if isinstance(error, (ValueError, OSError)) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
