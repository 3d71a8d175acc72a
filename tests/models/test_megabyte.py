"""MEGABYTE: the equations, what sees what, where documents stand in patches, text, and what it counts."""

import math

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adapters.base import GenerateOptions
from configs import compose
from configs.files import options
from configs.messages import ConfigError
from data.corpus import Document
from data.rows import HeldoutRows
from data.store import encode_documents
from models.layers.roles import rule_for
from models.megabyte import Megabyte, MegabyteConfig
from models.patches.layout import EMPTY, Layout
from tests.contract.tiny import (
    adapter_of,
    batch_of,
    config,
    context,
    loss_and_gradients,
    move_away_from_uniform,
)
from tests.models import reference_megabyte
from tests.models.tiny import build, tokens_of

P = 4
SIZES = {
    "patch_size": P,
    "d_local": 8,
    "d_global_pre_patch": 3,
    "n_layers_d_global": 2,
    "n_layers_d_local": 2,
    "local_n_heads": 2,
    "global_n_heads": 3,
}
VARIANTS = [
    {},
    {"cross_patch_r": 0},
    {"cross_patch_r": P, "mlp_type": "swiglu"},
    {"patch_conv": True},
    {"patch_size": 1, "cross_patch_r": 1, "patch_conv": True},
    {"patch_size": 16},
    {"n_layers_d_global": 1, "n_layers_d_local": 3, "d_mult": 2},
]
EOT = 256


def megabyte(**fields):
    return build("megabyte", **{**SIZES, **fields})


def logits_of(model, tokens, **more):
    with torch.no_grad():
        return model.logits(model(tokens, **more))


def prepared_of(adapter, tokens, doc_ids, phase="eval"):
    """Rows (B, S + 1) of these documents, all of them scored."""
    batch = batch_of(np.asarray(tokens))
    batch.doc_ids[:] = doc_ids
    return batch, context(len(batch.rows), phase=phase)


# -- the equations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [3, 13])
def test_it_computes_what_the_paper_writes(fields, length):
    """Of the last of 13 bytes the patch is not full, 3 are less than one."""
    model, tokens = megabyte(**fields), tokens_of(rows=1, length=length)
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    # State t predicts what follows token t: the first token is not read.
    bytes_ = [*tokens[0, 1:].tolist(), 0]
    expected = torch.from_numpy(reference_megabyte.logits(model.cfg, weights.__getitem__, bytes_))
    torch.testing.assert_close(logits_of(model, tokens)[0], expected, rtol=1e-9, atol=1e-9)


def test_a_byte_that_comes_twice_is_foretold_the_second_time():
    """Every byte of a random text stands twice: half of them cost nothing, the others what a guess costs. Behind one
    shift more than the model's own, all cost that."""
    adapter = adapter_of("megabyte")
    steps = 70
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.01)
    source, costs = np.random.default_rng(0), []
    for _ in range(steps):
        once = source.integers(0, 256, (16, 16))
        tokens = np.concatenate([np.full((16, 1), EOT), once.repeat(2, axis=1)], 1)
        batch, ctx = prepared_of(adapter, tokens, 0, "train")
        term = adapter(adapter.prepare(batch, ctx)).terms["ce"]
        loss = term.sum / batch.weights.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    assert np.mean(costs[-5:]) == pytest.approx(math.log(256) / 2, abs=0.1)


def test_the_head_is_the_local_embedding():
    model = megabyte()
    assert model.head_weight.data_ptr() == model.local_embedding.weight.data_ptr()
    assert not any("head" in name for name, _ in model.named_parameters())


