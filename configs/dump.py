"""`--cfg job`: a composed configuration as the text of a model file, before anything of it is imported."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.compose import Plan, tree_of
from configs.files import CONFIGS, read
from configs.formats.yaml_text import literal
from configs.hydra_app import compose_unresolved
from configs.messages import ConfigError
from naming import did_you_mean


def job_text(plan: Plan) -> str:
    """The YAML text. Run as a file of its own it composes to the same; with --package, that part alone."""
    flags = dict(f.partition("=")[::2] for f in plan.request.flags)
    tree = literal(tree_of(plan)) if "--resolve" in flags else compose_unresolved(plan.overrides)
    plan.kept_heads(None, tree)
    tree["model_cfg"] = _of_the_type(tree.get("type"), tree.get("model_cfg"))
    package = flags.get("--package", "_global_")
    if package == "_global_":
        return OmegaConf.to_yaml(OmegaConf.create({"defaults": ["training", "_self_"], **tree}))
    try:
        part = OmegaConf.select(OmegaConf.create(tree), package)
    except OmegaConfBaseException as error:
        raise ConfigError(f"command line: --package: {str(error).partition(chr(10))[0]}") from None
    if part is None:
        raise ConfigError(f"command line: --package: no '{package}' here.{did_you_mean(package, tree)}")
    return f"# @package {package}\n{OmegaConf.to_yaml(part)}" if OmegaConf.is_config(part) else f"{part}\n"


def _of_the_type(type_: Any, model_cfg: Any) -> Any:
    """Without the sizes that a preset brings for other architectures: what the type's own YAML states, all where it
    has none."""
    import models

    path = CONFIGS / f"{type_}.yaml"
    if type_ not in models.ARCHITECTURES or not path.is_file() or not isinstance(model_cfg, dict):
        return model_cfg
    stated = read(path).values.get("model_cfg") or {}
    return {name: value for name, value in model_cfg.items() if name in stated}
