"""BD3-LM: blocks, their bound, the range of mask probabilities, and text block by block."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from adapters.base import GenerateOptions
from adapters.diffusion.bd3lm import block_of
from adapters.diffusion.clipping import ClipSearch
from adapters.diffusion.likelihood import estimate_bound
from adapters.diffusion.network import Network
from adapters.diffusion.process import Draw
from adapters.randomness import Noise
from models.bd3lm import BD3LMConfig
from tests.adapters.diffusion.processes import bd3lm, mdl, texts
from tests.adapters.diffusion.test_clipping import expectation, searching
from tests.adapters.diffusion.tiny import EVAL, S, V, assert_changes, batch, build, train_context
from tests.adapters.diffusion.toy import ENTROPY, F64, LAW, LENGTH, SEQUENCES, block_oracle, masked_oracle


def test_blocks_begin_behind_the_given_token():
    assert block_of(8, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2]
    assert block_of(4, 1).tolist() == [0, 0, 1, 2]


def test_one_block_is_masked_diffusion():
    whole, blocks = build("mdl"), build("bd3lm", block_length=S)
    blocks.model.load_state_dict(whole.model.state_dict(), strict=False)
    found, wanted = (a.likelihood(batch(range(6)), EVAL) for a in (blocks, whole))
    assert torch.allclose(found.nats, wanted.nats, atol=1e-9)
    assert torch.allclose(found.variance, wanted.variance, atol=1e-9)


def test_clean_text_is_read_as_noisy_text_without_noise_beside_it():
    """One pass over it gives what two do; a token sees its block and those before."""
    adapter = build("bd3lm", block_length=4)
    process, network, row = adapter.process, adapter.network(), batch([5])
    x0, doc_ids = torch.from_numpy(row.tokens[:, :S]), torch.from_numpy(row.doc_ids[:, :S])
    shared = process.shared(network, x0, doc_ids)
    beside = network.hidden(x0, torch.zeros(1, S), torch.arange(S), doc_ids=doc_ids, **shared)
    states = adapter.clean_states(row, EVAL)[0]
    assert torch.allclose(states, beside, atol=1e-12)
    row.tokens[0, 6] = row.tokens[0, 6] % (V - 1) + 1  # in the second block, which begins at 5
    changed = adapter.clean_states(row, EVAL)[0]
    assert torch.equal(states[:5], changed[:5]) and not torch.isclose(states[5:], changed[5:]).all(1).any()


def test_blocks_of_one_token_need_one_draw():
    adapter = build("bd3lm", block_length=1)
    found = adapter.likelihood(batch(range(6)), EVAL)
    assert (found.kind, found.estimator) == ("exact", "exact") and not bool(found.variance.any())
    assert found.per_token.shape == (6, S) and torch.allclose(found.per_token.sum(1), found.nats, atol=1e-9)
    shorter = adapter.likelihood(batch(range(6), seq_len=3), EVAL)
    assert torch.allclose(found.per_token[0, :3], shorter.per_token[0], atol=1e-9), "of the same tokens"
    other = adapter.likelihood(batch(range(6)), replace(EVAL, seed=7))
    assert torch.allclose(found.nats, other.nats, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_block_bound_of_a_perfect_network_is_the_entropy(size):
    """Every choice per block is enumerated: blocks are independent given the clean text."""
    process, network = bd3lm(size), Network(block_oracle(size))
    x0, noised = texts(SEQUENCES)
    places = [
        list(range(1 + b * size, min(1 + (b + 1) * size, LENGTH + 1))) for b in range(-(-LENGTH // size))
    ]
    options = []
    for place in places:
        options.append(
            [
                (1 / len(place) / math.comb(len(place), k), (k - 0.5) / len(place), subset)
                for k in range(1, len(place) + 1)
                for subset in itertools.combinations(place, k)
            ]
        )
    total = 0.0
    for combination in itertools.product(*options):
        weight = math.prod(w for w, _, _ in combination)
        u = torch.full((len(x0), process.noise_width(LENGTH + 1)), 0.9, dtype=F64)
        u[:, [p for _, _, subset in combination for p in subset]] = 0.1
        r = torch.tensor([[r for _, r, _ in combination]], dtype=F64).expand(len(x0), -1)
        shared = process.shared(network, x0, None)
        parts = process.estimate(Draw(network, x0, noised, None, r, u, u, shared))
        total += weight * float((LAW * parts["diffusion"]).sum())
    assert total == pytest.approx(ENTROPY, abs=1e-9)


def test_a_whole_row_as_one_block_is_the_masked_model():
    x0, noised = texts(SEQUENCES)
    r = torch.rand(27, 1, dtype=F64)
    u = torch.rand(27, 8, dtype=F64)
    network = Network(block_oracle(3))
    shared = bd3lm(3).shared(network, x0, None)
    block = bd3lm(3).estimate(Draw(network, x0, noised, None, r, u, u, shared))
    whole = mdl().estimate(Draw(Network(masked_oracle()), x0, noised, None, r, u[:, :4], u, {}))
    assert torch.allclose(block["diffusion"], whole["diffusion"], atol=1e-12)


def test_blocks_of_one_token_give_the_exact_likelihood():
    process = bd3lm(1)
    x0, noised = texts(SEQUENCES)
    bound = estimate_bound(
        process, Network(block_oracle(1)), x0, noised, None, Noise(0, 0, "x", range(27)), 4
    )
    assert process.exact
    assert torch.allclose(bound.nats, -LAW.log(), atol=1e-12) and bound.variance.max() < 1e-20


# -- the range of mask probabilities ---------------------------------------------------------------------


def test_nothing_is_clipped_before_a_range_has_been_found():
    """The search alone changes no step: training starts on the bound itself, which is log n at a zero output."""
    rows = batch(range(512))
    values = []
    for search in (True, False):
        adapter = build("bd3lm", trained=False, clip_search=search)
        prepared = adapter.prepare(rows, train_context(512))
        (term,) = adapter(prepared).terms.values()
        values.append(float(term.sum.detach()) / prepared.denominators["tokens"])
        assert term.likelihood is not search
    assert values[0] == values[1] == pytest.approx(math.log(V), rel=0.1)


def test_clipped_losses_are_not_called_bounds():
    out = (adapter := build("bd3lm"))(adapter.prepare(batch([0, 1]), train_context(2)))
    assert [*out.terms] == ["clipped_loss"] and not any("nelbo" in name for name in out.metrics)


def test_times_are_counted_where_they_lie():
    adapter = build("bd3lm", clip_search=False, sampling_eps_min=0.3, sampling_eps_max=0.8)
    out = adapter(adapter.prepare(batch(range(64)), train_context(64)))
    counts = [out.metrics[f"clipped_loss_t{d}"].count for d in range(10)]
    assert [c > 0 for c in counts] == [False] * 3 + [True] * 5 + [False] * 2


def test_a_range_from_the_clean_end_forces_no_mask():
    """Blocks of 4 in [1e-3, 0.5]: a block without a mask is not drawn again, as that would put the weight 1/t on one
    that was forced in. The mean weight of a token is 0.88 then, not 3.45."""
    clip = (1e-3, 0.5)
    wanted = expectation(4, clip, lambda t, k: k / (4 * t))
    assert wanted == pytest.approx(0.88, abs=0.005)
    process = bd3lm(4, n_ctx=4000, sampling_eps_max=0.5, clip_search=False)
    blocks = torch.rand(20, 1000, dtype=F64, generator=torch.Generator().manual_seed(0))
    time = process.training_time((torch.arange(1000) + blocks) / 1000)
    x0, noised = torch.zeros(20, 4001, dtype=torch.int64), torch.ones(20, 4001, dtype=torch.bool)
    noised[:, 0] = False
    u = torch.rand(20, process.noise_width(4001), dtype=F64, generator=torch.Generator().manual_seed(1))
    xt = process.corrupt(x0, noised, time, u)
    weights = process.rows(x0, xt, noised, time).weights
    assert float(weights.sum()) / int(noised.sum()) == pytest.approx(wanted, abs=0.05)
    assert process._block_sums(xt == process.mask).max() == 2


def test_ranges_stay_within_the_limits():
    limited = BD3LMConfig(block_length=4, sampling_eps_min=0.22, sampling_eps_max=0.9)
    found = limited.clip_ranges()
    assert found[(4, 14)] == (0.22, 0.7) and found[(8, 18)] == (0.4, 0.9)
    assert all(0.22 <= low < high <= 0.9 for low, high in found.values())
    narrow = BD3LMConfig(block_length=4, sampling_eps_min=0.4, sampling_eps_max=0.6)
    assert not narrow.clip_ranges() and narrow.unread()["clip_search"] == "sampling_eps_max=0.6"
    assert ClipSearch(4, narrow.clip_ranges(), True).best(searching(4)[1]) is None
    assert (1, 11) in BD3LMConfig(block_length=4).clip_ranges()


TIMED = {"time_conditioning": True, "sampler": "ancestral"}


@pytest.mark.parametrize("fields", [{}, TIMED], ids=["exact counts", "over time"])
def test_a_range_found_in_an_evaluation_reaches_training_and_survives_a_checkpoint(fields):
    adapter = build("bd3lm", **fields)
    assert adapter.process_at(0).clip == (1e-3, 1.0)
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(5)
    resumed = build("bd3lm", **fields)  # as from a checkpoint saved right here
    resumed.model.load_state_dict(adapter.model.state_dict())
    for a in (adapter, resumed):
        assert a.process_at(5 + a.AHEAD - 1).clip == (1e-3, 1.0)
        found = a.process_at(5 + a.AHEAD).clip
        assert 0.45 <= found[1] - found[0] <= 0.9
    assert adapter.process_at(99).clip == resumed.process_at(99).clip
    prepared = adapter.prepare(batch([0, 1, 2, 3]), train_context(step=99))
    before = adapter.prepare(batch([0, 1, 2, 3]), train_context(step=5))
    assert not torch.equal(prepared.tensors["xt"], before.tensors["xt"])


def test_a_range_that_waits_is_not_replaced_and_one_from_another_run_is():
    adapter = build("bd3lm")
    limits = (1e-3, 1.0)
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(5)
    planned = adapter.plan()
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(9)  # steps up to 25 may have been prepared
    assert adapter.plan() == planned
    adapter.model.clip_plan[4] = 1_000_000  # weights of a long run, at step 0 of a new one
    assert adapter.clip_at(0) == limits
    adapter.likelihood(batch(range(64)), EVAL)
    adapter.after_evaluation(3)
    assert adapter.plan()[4] == 3 + adapter.AHEAD and adapter.clip_at(3) == limits


# -- text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["first_hitting", "ancestral_cache", "ancestral", "analytic"])
def test_blocks_with_and_without_a_cache_are_the_same_text(sampler):
    options = GenerateOptions(max_new_tokens=10, temperature=1.0, stop_at_document_end=False)
    cached, plain = (
        build("bd3lm", kv_cache=c, sampler=sampler).generate([[1, 2]], options) for c in (True, False)
    )
    assert cached.tokens == plain.tokens
    assert cached.network_calls < plain.network_calls


# -- every field has an effect ---------------------------------------------------------------------------


FIELDS = [
    ({}, {"block_length": 2}, "loss"),
    ({}, {"nelbo_draws": 8}, "bound"),
    ({"clip_search": False}, {"sampling_eps_min": 0.45}, "loss"),
    ({"clip_search": False}, {"sampling_eps_max": 0.5}, "loss"),
    ({"sampling_eps_min": 0.45}, {"resample_masks": False}, "loss"),
    ({}, {"use_low_discrepancy_sampler": False}, "loss"),
    ({}, {"sampler": "analytic"}, "text"),
    ({"sampler": "ancestral_cache"}, {"num_sampling_steps": 2}, "text"),
    ({}, {"kv_cache": False}, "calls"),
    ({}, {"time_conditioning": True}, "loss"),
]


@pytest.mark.parametrize("base, change, what", FIELDS, ids=lambda v: str(v).replace(" ", "")[:40])
def test_every_field_changes_something(base, change, what):
    assert_changes("bd3lm", base, change, what)
