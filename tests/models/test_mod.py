"""Which tokens a routed block takes, what it makes of them, and what it keeps of them for the next ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import models.mod
from configs.schema import RunConfig
from data.offsets import document_offsets
from kernels.attention import Visible
from models.layers.decoder import Hidden
from models.layers.roles import rule_for
from models.mod import LearnedRouter, MoDConfig, RoutedBlock, Routing, among, best
from tests.models.tiny import build, tokens_of
from trainer.session import _recompute_blocks

ROWS, LENGTH = 3, 12
PACKED = torch.tensor([[0] * 5 + [1] * 7, [0] * 12, [0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2]])
# Everything of the control that a routed block must take over.
VARIANTS = {
    "plain": {},
    "grouped heads, a window, bias": {"n_kv_heads": 2, "sliding_window": 4, "bias": True},
    "qk norm, softcap": {"qk_norm": True, "attn_softcap": 2.0, "tie_embeddings": False},
    "learned positions, LayerNorm, GELU": {"use_rope": False, "use_rmsnorm": False, "use_swiglu": False},
    "sigmoid": {"router_act": "sigmoid"},
    "tanh": {"router_act": "tanh"},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)


class Told(nn.Module):
    """A router that scores as it is told: `score` (B, T) for tokens from position 0 on; those of the best k enter."""

    def __init__(self, score: Tensor, k: int) -> None:
        super().__init__()
        self.score = score
        self.entering = torch.zeros_like(score, dtype=torch.bool).scatter(1, best(score, k), True)

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        here = slice(routing.past, routing.past + x.shape[1])
        return self.score[:, here], self.entering[:, here].to(x.dtype) - 0.5


def model_of(capacity=0.25, n_layers=3, **fields):
    return build("mod", n_layers=n_layers, capacity=capacity, pred_hidden=6, **fields)


def routed_block(model) -> RoutedBlock:
    return model.layers[model.cfg.routed_layers[0]]


def tell(model, seed=3) -> Told:
    """Scores that are the same in every mode."""
    score = torch.randn(ROWS, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    routed_block(model).router = told = Told(score, model.cfg.chosen(LENGTH))
    return told


def states(model, tokens, **given) -> Tensor:
    return model(tokens, **given).states


def in_pieces(model, tokens, sizes=(5, 1, 1, 3, 2)):
    cache = model.init_cache(len(tokens))
    return torch.cat([states(model, piece, cache=cache) for piece in tokens.split(list(sizes), 1)], 1), cache


# -- which ------------------------------------------------------------------------------------------------------------


def test_of_equal_scores_the_first_is_chosen():
    assert best(torch.zeros(1, 2000), 3).tolist() == [[0, 1, 2]]
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0], [-0.0, 0.0, -1.0, 0.0, 5.0, 0.0]])
    assert best(scores, 3).tolist() == [[1, 2, 3], [0, 1, 4]]


@pytest.mark.parametrize(
    ("capacity", "length", "k"),
    [(0.125, 1024, 128), (0.125, 15, 1), (0.125, 4, 1), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_k_is_the_floor_of_its_share_and_one_at_least(capacity, length, k):
    assert MoDConfig(capacity=capacity).chosen(length) == k


def test_where_blocks_are_routed():
    assert MoDConfig(n_layers=6).routed_layers == [1, 3, 5]
    assert MoDConfig(n_layers=6, mod_offset=2).routed_layers == [2, 4]
    assert MoDConfig(n_layers=3, every_other=False).routed_layers == [0, 1, 2]
    model = model_of(n_layers=4)
    assert [isinstance(block, RoutedBlock) for block in model.layers] == [False, True, False, True]


def test_exactly_k_tokens_of_each_row_change_and_the_others_stay_bit_for_bit():
    model = model_of(capacity=0.25)
    seen: dict[str, Tensor] = {}
    block = routed_block(model)
    block.register_forward_hook(
        lambda m, given, out: seen.update(x=given[0], y=out[0], chosen=out[1]["chosen"])
    )
    states(model, tokens_of(ROWS, LENGTH), choose=True)
    changed = (seen["x"] != seen["y"]).any(-1)
    assert changed.sum(1).tolist() == [3, 3, 3] and torch.equal(changed, seen["chosen"])


def test_what_a_routed_block_computes_is_the_chosen_tokens_alone():
    model, shapes = model_of(capacity=0.25), []
    block = routed_block(model)
    for part in (block.self_attn, block.mlp):
        part.register_forward_hook(lambda m, given, out: shapes.append(tuple(given[0].shape)))
    states(model, tokens_of(ROWS, LENGTH), choose=True)
    assert shapes == [(ROWS, 3, 16)] * 2


def test_the_choice_is_by_score_whatever_its_activation():
    """A sigmoid that has saturated could not tell them apart."""
    model = model_of(router_act="sigmoid")
    told = tell(model)
    told.score = 1000 + told.score
    chosen = model(tokens_of(ROWS, LENGTH), choose=True).extra["chosen"][0]
    assert torch.equal(chosen, told.entering)


# -- what is made of them ---------------------------------------------------------------------------------------------


@every_variant
@pytest.mark.parametrize("docs", [None, PACKED], ids=["one document", "packed"])
def test_choosing_masking_and_the_cache_are_one_model(fields, docs):
    """Given who enters: positions, windows and documents mean the same among the chosen as among all."""
    model, tokens = model_of(**fields), tokens_of(ROWS, LENGTH)
    tell(model)
    chosen = states(model, tokens, doc_ids=docs, choose=True)
    torch.testing.assert_close(states(model, tokens, doc_ids=docs), chosen, rtol=0, atol=1e-12)
    if docs is None:
        torch.testing.assert_close(in_pieces(model, tokens)[0], chosen, rtol=0, atol=1e-12)


def test_all_chosen_and_multiplied_by_one_it_is_the_control():
    model, control = model_of(capacity=1.0), build("vanilla", n_layers=3)
    tokens = tokens_of(ROWS, LENGTH)
    tell(model).score.fill_(1.0)
    control.load_state_dict({k: v for k, v in model.state_dict().items() if ".router." not in k})
    expected = control(tokens, doc_ids=PACKED)
    for choose in (True, False):
        found = states(model, tokens, doc_ids=PACKED, choose=choose)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_positions_are_those_of_the_text(monkeypatch):
    model, tokens = model_of(), tokens_of(ROWS, LENGTH)
    right, turned = states(model, tokens, choose=True), models.mod.turned

    def compacted(rotation, places):
        return turned(rotation, torch.arange(places.shape[1]).expand_as(places))

    monkeypatch.setattr(models.mod, "turned", compacted)
    assert (states(model, tokens, choose=True) - right).abs().max() > 1e-3


def test_a_window_counts_the_positions_of_the_text():
    """Of tokens 0, 6 and 7 in a window of 4, the second sees none before it."""
    places = torch.tensor([[0, 6, 7]])
    whole = Visible(1, 12, 12, places.device, window=4)
    seen = among(places, places.flatten(), whole).allowed()[0, 0]
    assert seen.tolist() == [[True, False, False], [False, True, False], [False, True, True]]


def test_offsets_of_documents_are_those_of_the_chosen():
    places = torch.tensor([[1, 2, 6, 11], [0, 3, 4, 5], [0, 1, 3, 9]])
    flat = (places + LENGTH * torch.arange(ROWS)[:, None]).flatten()
    offsets = torch.from_numpy(document_offsets(PACKED.numpy()))
    visible = among(places, flat, Visible.causally(PACKED, doc_ids=PACKED, cu_seqlens=offsets))
    assert visible.doc_ids.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 2]]
    assert visible.cu_seqlens.dtype == torch.int32 and len(visible.cu_seqlens) == len(offsets)
    assert visible.cu_seqlens.unique().tolist() == [0, 2, 4, 8, 10, 11, 12]


def test_rows_choose_for_themselves():
    """Other choices, other documents: each row alone and in any company, in both modes."""
    model, tokens = model_of(), tokens_of(ROWS, LENGTH)
    order = torch.tensor([2, 0, 1])
    for choose in (True, False):
        together = states(model, tokens, doc_ids=PACKED, choose=choose)
        other = states(model, tokens[order], doc_ids=PACKED[order], choose=choose)
        torch.testing.assert_close(other, together[order], rtol=0, atol=1e-12)
        alone = [
            states(model, tokens[i : i + 1], doc_ids=PACKED[i : i + 1], choose=choose) for i in range(ROWS)
        ]
        torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_choice_sees_the_future_and_what_foretells_it_does_not(seed):
    model = build("mod", n_layers=4, capacity=0.5, pred_hidden=6, seed=seed)
    tokens = tokens_of(1, 48, seed)
    futures = [torch.cat((tokens[:, :24], tokens_of(1, 24, 7 + i)), 1) for i in range(4)]
    for choose in (True, False):
        before, *after = (states(model, t, choose=choose)[:, :24] for t in (tokens, *futures))
        assert any(bool((before - other).abs().max() > 1e-6) for other in after) == choose


# -- gradients --------------------------------------------------------------------------------------------------------


def loss_of(model, tokens) -> Tensor:
    return model.logits(states(model, tokens, choose=True)).logsumexp(-1).sum()


def test_the_router_learns_from_the_text_by_being_multiplied_in():
    model, tokens = model_of(), tokens_of(ROWS, LENGTH)
    block = routed_block(model)
    weight = block.router.proj.weight
    (gradient,) = torch.autograd.grad(loss_of(model, tokens), weight)
    assert gradient.abs().max() > 1e-3
    block.act = torch.ones_like  # the fault
    assert torch.autograd.grad(loss_of(model, tokens), weight, allow_unused=True)[0] is None


def test_the_predictor_reads_and_moves_nothing():
    model, tokens = model_of(), tokens_of(ROWS, LENGTH)
    logit = model(tokens, choose=True).extra["logit"].sum()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(logit, parameters, allow_unused=True)
    reached = {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    assert reached == {name for name in names if ".router.predictor." in name} and reached


def test_an_auxiliary_loss_moves_the_model():
    model, tokens = model_of(causal_method="aux_loss"), tokens_of(ROWS, LENGTH)
    told = model(tokens, choose=True).extra
    assert torch.equal(told["logit"], told["score"])
    assert not any("predictor" in name for name, _ in model.named_parameters())
    (gradient,) = torch.autograd.grad(told["logit"].sum(), model.embedding_weight)
    assert gradient.abs().max() > 0


class Shaken(nn.Module):
    """A router whose every call is a little further off, as computed anew on another day."""

    def __init__(self, router: LearnedRouter) -> None:
        super().__init__()
        self.router, self.calls = router, 0

    def forward(self, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
        self.calls += 1
        near = 1e-6 * x + 1e-3 * (self.calls - 1) * torch.arange(x.shape[1])[:, None]  # almost all are equal
        return self.router(near, routing)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "not kept"])
def test_recomputation_does_not_choose_anew(kept):
    """And would if scores were not kept, so that this test can fail."""
    found = []
    for recompute in (False, True):
        model = model_of().train()
        block = routed_block(model)
        if not kept:
            block.router.kept = nn.Identity()
        block.router = shaken = Shaken(block.router)
        if recompute:
            _recompute_blocks(SimpleNamespace(blocks=model.blocks, model=model))
        parts = [p for name, p in model.named_parameters() if ".router." not in name]
        found.append(torch.autograd.grad(loss_of(model, tokens_of(ROWS, LENGTH)), parts))
        assert shaken.calls == 1 + recompute
    assert all(map(torch.equal, *found)) == kept


def test_scores_are_fp32_under_autocast():
    model = build("mod", torch.float32, n_layers=3, pred_hidden=6)
    dtypes = {}
    routed_block(model).register_forward_hook(
        lambda m, given, out: dtypes.update(x=given[0].dtype, y=out[0].dtype)
    )
    with torch.autocast("cpu", torch.bfloat16):
        told = model(tokens_of(ROWS, LENGTH), choose=True).extra
    assert {told["score"].dtype, told["logit"].dtype, *dtypes.values()} == {torch.float32}
    plain = model(tokens_of(ROWS, LENGTH), choose=True).extra
    scale = plain["score"].abs().max()
    assert (told["score"] - plain["score"]).abs().max() < 0.05 * scale


# -- text -------------------------------------------------------------------------------------------------------------


def sure(model, answer: float) -> None:
    """All predictors answer so."""
    for block in model.layers:
        if isinstance(block, RoutedBlock):
            nn.init.zeros_(block.router.predictor.down.weight)
            nn.init.constant_(block.router.predictor.down.bias, answer)


def test_where_nobody_enters_the_full_blocks_are_the_model():
    """As a choice among the one token that is decoded would not have it: that always takes it."""
    model, tokens = model_of(n_layers=4), tokens_of(ROWS, LENGTH)
    full = build("vanilla", n_layers=2)
    kept = {
        k.replace("layers.2.", "layers.1."): v for k, v in model.state_dict().items() if "layers.1." not in k
    }
    full.load_state_dict({k: v for k, v in kept.items() if "layers.3." not in k})
    sure(model, -50.0)
    calls = []
    routed_block(model).self_attn.register_forward_hook(lambda *_: calls.append(1))
    text, cache = in_pieces(model, tokens)
    assert not calls and not cache.ragged[1].counts.any(), "the block is not run at all"
    for found in (text, states(model, tokens)):
        torch.testing.assert_close(found, full(tokens), rtol=0, atol=1e-12)


def test_where_all_enter_there_is_no_limit():
    model, tokens = model_of(), tokens_of(ROWS, LENGTH)
    sure(model, 50.0)
    _, cache = in_pieces(model, tokens)
    assert cache.ragged[1].counts.tolist() == [LENGTH] * ROWS
    assert model(tokens).extra["entered"].all()


def test_a_pass_computes_what_enters_and_keeps_nothing_else():
    model, tokens = model_of(), tokens_of(ROWS, LENGTH)
    told, shapes = tell(model), []
    told.entering = torch.zeros(ROWS, LENGTH, dtype=torch.bool)
    told.entering[0, [1, 3]] = told.entering[2, [0, 5]] = True
    routed_block(model).self_attn.register_forward_hook(
        lambda m, given, out: shapes.append(given[0].shape[:2])
    )
    _, cache = in_pieces(model, tokens, (4, 1, 1, 6))
    assert shapes == [(2, 2), (1, 1)], "rows and tokens that take part, packed to the longest"
    ragged = cache.ragged[1]
    assert ragged.counts.tolist() == [2, 0, 2] and cache.length == LENGTH
    assert ragged.positions[0, :2].tolist() == [1, 3] and ragged.positions[2, :2].tolist() == [0, 5]


@pytest.mark.parametrize(
    "fields", [{}, {"sliding_window": 4}, {"every_other": False}, {"router_type": "random"}]
)
def test_rows_are_selected_and_tokens_taken_back(fields):
    model, tokens = model_of(**{"capacity": 0.5, **fields}), tokens_of(ROWS, LENGTH)
    whole, kept = states(model, tokens), torch.tensor([2, 0])
    cache = model.init_cache(ROWS)
    states(model, tokens[:, :5], cache=cache)
    for draft in (tokens_of(ROWS, 6, seed=2), tokens_of(ROWS, 2, seed=3)):
        here = cache.snapshot()
        states(model, draft, cache=cache)
        cache.restore(here)
    cache.select(kept)
    rest = states(model, tokens[kept, 5:9], cache=cache)
    torch.testing.assert_close(rest, whole[kept, 5:9], rtol=0, atol=1e-12)
    cache.truncate(7)
    rest = states(model, tokens[kept, 7:], cache=cache)
    torch.testing.assert_close(rest, whole[kept, 7:], rtol=0, atol=1e-12)


def test_the_best_of_a_part_of_a_row_are_not_asked_for():
    model = model_of()
    with pytest.raises(AssertionError, match="best are not known"):
        model(tokens_of(ROWS, 4), cache=model.init_cache(ROWS), choose=True)


# -- random scores ----------------------------------------------------------------------------------------------------


def test_random_scores_are_gaussian_and_a_share_of_them_enters():
    model = build("mod", router_type="random", n_layers=2)
    assert not any("router" in name for name, _ in model.named_parameters())
    tokens, seeds = torch.zeros(8, 500, dtype=torch.int64), torch.arange(8)
    told = model(tokens, choose=True, row_seeds=seeds).extra
    score = told["score"][0].detach()
    assert abs(float(score.mean())) < 0.03 and abs(float(score.std()) - 1) < 0.03
    assert not torch.equal(score[0], score[1])
    entered = model(tokens, row_seeds=seeds).extra["entered"][0]
    assert torch.equal(entered, told["logit"][0] > 0)
    assert abs(float(entered.double().mean()) - 0.125) < 0.015
    assert float(score[entered].min()) == pytest.approx(1.1503, abs=0.01), "the Gaussian's quantile"
    same = model(tokens).extra["entered"][0]
    assert torch.equal(same[0], same[1]), "without seeds it is a function of the position"


# -- what the trainer asks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"every_other": False}, {"causal_method": "aux_loss"}, {"router_type": "random"}, {"capacity": 1.0}],
    ids=str,
)
def test_flops_are_those_that_are_counted(fields):
    rows, length = 4, 32
    model = build(
        "mod", torch.float32, **{"d_model": 32, "vocab_size": 128, "pred_hidden": 16, **fields}
    ).train()
    tokens = tokens_of(rows, length, vocabulary=128)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        hidden: Hidden = model(tokens, choose=True)
        (model.logits(hidden.states).sum() + hidden.extra["logit"].sum()).backward()
    expected = model.flops(length).reference.training_per_token
    assert counter.get_total_flops() / (rows * length) == pytest.approx(expected, rel=0.01)


def test_a_token_of_a_routed_block_sees_half_of_the_chosen():
    model = build("mod", n_layers=2, capacity=0.125)
    assert model.flops(64).keys == 65 / 2 + 0.125 * (8 + 1) / 2
    windowed = build("mod", n_layers=2, capacity=0.125, sliding_window=16)
    assert windowed.flops(64).keys == pytest.approx((16 - 16 * 15 / 128) + 0.125 * (1 + 7 * 2) / 8)


def test_on_average_a_share_of_a_routed_block_acts_on_a_token():
    model, control = build("mod", n_layers=2, capacity=0.25), build("vanilla", n_layers=2)
    block = sum(p.numel() for p in control.layers[1].parameters())
    whole = sum(p.numel() for p in model.parameters())
    assert model.active_parameters() == whole - 0.75 * block


def test_routers_are_stepped_apart_and_never_decay():
    model = model_of()
    rules = {name: rule_for(model.param_roles(), name) for name, _ in model.named_parameters()}
    routers = {name: rule for name, rule in rules.items() if name.startswith("layers.1.router.")}
    assert {name.removeprefix("layers.1.router.") for name in routers} == {
        "proj.weight",
        *(f"predictor.{part}" for part in ("up.weight", "up.bias", "down.weight", "down.bias")),
    }
    for name, rule in routers.items():
        assert rule.role == ("scalar" if name.endswith("bias") else "router")
        assert name.endswith("bias") or rule.wd_mult == 0
        assert rule.lr_mult == (0.1 if name.endswith("proj.weight") else 1.0)


def test_routers_start_small():
    model = build("mod", std=None, d_model=64, n_layers=2, pred_hidden=128)
    router = routed_block(model).router
    for weight in (router.proj.weight, router.predictor.up.weight, router.predictor.down.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    assert not router.predictor.up.bias.any() and not router.predictor.down.bias.any()


def problems(**fields):
    return MoDConfig(**fields).problems(RunConfig(type="mod"))


def test_an_offset_that_routes_nothing_is_refused():
    assert problems(n_layers=4, mod_offset=3) == []
    (said,) = problems(n_layers=4, mod_offset=4)
    assert "nearest: mod_offset=3, or n_layers=5" in said
    assert problems(n_layers=4, mod_offset=9, every_other=False) == []


def test_what_is_not_read_is_said():
    assert MoDConfig().unread().keys() == MoDConfig(router_act="tanh").unread().keys() == set()
    assert MoDConfig(every_other=False).unread() == {"mod_offset": "every_other=false"}
    assert MoDConfig(causal_method="aux_loss").unread() == {"pred_hidden": "causal_method=aux_loss"}
    random = MoDConfig(router_type="random").unread()
    assert random.keys() == {"causal_method", "pred_hidden", "mod_bce_weight"}


def test_llamas_files_have_no_routers():
    with pytest.raises(ValueError, match="type=mod: .* has no blocks that tokens go around"):
        model_of().to_hf_state_dict()
