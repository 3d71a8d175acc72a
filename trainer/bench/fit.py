"""`match` and `budget` of a checked configuration, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from configs.messages import ConfigError
from trainer.bench.length import LENGTH, fit_length
from trainer.bench.size import fit_size, kept_size

if TYPE_CHECKING:
    from configs.schema import ModelConfig, RunConfig

__all__ = ["fitted"]


def fitted(
    cfg: RunConfig,
    model_cfg: ModelConfig,
    explicit: set[str],
    notices: list[str],
    asked: Mapping[str, Any] | None = None,
) -> tuple[RunConfig, ModelConfig]:
    """The configuration with the size and the length that its targets ask for. `notices` hears what was found.

    Args:
        explicit: fields that the command line sets.
        asked: `model_cfg` of the command, for a run that goes on and has the size that was found for it; else None.

    Raises:
        ConfigError: the command line sets what a target decides, or a target has no meaning here.
    """
    if problems := cfg.match.problems("match") + cfg.budget.problems("budget"):
        raise ConfigError(problems)
    if explicit & {"preset", "configs/preset"}:  # whose sizes are where the search begins
        targets = {"match": cfg.match, "budget": cfg.budget}
        cfg = cfg.model_copy(update={k: v.model_copy(update={"start": None}) for k, v in targets.items()})
    if model_cfg.lacking():  # it cannot be built here, and training is refused
        return cfg, model_cfg
    if cfg.match.given and asked is not None:
        cfg = kept_size(cfg, model_cfg, asked)
    elif cfg.match.given:
        cfg, model_cfg = fit_size(cfg, model_cfg, explicit, notices)
    longer = explicit & set(LENGTH) and not any(key.startswith("budget.") for key in explicit)
    if cfg.budget.given and asked is not None and longer:
        cfg = cfg.model_copy(
            update={"budget": type(cfg.budget)()}
        )  # it goes on for as long as its command says
    if cfg.budget.given and not cfg.eval_only:
        cfg = fit_length(cfg, model_cfg, explicit, notices)
    return cfg, model_cfg
