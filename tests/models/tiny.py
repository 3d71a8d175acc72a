"""Small models with weights that hide nothing: no bias is 0, no gain is 1."""

import torch

from models import resolve
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
    model = model_class(model_class.Config(**{**SIZES, **fields})).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    if std is not None:
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def tokens_of(rows=2, length=9, seed=1, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
