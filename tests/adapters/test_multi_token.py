"""Further tokens: their losses, what counts in them, and how much memory their logits take."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adapters.base import weighted_loss
from adapters.default import nth
from kernels.choose import Kernels
from tests.contract.tiny import (
    SEQ_LEN,
    adapter_of,
    batch_for,
    batch_of,
    config,
    context,
    loss_and_gradients,
    move_away_from_uniform,
    split,
)
from trainer.optim.optimizers import build_optimizers

# n tokens ahead, as fields of each type.
TYPES = {
    "mtp": lambda n: [f"model_cfg.n_mtp_tokens={n}", f"model_cfg.n_layers={n + 1}"],
    "mtm": lambda n: [f"model_cfg.n_mtp_modules={n - 1}", "model_cfg.n_layers=1"],
}


def of(type_, n, *more, dtype=torch.float64):
    adapter = adapter_of(type_, *TYPES[type_](n), *more, dtype=dtype)
    move_away_from_uniform(adapter, std=0.1)
    return adapter


def step(adapter, batch, number=0, total=1):
    """(output, denominators) of a training step on one batch."""
    ctx = context(len(batch.rows), number)
    adapter.on_step_start(ctx, total)
    prepared = adapter.prepare(batch, ctx)
    return adapter(prepared), prepared


# -- the losses --------------------------------------------------------------------------------------------------------


def all_logits_at_once(adapter, parts):
    """The objective as it is written: sum over heads of weight * mean over the step's positions, and its gradient."""
    adapter.zero_grad(set_to_none=True)
    n, rows = adapter.data_spec().lookahead, sum(len(part.rows) for part in parts)
    prepared = [adapter.prepare(part, context(rows)) for part in parts]
    total = 0.0
    for p in prepared:
        hidden = adapter.hidden(p)
        for k, weight in enumerate(adapter.model_cfg.loss_weights(0.0), 1):
            states = hidden.states if k == 1 else hidden.extra[f"head_{k}"]
            logits = adapter.model.logits(states).flatten(0, 1)
            nats = F.cross_entropy(logits, p.tensors[nth("targets", k)].flatten(), reduction="none")
            counted = p.tensors[nth("weights", k)].flatten()
            total = total + weight * (nats * counted).sum() / sum(
                q.denominators[nth("tokens", k)] for q in prepared
            )
    assert len(adapter.model_cfg.loss_weights(0.0)) == n
    total.backward()
    return {name: p.grad.clone() for name, p in adapter.named_model_parameters()}


@pytest.mark.parametrize("way", ["auto", "reference"])
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("type_", TYPES)
def test_gradients_are_those_of_all_logits_at_once(type_, n, tied, way):
    """Head by head, with what the plain definition keeps computed anew; also over three micro-batches."""
    tie = (
        f"model_cfg.tie_embeddings={tied}"
        if type_ == "mtp"
        else f"model_cfg.trunk_cfg={{tie_embeddings: {tied}}}"
    )
    adapter = of(type_, n, tie, f"kernels={way}")
    batch = batch_for(adapter)
    batch.doc_ids[:, 11:] = 1
    batch.weights[1, 5:] = 0
    plain = all_logits_at_once(adapter, [batch])
    for parts in ([batch], split(batch, [2, 1, 1])):
        _, found = loss_and_gradients(adapter, parts)
        assert found.keys() == plain.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_heads_are_summed_and_modules_averaged():
    """As in the papers: each head weighs 1, or what is said; each of D modules lambda / D."""
    for type_, more, weights in (
        ("mtp", [], [1.0, 1.0, 1.0]),
        ("mtp", ["model_cfg.mtp_loss_weights=[0.5,2.0,0.0]"], [0.5, 2.0, 0.0]),
        ("mtm", ["model_cfg.mtp_lambda=0.5"], [1.0, 0.25, 0.25]),
    ):
        output, prepared = step(of(type_, 3, *more), batch_for(of(type_, 3)))
        assert [*output.terms] == ["ce", "head_2", "head_3"]
        assert [term.weight for term in output.terms.values()] == weights
        assert [term.likelihood for term in output.terms.values()] == [True, False, False]
        means = [t.sum.item() / prepared.denominators[t.denominator] for t in output.terms.values()]
        total = weighted_loss(output.terms, prepared.denominators)
        assert total.item() == pytest.approx(np.dot(weights, means), rel=1e-12)


def test_lambda_changes_once_at_its_share_of_the_training():
    words = ["model_cfg.mtp_lambda=0.3", "model_cfg.mtp_lambda_final=0.1", "model_cfg.mtp_lambda_switch=0.68"]
    for more, wanted in ((words, [0.3] * 7 + [0.1] * 3), (words[:1], [0.3] * 10)):
        adapter = of("mtm", 2, *more)
        found = [step(adapter, batch_for(adapter), s, 10)[0].terms["head_2"].weight for s in range(10)]
        assert found == wanted


