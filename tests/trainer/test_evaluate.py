"""The score: what it must be for models whose likelihood is known, and what must not change it."""

import json
import math

import numpy as np
import pytest
import torch
from tokenizers import normalizers
from torch import nn

from adapters import adapter_class, build_adapter
from adapters.base import Context, Likelihood, Metric, ModelAdapter
from adapters.default import DefaultModelAdapter
from configs.schema import DefaultModelConfig
from data import load_dataset
from data.char import CharTokenizer
from data.corpus import Document
from data.huggingface.tokenizer import HuggingFaceTokenizer
from data.rows import HeldoutRows, TrainingRows
from data.store import encode_documents
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import config, session_of
from tests.data.foreign import byte_level
from trainer.distributed import World
from trainer.evaluate import evaluate
from trainer.run.lines import evaluation_line
from trainer.run.progress import Progress
from trainer.view.format import ranking_notes, score_lines

CPU = torch.device("cpu")


class Table(nn.Module):
    """The next token's law given the last token alone: hidden states are one-hot, the head holds the logits."""

    def __init__(self, logits: np.ndarray) -> None:  # (V, V): row = last token
        super().__init__()
        self.register_buffer("table", torch.as_tensor(logits, dtype=torch.float64))

    def forward(self, tokens, doc_ids=None, cache=None):
        return nn.functional.one_hot(tokens, len(self.table)).double()  # (B, T, V)

    @property
    def head_weight(self):
        return self.table.T


class TableAdapter(DefaultModelAdapter):
    """`DefaultModelAdapter` over a table: the protocol of the score is the real one. Has a switch of modes to watch."""

    def __init__(self, logits: np.ndarray, tokenizer) -> None:
        super().__init__(Table(logits), DefaultModelConfig(vocab_size=len(logits)), tokenizer)
        self.modes: list[bool] = []

    device = CPU

    def likelihood(self, batch, ctx):
        self.modes.append(self.training)
        return super().likelihood(batch, ctx)


class Rank(World):
    """One of several processes, run one after the other: `others` are the sums the ones before it gave."""

    def __init__(self, rank: int, size: int, others: list[list[float]]) -> None:
        super().__init__(CPU)
        self.rank, self.size, self.others = rank, size, others
        self.agreements = 0

    def maximum(self, values):
        self.agreements += 1
        return list(values)

    def add_up(self, values):
        self.others.append(list(values))
        return [sum(column) for column in zip(*self.others, strict=True)]


def markov(*more):
    cfg, _ = config("gpt2", "synthetic_bytes=60000", *more)
    return load_dataset(cfg)


def score(adapter, rows, batch_rows=4, world=None, **more):
    return evaluate(adapter, rows, world or World(CPU), batch_rows=batch_rows, seed=0, **more)


def assert_same(one, other):
    """Equal but for the order in which fp64 numbers were added."""
    for name, value in one.as_dict().items():
        expected = other.as_dict()[name]
        assert value == (pytest.approx(expected, rel=1e-9) if isinstance(value, float) else expected), name


def rows_of(dataset, seq_len=32, **more):
    return HeldoutRows(dataset.heldout, dataset.tokenizer.eot, seq_len, **more)


def random_table(size, seed=0):
    return np.random.default_rng(seed).normal(size=(size, size))


@pytest.fixture(scope="module")
def dataset():
    return markov()


# -- known likelihoods -------------------------------------------------------------------------------------------------


def uniform(tokenizer):
    return TableAdapter(np.zeros((tokenizer.vocab_size,) * 2), tokenizer)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe-300"])
def test_a_uniform_model_scores_log2_of_the_vocabulary_per_token(tokenizer):
    dataset = markov(f"tokenizer={tokenizer}")
    found = score(uniform(dataset.tokenizer), rows_of(dataset))
    vocabulary, tokens = dataset.tokenizer.vocab_size, len(dataset.heldout.tokens)
    expected = math.log2(vocabulary) * tokens / dataset.heldout.total_bytes
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-12)
    assert found.nats_per_token == pytest.approx(math.log(vocabulary), rel=1e-12)
    assert found.perplexity == pytest.approx(vocabulary, rel=1e-10)
    assert (found.tokens, found.bytes) == (tokens, dataset.heldout.total_bytes)
    assert found.documents == dataset.heldout.n_docs
    assert found.context_bytes == round(32 * found.bytes / tokens, 1) and found.context_tokens == 32


