"""The command `export`, and the folders of `--to safetensors` read back. That every architecture comes back as it was
stands in tests/contract/test_run.py."""

import errno
import hashlib
import json
import os
import shutil
import signal
import types

import pytest
import torch

from configs.compose import compose
from configs.saved import EXPORT, EXPORTED
from data.char import CharTokenizer
from data.tokenizers import load_tokenizer
from tests.contract.tiny import config
from tests.huggingface_folder import edit_json
from trainer.export.own import _unshared
from trainer.export.rounding import Rounding
from trainer.loop import train
from trainer.run.checkpoint import load_tensors
from trainer.run.exported import Exported
from trainer.run.source import open_source
from trainer.run.tensor_files import WEIGHTS, read_tensors, write_tensors

STEPS = [
    *("num_iterations=3", "val_loss_every=1", "ema_decay=0.5", "batch_size=2", "save_best_model=true"),
    *("learning_rate=0.01", "save_precision=bf16"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with an average of its weights, which wants its exports in bf16."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(*config("gpt2", *STEPS), folder)
    return folder


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """Its export in full precision; not to be changed."""
    import mytrainer

    folder = tmp_path_factory.mktemp("exports") / "made/on/the/way"
    words = ["export", "--checkpoint", run, "--to", "safetensors", "--save_precision", "fp32", "--output"]
    assert mytrainer.main([str(word) for word in (*words, folder)]) == 0
    return folder


@pytest.fixture
def copy(whole, tmp_path):
    """One that may be harmed."""
    return shutil.copytree(whole, tmp_path / "copy")


@pytest.fixture
def export(command, run):
    def export(folder, *more, status=0):
        return command(
            *("export", "--checkpoint", run, "--to", "safetensors", "--output", folder), *more, status=status
        )

    return export


def refused(result, *words):
    out, err = result
    told = err.strip().removesuffix("\n1 problem; nothing was started")
    assert out == "" and len(told.splitlines()) == 1, err
    for word in words:
        assert word in err


# -- what comes back ---------------------------------------------------------------------------------------------------


def evaluated(command, folder, *more):
    return json.loads(command("eval", "--checkpoint", folder, "--device", "cpu", *more)[0])


def test_it_scores_and_writes_as_the_run_does(command, run, whole):
    ours, theirs = evaluated(command, run), evaluated(command, whole)
    assert theirs.pop("checkpoint") == str(whole) != ours.pop("checkpoint")
    assert theirs == ours and ours["weights"] == "EMA"
    words = ["--device", "cpu", "--prompt", "01", "--max_new_tokens", 8, "--ignore_document_end"]
    texts = [command("generate", "--checkpoint", folder, *words)[0] for folder in (run, whole)]
    assert texts[0] == texts[1] and len(texts[0]) > 3


def test_it_says_what_it_wrote_and_how_to_open_it(export, run, tmp_path):
    out, err = export(tmp_path / "out")
    assert f"{tmp_path / 'out'}: EMA weights of {run / 'checkpoint-3'} (gpt2, bf16)" in out
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert f"{WEIGHTS} {size / 1000:.0f}kB" in out
    assert f"generate --checkpoint {tmp_path / 'out'}\n" in out and f"load('{tmp_path / 'out'}')" in out
    assert "note: rounded to bf16: no tensor changed by more than 0.0" in err


def test_other_weights_of_a_run(command, export, run, tmp_path):
    export(tmp_path / "raw", "--raw", "--save_precision", "fp32")
    raw = load_tensors(run / "final_model", "model.pt")
    found = read_tensors(tmp_path / "raw" / WEIGHTS)
    assert all(torch.equal(found[name], value) for name, value in raw.items())
    assert evaluated(command, tmp_path / "raw") == {
        **evaluated(command, run, "--raw"),
        "checkpoint": str(tmp_path / "raw"),
    }
    best = evaluated(command, run / "best_model")["score"]
    command(
        *("export", "--checkpoint", run / "best_model", "--to", "safetensors", "--output", tmp_path / "best"),
        *("--save_precision", "fp32"),
    )
    assert evaluated(command, tmp_path / "best")["score"] == best


def test_averaged_weights_have_no_raw_ones_beside_them(command, whole):
    refused(command("eval", "--checkpoint", whole, "--raw", status=2), "raw: ", "the average (EMA)", "alone")


def test_a_run_begins_with_them(command, run, whole, tmp_path):
    """Its first score is theirs, and it trains."""
    begun = [f"init_from_checkpoint={whole}", "ema_decay=0.5", "batch_size=2", "val_loss_every=1"]
    score = train(*config("gpt2", *begun, "eval_only=true"), tmp_path / "score")
    assert score == evaluated(command, run)["score"]["bits_per_byte"]
    train(*config("gpt2", *begun, "num_iterations=2"), tmp_path / "on")
    lines = [json.loads(line) for line in (tmp_path / "on/metrics.jsonl").read_text().splitlines()]
    scores = [line["val_bits_per_byte"] for line in lines if "val_bits_per_byte" in line]
    assert scores[-1] < score


def test_its_sizes_come_with_it(whole):
    """To a run of its architecture, whose file need not be named; the command line's word holds."""
    notes = []
    begun = [f"init_from_checkpoint={whole}", "data=synthetic"]
    cfg, model_cfg = compose(begun, notes.append)
    assert (cfg.type, cfg.train_seq_len) == ("gpt2", 32)
    assert (model_cfg.d_model, model_cfg.n_layers, model_cfg.n_ctx, model_cfg.vocab_size) == (64, 2, 32, 257)
    assert notes[0] == f"preset auto: none, as {whole}/config.json gives the sizes"
    assert (
        notes[1].startswith(f"the architecture is that of {whole}/config.json: ")
        and "d_model 64 (not 768)" in notes[1]
    )
    words = ["preset=tiny", "model_cfg.n_layers=3", "model_cfg.dropout=0.1", "train_seq_len=16"]
    cfg, model_cfg = compose([*begun, "--hydra_model_cfg=gpt2", *words], notes.append)
    assert (cfg.train_seq_len, model_cfg.d_model, model_cfg.n_layers, model_cfg.dropout) == (16, 64, 3, 0.1)
    other, _ = compose([*begun, "--hydra_model_cfg=vanilla"], notes.append)
    assert other.model_cfg["d_model"] == 768, (
        "an architecture that differs may share a backbone, and says its sizes"
    )


# -- precision ---------------------------------------------------------------------------------------------------------


def test_a_runs_own_precision_holds_unless_another_is_named(export, run, whole, tmp_path):
    exact = read_tensors(whole / WEIGHTS)
    assert {t.dtype for t in exact.values()} == {torch.float32}
    for more, dtype in (((), torch.bfloat16), (("--save_precision", "fp16"), torch.float16)):
        export(tmp_path / str(dtype), *more)
        rounded = read_tensors(tmp_path / str(dtype) / WEIGHTS)
        assert all(torch.equal(rounded[name], exact[name].to(dtype)) for name in exact)
    assert load_tensors(run / "final_model", "model.pt")["wte.weight"].dtype == torch.float32


def test_null_is_as_trained_whatever_the_run_wants(export, whole, tmp_path):
    out, err = export(tmp_path / "out", "--save_precision", "null")
    assert "fp32)" in out and "rounded" not in err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_what_rounding_did_is_told():
    kept, rounding = Rounding(None), Rounding("fp16")
    tensor = torch.tensor([1.0, 1e-9, 3.0])
    assert kept("w", tensor) is tensor and str(kept) == ""
    assert torch.equal(
        rounding("exact", torch.tensor([0.5, 0.0, torch.inf])), torch.tensor([0.5, 0, torch.inf]).half()
    )
    assert str(rounding) == ""
    rounding("small", torch.tensor([1.0, 1e-9]))
    rounding("worse", torch.tensor([1.0, 1e-9, 1e-9, 1 + 2**-11]))
    assert str(rounding).endswith(" of its norm (worse); 3 weights became 0")
    assert rounding.worst[0] == pytest.approx(2**-11 / 2**0.5, rel=1e-3)


def test_numbers_that_a_precision_does_not_have_are_refused():
    weights = torch.tensor([1.0, -70000.0])
    with pytest.raises(
        ValueError, match=r"save_precision: h.0.w holds 7e\+04, and fp16 ends at 65504. bf16 has"
    ):
        Rounding("fp16")("h.0.w", weights)
    assert Rounding("bf16")("h.0.w", weights).isfinite().all()
    broken = torch.tensor([1.0, torch.nan])
    with pytest.raises(ValueError, match="save_precision: h.0.w holds NaN, .* null writes it as it is"):
        Rounding("bf16")("h.0.w", broken)
    assert Rounding(None)("h.0.w", broken) is broken


def test_an_infinite_weight_hides_no_change():
    rounding = Rounding("bf16")
    rounding("w", torch.tensor([torch.inf, 1 + 2**-10, 1e-45]))
    assert rounding.changed and rounding.worst[0] == pytest.approx(2**-10, rel=1e-2)


def test_buffers_keep_their_type_and_tied_weights_are_kept_once():
    """Of a model as somebody else may write it."""
    from trainer.export.own import Own

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("counts", torch.arange(4))
            self.register_buffer("frequencies", torch.rand(4))
            self.register_buffer("part", self.frequencies[:2])

    model = Tied()
    adapter = types.SimpleNamespace(
        model=model, trained_state=model.state_dict, model_cfg=config("gpt2")[1], provenance=dict
    )
    restored = types.SimpleNamespace(
        adapter=adapter, source=None, weights="raw", cfg=config("gpt2")[0], micro_rows=2,
        tokenizer=types.SimpleNamespace(to_json=lambda: "{}"),
    )  # fmt: skip
    contents = Own().contents(restored, Rounding("bf16"))
    assert (
        contents.files[EXPORT]["shared"] == {"head.weight": "table.weight"}
        and contents.files[EXPORT]["rounded"]
    )
    assert {name: t.dtype for name, t in contents.tensors.items()} == {
        "table.weight": torch.bfloat16,
        "counts": torch.int64,
        "frequencies": torch.float32,
        "part": torch.float32,
    }


def test_views_of_one_another_are_written_whole(tmp_path):
    table = torch.arange(6.0).reshape(2, 3)
    state = {"a": table, "same": table, "turned": table.T, "part": table[1:], "none": torch.zeros(0)}
    tensors, shared = _unshared(state)
    write_tensors(tmp_path / WEIGHTS, tensors)
    found = read_tensors(tmp_path / WEIGHTS)
    assert shared == {"same": "a"} and all(torch.equal(found[name], state[name]) for name in tensors)


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_something_is_left_alone(export, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.commands.export.open_source", lambda *_: pytest.fail("the weights were read")
    )
    (tmp_path / "notes.txt").write_text("mine")
    refused(export(tmp_path, status=2), "is not empty (it holds notes.txt)", "Give a new or an empty folder")
    refused(export(tmp_path / "notes.txt", status=2), "notes.txt is a file")
    refused(
        export(tmp_path / "notes.txt/in", status=2), "notes.txt is a file, and no folder can be made in it"
    )
    refused(export("", status=2), "output: no folder is named")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(export(".", status=2), "the folder that you are in cannot be replaced")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["notes.txt"]


def test_a_place_that_takes_no_folder_is_named_before_the_work(export, tmp_path, monkeypatch):
    """As /proc does, whose rights say that root may."""
    monkeypatch.setattr(
        "trainer.commands.export.open_source", lambda *_: pytest.fail("the weights were read")
    )
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_: no_such_place())
    refused(
        export(tmp_path / "out", status=2), f"output: cannot write in {tmp_path}: No such file or directory"
    )


def no_such_place():
    raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))