def test_a_weight_of_0_gives_vanillas_gradients_and_leaves_no_parameter_without_one():
    adapter, vanilla = of("mtm", 3, "model_cfg.mtp_lambda=0.0"), adapter_of("vanilla", "model_cfg.n_layers=1")
    state = adapter.model.trunk.state_dict()
    vanilla.to(torch.float64).model.load_state_dict(state)
    batch = batch_for(adapter)
    shorter = batch_of(batch.tokens[:, : SEQ_LEN + 1])
    _, plain = loss_and_gradients(vanilla, [shorter])
    losses, found = loss_and_gradients(adapter, [batch])
    assert losses["head_3"] > 0, "they are reported all the same"
    for name, gradient in found.items():
        wanted = plain.get(name.removeprefix("trunk."), torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=1e-15, msg=name)


def test_one_head_is_vanillas_objective():
    adapter, vanilla = of("mtp", 1), adapter_of("vanilla", "model_cfg.n_layers=2", dtype=torch.float64)
    renamed = {
        name.replace("heads.0.", "layers.1."): value for name, value in adapter.model.state_dict().items()
    }
    vanilla.model.load_state_dict(renamed)
    batch = batch_for(adapter)
    (losses, found), (plain_losses, plain) = (loss_and_gradients(a, [batch]) for a in (adapter, vanilla))
    assert losses == plain_losses
    assert all(torch.equal(plain[name.replace("heads.0.", "layers.1.")], g) for name, g in found.items())


def test_deepseeks_modules_under_mtp_are_those_of_mtm():
    """Bit for bit, from one seed, with fields of vanilla that are the trunk's there: there is one implementation."""
    words = ["model_cfg.n_layers=2", "model_cfg.mtp_lambda=0.2"]
    parallel = adapter_of("mtp", *words, "model_cfg.n_mtp_tokens=3", "model_cfg.use_deepseek_mtp=true",
                          "model_cfg.n_kv_heads=2", "model_cfg.qk_norm=true")  # fmt: skip
    sequential = adapter_of(
        "mtm", *words, "model_cfg.n_mtp_modules=2", "model_cfg.trunk_cfg={n_kv_heads: 2, qk_norm: true}"
    )
    ours, theirs = parallel.model.state_dict(), sequential.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert parallel.data_spec() == sequential.data_spec() and parallel.flops(64) == sequential.flops(64)
    batch = batch_for(parallel)
    (losses, found), (others, wanted) = (loss_and_gradients(a, [batch]) for a in (parallel, sequential))
    assert losses == others and len(losses) == 3
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    (one, _), (other, _) = (step(a, batch, 9, 10) for a in (parallel, sequential))
    assert [t.weight for t in one.terms.values()] == [t.weight for t in other.terms.values()]


@pytest.mark.parametrize("gate", ["mixtral", "deepseek_v3"])
def test_experts_of_modules_are_counted_and_balanced_with_those_of_the_trunk(gate):
    """Each has its own: its losses, its tokens and its bias, one more layer per module."""
    adapter = of(
        "mtm", 3, "model_cfg.trunk=moe", f"model_cfg.trunk_cfg={{gate_type: {gate}, first_k_dense: 0}}"
    )
    output, prepared = step(adapter, batch_for(adapter))
    load, tokens = adapter.load, prepared.tensors["inputs"].numel()
    layer, (first, second) = (
        adapter.model.trunk.layers[0].mlp,
        (m.block.mlp for m in adapter.model.mtp_modules),
    )
    assert adapter.layers == [layer, first, second]
    assert load.sum(1).tolist() == [tokens * layer.gate.top_k] * 3
    assert len({id(p) for one in adapter.layers for p in one.parameters()}) == 3 * len([*layer.parameters()])
    term = "balance" if gate == "mixtral" else "sequence_balance"
    for one in (layer, first, second):
        adapter.zero_grad()
        step(adapter, batch_for(adapter))[0].terms[term].sum.backward()
        assert one.gate.weight.grad.any()
    assert adapter.active_parameters() < sum(p.numel() for p in adapter.parameters())
    assert adapter.console_metrics and not of("mtm", 2).console_metrics
    if gate == "deepseek_v3":
        adapter.load = load
        adapter.after_step(0, torch.zeros(()))
        for one, counts in zip(adapter.layers, load, strict=True):
            towards_mean = (counts.sum() - len(counts) * counts).sign()
            torch.testing.assert_close(one.gate.e_score_correction_bias, 0.001 * towards_mean.float())


