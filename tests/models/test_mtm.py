"""Sequential modules: what each may see, what they share with the trunk, and whose Config the trunk's is."""

import pytest
import torch
import torch.nn.functional as F

from adapters.default import as_hidden
from configs.schema import RunConfig
from models.layers.decoder import further
from models.mtm import MTMConfig
from tests.models.tiny import SIZES, VOCABULARY, build, tokens_of

TRUNKS = ["vanilla", "gpt2", "moe"]
DEPTHS, LENGTH = 3, 12


def run(model, row, **more):
    """row (B, T + D): logits of the trunk and of each module, (1 + D, B, T, V)."""
    depths = model.cfg.n_mtp_modules
    length = row.shape[1] - depths
    ahead = [row[:, k : k + length] for k in range(1, depths + 1)]
    output = model(row[:, :length], ahead=ahead, **more)
    of_modules = (output.extra[further(k)] for k in range(2, 2 + depths))
    return torch.stack([model.logits(states) for states in (output.states, *of_modules)])


@pytest.mark.parametrize("hidden", ["post_norm", "pre_norm"])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_module_k_sees_the_k_th_token_ahead_and_none_behind_that(trunk, hidden):
    """Its prediction is of the token after that one. The original project ran modules on the last position, and let
    the first predict the next token again."""
    model = build("mtm", trunk=trunk, n_mtp_modules=DEPTHS, mtp_hidden=hidden)
    row = tokens_of(1, LENGTH + DEPTHS)
    before = run(model, row)
    for j in range(LENGTH + DEPTHS):
        changed = row.clone()
        changed[0, j] = (changed[0, j] + 1) % VOCABULARY
        moved = (run(model, changed) - before)[:, 0].abs().amax(-1)  # (1 + D, T)
        for k in range(DEPTHS + 1):
            sees = torch.arange(LENGTH) + k >= j  # positions i with j <= i + k
            assert (moved[k][~sees] < 1e-12).all()
            assert (moved[k][sees] > 1e-9).all(), "and every position sees all before it"


@pytest.mark.parametrize("trunk", TRUNKS)
def test_modules_stay_within_their_document(trunk):
    """Where the token ahead belongs to the next document nothing counts; before that nothing of it is seen."""
    model = build("mtm", trunk=trunk, n_mtp_modules=2)
    row, doc_ids = tokens_of(1, LENGTH + 2), torch.arange(LENGTH)[None] // 7
    other = row.clone()
    other[0, :7] = (other[0, :7] + 1) % VOCABULARY
    before, after = (run(model, r, doc_ids=doc_ids) for r in (row, other))
    torch.testing.assert_close(before[:, :, 7:], after[:, :, 7:], rtol=0, atol=1e-12)
    other = row.clone()
    other[0, 7:] = (other[0, 7:] + 1) % VOCABULARY
    before, after = (run(model, r, doc_ids=doc_ids) for r in (row, other))
    for k in range(3):
        torch.testing.assert_close(before[k, :, : 7 - k], after[k, :, : 7 - k], rtol=0, atol=1e-12)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_the_trunk_knows_nothing_of_the_modules(trunk):
    model, bare = (build("mtm", trunk=trunk, n_mtp_modules=depths) for depths in (2, 0))
    plain = build(trunk)
    own = {name: value for name, value in model.state_dict().items() if name.startswith("trunk.")}
    bare.load_state_dict(own)
    plain.load_state_dict({name.removeprefix("trunk."): value for name, value in own.items()})
    row = tokens_of(2, LENGTH + 2)
    tokens = row[:, :LENGTH]
    wanted = as_hidden(plain(tokens)).states
    assert all(torch.equal(as_hidden(m(tokens)).states, wanted) for m in (model, bare))
    assert torch.equal(run(model, row)[0], plain.logits(wanted))


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_output_matrix_are_the_trunks_own(tied):
    """One storage, one name, one gradient, to which every depth adds."""
    model = build("mtm", n_mtp_modules=2, trunk_cfg={"tie_embeddings": tied})
    assert model.head_weight is model.trunk.head_weight
    assert model.embedding_weight is model.trunk.embed_tokens.weight
    vocabularies = [name for name, p in model.named_parameters() if p.shape[0] == len(model.embedding_weight)]
    assert len(vocabularies) == (1 if tied else 2)
    assert {name for name in model.state_dict()} == {name for name, _ in model.named_parameters()}
    logits = run(model, tokens_of(2, LENGTH + 2))
    for k in (1, 2):
        for p in model.parameters():
            p.grad = None
        F.cross_entropy(logits[k].flatten(0, 1), tokens_of(2, LENGTH).flatten()).backward(retain_graph=True)
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.trunk.parameters()), (
            "nothing is detached"
        )


