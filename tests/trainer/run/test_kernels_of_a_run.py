"""The choice of implementations belongs to a run, which says what it took."""

import json
from dataclasses import replace

from kernels import KERNELS, choose
from tests.contract.tiny import config
from trainer.distributed import open_world
from trainer.loop import train
from trainer.session import open_session

OP = "linear_cross_entropy"


def manifest(path):
    """What the head's loss used: the model's layers use operations too."""
    return {OP: json.loads((path / "manifest.json").read_text())["kernels"][OP]}


def start(path, *more):
    return train(*config("gpt2", "num_iterations=2", "val_loss_every=0", f"output_dir={path}", *more), path)


def test_two_sessions_in_one_process_have_nothing_in_common():
    sessions = []
    for words in (["kernels=reference"], [f"kernels.{OP}=chunked"]):
        cfg, model_cfg = config("gpt2", *words)
        with open_world(cfg) as world:
            sessions.append(open_session(cfg, model_cfg, world))
    for _ in range(2):  # in turns
        for session in sessions:
            batch = session.loader.load(0)
            session.adapter(batch.micro[0])
    assert [s.adapter.kernels.used[OP] for s in sessions] == [
        {"reference": "kernels.default"},
        {"chunked": f"kernels.{OP}"},
    ]


def test_the_manifest_and_the_console_name_what_is_taken_and_why(tmp_path, capsys):
    start(tmp_path / "auto")
    # 4 rows of 32 tokens
    assert manifest(tmp_path / "auto") == {OP: {"reference": "auto: logits of 128 rows fit at once"}}
    assert f"reference: {OP} (auto: logits of 128 rows fit at once)" in capsys.readouterr().out
    start(tmp_path / "asked", "kernels=chunked", "kernels.linear_diffusion_loss=reference")
    assert manifest(tmp_path / "asked") == {OP: {"chunked": "kernels.default"}}
    out = capsys.readouterr().out
    assert "kernels.linear_diffusion_loss is not read by this run, which uses " in out


def test_what_the_optimizer_calls_is_named_and_followed(tmp_path, capsys):
    start(tmp_path / "muon", "optimizer=muon", "kernels.newton_schulz=reference")
    taken = json.loads((tmp_path / "muon" / "manifest.json").read_text())["kernels"]
    assert taken["newton_schulz"] == {"reference": "kernels.newton_schulz"}
    out = capsys.readouterr().out
    assert "newton_schulz (kernels.newton_schulz)" in out and "not read" not in out
    start(tmp_path / "adamw", "optimizer=adamw", "kernels.newton_schulz=reference")
    assert "kernels.newton_schulz is not read by this run" in capsys.readouterr().out
    start(tmp_path / "score", "optimizer=muon", "eval_only=true", f"init_from_checkpoint={tmp_path / 'muon'}")
    assert "newton_schulz" not in json.loads((tmp_path / "score" / "manifest.json").read_text())["kernels"]


def test_the_manifest_is_corrected_where_something_else_was_taken(tmp_path, monkeypatch):
    """Held-out rows are longer here, and their logits do not fit."""
    monkeypatch.setattr(choose, "MIN_CHUNK_ROWS", 100)
    monkeypatch.setitem(KERNELS, OP, replace(KERNELS[OP], chunk_bytes={"cuda": 1}, plain_bytes={"cuda": 1}))
    start(tmp_path, "train_seq_len=16", "val_seq_len=32")
    assert manifest(tmp_path) == {
        OP: {
            "reference": "auto: logits of 64 rows fit at once",
            "chunked": "auto: logits of 100 rows at a time",
        }
    }


def test_a_resumed_run_may_choose_otherwise_and_says_so(tmp_path, capsys):
    start(tmp_path, "save_steps=1")
    capsys.readouterr()
    start(tmp_path, "num_iterations=3", "resume=auto", "kernels=chunked")
    out = capsys.readouterr().out
    assert "changed since the checkpoint: kernels {'default': 'auto'} -> {'default': 'chunked'}\n" in out
    assert manifest(tmp_path) == {OP: {"chunked": "kernels.default"}}


def test_a_run_that_goes_on_by_other_implementations_says_so(tmp_path, capsys):
    start(tmp_path, "save_steps=1", "save_total_limit=9")
    capsys.readouterr()
    start(tmp_path, f"resume={tmp_path}", "num_iterations=3", f"kernels.{OP}=chunked")
    told = f"{OP} is computed by chunked from here on, by reference before (kernels.{OP})"
    assert told in " ".join(capsys.readouterr().out.split())
    start(tmp_path, f"resume={tmp_path}", "num_iterations=4", f"kernels.{OP}=chunked")
    assert "from here on" not in capsys.readouterr().out
