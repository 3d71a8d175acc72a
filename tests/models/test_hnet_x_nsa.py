"""H-Net with native sparse attention to its chunks: both papers' equations, a dense H-Net's weights, documents that
begin anywhere, the baseline of chunks of one length, text whose rows open chunks at different times."""

import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from configs import compose
from kernels.choose import Kernels
from models.hierarchy.sparse import ChunkAttention
from models.hnet_x_nsa import HNetXNSA, HNetXNSAConfig
from models.layers.recompute import recomputing
from models.layers.roles import rule_for
from tests.contract.test_devices import WAITING
from tests.models import reference_hnet, reference_nsa
from tests.models.tiny import build

SMALL = {
    **{"n_ctx": 64, "headdim": 8, "d_state": 3, "chunk_size": 4, "vocab_size": 11, "ema_eps": 0.05},
    **{"d_model": [8, 12], "n_compress_decompress_layers": 1, "compression_decompress_size": 2.0},
    **{"stage_layout": "m1", "n_inner_layers": 2, "d_intermediate": [0, 5], "headdim": 4},
    **{"n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "gate_hidden_dim": 3, "sliding_window": 3},
    **{"compress_block_size": 2, "compress_stride": 1, "selection_block_size": 2, "num_selected_blocks": 3},
}
TWO = {
    **{"n_compress_decompress_layers": 2, "compression_decompress_size": 4.0},
    **{"d_model": [8, 8, 12], "d_intermediate": [0, 0, 5]},
}
LONG = {"compress_block_size": 4, "compress_stride": 2, "selection_block_size": 4}
VARIANTS = {
    "one stage": {},
    "two stages": {**TWO, "tie_embeddings": True},
    "fixed": {**LONG, "chunking": "fixed", "num_init_blocks": 0, "num_selected_blocks": 2},
    "outside too": {
        **{"stage_layout": "m1t1", "nsa_stages": ["main", 0], "v_head_dim": 6, "compress_rope": True},
    },
    "means": {"compression": "mean", "compress_stride": None, "share_branch_kv": True, "gate_hidden_dim": 0},
}
EXACT = {"rtol": 0, "atol": 1e-10}
LENGTH = 31
WAYS = ("packed", "padded", "masked")


@pytest.fixture(autouse=True)
def short_buckets(monkeypatch):
    """Rows are short here: padded ones would be masked ones."""
    monkeypatch.setattr("models.hierarchy.places.BUCKET", 4)


def built(fields=(), **more):
    return build("hnet_x_nsa", **{**SMALL, **dict(fields), **more})


def tokens_of(rows=1, length=LENGTH, seed=1):
    """Some bytes come again and again, so that not every byte opens a chunk."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, (rows, length), generator=generator).repeat_interleave(2, 1)[:, :length]


def logits_of(model, tokens, **more):
    with torch.no_grad():
        return model.logits(model(tokens, **more).states)


def with_documents(model, tokens, lengths):
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return logits_of(model, tokens, doc_ids=ids, cu_seqlens=offsets)


def by_hand(model, tokens, told):
    """Logits (T, V) of one document: H-Net's equations, whose sparse stages have the other paper's."""

    def attention(cfg):
        def attended(x, weights):
            arrays = {name: w.numpy() for name, w in weights.items()}
            return torch.from_numpy(reference_nsa.attention(cfg, arrays, x.numpy()))

        return attended

    stages = model.cfg.stages
    cfg = {
        "arch_layout": model.cfg.layout,
        "target_ratio": model.cfg.ratios,
        "attention": {n: attention(s.sparse) for n, s in enumerate(stages) if s.sparse is not None},
        **{name: getattr(model.cfg, name) for name in ("norm_eps", "d_state", "ema_eps", "chunking")},
        "pools": model.cfg.chunking == "fixed",
    }
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return reference_hnet.logits(weights, tokens.tolist(), cfg, told)[:, : model.vocab_size]


@pytest.mark.parametrize(
    ("fields", "execution"),
    [*((fields, "packed") for fields in VARIANTS.values()), (VARIANTS["two stages"], "masked")],
    ids=[*VARIANTS, "two stages, masked"],
)
def test_logits_are_those_of_both_papers_equations(fields, execution):
    """Of two documents in a row, whose blocks of chunks are none of each other's."""
    model, tokens, told = built(fields, chunk_execution=execution), tokens_of(), {}
    found = with_documents(model, tokens, [20, 11])[0]
    expected = torch.cat([by_hand(model, part, told) for part in tokens[0].split([20, 11])])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    places = [
        20,
        *(len(of_stage[0][1]) for of_stage in told.values()),
    ]  # of the first document, in each stage
    most = max(n for n, stage in zip(places, model.cfg.stages, strict=True) if stage.sparse is not None)
    cfg = model.cfg
    assert most > cfg.num_selected_blocks * cfg.selection_block_size, (
        "the check is blind: nothing is left out"
    )
    assert 1 < len(told[0][1][1]) < 11, "the check is blind"


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_all_is_the_same_whatever_the_way_of_laying(fields):
    """States, what is told of chunks, and gradients; of rows with unequally many chunks."""
    tokens = torch.cat((tokens_of(2), torch.full((1, LENGTH), 7)))
    models = [built(fields, chunk_execution=way) for way in WAYS]
    outputs = [model(tokens) for model in models]
    for model, output in zip(models, outputs, strict=True):
        model.logits(output.states).square().sum().backward()
        torch.testing.assert_close(output.states, outputs[0].states, **EXACT)
        assert all(torch.allclose(output.extra[name], told) for name, told in outputs[0].extra.items())
    for name, p in models[0].named_parameters():
        assert p.grad.abs().max() > 0, f"{name} has no part"
        for other in models[1:]:
            torch.testing.assert_close(p.grad, other.get_parameter(name).grad, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize(("way", "waits"), list(zip(WAYS, [1, 1, 0], strict=True)))
@pytest.mark.parametrize("fields", [TWO, {**TWO, "chunking": "fixed"}], ids=["cut", "fixed"])
def test_the_host_is_told_once_for_each_stage_how_many_chunks_there_are(fields, way, waits, monkeypatch):
    """In forward and backward; sparse attention asks for nothing more."""
    model = built({**fields, **LONG, "n_ctx": 1024, "chunk_size": 64}, chunk_execution=way)
    found, as_list = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: found.append("tolist") or as_list(t))
    for module in model.modules():  # on a CPU the convolution looks for where documents begin
        if hasattr(module, "kernels"):
            module.kernels = Kernels({"causal_conv1d": "reference"})

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            found.append(operation._schema.name.removeprefix("aten::"))
            return operation(*args, **(kwargs or {}))

    with Recorded():
        model(tokens_of(2, 128)).states.sum().backward()
    told = [name for name in found if name == "tolist" or name in WAITING]
    assert len(told) == 2 * waits, told


# -- a dense H-Net -----------------------------------------------------------------------------------------------------

DENSE = {
    "n_kv_heads": 4,
    "head_dim": 4,
    "d_model": [8, 16],
    "d_intermediate": [0, 5],
    "num_selected_blocks": 9,
}


def dense_and_sparse(turning, **more):
    fields = {
        name: SMALL[name] for name in ("n_ctx", "headdim", "d_state", "chunk_size", "vocab_size", "ema_eps")
    }
    dense = build(
        *("hnet",),
        **{**fields, "d_model": [8, 16], "n_heads": [2, 4], "d_intermediate": [0, 5], "target_ratio": 2.0},
        **{"num_compression_layers": 1, "n_layers": 2, "rotary_emb_dim": [4, turning]},
    )
    return dense, built(DENSE, rotary_emb_dim=turning, **more)


def only_selected(model):
    for module in model.modules():
        if isinstance(module, ChunkAttention):
            with torch.no_grad():
                module.g_proj.out.weight.zero_()
                bias = torch.tensor([-torch.inf, torch.inf, -torch.inf]).repeat(module.cfg.n_heads)
                module.g_proj.out.bias.copy_(bias)


@pytest.mark.parametrize("turning", [4, 2])
def test_all_blocks_selected_and_nothing_else_are_a_dense_h_net(turning):
    """Logits, and gradients of all that both have."""
    dense, sparse = dense_and_sparse(turning)
    fresh = {name: p.clone() for name, p in sparse.state_dict().items()}
    sparse.from_dense(dense)
    changed = {name for name, p in sparse.state_dict().items() if not torch.equal(p, fresh[name])}
    others = {n for n in fresh if re.search(r"compress_[kv]|g_proj", n)}
    assert changed == set(fresh) - others
    for name in changed:
        if name.endswith(("k_proj.weight", "v_proj.weight")) and "mixer" in name:
            same = [
                torch.equal(*pair)
                for pair in zip(sparse.state_dict()[name].chunk(3), fresh[name].chunk(3), strict=True)
            ]
            assert same == [True, False, True], name
    only_selected(sparse)
    tokens = tokens_of(2)
    torch.testing.assert_close(logits_of(sparse, tokens), logits_of(dense, tokens), **EXACT)
    for model in (dense, sparse):
        model.logits(model(tokens).states).square().sum().backward()
    of_sparse = dict(sparse.named_parameters())
    for name, p in dense.named_parameters():
        if "Wqkv" in name:
            q, k, v = (of_sparse[name.replace("Wqkv", f"{part}_proj")].grad for part in "qkv")
            grad = torch.cat((q, k.chunk(3)[1], v.chunk(3)[1]))
        else:
            inner = "main_network.main_network" in name
            grad = of_sparse[name.replace("out_proj", "o_proj") if inner else name].grad
        torch.testing.assert_close(p.grad, grad, rtol=1e-8, atol=1e-8, msg=name)
    fewer = dense_and_sparse(turning, num_selected_blocks=3)[1]
    fewer.from_dense(dense)
    only_selected(fewer)
    assert not torch.allclose(logits_of(fewer, tokens), logits_of(dense, tokens))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"n_kv_heads": 2}, r"n_kv_heads=4 \(not 2\)"),
        ({"rotary_emb_dim": 2}, r"rotary_emb_dim=4 \(not 2\)"),
        ({"share_branch_kv": True}, "share_branch_kv=False"),
        ({"n_inner_layers": 3}, "this H-Net"),
        ({"d_intermediate": [0, 300]}, "this H-Net"),
    ],
)
def test_a_dense_h_net_that_does_not_fit_is_refused(fields, words):
    dense, _ = dense_and_sparse(4)
    sparse = built(DENSE, **{"rotary_emb_dim": 4, **fields})
    before = {name: p.clone() for name, p in sparse.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        sparse.from_dense(dense)
    assert all(torch.equal(p, before[name]) for name, p in sparse.state_dict().items())


# -- causality, documents ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["packed", "masked"])
def test_a_later_byte_changes_nothing_before_it(way):
    """At every place: within a chunk, at its edges, and at those of blocks of chunks."""
    model, tokens = built(chunk_execution=way), tokens_of(length=19)
    before = logits_of(model, tokens)
    for place in range(19):
        changed = tokens.clone()
        changed[0, place] = 9
        after = logits_of(model, changed)
        torch.testing.assert_close(after[:, :place], before[:, :place], **EXACT)
        assert not torch.allclose(after[:, place:], before[:, place:])


@pytest.mark.parametrize(
    ("fields", "way"),
    [*((fields, "packed") for fields in VARIANTS.values()), ({}, "masked")],
    ids=[*VARIANTS, "one stage, masked"],
)
def test_packed_documents_are_what_they_are_alone(fields, way):
    """Of chunks of one length the second begins at every place of a block of them; some are shorter than any block."""
    model, tokens = built(fields, chunk_execution=way), tokens_of()
    some = range(10, 18) if model.cfg.chunking == "fixed" else range(12, 16)
    for lengths in [
        *([n, LENGTH - n] for n in some),
        [2, 1, 14, 3, 11],
        [30, 1],
    ]:
        alone = torch.cat([logits_of(model, part) for part in tokens.split(lengths, 1)], 1)
        torch.testing.assert_close(with_documents(model, tokens, lengths), alone, **EXACT)


def test_padded_documents_are_what_they_are_alone():
    """The second begins anywhere."""
    model, tokens = built(n_inner_layers=1, chunk_execution="padded"), tokens_of(length=20)
    for first in range(1, 20):
        alone = torch.cat([logits_of(model, part) for part in tokens.split([first, 20 - first], 1)], 1)
        torch.testing.assert_close(with_documents(model, tokens, [first, 20 - first]), alone, **EXACT)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_rows_shorter_than_a_summary_are_told_0_by_it(length):
    model, seen = built(LONG), []
    for module in model.modules():
        if isinstance(module, ChunkAttention):
            compressed = module._compressed
            module._compressed = lambda *a, real=compressed: seen.append(real(*a)) or seen[-1]
    states = model(tokens_of(2, length)).states
    states.square().sum().backward()
    assert all(not o.any() for o, _ in seen) and len(seen) == 2 and states.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_rows_with_unequally_many_chunks_are_rows_alone():
    model, tokens = built(), torch.cat((tokens_of(2), torch.full((1, LENGTH), 7)))
    together = model(tokens)
    for row in range(3):
        torch.testing.assert_close(together.states[row], model(tokens[row : row + 1]).states[0], **EXACT)
    assert len(set(together.extra["opened"][0].tolist())) == 3, "the check is blind"


# -- chunks of one length: the baseline --------------------------------------------------------------------------------

THREES = {"chunking": "fixed", "compression_decompress_size": 3.0}
NINES = {**TWO, **THREES, "compression_decompress_size": 9.0}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [[20, 2, 9], [2, 1, 2], [8, 1]], ids=str)
def test_pooled_chunks_are_those_of_the_equations(lengths, way):
    """Threes of threes; of documents too that are no whole chunk, and of rows that have none, or none of chunks."""
    model, tokens = built(NINES, chunk_execution=way), tokens_of(length=sum(lengths))
    expected = torch.cat([by_hand(model, part, {}) for part in tokens[0].split(lengths)])
    torch.testing.assert_close(with_documents(model, tokens, lengths)[0], expected, rtol=0, atol=1e-9)