def test_an_empty_folder_will_do(export, tmp_path):
    (tmp_path / "out").mkdir()
    export(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*EXPORTED, "digests.json"}
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir()}) == 1, "who may read one may read all"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_words_that_mean_nothing(command, export, tmp_path):
    out = tmp_path / "out"
    refused(export(out, "--to", "safetensor", status=2), "to: 'safetensor' is not one of", "'safetensors'?")
    refused(
        command("export", "--to", "safetensors", "--output", out, status=2), "nothing to export. Give --check"
    )
    refused(export(out, "--checkpoint", tmp_path / "run", status=2), "no such checkpoint or run folder")
    assert not out.exists()


def disk_is_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def the_system_asks_to_leave():
    os.kill(os.getpid(), signal.SIGTERM)


HARM = {
    disk_is_full: (1, "the disk is full"),
    the_system_asks_to_leave: (130, "SIGTERM received: stopped before"),
}


@pytest.mark.parametrize("harm", HARM)
def test_nothing_half_there_is_left(export, tmp_path, monkeypatch, harm):
    written = []

    def sync(descriptor):
        written.append(descriptor)
        if len(written) == 3:
            harm()

    monkeypatch.setattr("os.fsync", sync)
    status, told = HARM[harm]
    assert told in export(tmp_path / "out", status=status)[1]
    assert len(written) == 3 and not list(tmp_path.iterdir())


