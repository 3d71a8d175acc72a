"""A pretrained base with what is trained beside it: next-token prediction with the base's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from adapters.default import DefaultModelAdapter
from data.cache import kept_digest
from data.huggingface.folder import read_huggingface_tokenizer
from models.memory.pretrained import model_digest

if TYPE_CHECKING:
    from configs.schema import ModelConfig
    from data.tokenizers import Tokenizer
    from models.memory.adapter import MemoryAdapterConfig

__all__ = ["PretrainedAdapter"]


class PretrainedAdapter(DefaultModelAdapter):
    """Where the base is frozen, what it holds is in no checkpoint: the digest of its files binds it to one."""

    @classmethod
    def own_tokenizer(cls, model_cfg: ModelConfig) -> Tokenizer:
        """The base's, whose start token begins documents. ValueError where the base is not here or has none."""
        cfg: Any = cast("MemoryAdapterConfig", model_cfg)
        return read_huggingface_tokenizer(cfg.folder, cfg.base.vocab_size)

    def provenance(self) -> dict[str, str]:
        folder = self.model_cfg.folder
        if self.model_cfg.freeze_base_model:
            return {**super().provenance(), "base_model": model_digest(folder, kept_digest)}
        return {**super().provenance(), "base_config": model_digest(folder, None)}

    @property
    def notes(self) -> tuple[str, ...]:
        cfg, sizes = self.model_cfg, self.model.sizes
        how = "frozen" if cfg.freeze_base_model else "trained"
        return (
            f"base {cfg.base_model_name} ({self.model.config.model_type}, {sizes.n_layers} layers of width "
            f"{sizes.d_model}, {how})",
        )
