"""H-Net: the equations, published sizes and names, chunks in both ways of laying, text as it comes."""

import re
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import models.hierarchy.stage
from configs import compose
from configs.messages import ConfigError
from kernels.choose import Kernels
from kernels.ssd import ssd
from models.hierarchy.chunking import smoothed
from models.hierarchy.config import HNetConfig
from models.hierarchy.routing import Routed, Router
from models.hnet import HNet
from models.layers.recompute import recomputing
from models.layers.roles import rule_for
from tests.contract.test_devices import WAITING
from tests.models import reference_hnet
from tests.models.tiny import build

SMALL = {"n_ctx": 64, "headdim": 8, "d_state": 3, "chunk_size": 4, "vocab_size": 11}
ONE = {"arch_layout": ["m1", ["T1"], "m1"], "d_model": [8, 12], "n_heads": [2, 2], "target_ratio": [3.0]}
TWO = {
    "arch_layout": ["m1", ["T1m1", ["t1"], "m1t1"], "t1m1"],
    "d_model": [8, 8, 16],
    "n_heads": [2, 2, 4],
    "d_intermediate": [0, 5, 0],
    "rotary_emb_dim": [4, 2, 2],
    "window_size": [4, 1, -1],
    "target_ratio": [2.0, 2.5],
    "ema_eps": 0.05,
}
VARIANTS = {
    "one stage": {**ONE, "headdim": 4, "tie_embeddings": True},
    "two stages": TWO,
    "fixed": {**ONE, "headdim": 4, "chunking": "fixed"},
    "two stages, fixed": {**TWO, "chunking": "fixed", "target_ratio": [2.0, 3.0]},
}
EXACT = {"rtol": 0, "atol": 1e-10}
WAYS = ("packed", "padded", "masked")


@pytest.fixture(autouse=True)
def short_buckets(monkeypatch):
    """Rows are short here: padded ones would be masked ones."""
    monkeypatch.setattr("models.hierarchy.places.BUCKET", 4)


def built(fields, **more):
    return build("hnet", **{**SMALL, **fields, **more})


