"""The commands around training: generate, eval, show, bench. One tiny trained run serves them all."""

import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mytrainer
from adapters import build_adapter
from adapters.base import Generation, Metric
from configs.messages import ConfigError
from data.tokenizers import ByteTokenizer
from models.patches.config import MegabyteConfig
from tests.contract.tiny import config
from tests.trainer.forged import forge, tensor_file
from trainer.commands import evaluate
from trainer.commands.bench import step as bench_step
from trainer.commands.generate import _Printer
from trainer.loaded import load
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.restore import Restored
from trainer.view.stream import patient

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A working directory with checkpoints/dante: two checkpoints and an EMA."""
    work = tmp_path_factory.mktemp("work")
    steps = ["num_iterations=12", "save_steps=6", "ema_decay=0.9", "batch_size=2", "synthetic_bytes=40000"]
    train(*config("gpt2", *steps), work / "checkpoints/dante")
    return work


@pytest.fixture
def command(runs, monkeypatch, capsys):
    """Run one command in process, as the shell would: (exit status, stdout, stderr)."""
    monkeypatch.chdir(runs)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*argv):
        capsys.readouterr()
        try:
            status = mytrainer.main([str(a) for a in argv])
        except SystemExit as leaving:  # argparse
            status = leaving.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


def refused(result, *words):
    """Exit status 2, nothing on stdout, one message that says what is wrong."""
    status, out, err = result
    assert (status, out) == (2, "") and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err


# -- generate ----------------------------------------------------------------------------------------------------------


def generate(command, *more, model=("--model_name", "dante")):
    status, out, err = command("generate", *model, "--device", "cpu", "--max_new_tokens", 30, *more)
    assert status == 0, err
    return out, err


def test_stdout_has_the_text_and_nothing_else(command):
    out, err = generate(command, "--prompt", "01", "--ignore_document_end")
    assert out.startswith("01") and out.endswith("\n") and len(out) > 3
    assert "30 tokens" in err and "checkpoint-12 (EMA weights, cpu)" in err


def test_an_empty_text_says_why(command, monkeypatch):
    def ends(self, prompts, options, on_tokens, on_state):
        on_tokens(0, [])
        for row in range(1, len(prompts)):
            on_tokens(row, [48])
        return Generation([], 0)

    monkeypatch.setattr("adapters.default.DefaultModelAdapter.generate", ends)
    out, err = generate(command, "--prompt", "01")
    assert (
        out == ""
        and "note: the text is empty, as the model ends the document at once. --ignore_document_end" in err
    )
    out, err = generate(command, "--prompt", "01", "--num_samples", 3)
    assert out == "010\n010\n" and "note: 1 of 3 samples are empty" in err


def test_what_became_of_drafts_is_told_beside_the_text(command, monkeypatch):
    cfg, model_cfg = config("mtp", "model_cfg.n_mtp_tokens=3", "model_cfg.n_layers=4")
    adapter = build_adapter(cfg, model_cfg, ByteTokenizer())
    restored = Restored(cfg, adapter.eval(), adapter.tokenizer, adapter.device, "no", None, "untrained", 1)
    monkeypatch.setattr("trainer.commands.generate.restore_named", lambda args: restored)
    words = ["--prompt", "01", "--ignore_document_end", "--temperature", 0]
    plain, quiet = generate(command, *words)
    out, err = generate(command, *words, "--speculative")
    assert out == plain and "speculative" not in quiet
    told = re.search(
        r"speculative: (.*) tokens per forward pass; drafts accepted, by depth: (.*), (.*)\n", err
    )
    assert float(told[1]) >= 1 and re.fullmatch(r"\d+ of \d+ \(\d+%\)", told[2])
    _, err = generate(command, *words, "--speculative", "--draft", 1)
    assert err.count("%") == 1


def test_what_was_measured_of_a_text_is_told_beside_it(command, monkeypatch):
    monkeypatch.setattr(
        "adapters.default.DefaultModelAdapter.text_metrics", lambda self, hidden: {"depth": Metric(7.0, 2.0)}
    )
    out, err = generate(command, "--prompt", "01", "--ignore_document_end")
    assert "measured over all tokens read: depth 3.5\n" in err and "measured" not in out


@pytest.mark.parametrize(("encoding", "written"), [("ascii", b"\\xfc"), ("cp1252", b"\xfc")])
def test_a_text_goes_to_a_pipe_of_any_encoding(command, monkeypatch, encoding, written):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    assert (
        mytrainer.main(["generate", "--model_name", "dante", "--prompt", "grün\u2591", "--device", "cpu"])
        == 0
    )
    assert raw.getvalue().startswith(b"gr" + written + b"n\\u2591")


def test_what_was_generated_before_a_signal_is_printed(command, monkeypatch):
    def interrupted(self, prompts, options, on_tokens, on_state):
        os.kill(os.getpid(), signal.SIGUSR1)
        on_tokens(0, [48])
        raise AssertionError("it went on")

    monkeypatch.setattr("adapters.default.DefaultModelAdapter.generate", interrupted)
    out, err = generate(command, "--prompt", "01")
    assert out == "010\n" and "(stopped)" in err


def test_a_seed_repeats_a_text(command):
    texts = [generate(command, "--prompt", "01", "--seed", seed)[0] for seed in (3, 4, 3)]
    assert texts[0] == texts[2] != texts[1]


def test_the_cache_changes_no_text(command):
    assert generate(command)[0] == generate(command, "--no_cache")[0]


def test_several_samples(command):
    out, err = generate(
        command, "--prompt", "<", "--num_samples", 3, "--ignore_document_end", "--temperature", 2
    )
    assert [f"sample {n} of 3" in err for n in (1, 2, 3)] == [True] * 3
    texts = out.split("<", 1)[1].split("\n<")
    assert len(texts) == 3 and len(set(texts)) == 3
    alone, _ = generate(command, "--prompt", "<", "--ignore_document_end", "--temperature", 2)
    assert out.startswith(alone), "the first sample is the one that a single draw gives"


class Words:
    """Of two bytes each, so that a half one has to wait."""

    eot = 0

    def decode(self, tokens):
        return "".join("äöü"[token] for token in tokens).encode()


def test_samples_drawn_side_by_side_are_printed_one_after_another(capsys):
    printer = _Printer(">", Words(), 3, None)
    for step in range(2):
        for row in (1, 2):  # the first sample ended before it began
            printer.add(row, [step])
            printer.add(0, [])
    assert capsys.readouterr() == (">äö", "--- sample 2 of 3 ---\n"), (
        "the first to have text is seen as it comes"
    )
    printer.end()
    assert capsys.readouterr() == ("\n>äö\n", "--- sample 3 of 3 ---\n")
    assert printer.count == 4


class Led(Words):
    """With a mark in front of each word, which encoding also puts before a text."""

    lead = b"_"

    def decode(self, tokens):
        return b"".join(b"_" + Words.decode(self, [token]) for token in tokens)


@pytest.mark.parametrize(("prompt", "printed"), [("", "ä_ö\n"), (">", ">_ä_ö\n")])
def test_what_stands_before_a_text_is_not_printed(capsys, prompt, printed):
    printer = _Printer(prompt, Led(), 1, None)
    for token in (0, 1):
        printer.add(0, [token])
    printer.end()
    assert capsys.readouterr().out == printed


class Escapes(Words):
    def decode(self, tokens):
        return b"".join((b"\x1b", b"[2J")[token] for token in tokens)


def test_a_terminal_obeys_no_text_that_a_model_writes(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", patient(terminal))
    printer = _Printer("\x9b", Escapes(), 1, None)
    for token in (0, 1):
        printer.add(0, [token])
    printer.end()
    assert terminal.getvalue() == r"\x9b\x1b[2J" + "\n"


def test_raw_weights_are_there_too(command):
    assert "(raw weights" in generate(command, "--raw")[1]


@pytest.mark.parametrize("place", ["", "checkpoint-6", "checkpoint-12", "final_model"])
def test_a_checkpoint_under_any_of_its_names(command, place):
    out, err = generate(command, "--seed", 1, model=("--checkpoint", Path("checkpoints/dante", place)))
    assert str(Path("checkpoints/dante", place or "checkpoint-12")) in err
    newest, _ = generate(command, "--seed", 1)
    assert (out == newest) is (place != "checkpoint-6")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--top_p", 1.5], "top_p: must satisfy 0 < top_p <= 1, got 1.5"),
        (["--top_k", -1], "top_k: must be 0 (off) or more, got -1"),
        (["--temperature", -1], "temperature: must be 0 (greedy) or more, got -1.0"),
        (["--max_new_tokens", 0], "max_new_tokens: must be at least 1, got 0"),
        (["--num_samples", 0], "num_samples: must be at least 1, got 0"),
        (
            ["--speculative"],
            "GPT2, as it is configured, has nothing to draft tokens with. Architectures that can",
        ),
        (["--speculative", "--no_cache"], "speculative: drafts are verified behind what the cache holds"),
        (["--draft", 2], "draft: 2 is read with speculative alone"),
        (["--device", "gpu"], "device: 'gpu' is not one of auto, cpu, cuda, cuda:N, mps"),
    ],
)
def test_bad_options_are_refused(command, words, text):
    refused(command("generate", "--model_name", "dante", *words), text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(command):
    refused(command("generate", "--model_name", "dante", "--device", "cuda"), "no CUDA device is visible")


def test_a_model_that_is_not_there(command, runs, monkeypatch, tmp_path):
    refused(command("generate", "--model_name", "dannte"), "checkpoints/dannte", "In checkpoints: dante")
    refused(command("generate"), "--checkpoint <run folder> or --model_name <name>")
    (tmp_path / "empty").mkdir()
    refused(command("generate", "--checkpoint", tmp_path / "empty"), "empty holds no weights that are read")
    (tmp_path / "file").touch()
    refused(
        command("generate", "--checkpoint", tmp_path / "file"), "is a file, and the folder that it lies in"
    )
    monkeypatch.chdir(tmp_path)
    missing = command("eval", "--model_name", "dante")
    refused(missing, "no such checkpoint or run folder: checkpoints/dante")
    assert "Hugging Face" not in missing[2], "no model there is called so"


def test_a_damaged_checkpoint(command, runs, tmp_path):
    """Named alone it is refused; in a run the one before it is used, with a warning. Links tell the same."""
    shutil.copytree(runs / "checkpoints/dante", tmp_path / "run")
    for place in ("checkpoint-12", "final_model"):
        with open(tmp_path / "run" / place / "model.pt", "r+b") as file:
            file.seek(1000)
            file.write(b"\0\1\2\3\4\5\6\7" * 8)
        refused(
            command("eval", "--checkpoint", tmp_path / "run" / place),
            f"{place} is damaged: model.pt does not match",
        )
    _, err = generate(command, model=("--checkpoint", tmp_path / "run"))
    assert "checkpoint-12 is damaged (model.pt" in err and "run/checkpoint-6 (EMA" in err
    (tmp_path / "run/checkpoint-6/tokenizer.json").unlink()
    refused(command("generate", "--checkpoint", tmp_path / "run/checkpoint-6"), "tokenizer.json is missing")


def test_the_traceback_is_there_for_who_wants_it(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="top_p"):
        command("generate", "--model_name", "dante", "--top_p", 2)


@pytest.mark.parametrize("name", ["generate", "eval", "export", "show", "bench"])
def test_help(command, name):
    status, out, _ = command(name, "--help")
    assert status == 0 and f"python mytrainer.py {name}" in out


def test_an_option_that_does_not_exist(command):
    status, out, err = command("generate", "--topk", 3)
    assert (status, out) == (2, "") and "unrecognized arguments: --topk" in err and "Traceback" not in err


# -- eval --------------------------------------------------------------------------------------------------------------


def evaluated(command, *more, model=("--model_name", "dante")):
    status, out, err = command("eval", *model, "--device", "cpu", *more)
    assert status == 0, err
    return json.loads(out), err


def test_eval_finds_the_score_of_the_run_to_the_last_digit(command, runs, tmp_path):
    found, err = evaluated(command, "--output", tmp_path / "score.json")
    summary = json.loads((runs / "checkpoints/dante/summary.json").read_text())
    assert found["score"] == summary["score"]
    assert json.loads((tmp_path / "score.json").read_text()) == found
    assert (found["type"], found["weights"]) == ("gpt2", "EMA")
    assert f"bits per byte     {found['score']['bits_per_byte']:.3f}" in err
    raw, _ = evaluated(command, "--raw")
    assert raw["score"]["bits_per_byte"] != found["score"]["bits_per_byte"] and raw["weights"] == "raw"


def strict(text):
    return json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


def test_weights_that_are_not_finite_are_named(command, runs, tmp_path):
    shutil.copytree(runs / "checkpoints/dante/checkpoint-12", tmp_path / "checkpoint-12")
    broken = tmp_path / "checkpoint-12"
    for name, key in (("model.pt", None), ("ema.pt", "shadow")):
        state = load_tensors(broken, name)
        next(iter((state[key] if key else state).values())).view(-1)[3] = math.nan
        forge(broken, name, tensor_file(state))
    written = tmp_path / "score.json"
    status, out, err = command("eval", "--checkpoint", broken, "--output", written)
    assert status == 1 and re.search(
        "^error: .*checkpoint-12 holds weights that are not finite: .*wte", err, re.M
    )
    assert strict(out)["score"] is None and strict(written.read_text()) == strict(out)
    status, out, err = command("generate", "--checkpoint", broken)
    assert (status, out) == (1, "") and "holds weights that are not finite" in err


def test_a_score_that_is_no_number_is_an_error_and_valid_json(command, monkeypatch):
    score = Restored.score
    monkeypatch.setattr(
        Restored, "score", lambda *a, **k: dataclasses.replace(score(*a, **k), bits_per_byte=math.nan)
    )
    status, out, err = command("eval", "--model_name", "dante")
    assert status == 1 and "error: the score of " in err and strict(out)["score"]["bits_per_byte"] is None


def test_eval_at_other_settings(command):
    found, _ = evaluated(command, "--val_seq_len", 16, "--batch_size", 3)
    assert found["score"]["context_tokens"] == 16
    longer, _ = evaluated(command, "--val_bytes", 4000)
    assert found["score"]["bytes"] == 2000 < longer["score"]["bytes"] <= 4000
    whole, _ = evaluated(command)
    rough, _ = evaluated(command, "--mixed_precision", "bf16")
    assert (rough["precision"], whole["precision"]) == ("bf16", "no")
    assert rough["score"]["bits_per_byte"] != whole["score"]["bits_per_byte"]


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 1e-6), ("bf16", 1e-3)])
def test_a_perplexity_does_not_depend_on_how_rows_are_batched_and_padded(command, precision, tolerance):
    """Rows are of many lengths, and a batch is as wide as its longest: one at a time there is no padding at all."""
    words = ["--mixed_precision", precision, "--val_seq_len", 16]
    found = [evaluated(command, *words, "--batch_size", rows)[0] for rows in (1, 3, 64)]
    assert len({(f["num_samples"], f["num_tokens"]) for f in found}) == 1
    for name in ("perplexity", "avg_loss"):
        assert [f[name] for f in found] == pytest.approx([found[0][name]] * 3, rel=tolerance)


def test_eval_tells_of_a_loss_per_token(command, runs, tmp_path):
    """The mean over tokens of all of the text, not of batches, whose sizes differ."""
    found, err = evaluated(command, "--output", tmp_path / "F.json")
    keys = ["perplexity", "avg_loss", "dataset", "split", "checkpoint", "num_samples", "num_tokens"]
    assert {*keys, "non_causal_routing"} <= json.loads((tmp_path / "F.json").read_text()).keys()
    assert (found["dataset"], found["split"]) == (found["data"], "held out")
    assert found["non_causal_routing"] is False
    assert found["perplexity"] == pytest.approx(math.exp(found["avg_loss"]), rel=1e-12)
    nats = found["avg_loss"] * found["num_tokens"]
    score = found["score"]
    assert nats / math.log(2) / score["bytes"] == pytest.approx(score["bits_per_byte"], rel=1e-9)
    for line in (
        f"Dataset           {found['data']}",
        "Split             held out",
        f"Samples           {found['num_samples']:,}",
        f"Tokens            {found['num_tokens']:,}",
        f"Avg Loss          {found['avg_loss']:.6f}",
        f"Perplexity        {found['perplexity']:.4f}",
    ):
        assert f"  {line}\n" in err


def test_eval_of_so_many_documents(command, tmp_path):
    lines = [json.dumps({"text": f"document {n}: {'0123 ' * n}"}) for n in range(1, 9)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    found, _ = evaluated(command, "--dataset", tmp_path / "mine.jsonl", "--max_samples", 3)
    whole, _ = evaluated(command, "--input_file", tmp_path / "mine.jsonl")
    assert (found["num_samples"], whole["num_samples"]) == (3, 8) and found["split"] is None
    assert found["num_tokens"] < whole["num_tokens"]
    own, _ = evaluated(command, "--dataset", "synthetic", "--max_samples", 1)
    assert own["num_samples"] == 1 and own["data"] == evaluated(command)[0]["data"]


def test_eval_of_a_split_of_a_data_set(command, tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: [f"{name} {n}: 0123" for n in range(4 + len(name))] for name in ("test", "train", "more")}
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "set")
    for split, texts in parts.items():
        found, _ = evaluated(command, "--dataset", tmp_path / "set", "--split", split)
        assert (found["split"], found["num_samples"]) == (split, len(texts))
        assert found["score"]["bytes"] == sum(map(len, texts))
    found, _ = evaluated(command, "--dataset", tmp_path / "set")
    assert (found["split"], found["num_samples"]) == ("test", 8), "eval_split of the run"
    status, _, err = command(
        "eval", "--model_name", "dante", "--dataset", tmp_path / "set", "--split", "tets"
    )
    assert status == 2 and "'tets' is not one of more, test, train" in err


def test_eval_on_other_text_scores_all_of_it(command, tmp_path):
    text = "".join(f"line {n}: 0123 é\n" for n in range(500))
    (tmp_path / "mine.txt").write_text(text, encoding="utf-8")
    found, err = evaluated(command, "--input_file", tmp_path / "mine.txt")
    assert found["score"]["bytes"] == len(text.encode()) and (found["data"], found["part"]) == (
        "mine.txt",
        "all",
    )
    assert found["score"]["bits_per_byte"] > 4, "it has seen none of the letters"
    assert "on all of mine.txt" in err
    limited, _ = evaluated(
        command, "--data", "text", "--input_file", tmp_path / "mine.txt", "--val_bytes", 100
    )
    assert limited["score"]["bits_per_byte"] == found["score"]["bits_per_byte"]  # it is one document


def test_eval_of_an_untrained_model(command, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "defaults: [gpt2, _self_]\nmodel_cfg: {n_ctx: 32, d_model: 32, n_layers: 1, n_heads: 2}\n"
        "data: synthetic\nsynthetic_bytes: 20000\ntrain_seq_len: 32\n"
    )
    found, err = evaluated(command, "--val_bytes", 2000, model=("--config", tmp_path / "mine.yaml"))
    assert "no checkpoint was given: this is the model before any training" in err
    assert found["weights"] == "untrained" and found["checkpoint"] is None
    assert found["score"]["bits_per_byte"] == pytest.approx(8.0, abs=0.1), "log2 257"


def test_eval_of_an_untrained_model_is_none_of_one_that_begins_with_weights(command, runs, tmp_path):
    run = runs / "checkpoints/dante"
    words = f"defaults: [gpt2, _self_]\nuse_lora: true\ninit_from_checkpoint: {run}\n"
    (tmp_path / "mine.yaml").write_text(words)
    refused(command("eval", "--config", tmp_path / "mine.yaml"), f"Give --checkpoint {run}")


def test_a_model_file_beside_a_checkpoint_must_be_of_its_architecture(command, runs, tmp_path):
    """What is free, and what a file leaves open, is no part of it."""
    run = runs / "checkpoints/dante"
    saved = json.loads((run / "config.json").read_text())["model_cfg"]
    sizes = json.dumps({**saved, "dropout": 0.5, "vocab_size": None})
    (tmp_path / "mine.yaml").write_text(
        f"defaults: [gpt2, _self_]\ntrain_seq_len: 32\nmodel_cfg: {sizes}\noutput_dir: {run}\n"
    )
    found, _ = evaluated(command, "--config", tmp_path / "mine.yaml")
    assert found["weights"] == "EMA" and found["checkpoint"]
    result = command("eval", "--model_name", "dante", "--config", "configs/gpt2.yaml")
    refused(result, "configs/gpt2.yaml is not the architecture of", "model_cfg.n_layers 12 (there 2)")
    result = command("eval", "--model_name", "dante", "--hydra_model_cfg", "configs/vanilla.yaml")
    refused(result, "configs/vanilla.yaml is type vanilla", "is type gpt2")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--batch_size", 0], "batch_size: must be at least 1, got 0"),
        (["--max_samples", 0], "max_samples: must be at least 1, got 0"),
        (
            ["--split", "test"],
            "split: 'test' is of a data set of Hugging Face, and the text is data=synthetic",
        ),
        (["--dataset", "synthetik"], "dataset: 'synthetik' is no file or folder here"),
        (
            ["--dataset", "synthetic", "--data", "embedded"],
            "dataset: it says what --data and --input_file say",
        ),
        (["--val_seq_len", -3], "val_seq_len: must be at least 1, got -3"),
        (["--data", "text"], "needs input_file"),
        (["--data", "text", "--input_file", "no.txt"], "'no.txt' does not exist"),
        (["--input_file", "no.txt"], "'no.txt' does not exist"),
        (["--data", "synthetic", "--input_file", "no.txt"], "Add --data text"),
        (["--output", "no/such/folder/score.json"], "output: cannot write no/such/folder/score.json"),
        (["--picture", "no/such/folder/page.html"], "picture: cannot write no/such/folder/page.html"),
        (["--picture", "one", "--output", "one"], "picture: one is the file of --output too"),
        (["--picture", "page.html"], "DefaultModelAdapter of type=gpt2 has nothing to draw"),
    ],
)
def test_bad_evaluations_are_refused(command, words, text):
    refused(command("eval", "--model_name", "dante", "--device", "cpu", *words), text)


def not_started(result, *words):
    """One line for what is wrong, before anything is read or written."""
    status, out, err = result
    assert (status, out) == (2, "") and err.endswith("1 problem; nothing was started\n"), err
    for word in words:
        assert word in err


def test_a_context_is_checked_as_that_of_a_run_is(command, tmp_path):
    """By whatever way it comes, and with the model's sizes as they are."""
    words = ("eval", "--device", "cpu", "--input_file", "no.txt", "--val_seq_len")
    too_long = "val_seq_len (64) must not exceed model_cfg.n_ctx (32): positions are learned. Nearest: val_seq_len=32\n"
    not_started(command(*words, 64, "--model_name", "dante"), too_long)
    run, sizes = tmp_path / "run", [f"model_cfg.{k}={v}" for k, v in MegabyteConfig.tiny.items()]
    once = [
        "preset=none",
        "train_seq_len=32",
        "global_batch_size=2",
        "data=synthetic",
        "synthetic_bytes=20000",
    ]
    once += [
        "num_iterations=1",
        "save_steps=1",
        "val_loss_every=0",
        "val_bytes=500",
        "sample_tokens=0",
        "device=cpu",
    ]
    assert command("--config", ROOT / "configs/megabyte.yaml", f"output_dir={run}", *sizes, *once)[0] == 0
    in_parts = "val_seq_len (30) must be a multiple of model_cfg.patch_size (4); nearest: 28, 32"
    not_started(command(*words, 30, "--checkpoint", run), in_parts)
    with pytest.raises(ConfigError, match=re.escape(in_parts)):
        load(run, device="cpu", val_seq_len=30)
    not_started(command(f"resume={run}", "val_seq_len=30", "num_iterations=2"), in_parts)
    not_started(
        command(*words, 30, "--config", ROOT / "configs/megabyte.yaml"),
        "val_seq_len (30) must be a multiple of model_cfg.patch_size (8); nearest: 24, 32",
    )
    found, _ = evaluated(command, "--val_seq_len", 28, model=("--checkpoint", run))
    assert found["score"]["context_tokens"] == 28
    assert len(load(run, device="cpu", val_seq_len=28).score("a" * 31).nats) == 31, "text is of any length"


