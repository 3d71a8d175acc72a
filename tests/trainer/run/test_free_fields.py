"""Fields that are no architecture may change when a run goes on, and in `eval` and `generate`; the others may not."""

import json
import shutil

import pytest
from hydra.core.global_hydra import GlobalHydra

import mytrainer
from configs.messages import ConfigError
from tests.contract.tiny import config
from trainer.commands.launch import config_text
from trainer.loop import train
from trainer.run.checkpoint import load_json, load_tensors
from trainer.run.restore import with_free_fields

QUICK = ["num_iterations=2", "val_loss_every=0", "val_tokens=128", "sample_tokens=0", "save_steps=1"]


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A run folder of masked diffusion, hardly trained: without dropout, four noise draws per score."""
    run = tmp_path_factory.mktemp("masked") / "run"
    cfg, model_cfg = config("mdl", *QUICK, "model_cfg.dropout=0.0")
    train(cfg, model_cfg, run, config_text)
    return run


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """One command in process: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def start(*words):
        capsys.readouterr()
        try:
            status = mytrainer.main([str(word) for word in words])
        except SystemExit as leaving:
            status = leaving.code
        return status, *capsys.readouterr()

    yield start
    GlobalHydra.instance().clear()


def go_on(folder, masked, *more):
    """From the first step of `masked` in a folder of its own; the weights at the end."""
    cfg, model_cfg = config("mdl", *QUICK, "model_cfg.dropout=0.0", *more)
    cfg = cfg.model_copy(update={"resume": str(masked / "checkpoint-1")})
    train(cfg, model_cfg, folder)
    return load_tensors(folder / "checkpoint-2", "model.pt")


def test_a_free_field_changed_on_resume_is_announced_kept_and_used(masked, tmp_path, capsys):
    weights = load_tensors(masked / "checkpoint-2", "model.pt")
    again = go_on(tmp_path / "same", masked)
    assert all(again[name].equal(value) for name, value in weights.items())
    assert "model_cfg" not in capsys.readouterr().out
    changed = go_on(tmp_path / "changed", masked, "model_cfg.dropout=0.5")
    assert "changed since the checkpoint: model_cfg.dropout 0.0 -> 0.5" in capsys.readouterr().out
    assert not all(changed[name].equal(value) for name, value in weights.items())
    for folder in ("checkpoint-2", "final_model"):
        assert load_json(tmp_path / "changed" / folder, "config.json")["model_cfg"]["dropout"] == 0.5


def test_a_locked_field_changed_on_resume_is_refused(masked, tmp_path):
    with pytest.raises(ValueError, match=r"the architecture is fixed by .*: eps 1e-05 -> 0.001"):
        go_on(tmp_path, masked, "model_cfg.eps=0.001")


def test_the_command_line_goes_on_with_a_free_field_alone(masked, command, tmp_path):
    shutil.copytree(masked, tmp_path / "run")
    words = ["resume=run", "num_iterations=3"]
    status, _, err = command(*words, "model_cfg.d_mult=2")
    assert status == 2 and "d_mult is 4, 2 was asked" in err
    status, out, _ = command(*words, "model_cfg.dropout=0.5")
    assert status == 0 and "changed since the checkpoint: model_cfg.dropout 0.0 -> 0.5" in out


def test_eval_and_generate_take_free_fields(masked, command):
    def score(*words):
        status, out, err = command("eval", "--checkpoint", masked, "--device", "cpu", *words)
        assert status == 0, err
        return json.loads(out)["score"]

    few, many = score(), score("model_cfg.nelbo_draws=8")
    assert "; 4 noise draws" in few["estimator"] and "; 8 noise draws" in many["estimator"]
    assert few["bits_per_byte"] != many["bits_per_byte"]

    text = ["generate", "--checkpoint", masked, "--device", "cpu", "--max_new_tokens", 8]
    own, other = (command(*text, *words) for words in ([], ["model_cfg.sampler=first_hitting"]))
    assert own[0] == other[0] == 0 and own[1] != other[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model_cfg.eps=0.1"], "model_cfg.eps is fixed with the architecture. Free: dropout, final_step"),
        (["model_cfg.nelbo_drws=8"], "unknown key 'model_cfg.nelbo_drws'. Did you mean 'nelbo_draws'?"),
        (["learning_rate=1.0"], "'learning_rate=1.0' is not model_cfg.<field>=<value>"),
        (["model_cfg.sampler"], "'model_cfg.sampler' is not model_cfg.<field>=<value>"),
        (["model_cfg.sampler=ancestal"], "sampler: 'ancestal' is not one of"),
        (["model_cfg.nelbo_draws=3"], "model_cfg.nelbo_draws: "),
        (["model_cfg.nelbo_draws=4,8"], "model_cfg.nelbo_draws has several values for one run"),
        (["model_cfg.sar_chunk_size=32"], "sar_chunk_size (32) must leave a prefix"),
    ],
)
def test_what_eval_and_generate_refuse(words, message):
    with pytest.raises(ConfigError) as refused:
        with_free_fields(*config("mdl"), words)
    assert message in str(refused.value)


def test_what_eval_and_generate_note(capsys):
    cfg, model_cfg = config("mdl")
    words = ["model_cfg.nelbo_draws=4", "model_cfg.nelbo_draws=8"]
    assert with_free_fields(cfg, model_cfg, words).nelbo_draws == 8
    assert "model_cfg.nelbo_draws is given more than once; the last value counts" in capsys.readouterr().err
    blocks = config("bd3lm")
    with pytest.raises(ConfigError, match="model_cfg.block_size is not clear for type 'bd3lm'"):
        with_free_fields(*blocks, ["model_cfg.block_size=8"])
    with_free_fields(*blocks, ["model_cfg.num_sampling_steps=8", "model_cfg.sampler=first_hitting"])
    assert (
        "model_cfg.num_sampling_steps is not read (because of model_cfg.sampler=" in capsys.readouterr().err
    )
