"""Targets of the speedrun's model, and what of it changes along a run."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from adapters.base import GenerateOptions, weighted_loss
from adapters.current_best import prefixes
from configs.messages import ConfigError
from data.tokenizers import ByteTokenizer
from kernels.linear_cross_entropy import IGNORED
from tests.contract.tiny import (
    adapter_of,
    batch_for,
    config,
    context,
    loss_and_gradients,
    move_away_from_uniform,
    random_batch,
    session_of,
    train_on,
)
from trainer.optim.groups import role_table
from trainer.session import VARIANTS

TYPE = "current_best_gpt"


class Words:
    """Tokens of these bytes; the last one ends a document."""

    spelled = (b"a", b"b", b"ab", b"abc", b"abcde", b"zz", b"")
    vocab_size, eot = len(spelled), len(spelled) - 1
    token_bytes = np.array([len(text) for text in spelled])

    def decode(self, ids):
        return b"".join(self.spelled[i] for i in ids)


# -- targets ----------------------------------------------------------------------------------------------------------


def test_the_prefix_of_a_token_is_the_longest_that_there_is():
    assert prefixes(Words()).tolist() == [IGNORED, IGNORED, 0, 2, 3, IGNORED, IGNORED]
    assert (prefixes(ByteTokenizer()) == IGNORED).all()


def prepared_with_prefixes(adapter, batch, step=0, total=10):
    """Where odd tokens begin with the one below them."""
    table = torch.arange(-1, adapter.tokenizer.vocab_size - 1)
    table[::2] = IGNORED
    adapter.__dict__["prefix_table"] = table
    ctx = context(len(batch.rows), step)
    adapter.on_step_start(ctx, total)
    return adapter.prepare(batch, ctx)


@pytest.mark.parametrize(("step", "weights", "prefix"), [(0, (1, 0.5, 0.25), 0.25), (5, (1, 0.25, 0), 0.125)])
def test_the_loss_is_the_sum_of_cross_entropies_of_one_softmax(step, weights, prefix):
    """Values and gradients against torch's own, one target after the other; columns of padding take no part."""
    adapter = adapter_of(TYPE, vocabulary=50, dtype=torch.float64)
    move_away_from_uniform(adapter, std=0.1)
    batch = random_batch(3, 32, 50, n=3)
    batch.doc_ids[1, 20:] = 1
    batch.weights[2, 5:9] = 0
    prepared = prepared_with_prefixes(adapter, batch, step)
    output = adapter(prepared)
    weighted_loss(output.terms, prepared.denominators).backward()
    found = {name: p.grad.clone() for name, p in adapter.named_model_parameters()}

    adapter.zero_grad()
    hidden = adapter.hidden(prepared)
    z = hidden.states @ hidden.extra["head"].T
    logits = (23 * torch.sigmoid((z + 5) / 7.5))[..., :50]
    tokens, counted = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weights).double()
    docs = torch.from_numpy(batch.doc_ids)
    total, parts = 0.0, {}
    for k, weight in enumerate(weights, 1):
        nats = F.cross_entropy(logits.flatten(0, 1), tokens[:, k : k + 32].flatten(), reduction="none")
        # The k-th token counts where it belongs to the position's document or ends it, and where it counts itself.
        own = (docs[:, k - 1 : k + 31] == docs[:, :32]).double()
        given = F.pad(counted, (0, 2), mode="replicate")[:, k - 1 : k + 31]
        parts[k] = (nats.view(3, 32) * own * given).sum()
        total = total + weight * parts[k]
    below = tokens[:, 1:33] - 1
    has = (tokens[:, 1:33] % 2 == 1).double()
    nats = F.cross_entropy(logits.flatten(0, 1), below.clamp(min=0).flatten(), reduction="none").view(3, 32)
    own = (nats * has * counted).sum()
    total = (total + prefix * own) / counted.sum()
    total.backward()
    assert output.terms["ce"].sum.item() == pytest.approx(parts[1].item(), rel=1e-12)
    further = weights[1] * parts[2] + weights[2] * parts[3]
    assert output.terms["future"].sum.item() == pytest.approx(further.item(), rel=1e-12)
    assert output.terms["prefix"].sum.item() == pytest.approx(prefix * own.item(), rel=1e-12)
    for name, p in adapter.named_model_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_targets_behind_a_documents_end_count_where_the_records_let_them():
    batch = random_batch(1, 32, n=3)
    batch.doc_ids[0, 20:] = 1
    ours, theirs = (
        adapter_of(TYPE, f"model_cfg.mask_shifts_at_docs={masked}").prepare(batch, context(1))
        for masked in ("true", "false")
    )
    assert [ours.denominators[k] for k in ("tokens", "tokens_2", "tokens_3")] == [32, 31, 30]
    assert [theirs.denominators[k] for k in ("tokens", "tokens_2", "tokens_3")] == [32, 32, 32]
    assert not ours.tensors["weights_2"][0, 19] and theirs.tensors["weights_2"][0, 19]