def test_a_number_format_that_there_is_not_is_refused(command):
    status, out, err = command("eval", "--model_name", "dante", "--mixed_precision", "fp8")
    assert (status, out) == (2, "") and "mixed_precision: 'fp8' is not one of auto, no, bf16, fp16" in err


@pytest.fixture(scope="module")
def router(tmp_path_factory):
    """A run of an architecture that has something to draw."""
    run = tmp_path_factory.mktemp("mod")
    train(*config("mod", "num_iterations=1", "val_loss_every=0", "sample_tokens=0"), run)
    return run


def test_eval_draws_what_the_run_drew_and_keeps_its_data_where_asked(command, router, tmp_path):
    page, output = tmp_path / "page.html", tmp_path / "score.json"
    found, err = evaluated(command, "--picture", page, "--output", output, model=("--checkpoint", router))
    kept = json.loads(output.read_text())
    assert kept.pop("annotation") == json.loads((router / "annotation.json").read_text())
    assert kept == found, "of what is printed the picture is no part"
    (line,) = [line for line in err.splitlines() if str(page) in line]
    assert line.startswith("  picture           layer 1: tokens that enter, of 31 tokens: ")
    text = page.read_text(encoding="utf-8")
    assert "<summary>layer 1: tokens that enter</summary>" in text and "held-out part of markov text" in text


