"""Self-speculative decoding: the text of plain decoding, in fewer passes, whatever is drafted."""

import collections
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from adapters import decoding
from adapters.base import GenerateOptions, Speculation
from adapters.decoding import draw
from adapters.default import DefaultModelAdapter
from adapters.shaping import Shaping
from adapters.speculative import Draft, verdict
from configs.schema import DefaultModelConfig
from models.layers.cache import KVCache
from tests.adapters.planted import by_chance, own, plant, wrong
from tests.contract.tiny import Letters, adapter_of, batch_of, session_of, train_on
from tests.models.tiny import VOCABULARY, Recurrent

CONTEXT, DRAFTS = 8, 3
GREEDY = GenerateOptions(max_new_tokens=33, temperature=0.0, stop_at_document_end=False)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0)
PROMPTS = [[5, 6, 7], [], [i % 63 for i in range(2 * CONTEXT + 3)], [9], [i for i in range(CONTEXT)]]
DRAFTERS = {"wrong": wrong, "own": own, "chance": by_chance}
every_drafter = pytest.mark.parametrize("drafter", DRAFTERS)


def speculative(options, **given):
    return dataclasses.replace(options, speculative=True, **given)


def varied(adapter, std=3.0):
    """Untrained, it is all but uniform: make the text depend on what was said before."""
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.ndim > 1:
                source = torch.Generator().manual_seed(0)
                parameter.normal_(std=std / math.sqrt(parameter.shape[1]), generator=source)
    return adapter.eval()


def made(type_="vanilla", n_ctx=CONTEXT, vocabulary=64):
    sizes = {"n_ctx": n_ctx, "d_model": 16, "n_heads": 2, "n_layers": 1, "tie_embeddings": "false"}
    small = [f"train_seq_len={n_ctx}", *(f"model_cfg.{name}={value}" for name, value in sizes.items())]
    return varied(adapter_of(type_, *small, vocabulary=vocabulary, dtype=torch.float64))


@pytest.fixture(scope="module", params=["vanilla", "gpt2"])
def adapter(request):
    return made(request.param)


# -- greedy: the same text ---------------------------------------------------------------------------------------------


@every_drafter
@pytest.mark.parametrize("draft", [1, 2, None])
def test_greedy_text_is_that_of_plain_decoding(adapter, drafter, draft):
    """Of prompts of any length together, past the end of the context."""
    plant(adapter, DRAFTERS[drafter](adapter.model))
    plain = adapter.generate(PROMPTS, GREEDY)
    found = adapter.generate(PROMPTS, speculative(GREEDY, draft=draft))
    assert found.tokens == plain.tokens
    assert len({tuple(text) for text in plain.tokens}) >= 4 and len(set(plain.tokens[0])) > 3
    if drafter == "wrong":
        assert sum(found.speculation.accepted) == 0
    if drafter == "own":
        assert found.speculation.accepted == found.speculation.drafted
        assert found.network_calls < plain.network_calls
    if drafter == "chance":
        drafted, accepted = found.speculation.drafted, found.speculation.accepted
        assert 0 < accepted[0] < drafted[0], "it is right and wrong by turns"


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_tokens_of_a_full_round(drafts):
    """One where all drafts are wrong, 1 + drafts where all are right; the first pass reads the prompt."""
    adapter = made(n_ctx=64)
    options = dataclasses.replace(GREEDY, max_new_tokens=1 + 4 * (1 + drafts))
    plain = adapter.generate([[1, 2]], options)
    plant(adapter, wrong(adapter.model))
    found = adapter.generate([[1, 2]], speculative(options, draft=drafts))
    assert found.tokens == plain.tokens and found.network_calls == plain.network_calls
    assert found.speculation.tokens_per_pass == 1
    plant(adapter, own(adapter.model))
    found = adapter.generate([[1, 2]], speculative(options, draft=drafts))
    assert found.tokens == plain.tokens and found.network_calls == 1 + 4
    assert found.speculation == Speculation([4] * drafts, [4] * drafts, options.max_new_tokens, 5)


@pytest.mark.parametrize("attention", [True, False])
def test_states_and_caches_of_any_kind_are_taken_back(attention):
    """A model with a state, which is no window's: what was drafted in vain leaves no trace."""
    cfg = DefaultModelConfig(vocab_size=VOCABULARY)
    adapter = DefaultModelAdapter(Recurrent(attention), cfg, Letters(VOCABULARY))
    prompts = [[1, 2], [], [i % 10 for i in range(30)], [7]]
    plain = adapter.generate(prompts, GREEDY)
    plant(adapter, by_chance(adapter.model))
    found = adapter.generate(prompts, speculative(GREEDY))
    assert found.tokens == plain.tokens
    assert 0 < sum(found.speculation.accepted) < sum(found.speculation.drafted)