def test_a_chunk_reaches_its_last_place_and_those_behind_it_until_the_next():
    """What the main stage says of chunk j reaches places (j + 1) N - 1 to (j + 2) N - 2; what goes in is of its own."""
    model, tokens, seen = built(THREES), tokens_of(length=14), {}
    stage = model.backbone
    stage.encoder.register_forward_hook(lambda m, i, o: seen.update(encoded=o.requires_grad_()))
    stage.main_network.register_forward_hook(lambda m, i, o: seen.update(chunks=i[0], told=o))
    stage.decoder.register_forward_pre_hook(lambda m, i: seen.update(decoded=i[0]))
    model(tokens)
    assert seen["chunks"].shape[1] == 4
    for t in range(14):
        (reached,) = torch.autograd.grad(seen["decoded"][0, t].sum(), seen["told"], retain_graph=True)
        chunks = reached[0].any(-1).nonzero()[:, 0].tolist()
        assert chunks == [(t + 1) // 3 - 1] * (t >= 2), t
    for chunk in range(4):
        (read,) = torch.autograd.grad(seen["chunks"][0, chunk].sum(), seen["encoded"], retain_graph=True)
        assert read[0].any(-1).nonzero()[:, 0].tolist() == [3 * chunk, 3 * chunk + 1, 3 * chunk + 2]


@pytest.mark.parametrize("fields", [THREES, NINES], ids=["threes", "nines"])
def test_a_later_byte_changes_nothing_before_it_whatever_its_place_in_a_chunk(fields):
    """Bit for bit: as many chunks are there."""
    model, tokens = built(fields), tokens_of(length=21)
    before = logits_of(model, tokens)
    for place in range(21):
        changed = tokens.clone()
        changed[0, place] = 9
        after = logits_of(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place:], before[:, place:])


