"""Check every configuration of this folder: `python configs/test_configs.py [--no-model] [--filter TEXT]`.

For the file of each architecture (`<type>.yaml`): it states every field and the whole recipe; it composes as an option
of the group and as a primary config, to the same tree; it validates with every preset and every source of data. Every
other model file, here or in a folder below, is checked as a run of it would be. Of all: type and adapter exist; the
dump loads to the same run; the model builds without storage. Then: mistakes made on purpose are refused. Exit status 1
if anything is wrong. pytest collects the same checks.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
# This folder must not shadow top-level modules when the file runs as a script.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT / "configs"]

import hydra  # noqa: E402
import yaml  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import models  # noqa: E402
from configs.compose import compose, compose_tree, model_config_class, prepare  # noqa: E402
from configs.files import (  # noqa: E402
    BASE,
    CONFIGS,
    DATA_FORMATS,
    choices,
    option_path,
    options,
    read,
    read_model,
)
from configs.frontend import GROUPS  # noqa: E402
from configs.messages import ConfigError  # noqa: E402
from configs.schema import CHOICES, RunConfig, redacted  # noqa: E402
from configs.validate import validate  # noqa: E402
from naming import load  # noqa: E402
from trainer.optim import OFF_UNLESS_SET  # noqa: E402

# A mistake made on purpose, and words of the message that must refuse it.
MISTAKES = [
    (["num_iteration=3"], "Did you mean 'num_iterations'"),
    (["model_cfg.n_embd=64"], "model_cfg.d_model"),
    (["model_cfg.d_model=abc"], "expected int, got 'abc'"),
    (["seed=true"], "expected int"),
    (["scheduler=cosin"], "Did you mean 'cosine'"),
    (["learning_rate=-1"], "must satisfy 0 < learning_rate"),
    (["model_cfg.d_model=770", "model_cfg.n_heads=12"], "nearest: 768, 780"),
    (["batch_size=7"], "nearest:"),
    (["preset=huge"], "no preset 'huge'"),
    (["type=seddd"], "unknown type 'seddd'"),
    (["resume=auto"], "needs model_name or output_dir"),
]


# What every recipe says, whatever its optimizer and schedule read besides; and fields that say the same in two ways.
RECIPE = {
    "optimizer",
    "scheduler",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "ema_decay",
    "warmup_ratio",
}
LENGTH = {"lr_decay_steps"}  # how long a run is belongs to the run
EITHER = {
    "warmup_ratio": {"warmup_steps"},
    "warmup_steps": {"warmup_ratio"},
    "min_lr_ratio": {"min_lr"},
    "min_lr": {"min_lr_ratio"},
}


def _quiet(text: str) -> None:
    del text


def _compose(*words: str) -> RunConfig:
    return compose(list(words), notify=_quiet)[0]


def _needed(data: str) -> list[str]:
    """Overrides without which a source of text is refused; any file will do, and any name where it may be one."""
    from data import SOURCES

    if data == "mix":
        return ["mix=[{data: embedded, weight: 1}]"]
    needs = [need.partition("=") for need in SOURCES[data].needs]
    return [
        f"{field}={'any/name' if what.endswith('name>') else CONFIGS / 'training.yaml'}"
        for field, _, what in needs
    ]


def _composes(data: str) -> bool:
    """Whether it can be asked for here: data sets of Hugging Face need a package that not everyone has."""
    return data != "hf" or find_spec("datasets") is not None


def check_model_file(
    name: str, build: bool, presets: Sequence[str] | None = None, sources: Sequence[str] | None = None
) -> None:
    """Everything that must hold for configs/<type>.yaml, with these presets and sources of data (default: with every
    one). Raises if something does not."""
    path = CONFIGS / f"{name}.yaml"
    grouped = compose_tree(prepare([str(path), "preset=none"]).overrides)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        primary = OmegaConf.to_container(hydra.compose(name), resolve=True)
    assert isinstance(primary, dict)
    primary_tree = {**{str(k): v for k, v in primary.items()}, "preset": "none"}
    assert validate(grouped)[0] == validate(primary_tree)[0], "group and primary differ"
    for data in filter(_composes, sources or choices("data")):
        assert _compose(str(path), f"data={data}", *_needed(data)).data == data
    for preset in presets or options("preset"):
        cfg = _compose(str(path), f"preset={preset}")
        _check_run(cfg)
    if build:
        _build(cfg)
    _check_stated(path, cfg)
    _check_recipe(path)


def check_own_file(path: Path, build: bool) -> None:
    """A model file that states what differs, wherever it lies: what a run of it would be checked for."""
    if read_model(path).stated("dataset_name") and not _composes("hf"):
        print(f"  not checked: {path.name} is of a data set, which needs the package datasets")
        return
    cfg = _compose(str(path))
    _check_run(cfg)
    if build:
        _build(cfg)


def _check_run(cfg: RunConfig) -> None:
    architecture = models.resolve(cfg.type)
    load(cfg.model_adapter or architecture.adapter)
    again = RunConfig.model_validate(yaml.safe_load(yaml.safe_dump(redacted(cfg))))
    assert again == cfg, "the dump loads to another run"


def _check_stated(path: Path, cfg: RunConfig) -> None:
    """A shipped file states every field of its architecture with what is the default of the Config class."""
    tree = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(tree, dict)
    stated, cls = tree["model_cfg"], model_config_class(cfg)
    defaults = cls().model_dump()
    assert stated.keys() == defaults.keys(), f"model_cfg states {[*stated]}, fields are {[*defaults]}"
    meant = cls(**stated).model_dump()
    assert meant == defaults, f"model_cfg states {stated}, defaults are {defaults}"


def _check_recipe(path: Path) -> None:
    """A shipped file states the whole recipe of its optimizer and its schedule, but for options that are off, and of
    all other generic fields those that it wants otherwise: what stands in training.yaml may change without changing
    what a paper's recipe means."""
    stated, base = (OmegaConf.to_container(OmegaConf.load(p)) for p in (path, BASE))
    assert isinstance(stated, dict) and isinstance(base, dict)
    reads = [CHOICES[field].table[stated[field]].reads for field in ("optimizer", "scheduler")]
    recipe = {*RECIPE, *(name for names in reads for name in names)} - LENGTH
    unsaid = recipe - OFF_UNLESS_SET - stated.keys()
    missing = {name for name in unsaid if not EITHER.get(name, set()) & stated.keys()}
    assert not missing, f"the recipe does not state {', '.join(sorted(missing))}"
    idle = [str(k) for k in stated.keys() - recipe - EITHER.keys() if k in base and stated[k] == base[k]]
    assert not idle, f"as in training.yaml, leave out: {', '.join(sorted(idle))}"


