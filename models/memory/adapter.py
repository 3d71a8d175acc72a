"""A pretrained causal language model as the base of what is trained beside it, a memory that its layers read or LoRA or
both, or trained on itself.

transformers computes the base; documents of a row, positions, cache and head are given to it here. Memory layers are
put into its layers (`models/memory/insertion.py`).

Shapes: B rows, T tokens, S tokens seen (past ones first), D width, V vocabulary, H heads, G heads of keys and values,
h head width.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.match import SizeDials, multiples
from configs.schema import Execution, Free, OpenFraction, Positive, Rate
from models.layers.decoder import Hidden, document_positions, stacked
from models.layers.flops import Flops, decoder_flops, matmul_flops, mean_keys
from models.layers.init import INIT_STD
from models.layers.lora import is_adapted, is_transposed
from models.layers.roles import Rule
from models.memory.bank import new_bank
from models.memory.block import MemoryLayer
from models.memory.config import MemoryConfig, MemoryFields
from models.memory.insertion import Insertion, Pass, required_between
from models.memory.pretrained import (
    Sizes,
    base_folder,
    lacking,
    read_config,
    require_known,
    sizes_of,
)
from models.memory.reader import ReadsMemory
from models.memory.router import MemoryCache
from naming import shorten

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["BaseCache", "MemoryAdapter", "MemoryAdapterConfig"]

# Where decoders of transformers keep their layers, in the model without its head.
LAYERS = ("layers", "decoder.layers", "h")
# What LoRA adapts of the layers by itself: the first of these that is there.
TARGETS = (("q_proj", "v_proj"), ("query_key_value",), ("c_attn",), ("qkv_proj",))
PROBE = 4  # tokens of a document that a loaded base is tried with
SAME = 1e-3  # of the largest state: rounding of products of other shapes, and nothing else


# Sizes of a base that is not here, where none are given: what does not depend on them can be checked.
UNKNOWN = {"d_model": 2**20, "n_heads": 1, "n_layers": 10_000}
# Fields of sizes, which are the base's.
SIZES = ("vocab_size", "d_model", "n_heads", "n_kv_heads", "n_layers", "ffn_hidden")


class MemoryAdapterConfig(MemoryFields):
    """All sizes are the base's; those that are given must be the same."""

    vanilla_mode: bool = True  # no memory: adapters alone

    base_model_name: Free[str | None] = None  # it may move, what it holds may not change
    base_model_revision: Free[str | None] = None
    freeze_base_model: bool = True
    vocab_size: Positive | None = None
    d_model: Positive | None = None
    n_heads: Positive | None = None
    n_kv_heads: Positive | None = None
    n_layers: Positive | None = None
    ffn_hidden: Positive | None = None
    n_ctx: Free[Positive | None] = None  # the longest text; None = the base's positions
    use_flash_attention: Execution[bool] = True  # False: attention in plain products
    norm_eps: Rate = 1e-6  # of norms in front of the memory
    use_rmsnorm: bool = True  # False: LayerNorm there
    dropout: Free[OpenFraction] = 0.0  # of what the memory adds
    initializer_range: Rate = INIT_STD  # of the memory's matrices that do not write to the residual stream

    elsewhere = frozenset({*SIZES, "n_ctx", "dropout"})
    tiny: ClassVar[dict[str, Any]] = {"freeze_base_model": False, "vanilla_mode": False}
    examples: ClassVar[dict[str, Any]] = {"norm_eps": 0.1}
    rare: ClassVar[dict[str, str]] = {
        **dict.fromkeys(SIZES, "the base's size alone is legal"),
        "base_model_revision": "a folder has none",
        "n_ctx": "it bounds how long texts may be, and changes none",
        "freeze_base_model": "without LoRA nothing would be trained",
    }

    def lacking(self) -> str:
        return lacking(self.base_model_name, self.base_model_revision)

    @property
    def folder(self) -> Path:
        """Where the base lies. ValueError where it is not here."""
        if why := self.lacking():
            raise ValueError(why)
        found = base_folder(self.base_model_name or "", self.base_model_revision)
        assert found is not None
        return found

    @property
    def base(self) -> Sizes:
        """Of the base. ValueError as above, and for what is no base."""
        config = read_config(self.folder)
        require_known(config, self.folder)
        return sizes_of(config)

    def size_dials(self) -> SizeDials:
        """The base is as large as it is: the bank of a memory beside it."""
        if not self.memory.memory_layers or self.use_chapters:
            return SizeDials()
        return SizeDials(fine=(multiples("num_memory_tokens", self.num_memory_tokens, 8),))

    def added(self) -> str:
        return "a memory (model_cfg.vanilla_mode=false)" if self.memory.memory_layers else ""

    def completed(self) -> Self:
        base = self.base
        sizes = {name: getattr(base, name) for name in SIZES} | {"n_ctx": self.n_ctx or base.positions}
        at = self.folder if Path(self.base_model_name or "").exists() else self.base_model_name
        return self.model_copy(update={**sizes, "base_model_name": str(at)})

    @property
    def memory(self) -> MemoryConfig:
        """That of a memory in our own blocks of the base's sizes."""
        sizes: dict[str, Any] = {name: getattr(self, name) or unknown for name, unknown in UNKNOWN.items()}
        if not self.lacking():
            base = self.base
            sizes = {name: getattr(base, name) for name in SIZES if name != "vocab_size"}
            sizes |= {"n_ctx": base.positions}
        own = {name: getattr(self, name) for name in MemoryFields.model_fields}
        norms: dict[str, Any] = {"norm_eps": self.norm_eps, "use_rmsnorm": self.use_rmsnorm}
        drawn: dict[str, Any] = {"dropout": self.dropout, "initializer_range": self.initializer_range}
        return MemoryConfig(**own, **sizes, **norms, **drawn)

    def problems(self, run: RunConfig) -> list[str]:
        found = super().problems(run)
        began = run.init_from_checkpoint is not None or run.resume != "none"
        memoryless = self.vanilla_mode or self.memory_layer_placement == "none"
        if self.freeze_base_model and memoryless and not run.use_lora and not run.eval_only:
            found.append(
                "model_cfg.freeze_base_model leaves nothing to be trained. Set use_lora=true, "
                "model_cfg.vanilla_mode=false (a memory), or model_cfg.freeze_base_model=false"
            )
        if not self.freeze_base_model and run.use_lora and not began:
            found.append(
                "use_lora leaves the base as it is, and model_cfg.freeze_base_model is false. Leave out one of the two"
            )
        if self.base_model_revision and self.base_model_name and Path(self.base_model_name).is_dir():
            found.append(
                f"model_cfg.base_model_revision ({self.base_model_revision}) is for names on Hugging Face, and "
                f"model_cfg.base_model_name is a folder. Leave it out"
            )
        found += within(run, self.n_ctx, f"model_cfg.n_ctx ({self.n_ctx})") if self.n_ctx else []
        if not self.lacking() and (unlike := self._unlike_the_base(run)):
            return found + unlike
        memory = self.memory
        own_heads = memory.memory_num_heads is not None
        if memory.memory_layers and not (memory.reduced or own_heads) and memory.d_model % memory.n_heads:
            found.append(
                f"model_cfg.vanilla_mode=false: a memory has the base's {memory.n_heads} heads, which do not divide "
                f"its width {memory.d_model}. Nearest: low_rank_mode=reduced_dim with use_low_rank_memory=true"
            )
        return found + memory.memory_problems()

    def _unlike_the_base(self, run: RunConfig) -> list[str]:
        try:
            base = self.base
        except ValueError as error:
            return [str(error)]
        found = [
            f"model_cfg.{name} ({given}) must be that of {self.base_model_name}, {getattr(base, name)}: leave it out"
            for name in SIZES
            if (given := getattr(self, name)) not in (None, getattr(base, name))
        ]
        positions = f"the {base.positions} positions of {self.base_model_name}"
        if self.n_ctx and self.n_ctx > base.positions:
            found.append(
                f"model_cfg.n_ctx ({self.n_ctx}) must not exceed {positions}. Nearest: model_cfg.n_ctx={base.positions}"
            )
        return found + within(run, base.positions, positions)

    def remarks(self, run: RunConfig) -> list[str]:
        why, found = self.lacking(), super().remarks(run)
        if why:
            found.append(f"{why}. What depends on the base was not checked")
        if self.freeze_base_model and not self.vanilla_mode and not self.wo_init_zero:
            found.append(
                "model_cfg.wo_init_zero=false disturbs a base that stays as it is (model_cfg.freeze_base_model)"
            )
        return found + self.memory.memory_remarks(run)

    def unread(self) -> dict[str, str]:
        memory = self.memory
        found = super().unread() | {
            n: why for n, why in memory.unread().items() if n in MemoryFields.model_fields
        }
        if why := memory.without:
            found |= dict.fromkeys(("norm_eps", "use_rmsnorm", "dropout", "initializer_range"), why)
        return found


