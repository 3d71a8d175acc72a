"""What the trainer does with the parts of the contract that the six architectures of the table do not need."""

import json

import pytest
import torch

from adapters import build_adapter
from adapters.base import LossTerm, weighted_loss
from configs.trust import trusting
from data import DataError, load_dataset
from models.layers.roles import Rule
from tests.contract.tiny import Letters, config
from tests.trainer import hooks_toy
from trainer import loop
from trainer.commands.show import memory_estimate
from trainer.loop import train
from trainer.run.checkpoint import load_json, load_tensors
from trainer.run.restore import restore

TOYS = "tests.trainer.hooks_toy"


@pytest.fixture(autouse=True)
def _trusted():
    """Runs of the toys here are opened again."""
    with trusting("tests"):
        yield


def of(adapter, *more):
    return config("vanilla", f'model_adapter="{TOYS}:{adapter}"', "ema_decay=0.9", *more)


def run(path, adapter, *more):
    return train(*of(adapter, f"output_dir={path}", *more), path)


# -- weights on a set --------------------------------------------------------------------------------------------


def norms(state):
    return state["embed_tokens.weight"].norm(dim=1)


def on_the_sphere(state):
    return torch.allclose(norms(state), torch.ones(()), atol=1e-6)


def test_weights_stay_on_their_set_and_averages_are_put_back_onto_it(tmp_path, monkeypatch):
    scored = []
    evaluate = loop.evaluate

    def spy(adapter, *args, **kwargs):
        scored.append({"embed_tokens.weight": adapter.model.embed_tokens.weight.detach().clone()})
        return evaluate(adapter, *args, **kwargs)

    monkeypatch.setattr(loop, "evaluate", spy)
    run(tmp_path, "OnASphere")
    assert on_the_sphere(load_tensors(tmp_path, "model.pt"))
    average = load_tensors(tmp_path, "ema.pt")["shadow"]
    assert not on_the_sphere(average), "an average of points of the sphere lies inside of it"
    assert len(scored) >= 2 and all(on_the_sphere(state) for state in scored)


def test_a_skipped_step_moves_nothing():
    adapter = build_adapter(*of("OnASphere"), Letters())
    adapter.model.embed_tokens.weight.data.mul_(3)
    adapter.constrain(torch.ones(()))
    assert torch.allclose(norms(adapter.model.state_dict()), torch.full((), 3.0))
    adapter.constrain(torch.zeros(()))
    assert on_the_sphere(adapter.model.state_dict())


def test_resume_never_puts_weights_back(tmp_path, monkeypatch):
    """They lie on the set already, and once more may round differently: a resume must be exact."""
    run(tmp_path, "OnASphere", "num_iterations=3")
    before = load_tensors(tmp_path / "checkpoint-3", "model.pt")
    seen = []
    monkeypatch.setattr(hooks_toy.OnASphere, "constrain", lambda self, skipped: seen.append(skipped))
    cfg, model_cfg = of(
        "OnASphere", f"output_dir={tmp_path}", "num_iterations=3", "resume=auto", "ema_decay=0.9"
    )
    session_of = loop.open_session

    def opened(*args, **kwargs):
        session = session_of(*args, **kwargs)
        seen.clear()  # what the initialisation did
        return session

    monkeypatch.setattr(loop, "open_session", opened)
    loaded = []
    resume = loop.Trainer.resume

    def resumed(self, *args):
        resume(self, *args)
        loaded.append((len(seen), {k: v.clone() for k, v in self.s.adapter.model.state_dict().items()}))

    monkeypatch.setattr(loop.Trainer, "resume", resumed)
    train(cfg, model_cfg, tmp_path)
    ((calls, state),) = loaded
    assert calls == 0 and all(torch.equal(v, before[k]) for k, v in state.items())


def test_weights_from_elsewhere_are_put_onto_the_set(tmp_path):
    train(*config("vanilla", f"output_dir={tmp_path}/free", "num_iterations=1"), tmp_path / "free")
    assert not on_the_sphere(load_tensors(tmp_path / "free", "model.pt"))
    run(
        tmp_path / "ball",
        "OnASphere",
        f"init_from_checkpoint={tmp_path}/free",
        "num_iterations=1",
        "eval_only=true",
    )
    run(tmp_path / "run", "OnASphere", f"init_from_checkpoint={tmp_path}/free", "num_iterations=1")
    assert on_the_sphere(load_tensors(tmp_path / "run", "model.pt"))


# -- parts that come from elsewhere --------------------------------------------------------------------------------


def test_a_base_is_in_no_checkpoint_average_or_optimizer(tmp_path):
    run(tmp_path, "OnABase")
    assert "embed_tokens.weight" not in load_tensors(tmp_path, "model.pt")
    assert "embed_tokens.weight" not in load_tensors(tmp_path, "ema.pt")["shadow"]
    assert "embed_tokens.weight" not in load_tensors(tmp_path, "optimizer.pt")["optimizers"]["state"]
    assert load_json(tmp_path, "config.json")["provenance"] == {"base": "filled with 0.02"}
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    frozen = [row for row in manifest["roles"] if row["optimizer"] == "frozen"]
    assert [row["role"] for row in frozen] == ["embedding"] and frozen[0]["parameters"] > 0


