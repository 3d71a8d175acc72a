"""What is kept of each document: the same however it was computed, and what two runs differ by on them."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.corpus import Document
from data.rows import HeldoutRows
from data.store import encode_documents
from data.tokenizers import ByteTokenizer
from tests.contract.tiny import config
from tests.trainer.test_evaluate import Rank, TableAdapter, random_table, score
from trainer.bench.documents import FILE, DocumentScores, read_document_scores, text_noise
from trainer.loop import train
from trainer.run.checkpoint import load_json


def test_each_document_has_its_nats_whatever_the_batch_and_the_processes():
    """Five documents, in batches of 1 and 8 rows and on 1, 2 and 3 processes, whose rows do not come out even."""
    tokenizer, texts = ByteTokenizer(), [b"abc" * n for n in (1, 30, 7, 50, 23)]
    store = encode_documents([Document(str(n), text) for n, text in enumerate(texts)], tokenizer)
    adapter = TableAdapter(random_table(257), tokenizer)
    rows = HeldoutRows(store, tokenizer.eot, 32)
    assert rows.n_rows % 2 and rows.n_rows % 3
    found = [score(adapter, rows, batch_rows=n).per_document for n in (1, 8)]
    for size in (2, 3):
        sums = []
        found.append([score(adapter, rows, world=Rank(r, size, sums)) for r in range(size)][-1].per_document)
    for one in found:
        assert one.nats == pytest.approx(found[0].nats, rel=1e-12)
        assert one.sizes.tolist() == [len(texts[int(i)]) for i in rows.documents]
    for place, index in enumerate(rows.documents):
        alone = encode_documents([Document("a", texts[int(index)])], tokenizer)
        nats = score(adapter, HeldoutRows(alone, tokenizer.eot, 32)).per_document.nats
        assert nats == pytest.approx(found[0].nats[[place]], rel=1e-12)


SAVED = ["save_steps=3", "save_total_limit=null"]


def tiny(folder, *more):
    cfg, model_cfg = config("gpt2", "val_bytes=null", *more)
    train(cfg, model_cfg, Path(folder))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("whole"), *SAVED)


def test_a_run_keeps_the_documents_of_its_score(whole):
    found, told = read_document_scores(whole), load_json(whole, "summary.json")
    assert found.nats.sum() / math.log(2) / found.bytes.sum() == pytest.approx(
        told["score"]["bits_per_byte"], rel=1e-12
    )
    assert (len(found.document), found.step) == (told["score"]["documents"], told["steps"])
    assert len(set(found.document)) == len(found.document)
    assert "per_document" not in told["score"]


def test_a_run_that_goes_on_finds_the_same_to_the_last_bit(whole, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "summary.json").unlink()  # of a life that was cut short
    assert read_document_scores(again) is None
    shutil.rmtree(again / "checkpoint-6")
    (again / FILE).write_bytes(b"")
    tiny(again, *SAVED, "resume=auto", f"output_dir={again}")
    assert (again / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_where_the_best_model_counts_its_documents_do(tmp_path):
    """Of a run that gets worse, by a rate that is far too high: they lie in best_model/ until the end."""
    worse = ["learning_rate=3", "save_best_model=true", "warmup_steps=0", "max_grad_norm=0", "save_steps=1"]
    worse += ["num_iterations=2", "val_loss_every=1", f"output_dir={tmp_path}"]
    tiny(tmp_path, *worse)
    told = load_json(tmp_path, "summary.json")
    assert told["best"]["step"] == 1 < told["steps"]
    found, before = read_document_scores(tmp_path), (tmp_path / FILE).read_bytes()
    assert found.step == 1
    assert found.nats.sum() / math.log(2) / found.bytes.sum() == pytest.approx(told["best"]["bits_per_byte"])
    shutil.rmtree(tmp_path / "checkpoint-2")
    for name in ("summary.json", FILE):
        (tmp_path / name).unlink()
    tiny(tmp_path, *worse, "resume=auto")  # a life that scores step 2 alone
    assert (tmp_path / FILE).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01\x00\x10\x00no header at all",
        np.lib.format.magic(1, 0) + b"\x01\x00{",
        np.array([{}], dtype=object),
        np.zeros(3),
        np.zeros((0,)),
        np.lib.format.magic(1, 0)
        + b"\x4a\x00"
        + repr({"descr": "<f8", "fortran_order": False, "shape": (10**15,)}).encode().ljust(74),
    ],
    ids=["empty", "damaged", "cut", "pickled", "others", "none", "huge"],
)
def test_a_strangers_file_is_named(tmp_path, content):
    if isinstance(content, bytes):
        (tmp_path / FILE).write_bytes(content)
    else:
        np.save(tmp_path / FILE, content, allow_pickle=True)
    with pytest.raises(ValueError, match=f"{FILE}: is no table of documents"):
        read_document_scores(tmp_path)


def of(nats, sizes, names=None):
    return DocumentScores(names or [str(i) for i in range(len(nats))], np.array(nats), np.array(sizes), 1)


def test_the_noise_of_the_text_is_that_of_a_difference():
    rng = np.random.default_rng(0)
    sizes = rng.integers(100, 1000, size=400)
    hard = rng.uniform(0.5, 2, size=400)  # what the documents do to every model is not in it
    first = [of(hard * sizes, sizes)]
    second = [of((hard + 0.1) * sizes, sizes)]
    assert text_noise(first, second) == pytest.approx(0, abs=1e-12)
    uneven = [of((hard + 0.1 + 0.05 * rng.normal(size=400)) * sizes, sizes)]
    weights = math.sqrt((sizes.astype(float) ** 2).sum()) / sizes.sum()
    assert text_noise(first, uneven) == pytest.approx(0.05 * weights / math.log(2), rel=0.1)
    seeds = [of((hard + 0.1 + 0.05 * rng.normal(size=400)) * sizes, sizes) for _ in range(4)]
    assert text_noise(first, seeds) < 0.7 * text_noise(first, uneven)  # what seeds do is averaged out


def test_other_documents_are_not_compared():
    one = of([1.0, 2.0], [3, 4])
    assert text_noise([one], [of([1.0, 2.0], [3, 5])]) is None
    assert text_noise([one], [of([1.0, 2.0], [3, 4], ["0", "x"])]) is None
    assert text_noise([one], []) is None and text_noise([of([1.0], [3])], [of([2.0], [3])]) is None
