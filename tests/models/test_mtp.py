"""Parallel heads: what each reads, what they share, and what a decoder without the further ones is."""

import pytest
import torch

from configs.schema import RunConfig
from models.layers.decoder import Hidden
from models.mtp import MTPConfig
from tests.models.tiny import SIZES, VOCABULARY, build, tokens_of

SIX = {"n_layers": 6}
VARIANTS = [
    {"n_mtp_tokens": 3, "head_type": head_type, "head_topology": topology}
    for head_type in ("transformer", "linear")
    for topology in ("parallel", "causal", "anticausal")
]
NAMES = ["-".join(map(str, kw.values())) for kw in VARIANTS]


def heads_of(model, tokens, **more):
    """States of all heads, (n, B, T, D)."""
    output = model(tokens, ahead=[tokens] * (model.cfg.n_mtp_tokens - 1), **more)
    output = output if isinstance(output, Hidden) else Hidden(output)
    return torch.stack([output.states, *output.extra.values()])


def as_vanilla(state, trunk):
    """Names of the first head as those of the block behind the trunk."""
    return {name.replace("heads.0.", f"layers.{trunk}."): value for name, value in state.items()}


@pytest.mark.parametrize("more", [{}, {"tie_embeddings": False, "n_kv_heads": 2}, {"isoparam": False}])
def test_one_head_is_vanilla(more):
    one = build("mtp", n_mtp_tokens=1, **SIX, **more)
    vanilla = build("vanilla", **SIX, **{k: v for k, v in more.items() if k != "isoparam"})
    vanilla.load_state_dict(as_vanilla(one.state_dict(), 5))
    tokens = tokens_of()
    assert torch.equal(one(tokens), vanilla(tokens))
    assert one.flops(64) == vanilla.flops(64)


def test_trunk_and_heads_are_as_many_blocks_as_vanilla_has():
    """The paper's fair comparison; without it the heads stand behind a trunk of one block less."""
    fair, larger = (build("mtp", n_mtp_tokens=3, isoparam=fair, **SIX) for fair in (True, False))
    vanilla = build("vanilla", **SIX)
    assert (len(fair.layers), len(larger.layers)) == (3, 5)
    assert sum(p.numel() for p in fair.parameters()) == sum(p.numel() for p in vanilla.parameters())


@pytest.mark.parametrize("kw", VARIANTS, ids=NAMES)
def test_no_head_sees_what_comes_later(kw):
    """Nor the tokens ahead that say how many heads to run."""
    model = build("mtp", **SIX, **kw)
    for seed, place in ((0, 1), (1, 20), (2, 47)):
        tokens = tokens_of(1, 48, seed=seed)
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCABULARY
        before, after = heads_of(model, tokens), heads_of(model, changed)
        assert torch.equal(before[:, :, :place], after[:, :, :place])
        assert ((before - after)[:, 0, place:].abs().amax((1, 2)) > 1e-6).all()
    other = model(tokens, ahead=[tokens_of(1, 48, seed=9)] * 2)
    assert torch.equal(torch.stack([other.states, *other.extra.values()]), before)