def test_without_the_library_it_is_said_how_to_have_it(export, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    refused(export(tmp_path / "out", status=2), 'pip install -e ".[hf]"')


# -- folders that were harmed ------------------------------------------------------------------------------------------


def seal(folder):
    """Digests of what is there, as who means harm would write them."""
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    digests.pop("digests.json", None)
    (folder / "digests.json").write_text(json.dumps(digests))


@pytest.mark.parametrize("name", [*EXPORTED, "digests.json"])
def test_a_file_that_is_missing_or_another_is_named(command, copy, name):
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[:-20])
    refused(command("eval", "--checkpoint", copy, status=2), "is damaged", name)
    (copy / name).unlink()
    refused(command("eval", "--checkpoint", copy, status=2), "is damaged", name)


def test_weights_that_do_not_fit_are_named(command, copy):
    tensors = read_tensors(copy / WEIGHTS)
    write_tensors(copy / WEIGHTS, {n: t.clone() for n, t in tensors.items() if n != "wpe.weight"})
    seal(copy)
    refused(
        command("eval", "--checkpoint", copy, status=2), f"{WEIGHTS} does not fit", "missing 1: wpe.weight"
    )
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:-4])
    seal(copy)
    refused(command("eval", "--checkpoint", copy, status=2), f"{copy / WEIGHTS} is cut short or damaged")


