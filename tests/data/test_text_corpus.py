"""`data=text`: what is read, how it is split, and what a bad file says."""

from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from data import corpus as corpus_module
from data import cuts, text
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
    assert max(len(document.text) for document in corpus.train) <= cuts.SECTION_BYTES
    assert "last" in corpus.notes[0] and corpus.notes[0].endswith("cut at a line end")


@pytest.mark.parametrize("raw", ["é" * 90_000, "x" + "𝄞" * 50_000, "ab", "a\nb", "a\n" + "b" * 99])
def test_files_with_few_lines_are_cut_between_characters(config, tmp_path, raw: str) -> None:
    (tmp_path / "book.txt").write_text(raw, encoding="utf-8")
    corpus = load(config, tmp_path / "book.txt")
    documents = [*corpus.train, *corpus.heldout]
    assert b"".join(document.text for document in documents).decode() == raw
    at_line_end = corpus.train[-1].text.endswith(b"\n")
    assert corpus.notes[-1].endswith("cut at a line end") == at_line_end
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
        (
            "café au lait\n".encode("utf-16le"),
            "utf-16le text without a byte order mark. Convert it: iconv -f utf-16le",
        ),
        ("café au lait\n".encode("utf-16be"), "utf-16be text without"),
        (gzip.compress(b"caf\n", mtime=0), "gzip-compressed. Unpack it: gunzip -k book.txt"),
        (b"BZh91AY&SY\xff", "bzip2-compressed. Unpack it: bunzip2 -k book.txt"),
        (b"%PDF-1.7\n%\xbf", "a PDF document"),
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
def test_hash_alone_holds_out_the_last_tenth_where_it_has_nothing_or_all(
    config, tmp_path, monkeypatch, forced
) -> None:
    fill(tmp_path, 25)
    monkeypatch.setattr(text, "is_held_out", lambda name: forced)
    corpus = load(config, tmp_path, val_files=[])
    names = sorted((d.name for d in [*corpus.train, *corpus.heldout]), key=path_hash)
    assert {document.name for document in corpus.heldout} == set(names[-2:])
    assert any("small folder" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("held", "share"), [(set(), "0 of 3 files would be held out, 0%"), ({"big.txt"}, "97%")]
)
def test_a_hash_that_holds_out_nothing_or_most_is_refused_with_the_field_and_the_sizes(
    config, tmp_path, monkeypatch, held, share
) -> None:
    (tmp_path / "big.txt").write_text("a line of text\n" * 1000)
    (tmp_path / "small.txt").write_text("another line\n" * 20)
    (tmp_path / "val.txt").write_text("held out\n" * 20)
    monkeypatch.setattr(text, "is_held_out", lambda name: name in held)
    with pytest.raises(DataError) as error:
        load(config, tmp_path)
    said = str(error.value)
    assert (
        share in said and "big.txt 15,000, small.txt 260, val.txt 180" in said and "val_files=val.txt" in said
    )
    assert len(load(config, tmp_path, val_files=[]).heldout) == 1


def test_val_files_name_the_held_out_text(config, tmp_path, monkeypatch) -> None:
    train = "a line of text\n" * 9000
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "val.txt").write_text("held out\n" * 20)
    corpus = load(config, tmp_path, val_files="val.txt")
    assert b"".join(d.text for d in corpus.train).decode() == train and len(corpus.train) == 3  # in sections
    assert [d.text for d in corpus.heldout] == [b"held out\n" * 20]
    assert "held out: 1 files by val_files, 180 bytes" in corpus.notes
    # From a file, by a path from elsewhere, and in full: always the same text.
    monkeypatch.chdir(tmp_path.parent)
    for path, val in (
        ("train.txt", ["val.txt"]),
        ("train.txt", f"{tmp_path.name}/val.txt"),
        (".", "val.txt"),
    ):
        again = load(config, tmp_path / path, val_files=val)
        assert (again.fingerprint, again.train) == (corpus.fingerprint, corpus.train)


def test_val_files_may_be_folders_and_lie_elsewhere(config, tmp_path) -> None:
    fill(tmp_path / "all", 30)
    fill(tmp_path / "other", 3)
    (tmp_path / "other/part0/0.txt").write_text("of the others\n")
    inside = load(config, tmp_path / "all", val_files=["part1", "part2/2.txt"])
    assert {d.name for d in inside.heldout} == {f"part1/{n}.txt" for n in range(1, 30, 3)} | {"part2/2.txt"}
    assert len(inside.train) == 30 - 11
    outside = load(config, tmp_path / "all", val_files=str(tmp_path / "other"))
    assert len(outside.heldout) == 3 and len(outside.train) == 30 - 2  # two of them are also in there
    assert any("2 exact duplicates of held-out files" in note for note in outside.notes)


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ("vla.txt", "val_files .*vla.txt' does not exist. Did you mean 'val.txt'"),
        (["val.txt", "train.txt"], "none left to train on"),
        ("empty.txt", "no text in 'empty.txt'"),
    ],
)
def test_bad_val_files(config, tmp_path, val, message: str) -> None:
    for name, content in (("train.txt", "a\n" * 99), ("val.txt", "b\n" * 9), ("empty.txt", " ")):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(config, tmp_path, val_files=val)