def test_eval_draws_the_text_that_it_scores(command, router, tmp_path):
    (tmp_path / "mine.txt").write_text("<i>0123</i> " * 9, encoding="utf-8")
    words = ["--picture", tmp_path / "page.html", "--input_file", tmp_path / "mine.txt"]
    evaluated(command, *words, model=("--checkpoint", router))
    assert "&lt;i&gt;0123" in re.sub("<.*?>", "", (tmp_path / "page.html").read_text(encoding="utf-8"))


def test_eval_says_where_there_is_nothing_to_draw(command, router, monkeypatch, tmp_path):
    monkeypatch.setattr("trainer.commands.evaluate.annotation_of", lambda *args: {})
    page = tmp_path / "page.html"
    _, err = evaluated(command, "--picture", page, model=("--checkpoint", router))
    assert "picture           nothing to draw" in err and not page.exists()


# -- show --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_data(monkeypatch):
    """Whoever asks for data fails: `show` must not."""
    import data
    import data.bpe

    def fail(*args, **kwargs):
        raise AssertionError("data was touched")

    for module, name in ((data, "load_dataset"), (data.bpe.BpeTokenizer, "train")):
        monkeypatch.setattr(module, name, fail)


GPT2_150M = ["preset=150M"]


def test_show_one_configuration(command, no_data):
    status, out, err = command("show", "--hydra_model_cfg=configs/gpt2.yaml", *GPT2_150M)
    assert status == 0, err
    assert "152,101,632" in out and "memory (estimate)" in out and "FLOPs per token" in out
    status, out, _ = command("show", "--hydra_model_cfg=configs/gpt2.yaml", "--json", *GPT2_150M)
    found = json.loads(out)
    assert found["parameters"] == {"total": 152_101_632, "trainable": 152_101_632}
    assert sum(row["parameters"] for row in found["roles"]) == 152_101_632
    assert (
        found["tokens"] == found["steps"] * found["tokens_per_step"] and found["memory_bytes"]["total"] > 6e8
    )