def test_the_order_of_the_pair_is_that_of_the_columns():
    first, second = (build("mtm", concat_order=order) for order in ("hidden_first", "embed_first"))
    second.load_state_dict(first.state_dict())
    row, width = tokens_of(1, LENGTH + 1), SIZES["d_model"]
    assert not torch.allclose(run(first, row)[1], run(second, row)[1])
    with torch.no_grad():
        weight = second.mtp_modules[0].eh_proj.weight
        weight.copy_(weight.roll(width, dims=1))
    torch.testing.assert_close(run(first, row), run(second, row), rtol=1e-12, atol=1e-12)


def test_a_shared_norm_is_the_trunks_last():
    own, shared = (build("mtm", mtp_share_head_norm=share) for share in (False, True))
    assert own.state_dict().keys() - shared.state_dict().keys() == {"mtp_modules.0.norm.weight"}
    own.load_state_dict(shared.state_dict(), strict=False)
    with torch.no_grad():
        own.mtp_modules[0].norm.weight.copy_(own.trunk.norm.weight)
    row = tokens_of(1, LENGTH + 1)
    assert torch.equal(run(own, row), run(shared, row))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_initialisation_is_the_trunks(trunk):
    """M_k N(0, 0.02^2), blocks as those of the trunk, whatever the number of modules."""
    sizes = {"d_model": 256, "trunk": trunk}
    model, alone = build("mtm", std=None, **sizes), build(trunk, std=None, d_model=256)
    state = model.state_dict()
    assert all(torch.equal(value, state[f"trunk.{name}"]) for name, value in alone.state_dict().items())
    module = model.mtp_modules[0]
    assert module.eh_proj.weight.shape == (256, 512)
    assert module.eh_proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    layers = [*model.stack[0], module.block]
    for name, _ in module.block.named_parameters():
        stds = [dict(layer.named_parameters())[name].std().item() for layer in layers]
        assert stds[-1] == pytest.approx(stds[0], rel=0.05, abs=1e-12), name
    assert all(bool((p == 1).all()) for n, p in module.named_parameters() if n.endswith("norm.weight"))


@pytest.mark.parametrize("trunk", TRUNKS)
def test_what_modules_cost(trunk):
    """D (block + 2 d^2 + V_p d) weights more in training; nothing where they are dropped."""
    sizes = {"d_model": 48, "vocab_size": 1000, "n_layers": 3}
    deeper, plain = (build(trunk, **{**sizes, "n_layers": n}).flops(64) for n in (5, 3))
    model = build("mtm", trunk=trunk, n_mtp_modules=2, **sizes).flops(64)
    further = 2 * 6 * (2 * 48**2 + 1024 * 48)
    assert model.training_per_token == pytest.approx(deeper.training_per_token + further, rel=1e-12)
    assert model.forward_per_token == plain.forward_per_token


# -- whose Config it is ------------------------------------------------------------------------------------------------


def problems(**fields):
    return MTMConfig(**{**SIZES, **fields}).problems(RunConfig(type="mtm"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"trunk_cfg": {"n_kv_head": 2}},
            ["unknown key 'model_cfg.trunk_cfg.n_kv_head'", "trunk_cfg.n_kv_heads"],
        ),
        ({"trunk_cfg": {"n_layers": 2}}, ["model_cfg.trunk_cfg.n_layers", "Set model_cfg.n_layers instead"]),
        ({"trunk_cfg": {"dropout": 0.1}}, ["Set model_cfg.dropout instead"]),
        (
            {"trunk_cfg": {"norm_eps": -1.0}},
            ["model_cfg.trunk_cfg.norm_eps: must satisfy 0 < norm_eps, got -1.0"],
        ),
        ({"trunk_cfg": {"n_kv_heads": 3}}, ["model_cfg.n_heads (4)", "model_cfg.trunk_cfg.n_kv_heads (3)"]),
        (
            {"trunk": "gpt2", "trunk_cfg": {"use_rope": True}},
            ["'model_cfg.trunk_cfg.use_rope' for trunk 'gpt2'"],
        ),
        (
            {"trunk": "moe", "trunk_cfg": {"first_k_dense": 8}},
            ["model_cfg.trunk_cfg.first_k_dense (8)", "or model_cfg.trunk=vanilla"],
        ),
        ({"d_model": 18}, ["model_cfg.d_model (18) must be divisible by model_cfg.n_heads (4)"]),
    ],
)
def test_wrong_fields_of_the_trunk_are_named_where_they_stand(fields, words):
    (problem,) = problems(**fields)
    assert all(word in problem for word in words), problem