# -- what sees what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_a_byte_changes_what_is_behind_it_alone(fields):
    """Bit for bit: shapes stay. A byte reaches its own patch by the local stack, later ones by the global one too."""
    model, tokens = megabyte(**fields), tokens_of(rows=1, length=14)
    before = logits_of(model, tokens)
    for place in range(1, 14):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        after = logits_of(model, changed)
        assert torch.equal(after[:, :place], before[:, :place])
        patch_end = place // model.cfg.patch_size * model.cfg.patch_size
        if place % model.cfg.patch_size:  # at the first place of a patch a pad hides the byte before
            assert not torch.equal(after[:, place], before[:, place])
        elif place < 14:  # there it is the global stack that tells
            assert not torch.equal(after[:, patch_end:], before[:, patch_end:])


def test_the_token_in_front_of_a_document_is_not_read():
    model, tokens = megabyte(), tokens_of(rows=1, length=9)
    other = tokens.clone()
    other[0, 0] += 1
    assert torch.equal(logits_of(model, tokens), logits_of(model, other))


@pytest.mark.parametrize("fields", [{}, {"patch_conv": True}], ids=str)
def test_the_global_stack_tells_a_patch_of_those_before_it(fields):
    model, tokens = megabyte(**fields), tokens_of(rows=1, length=4 * P)
    heard = []
    model.global_embedding.register_forward_hook(lambda m, i, out: heard.append(out))
    said = model.read_patches(tokens, Layout.of_one(tokens, P))  # (1, K, P D_G)
    for k in range(4):
        (gradient,) = torch.autograd.grad(said[0, k].sum(), heard, retain_graph=True)
        by_byte = gradient[0].abs().sum(-1)  # of x_0, x_1, ...
        assert (by_byte[: k * P] > 0).all() and (by_byte[k * P :] == 0).all(), k


def test_without_the_global_stack_and_the_patch_before_patches_are_alone():
    model, tokens = megabyte(cross_patch_r=0), tokens_of(rows=1, length=3 * P)
    with torch.no_grad():
        model.to_local.weight.zero_()
    before = logits_of(model, tokens)
    for place in range(1, 3 * P):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % 11
        moved = (logits_of(model, changed) != before).any(-1)[0].nonzero()[:, 0]
        own = range(place, (place // P + 1) * P) if place % P else []
        assert set(moved.tolist()) <= set(own) and (not own or place in moved)


@pytest.mark.parametrize(("reach", "moves"), [(0, False), (2, True)])
def test_what_stands_in_other_patches_reaches_one_by_the_patch_before_alone(reach, moves, monkeypatch):
    """Whatever the global stack says, here the same."""
    model, tokens = megabyte(cross_patch_r=reach), tokens_of(rows=1, length=3 * P)
    layout = Layout.of_one(tokens, P)
    said = model.read_patches(tokens, layout)
    monkeypatch.setattr(model, "read_patches", lambda placed, layout: said)
    before = logits_of(model, tokens)
    shuffled = tokens.clone()
    shuffled[0, :P], shuffled[0, 2 * P :] = tokens[0, :P].flip(0), tokens[0, 2 * P :].flip(0)
    after = logits_of(model, shuffled)
    assert torch.equal(after[0, P : 2 * P], before[0, P : 2 * P]) is not moves


def test_dropout_of_the_embeddings_of_both_stacks(monkeypatch):
    model, dropped = megabyte(dropout=0.5).train(), []
    for module in model.modules():
        if module is not model and hasattr(module, "dropout"):
            module.dropout = 0.0
    plain = torch.nn.functional.dropout

    def told(x, p=0.5, training=True, inplace=False):
        if p and training:
            dropped.append(tuple(x.shape))
        return plain(x, p, training, inplace)

    monkeypatch.setattr("torch.nn.functional.dropout", told)
    model(torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0)))
    cfg, patches = model.cfg, 16 // model.cfg.patch_size
    # Others are of attention's probabilities.
    assert dropped.count((2, patches, cfg.d_global)) == 1
    assert dropped.count((2, patches, cfg.patch_size, cfg.d_local)) == 1