def test_padding_may_take_part_in_the_training_loss_and_in_no_score():
    """Columns that are made likely cost the loss with `pad_in_loss` alone; and what is capped, padding too, is never
    sampled: it is cut off, not masked before it is capped."""
    plain, padded = (
        adapter_of(TYPE, f"model_cfg.pad_in_loss={on}", vocabulary=50, dtype=torch.float64)
        for on in ("false", "true")
    )
    batch, found = random_batch(4, 32, 50, n=3), {}
    for name, adapter in (("plain", plain), ("padded", padded)):
        before = loss_and_gradients(adapter, [batch])[0]["ce"]
        score = adapter.eval().likelihood(batch, context(phase="eval")).nats
        with torch.no_grad():
            adapter.model.lm_head.weight[50:] += 100 * adapter.model.lm_head.weight[:78].sign()
        found[name] = loss_and_gradients(adapter.train(), [batch])[0]["ce"] - before
        again = adapter.eval().likelihood(batch, context(phase="eval")).nats
        assert torch.equal(score, again)
        adapter.model.lm_head.weight.data *= 10
        assert adapter.model.logits(torch.randn(3, 64, dtype=torch.float64)).shape == (3, 50)
        (text,) = adapter.generate(
            [[1]], GenerateOptions(max_new_tokens=8, stop_at_document_end=False)
        ).tokens
        assert max(text) < 50
    assert abs(found["plain"]) < 1e-12 and found["padded"] > 0.1


# -- embedding and head -----------------------------------------------------------------------------------------------


def test_embedding_and_head_are_one_until_they_part_and_both_learn_on():
    """Bit for bit, moments too; behind the split they go apart, from equal moments, and have taken equally many steps.
    What each gets until then is the sum of both gradients."""
    session = session_of(TYPE, "model_cfg.tie_until=0.5", "model_cfg.adam_every=1")
    model, batch = session.adapter.model, batch_for(session.adapter)
    names = ("embed_tokens.weight", "lm_head.weight")

    def both():
        state = session.optimizers.state_dict()["state"]
        return [(dict(model.named_parameters())[name], *state[name].values()) for name in names]

    for step in range(6):
        train_on(session, batch, range(step, step + 1), total=6)
        same = [torch.equal(a, b) for a, b in zip(*both(), strict=True)]
        if step < 3:
            assert all(same), step
    assert not torch.equal(model.embed_tokens.weight, model.lm_head.weight)
    steps = [session.optimizers.state_dict()["state"][name]["step"] for name in names]
    assert steps[0] == steps[1] == 6


def test_what_has_parted_stays_apart_where_a_run_goes_on_for_longer():
    """Behind the split of four steps, and before that of twelve. What was loaded as one goes on so."""
    session = session_of(TYPE, "model_cfg.tie_until=0.5", "model_cfg.adam_every=1")
    batch, states = batch_for(session.adapter), []
    for step in range(4):
        states.append({name: value.clone() for name, value in session.adapter.model.state_dict().items()})
        train_on(session, batch, range(step, step + 1), total=4)
    states.append(session.adapter.model.state_dict())
    for state, tied in ((states[1], True), (states[4], False)):
        resumed = session_of(TYPE, "model_cfg.tie_until=0.5", "model_cfg.adam_every=1").adapter
        resumed.model.load_state_dict(state)
        resumed.on_step_start(context(step=4), 12)
        assert resumed.model.tied == tied


def test_the_split_spares_both_steps_of_one_of_adams():
    adapter, tied = adapter_of(TYPE, "model_cfg.tie_until=0.5", "model_cfg.adam_every=2"), []
    for step in range(8):
        adapter.on_step_start(context(step=step), 10)
        tied.append(adapter.model.tied)
    assert tied == [True] * 6 + [False] * 2


def test_both_gradients_are_the_sum_and_two_tensors():
    adapter = adapter_of(TYPE, dtype=torch.float64)
    batch, ctx = batch_for(adapter), context()
    pair = adapter.model.embed_tokens.weight, adapter.model.lm_head.weight

    def gradients(tied):
        adapter.zero_grad()
        adapter.on_step_start(ctx, 1)
        adapter.model.tied = tied
        prepared = adapter.prepare(batch, ctx)
        weighted_loss(adapter(prepared).terms, prepared.denominators).backward()
        return [p.grad.clone() for p in pair]

    apart, one = gradients(False), gradients(True)
    assert apart[0].abs().max() > 1e-6 and apart[1].abs().max() > 1e-6
    for gradient in one:
        torch.testing.assert_close(gradient, apart[0] + apart[1], rtol=1e-12, atol=1e-15)
    assert pair[0].grad.data_ptr() != pair[1].grad.data_ptr(), "one would be clipped, and added to, twice"