STORIES = [f"Story {number} of a bear.\nIt ends.\n" for number in range(50)]
SEPARATOR = "<|endoftext|>"


@pytest.mark.parametrize("line", ["<|endoftext|>\n", "  <|endoftext|>\r\n"])
def test_a_separator_makes_documents_and_is_not_text(config, tmp_path, line: str) -> None:
    (tmp_path / "stories.txt").write_text(line.join([*STORIES, STORIES[0]]), newline="")
    corpus = load(config, tmp_path / "stories.txt", document_separator=SEPARATOR)
    documents = [*corpus.train, *corpus.heldout]
    assert [
        d.text.decode() for d in documents
    ] == STORIES  # the copy of the first is dropped, as training has it
    assert len(corpus.heldout) == 5 and len({d.name for d in documents}) == 50
    assert any("last 5 of 50 documents" in note for note in corpus.notes)
    assert any("1 exact duplicates" in note for note in corpus.notes)


def test_a_separator_inside_a_line_is_text(config, tmp_path) -> None:
    (tmp_path / "a.txt").write_text(f"say {SEPARATOR} twice\n{SEPARATOR}\n{SEPARATOR}!\n")
    corpus = load(config, tmp_path / "a.txt", document_separator=SEPARATOR)
    assert [d.text.decode() for d in (*corpus.train, *corpus.heldout)] == [
        f"say {SEPARATOR} twice\n",
        f"{SEPARATOR}!\n",
    ]


def test_a_separator_cuts_the_files_of_a_folder_and_of_val_files(config, tmp_path) -> None:
    (tmp_path / "train.txt").write_text(f"{SEPARATOR}\n".join(STORIES[:40]))
    (tmp_path / "val.txt").write_text(f"{SEPARATOR}\n".join(STORIES[40:]))
    corpus = load(config, tmp_path, val_files="val.txt", document_separator=SEPARATOR)
    assert [d.text.decode() for d in corpus.train] == STORIES[:40]
    assert [d.text.decode() for d in corpus.heldout] == STORIES[40:]


def test_separators_that_are_there_and_unused_or_used_and_not_there(config, tmp_path) -> None:
    (tmp_path / "stories.txt").write_text(f"{SEPARATOR}\n".join(STORIES))
    notes = load(config, tmp_path / "stories.txt").notes
    assert any("49 lines are <|endoftext|>" in n and "document_separator=" in n for n in notes)
    with pytest.raises(DataError, match="no line of the text is '---'"):
        load(config, tmp_path / "stories.txt", document_separator="---")
    (tmp_path / "one.txt").write_text(f"one story\n{SEPARATOR}\n")
    with pytest.raises(DataError, match="the text is one document"):
        load(config, tmp_path / "one.txt", document_separator=SEPARATOR)


def test_whole_text_for_a_score_needs_no_training_part(config, tmp_path) -> None:
    (tmp_path / "b.txt").write_text("x")
    assert [d.text for d in text.read_whole(config(input_file=str(tmp_path / "b.txt")))] == [b"x"]
    fill(tmp_path / "all", 4)
    assert len(text.read_whole(config(input_file=str(tmp_path / "all")))) == 4


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
    assert "left out (hidden): .git, .hidden.txt" in notes


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
    names = [corpus_module.content([d], [two._replace(name="z")]) for d in (one, one._replace(name="c"))]
    assert names[0] == names[1] != corpus_module.content([two], [one])


def test_documents_that_are_held_out_are_left_out_of_training_and_named(config, tmp_path) -> None:
    """Not files alone: what stands between separators, too."""
    mark = f"\n{SEPARATOR}\n"
    (tmp_path / "train.txt").write_text(mark.join(f"story {number}" for number in range(30)) + "\n")
    (tmp_path / "val.txt").write_text(mark.join(["story 3", "story 7", "another"]))
    corpus = load(config, tmp_path / "train.txt", val_files="val.txt", document_separator=SEPARATOR)
    held = {document.text for document in corpus.heldout}
    assert len(corpus.train) == 28 and not held & {document.text for document in corpus.train}
    (note,) = [note for note in corpus.notes if "left out of training" in note]
    assert "2 documents, train.txt@" in note
    (tmp_path / "val.txt").write_text((tmp_path / "train.txt").read_text() + mark[1:] + "more")
    with pytest.raises(DataError, match="all documents to train on in .* are held out too"):
        load(config, tmp_path / "train.txt", val_files="val.txt", document_separator=SEPARATOR)