def test_rows_that_accept_more_than_others_go_ahead():
    """One row's drafts are right, the other's wrong: the first is done while the second goes on by single tokens."""
    adapter = made(n_ctx=256)
    right, never = own(adapter.model), wrong(adapter.model)
    plant(adapter, lambda text: (right if int(text[1]) == 1 else never)(text))
    options = dataclasses.replace(GREEDY, max_new_tokens=40)
    widths, forward = [], type(adapter.model).forward
    heard = collections.defaultdict(list)

    def hear(row, tokens):
        heard[row] += tokens
        widths.append((row, len(tokens), len(heard[0])))

    found = adapter.generate([[1], [2]], speculative(options), hear)
    assert found.tokens == adapter.generate([[1], [2]], options).tokens == [heard[0], heard[1]]
    assert max(n for row, n, _ in widths if row == 0) == 4, "it takes all of its drafts at once"
    assert {n for row, n, _ in widths if row == 1} == {1}
    behind = [done for row, _, done in widths if row == 1]
    assert max(done - i for i, done in enumerate(behind)) > 1
    assert found.speculation.passes > found.network_calls
    assert type(adapter.model).forward is forward


def test_finished_rows_leave_and_nobody_notices(adapter):
    plant(adapter, by_chance(adapter.model))
    ending = dataclasses.replace(GREEDY, max_new_tokens=60, stop_ids=(3, 11, 40, 57, 63), temperature=1.0)
    prompts = [[i] for i in range(6)]
    found = adapter.generate(prompts, speculative(ending)).tokens
    assert len({len(text) for text in found}) > 3 and max(map(len, found)) < ending.max_new_tokens
    whole = adapter.generate(prompts, speculative(ending, stop_ids=())).tokens
    for text, on in zip(found, whole, strict=True):
        assert on[: len(text)] == text and on[len(text)] in ending.stop_ids


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(1, 11))
def test_the_text_has_the_length_asked_for(length):
    """Wherever in a block of drafts that is."""
    adapter = made(n_ctx=64)
    plant(adapter, own(adapter.model))
    options = dataclasses.replace(GREEDY, max_new_tokens=length)
    heard = []
    found = adapter.generate([[1]], speculative(options), lambda row, new: heard.extend(new))
    assert found.tokens == adapter.generate([[1]], options).tokens == [heard] and len(heard) == length