def test_a_head_of_its_own_from_the_start():
    adapter = adapter_of(TYPE, "model_cfg.tie_until=0.0")
    adapter.on_step_start(context(), 10)
    assert not adapter.model.tied


# -- along a run ------------------------------------------------------------------------------------------------------


def test_a_stage_is_that_of_its_step_wherever_a_run_begins():
    """Also for who plans: steps that are timed have their own, and what is probed for memory the last."""
    adapter = adapter_of(TYPE)
    for step, windows in ((0, (5, 13)), (50, (13, 29)), (99, (25, 33)), (0, (5, 13))):
        adapter.on_step_start(context(step=step), 100)
        assert adapter.model.windows == windows
    assert adapter.eval().model.windows == (25, 33)
    adapter.train()
    for of_draws, stage in (("most", 3), ("mean", 2), ("drawn", 2)):
        ctx = context(step=70)
        object.__setattr__(ctx, "of_draws", of_draws)
        adapter.on_step_start(ctx, 100)
        assert adapter.model.stage == stage


def test_the_rotation_of_a_stage_is_in_what_is_saved():
    adapter, other = adapter_of(TYPE, "model_cfg.n_ctx=512"), adapter_of(TYPE, "model_cfg.n_ctx=512")
    first = copy.deepcopy(adapter.model.state_dict())
    adapter.on_step_start(context(step=99), 100)
    last = adapter.model.state_dict()
    assert not torch.equal(first["frequencies"], last["frequencies"])
    assert last["score_scale"] > first["score_scale"]
    other.model.load_state_dict(last)
    assert torch.equal(other.model.frequencies, adapter.model.frequencies)
    assert set(adapter.fitted) == {"frequencies", "score_scale"}, (
        "another run that begins with it starts anew"
    )