def tokens_of(rows=2, length=13, seed=1):
    """Some bytes come again and again, so that not every byte opens a chunk."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, (rows, length), generator=generator).repeat_interleave(2, 1)[:, :length]


ALONE = {"n_layers": None, "num_compression_layers": None}  # arch_layout says it all


def as_lists(cfg):
    stages = cfg.stages
    return {
        "arch_layout": cfg.layout,
        "n_heads": [s.heads for s in stages],
        "rotary_emb_dim": [s.turning for s in stages],
        "window_size": [-1 if s.window is None else s.window - 1 for s in stages],
        "target_ratio": cfg.ratios,
        **{name: getattr(cfg, name) for name in ("norm_eps", "d_state", "ema_eps", "chunking")},
    }


def by_hand(model, row, ends=(), told=None):
    """(parameters, logits (T, V)) of a row whose documents end at `ends`."""
    p = {name: q.detach().clone().requires_grad_() for name, q in model.named_parameters()}
    edges = [0, *ends, len(row)]
    parts = [
        reference_hnet.logits(p, row[a:b].tolist(), as_lists(model.cfg), told) for a, b in pairwise(edges)
    ]
    return p, torch.cat(parts)[:, : model.vocab_size]


@pytest.mark.parametrize("execution", WAYS)
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_every_gradient_are_those_of_the_equations(fields, execution):
    """Of two documents in a row, whose chunks share stages and see nothing of each other."""
    model, tokens, ends, told = built(fields, chunk_execution=execution), tokens_of(1), (5,), {}
    doc_ids = torch.tensor([[0] * 5 + [1] * 8])
    offsets = torch.tensor([0, 5, 13], dtype=torch.int32)
    logits = model.logits(model(tokens, doc_ids, cu_seqlens=offsets).states)[0]
    p, expected = by_hand(model, tokens[0], ends, told)
    opened = [len(opens) for _, opens in told[0]]
    assert all(1 < n < size for n, size in zip(opened, (5, 8), strict=True)), "the check is blind"
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-9)
    targets = tokens_of(1, seed=2)[0]
    for value in (logits, expected):
        F.cross_entropy(value, targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, f"{name} has no part in the loss"
        torch.testing.assert_close(parameter.grad, p[name].grad, rtol=1e-7, atol=1e-9, msg=name)


# -- sizes, names, rates -----------------------------------------------------------------------------------------------

TWO_STAGES = ["m4", ["T1m4", ["T26"], "m4T1"], "m4"]
PUBLISHED = [
    ({"arch_layout": ["m4", ["T22"], "m4"], "d_model": [1024, 1536], "n_heads": [16, 16]}, 679_405_312),
    ({"arch_layout": ["m4", ["T24"], "m4"], "d_model": [1024, 2048], "n_heads": [16, 16]}, 1_270_833_920),
    ({"arch_layout": TWO_STAGES, "d_model": [1024, 1024, 1536], "n_heads": [16] * 3}, 874_315_264),
    (
        {
            "arch_layout": ["m4", ["T1m4", ["T27"], "m4T1"], "m4"],
            "d_model": [1024, 1536, 2048],
            "n_heads": [16] * 3,
        },
        1_603_492_224,
    ),
    ({}, 121_003_392),
    ({"arch_layout": ["m4", ["T1m4", ["T12"], "m4T1"], "m4"]}, 120_738_560),
]


def on_meta(**fields):
    with torch.device("meta"):
        return HNet(HNetConfig(**{"vocab_size": 256, **fields}))


@pytest.mark.parametrize(("fields", "total"), PUBLISHED)
def test_parameters_are_those_of_the_published_models(fields, total):
    assert sum(p.numel() for p in on_meta(**fields).parameters()) == total


def names_of_the_authors(layout, prefix, widths, number=0):
    """As `hnet/models/hnet.py` names them."""
    found = {prefix + "pad_dimension"} if number and widths[number] > widths[number - 1] else set()
    stacks = {"main_network": layout[0]} if len(layout) == 1 else {"encoder": layout[0], "decoder": layout[2]}
    of_mamba = ("dt_bias", "A_log", "D", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight")
    for stack, code in stacks.items():
        kinds = "".join(kind * int(n) for kind, n in re.findall(r"([mMtT])(\d+)", code))
        for i, kind in enumerate(kinds):
            mixer = (*of_mamba, "out_proj.weight") if kind in "mM" else ("Wqkv.weight", "out_proj.weight")
            names = ["norm1.weight", *(f"mixer.{name}" for name in mixer)]
            names += ["norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"] * kind.isupper()
            found |= {f"{prefix}{stack}.layers.{i}.{name}" for name in names}
        found.add(f"{prefix}{stack}.rmsnorm.weight")
    if len(layout) == 3:
        own = ("routing_module.q_proj_layer.weight", "routing_module.k_proj_layer.weight")
        found |= {prefix + name for name in (*own, "residual_proj.weight", "residual_proj.bias")}
        found |= names_of_the_authors(layout[1], prefix + "main_network.", widths, number + 1)
    return found


@pytest.mark.parametrize("fields", [fields for fields, _ in PUBLISHED[:4]])
def test_names_are_those_of_the_published_checkpoints(fields):
    model = on_meta(**fields)
    inside = names_of_the_authors(fields["arch_layout"], "backbone.", fields["d_model"])
    assert set(model.state_dict()) == {"embeddings.weight", "lm_head.weight"} | inside


def published(model):
    """Weights as their authors lay them: 256 rows in both tables."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        name: (256 if p.shape[0] == 384 else p.shape[0], *p.shape[1:]) for name, p in model.named_parameters()
    }
    return {name: torch.randn(*s, generator=generator, dtype=torch.float64) for name, s in shapes.items()}


def test_published_weights_are_loaded_and_their_start_is_our_start():
    model = built(TWO, vocab_size=257)
    state = published(model)
    model.from_published_state_dict(state)
    for name, p in model.named_parameters():
        assert torch.equal(p[: len(state[name])], state[name]), name
    tokens = tokens_of(1)
    found = model.logits(model(torch.cat((torch.tensor([[256]]), tokens), 1)).states)
    theirs = reference_hnet.logits(state, [254, *tokens[0].tolist()], as_lists(model.cfg))
    torch.testing.assert_close(found[0, :, :256], theirs, rtol=1e-8, atol=1e-8)
    assert torch.equal(found[..., 256], found[..., 254])


def test_weights_that_are_none_of_its_own_are_refused():
    model = built(TWO, vocab_size=257)
    before, state = {name: p.clone() for name, p in model.state_dict().items()}, published(model)
    name = "backbone.main_network.residual_proj.bias"
    for changed, words in (
        ({n: t for n, t in state.items() if n != name}, "names are not those .*residual_proj.bias"),
        ({**state, "more": state[name]}, "names are not those .*more"),
        ({**state, name: state[name][1:]}, r"residual_proj.bias: \(8,\) is needed, got \(7,\)"),
        ({**state, "lm_head.weight": torch.zeros(257, 8)}, r"lm_head.weight: \(256, 8\) is needed"),
    ):
        with pytest.raises(ValueError, match=words):
            model.from_published_state_dict(changed)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with pytest.raises(ValueError, match="nearest 257"):
        built(TWO).from_published_state_dict(state)


