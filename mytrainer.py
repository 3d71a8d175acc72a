"""Train language models of any architecture here, and look into what they have learned.

    from mytrainer import load, metrics, train

    run = train(["--hydra_model_cfg=configs/gpt2.yaml", "preset=nano", "num_iterations=50"])
    model = load(run["folder"])
    print(run["score"]["bits_per_byte"], model.score("def f(x):").nats)
    print(model.generate("def ", max_new_tokens=50))
    losses = metrics(run["folder"])["loss"]

`train` runs what the command line would, `load` opens what has been trained, `metrics` gives the curves of a run as
columns. They leave the process as they found it: modules of yours called `data` or `models` stay yours, and seeds,
environment, working directory, signal handlers, warnings and number formats are as before. While a call lasts, other
threads find ours under these names. What is given back can be pickled where no module of yours has one of them. A
`Loaded` computes for one thread at a time. Wrong input raises a
ValueError, a run that cannot go on a RuntimeError, with the text that the command line would print.

On the command line this is the front door, `python mytrainer.py --help`, and picks the command.
"""

from __future__ import annotations

import os
import sys


def _say_interrupted(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Where nothing of the command is there yet, Ctrl-C is one line and a status too."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.excepthook = _say_interrupted

import importlib  # noqa: E402
import importlib.util  # noqa: E402
import threading  # noqa: E402
from collections.abc import Iterator, Sequence  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

ROOT = Path(__file__).resolve().parent
ADDED = str(ROOT) not in sys.path
if ADDED:  # at its end: what a user calls `data` or `models` is found before ours
    sys.path.append(str(ROOT))

import mytrainer_guest as guest  # noqa: E402

if TYPE_CHECKING:
    from trainer.loaded import Loaded

__all__ = ["load", "metrics", "train"]

REQUIRED = ("torch", "hydra", "pydantic")  # by the first import of every command
COMMANDS = {
    "train": "trainer.commands.train:main",
    "generate": "trainer.commands.generate:main",
    "eval": "trainer.commands.evaluate:main",
    "export": "trainer.commands.export:main",
    "show": "trainer.commands.show:main",
    "show_configs": "trainer.commands.show:main",
    "convert": "trainer.commands.convert:main",
    "schema": "trainer.commands.schema:main",
    "compare": "trainer.commands.compare:main",
    "bench": "trainer.commands.bench:main",
    "leaderboard": "trainer.commands.leaderboard:main",
    "attribute": "trainer.commands.attribute:main",
    "doctor": "trainer.commands.doctor:main",
    "prepare": "trainer.commands.prepare:main",
    "worker": "trainer.commands.launch:worker_main",  # started by us: one process of a run
}
RUNS = ("train", "worker")  # they go on where nobody reads what they print


def train(overrides: Sequence[str]) -> dict[str, Any]:
    """Train one model, as `python mytrainer.py` with these words does, and return the summary of the run.

    The same checks, run folder and lines on the console; two calls with equal words give equal results, whatever the
    process has done before.

    Args:
        overrides: the words of the command line, such as `["--hydra_model_cfg=configs/gpt2.yaml", "preset=nano",
            "learning_rate=3e-4"]`. Relative paths mean the working directory; model files of the project are found from
            anywhere. `num_gpus=2` starts processes. `time_budget` counts from this call. What `env` names is set for as
            long as the run lasts.

    Returns:
        The content of the run's summary.json: `score` (`bits_per_byte`, `kind`, ...), `yardsticks`, `steps`, `tokens`,
        `bytes`, `seconds` ... and `folder`, the run's folder, absolute, for `load` and `metrics`. `peak_memory_bytes`
        is what was resident of the whole process since its start at most, `anonymous_memory_bytes` what of it was no
        page of a file when the run was saved. A run that is gone on with and has nothing left to do gives the
        summary that it has.

    Raises:
        ValueError: something is wrong with the words or the text that they name (`configs.messages.ConfigError` if that
            showed before anything started).
        RuntimeError: the run cannot go on (`trainer.errors.TrainingError`): a loss that is not finite, no memory left;
            or one is going on in this process, whose draws another would disturb.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: Ctrl-C. The run has been saved, and the message says how to go on; a second Ctrl-C does not
            wait for that. Other signals save too, and then do what they do in your process. Only the main thread hears
            them.
    """
    words = _words(overrides)
    with guest.visit(), guest.hydra_of_its_own(), _alone():
        from trainer import clock
        from trainer.signals import as_guest
        from trainer.view.stream import patient_streams

        with patient_streams(raises=False), as_guest():
            clock.start()
            return _train(words)


_training = threading.Lock()


@contextmanager
def _alone() -> Iterator[None]:
    from trainer.errors import TrainingError

    if not _training.acquire(blocking=False):
        raise TrainingError(
            "a training is going on in this process already, on another thread. Start processes for several at a time"
        )
    try:
        yield
    finally:
        _training.release()


def _train(words: list[str]) -> dict[str, Any]:
    from configs.compose import prepare_one
    from configs.messages import ConfigError
    from trainer.commands import launch
    from trainer.commands.train import call, composed

    if launch.launched() or _is_one_of_several():
        raise ConfigError(
            "train() starts the processes of a run itself: num_gpus=<N>. Those that torchrun or you have started are "
            "for the command line: torchrun ... mytrainer.py ..."
        )
    sys.argv = ["mytrainer.py"]  # what the manifest keeps, with the words behind it
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, sys.path)
    )  # processes of a run find what this one does
    before, torch_is_there = dict(os.environ), "torch" in sys.modules
    plan = prepare_one(words)
    tree = composed(plan)
    if torch_is_there and (
        new := sorted(name for name in os.environ if os.environ[name] != before.get(name))
    ):
        plan.notices.append(
            f"env: torch has been imported already, so what it reads of {', '.join(new)} at its start comes too late"
        )
    with guest.numerics():
        return call(plan, tree)