@pytest.mark.parametrize("tokens", [1, 32, 33, 112])
def test_a_uniform_model_scores_a_text_of_any_length(tokens):
    """One token, a row, a row and one more, three rows and a half: each scored once, given those before it."""
    tokenizer = CharTokenizer("é漢")
    text = ("né漢" * tokens)[:tokens]
    store = encode_documents([Document("a", text.encode())], tokenizer)
    found = score(uniform(tokenizer), HeldoutRows(store, tokenizer.eot, 32))
    expected = math.log2(259) * tokens / len(text.encode())
    assert found.bits_per_byte == pytest.approx(expected, rel=1e-12) and found.tokens == tokens


def chain(dataset):
    """The Markov source itself, as a model over the byte tokenizer. A document's start leads to the stationary law."""
    truth, v = dataset.truth, dataset.tokenizer.vocab_size
    logits = np.full((v, v), -60.0)  # what never occurs, and the document's end
    for row, symbol in enumerate(truth.alphabet):
        logits[symbol, truth.alphabet] = np.log(truth.transitions[row])
    logits[dataset.tokenizer.eot, truth.alphabet] = np.log(truth.stationary)
    return TableAdapter(logits, dataset.tokenizer)


@pytest.mark.parametrize("seq_len", [7, 500, 4096])
def test_the_true_model_scores_the_known_entropy(dataset, seq_len):
    texts = [dataset.heldout.text(i) for i in range(dataset.heldout.n_docs)]
    each = np.array([dataset.truth.nats(text) for text in texts]) / (math.log(2) * len(texts[0]))
    found = score(chain(dataset), rows_of(dataset, seq_len))
    assert found.bits_per_byte == pytest.approx(each.mean(), rel=1e-9), "the likelihood of the very text"
    sampling_error = each.std(ddof=1) / math.sqrt(len(each))
    assert 0 < sampling_error < 0.05
    assert abs(found.bits_per_byte - dataset.entropy_bits_per_byte) < 4 * sampling_error


def test_document_ends_are_counted_apart(dataset):
    """What the model says of the end changes `end_nats_per_document` alone, not even through rounding."""
    v, eot = dataset.tokenizer.vocab_size, dataset.tokenizer.eot
    logits = np.zeros((v, v))
    logits[:, eot] = math.log(3)  # three times as likely as any byte
    found = score(TableAdapter(logits, dataset.tokenizer), rows_of(dataset))
    assert found.nats_per_token == pytest.approx(math.log(v + 2), rel=1e-12)
    assert found.end_nats_per_document == pytest.approx(math.log((v + 2) / 3), rel=1e-12)


# -- what must not change the score ------------------------------------------------------------------------------------