def within(run: RunConfig, limit: int, of: str) -> list[str]:
    """Rows of a run that are longer than `limit`, which is that `of` something."""
    return [
        f"{name} ({length}) must not exceed {of}. Nearest: {name}={limit}"
        for name in ("train_seq_len", "val_seq_len")
        if (length := getattr(run, name)) is not None and length > limit
    ]


class BaseCache(MemoryCache):
    """Keys and values of the base's layers, as transformers asks for them, and what a memory keeps."""

    is_compileable = False

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *more: Any, **others: Any
    ) -> tuple[Tensor, Tensor]:
        return self.append(layer, keys, values)

    def get_seq_length(self, layer: int = 0) -> int:
        return self.length


class MemoryAdapter(ReadsMemory):
    """`forward` takes `valid` (B, T) bool besides, which tokens are text, where chapters are chosen, and `openings`,
    (B, T) or (B, 1) int64, how many tokens are given at the beginning of each document: see `Pooling`."""

    Config = MemoryAdapterConfig

    def __init__(self, cfg: MemoryAdapterConfig) -> None:
        super().__init__()
        self.cfg, self.sizes, self.memory = cfg, cfg.base, cfg.memory
        self.vocab_size = self.sizes.vocab_size
        self.config = read_config(cfg.folder)
        self.banks = nn.ModuleList(new_bank(self.memory) for _ in {*self.memory.bank_of.values()})
        layers = {str(layer): MemoryLayer(self.memory, layer) for layer in self.memory.memory_layers}
        self.memory_layers = nn.ModuleDict(layers)
        self.now = Pass()
        self._take(_of_config(self.config, cfg))

    def _take(self, whole: Any) -> None:
        """Keep the parts of a model of transformers: the layers with their norm, and a head that is not tied."""
        self.base = whole.base_model
        self.layers_path = self._layers_path()
        head = whole.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise ValueError(
                f"model_cfg.base_model_name: the head of a {self.config.model_type} has biases, which is not known here"
            )
        self.class_name, self.base_prefix = type(whole).__name__, f"{whole.base_model_prefix}."
        self.head_name = next(name for name, module in whole.named_modules() if module is head) + ".weight"
        tied = head.weight is self.embedding_weight
        self.lm_head = None if tied else head
        words = inspect.signature(self.base.forward).parameters
        self.cache_word = "cache" if "cache" in words else "past_key_values"  # before transformers 5.20
        for memory in self.memories:
            Insertion(self.layers[memory.layer], memory, self.now)

    @property
    def memory_cfg(self) -> MemoryConfig:
        return self.memory

    @property
    def memories(self) -> list[MemoryLayer]:
        return [layer for layer in self.memory_layers.values() if isinstance(layer, MemoryLayer)]

    def _layers_path(self) -> str:
        for path in LAYERS:
            try:
                found = self.base.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(found, nn.ModuleList):
                return path
        children = [name for name, _ in self.base.named_children()]
        raise ValueError(
            f"model_cfg.base_model_name: a {self.config.model_type} has none of the lists of layers "
            f"{', '.join(LAYERS)}. There are: {shorten(children)}"
        )

    @property
    def layers(self) -> nn.ModuleList:
        """The base's, in their order."""
        found = self.base.get_submodule(self.layers_path)
        assert isinstance(found, nn.ModuleList)
        return found

    def forward(
        self,
        tokens: Tensor,
        doc_ids: Tensor | None = None,
        cache: BaseCache | None = None,
        valid: Tensor | None = None,
        openings: Tensor | None = None,
    ) -> Tensor | Hidden:
        """tokens (B, T) int64 -> hidden (B, T, D) after the base's last norm, with what routers told beside it.

        doc_ids (B, T): attention stays within equal ids, and positions restart at each change. None: one document per
        row. With a cache the tokens continue what it holds. ValueError beyond the base's positions.
        """
        if not self.banks:
            return self._of_base(tokens, doc_ids, cache)
        past = 0 if cache is None else cache.length
        reading = self.reading(tokens, past, doc_ids, valid, openings)
        with self.now.of(reading, cache) as told:
            x = self._of_base(tokens, doc_ids, cache)
        return Hidden(x, stacked(told)) if told else x

    def _of_base(
        self, tokens: Tensor, doc_ids: Tensor | None = None, cache: BaseCache | None = None
    ) -> Tensor:
        if doc_ids is not None and cache is not None:
            raise ValueError("doc_ids cannot be combined with a cache: a cached row is one document")
        past = 0 if cache is None else cache.length
        length = past + tokens.shape[1]
        if length > self.max_context:
            raise ValueError(f"input of {length} tokens exceeds the {self.max_context} positions of the base")
        if doc_ids is not None:
            positions = document_positions(doc_ids)  # (B, T)
        else:
            positions = torch.arange(past, length, device=tokens.device).expand(tokens.shape)
        # transformers makes a mask of its own only where it is given none: one of four dims is taken as it is.
        given: dict[str, Any] = {
            "attention_mask": self._mask(tokens, past, doc_ids),
            "position_ids": positions,
        }
        if cache is not None:
            given[self.cache_word] = cache
        output = self.base(input_ids=tokens, use_cache=cache is not None, return_dict=True, **given)
        if cache is not None:
            cache.advance(tokens.shape[1])
        return output.last_hidden_state

    def _mask(self, tokens: Tensor, past: int, doc_ids: Tensor | None) -> Tensor:
        """(B or 1, 1, T, S): what each token sees; bool, or what plain products add to scores."""
        t = tokens.shape[1]
        seen = torch.ones(t, past + t, dtype=torch.bool, device=tokens.device).tril(past)[None]  # (1, T, S)
        if doc_ids is not None:
            seen = seen & (doc_ids[:, :, None] == doc_ids[:, None, :])  # (B, T, T)
        seen = seen[:, None]
        if self.cfg.use_flash_attention:
            return seen
        weight = self.embedding_weight
        dtype = torch.get_autocast_dtype(weight.device.type) if _in_autocast(weight) else weight.dtype
        hidden = torch.zeros(seen.shape, dtype=dtype, device=tokens.device)
        return hidden.masked_fill(~seen, torch.finfo(dtype).min)

    # -- head ----------------------------------------------------------------------------------------------------

    @property
    def embedding_weight(self) -> Tensor:
        return self.base.get_input_embeddings().weight

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.embedding_weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)"""
        return F.linear(hidden, self.head_weight.to(hidden.dtype))

    @property
    def max_context(self) -> int:
        return self.cfg.n_ctx or self.sizes.positions

    def init_cache(self, rows: int) -> BaseCache | None:
        """None where decisions see the whole text: every token changes those of all."""
        return None if self.sees_all else BaseCache(self.sizes.n_layers, rows)

    # -- weights -------------------------------------------------------------------------------------------------

    def init_weights(self, generator: torch.Generator) -> None:
        """Load the base, as fp32 on the CPU, and draw the memory. ValueError where files do not hold a base, or it is
        none after all."""
        self.init_memory(generator)
        whole = _of_files(self.cfg)
        self._take(whole)
        self.train(self.training)
        with torch.no_grad():
            self._try(whole)

    def _try(self, whole: Any) -> None:
        """Refuse what computes more than its layers, its norm and a product behind them, what lets a document of a row
        see the one before, and layers that have no place for the memory."""
        training = self.training
        self.eval(), whole.eval()
        tokens = torch.arange(2 * PROBE)[None] % self.vocab_size
        packed = self._of_base(tokens, torch.arange(2 * PROBE)[None] // PROBE)[:, PROBE:]
        with ExitStack() as places:
            for memory in self.memories:
                if memory.mlp is None:
                    places.enter_context(required_between(self.layers[memory.layer]))
            alone = self._of_base(tokens[:, PROBE:])
        theirs = whole(input_ids=tokens[:, PROBE:], use_cache=False).logits
        self.train(training)
        for one, other, what in (
            (packed, alone, "lets documents of one row see each other"),
            (self.logits(alone), theirs, "does more than its layers and its head say"),
        ):
            if (one - other).abs().max() > SAME * other.abs().max():
                raise ValueError(
                    f"model_cfg.base_model_name: a {self.config.model_type} {what}, and cannot be a base here"
                )

    def external(self) -> list[str]:
        if not self.cfg.freeze_base_model:
            return []
        return ["base", *([] if self.lm_head is None else ["lm_head"])]

    def train(self, mode: bool = True) -> Self:
        """A frozen base draws no dropout. Its blocks say that they train, as activations are recomputed by that, and
        so do matrices with adapters, whose dropout it is."""
        super().train(mode)
        if self.cfg.freeze_base_model:
            blocks = set(self.layers)
            for module in self.base.modules():
                module.training = mode and (module in blocks or is_adapted(module))
        return self

    def hf_names(self) -> dict[str, str]:
        """Our name of each tensor -> its name in files of transformers."""
        names = {
            f"base.{name}": self.base_prefix + name for name in self.base.state_dict() if "lora_" not in name
        }
        return names if self.lm_head is None else {**names, "lm_head.weight": self.head_name}

    def hf_config(self) -> dict[str, Any]:
        """Its config.json."""
        return {**self.config.to_dict(), "architectures": [self.class_name], "dtype": "float32"}

    def kernel_calls(self, seq_len: int) -> dict[str, dict[str, Any]]:
        """Of the memory: what the base computes is no matter of ours."""
        if not self.banks or self.memory.use_chapters:
            return {}
        return {"attention": self.memory_attention_call(seq_len)}

    # -- what the trainer must know ------------------------------------------------------------------------------

    def blocks(self) -> list[str]:
        return [f"base.{self.layers_path}.{layer}" for layer in range(len(self.layers))]

    @property
    def hf_transposed(self) -> bool:
        return any(is_transposed(module) for module in self.layers.modules())

    @property
    def lora_targets(self) -> tuple[str, ...]:
        leaves = {name.rpartition(".")[2] for name, _ in self.layers.named_modules()}
        return next((names for names in TARGETS if leaves.issuperset(names)), ())

    def added(self, name: str) -> bool:
        return name.startswith(("memory_layers.", "banks."))

    def param_roles(self) -> list[Rule]:
        tables = {f"base.{n}.weight" for n, m in self.base.named_modules() if isinstance(m, nn.Embedding)}
        matrices = [n for n, p in self.named_parameters() if p.ndim > 1 and n not in tables]
        return [
            Rule(r"banks\..*", "memory_bank"),
            Rule(r"memory_layers\..*", "memory"),
            Rule(_one_of(tables), "embedding"),
            Rule(r"lm_head\.weight", "head"),
            Rule(_one_of(matrices), "matrix"),
            Rule(r".*", "scalar"),
        ]

    def flops(self, seq_len: int) -> Flops:
        """Every product of the base's layers, what is masked of attention included in `reference`, and what each token
        costs in the memory."""
        products = sum(
            module._parameters["weight"].numel()  # type: ignore[union-attr]
            for module in self.base.modules()
            if isinstance(module, nn.Linear) or is_transposed(module)
        )
        layers, heads = self.sizes.n_layers, self.sizes.n_heads * self.sizes.head_width
        keys = [mean_keys(seq_len)] * layers
        base = decoder_flops(products, keys, heads, [seq_len] * layers) + matmul_flops(
            self.head_weight.numel()
        )
        return sum((self.memory_flops(layer) for layer in self.memories), base)


def _one_of(names: Any) -> str:
    return "|".join(map(re.escape, sorted(names))) or r"(?!)"


def _in_autocast(tensor: Tensor) -> bool:
    return torch.is_autocast_enabled(tensor.device.type)


def _attention(cfg: MemoryAdapterConfig) -> str:
    return "sdpa" if cfg.use_flash_attention else "eager"


def _of_config(config: Any, cfg: MemoryAdapterConfig) -> Any:
    from transformers import AutoModelForCausalLM

    how = {"attn_implementation": _attention(cfg), "dtype": torch.float32}
    try:
        return AutoModelForCausalLM.from_config(config, **how)
    except Exception as error:  # whatever it raises of what a config.json may say
        raise ValueError(_cannot(cfg.folder, error)) from None


def _cannot(folder: Path, error: Exception) -> str:
    said = " ".join(str(error).split())
    eager = ". Add model_cfg.use_flash_attention=false" if "scaled_dot_product_attention" in said else ""
    return (
        f"model_cfg.base_model_name: transformers cannot load {folder}: {type(error).__name__}: {said}{eager}"
    )


def _of_files(cfg: MemoryAdapterConfig) -> Any:
    """The model that a folder holds. ValueError where its weights are not in safetensors, or not all there."""
    from transformers import AutoModelForCausalLM

    folder = cfg.folder
    try:
        with _silence():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                attn_implementation=_attention(cfg),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # whatever it raises of damaged files
        raise ValueError(_cannot(folder, error)) from None
    whole, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"model_cfg.base_model_name: {folder} lacks {shorten(missing)}")
    return whole


@contextmanager
def _silence() -> Iterator[None]:
    """No bars and no advice of transformers, which are as they were afterwards."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