def _build(cfg: RunConfig) -> None:
    """The model on the meta device: shapes without storage."""
    import torch

    values = {**cfg.model_cfg, "vocab_size": cfg.model_cfg.get("vocab_size") or 1024}
    model_cfg = model_config_class(cfg).model_validate(values)
    if why := model_cfg.lacking():
        print(f"  not built: {why}")
        return
    with torch.device("meta"):
        model = load(models.resolve(cfg.type).model)(model_cfg)
    assert all(p.is_meta for p in model.parameters())


def check_option(group: str, name: str) -> None:
    """An option file composes over any model, and says so in its own field."""
    words = _needed(name) if group == "data" else []
    assert getattr(_compose(f"model={_architectures()[0]}", f"{group}={name}", *words), group) == name
    path = option_path(group, name)
    text = path.read_text(encoding="utf-8")
    assert path.suffix == ".json" or text.startswith("# @package _global_\n"), (
        "must begin with '# @package _global_'"
    )


def check_mistake(words: list[str], message: str) -> None:
    """A mistake must be refused in the words that help."""
    try:
        _compose(f"model={_architectures()[0]}", *words)
    except ConfigError as error:
        assert message in error.report(), error.report()
        return
    raise AssertionError("accepted")


def _architectures() -> list[str]:
    """Names of the files that are called as an architecture: the shipped ones."""
    return [name for name in options() if name in models.ARCHITECTURES]


def other_files(folder: Path) -> Iterator[Path]:
    """The model files besides: yours, and those of the papers. The folders of options are no models."""
    own = {BASE, *(folder / f"{name}.yaml" for name in models.ARCHITECTURES)}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in DATA_FORMATS and p not in own):
        if path.relative_to(folder).parts[0] not in GROUPS:
            yield path


def checks(build: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """(label, check) of everything there is."""
    for name in _architectures():
        yield f"configs/{name}.yaml", functools.partial(check_model_file, name, build)
    for path in other_files(CONFIGS):
        yield f"configs/{path.relative_to(CONFIGS)}", functools.partial(check_own_file, path, build)
    for group in GROUPS:
        for name in filter(_composes, options(group)):
            yield f"{group}={name}", functools.partial(check_option, group, name)
    for path in sorted((CONFIGS / "preset" / "for").glob("*.yaml")):
        yield f"configs/{path.relative_to(CONFIGS)}", functools.partial(read, path)
    for words, message in MISTAKES:
        yield f"refused: {' '.join(words)}", functools.partial(check_mistake, words, message)


def test_every_configuration() -> None:
    for label, check in checks(build=True):
        try:
            check()
        except Exception as error:
            raise AssertionError(f"{label}: {error}") from error


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--no-model", action="store_true", help="do not build the models")
    parser.add_argument("--filter", default="", metavar="TEXT", help="only what has this text in its name")
    args = parser.parse_args(argv)
    chosen = [(label, check) for label, check in checks(not args.no_model) if args.filter in label]
    if not chosen:
        print(f"nothing matches '{args.filter}'", file=sys.stderr)
        return 1
    failures = 0
    for label, check in chosen:
        try:
            check()
            print(f"✓ {label}")
        except Exception as error:
            failures += 1
            print(f"✗ {label}: {error}")
    print(f"{len(chosen) - failures} of {len(chosen)} passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