def _is_one_of_several() -> bool:
    """Whether a process group of the caller's own is open."""
    distributed: Any = sys.modules.get("torch.distributed")
    opened = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return opened and distributed.get_world_size() > 1


def _words(overrides: Sequence[str]) -> list[str]:
    given = [overrides] if isinstance(overrides, str) else list(overrides)
    wrong = [word for word in given if not isinstance(word, str)]
    if wrong or isinstance(overrides, str):
        raise ValueError(
            f'overrides: a list of words is meant, such as ["model=gpt2", "preset=nano"], got {(wrong or given)[0]!r}'
        )
    return given


def load(
    path: str | Path,
    best: bool = False,
    weights: str = "ema",
    device: str = "auto",
    *,
    overrides: Sequence[str] = (),
    val_seq_len: int | None = None,
    mixed_precision: str | None = None,
    trust: str | Sequence[str] = (),
) -> Loaded:
    """Open a trained model, as `eval` and `generate` do, to look into it.

    The text that it was trained on is not needed.

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints, or any other folder of weights that `eval`
            takes; relative to the working directory, `~` is expanded.
        best: the run's best_model/.
        weights: "ema", the average over training where the run kept one; or "raw".
        device: auto, cpu, cuda, cuda:N or mps.
        overrides: words "model_cfg.FIELD=VALUE" of fields that are no architecture, as `eval` and `generate` take them:
            `["model_cfg.sampler=first_hitting"]`.
        val_seq_len: context of `score` in tokens, instead of the run's.
        mixed_precision: auto, no, bf16 or fp16, instead of the run's: "no" is fp32, to look at small differences.
        trust: modules whose code may run although only the files there name them: a `type` or `model_adapter` outside
            of this trainer is imported by name. "my_pkg.my_mod", or several.

    Returns:
        A `Loaded` with `model`, `tokenizer` and `config`, and
        `score(text)`: how likely the text is, in nats per token where that is known;
        `hidden(text)`: the last states (T, D), or those of a layer;
        `logits(text)`: what is expected at each place, (T, V);
        `annotate(text)`: what was routed, cut or selected in it, where the architecture shows that;
        `generate(prompts, ...)`: texts that go on from prompts.

    Raises:
        ValueError: there is no such thing, it cannot be used, or an argument is none that there is.
    """
    with guest.visit(), guest.numerics():
        from trainer import loaded

        guest.with_visits(loaded.Loaded)
        return loaded.load(
            path,
            best,
            weights,
            device,
            overrides=overrides,
            val_seq_len=val_seq_len,
            mixed_precision=mixed_precision,
            trust=trust,
        )


def metrics(run: str | Path) -> dict[str, list[Any]]:
    """The curves of a run: its metrics.jsonl as columns of equal length, a row for each line, in their order.

    A line is of training (`step`, `loss`, `tokens`, `seconds`, `lr/matrix` ...) or of a score (`step`,
    `val_bits_per_byte` ...): where it has no such field the column holds None. Entries of mappings are columns with a
    dot (`val_parts.diffusion`). `pandas.DataFrame(metrics(run))` makes a table of it.

    Args:
        run: a run folder, one of its checkpoints, or a metrics.jsonl. The run may be going on.

    Raises:
        ValueError: there is no such run, or the file is damaged.
    """
    with guest.visit():
        from trainer.run.metrics import columns

        return columns(run)


def _import_paths() -> None:
    """Child processes (sweep jobs, workers) must find the project first, and the user's modules last."""
    old = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(ROOT), *(p for p in old if p), os.getcwd()]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    sys.path[:] = list(dict.fromkeys([str(ROOT), *sys.path, os.getcwd()]))


def main(argv: list[str]) -> int:
    """Run one command; the exit status is 0, 1 (a run failed), or 2 (the configuration is wrong)."""
    _import_paths()
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing and argv[:1] != ["doctor"]:  # which says more of it
        print(
            f"error: {sys.executable} has no {', '.join(missing)}. In {ROOT}: pip install -e .",
            file=sys.stderr,
        )
        return 2
    guest.let_threads_rest()
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
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before or behind the command
        print("interrupted", file=sys.stderr)
        sys.exit(130)
guest.settle(ADDED)