@pytest.mark.parametrize("way", WAYS[:2])
def test_pooled_documents_are_what_they_are_alone(way):
    """The second begins at every place of a chunk of chunks."""
    model, tokens = built(NINES, chunk_execution=way, n_inner_layers=1), tokens_of(length=25)
    for first in range(4, 14):
        lengths = [first, 25 - first]
        alone = torch.cat([logits_of(model, part) for part in tokens.split(lengths, 1)], 1)
        torch.testing.assert_close(with_documents(model, tokens, lengths), alone, **EXACT)


@pytest.mark.parametrize("sizes", [[1] * 31, [2, 1, 20, 8]], ids=str)
def test_pooled_text_in_pieces_equals_text_as_a_whole(sizes):
    model, tokens = built(NINES), tokens_of(3)
    cache = model.init_cache(3)
    with torch.no_grad():
        found = [model(piece, cache=cache).states for piece in tokens.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(found, 1), model(tokens).states, **EXACT)


def test_size_and_operations_of_the_baseline():
    """In place of two matrices of a router, of each stage an MLP that widens what it reads to four times that; it is
    multiplied with once for each chunk."""
    cut, pooled = on_meta(), on_meta(chunking="fixed")
    size = {model: sum(p.numel() for p in model.parameters()) for model in (cut, pooled)}
    mlp = 1024 * 4096 + 4096 + 4096 * 512 + 512
    assert size[pooled] - size[cut] == 3 * (mlp - 2 * 512**2)
    of_cut, of_pooled = cut.flops(8192), pooled.flops(8192)
    per_chunk = 2 * (1024 * 4096 + 4096 * 512)
    more = sum(per_chunk / 2 ** (n + 1) - 2 * 2 * 512**2 / 2**n for n in range(3))
    assert of_pooled.forward_per_token - of_cut.forward_per_token == pytest.approx(more)
    assert of_pooled.training_per_token - of_cut.training_per_token == pytest.approx(3 * more)