def test_show_tells_stages_of_the_batch(command, no_data):
    words = [
        "--hydra_model_cfg=configs/gpt2.yaml",
        "preset=none",
        "num_iterations=100",
        "global_batch_size=48",
    ]
    words += ["batch_stages=[{until:0.25,rows:16},{until:1,rate:1.5}]"]
    found = json.loads(command("show", *words, "--json")[1])
    assert found["tokens"] == (25 * 16 + 75 * 48) * 1024
    assert found["batch"]["micro"] == 16, "16 rows are what both stages have in common"
    _, out, _ = command("show", *words)
    assert "until step 25 " in out and "16 rows, 16,384 tokens a step, scheduled rates x 1\n" in out
    assert "until 0.25 of the run" in command("show", *words, "num_epochs=1")[1]


def test_show_takes_the_vocabulary_from_the_name_of_the_tokenizer(command, no_data):
    def vocabulary(*words):
        status, out, err = command("show", "--hydra_model_cfg=gpt2", "--json", "preset=nano", *words)
        assert status == 0, err
        return json.loads(out)["vocab_size"]

    assert (
        vocabulary() == 1024
        and vocabulary("tokenizer=byte") == 257
        and vocabulary("tokenizer=bpe-5000") == 5000
    )
    assert vocabulary("data=synthetic") == 257 and vocabulary("--vocab_size", "777") == 777
    assert vocabulary(f"tokenizer={Path('checkpoints/dante/tokenizer.json')}") == 257


