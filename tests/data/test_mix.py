"""`data=mix`: what an entry may be, the one corpus that its sources become, and what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from data import load_corpus, load_dataset
from data.corpus import Corpus, Document, in_hash_order
from data.errors import DataError
from data.mix import absolute, load
from data.mix_texts import MixedTexts, Mixture, told, weighted
from data.rows import HeldoutRows
from data.scored import text_to_score
from tests.data.conftest import prose
from tests.data.shard_files import llm_c


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def mixed(config, tmp_path):
    """A function that makes a config of a folder of text and a file of JSON lines, with a held-out file each."""
    (tmp_path / "notes").mkdir()
    for n in range(8):
        (tmp_path / "notes" / f"{n}.txt").write_bytes(prose(f"note{n}", 40 + 9 * n))
    (tmp_path / "notes/val.txt").write_bytes(prose("note held", 90))
    for name, count in (("code", 30), ("dev", 4)):
        rows = [json.dumps({"body": prose(f"{name}{n}", 25).decode()}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))

    def make(weights=(0.7, 0.3), notes=(), code=(), **changes):
        entries = [
            {
                "data": "text",
                "input_file": str(tmp_path / "notes"),
                "val_files": "val.txt",
                "weight": weights[0],
                "name": "notes",
                **dict(notes),
            },
            {
                "data": "jsonl",
                "train_files": str(tmp_path / "code.jsonl"),
                "val_files": str(tmp_path / "dev.jsonl"),
                "text_field": "body",
                "weight": weights[1],
                "name": "code",
                **dict(code),
            },
        ]
        return config(data="mix", mix=entries, **changes)

    return make


def test_a_mixture_is_the_documents_of_its_sources(mixed, config, cache) -> None:
    cfg = mixed()
    dataset = load_dataset(cfg, cache_dir=cache)
    alone = [load_dataset(config(**entry_of(cfg, n)), cache_dir=cache) for n in (0, 1)]
    for side in ("train", "heldout"):
        whole, parts = getattr(dataset, side), [getattr(one, side) for one in alone]
        texts = [store.text(n) for store in parts for n in range(store.n_docs)]
        assert [whole.text(n) for n in range(whole.n_docs)] == texts
        assert getattr(dataset.mixture, side) == tuple(store.n_docs for store in parts)
    assert dataset.heldout.sources == (("notes", 1), ("code", 4))
    assert dataset.name == "mix of notes, code"
    said = [note for note in dataset.notes if note.startswith("shares of bytes")]
    sizes = [f"{store.total_bytes:,}" for one in alone for store in (one.train, one.heldout)]
    assert said == [
        f"shares of bytes: notes 70.0% ({sizes[0]} bytes to train on, {sizes[1]} held out); "
        f"code 30.0% ({sizes[2]} bytes to train on, {sizes[3]} held out)"
    ]


def entry_of(cfg, place: int) -> dict:
    return {name: value for name, value in cfg.mix[place].items() if name not in ("name", "weight")}


def test_a_second_load_encodes_nothing_and_trains_nothing(mixed, cache, monkeypatch) -> None:
    cfg = mixed(tokenizer="bpe-300")
    first = load_dataset(cfg, cache_dir=cache)
    monkeypatch.setattr("data.bpe.BpeTokenizer.train", lambda *_: pytest.fail("trained twice"))
    monkeypatch.setattr("data.store.write_stores", lambda *_: pytest.fail("encoded twice"))
    second = load_dataset(cfg, cache_dir=cache)
    assert second.identity() == first.identity() and second.tokenizer.digest == first.tokenizer.digest


def test_the_fingerprint_is_of_sources_and_weights(mixed, cache, tmp_path) -> None:
    def identity(cfg) -> dict:
        return load_dataset(cfg, cache_dir=cache).identity()

    same, first = identity(mixed((7, 3))), identity(mixed())
    assert same == first
    others = [
        mixed((0.6, 0.4)),
        mixed(([0.7, 0.7], 0.3)),
        mixed(code={"text_field": "body", "val_files": []}),
    ]
    turned = mixed()
    turned.mix.reverse()
    contents = [identity(cfg)["content"] for cfg in (*others, turned)]
    assert len({first["content"], *contents}) == 5
    renamed = identity(mixed(notes={"name": "prose"}))
    assert renamed["content"] == first["content"] and renamed["fingerprint"] != first["fingerprint"]
    # Where one source ends and the next begins is part of it, though the documents be the same.
    corpus, _ = load_corpus(mixed(), cache)
    moved = replace(corpus, mixture=replace(corpus.mixture, train=(9, 29)))
    assert told(moved)[1] != told(corpus)[1]


def test_text_that_one_source_holds_out_is_trained_on_in_none(mixed, cache, tmp_path) -> None:
    copied = (tmp_path / "dev.jsonl").read_text().splitlines()[1]
    text = json.loads(copied)["body"]
    (tmp_path / "notes/3.txt").write_text(text)
    dataset = load_dataset(mixed(), cache_dir=cache)
    assert text.encode() not in [dataset.train.text(n) for n in range(dataset.train.n_docs)]
    assert dataset.mixture.train == (7, 30)
    assert "notes: left out of training, as the same text is held out: 3.txt" in dataset.notes
    for n in range(8):
        (tmp_path / f"notes/{n}.txt").unlink()
    (tmp_path / "notes/3.txt").write_text(text)
    with pytest.raises(
        DataError, match="mix: notes has a weight and no text to train on that is not held out"
    ):
        load_dataset(mixed(), cache_dir=cache)
    assert load_dataset(mixed((0, 1)), cache_dir=cache).mixture.train == (0, 30)


def test_texts_that_several_sources_have_are_named(mixed, cache, tmp_path) -> None:
    rows = (tmp_path / "code.jsonl").read_text().splitlines()
    for n in range(5):
        (tmp_path / f"notes/{n}.txt").write_text(json.loads(rows[n])["body"])
    dataset = load_dataset(mixed(), cache_dir=cache)
    (note,) = [note for note in dataset.notes if "the same text in several sources" in note]
    assert note.count(" is code: code.jsonl:") == 3 and note.endswith(" and 2 more") and "notes: " in note
    assert dataset.mixture.train == (8, 30), "each is trained on"


def test_held_out_text_of_one_is_looked_for_in_the_training_text_of_all(mixed, cache, tmp_path) -> None:
    lines = [f"a line of its own number {n * 7919}" for n in range(40)]
    (tmp_path / "notes/5.txt").write_text("\n".join(lines))
    (tmp_path / "dev.jsonl").write_text(
        "\n".join(json.dumps({"body": "\n".join(part)}) for part in (lines[:30], [prose("x", 40).decode()]))
    )
    kept = load_dataset(mixed(), cache_dir=cache)
    assert kept.overlap.worst[0][0] == "code: dev.jsonl:1" and kept.overlap.choice == "keep"
    dropped = load_dataset(mixed(near_copies="drop"), cache_dir=cache)
    assert dropped.overlap.dropped == 1
    assert dropped.heldout.sources == (("notes", 1), ("code", 1))
    assert kept.heldout.sources == (("notes", 1), ("code", 2))


def test_near_copies_are_dropped_where_a_source_would_drop_them(mixed, cache, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "data.near_copies.heed", lambda corpus, choice, cache: asked.append(choice) or (corpus, None)
    )
    small = {"data": "synthetic", "synthetic": "markov", "weight": 1}
    for more in ([], [small], [{"data": "embedded", "weight": 1}]):
        cfg = mixed()
        cfg.mix += more
        load_corpus(cfg, cache)
    assert asked == ["keep", "keep", "drop"]


def test_scores_are_told_by_source(mixed, cache) -> None:
    """Which of the documents that are scored are of which source, all of them or a part."""
    dataset = load_dataset(mixed(), cache_dir=cache)
    texts = [dataset.heldout.text(n) for n in range(dataset.heldout.n_docs)]
    for limit in (None, 700):
        rows = HeldoutRows(dataset.heldout, dataset.tokenizer.eot, 32, max_bytes=limit)
        for name, wanted in (("notes", texts[:1]), ("code", texts[1:])):
            found = [dataset.heldout.text(int(n)) for n in rows.documents[rows.sources[name]]]
            assert set(found) <= set(wanted) and (limit or sorted(found) == sorted(wanted))
    assert HeldoutRows(dataset.train, dataset.tokenizer.eot, 32).sources == {}


def test_a_tokenizer_learns_from_text_in_these_shares(mixed, cache, tmp_path) -> None:
    """Where one source is short it is read several times; a tokenizer of characters reads all."""
    (tmp_path / "notes/0.txt").write_text("\u0416 alone")
    for shares in ((0.9, 0.1), (0.2, 0.8)):
        corpus, _ = load_corpus(mixed(shares), cache)
        text = weighted(corpus)
        total = sum(len(document.text) for document in corpus.train)
        found = list(in_hash_order(text))
        size = sum(len(document.text) for document in found)
        notes = sum(len(document.text) for document in found if document.name.startswith("notes"))
        longest = max(len(document.text) for document in corpus.train)
        assert abs(size - total) <= 2 * longest and abs(notes - shares[0] * size) <= 2 * longest
    characters = load_dataset(mixed((0, 1), tokenizer="char"), cache_dir=cache).tokenizer
    assert len(characters.encode("\u0416")) == 1
    both = [load_dataset(mixed(shares, tokenizer="bpe-300"), cache_dir=cache) for shares in ((1, 0), (0, 1))]
    assert both[0].tokenizer.digest != both[1].tokenizer.digest


def test_so_does_one_that_reads_a_part_of_it() -> None:
    """The beginning of what is in these shares is too, where one source is read by half and the other one and a half
    times."""
    sides = [[Document(str(n), f"{name} {n}".encode()) for n in range(1000, 2500)] for name in "ab"]
    mixture = Mixture(("a", "b"), ((0.25, 0.75),), (1500, 1500), (1, 1))
    train = MixedTexts(list(zip("ab", sides, strict=True)))
    corpus = Corpus("mix", train, train[:2], "", mixture=mixture)
    beginning = list(in_hash_order(weighted(corpus)))[:800]
    of_a = np.mean([document.name.startswith("a") for document in beginning])
    assert of_a == pytest.approx(0.25, abs=0.04)


def test_a_part_of_the_mixture_is_scored_as_it_was_held_out(
    mixed, cache, monkeypatch, config, tmp_path
) -> None:
    monkeypatch.setenv("MYTRAINER_CACHE", str(cache))
    run = mixed()
    tokenizer = load_dataset(run).tokenizer
    given = config(data="jsonl", input_file=str(tmp_path / "code.jsonl"), text_field="body", val_files=[])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.txt").write_bytes(prose("other", 60))
    other = config(data="text", input_file=str(tmp_path / "other/a.txt"))
    run.mix[1]["val_files"] = []
    found = [text_to_score(run, text, tokenizer) for text in (given, other, run)]
    assert [one.whole for one in found] == [False, True, False]
    assert found[0].store.n_docs < 30 and found[1].store.n_docs == 1
    assert found[2].store.sources[0] == ("notes", 1)


def test_token_shards_are_mixed_by_what_they_say(mixed, cache, tmp_path, bpe) -> None:
    """Bytes and their own tokens alike."""
    bpe.save(tmp_path / "bpe.json")
    texts = [prose(f"shard{n}", 20) for n in range(40)]
    stream = np.concatenate([np.append(bpe.eot, bpe.encode(text)) for text in texts])
    llm_c(tmp_path / "x.bin", stream)
    shards = {
        "data": "bin",
        "train_files": str(tmp_path / "x.bin"),
        "shards_tokenizer": str(tmp_path / "bpe.json"),
    }
    for tokenizer in ("byte", str(tmp_path / "bpe.json")):
        cfg = mixed(tokenizer=tokenizer)
        cfg.mix[0] = {**shards, "val_files": None, "weight": 1}
        dataset = load_dataset(cfg, cache_dir=cache)
        assert dataset.mixture.train[0] + dataset.mixture.heldout[0] == 40
        found = [dataset.train.text(n) for n in range(dataset.mixture.train[0])]
        found += [dataset.heldout.text(n) for n in range(dataset.mixture.heldout[0])]
        assert sorted(found) == sorted(texts)


def test_documents_of_a_mixture_are_a_sequence(documents) -> None:
    texts = MixedTexts([("a", documents[:5]), ("none", []), ("b", documents[5:])])
    named = [Document(f"{'a' if n < 5 else 'b'}: {d.name}", d.text) for n, d in enumerate(documents)]
    assert list(texts) == named and [texts[n] for n in range(-12, 0)] == named
    assert list(texts[3:8]) == named[3:8] == list(texts[2:][1:6])
    assert list(texts.select(np.array([11, 4, 4, 5]))) == [named[n] for n in (11, 4, 4, 5)]
    assert texts.sizes.tolist() == [len(document.text) for document in documents]
    with pytest.raises(IndexError):
        texts[12]


def test_what_recall_marks_is_not_measured_in_a_mixture(config, cache) -> None:
    fields = {"synthetic": "recall", "synthetic_bytes": 5000, "synthetic_rounds": 1, "synthetic_pairs": 2}
    entries = [
        {"data": "synthetic", "weight": 1, **fields},
        {"data": "synthetic", "weight": 1, "synthetic": "grammar"},
    ]
    dataset = load_dataset(config(data="mix", mix=entries, train_seq_len=64), cache_dir=cache)
    assert "synthetic: recall_accuracy is not measured in a mixture" in dataset.notes
    assert dataset.mixture.names == ("synthetic", "synthetic-2") and not dataset.heldout.marks
    assert dataset.truth is None and dataset.entropy_bits_per_byte is None


def test_paths_are_made_absolute_each_as_its_source_has_them(mixed, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    cfg = mixed(notes={"input_file": "notes"}, code={"train_files": "co*.jsonl", "val_files": ["dev.jsonl"]})
    notes, code = absolute(cfg)["mix"]
    assert notes["input_file"] == str(tmp_path / "notes") and notes["val_files"] == [
        str(tmp_path / "notes/val.txt")
    ]
    assert code["train_files"] == [str(tmp_path / "co*.jsonl")] and code["val_files"] == [
        str(tmp_path / "dev.jsonl")
    ]
    assert (notes["weight"], code["name"]) == (0.7, "code")
    below = mixed(
        code={"train_files": "code.jsonl", "val_files": "dev.jsonl", "data_root": "../" + tmp_path.name}
    )
    assert absolute(below)["mix"][1]["data_root"] == str(tmp_path)
    with pytest.raises(DataError, match="mix, code: train_files: .* matches no file"):
        absolute(mixed(code={"train_files": "nothing*.jsonl"}))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((-0.1, 1), "mix.0.weight: must be a finite number, 0 or more, or a list of them, got -0.1"),
        ((float("nan"), 1), "mix.0.weight: must be a finite number.*got nan"),
        ((1, float("inf")), "mix.1.weight: must be a finite number.*got inf"),
        ((1, "much"), "mix.1.weight: must be a finite number.*got 'much'"),
        ((1, True), "mix.1.weight: must be a finite number.*got True"),
        ((1, []), "mix.1.weight: must not be empty"),
        ((0, 0), r"mix: all weights are 0 \(notes, code\)"),
        (([1, 0], [1, 0]), r"mix: all weights are 0 in stage 2 \(notes, code\)"),
        (([1, 0], [1, 0, 2]), "lists of one for each stage, all equally long; got notes 2, code 3"),
    ],
)
def test_weights_that_are_none(mixed, weights, said) -> None:
    with pytest.raises(DataError, match=said):
        load(mixed(weights))


def test_one_weight_holds_in_all_stages(mixed) -> None:
    assert load(mixed(([3, 0, 1], 1))).shares == ((0.75, 0.25), (0.0, 1.0), (0.5, 0.5))


def test_weights_of_any_size_are_shares(mixed) -> None:
    assert load(mixed((1e308, 1e308))).shares == ((0.5, 0.5),)
    assert load(mixed((3e-308, 1e-308))).shares[0] == pytest.approx((0.75, 0.25))


def test_entries_that_are_none(mixed, config, cache, tmp_path) -> None:
    for entry, said in (
        ({"data": "mix"}, "mix.1.data: a mixture within a mixture is none"),
        ({"data": "jsonl2"}, "mix.1.data: 'jsonl2' is not one of .*Did you mean 'jsonl'"),
        ({"data": None}, r"mix.1: names no source. Add data: <one of embedded, (?!.*\bmix\b)"),
        ({"text_feild": "x"}, "mix.1.text_feild: .*Did you mean 'text_field'"),
        ({"document_separator": "x"}, "mix.1.document_separator: .* is not one of"),
        ({"name": "notes"}, "several entries are called 'notes'"),
        ({"name": "a\nb"}, "mix.1.name: 'a.*nb' is none"),
    ):
        with pytest.raises(DataError, match=said):
            load(mixed(code=entry))
    cfg = mixed()
    del cfg.mix[0]["weight"]
    with pytest.raises(DataError, match="mix.0: has no weight"):
        load(cfg)
    with pytest.raises(DataError, match=r"data=mix needs mix=\["):
        load_dataset(config(data="mix"), cache_dir=cache)
    (tmp_path / "code.jsonl").write_text("")
    with pytest.raises(DataError, match="has no text"):
        load_dataset(mixed(), cache_dir=cache)
