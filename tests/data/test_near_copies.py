"""Held-out text that stands in training: what is measured, dropped, kept and said."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Sequence

import pytest

from data import load_dataset, near_copies
from data.corpus import Corpus, Document, fingerprint
from data.errors import DataError
from data.near_copies import LONG_LINE, heed, shares_in_training


def lines(seed: int, count: int, width: int = 40) -> list[bytes]:
    """Lines that no other seed has."""
    letters = random.Random(seed)
    return [bytes(letters.choices(b"abcdefghijklmnop ", k=width)).replace(b"  ", b"xy") for _ in range(count)]


def share(held: bytes, *train: bytes) -> float:
    documents = [Document(f"train/{number}", text) for number, text in enumerate(train)]
    return shares_in_training(documents, [Document("held", held)])[0][0]


def test_the_share_is_of_bytes_in_lines_that_stand_in_training() -> None:
    theirs, own = lines(1, 30), lines(2, 10)
    held = b"\n".join([*own, *theirs])
    assert share(held, b"\n".join(theirs)) == pytest.approx(0.75, abs=0.01)
    assert share(held, b"\n".join(own), b"\n".join(theirs)) == 1.0
    assert share(held, b"\n".join(lines(3, 50))) == 0.0


def test_order_indentation_and_line_ends_hide_no_copy() -> None:
    text = lines(1, 30)
    other = b"\r\n\r\n".join(b"    " + line for line in reversed(text))
    assert share(other, b"\n".join(text)) > 0.95


def test_short_lines_count_by_those_behind_them() -> None:
    words = lines(1, 400, width=6)
    held = b"\n".join([b"first", *words[100:200], b"last"])
    assert share(held, b"\n".join(words)) > 0.9
    shuffled = b"\n".join(random.Random(0).sample(words, 400))
    assert share(shuffled, b"\n".join(words)) < 0.1  # the words are the same, the text is not


@pytest.mark.parametrize("alphabet", [b"ACGT", b'{"key": [1, 2.5]}, '])
def test_text_without_line_ends_is_measured_wherever_it_begins(alphabet: bytes) -> None:
    text = bytes(random.Random(0).choices(alphabet, k=60_000))
    assert len(text) > LONG_LINE
    assert share(b"ahead " + text[20_011:40_000], text) > 0.95
    assert share(bytes(random.Random(1).choices(alphabet, k=20_000)), text) < 0.02


def test_a_word_changed_in_each_paragraph_hides_no_copy() -> None:
    paragraphs = [b" ".join(lines(n, 24)) for n in range(50)]
    assert min(map(len, paragraphs)) > LONG_LINE
    changed = [p[:200] + b"changed" + p[210:] for p in paragraphs]
    assert share(b"\n".join(changed), b"\n".join(paragraphs)) > 0.8


@pytest.mark.parametrize("line", [b"", b"\n"])
def test_blocks_of_a_long_text_hide_no_copy(monkeypatch, line: bytes) -> None:
    text = line.join(lines(0, 1000))
    monkeypatch.setattr(near_copies, "BLOCK", 9001)
    units = [unit for units in near_copies._units(text) for unit in units]
    assert b"".join(units) == b"".join(part.strip() for part in text.split(b"\n"))
    assert share(b"ahead " + text[5000:30_000], text) > 0.9


def test_a_sample_estimates_what_would_not_fit() -> None:
    train = [Document(f"t{n}", b"\n".join(lines(n, 100))) for n in range(20)]
    held = [Document(f"h{n}", b"\n".join(lines(n + 10, 100))) for n in range(20)]  # half of them are copies
    exact, whole = shares_in_training(train, held)
    estimates, sampled = shares_in_training(train, held, largest=300)
    assert exact == [1.0] * 10 + [0.0] * 10 and not whole and sampled
    assert estimates == exact


def corpus() -> Corpus:
    shared, own = lines(0, 100), lines(1, 100)
    train = [Document("a", b"\n".join(shared))]
    held = [
        Document("copy", b"\n".join([*shared[:60], *own[:40]])),
        Document("cousin", b"\n".join([*shared[:20], *own[:80]])),
        Document("stranger", b"\n".join(lines(2, 100))),
    ]
    return Corpus("text", train, held, fingerprint(train, held))


def test_drop_leaves_near_copies_out_of_the_held_out_side_and_says_so(tmp_path) -> None:
    before = corpus()
    after, overlap = heed(before, "drop", tmp_path)
    assert [document.name for document in after.heldout] == [
        "cousin",
        "stranger",
    ] and after.train == before.train
    assert after.fingerprint == fingerprint(after.train, after.heldout) != before.fingerprint
    size = len(before.heldout[0].text)
    assert f"dropped: 1 document, {size:,} bytes" in " ".join(after.notes)
    assert overlap.before == pytest.approx(0.8 / 3, abs=0.01) and overlap.share == pytest.approx(
        0.1, abs=0.01
    )
    told = json.loads(json.dumps(overlap.as_dict()))
    assert told["dropped"] == {"documents": 1, "bytes": size}
    assert [(one["document"], one["dropped"]) for one in told["worst"]] == [("copy", True), ("cousin", False)]
    assert told["worst"][0]["share"] == pytest.approx(0.6, abs=0.01)


def test_keep_changes_nothing_and_tells_how_much_and_where(tmp_path) -> None:
    before = corpus()
    after, overlap = heed(before, "keep", tmp_path)
    assert after.heldout == before.heldout and after.fingerprint == before.fingerprint
    (note,) = after.notes
    assert (
        "26.7% of the held-out text" in note
        and "copy (60%)" in note
        and "near_copies=drop leaves out 1" in note
    )
    assert overlap.dropped == 0 and overlap.share == overlap.before


def test_ordinary_repetition_is_not_noted(tmp_path) -> None:
    text = corpus()
    stranger = Corpus("text", text.train, text.heldout[2:], "")
    assert heed(stranger, "keep", tmp_path)[0].notes == ()


def test_nothing_held_out_is_an_error_that_says_what_to_set(tmp_path) -> None:
    text = corpus()
    with pytest.raises(DataError, match="nothing held out.*near_copies=keep"):
        heed(Corpus("text", text.train, text.heldout[:1], ""), "drop", tmp_path)


def test_shares_are_measured_once_and_again_where_the_file_is_damaged(tmp_path, monkeypatch) -> None:
    first = heed(corpus(), "drop", tmp_path)
    (path,) = (tmp_path / "near_copies").iterdir()
    good = path.read_bytes()
    for damage in (b"", good[:-9], good.replace(b"0.6", b"0.4")):
        path.write_bytes(damage)
        again = heed(corpus(), "drop", tmp_path)
        assert again[1] == first[1] and "rebuilt" in again[0].notes[0] and path.read_bytes() == good
    monkeypatch.setattr(near_copies, "shares_in_training", lambda *_: pytest.fail("measured twice"))
    assert heed(corpus(), "drop", tmp_path) == first


def test_the_source_decides_what_null_means(config, tmp_path) -> None:
    shared = b"\n".join(lines(0, 2000))
    (tmp_path / "twice.txt").write_bytes(shared + b"\n" + shared[: len(shared) // 5])
    kept = load_dataset(config(input_file=str(tmp_path / "twice.txt")), cache_dir=tmp_path)
    assert kept.overlap.choice == "keep" and kept.overlap.share > 0.9
    assert any("hold out other text" in note for note in kept.notes), "drop would leave nothing"
    with pytest.raises(DataError, match="near_copies=keep"):
        load_dataset(config(input_file=str(tmp_path / "twice.txt"), near_copies="drop"), cache_dir=tmp_path)
    assert load_dataset(config(data="synthetic", near_copies="drop"), cache_dir=tmp_path).overlap is None


class Made(Sequence[Document]):
    """Documents of lines that no other has, made when they are asked for."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        return Document(
            f"{index}", b"\n".join(b"line %d of document %d, and some more" % (n, index) for n in range(5))
        )


def test_memory_does_not_grow_with_the_documents() -> None:
    """Ten times the units that are kept, and a hundred times."""

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            shares, estimate = shares_in_training(Made(count), Made(count), largest=500)
            assert estimate and len(shares) == count and max(shares) == 1.0
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(1000), peak(10_000)
    assert many - few < 10_000 * 40, "a number for each document, and nothing of its text"