def test_show_is_what_is_trained(command, runs, no_data):
    manifest = json.loads((runs / "checkpoints/dante/manifest.json").read_text())
    sizes = ["model_cfg.d_model=64", "model_cfg.n_layers=2", "model_cfg.n_heads=4", "model_cfg.n_ctx=32"]
    status, out, _ = command(
        "show", "--config=gpt2", "--json", *sizes, "train_seq_len=32", "preset=none", "data=synthetic"
    )
    found = json.loads(out)
    assert found["parameters"]["total"] == manifest["parameters"]["total"]
    assert found["flops_per_token"] == manifest["flops_per_token"]


def test_show_lists_the_configurations(command, monkeypatch, no_data):
    from trainer.commands import show

    status, listed, err = command("show_configs", "--json")
    by_name = {row["file"]: row for row in json.loads(listed)}
    assert status == 0 and by_name.keys() == {name for name, _ in show.list_configs()}, err
    assert by_name["gpt2"]["n_layers"] == 12 and by_name["gpt2"]["parameters"] > 80_000_000
    assert by_name["150M.json"]["parameters"] == 152_101_632
    assert by_name["small.config"]["n_layers"] == 2 and by_name["small.config"]["problem"] is None
    monkeypatch.setattr(show, "list_configs", lambda: [("gpt2", "one"), ("vanilla", "another")])
    status, out, err = command("show")
    assert status == 0 and "gpt2 " in out and "vanilla " in out, err