def test_every_stack_has_its_own_sizes():
    model = megabyte(n_layers_d_global=3, n_layers_d_local=1)
    assert (len(model.global_layers), len(model.local_layers)) == (3, 1)
    assert model.global_layers[0].attention.q_proj.weight.shape == (12, 12)
    assert model.local_layers[0].attention.q_proj.weight.shape == (8, 8)
    assert model.blocks() == ["global_layers.0", "global_layers.1", "global_layers.2", "local_layers.0"]


# -- documents ---------------------------------------------------------------------------------------------------------


def test_documents_begin_patches_and_bytes_keep_their_order():
    ids = torch.tensor([[0] * 5 + [1] * 4 + [2] * 1 + [3] * 2, [0] * 12])
    layout = Layout.of(ids, P)
    assert layout.documents.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, EMPTY, EMPTY]]
    assert layout.places[0].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 11, 12, 16, 17]
    assert layout.positions[0, :12].tolist() == [0, 1, 2, 3, 4, EMPTY, EMPTY, EMPTY, 0, 1, 2, 3]
    assert torch.equal(layout.source.gather(1, layout.places), torch.arange(12).expand(2, -1))
    shifted = Layout.of(ids, P, offset=2)
    assert shifted.places[0, :6].tolist() == [2, 3, 4, 5, 6, 10]
    assert [Layout.of(torch.arange(64)[None] // n, P).patches for n in (64, 32, 20, 9, 3)] == [
        16,
        16,
        16,
        24,
        24,
    ]


@pytest.mark.parametrize("words", [(), ("model_cfg.patch_conv=true", "model_cfg.cross_patch_r=4")], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_documents_in_a_row_equal_documents_by_themselves(words, strided):
    """One begins at every place of a patch; scores, and of what trains gradients too."""
    words = (*words, f"model_cfg.strided_inference={str(strided).lower()}")
    adapter = adapter_of("megabyte", *words, dtype=torch.float64).eval()
    move_away_from_uniform(adapter)
    source = np.random.default_rng(1)
    for first in range(1, 3 * P):
        lengths = [first, 5, 32 - first - 5]
        texts = [np.append(EOT, source.integers(0, 256, n - 1)) for n in lengths if n]
        row = np.append(np.concatenate(texts), EOT)[None]
        ids = np.append(np.repeat(np.arange(len(texts)), [len(t) for t in texts]), len(texts))
        together = adapter.likelihood(*prepared_of(adapter, row, ids)).per_token[0]
        alone = [
            adapter.likelihood(*prepared_of(adapter, np.append(t, EOT)[None], 0)).per_token[0] for t in texts
        ]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-10)
        if strided or first not in (3, 5):
            continue
        _, packed = loss_and_gradients(adapter, [prepared_of(adapter, row, ids)[0]])
        separate = [prepared_of(adapter, np.append(t, EOT)[None], 0)[0] for t in texts]
        _, apart = loss_and_gradients(adapter, separate)
        for name, gradient in packed.items():
            torch.testing.assert_close(apart[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def test_the_last_byte_of_a_document_changes_nothing_of_the_next_one():
    """Bit for bit."""
    adapter = adapter_of("megabyte", "model_cfg.patch_conv=true").eval()
    move_away_from_uniform(adapter)
    tokens = np.random.default_rng(2).integers(0, 256, (P, 33))
    ids = np.zeros_like(tokens)
    for row in range(P):
        ids[row, 9 + row :] = 1
        tokens[row, [0, 9 + row]] = EOT
    before = adapter.likelihood(*prepared_of(adapter, tokens, ids)).per_token
    changed = tokens.copy()
    changed[np.arange(P), 8 + np.arange(P)] ^= 1
    after = adapter.likelihood(*prepared_of(adapter, changed, ids)).per_token
    for row in range(P):
        assert torch.equal(before[row, 9 + row :], after[row, 9 + row :])
        assert not torch.equal(before[row, : 9 + row], after[row, : 9 + row])


def test_what_documents_leave_empty_is_in_no_loss_and_is_counted():
    adapter = adapter_of("megabyte")
    tokens, ids = np.random.default_rng(3).integers(0, 256, (2, 33)), np.arange(33) // 5
    tokens[:, ::5] = EOT
    batch, ctx = prepared_of(adapter, tokens, ids, "train")
    prepared = adapter.prepare(batch, ctx)
    assert prepared.denominators == {"tokens": 64.0}
    assert prepared.tensors["whole_documents"].shape == (2, 16), "13 take two patches each but for the last"
    adapter(prepared)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        said = adapter(prepared).flops
        adapter.eval()
    plan = adapter.flops(32).training_per_token * 64
    model = adapter.model
    assert said == 2 * model.flops_of_row(16, 32).training_per_token > 1.5 * plan
    reference = 2 * model.flops_of_row(16, 32).reference.forward_per_token
    assert counter.get_total_flops() == pytest.approx(reference, rel=0.05)


def test_two_passes_score_every_byte_once_from_the_first_half_of_a_patch():
    ids = torch.tensor([[0] * 5 + [1] * 27])
    one, other = Layout.of(ids, P), Layout.of(ids, P, P // 2)
    early, late = one.places % P < P // 2, other.places % P < P // 2
    assert torch.equal(early, ~late)
    adapter = adapter_of("megabyte", "model_cfg.strided_inference=true", dtype=torch.float64).eval()
    plain = adapter_of("megabyte", dtype=torch.float64).eval()
    move_away_from_uniform(adapter)
    move_away_from_uniform(plain)
    tokens = np.random.default_rng(4).integers(0, 256, (1, 33))
    given = prepared_of(adapter, tokens, np.append(ids[0].numpy(), 1))
    strided, whole = (a.likelihood(*given).per_token[0] for a in (adapter, plain))
    assert torch.equal(strided[early[0]], whole[early[0]])
    assert not (strided == whole)[late[0]].any()
    assert "strided_places" not in adapter.prepare(given[0], context(1)).tensors, "training takes one"


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_prompts_of_any_length_go_on_as_the_whole_would(fields):
    model = megabyte(**fields)
    tokens = tokens_of(rows=2, length=4 * P)
    whole = logits_of(model, tokens)
    for prompt in range(1, 2 * P + 3):  # the token in front, and 0 to 2 P + 1 bytes
        cache = model.init_cache(2)
        found = [logits_of(model, tokens[:, :prompt], cache=cache)]
        found += [logits_of(model, tokens[:, t : t + 1], cache=cache) for t in range(prompt, 4 * P)]
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-10)


def test_the_global_stack_takes_one_step_for_a_patch():
    """Whatever the prompts, of rows that are at different places; each text is as it is alone."""
    adapter = adapter_of("megabyte", "model_cfg.n_ctx=64", "train_seq_len=64", dtype=torch.float64).eval()
    move_away_from_uniform(adapter)
    steps = []
    adapter.model.global_layers[0].register_forward_hook(lambda m, args, out: steps.append(out.shape[1]))
    options = GenerateOptions(max_new_tokens=20, temperature=0.0, stop_at_document_end=False)
    prompts = [[], [1, 2, 3], [5] * P, [7, 8] * P + [9]]
    alone = []
    for prompt in prompts:
        steps.clear()
        alone += adapter.generate([prompt], options).tokens
        assert sum(steps) == -(-(len(prompt) + 20) // P), "patches that were begun"
        read = -(-(len(prompt) + 1) // P)
        assert steps == [read] + [1] * (sum(steps) - read)
    assert adapter.generate(prompts, options).tokens == alone


def test_a_row_ends_in_the_middle_of_a_patch_and_others_go_on():
    adapter = adapter_of("megabyte", dtype=torch.float64).eval()
    move_away_from_uniform(adapter)
    free = GenerateOptions(max_new_tokens=14, temperature=0.0, stop_at_document_end=False)
    (first,), (second,) = (adapter.generate([prompt], free).tokens for prompt in ([1], [2, 3]))
    inside = (t for n, t in enumerate(first) if (n + 1) % P and first.index(t) == n > 0)
    stop = next(t for t in inside if t not in second)
    until = GenerateOptions(max_new_tokens=14, temperature=0.0, stop_at_document_end=False, stop_ids=(stop,))
    assert adapter.generate([[1], [2, 3]], until).tokens == [first[: first.index(stop)], second]


# -- sizes -------------------------------------------------------------------------------------------------------------


def counted(**fields):
    with torch.device("meta"):
        return Megabyte(MegabyteConfig(vocab_size=258, **fields))


def test_parameters_of_the_default_size():
    model = counted()
    sizes = {name: p.numel() for name, p in model.named_parameters()}

    def total(part):
        return sum(n for name, n in sizes.items() if part(name) and "norm" not in name)

    assert total(lambda name: name.startswith("global_layers")) == 100_663_296
    assert total(lambda name: name.startswith("local_layers")) == 18_874_368
    padding = (384 - 258) * 512  # rows of the head
    rest = total(lambda name: "layers" not in name)
    assert rest - padding == 258 * 64 + 8192 * 64 + 1024 + 258 * 512 + 512 + 64 * 512 == 707_200
    norms = sum(n for name, n in sizes.items() if "norm" in name)
    assert norms == 2 * (8 * 2 * 1024 + 1024 + 6 * 2 * 512 + 512)


def test_operations_of_the_default_size():
    """Of one byte, forward, by the formula of the paper's section 3.2 with what it leaves out: 51 million."""
    patches = 8192 // 16
    wide = 8 * (2 * 12 * 1024**2 + 4 * 1024 * (patches + 1) / 2) / 16
    narrow = 6 * (2 * 12 * 512**2 + 4 * 512 * (17 / 2 + 8 * (patches - 1) / patches))
    between, head = 2 * 64 * 512, 2 * 512 * 258
    flops = counted().flops(8192)
    assert flops.forward_per_token == pytest.approx(wide + narrow + between + head, rel=1e-12)
    assert flops.training_per_token == 3 * flops.forward_per_token
    assert round(flops.forward_per_token / 1e6) == 51


def test_it_begins_as_the_paper_says():
    model = megabyte(d_global_pre_patch=24, d_local=64, n_ctx=256)
    model.float().init_weights(torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        p = p.detach()
        if "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all()
        elif p.ndim == 2:
            assert p.abs().max() <= 0.012 + 1e-8 and p.std() == pytest.approx(0.006 * 0.88, rel=0.1)
        else:
            assert p.std() == pytest.approx(0.006, rel=0.3)


def test_tables_of_positions_pads_and_norms_do_not_decay():
    model = megabyte(patch_conv=True)
    rules = model.param_roles()
    for name, _ in model.named_parameters():
        rule = rule_for(rules, name)
        kept = any(word in name for word in ("norm", "pad", "positions"))
        assert (rule.wd_mult == 0.0) is kept, name
        assert (rule.role == "matrix") is ("_proj" in name or "mixes" in name or "to_local" in name)


def test_rates_of_each_stack_follow_its_own_width():
    model = megabyte()
    rules, narrow, wide = model.param_roles(), model.cfg.d_local, model.cfg.d_global
    assert adapter_of("megabyte").width == 4 * 16
    for name, p in model.named_parameters():
        if rule_for(rules, name).role == "matrix":
            reads = wide if name.startswith("global") else narrow if name.startswith("local") else p.shape[1]
            assert rule_for(rules, name).width == reads, name


@pytest.mark.parametrize("preset", [p for p in options("preset") if p != "none"])
def test_a_preset_gives_its_sizes_to_the_global_stack_and_half_to_the_local_one(preset):
    said: list[str] = []
    run, cfg = compose(["model=megabyte", f"preset={preset}"], notify=said.append)
    other, plain = compose(["model=vanilla", f"preset={preset}"], notify=lambda text: None)
    assert (cfg.d_global, cfg.n_layers_d_global, cfg.global_n_heads) == (
        plain.d_model,
        plain.n_layers,
        plain.n_heads,
    )
    assert (cfg.d_local, cfg.n_layers_d_local) == (plain.d_model // 2, plain.n_layers // 2)
    assert cfg.d_local // cfg.local_n_heads == plain.d_model // plain.n_heads
    assert run.train_seq_len == 2 * other.train_seq_len and run.global_batch_size == other.global_batch_size
    assert not any("left out" in text and "vocab_size" not in text for text in said)
    if preset == "nano":
        assert (run.train_seq_len, run.global_batch_size, run.num_iterations) == (512, 16, 300)


# -- fields ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["train_seq_len=30"],
            r"train_seq_len \(30\) must be a multiple of model_cfg.patch_size \(4\); nearest: 28, 32",
        ),
        (
            ["val_seq_len=31"],
            r"val_seq_len \(31\) must be a multiple of model_cfg.patch_size \(4\); nearest: 28, 32",
        ),
        (["train_seq_len=64"], r"train_seq_len \(64\) must not exceed model_cfg.n_ctx \(32\)"),
        (
            ["model_cfg.global_n_heads=5"],
            r"4 \* 16 = 64\) must be divisible by .*; nearest global_n_heads: 4",
        ),
        (
            ["model_cfg.local_n_heads=5"],
            r"d_local \(32\) must be divisible by model_cfg.local_n_heads \(5\); nearest: 30, 35",
        ),
        (["model_cfg.local_n_heads=32"], r"= 1\) must be even for rotary positions; nearest d_local: 64"),
        (["model_cfg.cross_patch_r=5"], r"cross_patch_r \(5\) must not exceed .*Nearest: cross_patch_r=4"),
        (
            ["model_cfg.patch_size=1", "model_cfg.strided_inference=true"],
            r"patch_size \(1\) must be even for strided_inference.*; nearest: 2, or strided_inference=false",
        ),
        (["model_cfg.is_causal=false"], r"model_cfg.is_causal: .*True"),
        (["model_cfg.mlp_type=gelu"], r"model_cfg.mlp_type: .*relu"),
        (["tokenizer=bpe-512"], "'bpe-512' makes tokens, and this architecture reads bytes"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(words, message):
    with pytest.raises(ConfigError, match=message):
        config("megabyte", *words)


@pytest.mark.parametrize(
    ("word", "why"), [("eos_id=258", "is the tokenizer's"), ("pad_id=257", "stands for no id")]
)
def test_ids_of_other_code_are_no_fields(word, why):
    with pytest.raises(ConfigError, match=why):
        compose(["model=megabyte", f"model_cfg.{word}"], notify=lambda text: None)


def test_the_vocabulary_is_that_of_bytes():
    adapter = adapter_of("megabyte")
    assert adapter.model_cfg.vocab_size == 257 and adapter.tokenizer.eot == 256
    assert adapter.model.global_embedding.weight.shape[0] == 257


def test_held_out_windows_of_any_width_are_scored_whole():
    """Rows of an evaluation are as wide as their longest document: no multiple of a patch."""
    adapter = adapter_of("megabyte").eval()
    texts = ["é" * 9, "a", "b" * 50]
    store = encode_documents([Document(t, t.encode()) for t in texts], adapter.tokenizer)
    rows = HeldoutRows(store, EOT, 24)
    batch = rows.batch(np.arange(rows.n_rows))
    found = adapter.likelihood(batch, context(rows.n_rows, phase="eval"))
    assert batch.bytes == sum(len(t.encode()) for t in texts) == batch.weights.sum()
    per_byte = float(found.nats.sum()) / batch.bytes
    assert per_byte == pytest.approx(math.log(257), abs=0.3)