def test_rates_of_stages_are_those_of_the_paper():
    assert HNetConfig().lr_multipliers == pytest.approx([2.627, 0.876], abs=1e-3)
    two = HNetConfig(arch_layout=TWO_STAGES)
    assert two.lr_multipliers == pytest.approx([2.627, 1.517, 0.715], abs=1e-3)
    model = on_meta(arch_layout=TWO_STAGES)
    for name, _ in model.named_parameters():
        stage = name.count("main_network.") - (
            "main_network.layers" in name or "main_network.rmsnorm" in name
        )
        assert rule_for(model.param_roles(), name).lr_mult == two.lr_multipliers[stage], name


def test_what_does_not_decay_and_what_is_orthogonalised():
    rules, model = on_meta().param_roles(), on_meta()
    for name, parameter in model.named_parameters():
        rule = rule_for(rules, name)
        dense = parameter.ndim == 2 and "embeddings" not in name and "lm_head" not in name
        if "routing_module" in name:
            assert rule.role == "router"
        elif dense:
            assert rule.role == "matrix", name
        elif rule.role == "scalar":
            assert rule.wd_mult == 0, name
        else:
            assert rule.role in ("embedding", "head"), name


def test_operations_of_the_default_size():
    """34 million per byte outside, 41 within, at chunks of 6 bytes (chunks of 256 in the states, as in the paper)."""
    model = on_meta(chunk_size=256)
    cfg, total = model.cfg, model.flops(8192)
    within = model.backbone.main_network.flops([8192 / 6], 8192) * (1 / 6)
    attention = 4 * 768 * (8192 / 6 + 1) / 2
    by_hand_within = 15 * (8 * 768**2 + attention + 6 * 768 * 2048) / 6
    assert within.forward_per_token == pytest.approx(by_hand_within)
    assert 34e6 < total.forward_per_token - within.forward_per_token < 45e6
    fixed = on_meta(chunk_size=256, chunking="fixed").flops(8192)
    router = 2 * 2 * cfg.widths[0] ** 2  # two products
    assert total.forward_per_token - fixed.forward_per_token == pytest.approx(router, rel=1e-6)
    assert cfg.ratios == [6.0] and total.training_per_token == 3 * total.forward_per_token


# -- where it begins ---------------------------------------------------------------------------------------------------


def test_it_begins_as_the_authors_code_does():
    model = build(
        "hnet", torch.float32, std=None, vocab_size=256, d_model=[256, 512], n_heads=[4, 8], n_layers=3
    )
    stds = {name: float(p.detach().std()) for name, p in model.named_parameters()}
    assert stds["embeddings.weight"] == pytest.approx(1, rel=0.05)
    inner = "backbone.main_network.main_network.layers.0."
    for name, std in {
        "lm_head.weight": 0.02,
        "backbone.encoder.layers.0.mixer.in_proj.weight": 0.02,
        # Eight mixers outside; within, three layers that write twice.
        "backbone.decoder.layers.3.mixer.out_proj.weight": 0.02 / 8**0.5,
        inner + "mixer.out_proj.weight": 0.02 / 14**0.5,
        inner + "mlp.fc2.weight": 0.02 / 14**0.5,
        inner + "mlp.fc1.weight": 0.02,
    }.items():
        assert stds[name] == pytest.approx(std, rel=0.05), name
    named = dict(model.named_parameters())
    for name in ("residual_proj.weight", "residual_proj.bias", "main_network.pad_dimension"):
        assert not named[f"backbone.{name}"].any()
    for name in ("q", "k"):
        weight = named[f"backbone.routing_module.{name}_proj_layer.weight"]
        assert torch.equal(weight, torch.eye(256))


# -- chunks ------------------------------------------------------------------------------------------------------------


