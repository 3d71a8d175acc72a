"""Weights to and from the files of Hugging Face transformers, for decoders that have a counterpart there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.huggingface import Row
from models.layers.decoder import Decoder
from naming import require_fit, shapes, shorten

__all__ = ["HEAD", "HuggingFaceDecoder"]

HEAD = "lm_head.weight"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class HuggingFaceDecoder(Decoder):
    """Its parameters have the names of the foreign base model. A subclass whose layout differs overrides `hf_views`."""

    hf: Row  # of the table: the architecture there
    hf_prefix: str  # of every name but the head's, in files that have a head
    hf_buffers: tuple[str, ...]  # endings of what older files hold besides weights
    hf_transposed = False  # whether matrices lie as (in, out) there
    hf_exact: tuple[str, ...] = ()  # endings of what is rounded to no narrower numbers

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """Copies of the weights under foreign names and in foreign layout, without padding."""
        return {
            name: view.clone(memory_format=torch.contiguous_format) for name, view in self.hf_views().items()
        }

    def from_hf_state_dict(self, hf: Mapping[str, Tensor]) -> None:
        """Load such weights, also those of a base model's file (no prefix, no head). Tensors are asked for one by one.

        ValueError if a key is missing or left over, if a shape differs, if numbers are no plain floats, or if the file
        needs what this configuration lacks, such as a head of its own. Nothing is loaded then.
        """
        hf = self.hf_single(hf)
        found = {  # our name for it -> theirs
            name if name.startswith((self.hf_prefix, "lm_head.")) else self.hf_prefix + name: name
            for name in hf
            if not name.endswith(self.hf_buffers)
        }
        views = self.hf_views()
        if self.lm_head is None and (table := found.get(self.hf_prefix + self._table_name())) is not None:
            head = found.setdefault(HEAD, table)
            if head != table and not torch.equal(hf[head], hf[table]):
                raise ValueError(
                    f"this {self.hf.name} file has a head of its own: it needs tie_embeddings: false "
                    f"(tie_word_embeddings in config.json)"
                )
        what = f"this {self.hf.name} state dict"
        require_fit(what, shapes(views), {name: tuple(hf[theirs].shape) for name, theirs in found.items()})
        types = {theirs: hf[theirs].dtype for theirs in found.values()}
        if coded := [f"{name} is {dtype}" for name, dtype in types.items() if dtype not in FLOATS]:
            raise ValueError(f"{what} holds numbers in a code of its own (quantised?): {shorten(coded)}")
        with torch.no_grad():
            for name, view in views.items():
                view.copy_(hf[found[name]])
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

    def hf_single(self, hf: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights as they are given, with one tensor for each of `hf_views`."""
        return hf

    def _table_name(self) -> str:
        return next(name for name, p in self.named_parameters() if p is self.embedding_weight)