@pytest.mark.parametrize("name", ["show", "show_configs"])
def test_show_ignores_no_word(command, name):
    for words in (["preset=nano"], ["--jsn"], ["nope=1", "--json"], ["-m"]):
        status, out, err = command(name, *words)
        assert (status, out) == (2, "") and err.startswith("config error: "), words
    assert "no model chosen. Give --hydra_model_cfg=" in command(name, "preset=nano")[2]
    for model in ("model=gpt2", "hydra_model_cfg=gpt2", "configs/gpt2.yaml"):
        status, out, err = command(name, model, "preset=nano", "--json")
        assert status == 0 and json.loads(out)["type"] == "gpt2", err


def test_show_names_a_broken_file_and_lists_the_others(command, monkeypatch, tmp_path, no_data):
    from trainer.commands import show

    broken = tmp_path / "broken.yaml"
    broken.write_text("defaults: [gpt2, _self_]\nmodel_cfg: {n_heads: 5}\n")
    monkeypatch.setattr(show, "list_configs", lambda: [(str(broken), "bad"), ("vanilla", "good")])
    status, out, _ = command("show")
    assert status == 2 and "invalid: " in out and "n_heads" in out and "good" in out


def test_show_refuses_what_training_would(command):
    for words in (["nope=1"], ["learning_rate=x"], ["model_cfg.n_heads=5"], ["--nope"], ["num_iterations=0"]):
        status, out, err = command("show", "--hydra_model_cfg=gpt2", *words)
        assert (status, out) == (2, "") and err.startswith("config error: ") and "Traceback" not in err
    refused(
        command("show", "--hydra_model_cfg=gpt2", "--vocab_size=0"), "vocab_size: must be at least 2, got 0"
    )