class Given(torch.nn.Module):
    """A router that has made up its mind: `p` of every place of the row."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x, begins, places, valid=None, last=None):
        return Routed.by(self.p.expand(x.shape[:2]), valid, x[:, -1])


def with_boundaries(p, **fields):
    model = built({**ONE, "headdim": 4}, **fields)
    model.backbone.routing_module = Given(torch.as_tensor(p, dtype=torch.float64)[None])
    return model


def parts_of(model, tokens):
    """What goes into the decoder, what the stage within made of every chunk, and what was added."""
    seen = {}
    stage = model.backbone
    hooks = [
        stage.encoder.register_forward_hook(lambda m, i, o: seen.update(encoded=o)),
        stage.main_network.register_forward_hook(lambda m, i, o: seen.update(inner=o)),
        stage.decoder.register_forward_pre_hook(lambda m, i: seen.update(decoded=i[0])),
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()
    residual = F.linear(seen["encoded"], stage.residual_proj.weight, stage.residual_proj.bias)
    return seen["decoded"] - residual, seen["inner"]


def test_where_every_byte_opens_a_chunk_nothing_is_smoothed():
    tokens = tokens_of(1)
    plain, inner = parts_of(with_boundaries([1.0] * 13, ema_eps=0.0), tokens)
    torch.testing.assert_close(plain, inner, **EXACT)
    smooth, inner = parts_of(with_boundaries([1.0] * 13, ema_eps=1e-4), tokens)
    assert (smooth - inner).norm() / inner.norm() < 2e-4


def test_sure_boundaries_copy_the_starts_of_chunks():
    p = [1.0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1]
    copied, inner = parts_of(with_boundaries(p, ema_eps=0.0), tokens_of(1))
    chunk = (torch.tensor(p).cumsum(0) - 1).long()
    torch.testing.assert_close(copied[0], inner[0, chunk], **EXACT)


PATTERNS = {
    "all": [1] * 9,
    "first alone": [1] + [0] * 8,
    "last": [1] + [0] * 7 + [1],
    "some": [1, 0, 1, 1, 0, 0, 1, 0, 0],
    "one byte": [1],
}


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_all_ways_of_laying_chunks_agree(pattern, way):
    p = torch.tensor(pattern) * 0.3 + 0.4
    tokens = tokens_of(2, len(pattern))
    found = [with_boundaries(p, chunk_execution=of) for of in ("packed", way)]
    for model in found:
        model(tokens).states.square().sum().backward()
    one, other = (model(tokens) for model in found)
    torch.testing.assert_close(one.states, other.states, **EXACT)
    for name, told in one.extra.items():
        torch.testing.assert_close(told, other.extra[name], **EXACT)
    for (name, p), q in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(("way", "places"), list(zip(WAYS, [(1, 6), (2, 4), (2, 13)], strict=True)))
def test_there_is_room_for_the_chunks_that_there_are(way, places):
    """Three in each row of 13 bytes: end to end, in whole fours, or one a byte."""
    model, shapes = with_boundaries([1.0, *[0] * 7, 1, 1, 0, 0, 0], chunk_execution=way), []
    model.backbone.main_network.register_forward_pre_hook(lambda m, given: shapes.append(given[0].shape[:2]))
    model(tokens_of(2))
    assert shapes == [places]


@pytest.mark.parametrize(("way", "waits"), list(zip(WAYS, [1, 1, 0], strict=True)))
@pytest.mark.parametrize("fields", [ONE, TWO], ids=["one stage", "two stages"])
def test_the_host_is_told_once_for_each_stage_how_many_chunks_there_are(fields, way, waits, monkeypatch):
    """In forward and backward; and nothing is done byte by byte."""
    model = built({**fields, "n_ctx": 1024, "chunk_size": 64}, headdim=4, chunk_execution=way)
    found, as_list = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: found.append("tolist") or as_list(t))
    operations = []
    for module in model.modules():  # on a CPU the convolution looks for where documents begin
        if hasattr(module, "kernels"):
            module.kernels = Kernels({"causal_conv1d": "reference"})

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            found.append(operation._schema.name.removeprefix("aten::"))
            return operation(*args, **(kwargs or {}))

    for length in (256, 512):
        found.clear()
        with Recorded():
            model(tokens_of(1, length).clone()).states.sum().backward()
        told = [name for name in found if name == "tolist" or name in WAITING]
        assert len(told) == waits * len(model.cfg.ratios), told
        operations.append(len(found))
    # Of chunks and blocks there are some; one loop over places, forward and backward, has nine for each.
    assert operations[1] - operations[0] < 4 * 256


def test_rows_that_open_unequally_many_chunks_equal_rows_alone():
    """A run of one byte beside others, in two stages: of a trained model it may open a chunk at every byte."""
    model, tokens = built(TWO), torch.cat((tokens_of(2), torch.full((1, 13), 7), torch.arange(13)[None] % 11))
    for way in WAYS:
        model.cfg = model.cfg.model_copy(update={"chunk_execution": way})
        together = model(tokens)
        for row in range(4):
            alone = model(tokens[row : row + 1])
            torch.testing.assert_close(together.states[row], alone.states[0], **EXACT)
            for name, told in alone.extra.items():
                torch.testing.assert_close(together.extra[name][:, row], told[:, 0], **EXACT)
    assert len(set(together.extra["opened"][0].tolist())) > 1, "the check is blind"


def test_empty_places_open_no_chunks_of_chunks():
    """Of three stages: those within would count them."""
    three = ["m1", ["m1", ["m1", ["t1"], "m1"], "m1"], "m1"]
    sizes = {"arch_layout": three, "d_model": [8] * 4, "n_heads": [2] * 4, "target_ratio": 2.0}
    packed, *others = (built(sizes, chunk_execution=way)(tokens_of(3)) for way in WAYS)
    for other in others:
        torch.testing.assert_close(packed.states, other.states, **EXACT)
        for name, told in packed.extra.items():
            torch.testing.assert_close(told, other.extra[name], **EXACT)
    assert (packed.extra["opened"][2] < packed.extra["places"][2]).any(), "the check is blind"


@pytest.mark.parametrize("fields", [TWO, {**ONE, "headdim": 4}], ids=["two stages", "one stage"])
def test_a_later_byte_moves_no_boundary_and_no_state_before_it(fields):
    model, tokens = built(fields), tokens_of(1)
    before = model(tokens)
    for place in (1, 4, 9, 12):
        changed = tokens.clone()
        changed[0, place] = 9
        after = model(changed)
        torch.testing.assert_close(after.states[:, :place], before.states[:, :place], **EXACT)
        assert not torch.allclose(after.states[:, place:], before.states[:, place:])
    x = model.embeddings.weight[tokens].detach().requires_grad_()
    model.embeddings.forward = lambda tokens: x
    model(tokens).states[0, 5].sum().backward()
    assert not x.grad[0, 6:].any() and x.grad[0, 5].any()


@pytest.mark.parametrize("execution", WAYS)
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_the_last_byte_of_a_document_changes_nothing_of_the_next_one(fields, execution):
    """Bit for bit where as many chunks are opened, else to rounding: those of the next one stand elsewhere. Text that
    is continued has one document, and says so."""
    model, tokens = built(fields, chunk_execution=execution), tokens_of(1)
    doc_ids, alike = torch.tensor([[3] * 5 + [0] * 8]), 0
    with torch.no_grad():
        before = model(tokens, doc_ids)
        for byte in range(11):
            changed = tokens.clone()
            changed[0, 4] = byte
            after = model(changed, doc_ids)
            torch.testing.assert_close(after.states[:, 5:], before.states[:, 5:], **EXACT)
            assert torch.equal(after.extra["boundaries"][..., 5:], before.extra["boundaries"][..., 5:])
            moved = not torch.equal(after.states[:, 4], before.states[:, 4])
            assert moved == (byte != tokens[0, 4])
            if moved and torch.equal(after.extra["opened"], before.extra["opened"]):
                assert torch.equal(after.states[:, 5:], before.states[:, 5:])
                alike += 1
    assert alike, "the check is blind"
    with pytest.raises(ValueError, match="doc_ids"):
        model(tokens, doc_ids, cache=model.init_cache(1))


def test_two_stages_are_one_around_another():
    """The stage within, given the outer's chunks as bytes of its own, makes the same of them."""
    model, tokens = built(TWO), tokens_of(1)
    given = {}
    stage = model.backbone.main_network
    hook = stage.register_forward_hook(lambda m, i, o: given.update(x=i[0], out=o))
    model(tokens)
    hook.remove()
    cfg = HNetConfig(
        **{
            **SMALL,
            **{name: value[1:] for name, value in TWO.items() if isinstance(value, list)},
            "arch_layout": TWO["arch_layout"][1],
            "ema_eps": 0.05,
        }
    )
    alone = HNet(cfg).double().eval()
    alone.backbone.load_state_dict(stage.state_dict())
    alone.embeddings.forward = lambda tokens: given["x"]
    out = alone(torch.zeros(given["x"].shape[:2], dtype=torch.int64)).states
    torch.testing.assert_close(out, given["out"], **EXACT)