@pytest.mark.parametrize("kw", VARIANTS, ids=NAMES)
def test_heads_stay_within_their_document(kw):
    model = build("mtp", **SIX, **kw)
    tokens, doc_ids = tokens_of(1, 16), torch.arange(16)[None] // 9
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % VOCABULARY
    before, after = (heads_of(model, t, doc_ids=doc_ids)[:, :, 9:] for t in (tokens, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def reached(topology, k):
    """Heads whose weights the k-th (from 0) of three depends on."""
    model = build("mtp", n_mtp_tokens=3, head_topology=topology, **SIX)
    heads_of(model, tokens_of())[k].sum().backward()
    found = [head.self_attn.q_proj.weight.grad for head in model.heads]
    return {i for i, gradient in enumerate(found) if gradient is not None and bool(gradient.any())}


def test_what_a_head_reads_is_the_trunk_or_its_neighbour():
    assert [reached("parallel", k) for k in range(3)] == [{0}, {1}, {2}]
    assert [reached("causal", k) for k in range(3)] == [{0}, {0, 1}, {0, 1, 2}]
    assert [reached("anticausal", k) for k in range(3)] == [{0, 1, 2}, {1, 2}, {2}]


@pytest.mark.parametrize("kw", VARIANTS, ids=NAMES)
def test_the_first_head_alone_is_what_it_is_beside_the_others(kw):
    """Also piece by piece over a cache, which the further heads do not grow unless the first reads them."""
    model, tokens = build("mtp", **SIX, **kw), tokens_of(2, 9)
    alone = model(tokens)
    assert torch.equal(alone, heads_of(model, tokens)[0])
    cache = model.init_cache(2)
    pieces = [model(piece, cache=cache) for piece in tokens.split([5, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), alone, rtol=0, atol=1e-12)


def test_what_further_heads_cost():
    """(n - 1) times the output matrix beyond vanilla; text and scores cost a decoder one block shorter."""
    sizes = {**SIX, "d_model": 48, "vocab_size": 1000}
    vanilla, shorter, fair = (
        build(type_, **{**sizes, **more}).flops(64)
        for type_, more in (("vanilla", {}), ("vanilla", {"n_layers": 4}), ("mtp", {"n_mtp_tokens": 3}))
    )
    assert fair.training_per_token - vanilla.training_per_token == 2 * 6 * 1024 * 48
    assert fair.forward_per_token == shorter.forward_per_token
    chained = build("mtp", **sizes, n_mtp_tokens=3, head_topology="anticausal").flops(64)
    assert chained.training_per_token == fair.training_per_token
    assert chained.forward_per_token == vanilla.forward_per_token, "the first head reads all others"
    linear = build("mtp", **sizes, n_mtp_tokens=3, head_type="linear").flops(64)
    blocks = build("vanilla", **{**sizes, "n_layers": 3}).flops(64)
    assert linear.training_per_token - blocks.training_per_token == 6 * (3 * 48**2 + 2 * 1024 * 48)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_mtp_tokens": 6}, ["n_mtp_tokens (6)", "n_layers (6)", "n_mtp_tokens=5 or n_layers=7"]),
        ({"isoparam": False, "n_layers": 1}, ["Nearest: n_layers=2"]),
        ({"mtp_loss_weights": [1.0]}, ["mtp_loss_weights ([1.0])", "Nearest: [1.0, 1.0]"]),
        ({"mtp_loss_weights": [0.0, 0.0]}, ["leaves nothing to train", "Nearest: [1.0, 0.0], or null"]),
    ],
)
def test_what_leaves_no_trunk_or_lacks_a_weight_is_refused(fields, words):
    (problem,) = MTPConfig(**{**SIZES, **SIX, **fields}).problems(RunConfig(type="mtp"))
    assert all(word in problem for word in words)


def test_fields_of_the_other_form_are_named_as_not_read():
    parallel = MTPConfig(**SIZES, mtp_lambda=0.5).unread()
    assert parallel == {"mtp_lambda": "use_deepseek_mtp=false"}
    sequential = MTPConfig(**SIZES, use_deepseek_mtp=True)
    assert {"isoparam", "head_type", "head_topology", "mtp_loss_weights"} == set(sequential.unread())
    assert not sequential.problems(RunConfig(type="mtp")), "two modules behind two blocks leave these"
    one = MTPConfig(**SIZES, n_mtp_tokens=1).unread()
    assert one == {
        "isoparam": "n_mtp_tokens=1",
        "head_topology": "n_mtp_tokens=1",
        "mtp_lambda": "use_deepseek_mtp=false",
    }
    assert (
        MTPConfig(**SIZES, n_mtp_tokens=1, use_deepseek_mtp=True).unread()["mtp_lambda"] == "n_mtp_tokens=1"
    )


def test_one_head_has_llamas_form_and_more_have_none():
    one, vanilla = build("mtp", n_mtp_tokens=1, **SIX), build("vanilla", **SIX)
    assert one.to_hf_state_dict().keys() == vanilla.to_hf_state_dict().keys()
    vanilla.from_hf_state_dict(one.to_hf_state_dict())
    assert torch.equal(one(tokens_of()), vanilla(tokens_of()))
    with pytest.raises(ValueError, match="n_mtp_tokens=2"):
        build("mtp", **SIX).to_hf_state_dict()
