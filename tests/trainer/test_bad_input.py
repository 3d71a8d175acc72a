"""Whole command lines that go wrong: one message, a non-zero exit, and what was saved before is as it was."""

import codecs
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch

import mytrainer
from data.bpe import BpeTokenizer
from tests.contract.tiny import config, overrides
from trainer import loop
from trainer.commands.launch import config_text
from trainer.run.checkpoint import checkpoints_in, damage

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def work(tmp_path, cache, in_process, monkeypatch):
    """An empty working directory, and a cache that only these tests use."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MYTRAINER_CACHE", str(cache))
    monkeypatch.setenv("PYTHONPATH", "")
    return tmp_path / "here"


@pytest.fixture
def train(work, capsys):
    """Run `python mytrainer.py ...` in process: (exit status, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        try:
            status = mytrainer.main(overrides("gpt2", *words))
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    return run


def refused(result, *words, status=None):
    """The message is on stderr, names what is wrong, and no traceback is anywhere. Returns it."""
    code, out, err = result
    assert code == status if status else code in (1, 2)
    assert "Traceback" not in out + err
    messages = [line for line in err.splitlines() if line.startswith(("error: ", "config error: "))]
    assert len(messages) == 1, err
    for word in words:
        assert word in messages[0]
    return messages[0]


def saved(folder):
    """Digest of everything that makes up a run, but for the log and the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".hydra" not in path.parts and path.name not in (".lock", "metrics.jsonl")
    }


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["learning_rat=1"], "unknown key 'learning_rat'. Did you mean 'learning_rate'"),
        (["--learning_rat=1"], "unknown option --learning_rat. Did you mean '--learning_rate'"),
        (
            ["model_cfg.n_layer=1"],
            "unknown key 'model_cfg.n_layer' for type 'gpt2'. Did you mean 'model_cfg.n_layers'",
        ),
        (["n_layers=1"], "set model_cfg.n_layers"),
        (
            ["model_cfg.n_heads=5"],
            "model_cfg.d_model (64) must be divisible by model_cfg.n_heads (5); nearest: 60, 65",
        ),
        (["model_cfg.n_layers=0"], "model_cfg.n_layers"),
        (["model_cfg.n_layers=two"], "model_cfg.n_layers"),
        (["train_seq_len=64"], "train_seq_len"),  # learned positions end at n_ctx = 32
        (["global_batch_size=4", "batch_size=3"], "nearest: 3, 6"),
        (["num_iterations=0"], "num_iterations"),
        (["num_iterations=-1"], "num_iterations"),
        (["learning_rate=nan"], "learning_rate"),
        (["optimizer=adamax"], "optimizer"),
        (["data=markov"], "data"),
        (["data=text"], "data=text needs input_file"),
        (["data=text", "input_file=no.txt"], "no such file or folder: no.txt"),
        (["tokenizer=no.json"], "tokenizer: 'no.json'"),
        (["tokenizer=bpe-100"], "bpe-257"),
        (["resume=no/run"], "resume: no such run or checkpoint: no/run"),
        (["init_from_checkpoint=no/run"], "init_from_checkpoint: no such checkpoint or run folder: no/run"),
        (["device=gpu"], "device"),
        (["model_adapter=nowhere:Adapter"], "cannot import 'nowhere:Adapter'"),
    ],
)
def test_a_mistake_on_the_command_line_starts_nothing(train, work, words, text):
    refused(train(*words), text, status=2)
    assert not list(work.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"defaults: [gpt2, _self_]\nmodel_cfg: {n_heads: 5\n",
        b"defaults: [gpt2, _self_]\nsample_prompt: gr\xfc\xdfe\n",
        b"\x7fELF\x02\x01\x01\x00\x00",
        b"- a\n- list\n",
        b"defaults: [no_such_file, _self_]\n",
    ],
)
def test_a_model_file_that_cannot_be_read(work, content, capsys):
    (work / "mine.yaml").write_bytes(content)
    status = mytrainer.main(["--hydra_model_cfg=mine.yaml"])
    refused((status, *capsys.readouterr()), "mine.yaml", status=2)
    assert [p.name for p in work.iterdir()] == ["mine.yaml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("words", [["device=cuda"], ["device=cuda:3"], ["ddp_backend=nccl"]])
def test_a_device_that_is_not_there(train, words):
    refused(train("output_dir=out", *words), "CUDA")


# -- text and tokens ---------------------------------------------------------------------------------------------------

GOOD = "".join(f"line {number} of a text\n" for number in range(200))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty"),
        (b" \n\n\t \n", "empty"),
        (b"short\n", "too short"),
        (GOOD.encode()[:30], "too short"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(range(256)) * 20, "binary file: NUL byte at offset 8"),
        (("grün\n" * 500).encode("latin-1"), "not UTF-8: byte 0xfc at offset 2"),
        (codecs.BOM_UTF16_LE + GOOD.encode("utf-16-le"), "utf-16 text"),
    ],
)
def test_a_text_that_cannot_be_used(train, work, content, text):
    (work / "mine.txt").write_bytes(content)
    message = refused(train("data=text", "input_file=mine.txt", "tokenizer=byte", "output_dir=out"), text)
    assert "mine.txt" in message or "train_seq_len" in message
    assert not checkpoints_in(work / "out")


def test_a_folder_without_text(train, work):
    (work / "mine").mkdir()
    (work / "mine/photo.png").write_bytes(b"\x89PNG\0")
    message = refused(train("data=text", "input_file=mine", "output_dir=out"), "no usable text file")
    assert ".png (1)" in message


def test_a_vocabulary_smaller_than_the_tokenizers(train):
    refused(
        train("model_cfg.vocab_size=100", "output_dir=out"),
        "100 is smaller than the 257 tokens",
        "at least 257",
    )


def test_token_ids_beyond_the_vocabulary(train, work):
    """A tokenizer.json of 301 tokens, a model of 300: refused before an id can fall outside the embedding."""
    pairs = [bytes([a, b]) for a in b"abcdefgh" for b in b"abcdefgh"]
    BpeTokenizer([*(bytes([b]) for b in range(256)), *pairs[:44]]).save(work / "mine.json")
    words = ["tokenizer=mine.json", "output_dir=out"]
    refused(train(*words, "model_cfg.vocab_size=300"), "300 is smaller than the 301 tokens")
    assert train(*words, "model_cfg.vocab_size=301", "num_iterations=1")[0] == 0


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"version": "1.0", "merges": []}', "no tokenizer of this project"),
        ("not json", "not a JSON file"),
        ('{"format_version": 1, "type": "byte", "special_tokens": {"<|endoftext|>": 256}}', "digest"),
    ],
)
def test_a_tokenizer_file_of_another_kind(train, work, content, text):
    (work / "mine.json").write_text(content)
    refused(train("tokenizer=mine.json", "output_dir=out"), "mine.json", text)


def test_a_damaged_token_cache_is_rebuilt(train, work, monkeypatch):
    """An id far beyond the vocabulary in the cached tokens never reaches the model."""
    monkeypatch.setenv("MYTRAINER_CACHE", str(work.parent / "cache"))
    assert train("output_dir=one")[0] == 0
    (tokens,) = (work.parent / "cache/tokens").glob("*/train.tokens.npy")
    content = bytearray(tokens.read_bytes())
    content[-2000:] = np.full(1000, 60_000, np.uint16).tobytes()
    tokens.write_bytes(content)
    status, out, _ = train("output_dir=two")
    assert status == 0 and "train.tokens.npy has changed since it was written" in out
    one, two = (saved(work / name / "checkpoint-6")["model.pt"] for name in ("one", "two"))
    assert one == two


# -- folders -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["a_file/below", "a_file", "/proc/nowhere", "/dev/null/below"])
def test_a_folder_that_cannot_be_written(train, work, folder):
    (work / "a_file").touch()
    refused(train(f"output_dir={folder}"), f"cannot write to {folder}", "Choose another output_dir", status=2)
    assert (work / "a_file").read_bytes() == b""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    cfg, model_cfg = config("gpt2", "output_dir=run")
    loop.train(cfg, model_cfg, folder, config_text)
    return folder


@pytest.fixture
def run(finished, work):
    """A finished run of six steps in ./run: its digests."""
    shutil.copytree(finished, work / "run")
    return saved(work / "run")


def test_a_second_run_into_the_folder_of_a_finished_one(train, work, run):
    refused(train("output_dir=run", "seed=3"), "run already holds", "Add resume=auto", status=2)
    assert saved(work / "run") == run


def test_a_second_run_into_the_folder_of_a_running_one(train, work, run):
    with filelock.FileLock(str(work / "run/.lock")):
        result = train("output_dir=run", "resume=auto", "num_iterations=9", "learning_rate=0.5")
        refused(result, "another run is writing to run")
    assert saved(work / "run") == run


def test_only_damaged_checkpoints(train, work, run):
    """There was a run and nothing of it can be read: starting over would destroy what may yet be saved."""
    for path in ("checkpoint-6/model.pt", "checkpoint-6/config.json"):
        with open(work / "run" / path, "ab") as file:
            file.write(b" ")
    before = saved(work / "run")
    result = train("output_dir=run", "resume=auto", "num_iterations=9")
    refused(result, "checkpoint")
    assert saved(work / "run") == before


def test_another_architecture_into_a_run(train, work, run):
    result = train("output_dir=other", "init_from_checkpoint=run", "model_cfg.d_model=32")
    refused(result, "does not fit this model")
    assert saved(work / "run") == run


# -- while it runs -----------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(train, work, run):
    """A resumed run blows up: the checkpoint before is untouched, and from it training goes on."""
    blow = [
        "learning_rate=1e30",
        "muon_learning_rate=1e30",
        "max_grad_norm=0",
        "num_iterations=40",
        "val_loss_every=0",
    ]
    message = refused(train("output_dir=run", "resume=auto", *blow), "is not finite", status=1)
    assert "checkpoint-6 is untouched" in message and "learning rate" in message
    assert [p.name for p in checkpoints_in(work / "run")] == ["checkpoint-6"]
    now = saved(work / "run")
    kept = [name for name in run if name.startswith(("checkpoint-", "final_model")) or name.endswith(".pt")]
    assert kept and all(now[name] == run[name] for name in kept)
    for line in (work / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert train("output_dir=run", "resume=auto", "num_iterations=8")[0] == 0
    assert [p.name for p in checkpoints_in(work / "run")] == ["checkpoint-6", "checkpoint-8"]


@contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [600_000, 300_000])  # model.pt has 0.5 MB, optimizer.pt more
def test_no_room_for_a_checkpoint(train, work, run, size):
    with largest_file(size):
        result = train("output_dir=run", "resume=auto", "num_iterations=9", "save_steps=1")
    refused(
        result,
        "could not write run/checkpoint-7",
        "The last complete checkpoint is run/checkpoint-6",
        status=1,
    )
    assert [p.name for p in checkpoints_in(work / "run")] == ["checkpoint-6"]
    assert damage(work / "run/checkpoint-6") is None and damage(work / "run/final_model") is None
    assert not [p.name for p in (work / "run").iterdir() if p.name.endswith(".tmp")]
    assert train("output_dir=run", "resume=auto", "num_iterations=9", "save_steps=1")[0] == 0


@pytest.mark.parametrize("size", [20, 9000, *(pytest.param(n, marks=pytest.mark.slow) for n in (3000, 5000))])
def test_no_room_for_the_small_files(train, work, run, size):
    """config.yaml, manifest.json, metrics.jsonl, ... : whichever is the first to fail says so."""
    with largest_file(size):
        refused(train("output_dir=new"), "new")
        refused(train("output_dir=run", "resume=auto", "num_iterations=40", "logging_steps=1"), "run")
    assert damage(work / "run/checkpoint-6") is None
    assert train("output_dir=run", "resume=auto", "num_iterations=8")[0] == 0


@pytest.mark.slow
def test_a_disk_that_is_full(train, work):
    """A real file system without room: ENOSPC instead of a limit on the size of one file."""
    disk = work / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", disk]).returncode:
        pytest.skip("may not mount a file system")
    try:
        assert train("output_dir=disk/run")[0] == 0
        before = saved(disk / "run/checkpoint-6")
        result = train(
            "output_dir=disk/run", "resume=auto", "num_iterations=12", "save_steps=1", "save_total_limit=9"
        )
        refused(result, "the disk is full", "The last complete checkpoint is disk/run/checkpoint-", status=1)
        assert saved(disk / "run/checkpoint-6") == before
        assert all(damage(checkpoint) is None for checkpoint in checkpoints_in(disk / "run"))
        (disk / "rest").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 200_000))
        refused(
            train("output_dir=disk/other"),
            "the disk is full",
            "No checkpoint had been saved before",
            status=1,
        )
        assert saved(disk / "run/checkpoint-6") == before
        (disk / "rest").unlink()
    finally:
        subprocess.run(["umount", disk], check=True)


# -- from a shell ------------------------------------------------------------------------------------------------------


def started(work, *words):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "mytrainer.py"), *overrides("gpt2", *words)],
        cwd=work,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_runs_started_at_once(work):
    """One trains, the other leaves with a message: into a fresh folder, at the same moment."""
    steps = ["output_dir=run", "num_iterations=400", "val_loss_every=0", "save_steps=100"]
    both = [started(work, *steps, f"seed={seed}") for seed in (1, 2)]
    results = [(*process.communicate(timeout=200), process.returncode) for process in both]
    assert sorted(code for *_, code in results) == [0, 1] or sorted(code for *_, code in results) == [0, 2], (
        results
    )
    (loser,) = (result for result in results if result[2])
    refused((loser[2], loser[0], loser[1]), "run")
    winner = 1 if results[0][2] == 0 else 2
    assert damage(work / "run/checkpoint-400") is None
    state = json.loads((work / "run/checkpoint-400/training_state.json").read_text())
    assert state["training_config"]["seed"] == winner


@pytest.mark.slow
def test_the_exit_status_reaches_the_shell(work):
    process = started(work, "output_dir=out", "optimizer=sgd", "learning_rate=1e30", "max_grad_norm=0")
    out, err = process.communicate(timeout=120)
    refused((process.returncode, out, err), "is not finite", status=1)
    process = started(work, "output_dir=out", "learning_rat=1")
    out, err = process.communicate(timeout=120)
    refused((process.returncode, out, err), "learning_rate", status=2)