def test_an_untrained_router_compares_neighbours_as_they_are():
    router, x = Router(5).double(), torch.randn(2, 7, 5, dtype=torch.float64)
    router.init_weights()
    begins = torch.zeros(2, 7, dtype=torch.bool)
    begins[:, 0] = begins[1, 3] = True
    p = router(x, begins, None).p
    expected = (1 - F.cosine_similarity(x[:, :-1], x[:, 1:], dim=-1)) / 2
    assert p[0, 0] == 1 and p[1, 3] == 1
    torch.testing.assert_close(p[0, 1:], expected[0], **EXACT)


def test_decisions_and_residuals_are_made_in_fp32_whatever_is_around_them(monkeypatch):
    router = Router(16)
    with torch.no_grad():
        for p in router.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    begins = torch.zeros(2, 9, dtype=torch.bool)
    begins[:, 0] = True
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x, begins, None).p
    expected = router.double()(x.double(), begins, None).p
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)

    residuals = []
    plain = models.hierarchy.stage.upsample

    def told(z, chunk, scale, residual, **more):
        residuals.append(residual.dtype)
        return plain(z, chunk, scale, residual, **more)

    monkeypatch.setattr("models.hierarchy.stage.upsample", told)
    model = built({})
    with torch.autocast("cpu", torch.bfloat16):
        model.float()(tokens_of())
    assert residuals == [torch.float32]