def test_the_batch_size_does_not_matter(dataset):
    adapter, rows = TableAdapter(random_table(257), dataset.tokenizer), rows_of(dataset)
    found = [score(adapter, rows, batch_rows=n) for n in (1, 3, 16)]
    for other in found[1:]:
        assert_same(other, found[0])


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 1e-3)])
def test_a_model_scores_alike_in_batches_of_any_size(precision, tolerance):
    session = session_of("gpt2", "val_tokens=1000")
    rows = session.heldout(None)
    assert rows.n_rows % 3 and rows.n_rows > 16  # the last batches are smaller
    found = [
        score(session.adapter, rows, batch_rows=n, precision=precision).bits_per_byte for n in (1, 3, 16)
    ]
    assert found == pytest.approx([found[0]] * 3, rel=tolerance)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_rows(dataset, size):
    """Dealt out and added up: what one process finds. The last batches are uneven, and all make the same number."""
    adapter, rows = (
        TableAdapter(random_table(257), dataset.tokenizer),
        rows_of(dataset, max_tokens=32 * 41),
    )
    assert rows.n_rows == 41
    sums: list[list[float]] = []
    worlds = [Rank(rank, size, sums) for rank in range(size)]
    found = [score(adapter, rows, batch_rows=4, world=world) for world in worlds]
    assert_same(found[-1], score(adapter, rows))
    assert len({world.agreements for world in worlds}) == 1, "no process waits for another one's batch"
    assert all(0 < part[3] < found[-1].tokens for part in sums), "each did its share"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty files of text that is not ASCII alone."""
    path, chance = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    words = ["so", "weiß", "naïve", "the", "größer", "日本", "of", "and", "é"]
    for number in range(40):
        text = " ".join(chance.choice(words, 200 + 10 * number))
        (path / f"{number}.txt").write_text(text + "\n", encoding="utf-8")
    return path


def text_datasets(folder):
    for tokenizer in ("byte", "bpe-280"):
        cfg, _ = config("gpt2", "data=text", f"input_file={folder}", f"tokenizer={tokenizer}")
        yield load_dataset(cfg)


def test_tokenizers_share_the_denominator(folder):
    found = [score(uniform(d.tokenizer), rows_of(d)) for d in text_datasets(folder)]
    raw = [len((folder / name).read_bytes()) for name in sorted(p.name for p in folder.iterdir())]
    assert found[0].bytes == found[1].bytes < sum(raw)
    assert found[0].tokens == found[0].bytes > 2 * found[1].tokens


def test_models_of_bytes_are_scored_on_the_bytes_that_models_of_tokens_are(folder):
    """Of each document all bytes, each once: every model guesses here, so that nats count what was scored. Documents
    end anywhere in a patch, and rows to train on hold several with patches that are not full between them."""
    texts = ["é" * (n % 4) + "weiß so "[: n % 8] * (n % 11) + "x" for n in range(40)]
    documents = [Document(f"{n}", text.encode()) for n, text in enumerate(texts)]
    sizes = [len(document.text) for document in documents]
    of_tokens = list(text_datasets(folder))[1].tokenizer
    for type_ in ("gpt2", "megabyte", "hnet", "hnet_x_nsa"):
        cfg, model_cfg = config(type_)
        reads_bytes = adapter_class(cfg).unit(model_cfg) == "byte"
        tokenizer = ByteTokenizer() if reads_bytes else of_tokens
        store = encode_documents(documents, tokenizer)
        adapter = build_adapter(cfg, model_cfg, tokenizer, CPU).double()
        with torch.no_grad():
            adapter.model.head_weight.zero_()
        rows = HeldoutRows(store, tokenizer.eot, 32)
        found, said = np.zeros((2, len(rows.documents))), []

        def hear(batch, likelihood, found=found, said=said, rows=rows):
            document = rows.document_of[batch.rows]
            np.add.at(found[0], document, batch.sizes.sum(1))
            np.add.at(found[1], document, likelihood.nats.numpy())
            said.append(batch.bytes)

        total = score(adapter, rows, batch_rows=7, hear=hear)
        in_order = np.array(sizes)[rows.documents]
        assert total.bytes == sum(said) == sum(sizes) and total.documents == 40, type_
        assert found[0].tolist() == in_order.tolist(), type_
        scored = in_order if reads_bytes else store.lengths_of(rows.documents)
        np.testing.assert_allclose(
            found[1], scored * math.log(tokenizer.vocab_size), rtol=1e-9, err_msg=type_
        )
        assert sum(scored) == sum(sizes) if reads_bytes else sum(scored) < sum(sizes), "the check is blind"
        if reads_bytes:
            batch = TrainingRows(store, tokenizer.eot, 32).batch(np.arange(8))
            prepared = adapter.prepare(batch, Context(seed=0, step=0, phase="train", rows_in_step=8))
            nats = adapter(prepared).terms["ce"].sum.item()
            assert prepared.denominators["tokens"] == 8 * 32 and batch.doc_ids.max() > 2
            assert nats == pytest.approx(8 * 32 * math.log(257)), type_


@pytest.mark.parametrize("limit", [1, 5000, 12_000])
def test_val_bytes_selects_the_same_documents_for_every_tokenizer(folder, limit):
    one, other = (rows_of(d, max_bytes=limit) for d in text_datasets(folder))
    assert one.documents.tolist() == other.documents.tolist() and one.total_bytes == other.total_bytes
    found = score(uniform(one.store.tokenizer), one)
    assert found.comparable and (found.bytes <= limit or found.documents == 1)


def test_a_limit_on_tokens_makes_a_score_incomparable(dataset):
    rows = rows_of(dataset, max_tokens=1000)
    found = score(uniform(dataset.tokenizer), rows)
    assert not found.comparable and found.bytes == found.tokens <= 1000
    assert found.bits_per_byte == pytest.approx(math.log2(257)), (
        "numerator and denominator cover the same text"
    )


# -- how it runs -------------------------------------------------------------------------------------------------------


def test_a_stop_leaves_at_once_and_restores_the_mode(dataset):
    adapter = TableAdapter(random_table(257), dataset.tokenizer)
    asked = iter([False, False, True])
    adapter.train()
    assert score(adapter, rows_of(dataset), should_stop=lambda: next(asked)) is None
    assert adapter.modes == [False, False] and adapter.training


def test_a_stop_on_another_process_is_a_stop(dataset, monkeypatch):
    world = World(CPU)
    monkeypatch.setattr(world, "maximum", lambda values: [1.0, *values[1:]])
    assert score(TableAdapter(random_table(257), dataset.tokenizer), rows_of(dataset), world=world) is None


def test_an_error_restores_the_mode(dataset):
    adapter = TableAdapter(random_table(10), dataset.tokenizer)  # the text has more symbols than that
    adapter.train()
    with pytest.raises(RuntimeError):
        score(adapter, rows_of(dataset))
    assert adapter.training


def test_evaluation_mode_is_kept(dataset):
    adapter = TableAdapter(random_table(257), dataset.tokenizer).eval()
    score(adapter, rows_of(dataset))
    assert not adapter.training and set(adapter.modes) == {False}


class Bound(ModelAdapter):
    """Two nats a target, with a variance of half a nat squared a row."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), DefaultModelConfig(), ByteTokenizer())

    def likelihood(self, batch, ctx):
        assert ctx.phase == "eval" and ctx.step == 0
        weights = torch.from_numpy(batch.weights).double()
        rows = (weights.sum(1) > 0).double()
        nats = 2 * weights.sum(1)
        return Likelihood(nats, None, "bound", "made up", 0.5 * rows, {"whole": nats}, {"paper": 0.75 * nats})