def test_a_stop_inside_a_block_ends_the_text_there():
    adapter = made(n_ctx=64)
    plant(adapter, own(adapter.model))
    (whole,) = adapter.generate([[1]], GREEDY).tokens
    places = [(at, stop) for at, stop in enumerate(whole[:9]) if whole.index(stop) == at]
    assert len(places) >= 7
    for at, stop in places:
        heard = []
        found = adapter.generate(
            [[1]], speculative(GREEDY, stop_ids=(stop,)), lambda row, new, heard=heard: heard.extend(new)
        )
        assert found.tokens == [whole[:at]] == [heard]
        # Blocks begin at tokens 0, 1, 5 and 9: of the one that the stop is in, drafts up to it were judged.
        in_block = min((at - 1) % 4 + 1, DRAFTS) if at else 0
        assert found.speculation.accepted == found.speculation.drafted
        assert sum(found.speculation.drafted) == max(0, (at - 1) // 4) * DRAFTS + in_block


def test_the_end_of_a_document_ends_it_too():
    adapter = made(n_ctx=64)
    plant(adapter, own(adapter.model))
    options = dataclasses.replace(SAMPLED, max_new_tokens=300, stop_at_document_end=True)
    (text,) = adapter.generate([[1]], speculative(options)).tokens
    assert len(text) < 300 and adapter.tokenizer.eot not in text


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_rows_text_does_not_depend_on_the_others(adapter, temperature):
    """Nor on when these make it wait."""
    plant(adapter, by_chance(adapter.model))
    options = speculative(GREEDY, temperature=temperature)
    together = adapter.generate(PROMPTS, options).tokens
    for row, prompt in enumerate(PROMPTS):
        others = [[1 + i] * (3 * i + 1) for i in range(len(PROMPTS))]
        others[row] = prompt
        assert adapter.generate(others[: row + 1], options).tokens[row] == together[row]


def test_more_rows_than_fit_at_once_are_taken_in_turn(adapter, monkeypatch):
    plant(adapter, by_chance(adapter.model))
    together = adapter.generate(PROMPTS, speculative(SAMPLED))
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", 2)
    in_turn = adapter.generate(PROMPTS, speculative(SAMPLED))
    assert in_turn.tokens == together.tokens and in_turn.network_calls > together.network_calls
    assert (in_turn.speculation.drafted, in_turn.speculation.accepted) == (
        together.speculation.drafted,
        together.speculation.accepted,
    )


def test_seeds(adapter):
    plant(adapter, by_chance(adapter.model))
    state = torch.get_rng_state()
    texts = [adapter.generate([[1]], speculative(SAMPLED, seed=seed)).tokens for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not touched"


# -- sampled: the same law ---------------------------------------------------------------------------------------------


def chi_square(counts, law):
    """(Pearson's statistic, its 99.9 % point by Wilson and Hilferty) over what can occur; nothing else may have."""
    expected = np.asarray(law) * counts.sum()
    possible = expected > 0
    assert counts[~possible].sum() == 0 and expected[possible].min() > 5
    free = possible.sum() - 1
    critical = free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3
    return (((counts - expected) ** 2)[possible] / expected[possible]).sum(), critical


P, Q = [0.4, 0.3, 0.2, 0.1], [0.25, 0.35, 0.3, 0.1]


def law_of_verdicts(p, q, count=6000, drafted=None, **shaped):
    """How often each token comes first, where drafts are drawn from q (or are always `drafted`)."""
    source, shaping = torch.Generator().manual_seed(0), Shaping(**shaped)
    logits = torch.tensor([p, p]).double().log()
    law = shaping(torch.tensor([q]).double().log()).exp()
    drafts = draw(law.expand(count, -1), [source] * count) if drafted is None else [drafted] * count
    said = [verdict(logits, [Draft(token, law[0])], shaping, source)[0] for token in drafts]
    return np.bincount(said, minlength=len(p))


def test_what_is_drafted_does_not_change_the_law():
    statistic, critical = chi_square(law_of_verdicts(P, Q), P)
    assert statistic < critical


def test_a_draft_that_was_not_drawn_from_its_law_would():
    """The fault of taking the likeliest draft and judging it as one that was drawn: (1/7, 6/7, 0, 0)."""
    counts = law_of_verdicts(P, Q, drafted=1)
    assert abs(counts[1] / counts.sum() - 6 / 7) < 0.02 and counts[2:].sum() == 0


@pytest.mark.parametrize(
    "shaped", [{"temperature": 2.0}, {"top_k": 2}, {"top_p": 0.65}, {"min_p": 0.6}, {"tokens": 3}]
)
def test_both_laws_are_shaped(shaped):
    """The text's law is that of plain decoding under the same options."""
    law = Shaping(**shaped)(torch.tensor([P]).log()).exp()[0]
    statistic, critical = chi_square(law_of_verdicts(P, Q, 3000, **shaped), law)
    assert statistic < critical


def test_a_draft_of_the_models_own_law_is_always_accepted():
    logits, law = torch.tensor([P, P]).double().log(), torch.tensor(P).double()
    for token in range(4):
        for seed in range(20):
            source = torch.Generator().manual_seed(seed)
            said = verdict(logits, [Draft(token, law)], Shaping(), source)
            assert said[0] == token and len(said) == 2


def test_rounding_alone_refuses_no_token_that_exists():
    """p and q the same but for rounding, and p below q at the draft: nothing is left of p - q."""
    p = torch.tensor([[1e-9, 1.0]]).double()
    law = torch.tensor([1.0, 1.0]).double()  # no law: as far above p as can be
    for seed in range(20):
        source = torch.Generator().manual_seed(seed)
        assert verdict(p.log(), [Draft(0, law)], Shaping(), source)[0] == 1


class Chain(nn.Module):
    """Three tokens, the last of which ends documents, each drawn given the one before it."""

    max_context = 4

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())

    def init_cache(self, rows):
        return KVCache(0, rows)

    def forward(self, tokens, cache=None):
        cache.advance(tokens.shape[1])
        return self.table[tokens]

    def logits(self, hidden):
        return hidden


def chain_law(adapter, options, length):
    """Of every text of that length behind the start of a document."""
    steps = adapter.shaping(options)(adapter.model.table.detach()).exp()  # (3, 3)
    law = {}
    for text in itertools.product(range(3), repeat=length):
        pairs = zip((adapter.tokenizer.eot, *text), text, strict=False)
        law[text] = math.prod(float(steps[pair]) for pair in pairs)
    return law


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 2}])
def test_sampled_text_has_the_law_of_plain_decoding(monkeypatch, options):
    """Five tokens together, some beyond a window that slides, whatever is drafted from."""
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", 1500)
    adapter = DefaultModelAdapter(Chain(), DefaultModelConfig(vocab_size=3), Letters(3))
    others = torch.randn(3, 3, generator=torch.Generator().manual_seed(1)).double()
    plant(adapter, lambda text: others[text[-1]], most=2)
    chosen = GenerateOptions(max_new_tokens=5, stop_at_document_end=False, **{"temperature": 1.0, **options})
    found = adapter.generate([[]] * 1500, speculative(chosen))
    drafted, accepted = found.speculation.drafted, found.speculation.accepted
    assert 0 < accepted[1] < accepted[0] < drafted[0]
    law = chain_law(adapter, chosen, 5)
    assert sum(law.values()) == pytest.approx(1)
    texts = collections.Counter(map(tuple, found.tokens))
    # Rare texts together, so that each class is expected often enough.
    rare = [text for text, p in law.items() if 0 < p * 1500 < 6]
    classes = [[text] for text, p in law.items() if p * 1500 >= 6] + ([rare] if rare else [])
    assert sum(texts[text] for cls in classes for text in cls) == 1500
    counts = np.array([sum(texts[text] for text in cls) for cls in classes])
    statistic, critical = chi_square(counts, [sum(law[text] for text in cls) for cls in classes])
    assert statistic < critical