def test_the_baseline_begins_at_random_and_no_bias_adds_anything():
    model = build(
        "hnet_x_nsa", torch.float32, std=None, chunking="fixed", n_inner_layers=1, stage_layout="m1"
    )
    stage = model.backbone
    for layer in (stage.pooling.up, stage.main_network.main_network.pooling.down):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not layer.bias.any()
    assert "ema_eps" in model.cfg.unread()


# -- text as it comes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_text_in_pieces_equals_text_as_a_whole(fields):
    """Rows open their chunks, end their blocks and make their summaries at different times; padded or packed is the
    whole alone."""
    model, tokens = built(fields), torch.cat((tokens_of(3), torch.full((1, LENGTH), 4)))
    cache = model.init_cache(4)
    with torch.no_grad():
        found = [model(piece, cache=cache).states for piece in tokens.split([6] + [1] * 18 + [7], 1)]
        for whole in (model(tokens), built(fields, chunk_execution="padded")(tokens)):
            torch.testing.assert_close(torch.cat(found, 1), whole.states, **EXACT)
    if model.cfg.chunking == "dynamic":
        assert len(set(whole.extra["opened"][0].tolist())) > 2, "the check is blind"


def test_rows_leave_and_what_was_tried_is_taken_back():
    model, tokens = built(), tokens_of(4)
    tokens[3] = tokens[3, 0]  # a run of one byte has its own number of chunks
    with torch.no_grad():
        whole, cache = model(tokens).states, model.init_cache(4)
        model(tokens[:, :15], cache=cache)
        for _ in range(2):
            kept = cache.snapshot()
            model((tokens[:, 15:24] + 3) % 11, cache=cache)
            cache.restore(kept)
        assert any(counts[[3, 1]].tolist() != counts[:2].tolist() for counts in cache.counts.values())
        cache.select(torch.tensor([3, 1]))
        rest = model(tokens[[3, 1], 15:], cache=cache).states
    torch.testing.assert_close(rest, whole[[3, 1], 15:], **EXACT)


