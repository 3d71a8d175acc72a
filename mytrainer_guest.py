"""How the project works inside somebody else's process: under its own names while its code runs, and unnoticed after.

Names of modules are global to a process, and `data` or `models` is what other people call theirs too. So ours stand in
`sys.modules` while a call of ours lasts (`visit`); what the user has under these names is put aside, and back at the
end. What else a run needs to change in a process (environment, seeds, warnings, Hydra's state ...) is put back as well.

Our modules stay loaded between calls, out of sight. `import models` gives the user's own wherever he has one, now or
later, and ours (the same as before) only where he has none. What is global to the process is so for its other threads
too: one that imports `data` while a call lasts gets ours. Nothing here imports anything but the standard library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import logging
import os
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

__all__ = ["hydra_of_its_own", "let_threads_rest", "numerics", "settle", "visit", "visiting", "with_visits"]

ROOT = Path(__file__).resolve().parent
NAMES = ("adapters", "configs", "data", "kernels", "models", "naming", "trainer")
FRESH_SEED = 67280421310721  # of torch's generators in a process that has just imported it
P = ParamSpec("P")
R = TypeVar("R")

_lock = threading.RLock()


class _Shared:
    """A context that any number of calls and threads are in at a time: the first opens it, the last closes it."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make, self._inside = make, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with _lock:
            if not self._inside:
                self._open = self._make()
                self._open.__enter__()
            self._inside += 1
        try:
            yield
        finally:
            with _lock:
                self._inside -= 1
                if not self._inside:
                    self._open.__exit__(None, None, None)


# -- modules ---------------------------------------------------------------------------------------------------------

_ours: dict[str, ModuleType] = {}  # every module of ours that was ever loaded, while it is out of sight


def _top(name: str) -> str:
    return name.partition(".")[0]


def _is_ours(top: str, file: str | None) -> bool:
    """Whether the file of a top-level module is that of the project's module of this name."""
    return file is not None and os.path.realpath(file) in (
        str(ROOT / f"{top}.py"),
        str(ROOT / top / "__init__.py"),
    )


def _seen() -> dict[str, ModuleType]:
    """What stands under our names, whoever's it is."""
    return {
        name: module
        for name, module in list(sys.modules.items())
        if name.startswith(NAMES) and _top(name) in NAMES
    }


@contextmanager
def _project() -> Iterator[None]:
    """Our modules under their names, and the project's folder first on the path, the working directory last."""
    before, path = _seen(), list(sys.path)
    foreign = {top for top in NAMES if top in before and not _is_ours(top, _file(before[top]))}
    aside = {name: module for name, module in before.items() if _top(name) in foreign}
    for name in aside:
        del sys.modules[name]
    for name, module in _ours.items():
        sys.modules.setdefault(name, module)
    sys.path[:] = list(dict.fromkeys([str(ROOT), *path, os.getcwd()]))
    try:
        yield
    finally:
        sys.path[:] = path
        own = _seen()
        _ours.update(own)
        at_home = {top for top in NAMES if _is_ours(top, _origin(_found(top)))}
        for name in own:
            if (name not in before or name in aside) and (_top(name) in foreign or _top(name) not in at_home):
                del sys.modules[name]
        sys.modules.update(aside)


_project_shared = _Shared(_project)


def _file(module: ModuleType) -> str | None:
    return getattr(module, "__file__", None)


def _origin(spec: importlib.machinery.ModuleSpec | None) -> str | None:
    return spec.origin if spec is not None else None


def _found(name: str) -> importlib.machinery.ModuleSpec | None:
    """What a top-level name stands for on the path without the entry that `mytrainer` has added at its end."""
    path = [entry for entry in sys.path if not (_added and entry == str(ROOT))]
    for finder in sys.meta_path:
        if isinstance(finder, _Finder) or not hasattr(finder, "find_spec"):
            continue
        by_path = finder is importlib.machinery.PathFinder
        if (spec := finder.find_spec(name, path if by_path else None)) is not None:
            return spec
    return None


class _Finder:
    """Outside of our calls: the user's own module where he has one, else ours, loaded in a visit and once only."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        top = _top(name)
        if top not in NAMES or _project_shared._inside:
            return None
        if name == top:
            theirs = _found(name)
            if theirs is not None and not (_is_ours(name, theirs.origin) and name in _ours):
                return theirs
        elif not _is_ours(top, _file(sys.modules[top])):
            return None
        return importlib.machinery.ModuleSpec(name, _Loader())


class _Loader(importlib.abc.Loader):
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        with _project_shared():
            module = importlib.import_module(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; the import system has only given it another spec."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


_added = False


def settle(added: bool) -> None:
    """Let our names mean the user's modules first. `added`: the project's folder is on the path for us alone; where it
    was there before, as for the command line and the tests, it stands for the user's own modules too."""
    global _added
    _added = _added or added
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


