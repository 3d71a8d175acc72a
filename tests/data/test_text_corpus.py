"""`data=text`: what is read, how it is split, and what a bad file says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data import corpus as corpus_module
from data import text
from data.corpus import is_held_out, path_hash
from data.errors import DataError


def load(config, path: Path | str, **changes):
    return text.load(config(input_file=str(path), **changes))


def test_single_file_holds_out_its_last_tenth_at_a_line_end(config, tmp_path) -> None:
    raw = b"".join(b"line %d of the file\n" % number for number in range(5000))
    (tmp_path / "book.txt").write_bytes(raw)
    corpus = load(config, tmp_path / "book.txt")
    train = b"".join(document.text for document in corpus.train)
    heldout = b"".join(document.text for document in corpus.heldout)
    assert train + heldout == raw
    assert train.endswith(b"\n") and len(raw) * 0.9 <= len(train) < len(raw) * 0.9 + 40
    assert len(corpus.train) == 2 and all(d.text.endswith(b"\n") for d in corpus.train)
    assert max(len(document.text) for document in corpus.train) <= text.SECTION_BYTES
    assert "last" in corpus.notes[0]


@pytest.mark.parametrize("raw", ["é" * 90_000, "x" + "𝄞" * 50_000, "ab", "a\nb", "a\n" + "b" * 99])
def test_files_with_few_lines_are_cut_between_characters(config, tmp_path, raw: str) -> None:
    (tmp_path / "book.txt").write_text(raw, encoding="utf-8")
    corpus = load(config, tmp_path / "book.txt")
    documents = [*corpus.train, *corpus.heldout]
    assert b"".join(document.text for document in documents).decode() == raw
    assert all(document.text.decode("utf-8") for document in documents)
    assert corpus.train and corpus.heldout


def test_byte_order_mark_is_not_text(config, tmp_path) -> None:
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbf" + b"hello\n" * 40)
    assert load(config, tmp_path / "book.txt").train[0].text.startswith(b"hello")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"x", "too short"),
        (b"abc\0def\n", "binary file: NUL byte at offset 3"),
        ("un café noir".encode("latin-1"), r"not UTF-8: byte 0xe9 at offset 6\. It may be latin-1"),
        ("caf\n".encode("utf-16"), "utf-16 text"),
        ("caf\n".encode("utf-32"), "utf-32 text"),
    ],
)
def test_bad_files_say_what_and_where(config, tmp_path, raw: bytes, message: str) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=message) as error:
        load(config, path)
    assert str(path) in str(error.value)


def test_missing_paths_suggest_what_stands_beside(config, tmp_path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match="Did you mean 'shakespeare.txt'"):
        load(config, tmp_path / "shakespear.txt")
    with pytest.raises(DataError, match="there is no folder"):
        load(config, tmp_path / "nowhere" / "a.txt")
    with pytest.raises(DataError, match="needs input_file"):
        text.load(config())


def test_input_file_is_relative_to_data_root_or_the_working_directory(config, tmp_path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("hello there\n" * 30)
    assert load(config, "a.txt", data_root=str(tmp_path)).name == "a.txt"
    monkeypatch.chdir(tmp_path)
    assert load(config, "a.txt").fingerprint == load(config, tmp_path / "a.txt").fingerprint


def fill(folder: Path, count: int) -> None:
    for number in range(count):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(f"text number {number}\n")


def test_folder_splits_by_path_hash(config, tmp_path) -> None:
    fill(tmp_path, 60)
    corpus = load(config, tmp_path)
    held = {document.name for document in corpus.heldout}
    assert held and held == {
        path
        for path in (p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.txt"))
        if is_held_out(path)
    }
    assert len(corpus.train) + len(held) == 60
    assert [document.name for document in corpus.train] == sorted(document.name for document in corpus.train)


@pytest.mark.parametrize("forced", [True, False])
def test_small_folder_holds_out_the_last_tenth_by_hash(config, tmp_path, monkeypatch, forced: bool) -> None:
    fill(tmp_path, 25)
    monkeypatch.setattr(text, "is_held_out", lambda name: forced)  # everything, then nothing
    corpus = load(config, tmp_path)
    names = sorted((d.name for d in [*corpus.train, *corpus.heldout]), key=path_hash)
    assert {document.name for document in corpus.heldout} == set(names[-2:])
    assert any("small folder" in note for note in corpus.notes)


def test_folder_skips_and_reports(config, tmp_path) -> None:
    fill(tmp_path, 30)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "LICENSE").write_text("x")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "copy.txt").write_text("text number 3\n")
    (tmp_path / ".hidden.txt").write_text("secret")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("secret")
    corpus = load(config, tmp_path)
    together = b"".join(document.text for document in [*corpus.train, *corpus.heldout])
    assert b"secret" not in together and together.count(b"text number 3\n") == 1
    notes = "; ".join(corpus.notes)
    assert (
        "ignored 2 files" in notes and ".png (1)" in notes and "1 empty" in notes and "1 exact dupl" in notes
    )


def test_folder_with_a_binary_or_without_text_is_refused(config, tmp_path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"no usable text file.*\.png"):
        load(config, tmp_path)
    fill(tmp_path, 3)
    (tmp_path / "broken.md").write_bytes(b"a\0b")
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "broken.md"))):
        load(config, tmp_path)


def test_folder_of_one_file_is_that_file(config, tmp_path) -> None:
    fill(tmp_path, 1)
    (tmp_path / "part0" / "0.txt").write_text("a line\n" * 100)
    corpus = load(config, tmp_path)
    assert len(corpus.heldout[0].text) in range(63, 77)


def test_fingerprint_follows_names_contents_and_split() -> None:
    one, two = corpus_module.Document("a", b"x"), corpus_module.Document("b", b"y")
    prints = {
        corpus_module.fingerprint([one], [two]),
        corpus_module.fingerprint([two], [one]),
        corpus_module.fingerprint([one, two], []),
        corpus_module.fingerprint([one._replace(name="c")], [two]),
        corpus_module.fingerprint([one._replace(text=b"z")], [two]),
    }
    assert len(prints) == 5
