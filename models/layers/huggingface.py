"""Weights to and from the files of Hugging Face transformers, for decoders that have a counterpart there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.huggingface import Row
from models.layers.decoder import Decoder
from naming import require_fit, shapes

__all__ = ["HuggingFaceDecoder"]

HEAD = "lm_head.weight"


class HuggingFaceDecoder(Decoder):
    """Its parameters have the names of the foreign base model. A subclass whose layout differs overrides `hf_views`."""

    hf: Row  # of the table: the architecture there
    hf_prefix: str  # of every name but the head's, in files that have a head
    hf_buffers: tuple[str, ...]  # endings of what older files hold besides weights

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights under foreign names and in foreign layout, without padding."""
        return {
            name: view.clone(memory_format=torch.contiguous_format) for name, view in self.hf_views().items()
        }

    def from_hf_state_dict(self, hf: Mapping[str, Tensor]) -> None:
        """Load such weights, also those of a base model's file (no prefix, no head).

        ValueError if a key is missing or left over, if a shape differs, or if the file needs what this configuration
        lacks, such as a head of its own. Nothing is loaded then.
        """
        found = {
            name if name.startswith((self.hf_prefix, "lm_head.")) else self.hf_prefix + name: tensor
            for name, tensor in hf.items()
            if not name.endswith(self.hf_buffers)
        }
        table = found.get(self.hf_prefix + self._table_name())
        if self.lm_head is None and table is not None:
            head = found.setdefault(HEAD, table)
            if not torch.equal(head, table):
                raise ValueError(
                    f"this {self.hf.name} file has a head of its own: it needs tie_embeddings: false"
                )
        views = self.hf_views()
        require_fit(f"this {self.hf.name} state dict", shapes(views), shapes(found))
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(found[name])
            for padded in {self.embedding_weight, self.head_weight}:
                padded[self.vocab_size :] = 0.0

    def hf_views(self) -> dict[str, Tensor]:
        """Our tensors under foreign names, without padding, sharing memory with the parameters. ValueError if the
        architecture there cannot be what this configuration says."""
        self.hf.require_form(self.cfg)
        views = {}
        for name, parameter in self.named_parameters():
            padded = parameter is self.embedding_weight or parameter is self.head_weight
            views[name if name == HEAD else self.hf_prefix + name] = (
                parameter.detach()[: self.vocab_size] if padded else parameter.detach()
            )
        views.setdefault(HEAD, views[self.hf_prefix + self._table_name()])
        return views

    def _table_name(self) -> str:
        return next(name for name, p in self.named_parameters() if p is self.embedding_weight)
