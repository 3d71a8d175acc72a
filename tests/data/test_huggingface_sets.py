"""`data=hf`: sets that were saved, folders of files, names of the hub (never fetched here), and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data import load_corpus, source_of
from data.errors import DataError
from data.huggingface import sets

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {number} says\n" + "so much " * (number % 7) for number in range(200)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", _unless_of_the_hub(datasets.load_dataset))
    datasets.disable_progress_bars()


def _unless_of_the_hub(load):
    def local(path, *args, **options):
        if not Path(path).is_dir():
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub (OfflineModeIsEnabled)\nmore")
        return load(path, *args, **options)

    return local


@pytest.fixture
def load(config, tmp_path):
    """The corpus of a set, relative to the test's folder."""

    def load(**changes):
        fields = {"data": "hf", "data_root": str(tmp_path), **changes}
        return load_corpus(config(**fields), tmp_path / "cache")[0]

    return load


def rows(texts):
    return datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})


def as_lines(path: Path, texts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(side) -> list[str]:
    return [document.text.decode() for document in side]


def test_a_saved_set_has_its_splits(load, tmp_path) -> None:
    parts = {"train": rows(TEXTS[:150]), "test": rows(TEXTS[150:180]), "validation": rows(TEXTS[180:])}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "mine"))
    corpus = load(dataset_name="mine")
    assert (texts_of(corpus.train), texts_of(corpus.heldout)) == (TEXTS[:150], TEXTS[150:180])
    assert corpus.name == "mine" and corpus.train[0].name == "train:1"
    other = load(dataset_name="mine", dataset_split="test", eval_split="validation")
    assert (texts_of(other.train), texts_of(other.heldout)) == (TEXTS[150:180], TEXTS[180:])


def test_a_set_saved_alone_is_split_by_hash_as_json_lines_are(load, config, tmp_path) -> None:
    rows([*TEXTS, None, ""]).save_to_disk(str(tmp_path / "alone"))
    as_lines(tmp_path / "a.jsonl", TEXTS)
    lines, _ = load_corpus(config(data="jsonl", train_files=str(tmp_path / "a.jsonl")), tmp_path / "cache")
    for eval_split in ("test", None):
        corpus = load(dataset_name="alone", eval_split=eval_split)
        assert corpus.fingerprint == lines.fingerprint
        assert "left out: rows 1 whose text is null and 1 whose text is empty" in corpus.notes
        assert ("the set has no split but train" in corpus.notes) == (eval_split == "test")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_of_files_is_read_as_the_package_reads_it(load, tmp_path, kind) -> None:
    (tmp_path / "files").mkdir()
    for split, part in (("train", TEXTS[:150]), ("test", TEXTS[150:])):
        path = tmp_path / f"files/{split}.{kind}"
        if kind == "jsonl":
            as_lines(path, part)
        else:
            rows(part).to_parquet(path)
    corpus = load(dataset_name="files")
    assert (texts_of(corpus.train), texts_of(corpus.heldout)) == (TEXTS[:150], TEXTS[150:])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_file_of_rows_is_a_set_of_its_own(load, config, tmp_path, kind) -> None:
    as_lines(tmp_path / "a.jsonl", TEXTS)
    lines, _ = load_corpus(config(data="jsonl", train_files=str(tmp_path / "a.jsonl")), tmp_path / "cache")
    path = tmp_path / f"mine.{kind}"
    if kind == "parquet":
        rows(TEXTS).to_parquet(path)
    elif kind == "json":
        path.write_text(json.dumps([{"text": text} for text in TEXTS]))
    else:
        as_lines(path, TEXTS)
    corpus = load(dataset_name=path.name)
    assert corpus.fingerprint == lines.fingerprint and "the set has no split but train" in corpus.notes
    again = load(dataset_name=path.name)
    assert again.fingerprint == corpus.fingerprint


