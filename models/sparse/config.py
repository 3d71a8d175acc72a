"""The fields of native sparse attention, and those of nsa."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from configs.schema import DefaultModelConfig, Dropout, Free, ModelConfig, NonNegative, Positive, Rate

if TYPE_CHECKING:
    from configs.schema import RunConfig

__all__ = ["BRANCHES", "NSAConfig", "SparseConfig"]

FULL_SIZE = 1024  # tokens of a row from which on blocks must fill tiles
LEAST_BLOCK = 16
BRANCHES = 3  # compressed, selected, window
Biases = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=BRANCHES, max_length=BRANCHES)
]


class SparseConfig(ModelConfig):
    """What layers of native sparse attention read, of whatever model: positions are tokens, or what else these layers
    see. Defaults are the paper's blocks (Yuan et al. 2025, section 4.1)."""

    n_heads: Positive = 16
    n_kv_heads: Positive = 1
    head_dim: Positive = 64
    v_head_dim: Positive | None = None  # None = head_dim
    rope_theta: Rate = 10000.0
    sliding_window: Positive = 512  # positions that the window branch sees, the query itself included
    compress_block_size: Positive = 32  # positions of a summary
    compress_stride: Positive | None = 16  # positions between the starts of two; None = compress_block_size
    selection_block_size: Positive = 64  # positions of a block that is selected as a whole
    num_selected_blocks: Positive = 16  # of each query and group, the next two among them
    num_init_blocks: NonNegative = 1  # first blocks of a document that are always selected
    num_local_blocks: Positive = 2  # the query's own block and those before it, likewise
    compression: Literal["mlp", "mean"] = "mlp"
    compress_mlp_ratio: Positive = 2  # hidden width of that MLP / width of a head
    compress_rope: bool = False  # whether queries and keys of the compressed branch turn
    share_branch_kv: bool = False  # one projection of keys and of values for all branches
    gate_hidden_dim: NonNegative = 128  # of the gates' MLP; 0 = one matrix without a bias
    gate_bias_init: Biases = [0.0, 0.0, 0.0]

    tiny = {"n_kv_heads": 2, "head_dim": 16, "gate_hidden_dim": 8}
    examples = {"num_init_blocks": 0, "gate_bias_init": [1.0, 0.0, -1.0], "v_head_dim": 8}

    @property
    def value_dim(self) -> int:
        return self.v_head_dim or self.head_dim

    @property
    def stride(self) -> int:
        return self.compress_stride or self.compress_block_size

    @property
    def projections(self) -> int:
        """Of keys and of values."""
        return 1 if self.share_branch_kv else BRANCHES

    def block_problems(self) -> list[str]:
        found = []
        size, stride, block = self.compress_block_size, self.stride, self.selection_block_size
        if size % stride or block % stride:
            legal = [n for n in range(1, min(size, block) + 1) if size % n == block % n == 0]
            found.append(
                f"model_cfg.compress_stride ({stride}) must divide model_cfg.compress_block_size ({size}) and "
                f"model_cfg.selection_block_size ({block}); nearest: {min(legal, key=lambda n: abs(n - stride))}"
            )
        if size > block:
            found.append(
                f"model_cfg.compress_block_size ({size}) must not exceed model_cfg.selection_block_size ({block}); "
                f"nearest: {block}"
            )
        forced = self.num_init_blocks + self.num_local_blocks
        if self.num_selected_blocks < forced:
            found.append(
                f"model_cfg.num_selected_blocks ({self.num_selected_blocks}) must have room for the first "
                f"{self.num_init_blocks} (num_init_blocks) and the last {self.num_local_blocks} (num_local_blocks), "
                f"which are always selected; nearest: {forced}"
            )
        if self.compression == "mean" and stride != size:
            found.append(
                f"model_cfg.compress_stride ({stride}) must be model_cfg.compress_block_size ({size}) where "
                f"model_cfg.compression is mean; nearest: {size}, or null"
            )
        return found

    def head_problems(self) -> list[str]:
        found = []
        if self.n_heads % self.n_kv_heads:
            legal = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0]
            found.append(
                f"model_cfg.n_heads ({self.n_heads}) must be divisible by model_cfg.n_kv_heads ({self.n_kv_heads}); "
                f"nearest n_kv_heads: {min(legal, key=lambda n: abs(n - self.n_kv_heads))}"
            )
        if self.head_dim % 2:
            found.append(
                f"model_cfg.head_dim ({self.head_dim}) must be even for rotary positions; nearest: "
                f"{self.head_dim + 1}"
            )
        return found

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.compression == "mean":
            found["compress_mlp_ratio"] = "compression=mean"
        if self.gate_hidden_dim == 0:
            found["gate_bias_init"] = "gate_hidden_dim=0"
        return found


class NSAConfig(SparseConfig, DefaultModelConfig):
    """Defaults are a model of GPT-2's size."""

    n_ctx: Positive = 4096
    ffn_hidden: Positive | None = None  # None = 8/3 d_model, rounded up to multiple_of
    multiple_of: Positive = 64
    norm_eps: Rate = 1e-5
    tie_embeddings: bool = True
    initializer_range: Rate = 0.02
    dropout: Free[Dropout] = 0.0  # of embeddings and of what blocks add

    use_swiglu: ClassVar[bool] = True  # of what is vanilla's
    bias: ClassVar[bool] = False

    tiny = {
        "sliding_window": 6,
        "compress_block_size": 4,
        "compress_stride": 2,
        "selection_block_size": 4,
        "num_selected_blocks": 4,
    }
    examples = {
        "multiple_of": (128, {"ffn_hidden": None}),
        "compress_stride": 4,
        "compress_block_size": 2,
        "selection_block_size": 8,
        "num_selected_blocks": 3,
        "compression": ("mean", {"compress_stride": 4}),
    }

    @property
    def turning(self) -> int:
        """Dims of a head that turn with positions."""
        return self.head_dim

    @property
    def hidden_width(self) -> int:
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return self.multiple_of * -(-8 * self.d_model // (3 * self.multiple_of))

    def problems(self, run: RunConfig) -> list[str]:
        # Heads are as wide as head_dim says, whatever d_model / n_heads is.
        found = self.head_problems() + self.block_problems()
        block = self.selection_block_size
        if run.train_seq_len >= FULL_SIZE and block < LEAST_BLOCK:
            found.append(
                f"model_cfg.selection_block_size ({block}) must be at least {LEAST_BLOCK} where train_seq_len "
                f"({run.train_seq_len}) is {FULL_SIZE} or more: smaller blocks fill no tile. Nearest: {LEAST_BLOCK}"
            )
        return found

    def remarks(self, run: RunConfig) -> list[str]:
        selected = self.num_selected_blocks * self.selection_block_size
        if selected < run.train_seq_len:
            return []
        return [
            f"nothing is sparse in rows of {run.train_seq_len:,} tokens: model_cfg.num_selected_blocks x "
            f"model_cfg.selection_block_size ({selected:,}) are all of them"
        ]

    def unread(self) -> dict[str, str]:
        found = super().unread()
        if self.ffn_hidden is not None:
            found["multiple_of"] = f"ffn_hidden={self.ffn_hidden}"
        return found