class NearTies(torch.nn.Module):
    """A router whose every decision hangs on the last digit, and falls the other way whenever it is made again."""

    def __init__(self, router):
        super().__init__()
        self.router, self.calls = router, 0

    def forward(self, x, begins, places, valid=None, last=None):
        p, _, _, last = self.router(x, begins, places, valid, last)
        self.calls += 1
        half = torch.tensor(0.5, dtype=p.dtype)
        above = torch.nextafter(half, half + 1)
        opens = (p > 0.5) if self.calls == 1 else (p <= 0.5)
        p = torch.where(opens, above, half).masked_fill(begins, 1.0) + (p - p.detach())
        return Routed.by(p, valid, last)


@pytest.mark.parametrize("execution", WAYS)
def test_boundaries_are_decided_once_where_activations_are_recomputed(execution):
    """In every stage; of what is computed anew nothing asks a router again."""
    tokens, found = tokens_of(2), []
    for recompute in (False, True):
        model = built(TWO, chunk_execution=execution).train()
        stages = [model.backbone, model.backbone.main_network]
        for stage in stages:
            stage.routing_module = NearTies(stage.routing_module)
        for path in model.blocks() if recompute else ():
            block = model.get_submodule(path)
            block.forward = recomputing(block)
        out = model(tokens)
        assert all(1 < n < 13 for n in out.extra["opened"].flatten().tolist()), "the check is blind"
        out.states.square().sum().backward()
        assert [stage.routing_module.calls for stage in stages] == [1, 1]
        found.append({name: p.grad for name, p in model.backbone.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-10, msg=name)


def test_three_ways_lead_back_to_the_router_and_no_other():
    """The weights of the average (of what opened a chunk), the confidence (of every byte), and the mean probability."""
    p = torch.tensor([1.0, 0.2, 0.7, 0.3, 0.6, 0.1, 0.9], dtype=torch.float64)
    opens = p > 0.5

    def gradient(of, **fields):
        leaf = p.clone().requires_grad_()
        model = built({**ONE, "headdim": 4}, **fields)
        model.backbone.routing_module = Given(leaf[None])
        of(model, model(tokens_of(1, 7))).backward()
        return leaf.grad

    ratio = gradient(lambda model, out: out.extra["probability"].sum())
    assert torch.equal(ratio, torch.ones_like(p))
    both = gradient(lambda model, out: out.states.square().sum())
    assert (both != 0).all()

    def without_confidence(model, monkey):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("models.hierarchy.stage.straight_through", torch.ones_like)
            return gradient(lambda model, out: out.states.square().sum())

    average = without_confidence(None, None)
    assert (average[~opens] == 0).all() and (average[opens][1:] != 0).all()


# -- text as it comes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("sizes", [[13], [1] * 13, [4, 1, 1, 7], [12, 1]], ids=str)
def test_text_in_pieces_equals_text_as_a_whole(fields, sizes):
    """Rows open their chunks at different times."""
    model, tokens = built(fields), torch.cat((tokens_of(3), torch.full((1, 13), 4)))
    cache, found = model.init_cache(4), []
    with torch.no_grad():
        for piece in tokens.split(sizes, 1):
            found.append(model(piece, cache=cache).states)
        whole = model(tokens)
    torch.testing.assert_close(torch.cat(found, 1), whole.states, **EXACT)
    if model.cfg.chunking == "dynamic":
        assert len(set(whole.extra["opened"][0].tolist())) > 1, "the check is blind"


def test_rows_leave_and_what_was_tried_is_taken_back():
    model, tokens = built(TWO), tokens_of(4)
    tokens[3] = tokens[3, 0]  # a run of one byte has its own number of chunks
    with torch.no_grad():
        whole = model(tokens).states
        cache = model.init_cache(4)
        model(tokens[:, :5], cache=cache)
        for _ in range(2):
            kept = cache.snapshot()
            model((tokens[:, 5:9] + 3) % 11, cache=cache)
            cache.restore(kept)
        assert any(counts[[3, 1]].tolist() != counts[:2].tolist() for counts in cache.counts.values())
        cache.select(torch.tensor([3, 1]))
        rest = model(tokens[[3, 1], 5:], cache=cache).states
    torch.testing.assert_close(rest, whole[[3, 1], 5:], **EXACT)
    assert cache.length == 13


def test_only_rows_that_open_a_chunk_go_through_the_stage_within():
    model, tokens = built({**ONE, "headdim": 4}), tokens_of(5)
    opened, rows, inner = [], [], model.backbone.main_network
    step = inner.step
    inner.step = lambda x, at: rows.append(at.here.tolist()) or step(x, at)
    with torch.no_grad():
        cache = model.init_cache(5)
        for piece in tokens.split(1, 1):
            rows.clear()
            model(piece, cache=cache)
            opened.append({row for group in rows for row in group})
        whole = model(tokens).extra["opened"][0]
    assert [sum(row in here for here in opened) for row in range(5)] == whole.tolist()
    assert opened[0] == set(range(5)) and any(here != set(range(5)) for here in opened)


# -- fields ------------------------------------------------------------------------------------------------------------


def test_short_words_mean_what_the_lists_say():
    short = HNetConfig(num_compression_layers=3, n_layers=7, d_model=768, n_heads=12, compression_ratio=0.25)
    assert (short.layout, short.widths, short.heads) == (["m3", ["T7"], "m3"], [512, 768], [8, 12])
    assert short.ratios == [4.0] and short.stages[1].hidden == 2048
    assert [s.turning for s in short.stages] == [32, 32] and [s.window for s in short.stages] == [1024, None]


def test_the_authors_word_for_the_layers_within_is_read():
    _, cfg = compose(["model=hnet", "preset=none", "model_cfg.num_main_layers=7"], notify=lambda text: None)
    assert cfg.n_layers == 7


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"arch_layout": ["m1", ["T1"], "m1"], "n_layers": 2, "num_compression_layers": None},
            "both say how many layers .*Nearest: n_layers=null",
        ),
        (
            {"compression_ratio": 0.5, "target_ratio": 2.0},
            "both say how long .*Nearest: compression_ratio=null",
        ),
        ({**ALONE, "arch_layout": ["T4"]}, "cuts no chunks"),
        ({"n_layers": None}, "n_layers and model_cfg.arch_layout are both null.*Nearest: n_layers=15"),
        ({"target_ratio": [2.0, 2.0]}, r"2 numbers, and .* 1 stages that cut chunks. Nearest: \[2.0\]"),
        ({"d_model": [512, 512, 768]}, r"has 3 numbers.*Nearest: \[512, 512\]"),
        ({"d_model": [768, 576]}, r"must not fall .*Nearest: \[576, 768\]"),
        (
            {"d_model": [500, 768]},
            r"\(2 \* 500\) must be divisible by model_cfg.headdim \(64\). Nearest: headdim=50",
        ),
        ({"n_heads": [None, 11]}, "divisible by its heads.*Nearest: 12"),
        (
            {"n_heads": [8, 12]},
            r"n_heads \(\[8, 12\]\) has a number for stage 0.*attention.*Nearest: \[null, 12\]",
        ),
        ({"n_heads": [None, None]}, "is null for stage 1, which has attention. Nearest: 12"),
        ({"window_size": [7, -1]}, r"window_size .*stage 0.*Nearest: \[null, -1\]"),
        ({"d_intermediate": [64, 128]}, r"d_intermediate .*stage 0.*feed-forward.*Nearest: \[0, 128\]"),
        ({"rotary_emb_dim": [32, 32]}, r"rotary_emb_dim .*stage 0.*Nearest: \[null, 32\]"),
        ({"rotary_emb_dim": [None, 66]}, "at most the width of a head .*Nearest: 64"),
        ({"d_intermediate": [0, 0]}, "d_intermediate of stage 1 is 0.*Nearest: 2048"),
        ({"chunking": "fixed", "target_ratio": 2.5}, "target_ratio of stage 0.* whole number.*Nearest: 2"),
        (
            {"chunking": "fixed", "compression_ratio": 0.3},
            "compression_ratio .0.3. must .* whole number.*Nearest: target_ratio=3 and compression_ratio=null",
        ),
        ({"n_heads": []}, "has 0 numbers.*Nearest: 12"),
        ({"window_size": []}, "has 0 numbers.*Nearest: null"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    found = HNetConfig(**fields).problems(None)
    assert len(found) == 1 and re.search(words, found[0]), found


@pytest.mark.parametrize("layout", [["m4", "T1", "m4"], ["m4", ["T1"]], [], ["x2"], ["m0"], ["m"], [["T1"]]])
def test_a_layout_that_is_none_is_refused(layout):
    with pytest.raises(ValueError, match="such as"):
        HNetConfig(arch_layout=layout)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ema_eps=0.5", "model_cfg.ema_eps: must satisfy 0 <= ema_eps < 0.5, got 0.5"),
        ("target_ratio=1", "model_cfg.target_ratio: must satisfy 1 < target_ratio, got 1"),
        ("lr_multiplier=1", "model_cfg.lr_multiplier: expected 'auto' or list, got 1"),
        ("d_model=[0,64]", "model_cfg.d_model.0: must satisfy 1 <= d_model.0, got 0"),
    ],
)
def test_what_is_out_of_range_is_refused_by_its_name(word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(["model=hnet", f"model_cfg.{word}"], notify=lambda text: None)


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        (["t1", ["T1"], "t1"], {"d_state", "expand", "d_conv", "chunk_size"}),
        (["m1", ["M1"], "m1"], {"n_heads", "rotary_emb_dim", "window_size"}),
        (["m1", ["t1"], "m1"], {"d_intermediate"}),
        (["m1", ["T1"], "m1"], set()),
    ],
)
def test_what_no_layer_reads_is_told_of(layout, fields):
    assert HNetConfig(**ALONE, arch_layout=layout).unread().keys() == fields