def test_a_bound_is_reported_with_its_error():
    store = encode_documents([Document("a", b"x" * 100), Document("b", b"y" * 50)], ByteTokenizer())
    found = score(Bound(), HeldoutRows(store, 256, 30), batch_rows=2)
    assert (found.kind, found.estimator) == ("bound", "made up")
    assert found.bits_per_byte == pytest.approx(2 / math.log(2))
    # 4 windows of the longer document and 2 of the shorter one hold text.
    assert found.standard_error == pytest.approx(math.sqrt(6 * 0.5) / (math.log(2) * 150))
    lines = "\n".join(f"{name}: {text}" for name, text in score_lines(found.as_dict()))
    assert "nats per token: <= 2.0000" in lines and "perplexity: <= 7.39" in lines
    assert "whole 2.0000 nats per token" in lines and "as in the paper: 1.5000" in lines
    assert found.end_nats_per_document is None and found.bits_per_token == pytest.approx(2 / math.log(2))
    assert found.documents_standard_error == 0  # every document has the same rate


class ByDocument(ModelAdapter):
    """As many nats for a byte as the byte says."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), DefaultModelConfig(), ByteTokenizer())

    def likelihood(self, batch, ctx):
        weights = torch.from_numpy(batch.weights).double()
        targets = torch.from_numpy(batch.tokens[:, 1 : weights.shape[1] + 1])
        return Likelihood((weights * targets).sum(1), torch.zeros(len(weights), dtype=torch.float64))


def test_the_error_over_documents_is_that_of_a_ratio():
    texts = [b"\x01" * 40, b"\x02" * 10, b"\x04" * 100]
    store = encode_documents([Document(str(i), t) for i, t in enumerate(texts)], ByteTokenizer())
    found = score(ByDocument(), HeldoutRows(store, 256, 30), batch_rows=2)
    rate = (40 + 20 + 400) / 150
    residuals = [40 - rate * 40, 20 - rate * 10, 400 - rate * 100]
    expected = math.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 150 / math.log(2)
    assert found.documents_standard_error == pytest.approx(expected)
    single = encode_documents([Document("a", texts[0])], ByteTokenizer())
    assert score(ByDocument(), HeldoutRows(single, 256, 30), batch_rows=2).documents_standard_error is None


# -- what is reported beside the score ---------------------------------------------------------------------------------


class Counting(TableAdapter):
    """Reports how many text positions it saw, and their mean token."""

    def heldout_metrics(self, hidden, prepared):
        weights, tokens = prepared.tensors["weights"], prepared.tensors["targets"]
        mean = Metric((weights * tokens).sum(), weights.sum())
        return {"seen": Metric(weights.sum(), reduce="sum"), "token": mean}


def test_metrics_are_added_up_over_batches_like_those_of_training(dataset):
    adapter = Counting(random_table(dataset.tokenizer.vocab_size), dataset.tokenizer)
    one, other = (score(adapter, rows_of(dataset), batch_rows=n) for n in (1, 7))
    assert one.metrics["seen"] == other.metrics["seen"] == one.tokens
    assert one.metrics["token"] == pytest.approx(dataset.heldout.tokens[:].astype(float).mean(), rel=1e-6)
    assert other.metrics["token"] == pytest.approx(one.metrics["token"], rel=1e-9)
    assert f"seen {one.tokens:.4g}" in dict(score_lines(one.as_dict()))["measured"]
    assert "measured" not in dict(score_lines(score(uniform(dataset.tokenizer), rows_of(dataset)).as_dict()))


class TwoScores(TableAdapter):
    """Has another score, twice the first, where it is asked for."""

    def likelihood(self, batch, ctx):
        found = super().likelihood(batch, ctx)
        if ctx.estimates:
            found.estimates["at half the price"] = 2 * found.nats
        return found


def test_other_scores_are_shown_where_they_are_asked_for(dataset):
    adapter = TwoScores(random_table(dataset.tokenizer.vocab_size), dataset.tokenizer)
    assert score(adapter, rows_of(dataset)).estimates == {}, "training does not pay for them"
    found = score(adapter, rows_of(dataset), estimates=True)
    assert found.estimates["at half the price"] == pytest.approx(2 * found.nats_per_token)
    shown = dict(score_lines(found.as_dict()))["at half the price"]
    both = f"{2 * found.nats_per_token:.4f} nats per token, {2 * found.bits_per_byte:.3f} bits per byte"
    assert shown == both


def test_a_score_of_text_that_the_tokens_lose_is_marked_and_counts_raw_bytes():
    library = byte_level()
    library.normalizer = normalizers.Lowercase()
    tokenizer = HuggingFaceTokenizer(json.loads(library.to_str()), 0, [0], {})
    texts = [
        "THE CAT sat\n" * 9,
        "the cat sat\n" * 9,
        "\u0130stanbul\n" * 9,
    ]  # a letter of two bytes becomes one of three
    store = encode_documents([Document(str(n), text.encode()) for n, text in enumerate(texts)], tokenizer)
    found = score(uniform(tokenizer), HeldoutRows(store, tokenizer.eot, 32))
    assert (found.comparable, found.lossy_documents, found.bytes) == (False, 2, store.total_bytes)
    nats = math.log(tokenizer.vocab_size) * len(store.tokens)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / store.total_bytes, rel=1e-12)
    per_document = np.diff(store.offsets) * math.log2(tokenizer.vocab_size)
    residual = per_document - found.bits_per_byte * store.doc_bytes
    expected = math.sqrt(3 / 2 * (residual**2).sum()) / store.total_bytes
    assert found.documents_standard_error == pytest.approx(expected, rel=1e-9)
    fair = score(
        uniform(tokenizer), HeldoutRows(encode_documents([Document("1", b"the cat")], tokenizer), 0, 32)
    )
    assert fair.comparable and not fair.lossy_documents


def test_a_score_by_choices_that_saw_later_tokens_says_so_wherever_it_is_kept():
    tokenizer = ByteTokenizer()
    store = encode_documents([Document("1", b"the cat sat")], tokenizer)
    fair, other = uniform(tokenizer), uniform(tokenizer)
    other.model.non_causal_routing = True
    for adapter, marked in ((fair, False), (other, True)):
        found = score(adapter, HeldoutRows(store, tokenizer.eot, 32))
        assert (found.non_causal_routing, found.comparable) == (marked, not marked)
        assert evaluation_line(Progress(), found, 0.0)["val_non_causal_routing"] is marked
        notes = ranking_notes(found.as_dict(), {})
        assert [note.startswith("non-causal routing") for note in notes] == [True] * marked