def test_caches_advance_by_chunks_and_forget_what_nothing_sees():
    """Of the window and of what is not summed up, as much as the last one sees; summaries once their block is whole."""
    model, tokens = built(LONG), tokens_of(4)
    with torch.no_grad():
        cache = model.init_cache(4)
        before = {name: t.clone() for name, t in cache.states.items()}
        for piece in tokens.split(1, 1):
            counts = cache.counts["1.main"].clone()
            model(piece, cache=cache)
            still = cache.counts["1.main"] == counts
            for name in before:
                if name.startswith("1.main"):
                    now = cache.states[name]
                    same = (now == before[name]).flatten(1).all(1)
                    assert torch.equal(same, still), name
                    before[name] = now.clone()
        opened = model(tokens).extra["opened"][0]
    assert cache.counts["1.main"].tolist() == opened.tolist()
    assert cache.states["1.main.0.window"].shape == (4, 2, 2, 2, 4)
    assert cache.states["1.main.0.unsummed"].shape == (4, 2, 2, 3, 4)


# -- sizes, names, rates -----------------------------------------------------------------------------------------------


def on_meta(**fields):
    with torch.device("meta"):
        return HNetXNSA(HNetXNSAConfig(**{"vocab_size": 256, **fields}))


def test_size_rates_and_operations_of_the_default():
    model = on_meta(chunk_size=256)
    assert sum(p.numel() for p in model.parameters()) == 127_591_616
    inner = model.backbone.main_network.main_network.main_network.main_network.layers
    assert len(inner) == 12 and sum(p.numel() for p in inner.parameters()) == 12 * 6_973_488
    assert model.cfg.widths == [512, 512, 512, 768] and model.cfg.ratios == [2.0] * 3
    assert model.cfg.lr_multipliers == pytest.approx([2.627, 1.857, 1.313, 0.758], abs=1e-3)
    assert 75e6 < model.flops(8192).forward_per_token < 95e6


