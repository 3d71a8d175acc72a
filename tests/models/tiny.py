"""Small models with weights that hide nothing: no bias is 0, no gain is 1."""

import torch
from torch import nn

from models import resolve
from models.layers.cache import KVCache, StateCache
from naming import load

VOCABULARY = 11
SIZES = {"vocab_size": VOCABULARY, "n_ctx": 64, "d_model": 16, "n_heads": 4, "n_layers": 2}
# Every switch of the two architectures, each in a combination that a reference exists for.
VARIANTS = [
    ("gpt2", {}),
    ("gpt2", {"bias": False, "tie_embeddings": False, "pad_vocab": False}),
    ("vanilla", {}),
    ("vanilla", {"n_kv_heads": 2, "tie_embeddings": False, "sliding_window": 5}),
    ("vanilla", {"n_kv_heads": 1, "qk_norm": True, "attn_softcap": 2.0, "rope_theta": 100.0}),
    ("vanilla", {"use_rope": False, "use_rmsnorm": False, "use_swiglu": False, "bias": True}),
]
VARIANT_NAMES = [type_ + "".join(f"-{key}" for key in kw) for type_, kw in VARIANTS]


def build(type_, dtype=torch.float64, seed=0, std=0.3, **fields):
    """A model in eval mode with all parameters N(0, std^2); `std` None: its own initialisation."""
    model_class = load(resolve(type_).model)
    sizes = {name: size for name, size in SIZES.items() if name in model_class.Config.model_fields}
    model = model_class(model_class.Config(**{**sizes, **fields})).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    if std is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def tokens_of(rows=2, length=9, seed=1, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


class Recurrent(nn.Module):
    """h_t = tanh(A h_{t-1} + x_t), then (or not) attention over all h so far. It looks back without limit."""

    max_context = None

    def __init__(self, attention, width=4):
        super().__init__()
        self.attention, self.width = attention, width
        source = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, width, generator=source, dtype=torch.float64))
        self.step = nn.Parameter(torch.randn(width, width, generator=source, dtype=torch.float64))

    def init_cache(self, rows):
        parts = {"attention": KVCache(1, rows)} if self.attention else {}
        return StateCache(state=torch.zeros(rows, self.width, dtype=torch.float64), **parts)

    def logits(self, hidden):
        return hidden @ self.table.mT

    @torch.no_grad()
    def forward(self, tokens, cache=None):
        cache = self.init_cache(len(tokens)) if cache is None else cache
        states = []
        for x in self.table[tokens].unbind(1):
            cache["state"] = torch.tanh(cache["state"] @ self.step + x)
            states.append(cache["state"])
        hidden = torch.stack(states, 1)  # (B, T, D)
        if self.attention:
            one_head = hidden[:, None]  # (B, 1, T, D)
            keys, values = cache["attention"].append(0, one_head, one_head)
            ahead = torch.arange(keys.shape[2]) > cache.length + torch.arange(tokens.shape[1])[:, None]
            scores = (one_head @ keys.mT).masked_fill(ahead, -torch.inf)
            hidden = (scores.softmax(-1) @ values)[:, 0]
            cache["attention"].advance(tokens.shape[1])
        cache.advance(tokens.shape[1])
        return hidden
