"""The sample that is annotated, what is kept of it, and where a run and `eval` leave it."""

import json

import pytest
import torch

from adapters import build_adapter
from adapters.base import Annotation, Map, Span, Spans
from data.corpus import Document
from data.store import encode_documents
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import config
from trainer.annotate import LEAST_BYTES, MAX_BYTES, annotate, annotation_of, sample
from trainer.loaded import load
from trainer.loop import train

UMLAUT = "\N{LATIN SMALL LETTER O WITH DIAERESIS}"


def store_of(*texts):
    return encode_documents(
        [Document(str(i), text.encode()) for i, text in enumerate(texts)], ByteTokenizer()
    )


def test_a_sample_is_the_beginning_of_a_document_of_some_length():
    texts = ["short", *(f"{i} " * 200 for i in range(5)), "short too"]
    found = sample(store_of(*texts), 10_000)
    assert found == sample(store_of(*texts), 10_000) and any(t.startswith(found) for t in texts)
    assert len(found) == 400 >= LEAST_BYTES
    assert sample(store_of("a", "longer", "b"), 10_000) == "longer"


@pytest.mark.parametrize("context", [1, 2, 3, 4, 300, 10_000])
def test_a_sample_fits_and_cuts_no_character(context):
    text = sample(store_of("x" + UMLAUT * 1000), context)
    assert text == ("x" + UMLAUT * 1000)[: len(text)]
    assert len(text.encode()) in (min(MAX_BYTES, context - 1) - 1, min(MAX_BYTES, context - 1))


def test_a_text_without_tokens_can_be_the_sample():
    assert sample(store_of(""), 32) == ""


@pytest.fixture
def adapter():
    return build_adapter(*config("vanilla", "model_cfg.vocab_size=null"), ByteTokenizer())


def test_what_is_kept_is_plain(adapter):
    values = torch.tensor([[1 / 3, 0.0], [2.0, 1.0]])
    own = Map("of", values, "expert", "token", row_labels=("a", "b"))
    adapter.annotate = lambda text: Annotation((Spans("stage 1", (Span(0, 2, "x"),)),), (own,))
    found = annotation_of(adapter, store_of("hi"), 32, "no")
    assert json.loads(json.dumps(found)) == {
        "text": "hi",
        "tokens": [[0, 1], [1, 2]],
        "spans": [{"name": "stage 1", "spans": [[0, 2, "x"]]}],
        "maps": [
            {
                "name": "of",
                "rows": "expert",
                "columns": "token",
                "row_labels": ["a", "b"],
                "column_labels": None,
                "values": [[0.3333, 0.0], [2.0, 1.0]],
            }
        ],
    }


def test_an_adapter_that_shows_nothing_leaves_nothing(adapter):
    assert annotation_of(adapter, store_of("hi"), 32, "no") == {}


def test_it_is_called_in_evaluation_and_held_to_its_text(adapter):
    def look(text):
        assert not adapter.model.training and not torch.is_grad_enabled()
        return Annotation((Spans("stage 1", (Span(0, 3),)),))

    adapter.annotate = look
    adapter.train()
    assert annotate(adapter, "abc", "no") and adapter.model.training
    with pytest.raises(ValueError, match="ends at 3, and the text has 2 tokens"):
        annotate(adapter, "ab", "no")


# -- in a run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("mod")
    train(*config("mod", "num_iterations=2", "val_loss_every=0", "ema_decay=0.9", "sample_tokens=0"), path)
    return path


def test_a_run_keeps_and_draws_what_its_scored_weights_do(run):
    kept = json.loads((run / "annotation.json").read_text())
    one, model = kept["spans"][0], load(run, device="cpu")
    found = model.annotate(kept["text"])
    assert model.weights == "ema" and one["name"] == "layer 1: tokens that enter"
    assert [start for start, _, _ in one["spans"]] == [span.start for span in found.spans[0].spans]
    assert len(kept["tokens"]) == len(model.tokenizer.encode(kept["text"])) < 32
    assert f"<summary>{one['name']}</summary>" in (run / "report.html").read_text()


def test_a_run_that_cannot_show_it_ends_well_and_says_so(run, monkeypatch, tmp_path, capsys):
    def fails(*args):
        raise RuntimeError("no such layer")

    monkeypatch.setattr("trainer.run.record.annotation_of", fails)
    train(*config("mod", "num_iterations=1", "val_loss_every=0", "sample_tokens=0"), tmp_path)
    assert "no new annotation.json" in (told := "".join(capsys.readouterr())) and "no such layer" in told
    assert (tmp_path / "report.html").exists() and (tmp_path / "summary.json").exists()
    assert not (tmp_path / "annotation.json").exists()


def test_where_a_life_is_cut_short_before_it_the_next_one_makes_it(monkeypatch, tmp_path):
    def cut_short(*args):
        raise KeyboardInterrupt

    words = ("num_iterations=1", "val_loss_every=0", "sample_tokens=0", f"output_dir={tmp_path}")
    with monkeypatch.context() as first, pytest.raises(KeyboardInterrupt):
        first.setattr("trainer.run.record.annotation_of", cut_short)
        train(*config("mod", *words), tmp_path)
    train(*config("mod", *words, "resume=auto"), tmp_path)
    assert json.loads((tmp_path / "annotation.json").read_text())["spans"]