# -- models that draft -------------------------------------------------------------------------------------------------

PERIOD, ROW = 12, 48
QUICK = ["optimizer=adamw", "learning_rate=0.01", "lr_scaling=none", "num_iterations=80"]
SMALL = ["model_cfg.d_model=32", "model_cfg.n_heads=2", "model_cfg.n_ctx=64", f"train_seq_len={ROW}"]
HEADS = {
    "mtp": ["model_cfg.n_mtp_tokens=3", "model_cfg.n_layers=4"],
    "mtm": ["model_cfg.n_mtp_modules=2"],
}


def memorised(type_, shift=0):
    """(adapter, text): trained on one row of a text that comes round and round; further targets may be `shift` places
    further on than they ought to be."""
    session = session_of(type_, *QUICK, *SMALL, *HEADS[type_])
    text = np.resize(np.random.default_rng(0).permutation(63)[:PERIOD], ROW + 3)
    prepare = session.adapter.prepare

    def shifted(batch, ctx):
        prepared = prepare(batch, ctx)
        for k in (2, 3):
            prepared.tensors[f"targets_{k}"] = prepared.tensors[f"targets_{k}"].roll(-shift, 1)
        return prepared

    session.adapter.prepare = shifted
    tokens = np.concatenate(([session.dataset.tokenizer.eot], text[:-1]))[None]
    train_on(session, batch_of(tokens, 3), range(80), 80)
    return session.adapter.eval(), text.tolist()


@pytest.mark.parametrize("type_", HEADS)
def test_of_memorised_text_every_draft_is_accepted(type_):
    """A third of the passes, then. Text alone would not show that a head or module is broken: it is verified."""
    adapter, text = memorised(type_)
    options = dataclasses.replace(GREEDY, max_new_tokens=1 + 3 * 13)
    plain = adapter.generate([text[:4]], options)
    found = adapter.generate([text[:4]], speculative(options))
    assert found.tokens == plain.tokens == [text[4:44]]
    assert found.speculation == Speculation([13, 13], [13, 13], 40, 14)
    assert (found.network_calls, plain.network_calls) == (14, 40)


@pytest.mark.parametrize("type_", HEADS)
def test_drafts_of_heads_that_learned_the_wrong_token_are_not(type_):
    adapter, text = memorised(type_, shift=1)
    found = adapter.generate([text[:4]], speculative(GREEDY))
    accepted, drafted = found.speculation.accepted, found.speculation.drafted
    assert max(accepted) < 0.2 * min(drafted) and found.tokens == adapter.generate([text[:4]], GREEDY).tokens