def test_fixed_chunks_have_no_router_and_no_loss():
    model = built({**ONE, "headdim": 4, "chunking": "fixed"})
    assert not [name for name, _ in model.named_parameters() if "routing_module" in name]
    assert {"ratio_loss_weight", "ratio_over"} <= model.cfg.unread().keys()
    opened = model(tokens_of(2)).extra["opened"]
    assert opened.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("preset", ["nano", "small"])
def test_a_preset_is_that_of_the_innermost_stage(preset):
    _, cfg = compose(["model=hnet", f"preset={preset}"], notify=lambda text: None)
    inner = cfg.stages[-1]
    assert (len(inner.layers[0]), inner.width) == {"nano": (4, 192), "small": (6, 384)}[preset]
    assert cfg.stages[0].layers == ("mm", "mm") and cfg.widths[0] == 2 * inner.width // 3


def test_the_average_is_that_of_a_loop_and_of_state_space_duality():
    """The last as the authors compute it: step sizes are logarithms of what is left, one state a channel."""
    generator = torch.Generator().manual_seed(0)
    z, p = (torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((2, 70, 5), (2, 70)))
    found = smoothed(z, p, None, 1e-4, Kernels())
    weight, state, loop = p.clamp(1e-4, 1 - 1e-4)[..., None], torch.zeros(2, 5, dtype=torch.float64), []
    for t in range(70):
        state = weight[:, t] * z[:, t] + (1 - weight[:, t]) * state
        loop.append(state)
    torch.testing.assert_close(found, torch.stack(loop, 1), **EXACT)
    steps = -torch.log(1 - weight)  # (2, 70, 1)
    dual, _ = ssd(
        (z / steps)[:, :, None],
        steps.expm1().log(),  # softplus makes the steps of it
        -torch.ones(1, dtype=torch.float64),
        weight[..., None],
        torch.ones_like(weight)[..., None],
        chunk=16,
        kernels=Kernels(),
    )
    torch.testing.assert_close(found, dual[:, :, 0], **EXACT)