@pytest.mark.parametrize(
    ("size", "stages", "ratio"), [(64.0, 3, 4.0), (8.0, 3, 2.0), (6.0, 2, 6**0.5), (125.0, 3, 5.0)]
)
def test_chunks_of_each_stage_are_the_root_of_the_whole(size, stages, ratio):
    cfg = HNetXNSAConfig(compression_decompress_size=size, n_compress_decompress_layers=stages)
    assert cfg.ratios == [ratio] * stages


@pytest.mark.parametrize("chunking", ["dynamic", "fixed"])
def test_every_parameter_has_its_role_and_the_rate_of_its_stage(chunking):
    model = on_meta(n_inner_layers=2, stage_layout="m1", chunking=chunking)
    rules = model.param_roles()
    for name, p in model.named_parameters():
        rule, stage = rule_for(rules, name), name.count("main_network.")
        stage -= "main_network.layers" in name or "main_network.rmsnorm" in name
        assert rule.lr_mult == model.cfg.lr_multipliers[stage], name
        if re.search(r"routing_module|g_proj\.(hidden|out)\.weight", name):
            assert rule.role == "router", name
        elif p.ndim == 2 and not re.match(r"embeddings|lm_head", name):
            assert rule.role == "matrix", name
            assert rule.width_power == (0.0 if "compress" in name else None), name
        elif not re.match(r"embeddings|lm_head", name):
            assert rule.role == "scalar" and rule.wd_mult == 0, name