# -- bench -------------------------------------------------------------------------------------------------------------


def bench_words(steps):
    sizes = [
        "preset=none",
        "model_cfg.d_model=32",
        "model_cfg.n_layers=1",
        "model_cfg.n_heads=2",
        "model_cfg.n_ctx=32",
    ]
    rows = [
        "data=synthetic",
        "synthetic_bytes=20000",
        "train_seq_len=32",
        "global_batch_size=4",
        "device=cpu",
    ]
    return ["bench", "step", "--steps", steps, *sizes, *rows]


def test_bench_measures_both_comparisons(command, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "peak_flops", lambda device: 1e12)
    words = ["--no_compile", "--no_processes", "--profile", 3, "--output", tmp_path / "bench.json"]
    status, out, err = command(*bench_words(2), *words)
    assert status == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["loop"]["loop_tokens_per_second"] > 0 and set(
        found["against_plain_loop"]["times_plain_loop"]
    ) == {
        "fp32",
        "bf16",
    }
    assert "loop overhead" in out and "x plain loop" in out
    assert 0 < found["loop"]["mfu"] < 1 and "share of the peak" in out
    profile = found["profile"]
    seconds = [entry["seconds"] for entry in profile["cpu"]]
    assert seconds == sorted(seconds, reverse=True) and 0 < sum(seconds) <= profile["seconds_per_step"]
    products = next(entry for entry in profile["cpu"] if entry["name"] == "aten::addmm")
    assert products["calls"] == 4  # the linear layers of the block, once a step
    assert f"{profile['cpu'][0]['name']} " in out and f"{len(seconds) - 3} others" in out