def test_another_tokenizer_beside_the_weights_is_refused(command, copy):
    ours = load_tokenizer(copy / "tokenizer.json")
    CharTokenizer("é").save(copy / "tokenizer.json")
    seal(copy)
    told = f"tokenizer.json (char, {load_tokenizer(copy / 'tokenizer.json').digest[:8]}) is not the one that"
    refused(command("eval", "--checkpoint", copy, status=2), told, ours.digest[:8], "Put that one back")
    refused(command("generate", "--checkpoint", copy, "--prompt", "a", status=2), told)


def test_a_record_that_means_nothing(command, copy):
    record = json.loads((copy / EXPORT).read_text())
    (copy / EXPORT).write_text(json.dumps({**record, "training_config": {"type": "gpt2", "seed": "x"}}))
    seal(copy)
    refused(command("eval", "--checkpoint", copy, status=2), str(copy), "seed: ")
    told = {"[]": "a JSON object is needed", "{": "no JSON", "{}": "training_config: Field required"}
    for nonsense in told:
        (copy / EXPORT).write_text(nonsense)
        seal(copy)
        refused(command("eval", "--checkpoint", copy, status=2), str(copy / EXPORT), told[nonsense])


ODD = {
    "training_config: Input should be a valid dictionary, got []": (EXPORT, {"training_config": []}),
    "weights: Input should be 'EMA', 'raw'": (EXPORT, {"weights": 5}),
    "shared.a: Input should be a valid string, got 1": (EXPORT, {"shared": {"a": 1}}),
    "data: Input should be a valid dictionary, got 'x'": (EXPORT, {"data": "x"}),
    "model_cfg: Input should be a valid dictionary, got 'x'": ("config.json", {"model_cfg": "x"}),
    "batch_size: Input should be a valid integer, got 'x'": ("config.json", {"batch_size": "x"}),
    "batch_size: Input should be greater than 0, got 0": ("config.json", {"batch_size": 0}),
    "train_seq_len: Input should be greater than 0, got -1": ("config.json", {"train_seq_len": -1}),
    "type is 'vanilla' in config.json, and 'gpt2' in export.json": ("config.json", {"type": "vanilla"}),
}