def test_it_begins_as_both_do():
    model = build("hnet_x_nsa", torch.float32, std=None, vocab_size=256, n_inner_layers=2, stage_layout="m1")
    layer = model.backbone.main_network.main_network.main_network.main_network.layers[0]
    mixer = layer.mixer
    assert float(mixer.q_proj.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    # Six mixers outside; within, two layers that write twice.
    for weight in (mixer.o_proj.weight, layer.mlp.fc2.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02 / 10**0.5, rel=0.05)
    up = mixer.compress_k.up
    assert float(up.weight.detach().std()) == pytest.approx(up.in_features**-0.5, rel=0.05)
    assert not mixer.compress_v.places.any() and not mixer.g_proj.out.weight.any()


def test_selected_blocks_are_chosen_once_where_activations_are_recomputed():
    model, tokens = built().train(), tokens_of(2)
    model.logits(model(tokens).states).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for path in model.blocks():
        block = model.get_submodule(path)
        block.forward = recomputing(block)
    model.logits(model(tokens).states).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name], rtol=1e-9, atol=1e-9, msg=name)


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"nsa_stages": [0]}, r"nsa_stages.*names 0;.*Nearest: \['main'\]"),
        ({"nsa_stages": ["main", 4], "stage_layout": "T1"}, r"Nearest: \[0, 1, 2, 'main'\]"),
        ({"nsa_stages": ["main", "main"]}, r"names a stage twice. Nearest: \['main'\]"),
        (
            {"nsa_stages": [0, "main", 0], "stage_layout": "T1"},
            r"names a stage twice. Nearest: \[0, 'main'\]",
        ),
        ({"d_intermediate": [0, 64, 0, 8]}, r"stage 1, .*feed-forward.*Nearest: \[0, 0, 0, 8\]"),
        ({"chunking": "fixed", "compression_decompress_size": 10.0}, "to the power of .*Nearest: 8"),
        ({"d_model": [512, 768]}, r"2 numbers, and model_cfg.n_compress_decompress_layers 4 stages"),
        ({"n_kv_heads": 3}, "divisible by model_cfg.n_kv_heads .*nearest n_kv_heads: [24]"),
        ({"compress_stride": 3}, "must divide model_cfg.compress_block_size"),
        ({"selection_block_size": 8}, "must not exceed model_cfg.selection_block_size"),
        ({"num_selected_blocks": 2}, "nearest: 3"),
        ({"rotary_emb_dim": 66}, "at most model_cfg.head_dim .*Nearest: 64"),
        ({"rotary_emb_dim": 7}, "must be even .*Nearest: 6"),
    ],
)
def test_what_does_not_fit_is_refused(fields, words):
    found = HNetXNSAConfig(**fields).problems(None)
    assert found and all(re.search(words, one) for one in found[:1]), found
    assert len(found) == 1 or "fixed" in str(fields), found


@pytest.mark.parametrize("layout", ["x2", "m0", ""])
def test_a_layout_that_is_none_is_refused(layout):
    with pytest.raises(ValueError, match="such as"):
        HNetXNSAConfig(stage_layout=layout)


def test_a_field_that_does_nothing_is_refused():
    with pytest.raises(
        ValueError, match="'model_cfg.dummy' .* no field here: in the code that hnet_x_nsa follows"
    ):
        compose(["model=hnet_x_nsa", "model_cfg.dummy=1"], notify=lambda text: None)


@pytest.mark.parametrize(("named", "sparse"), [(["main"], [3]), ([1], [1]), (["main", 0], [0, 3])])
def test_attention_is_sparse_where_it_is_asked_for(named, sparse):
    """Elsewhere it has heads about as wide as those, in a window but of the main stage."""
    cfg = HNetXNSAConfig(stage_layout="T1", nsa_stages=named, n_heads=12)
    assert not cfg.problems(None)
    assert [number for number, stage in enumerate(cfg.stages) if stage.sparse is not None] == sparse
    assert [stage.heads for stage in cfg.stages] == [8, 8, 8, 12]
    assert [stage.window for stage in cfg.stages] == [1024, 1024, 1024, None]


def test_what_no_layer_reads_is_told_of():
    assert {"d_state", "expand", "d_conv", "chunk_size"} <= HNetXNSAConfig(stage_layout="T1").unread().keys()
    assert not HNetXNSAConfig().unread()


def test_a_row_whose_chunks_are_all_selected_is_told_of():
    run, cfg = compose(["model=hnet_x_nsa", "preset=nano"], notify=lambda text: None)
    assert not cfg.remarks(run)
    many = cfg.model_copy(update={"num_selected_blocks": 8})
    assert "about 64 chunks" in many.remarks(run)[0]


@pytest.mark.parametrize("preset", ["nano", "tiny", "250M"])
def test_a_preset_is_that_of_the_innermost_stage(preset):
    _, cfg = compose(["model=hnet_x_nsa", f"preset={preset}"], notify=lambda text: None)
    _, plain = compose(["model=gpt2", f"preset={preset}"], notify=lambda text: None)
    inner = cfg.stages[-1]
    assert (len(inner.layers[0]), inner.width) == (plain.n_layers, plain.d_model)
    assert len(cfg.stages) == 4 and cfg.stages[0].layers == ("mm", "mm")
    assert (cfg.compress_block_size, cfg.compress_stride, cfg.selection_block_size) == (4, 2, 8)
    assert (cfg.num_selected_blocks, cfg.sliding_window) == (3, 16)