# -- the rest of the process -----------------------------------------------------------------------------------------


@contextmanager
def _interpreter() -> Iterator[None]:
    environment, folder, argv = dict(os.environ), os.getcwd(), sys.argv
    words = list(argv)
    streams, drawn = (sys.stdout, sys.stderr), random.getstate()
    root, handlers, level = logging.root, list(logging.root.handlers), logging.root.level
    with warnings.catch_warnings():
        try:
            yield
        finally:
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)
            if os.getcwd() != folder:
                os.chdir(folder)
            sys.argv, argv[:] = argv, words
            sys.stdout, sys.stderr = streams
            random.setstate(drawn)
            root.handlers[:] = handlers
            root.setLevel(level)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra keeps its state in singletons. Ours begin with what Hydra itself has registered; the user's come back."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.plugins import Plugins
    from hydra.core.singleton import Singleton

    Plugins.instance()  # plugins store their configurations when they are imported, which is once
    theirs = dict(Singleton._instances)
    registered = {k: v for k, v in ConfigStore.instance().repo.items() if k.startswith(("hydra", "_"))}
    for kind in (ConfigStore, GlobalHydra, HydraConfig):
        Singleton._instances.pop(kind, None)
    ConfigStore.instance().repo = _branches(registered)
    try:
        yield
    finally:
        Singleton._instances.clear()
        Singleton._instances.update(theirs)


def _branches(tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of a tree of mappings, its leaves shared."""
    return {key: _branches(value) if isinstance(value, dict) else value for key, value in tree.items()}


@contextmanager
def _libraries() -> Iterator[None]:
    """Our code finds torch as in a process of its own; the user finds it, and numpy, as he left them."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with _generators(), _products(), _gpu():
        try:
            torch.set_default_dtype(torch.float32)
            _be_deterministic(False)
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            _be_deterministic(deterministic, warns)


def _be_deterministic(wanted: bool, warn_only: bool = False) -> None:
    """Left alone where it is so: the switch imports torch's compiler, which takes seconds."""
    import torch

    now = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    if now != (wanted, warn_only):
        torch.use_deterministic_algorithms(wanted, warn_only=warn_only)


@contextmanager
def _generators() -> Iterator[None]:
    """Seeds of torch's generators and of numpy's global one."""
    import numpy
    import torch

    of_numpy, of_torch = numpy.random.get_state(), torch.get_rng_state()
    of_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    torch.manual_seed(FRESH_SEED)
    try:
        yield
    finally:
        numpy.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_cuda is not None:
            torch.cuda.set_rng_state_all(of_cuda)
        else:  # they were to begin at the user's seed
            torch.cuda.manual_seed_all(torch.initial_seed())


@contextmanager
def _gpu() -> Iterator[None]:
    """Which one is meant by `cuda`."""
    from torch import cuda

    current = cuda.current_device() if cuda.is_initialized() else 0
    try:
        yield
    finally:
        if cuda.is_initialized() and cuda.current_device() != current:
            cuda.set_device(current)


@contextmanager
def _products() -> Iterator[None]:
    """How exact products of fp32 are. torch has an older and a newer word for it, and does not tell by the older one
    what was said by the newer."""
    import torch

    backends: Any = torch.backends
    products = [backends.cuda.matmul, backends.mkldnn.matmul]
    newer = [product.fp32_precision for product in products]
    older = None
    with suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        for product, precision in zip(products, newer, strict=True):
            product.fp32_precision = precision


_libraries_shared = _Shared(_libraries)
_interpreter_shared = _Shared(_interpreter)
hydra_of_its_own = _Shared(_hydra)


@contextmanager
def visit() -> Iterator[None]:
    """While open, our modules stand under their names, and what changes in the process is put back at the end."""
    with _interpreter_shared(), _project_shared():
        let_threads_rest()
        yield


def let_threads_rest() -> None:
    """OpenMP threads that spin while they wait lose 5 to 80 times their speed when anything else runs on the machine,
    and gain up to a third when nothing does. Has an effect where torch is not loaded yet, which reads this once."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@contextmanager
def numerics() -> Iterator[None]:
    """The same for torch and numpy, which it imports: after variables of the environment that torch reads are set."""
    with _libraries_shared(), ExitStack() as modes:
        import torch

        # These belong to a thread, not to the process.
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                modes.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            modes.enter_context(torch.device("cpu"))
        yield


def visiting(function: Callable[P, R]) -> Callable[P, R]:
    """A function or method that a user calls, and that computes."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with visit(), numerics():
            return function(*args, **kwargs)

    return call


@functools.cache
def with_visits(kind: type) -> None:
    """Make every public method of a class a visit: its objects outlive the call that made them."""
    for name, member in list(vars(kind).items()):
        if inspect.isfunction(member) and not name.startswith("_"):
            setattr(kind, name, visiting(member))