def test_the_trunk_reads_its_own_fields_and_the_models_sizes():
    cfg = MTMConfig(**SIZES, trunk_cfg={"num_kv_heads": 2, "qk_norm": True}, dropout=0.25)
    assert not cfg.problems(RunConfig(type="mtm"))
    trunk = cfg.trunk_config
    assert (trunk.n_kv_heads, trunk.qk_norm, trunk.dropout, trunk.d_model) == (
        2,
        True,
        0.25,
        SIZES["d_model"],
    )
    learned = MTMConfig(**SIZES, trunk="gpt2").problems(RunConfig(type="mtm", train_seq_len=128))
    assert learned and "model_cfg.n_ctx" in learned[0]


def test_what_means_nothing_is_named():
    assert MTMConfig(**SIZES).unread() == {"mtp_lambda_switch": "mtp_lambda_final=null"}
    switched = {"mtp_lambda_final": 0.1}
    assert MTMConfig(**SIZES, **switched).unread() == {}
    never, at_once = (MTMConfig(**SIZES, **switched, mtp_lambda_switch=at).unread() for at in (1.0, 0.0))
    assert never == {"mtp_lambda_final": "mtp_lambda_switch=1"}
    assert at_once == {"mtp_lambda": "mtp_lambda_switch=0"}
    biased = MTMConfig(**SIZES, trunk="moe", trunk_cfg={"ffn_hidden": 64}).unread()
    assert biased["trunk_cfg.bias_update_speed"] == "trunk_cfg.gate_type=mixtral"
    bare = MTMConfig(**SIZES, n_mtp_modules=0).unread()
    assert {"mtp_lambda", "mtp_hidden", "concat_order", "mtp_share_head_norm"} <= set(bare)


# -- the names of released checkpoints ---------------------------------------------------------------------------------

OWN = ["enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"]
LLAMA = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{x}_proj" for x in "qkvo")]
FORMS = [
    {"trunk": "vanilla", "concat_order": order, "mtp_share_head_norm": share}
    for order in ("hidden_first", "embed_first")
    for share in (False, True)
]
FORMS += [
    {"trunk": "vanilla", "trunk_cfg": {"tie_embeddings": False}},
    {"trunk": "moe"},
    {"trunk": "moe", "trunk_cfg": {"gate_type": "deepseek_v3"}},
]


@pytest.mark.parametrize("fields", FORMS, ids=str)
def test_weights_go_to_the_names_of_deepseek_and_back(fields):
    """As vLLM reads them: a module is one more layer, its matrix multiplies [embedding; hidden]."""
    one, other = (build("mtm", n_mtp_modules=2, seed=seed, **fields) for seed in (0, 1))
    names = one.to_hf_state_dict()
    width, layers = SIZES["d_model"], SIZES["n_layers"]
    for depth, module in enumerate(one.mtp_modules):
        own = {
            n.removeprefix(f"model.layers.{layers + depth}."): t
            for n, t in names.items()
            if f".{layers + depth}." in n
        }
        assert {f"{n}.weight" for n in (*OWN, *LLAMA)} <= own.keys()
        ours = module.eh_proj.weight.split(width, dim=1)
        theirs = own["eh_proj.weight"].split(width, dim=1)
        assert torch.equal(theirs[0], ours[0 if one.cfg.concat_order == "embed_first" else 1])
        assert torch.equal(own["enorm.weight"], module.enorm.weight)
        assert torch.equal(own["embed_tokens.weight"], names["model.embed_tokens.weight"])
        assert torch.equal(own["shared_head.head.weight"], names["lm_head.weight"])
    row = tokens_of(2, LENGTH + 2)
    assert not torch.allclose(run(one, row), run(other, row))
    other.from_hf_state_dict(names)
    assert torch.equal(run(one, row), run(other, row))
    bare = {
        name: t for name, t in names.items() if not name.endswith((".head.weight", "2.embed_tokens.weight"))
    }
    other.from_hf_state_dict(bare)


def test_weights_that_do_not_fit_load_nothing():
    model = build("mtm", n_mtp_modules=1)
    names, before = model.to_hf_state_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    one, last = {n: t + 1 for n, t in names.items()}, f"model.layers.{SIZES['n_layers']}."
    for wrong, words in (
        ({n: t for n, t in one.items() if n != last + "enorm.weight"}, "missing 1"),
        (
            {**one, f"model.layers.{SIZES['n_layers'] + 1}.hnorm.weight": one[last + "hnorm.weight"]},
            "unexpected 1",
        ),
        ({**one, last + "eh_proj.weight": one[last + "eh_proj.weight"].T}, "needed is"),
        ({n: t for n, t in one.items() if n != last + "self_attn.q_proj.weight"}, "missing 1"),
        (
            {**one, last + "embed_tokens.weight": names[last + "embed_tokens.weight"]},
            "no copy of model.embed",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            model.from_hf_state_dict(wrong)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="trunk=gpt2"):
        build("mtm", trunk="gpt2").to_hf_state_dict()
