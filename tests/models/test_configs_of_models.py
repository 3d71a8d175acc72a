"""Every field of a Config changes something; wrong values are refused with the nearest right ones."""

import pytest
import torch
from pydantic import ValidationError

from configs.schema import RunConfig
from models import resolve
from naming import load
from tests.models.tiny import SIZES, VOCABULARY, build, tokens_of

CHANGES = {
    "gpt2": {
        "vocab_size": VOCABULARY - 1,
        "n_ctx": 32,
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 1,
        "ffn_hidden": 24,
        "dropout": 0.3,
        "bias": False,
        "pad_vocab": False,
        "wpe_init_std": 0.5,
        "tie_embeddings": False,
    },
    "vanilla": {
        "vocab_size": VOCABULARY - 1,
        "n_ctx": 32,
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 1,
        "n_kv_heads": 2,
        "ffn_hidden": 24,
        "multiple_of": 48,
        "rope_theta": 10.0,
        "norm_eps": 0.1,
        "tie_embeddings": False,
        "qk_norm": True,
        "attn_softcap": 0.01,
        "sliding_window": 2,
        "dropout": 0.3,
        "bias": True,
        "use_rope": False,
        "use_rmsnorm": False,
        "use_swiglu": False,
    },
}
CASES = [(type_, field) for type_, changes in CHANGES.items() for field in changes]


def fingerprint(type_, **fields):
    """Shapes of the parameters, the limit of context, and the output in training at initialisation."""
    torch.manual_seed(0)
    model = build(type_, std=None, **fields).train()
    with torch.no_grad():
        logits = model.logits(model(tokens_of(length=20, vocabulary=VOCABULARY - 1)))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return shapes, model.max_context, logits


@pytest.mark.parametrize("type_", CHANGES)
def test_no_field_is_forgotten_here(type_):
    assert set(CHANGES[type_]) == set(load(resolve(type_).model).Config.model_fields)


@pytest.mark.parametrize(("type_", "field"), CASES)
def test_the_field_changes_something(type_, field):
    shapes, context, logits = fingerprint(type_)
    new_shapes, new_context, new_logits = fingerprint(type_, **{field: CHANGES[type_][field]})
    same = (
        shapes == new_shapes
        and context == new_context
        and logits.shape == new_logits.shape
        and (logits - new_logits).abs().max() < 1e-6
    )
    assert not same


@pytest.mark.parametrize("type_", CHANGES)
def test_dropout_acts_in_training_only(type_):
    model, tokens = build(type_, dropout=0.3), tokens_of(length=20)
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), build(type_)(tokens))
    model.train()
    torch.manual_seed(0)
    first = model(tokens)
    torch.manual_seed(0)
    assert torch.equal(model(tokens), first)
    assert not torch.equal(model(tokens), first)


@pytest.mark.parametrize("type_", CHANGES)
def test_full_dropout_runs(type_):
    model = build(type_, dropout=1.0).train()
    hidden = model(tokens_of())
    hidden.sum().backward()
    assert hidden.isfinite().all()


@pytest.mark.parametrize(
    ("type_", "field", "value"),
    [
        ("gpt2", "dropout", 1.5),
        ("gpt2", "dropout", -0.1),
        ("gpt2", "n_layers", 0),
        ("gpt2", "n_layers", 2.0),
        ("gpt2", "bias", 1),
        ("gpt2", "wpe_init_std", 0.0),
        ("gpt2", "n_kv_heads", 2),
        ("vanilla", "attn_softcap", 0.0),
        ("vanilla", "sliding_window", 0),
        ("vanilla", "norm_eps", 0.0),
        ("vanilla", "rope_theta", -1.0),
        ("vanilla", "n_kv_heads", 0),
        ("vanilla", "multiple_of", 0),
    ],
)
def test_values_out_of_range_are_refused(type_, field, value):
    with pytest.raises(ValidationError, match=field):
        load(resolve(type_).model).Config(**{**SIZES, field: value})


def problems(type_, run=None, **fields):
    config = load(resolve(type_).model).Config(**{**SIZES, **fields})
    return config.problems(RunConfig(type=type_, **{"train_seq_len": 64, **(run or {})}))


@pytest.mark.parametrize("type_", CHANGES)
def test_good_configs_have_no_problems(type_):
    assert problems(type_) == []


@pytest.mark.parametrize("type_", CHANGES)
def test_width_must_be_a_multiple_of_heads(type_):
    (problem,) = problems(type_, d_model=770, n_heads=6)
    assert "d_model (770)" in problem and "768, 774" in problem


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "nearest"), [(6, 4, "3, 6"), (8, 3, "2, 4"), (4, 9, "4"), (12, 5, "4, 6")]
)
def test_heads_must_be_a_multiple_of_kv_heads(n_heads, n_kv_heads, nearest):
    (problem,) = problems("vanilla", d_model=48, n_heads=n_heads, n_kv_heads=n_kv_heads)
    assert problem.endswith(f"nearest n_kv_heads: {nearest}")


def test_rotary_head_width_must_be_even():
    (problem,) = problems("vanilla", d_model=20, n_heads=4)
    assert "20 / 4 = 5" in problem and problem.endswith("nearest d_model: 16, 24")
    assert problems("vanilla", d_model=20, n_heads=4, use_rope=False) == []
    assert problems("gpt2", d_model=20, n_heads=4) == []


def test_rows_must_fit_learned_positions():
    for type_, fields in (("gpt2", {}), ("vanilla", {"use_rope": False})):
        found = problems(type_, {"train_seq_len": 65, "val_seq_len": 128}, **fields)
        assert len(found) == 2 and "train_seq_len (65)" in found[0] and "n_ctx (64)" in found[0]
    assert problems("vanilla", {"train_seq_len": 65}) == []


@pytest.mark.parametrize("type_", CHANGES)
def test_a_model_needs_a_vocabulary(type_):
    model_class = load(resolve(type_).model)
    with pytest.raises(ValueError, match="vocab_size"):
        model_class(model_class.Config())