def test_dataset_subset_is_one_of_those_that_a_folder_names(load, tmp_path) -> None:
    named = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/*\n" for name in ("a", "b")
    )
    for name, part in (("a", TEXTS[:90]), ("b", TEXTS[90:])):
        as_lines(tmp_path / f"files/{name}/1.jsonl", part)
    (tmp_path / "files/README.md").write_text(f"---\nconfigs:\n{named}---\n")
    for name, part in (("a", TEXTS[:90]), ("b", TEXTS[90:])):
        corpus = load(dataset_name="files", dataset_subset=name)
        assert {*texts_of(corpus.train), *texts_of(corpus.heldout)} == set(part)
        assert corpus.name == f"files ({name})"
    with pytest.raises(DataError, match="files' cannot be read by datasets"):
        load(dataset_name="files")


def test_dataset_bytes_bounds_the_training_text(load, tmp_path) -> None:
    datasets.DatasetDict(train=rows(TEXTS), test=rows(TEXTS[-9:])).save_to_disk(str(tmp_path / "mine"))
    enough = sum(len(text) for text in TEXTS[:20])
    corpus = load(dataset_name="mine", dataset_bytes=enough)
    assert texts_of(corpus.train) == TEXTS[:20] and len(corpus.heldout) == 9
    assert texts_of(load(dataset_name="mine", dataset_bytes=enough + 1).train) == TEXTS[:21]


def test_text_field_and_held_out_copies(load, tmp_path) -> None:
    train, test = rows(TEXTS).rename_column("text", "body"), rows(TEXTS[3:5]).rename_column("text", "body")
    datasets.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "mine"))
    corpus = load(dataset_name="mine", text_field="body")
    assert "left out of training, as the same text is held out: train:4, train:5" in corpus.notes
    assert texts_of(corpus.train) == TEXTS[:3] + TEXTS[5:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "data=hf needs dataset_name=<folder or name>"),
        (
            {"dataset_name": "mine", "dataset_split": "trian"},
            "dataset_split: 'trian' is not one of test, train. Did",
        ),
        ({"dataset_name": "mine", "eval_split": "dev"}, "eval_split: 'dev' is not one of test, train"),
        ({"dataset_name": "mine", "eval_split": "train"}, "eval_split: 'train' is what is trained on"),
        (
            {"dataset_name": "mine", "dataset_subset": "x"},
            "saved by save_to_disk, and such a folder has no subsets",
        ),
        ({"dataset_name": "mine", "text_field": "body"}, r"lacks the column 'body' \(it has 'text', 'id'\)"),
        (
            {"dataset_name": "mine", "text_field": "id"},
            "split test, row 1: 'id' is of type int, and the text",
        ),
        (
            {"dataset_name": "files", "dataset_subset": "x"},
            "files' cannot be read by datasets: .*'x' not found",
        ),
        ({"dataset_name": "empty"}, "empty' cannot be read by datasets"),
        (
            {"dataset_name": "mine", "text_field": ["text", "body"]},
            r"lacks the column 'body' \(it has 'text', 'id'\)",
        ),
        ({"dataset_name": "a.csv"}, r"a.csv' is no file of rows \(.jsonl, .json, .parquet\)"),
        ({"dataset_name": "a.jsonl", "dataset_subset": "x"}, "a.jsonl' is one file, which has no subsets"),
        (
            {"dataset_name": "a.jsonl", "dataset_split": "test", "eval_split": None},
            "dataset_split: 'test' is not one of train",
        ),
        (
            {"dataset_name": "no/such/folder"},
            "there is no folder '.*no/such/folder', and no set of the hub is called",
        ),
        ({"dataset_name": "damaged"}, "damaged.* cannot be read"),
    ],
)
def test_what_is_no_set_says_so(load, tmp_path, fields, message) -> None:
    datasets.DatasetDict(train=rows(TEXTS), test=rows(TEXTS[:9])).save_to_disk(str(tmp_path / "mine"))
    rows(TEXTS).save_to_disk(str(tmp_path / "damaged"))
    arrow = next((tmp_path / "damaged").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    as_lines(tmp_path / "files/train.jsonl", TEXTS)
    as_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        load(**fields)


def test_another_field_that_changes_its_type_names_the_source_that_does_not_look_at_it(
    load, tmp_path
) -> None:
    for number, other in ((1, 5), (2, "x")):
        lines = "".join(json.dumps({"text": text, "other": other}) + "\n" for text in TEXTS)
        path = tmp_path / f"files/train{number}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(lines)
    with pytest.raises(DataError, match="split train cannot be read: .*data=jsonl or parquet"):
        load(dataset_name="files")
    corpus = load(data="jsonl", train_files="files")
    assert {*texts_of(corpus.train), *texts_of(corpus.heldout)} == set(TEXTS)


def test_without_network_a_name_of_the_hub_names_the_local_way(load) -> None:
    with pytest.raises(
        DataError, match="ConnectionError: Couldn't reach .*hf download owner/name --repo-type dataset"
    ):
        load(dataset_name="owner/name")


def test_a_name_of_the_hub_is_fetched_once(load, monkeypatch) -> None:
    parts = {"train": rows(TEXTS[:150]), "test": rows(TEXTS[150:])}
    asked = []

    def fetch(name, subset, *, split, streaming):
        asked.append((name, subset, split))
        return parts[split].to_iterable_dataset()

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "load_dataset", fetch)
        first = load(dataset_name="owner/name", dataset_subset="small")
    assert sorted(asked) == [("owner/name", "small", "test"), ("owner/name", "small", "train")]
    again = load(dataset_name="owner/name", dataset_subset="small")  # the network is gone
    assert again.fingerprint == first.fingerprint and texts_of(again.train) == TEXTS[:150]
    assert first.name == "owner/name (small)"
    with pytest.raises(DataError, match="could not be fetched"):
        load(dataset_name="owner/name", dataset_subset="large")


def test_of_a_name_of_the_hub_no_more_is_fetched_than_dataset_bytes_asks_for(load, monkeypatch) -> None:
    fetched = []

    def stream():
        for number in range(5000):
            fetched.append(number)
            yield {"text": f"document {number}", "id": number}

    with monkeypatch.context() as patch:
        opened = datasets.IterableDataset.from_generator(
            stream, features=datasets.Features(text=datasets.Value("string"), id=datasets.Value("int64"))
        )
        patch.setattr(datasets, "load_dataset", lambda *_, **__: opened)
        first = load(dataset_name="owner/name", eval_split=None, dataset_bytes=4000)
    size = first.train.sizes.sum() + first.heldout.sizes.sum()
    assert 4000 <= size < 4020 and 0 < len(fetched) <= 2 * sets.BATCH_ROWS
    assert (
        load(dataset_name="owner/name", eval_split=None, dataset_bytes=4000).fingerprint == first.fingerprint
    )


def test_without_its_package_the_extra_is_named(load, monkeypatch) -> None:
    monkeypatch.setattr(sets, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"needs the package datasets: pip install -e '\.\[data\]'"):
        load(dataset_name="mine")


def test_a_set_alone_means_its_source_and_its_folder_is_found_from_anywhere(
    config, tmp_path, monkeypatch
) -> None:
    assert source_of("dataset_name", "mine") == "hf"
    rows(TEXTS).save_to_disk(str(tmp_path / "mine"))
    monkeypatch.chdir(tmp_path)
    assert sets.absolute(config(data="hf", dataset_name="mine")) == {"dataset_name": str(tmp_path / "mine")}
    assert sets.absolute(config(data="hf", dataset_name="owner/name")) == {}
