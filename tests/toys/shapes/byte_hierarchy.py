"""A wide network reads patches of bytes, a narrow one the bytes of each patch: every byte is predicted from the earlier
patches of its document, and from the bytes before it in its own patch.

Shapes: B rows, T bytes, P bytes of a patch, N patches, D width of the wide network, d of the narrow one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import DefaultModelConfig, Positive, divisible
from kernels.attention import Visible, attention_call, plan_attention, training_facts
from kernels.choose import UsesKernels
from kernels.precision import compute_dtype
from models.layers.decoder import Decoder, padded_vocabulary
from models.layers.flops import Flops, matmul_flops
from models.layers.init import INIT_STD, normal_
from models.layers.norms import RMSNorm
from models.layers.roles import Rule
from models.layers.rotary import rotary_tables
from models.vanilla import Block, VanillaConfig, block_flops


class Config(DefaultModelConfig):
    unit = "byte"

    patch: Positive = 4
    local_width: Positive | None = None  # None = d_model / 2
    local_layers: Positive = 1

    def problems(self, run) -> list[str]:
        return super().problems(run) + divisible("local_width", self.narrow.d_model, "n_heads", self.n_heads)

    @property
    def wide(self) -> VanillaConfig:
        return VanillaConfig(d_model=self.d_model, n_heads=self.n_heads, n_layers=self.n_layers)

    @property
    def narrow(self) -> VanillaConfig:
        width = self.local_width or self.d_model // 2
        return VanillaConfig(d_model=width, n_heads=self.n_heads, n_layers=self.local_layers)


class Stack(UsesKernels):
    """Blocks of the control."""

    def __init__(self, cfg: VanillaConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.heads = {"heads": (cfg.n_heads, cfg.n_heads), "width": cfg.head_width}
        self.layers = nn.ModuleList(Block(cfg, layer) for layer in range(cfg.n_layers))

    def forward(self, x: Tensor, doc_ids: Tensor) -> Tensor:
        """x (B, T, D), doc_ids (B, T)."""
        length = x.shape[1]
        visible = Visible.causally(doc_ids, doc_ids=doc_ids)
        plan = plan_attention(visible, dtype=compute_dtype(x), kernels=self.kernels, **self.heads)
        index = torch.arange(length, device=x.device)
        rotation = rotary_tables(index, self.cfg.head_width, self.cfg.rope_theta, x.dtype)
        for block in self.layers:
            x = block(x, plan, rotation)
        return x

    def kernel_calls(self, seq_len: int):
        return {"attention": attention_call(training_facts(seq_len, offsets=False), **self.heads)}


class ByteHierarchy(Decoder):
    Config = Config
    init_cache = None  # generation reads the whole window for every byte

    def __init__(self, cfg: Config) -> None:
        super().__init__(cfg)
        narrow = cfg.narrow.d_model
        self.embed = nn.Embedding(padded_vocabulary(self.vocab_size), narrow)
        self.join = nn.Linear(cfg.patch * narrow, cfg.d_model, bias=False)
        self.wide, self.narrow = Stack(cfg.wide), Stack(cfg.narrow)
        self.tell = nn.Linear(cfg.d_model, narrow, bias=False)
        self.norm = RMSNorm(narrow, 1e-5)
        self.lm_head = nn.Linear(narrow, padded_vocabulary(self.vocab_size), bias=False)

    def forward(self, tokens: Tensor, doc_ids: Tensor | None = None, cache: None = None) -> Tensor:
        length, patch = tokens.shape[1], self.cfg.patch
        doc_ids = torch.zeros_like(tokens) if doc_ids is None else doc_ids
        fill = (0, -length % patch)  # behind everything, so that nothing sees it
        x = self.embed(F.pad(tokens, fill)).unflatten(1, (-1, patch))  # (B, N, P, d)
        docs = F.pad(doc_ids, fill, value=-1).unflatten(1, (-1, patch))  # (B, N, P)
        of_patch = docs[:, :, -1]  # (B, N): the document of its last byte; a patch leaves out other bytes
        patches = self.join((x * (docs == of_patch[..., None])[..., None]).flatten(2))  # (B, N, D)
        told = self.tell(self.wide(patches, of_patch))[:, :-1]  # (B, N-1, d): each patch to the next,
        heard = docs[:, 1:] == of_patch[:, :-1, None]  # (B, N-1, P): to its own document's bytes
        x = x + F.pad(told[:, :, None] * heard[..., None], (0, 0, 0, 0, 1, 0))
        x = self.narrow(x.flatten(0, 1), docs.flatten(0, 1)).view(len(tokens), -1, x.shape[-1])  # (B, N P, d)
        return self.norm(x[:, :length])

    def init_weights(self, generator: torch.Generator) -> None:
        for module in self.modules():
            if isinstance(module, RMSNorm):
                module.init_weights()
            elif isinstance(module, nn.Linear):
                normal_(module.weight, INIT_STD, generator)
        normal_(
            self.embed.weight, 1.0, generator
        )  # else what is told, at first noise, drowns the byte itself

    def blocks(self) -> list[str]:
        c = self.cfg
        return [f"wide.layers.{i}" for i in range(c.n_layers)] + [
            f"narrow.layers.{i}" for i in range(c.local_layers)
        ]

    def param_roles(self) -> list[Rule]:
        """Rates scale with what a matrix reads."""
        narrow = self.cfg.narrow.d_model
        return [
            Rule(r"embed\.weight", "embedding"),
            Rule(r"lm_head\.weight", "head"),
            Rule(r".*norm\.weight", "scalar"),
            Rule(r"join\.weight", "matrix", width=self.cfg.patch * narrow),
            Rule(r"narrow\..*", "matrix", width=narrow),
            Rule(r"wide\..*|tell\.weight", "matrix"),
        ]

    def flops(self, seq_len: int) -> Flops:
        c = self.cfg
        wide = block_flops(c.wide, max(1, seq_len // c.patch)) * c.n_layers
        between = matmul_flops(self.join.weight.numel() + self.tell.weight.numel())
        narrow = block_flops(c.narrow, c.patch) * c.local_layers
        head = matmul_flops(self.vocab_size * c.narrow.d_model)
        return (wide + between) * (1 / c.patch) + narrow + head

    def passes(self, path: str) -> float:
        """The wide network acts once on the bytes of a patch."""
        return 1.0 if path.startswith("narrow.") else 1 / self.cfg.patch