# -- what counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_", TYPES)
def test_a_token_behind_the_end_of_a_document_teaches_no_head(type_):
    """One position has a second token ahead: its loss is the head's, whatever stands elsewhere. Where none has, the
    loss is 0, and nothing is NaN."""
    adapter = of(type_, 2)
    batch = batch_for(adapter, rows=2)
    batch.doc_ids[:] = np.arange(batch.doc_ids.shape[1])
    batch.doc_ids[0, :2] = 0  # x_1 belongs to x_0's document, x_2 is what follows it
    output, prepared = step(adapter, batch)
    assert prepared.denominators["tokens_2"] == 1
    hidden = adapter.hidden(prepared).extra["head_2"][0, 0]
    nats = -adapter.model.logits(hidden).log_softmax(-1)[batch.tokens[0, 2]]
    torch.testing.assert_close(output.terms["head_2"].sum, nats, rtol=1e-12, atol=0)
    batch.tokens[0, 3:] = (batch.tokens[0, 3:] + 1) % adapter.tokenizer.eot
    batch.tokens[1] = (batch.tokens[1] + 1) % adapter.tokenizer.eot
    torch.testing.assert_close(step(adapter, batch)[0].terms["head_2"].sum, nats, rtol=1e-12, atol=0)
    batch.doc_ids[0, 1] = 1
    losses, gradients = loss_and_gradients(adapter, [batch])
    assert losses["head_2"] == 0.0
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())


@pytest.mark.parametrize("type_", TYPES)
def test_scores_are_the_first_heads_alone(type_):
    """The others are not even run."""
    adapter = of(type_, 3).eval()
    batch = batch_for(adapter)
    assert not adapter.hidden(adapter.prepare(batch, context(phase="eval"))).extra
    before = adapter.likelihood(batch, context(phase="eval"))
    with torch.no_grad():
        for name, p in adapter.named_model_parameters():
            if name.startswith(("heads.1", "heads.2", "mtp_modules")):
                p.fill_(torch.nan)
    after = adapter.likelihood(batch, context(phase="eval"))
    assert torch.equal(before.nats, after.nats) and torch.isfinite(after.nats).all()
    shorter = batch_of(batch.tokens[:, : SEQ_LEN + 1])
    output, prepared = step(adapter, batch)
    assert float(before.nats.sum()) == pytest.approx(output.terms["ce"].sum.item(), rel=1e-12)
    assert prepared.denominators["tokens"] == shorter.weights.sum()


@pytest.mark.parametrize("type_", TYPES)
def test_head_k_learns_the_k_th_token_ahead(type_):
    """Of text that counts: what head k says at t is t + k, everywhere, and never its neighbour."""
    period, n = 7, 3
    adapter = adapter_of(type_, *TYPES[type_](n))
    cfg, _ = config(type_, "optimizer=adamw", "learning_rate=0.003", "lr_scaling=none")
    optimizers = build_optimizers(adapter.named_model_parameters(), adapter.param_roles(), cfg, adapter.width)
    rows = np.arange(period)[:, None] + np.arange(SEQ_LEN + n)
    batch = batch_of(rows % period, n)
    for number in range(60):
        output, prepared = step(adapter, batch, number, 60)
        weighted_loss(output.terms, prepared.denominators).backward()
        optimizers.step(1.0)
        optimizers.zero_grad()
    with torch.no_grad():
        hidden = adapter.hidden(prepared)
        for k, states in enumerate([hidden.states, *hidden.extra.values()], 1):
            said = adapter.model.logits(states).argmax(-1)
            assert (said.numpy() == (rows[:, :SEQ_LEN] + k) % period).all(), k


# -- memory ------------------------------------------------------------------------------------------------------------


class LiveLogits(TorchDispatchMode):
    """The most bytes that tensors of `columns` columns took at once."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.live, self.most = columns, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.ndim > 1 and t.shape[-1] in self.columns:
                storage = t.untyped_storage()
                self.live[StorageWeakRef(storage)] = storage.nbytes()
        self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
        self.most = max(self.most, sum(self.live.values()))
        return result


def most_bytes_of_logits(type_, n, way, monkeypatch, sparing=True):
    adapter = of(type_, n, "model_cfg.vocab_size=300", dtype=torch.float32)
    adapter.kernels = Kernels({"linear_cross_entropy": way})
    if not sparing:
        monkeypatch.setattr(adapter, "head_loss", lambda *given: type(adapter).head_loss(adapter, *given[:5]))
    batch = batch_for(adapter, rows=24)
    with LiveLogits((300, 384)) as seen:
        output, prepared = step(adapter, batch)
        weighted_loss(output.terms, prepared.denominators).backward()
    return seen.most


@pytest.mark.parametrize("way", ["auto", "reference", "chunked"])
@pytest.mark.parametrize("type_", TYPES)
def test_logits_of_one_head_exist_at_a_time(type_, way, monkeypatch):
    one, four = (most_bytes_of_logits(type_, n, way, monkeypatch) for n in (1, 4))
    assert 0 < four <= 1.1 * one
    rows = 24 * SEQ_LEN
    assert one >= (rows if way == "reference" else 512) * 300 * 4, "the probe sees logits"
    if way == "reference":
        assert most_bytes_of_logits(type_, 4, way, monkeypatch, sparing=False) > 1.5 * four, (
            "kept ones would show"
        )
