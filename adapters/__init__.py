"""How an architecture is trained and scored: objective, likelihood, generation, parameter roles.

`build_adapter` turns a run's configuration into the module that the trainer drives. It is the only place
where the table in `models/__init__.py` and an out-of-tree `model_adapter` meet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import models
from adapters.rates import hold_still
from data.tokenizer_choice import AUTO
from kernels.choose import Kernels
from naming import load, shorten

if TYPE_CHECKING:
    from adapters.base import ModelAdapter
    from configs.schema import ModelConfig, RunConfig
    from data.tokenizers import Tokenizer

__all__ = ["adapter_class", "build_adapter", "complete_model_config", "own_tokenizer"]


def adapter_class(cfg: RunConfig) -> type[ModelAdapter]:
    """The adapter class of a run: `model_adapter` if given, else the one its type is registered with."""
    from adapters.base import ModelAdapter

    spec = cfg.model_adapter or models.resolve(cfg.type).adapter
    cls = load(spec)
    if not (isinstance(cls, type) and issubclass(cls, ModelAdapter)):
        raise ValueError(f"model_adapter {spec!r} is not a subclass of adapters.base.ModelAdapter")
    return cls


def own_tokenizer(cfg: RunConfig, model_cfg: ModelConfig) -> Tokenizer | None:
    """What the weights that a run stands on know the ids of, where it leaves the choice open; else None."""
    return adapter_class(cfg).own_tokenizer(model_cfg) if cfg.tokenizer == AUTO else None


def complete_model_config(model_cfg: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Fill in what the weights of a base decide, and `vocab_size: null` with the tokenizer's size; refuse one that the
    token ids would overrun."""
    model_cfg = model_cfg.completed()
    vocab_size = getattr(model_cfg, "vocab_size", None)
    if vocab_size is None:
        return model_cfg.model_copy(update={"vocab_size": tokenizer.vocab_size})
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"model_cfg.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} tokens of tokenizer "
            f"{tokenizer.name!r}, so token ids would fall outside the embedding. "
            + (
                "It is the base's: leave tokenizer at auto, which takes the base's own"
                if model_cfg.elsewhere
                else f"Set it to null or at least {tokenizer.vocab_size}"
            )
        )
    return model_cfg


def build_adapter(
    cfg: RunConfig,
    model_cfg: ModelConfig,
    tokenizer: Tokenizer,
    device: torch.device | str = "cpu",
) -> ModelAdapter:
    """Build the adapter with its model initialised from `cfg.seed`.

    The model is made on the meta device, so that no memory is touched twice, and initialised on the CPU,
    so that one seed gives the same weights on every device. On `device="meta"` it stays without storage.
    """
    cls = adapter_class(cfg)
    model_cfg = complete_model_config(model_cfg, tokenizer)
    with torch.device("meta"):
        model = cls.build_model(load(models.resolve(cfg.type).model), model_cfg)
    adapter = cls(model, model_cfg, tokenizer)
    kernels = Kernels(cfg.kernels, deterministic=cfg.deterministic, device=torch.device(device))
    adapter.z_loss = cfg.z_loss
    _refuse_state_outside_the_model(adapter)
    if torch.device(device).type != "meta":
        adapter.to_empty(device="cpu")
        adapter.init_weights(torch.Generator().manual_seed(cfg.seed))
        adapter.to(device)
    # Last, as loading a base may replace its modules.
    adapter.kernels = kernels
    adapter.freeze_external()
    if not cfg.use_lora:  # else once there are adapters
        hold_still(adapter, cfg)
    return adapter


def _refuse_state_outside_the_model(adapter: ModelAdapter) -> None:
    """What lies elsewhere would be neither initialised nor stepped nor saved, in silence."""
    named = [*adapter.named_parameters(), *adapter.named_buffers()]
    outside = [name for name, _ in named if not name.startswith("model.")]
    if outside:
        raise ValueError(
            f"{type(adapter).__name__} holds parameters or buffers outside of its model: {shorten(outside)}. Only "
            f"those of `self.model` are initialised, trained and saved: register them there (build_model may do so)"
        )
