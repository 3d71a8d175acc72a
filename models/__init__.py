"""The table of architectures. Imports no torch: a class is named by a string and imported on use.

Adding an architecture is one file here, one YAML in `configs/` and one row below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from naming import did_you_mean, module_of

__all__ = ["ARCHITECTURES", "Architecture", "alias", "resolve"]


@dataclass(frozen=True)
class Architecture:
    """`model` and `adapter` are "module:Class"; the model class carries its `Config`.

    `own_words`: keys of `model_cfg` that elsewhere are another spelling of a field (`configs.messages`), and that
    whoever knows the paper's code takes for something else; each with what to say instead. They are refused.
    `spellings`: other words for fields of `model_cfg`, of this type alone.
    `aliases`: other words for the type, each with the fields of `model_cfg` that it means besides.
    """

    model: str
    adapter: str = "adapters.default:DefaultModelAdapter"
    description: str = ""
    own_words: Mapping[str, str] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


# What descriptions of memories call the sizes of their decoder.
MEMORY_ALIASES = {
    "hidden_dim": "d_model",
    "intermediate_dim": "ffn_hidden",
    "max_seq_len": "n_ctx",
    "use_rms_norm": "use_rmsnorm",
}

ARCHITECTURES: dict[str, Architecture] = {
    "bd3lm": Architecture(
        "models.bd3lm:BD3LM",
        "adapters.diffusion.bd3lm:BD3LMAdapter",
        "block diffusion (Arriola et al. 2025)",
        own_words={"block_size": "the block is model_cfg.block_length, the context model_cfg.n_ctx"},
    ),
    "current_best_gpt": Architecture(
        "models.current_best_gpt:CurrentBestGPT",
        "adapters.current_best:CurrentBestAdapter",
        "the NanoGPT speedrun at two of its records (Jordan et al. 2024-2026)",
        aliases={"current-best": {}},
    ),
    "d3pm": Architecture(
        "models.d3pm:D3PM",
        "adapters.diffusion.d3pm:D3PMAdapter",
        "discrete diffusion (Austin et al. 2021)",
    ),
    "gpt2": Architecture("models.gpt2:GPT2", description="GPT-2 (Radford et al. 2019)"),
    "hnet": Architecture(
        "models.hnet:HNet",
        "adapters.hierarchy:HierarchyAdapter",
        "H-Net: chunks of bytes that the model cuts (Hwang et al. 2025)",
        aliases={"h-net": {}},
    ),
    "hnet_x_nsa": Architecture(
        "models.hnet_x_nsa:HNetXNSA",
        "adapters.sparse_hierarchy:SparseHierarchyAdapter",
        "H-Net with native sparse attention to its chunks (Hwang et al. 2025, Yuan et al. 2025)",
        aliases={"hnet-x-nsa": {}},
    ),
    "mamba": Architecture(
        "models.mamba:Mamba",
        description="state-space models: Mamba (Gu and Dao 2023) and Mamba-2 (Dao and Gu 2024)",
        aliases={"mamba1": {"version": 1}, "mamba2": {"version": 2}},
    ),
    "mdl": Architecture(
        "models.mdl:MDL", "adapters.diffusion.mdl:MDLAdapter", "masked diffusion (Sahoo et al. 2024)"
    ),
    "megabyte": Architecture(
        "models.megabyte:Megabyte",
        "adapters.patches:PatchAdapter",
        "patches of bytes, MEGABYTE (Yu et al. 2023)",
    ),
    "mod": Architecture(
        "models.mod:MoD",
        "adapters.mixture_of_depths:MixtureOfDepthsAdapter",
        "mixture of depths (Raposo et al. 2024)",
        aliases={"mixture-of-depths": {}},
    ),
    "memory": Architecture(
        "models.memory.transformer:MemoryTransformer",
        "adapters.memory:MemoryModelAdapter",
        "blocks that also attend to a bank of learned tokens",
        own_words={
            "use_lora": "adapters are the top-level field use_lora, the memory is model_cfg.vanilla_mode=false",
            "base_model_name": "without a base it is type=memory, beside a pretrained one type=memory_adapter",
        },
        spellings=MEMORY_ALIASES,
    ),
    "memory_adapter": Architecture(
        "models.memory.adapter:MemoryAdapter",
        "adapters.memory:PretrainedAdapter",
        "a memory or LoRA beside a pretrained model of transformers, or that trained on (Hu et al. 2021)",
        spellings={"hidden_dim": "d_model", "use_rms_norm": "use_rmsnorm"},
        aliases={"memory-adapter": {}},
    ),
    "moe": Architecture(
        "models.moe:MoE",
        "adapters.experts:ExpertsAdapter",
        "mixture of experts: gates of Mixtral (Jiang et al. 2024) and DeepSeek-V3 (2024)",
        aliases={"mixture-of-experts": {}},
    ),
    "mtm": Architecture(
        "models.mtm:MTM",
        "adapters.multi_token:MultiTokenAdapter",
        "sequential multi-token modules (DeepSeek-V3 2024)",
    ),
    "mtp": Architecture(
        "models.mtp:MTP",
        "adapters.multi_token:MultiTokenAdapter",
        "parallel multi-token prediction (Gloeckle et al. 2024)",
        aliases={"base-mtp": {}, "deepseek-mtp": {"use_deepseek_mtp": True}},
    ),
    "ngpt": Architecture(
        "models.ngpt:NGPT", description="normalised transformer, nGPT (Loshchilov et al. 2024)"
    ),
    "nsa": Architecture(
        "models.nsa:NSA",
        "adapters.sparse:SparseAdapter",
        "native sparse attention (Yuan et al. 2025)",
    ),
    "rd": Architecture(
        "models.rd:RD",
        "adapters.recurrent_depth:RecurrentDepthAdapter",
        "recurrent depth (Geiping et al. 2025)",
        aliases={"recurrent-depth": {}},
    ),
    "sedd": Architecture(
        "models.sedd:SEDD",
        "adapters.diffusion.sedd:SEDDAdapter",
        "score entropy diffusion (Lou et al. 2024)",
    ),
    "vanilla": Architecture(
        "models.vanilla:Vanilla", description="Llama-style decoder (Touvron et al. 2023): the control"
    ),
}


def alias(type_: object) -> tuple[str, Mapping[str, Any]] | None:
    """The type that another word for it means, and the fields of `model_cfg` that go with that word."""
    return next(
        (
            (name, row.aliases[word])
            for name, row in ARCHITECTURES.items()
            for word in row.aliases
            if word == type_
        ),
        None,
    )


def resolve(type_: str) -> Architecture:
    """The row of a registered type, or a row for "package.module:Class", which needs no registration."""
    if type_ in ARCHITECTURES:
        return ARCHITECTURES[type_]
    if ":" in type_:
        module_of(type_)
        return Architecture(type_)
    raise ValueError(
        f"unknown type '{type_}'.{did_you_mean(type_, ARCHITECTURES)} "
        f"Registered: {', '.join(sorted(ARCHITECTURES))}; or a class as package.module:Class"
    )