def test_bad_benchmarks_are_refused(command):
    refused(command(*bench_words(0)), "steps: must be at least 1, got 0")
    refused(command(*bench_words(1), "--profile", 0), "profile: must be at least 1, got 0")
    refused(command("bench", "stp"), "Did you mean 'step'?")
    refused(command(*bench_words(1), "--output", "no/such/x.json"), "output: cannot write no/such/x.json")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (evaluate, ["--model_name", "dante", "--device", "cpu", "--val_bytes", "100"]),
        (bench_step, [*bench_words(1)[2:], "--no_processes"]),
    ],
)
def test_a_file_is_written_before_anything_is_printed(runs, monkeypatch, tmp_path, module, words):
    """The reader of what is printed may leave, as `| head` does."""

    def left(*args, **kwargs):
        raise BrokenPipeError

    monkeypatch.chdir(runs)
    monkeypatch.setattr(module, "print", left, raising=False)
    for slow in ("_loop_overhead", "_against_plain"):
        monkeypatch.setattr(bench_step, slow, lambda *args: {"measured": 1})
    monkeypatch.setattr(bench_step, "_report", str)
    with pytest.raises(BrokenPipeError):
        module.main([*map(str, words), "--output", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text())


@pytest.mark.slow
def test_bench_measures_memory_and_start_up(command, tmp_path):
    status, _, err = command(*bench_words(1), "--no_compile", "--output", tmp_path / "bench.json")
    assert status == 0, err
    found = json.loads((tmp_path / "bench.json").read_text())
    assert set(found["peak_memory_bytes"]) == {"plain loop", "fp32", "bf16"}
    assert min(found["peak_memory_bytes"].values()) > 1e7 and found["seconds_to_first_step"] > 0


# -- from a shell ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_from_a_shell(runs):
    def shell(*words):
        return subprocess.run(
            [sys.executable, ROOT / "mytrainer.py", *words],
            cwd=runs,
            env={**os.environ, "PYTHONPATH": ""},
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = shell("generate", "--model_name", "dante", "--max_new_tokens", "5", "--device", "cpu")
    assert done.returncode == 0 and "tokens" in done.stderr and "tokens" not in done.stdout
    done = shell("eval", "--checkpoint", "checkpoints/dante", "--device", "cpu")
    assert done.returncode == 0 and json.loads(done.stdout)["score"]["bits_per_byte"] > 0
    done = shell("generate", "--model_name", "x")
    refused((done.returncode, done.stdout, done.stderr), "In checkpoints: dante")
    line = f"{sys.executable} {ROOT / 'mytrainer.py'} generate --model_name dante --max_new_tokens 2000 | head -c 20"
    piped = subprocess.run(line, shell=True, cwd=runs, capture_output=True, timeout=120)
    assert b"Traceback" not in piped.stderr and len(piped.stdout) == 20