def test_a_base_that_is_put_in_while_loading_is_not_trained(tmp_path):
    score = run(tmp_path, "OnALoadedBase")
    assert "embed_tokens.weight" not in load_tensors(tmp_path, "model.pt")
    weight = restore(tmp_path, device="cpu").adapter.model.embed_tokens.weight
    assert not weight.requires_grad and torch.equal(weight, torch.full_like(weight, 0.02))
    assert score < 9


def test_memory_of_a_base_is_weights_alone():
    cfg, model_cfg = of("OnABase")
    adapter = build_adapter(cfg, model_cfg, Letters(), "meta")
    trained = 4 * sum(p.numel() for n, p in adapter.named_model_parameters() if n != "embed_tokens.weight")
    found = memory_estimate(adapter, cfg, 1)
    assert found["gradients"] == found["ema"] == trained
    assert found["weights"] == trained + 4 * adapter.model.embed_tokens.weight.numel()


def test_a_run_on_a_base_goes_on_exactly_and_refuses_another_base(tmp_path, monkeypatch):
    score = run(tmp_path / "whole", "OnABase")
    run(tmp_path / "parts", "OnABase", "save_steps=3")
    later = tmp_path / "parts/checkpoint-6"
    later.rename(tmp_path / "removed")
    for name in ("summary.json",):
        (tmp_path / "parts" / name).unlink()
    assert run(tmp_path / "parts", "OnABase", "resume=auto", "save_steps=3") == score
    monkeypatch.setattr(hooks_toy.OnABase, "VALUE", 0.03)
    words = "base was filled with 0.02, here it is filled with 0.03"
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "parts", "OnABase", "resume=auto", "num_iterations=8")
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "other", "OnABase", f"init_from_checkpoint={tmp_path}/parts")


# -- what a step knows -----------------------------------------------------------------------------------------------


def test_hook_and_rows_of_a_step_belong_together(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks_toy.WithADraw, "heard", heard := [])
    run(tmp_path, "WithADraw", "seed=5", "logging_steps=1", "batch_size=2")
    assert heard == [(5, step, 6) for step in range(6)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["drawn"] for line in lines if "drawn" in line] == [0, 1, 2, 3, 4, 5]


def test_a_replay_hears_of_its_own_step(tmp_path, monkeypatch):
    """The loop is a step ahead when it learns that one was not finite."""
    monkeypatch.setattr(hooks_toy.WithADraw, "heard", heard := [])
    forward = hooks_toy.WithADraw.forward

    def poisoned(self, prepared):
        output = forward(self, prepared)
        if prepared.host["step"] == 2 and self.training:
            output.terms["ce"].sum = output.terms["ce"].sum * float("nan")
        return output

    monkeypatch.setattr(hooks_toy.WithADraw, "forward", poisoned)
    with pytest.raises(Exception, match="loss term 'ce' is nan"):
        run(tmp_path, "WithADraw", "val_loss_every=0")
    assert [step for _, step, _ in heard] == [0, 1, 2, 3, 2]


# -- small things ----------------------------------------------------------------------------------------------------


def test_state_outside_of_the_model_is_refused():
    with pytest.raises(ValueError, match=r"StateOutside holds .*own\.weight, own\.bias, counts"):
        build_adapter(*of("StateOutside"), Letters())


def test_a_step_s_loss_from_its_terms():
    terms = {
        "ce": LossTerm(torch.tensor(6.0), "tokens"),
        "aux": LossTerm(torch.tensor(4.0, dtype=torch.float64), "rows", weight=0.5),
        "none": LossTerm(torch.tensor(0.0), "absent", weight=2.0),
        "shown": LossTerm(torch.tensor(9.0), "rows", weight=0.0),
    }
    assert weighted_loss(terms, {"tokens": 3.0, "rows": 2.0, "absent": 0.0}).item() == 2.0 + 0.5 * 2.0


@pytest.mark.parametrize(("split", "width"), [((4, 0), None), ((), None), (0, None), (1, 0)])
def test_rules_refuse_what_means_nothing(split, width):
    with pytest.raises(ValueError, match="every, split and width must be at least 1"):
        Rule("x", "matrix", split=split, width=width)


def test_a_model_of_bytes_reads_bytes():
    words = [f'type="{TOYS}:Bytes"', "data=embedded"]
    cfg, model_cfg = config("vanilla", *words)
    assert type(model_cfg).unit == "byte"
    dataset = load_dataset(cfg.model_copy(update={"data": "synthetic"}), unit="byte")
    assert dataset.tokenizer.name == "byte"
    assert "tokenizer auto: byte, as this architecture reads bytes" in dataset.notes
    with pytest.raises(
        ValueError, match="tokenizer: 'bpe-512' makes tokens, and this architecture reads bytes"
    ):
        config("vanilla", *words, "tokenizer=bpe-512")
    with pytest.raises(DataError, match="reads bytes"):
        load_dataset(cfg.model_copy(update={"tokenizer": "bpe-512"}), unit="byte")
    assert config("vanilla", *words, "tokenizer=byte")[0].tokenizer == "byte"
    assert config("vanilla", "tokenizer=byte")[0].tokenizer == "byte", "legal for models of tokens"
    with pytest.raises(ValueError, match="'bpe-512' makes tokens, and this architecture reads bytes"):
        config("vanilla", f'model_adapter="{TOYS}:BytesByAdapter"', "tokenizer=bpe-512")