@pytest.mark.parametrize("type_", HEADS)
def test_in_bf16_text_parts_only_where_two_tokens_are_as_good(type_):
    """Within the rounding of that very text. Every token has a twin whose logit is all but the same. Whether texts part
    at all is the processor's affair; that a text which parts elsewhere would be told from them is not."""
    adapter = varied(adapter_of(type_, *SMALL, *HEADS[type_]), std=1.0)
    with torch.no_grad():
        adapter.model.head_weight[1::2] = adapter.model.head_weight[::2] * 1.001
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = (adapter.generate(PROMPTS, how).tokens for how in (GREEDY, speculative(GREEDY)))
    for prompt, one, other in zip(PROMPTS, plain, found, strict=True):
        assert as_good(adapter, prompt, one, other)
        last = one[-1]
        twin, worst = [*one[:-1], last ^ 1], [*one[:-1], worst_behind(adapter, [*prompt, *one[:-1]])]
        assert as_good(adapter, prompt, one, twin) and not as_good(adapter, prompt, one, worst)


def as_good(adapter, prompt, one, other):
    """Whether two texts are the same up to a token in whose place, but for the rounding of bf16, both are as likely."""
    at = next((i for i, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return True
    exact = logits_behind(adapter, [*prompt, *one[:at]])
    with torch.autocast("cpu", torch.bfloat16):
        rounding = (exact - logits_behind(adapter, [*prompt, *one[:at]])).abs().max()
    return bool((exact[one[at]] - exact[other[at]]).abs() <= 4 * rounding)


def logits_behind(adapter, tokens):
    with torch.no_grad():
        text = torch.tensor([[adapter.tokenizer.eot, *tokens]])
        return adapter.model.logits(adapter.model(text)[0, -1])  # (V,)


def worst_behind(adapter, tokens):
    return int(logits_behind(adapter, tokens).argmin())


@pytest.mark.slow
@pytest.mark.parametrize("type_", HEADS)
def test_sampled_text_has_the_law_of_the_first_head(type_, monkeypatch):
    """1e5 texts of four tokens, each one of three that top_k leaves."""
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", 2000)
    sizes = ["model_cfg.d_model=16", "model_cfg.n_heads=2", *HEADS[type_]]
    adapter = varied(adapter_of(type_, *sizes, vocabulary=4, dtype=torch.float64), std=0.5)
    options = GenerateOptions(max_new_tokens=4, temperature=1.0, top_k=3, stop_at_document_end=False)
    found = adapter.generate([[1]] * 100_000, speculative(options))
    assert 0 < found.speculation.accepted[1] < found.speculation.drafted[1]
    texts = collections.Counter(map(tuple, found.tokens))
    shaping, law = adapter.shaping(options), {}
    for text in itertools.product(range(4), repeat=4):
        with torch.no_grad():
            tokens = torch.tensor([[adapter.tokenizer.eot, 1, *text[:3]]])
            logits = adapter.model.logits(adapter.model(tokens))[0, 1:]  # (4, V)
        law[text] = math.prod(shaping(logits).exp()[range(4), text].tolist())
    rare = [text for text, p in law.items() if 0 < p < 1e-4]
    classes = [[text] for text, p in law.items() if p == 0 or p >= 1e-4] + ([rare] if rare else [])
    counts = np.array([sum(texts[text] for text in cls) for cls in classes])
    statistic, critical = chi_square(counts, [sum(law[text] for text in cls) for cls in classes])
    assert counts.sum() == 100_000 and statistic < critical


# -- what may be asked for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"draft": 2}, "draft: 2 is read with speculative alone"),
        ({"draft": 0, "speculative": True}, "draft: must be at least 1, got 0"),
        (
            {"use_cache": False, "speculative": True},
            "behind what the cache holds; leave out speculative or no_cache",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        GenerateOptions(**options)


def test_more_drafts_than_a_model_has_are_refused(adapter):
    plant(adapter, own(adapter.model), most=3)
    with pytest.raises(ValueError, match="draft: this model can draft 1 to 3, got 4; nearest 3"):
        adapter.generate([[1]], speculative(GREEDY, draft=4))


def test_a_model_that_has_nothing_to_draft_with_refuses(adapter):
    plant(adapter, own(adapter.model), most=0)
    with pytest.raises(
        ValueError, match="speculative: .* nothing to draft tokens with. Architectures that can have"
    ):
        adapter.generate([[1]], speculative(GREEDY))