def test_the_ways_of_the_average_agree():
    model, tokens = built({**ONE, "headdim": 4}), tokens_of(2)
    found = []
    for name in ("reference", "chunked"):
        for module in model.modules():
            if hasattr(module, "kernels"):
                module.kernels = Kernels({"linear_scan": name})
        found.append(model(tokens).states)
    torch.testing.assert_close(*found, **EXACT)


@pytest.mark.slow
def test_compiled_blocks_take_padded_chunks_in_few_shapes(monkeypatch):
    """Room for chunks in whole 128s: texts of other numbers of chunks compile a block once more, with sizes that vary,
    and then no more. Values and gradients are the eager ones."""
    monkeypatch.setattr("models.hierarchy.places.BUCKET", 128)
    model = built({**ONE, "headdim": 4, "chunk_size": 64}, n_ctx=1024)
    router, graphs, rooms = Spaced(), [], []
    model.backbone.routing_module = router
    model.backbone.main_network.register_forward_pre_hook(lambda m, given: rooms.append(given[0].shape[1]))

    def states_and_gradients(tokens):
        model.zero_grad()
        states = model(tokens).states
        states.square().sum().backward()
        return [states, *(p.grad for p in model.parameters() if p.grad is not None)]

    tokens, eager = tokens_of(2, 600), []
    for router.every in (2, 3, 6, 20):
        eager.append(states_and_gradients(tokens))
    assert rooms == [600, 400, 200, 60], "packed: of two rows"
    rooms.clear()
    for path in model.blocks():
        model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    counters.clear()
    for router.every, expected in zip((2, 3, 6, 20), eager, strict=True):
        for a, b in zip(states_and_gradients(tokens), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
        graphs.append(counters["stats"]["unique_graphs"])
    assert rooms == [384, 256, 128, 128]
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3], graphs


class Spaced(torch.nn.Module):
    """A router that opens every so many places."""

    every = 1

    def forward(self, x, begins, places, valid=None, last=None):
        p = 0.4 + 0.3 * (torch.arange(x.shape[1]) % self.every == 0).to(x.dtype)
        return Routed.by(p.expand(x.shape[:2]), valid, x[:, -1])