def test_what_goes_on_behind_a_window_equals_the_whole_after_tokens_were_taken_back():
    """Window of 4, ten tokens, three more, two of them taken back."""
    words = ("model_cfg.window_unit=1", "model_cfg.window_schedule=linear")
    adapter = adapter_of(TYPE, *words, dtype=torch.float64).eval()
    move_away_from_uniform(adapter)
    model = adapter.model
    model.cfg.__dict__["window_schedule"] = "linear"
    tokens = torch.randint(60, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model.logits(model(tokens))
        cache = model.init_cache(2)
        model(tokens[:, :10], cache=cache)
        model(tokens[:, 10:11], cache=cache)
        here = cache.snapshot()
        model(tokens[:, 20:22], cache=cache)
        cache.restore(here)
        rest = model.logits(model(tokens[:, 11:], cache=cache))
    torch.testing.assert_close(rest, whole[:, 11:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("composed", ["[]", "[1]"])
def test_a_cache_holds_what_windows_see_and_no_more(composed):
    """Token by token, far beyond the windows; composed heads see more than the window of their layer."""
    words = ("model_cfg.window_unit=1", f"model_cfg.dc_layers={composed}", "model_cfg.dc_window=9")
    adapter = adapter_of(TYPE, *words, "model_cfg.window_pattern=SS", dtype=torch.float64).eval()
    move_away_from_uniform(adapter)
    model = adapter.model
    tokens = torch.randint(60, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cache = model.logits(model(tokens)), model.init_cache(1)
        found = torch.cat([model.logits(model(token, cache=cache)) for token in tokens.split(1, 1)], 1)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)
    assert model.windows[0] == 7
    paired, other = cache["pairs"]._layers[0], cache["keys"]._layers[1]
    assert paired[0].shape[3] == 16, "room for 7 places and the two of a token"
    assert other[0].shape[3] == (16 if composed == "[1]" else 8)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model_cfg.window_pattern=dense", "train_seq_len=2048"], "rows of 2048 tokens"),
        (["model_cfg.window_pattern=SSL"], "a letter for each of 2 layers"),
        (["model_cfg.xsa_layers=[2]"], "names layer 2 of 2"),
        (["model_cfg.paired_head_layers=[1]", "model_cfg.xsa_layers=[1]"], "share layer 1"),
        (["model_cfg.paired_head_layers=[0]", "model_cfg.attn_skip_layers=[0]"], "a layer without attention"),
        (["model_cfg.n_heads=1"], "must be even"),
        (["model_cfg.skip_link=[1,0]"], "behind the source"),
        (["model_cfg.logit_softcap=[0.0,5.0,7.5]"], "A and C positive"),
        (["model_cfg.mtp_weights=[]"], "begin with the next token's"),
        (["model_cfg.d_model=24"], "multiple of 4"),
        (["model_cfg.record=record26", "model_cfg.tie_until=0.5"], "record26 begin apart"),
        (["model_cfg.window_unit=1024", "model_cfg.n_ctx=4096", "train_seq_len=2048"], "window_unit=341"),
        (["model_cfg.use_fp8=true"], "FP8|fp8"),
        (["model_cfg.fp8_mlp=true"], "FP8|fp8"),
    ],
    ids=lambda x: x[0].partition(".")[2] if isinstance(x, list) else "",
)
def test_what_cannot_be_is_refused_with_the_nearest_that_can(words, said):
    with pytest.raises(ConfigError, match=said):
        config(TYPE, *words)


def test_windows_may_be_left_out_of_short_rows():
    _, model_cfg = config(TYPE, "model_cfg.window_pattern=dense")
    assert model_cfg.dense


def test_rates_and_decay_are_those_of_the_record():
    """(rate, decay, betas, every) by name, at the record's own width."""
    words = (
        "model_cfg.d_model=768",
        "model_cfg.n_heads=6",
        "model_cfg.n_layers=11",
        "model_cfg.adam_every=2",
    )
    cfg, model_cfg = config(TYPE, *words)
    from adapters import build_adapter
    from tests.contract.tiny import tokenizer_for

    adapter = build_adapter(cfg, model_cfg, tokenizer_for(cfg, model_cfg), "meta")
    named = dict(adapter.named_model_parameters())

    def of(name):
        (row,) = role_table([(name, named[name])], adapter.param_roles(), cfg, adapter.width)
        return row["optimizer"], row["lr"], row["weight_decay"], row["every"]

    close = pytest.approx
    assert of("embed_tokens.weight") == of("lm_head.weight") == ("adamw", 0.008, close(0.006), 2)
    assert of("bigrams.table.weight") == of("value_tables.3.weight") == ("adamw", close(0.6), close(0.015), 2)
    assert of("layers.0.mlp.up_proj.weight") == ("normuon", 0.023, close(0.0552), 1)
    assert of("layers.0.self_attn.o_proj.weight") == ("normuon", 0.023, close(0.0276), 1)
    assert of("layers.0.mlp.down_proj.weight") == ("normuon", close(0.092), close(0.0276), 1)
    assert of("layers.0.rho") == ("adamw", close(0.04), 0, 2)
    assert of("layers.0.self_attn.lambdas") == ("adamw", close(0.04), 0, 2)
    assert of("early_gates.mudd.up.weight")[:2] == ("adamw", close(0.0008))
    assert of("exit.down.weight")[:2] == ("adamw", close(0.002))
    assert of("smear.strength")[:2] == ("adamw", close(8e-5))
    (rule,) = {r.split for r in adapter.param_roles() if "qkv" in r.pattern}
    assert rule == (256, 256, 256, 256, 256, 256, 768), "queries and keys by pairs of heads, values as one"


@pytest.mark.slow
def test_layers_that_differ_are_compiled_once_each_and_stages_not_again():
    """11 layers of 10 kinds, more than the compiler takes of one piece of code unless it is told to. In every stage
    they compute what they compute uncompiled, gradients too."""
    words = ("model_cfg.n_layers=11", "torch_compile=true")
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True):
        opened = session_of(TYPE, *words)
        assert torch._dynamo.config.recompile_limit >= VARIANTS * 11, "as the session compiles them"
        del opened
        torch._dynamo.reset()
        adapter, eager = (adapter_of(TYPE, words[0]) for _ in range(2))
        batch = batch_for(adapter)
        for path in adapter.blocks():
            adapter.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
        before, graphs = counters["stats"]["unique_graphs"], []
        for step in (0, 1, 40, 70, 99):  # every stage
            found = [_gradients(each, batch, step) for each in (adapter, eager)]
            graphs.append(counters["stats"]["unique_graphs"] - before)
            for name, gradient in found[1].items():
                torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert graphs == [10] * 5
    torch._dynamo.reset()


def _gradients(adapter, batch, step):
    """Of step `step` of 100, and its loss."""
    ctx = context(step=step)
    adapter.zero_grad()
    adapter.on_step_start(ctx, 100)
    prepared = adapter.prepare(batch, ctx)
    loss = weighted_loss(adapter(prepared).terms, prepared.denominators)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in adapter.named_model_parameters()}}