@pytest.mark.parametrize("message", ODD)
def test_an_odd_entry_is_named_with_its_file(command, copy, message):
    name, entries = ODD[message]
    edit_json(copy / name, **entries)
    seal(copy)
    refused(command("eval", "--checkpoint", copy, status=2), str(copy), name, message)


def test_a_number_format_that_is_none_is_named(command, copy):
    record = json.loads((copy / EXPORT).read_text())
    edit_json(copy / EXPORT, training_config={**record["training_config"], "save_precision": "fp7"})
    seal(copy)
    refused(command("eval", "--checkpoint", copy, status=2), str(copy), "save_precision: ", "got 'fp7'")


def test_whole_numbers_are_no_weights(command, copy):
    tensors = read_tensors(copy / WEIGHTS)
    tensors["wpe.weight"] = tensors["wpe.weight"].to(torch.int8)
    write_tensors(copy / WEIGHTS, {name: t.clone() for name, t in tensors.items()})
    seal(copy)
    told = "holds other numbers than this model: wpe.weight is torch.int8, needed is torch.float32"
    refused(command("eval", "--checkpoint", copy, status=2), f"{copy / WEIGHTS} {told}")


def test_records_of_a_checkpoint_are_held_to_the_same(command, run, tmp_path):
    copy = shutil.copytree(run / "checkpoint-3", tmp_path / "checkpoint-3")
    edit_json(copy / "config.json", batch_size="x")
    seal(copy)
    refused(
        command("eval", "--checkpoint", copy, status=2), str(copy / "config.json"), "batch_size: ", "got 'x'"
    )


def test_a_damaged_one_to_begin_from_is_named(command, copy):
    """And not a folder of the run that would begin."""
    (copy / EXPORT).unlink()
    for more in ((), ("--hydra_model_cfg=gpt2", "preset=nano")):
        _, err = command(f"init_from_checkpoint={copy}", "data=synthetic", *more, status=2)
        assert f"init_from_checkpoint: {copy} is damaged: it lacks {EXPORT}. Export it again" in err


def test_a_run_to_begin_from_wants_its_model_file(command, run, copy):
    _, err = command(f"init_from_checkpoint={run}", "data=synthetic", f"output_dir={copy / 'new'}", status=2)
    assert f"init_from_checkpoint: {run} holds weights of type gpt2, and no model is chosen for them" in err
    assert "configs/gpt2.yaml" in err
    edit_json(copy / "config.json", type="mine:Model")
    _, err = command(f"init_from_checkpoint={copy}", "data=synthetic", status=2)
    assert f"{copy} holds weights of type mine:Model" in err and "--hydra_model_cfg=<model file>" in err


def test_digests_of_files_elsewhere_are_not_looked_at(command, copy):
    digests = json.loads((copy / "digests.json").read_text())
    (copy / "digests.json").write_text(json.dumps({**digests, "../../secret": "0"}))
    refused(
        command("eval", "--checkpoint", copy, status=2), "names ../../secret, which is no file of the folder"
    )


@pytest.mark.parametrize("field", ["type", "model_adapter"])
def test_code_that_comes_with_weights_is_not_executed(command, copy, monkeypatch, field):
    """A folder that one is in is on the path of modules."""
    (copy / "stranger.py").write_text(f"open({str(copy / 'executed')!r}, 'w')\nclass Model: pass\n")
    record = json.loads((copy / EXPORT).read_text())
    record["training_config"][field] = "stranger:Model"
    edit_json(copy / "config.json", **{field: "stranger:Model"})
    (copy / EXPORT).write_text(json.dumps(record))
    seal(copy)
    monkeypatch.chdir(copy)
    refused(
        command("eval", "--checkpoint", ".", status=2),
        f"{field}: stranger:Model would run the code of module stranger, which lies in .",
        "nothing there",
        "--trust stranger",
    )
    assert not (copy / "executed").exists()


def test_a_tied_weight_is_found_under_both_names(copy):
    record = json.loads((copy / EXPORT).read_text())
    (copy / EXPORT).write_text(json.dumps({**record, "shared": {"lm_head.weight": "wte.weight"}}))
    seal(copy)
    source = open_source(copy, pytest.fail)
    assert isinstance(source, Exported)
    assert torch.equal(source.state()["lm_head.weight"], read_tensors(copy / WEIGHTS)["wte.weight"])
