"""Entries of `mix` are checked as runs of their own, from files and from the command line."""

from __future__ import annotations

import re

import pytest

from configs.compose import compose
from configs.messages import ConfigError
from configs.schema import RunConfig
from trainer.commands.launch import config_text, read_config, with_absolute_paths

TEXT = "{data: text, input_file: a.txt, weight: [0.7, 0.3]}"
LINES = "{data: jsonl, train_files: 'b*.jsonl', weight: [0.3, 0.7], name: lines}"


@pytest.fixture
def texts(write):
    write("a.txt", "hello\n" * 30)
    write("b.jsonl", '{"text": "hello"}\n')


def composed(*words):
    return compose(["mine.yaml", *words], lambda text: None)[0]


def test_entries_have_every_field_of_their_source(work, texts) -> None:
    cfg = composed("data=mix", f"mix=[{TEXT},{LINES}]")
    text, lines = cfg.mix
    assert text == {
        "data": "text",
        "weight": [0.7, 0.3],
        "input_file": "a.txt",
        "data_root": None,
        "val_files": None,
        "document_separator": None,
    }
    assert lines["text_field"] == "text" and lines["name"] == "lines" and lines["train_files"] == "b*.jsonl"
    assert RunConfig.model_validate(cfg.model_dump(mode="json")) == cfg


def test_a_mixture_alone_means_data_mix(work, texts, write) -> None:
    notes: list[str] = []
    assert compose(["mine.yaml", f"mix=[{TEXT}]"], notes.append)[0].data == "mix"
    assert "mix is given: data=mix" in notes
    write("own.yaml", f"defaults: [mine, _self_]\nmix:\n- {TEXT}\n- {{data: embedded, weight: 1}}\n")
    assert [entry["data"] for entry in compose(["own.yaml"], notes.append)[0].mix] == ["text", "embedded"]


def test_the_config_of_a_run_means_the_same_from_any_folder(work, texts, tmp_path, monkeypatch) -> None:
    cfg = with_absolute_paths(composed(f"mix=[{TEXT},{LINES}]"))
    (tmp_path / "run.yaml").write_text(config_text(cfg))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again, _ = read_config(tmp_path / "run.yaml")
    assert again.mix == cfg.mix
    assert cfg.mix[0]["input_file"] == str(work / "a.txt") and cfg.mix[1]["train_files"] == [
        str(work / "b*.jsonl")
    ]


def test_what_a_run_of_a_mixture_does_not_read_is_said(work, texts) -> None:
    notes: list[str] = []
    compose(["mine.yaml", f"mix=[{TEXT}]", "text_field=body"], notes.append)
    assert "not read by this run: text_field (because of data=mix)" in notes
    notes.clear()
    compose(["mine.yaml", f"mix=[{TEXT}]", "near_copies=drop"], notes.append)
    assert not [note for note in notes if "not read" in note]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data=mix"], "data=mix needs mix=[{data: <source>, weight: <share>}, ...]"),
        (["mix=[]"], "mix: must not be empty"),
        (["mix=3"], "mix: expected list or null, got 3 (int)"),
        (["mix=[a.txt]"], "mix.0: expected mapping, got 'a.txt' (str)"),
        (
            ["data=text", "input_file=a.txt", f"mix=[{TEXT}]"],
            "mix is read by data=mix only, and data is 'text'",
        ),
        (
            ["mix=[{data: text, input_file: a.txt, wieght: 1}]"],
            "unknown key 'mix.0.wieght' of data=text. Did you mean",
        ),
        (
            ["mix=[{data: embedded, weight: 1, zzz: 1}]"],
            "unknown key 'mix.0.zzz' of data=embedded. It takes data, name",
        ),
        (["mix=[{data: text, weight: 1, text_field: x}]"], "unknown key 'mix.0.text_field' of data=text."),
        (["mix=[{weight: 1}]"], "required key 'mix.0.data' has no value"),
        (
            ["mix=[{data: jsonl, train_files: 5, weight: 1}]"],
            "mix.0.train_files: expected str or list or null, got 5 (int)",
        ),
        (
            ["mix=[{data: jsonl, train_files: [5], weight: 1}]"],
            "mix.0.train_files.0: expected str, got 5 (int)",
        ),
        (
            [f"mix=[{TEXT}]", "train_files=c.jsonl"],
            "data is 'mix'. Drop train_files, or move it into an entry of mix",
        ),
        (["mix=[{data: mix, weight: 1}]"], "mix.0.data: a mixture within a mixture is none"),
        (["mix=[{data: txt, weight: 1}]"], "mix.0.data: 'txt' is not one of"),
        (["mix=[{data: text, weight: 1}]"], "mix.0: data=text needs input_file=<file or folder>"),
        (
            ["mix=[{data: text, input_file: c.txt, weight: 1}]"],
            "mix.0: input_file: no such file or folder: c.txt",
        ),
        (["mix=[{data: jsonl, train_files: 'c*', weight: 1}]"], "mix.0: train_files: 'c*' matches no file"),
        (
            ["mix=[{data: embedded, weight: 1}, {data: synthetic, synthetic_symbols: 1, weight: 1}]"],
            "mix.1.synthetic_symbols: must satisfy 2 <= synthetic_symbols <= 95, got 1",
        ),
        (["mix=[{data: embedded, weight: -1}]"], "mix.0.weight: must be a finite number, 0 or more"),
        (["mix=[{data: embedded}]"], "mix.0: has no weight"),
        (["mix=[{data: embedded, weight: 0}]"], "mix: all weights are 0 (embedded)"),
        ([f"mix=[{TEXT},{{data: embedded, weight: [1, 2, 3]}}]"], "all equally long; got text 2, embedded 3"),
    ],
)
def test_what_is_wrong_with_an_entry_is_said_with_its_place(work, texts, words, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        composed(*words)
    assert caught.value.problems[-1].startswith("command line: ")
    assert len(caught.value.problems) == 1


def test_a_mixture_that_is_null_is_none(work, texts) -> None:
    assert composed("input_file=a.txt", "mix=null").data == "text"


def test_problems_of_all_entries_are_told_together(work, texts) -> None:
    with pytest.raises(ConfigError) as caught:
        composed("mix=[{data: txt, weight: 1}, {data: embedded, weigth: 1}]")
    assert len(caught.value.problems) == 2
