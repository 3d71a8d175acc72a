"""Each toy trains, resumes, is scored, writes and is shown as any architecture of the table; and what only it can show.

Through the command line, in one process, from the toys' own folder: no edit of the project, nothing registered.
"""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

import mytrainer
from adapters.base import Context, GenerateOptions
from data.rows import Batch
from models.layers.flops import matmul_flops
from models.vanilla import block_flops
from tests.contract.forks import passed
from tests.contract.test_run import assert_same_state
from trainer.run.checkpoint import load_json, load_tensors
from trainer.run.restore import Restored, restore
from trainer.run.tensor_files import WEIGHTS, read_tensors

TOYS = Path(__file__).resolve().parent
ROOT = TOYS.parents[1]
SHAPES = sorted(path.stem for path in TOYS.glob("*.yaml") if path.stem != "toy")
EVAL = Context(seed=0, step=0, phase="eval", rows_in_step=1)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def in_their_folder():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TOYS)
        patch.setenv("PYTHONPATH", "")
        patch.setenv("MYTRAINER_TRUST", "shapes")  # whose runs are opened again
        patch.setattr(sys, "path", [*sys.path, str(TOYS)])
        patch.setattr(sys, "argv", ["mytrainer.py"])
        torch.set_num_threads(1)
        yield
        GlobalHydra.instance().clear()


def run(*words) -> tuple[int, str, str]:
    """One command line: exit status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = mytrainer.main([str(word) for word in words])
        except SystemExit as leaving:
            status = leaving.code
    return status, out.getvalue(), err.getvalue()


def ran(*words) -> str:
    status, out, err = run(*words)
    assert status == 0, err
    return out


def opened(checkpoint: Path, *overrides: str) -> Restored:
    return restore(checkpoint, device="cpu", overrides=overrides)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Whole runs by shape, saved half way too: made once, when asked for."""
    made: dict[str, Path] = {}

    def run_of(shape: str) -> Path:
        if shape not in made:
            made[shape] = tmp_path_factory.mktemp(shape) / "run"
            words = ["save_steps=30", "logging_steps=1", "ema_decay=0.9"]
            ran(f"--hydra_model_cfg={shape}.yaml", f"output_dir={made[shape]}", *words)
        return made[shape]

    return run_of


def lines(run: Path) -> list[dict]:
    """What was logged of the steps, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if "second" not in k} for line in found if "loss" in line]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def on(shape):
    return pytest.mark.xdist_group(f"toy {shape}")


every_shape = pytest.mark.parametrize("shape", [pytest.param(s, marks=on(s)) for s in SHAPES])


# -- as any architecture -----------------------------------------------------------------------------------------------


@every_shape
def test_it_learns(trained, shape):
    """More than how frequent a byte is, which is what a model without context could learn."""
    found = summary(trained(shape))
    assert found["score"]["kind"] == "exact"
    assert found["score"]["bits_per_byte"] < 0.8 * found["yardsticks"]["unigram"]


@every_shape
def test_it_resumes_bit_for_bit(trained, shape, tmp_path):
    whole = trained(shape)
    shutil.copytree(whole / "checkpoint-30", tmp_path / "checkpoint-30")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(whole / name, tmp_path)
    ran(f"resume={tmp_path}")
    assert_same_state(whole / "checkpoint-60", tmp_path / "checkpoint-60")
    assert lines(tmp_path) == lines(whole) and len(lines(whole)) == 60
    assert summary(tmp_path)["score"] == summary(whole)["score"]
    assert summary(tmp_path)["flops"] == summary(whole)["flops"]


@every_shape
def test_its_score_text_and_sizes(trained, shape):
    folder = trained(shape)
    out = ran("eval", "--checkpoint", folder, "--device", "cpu")
    assert json.loads(out)["score"] == summary(folder)["score"]
    text = ["generate", "--checkpoint", folder, "--device", "cpu", "--prompt", "01", "--max_new_tokens", "50"]
    text += ["--num_samples", "2", "--ignore_document_end"]
    out = ran(*text)  # beyond the context, where there is one
    assert out == ran(*text, "--no_cache") and len(out) > 100
    shown = json.loads(ran("show", f"--hydra_model_cfg={shape}.yaml", "--json"))
    assert shown["parameters"]["total"] == load_json(folder, "manifest.json")["parameters"]["total"]


@every_shape
def test_a_row_of_text_does_not_depend_on_the_others(trained, shape):
    adapter = opened(trained(shape)).adapter.double()
    prompts, options = [[49, 50, 51, 52, 53], [50], []], GenerateOptions(40, stop_at_document_end=False)
    together = adapter.generate(prompts, options).tokens
    assert together[0] == adapter.generate(prompts[:1], options).tokens[0]
    assert together[:2] == adapter.generate(prompts[:2], options).tokens


@every_shape
def test_it_keeps_the_contract(shape, tmp_path):
    """The fast tier of tests/contract, on its file, whose folder is on no path."""
    words = ["tests/contract", "--architecture", str(TOYS / f"{shape}.yaml")]
    passed([*words, "-n", "0", "-q", "-p", "no:cacheprovider"], ROOT, tmp_path / "said.txt")


# -- what only one of them can show ------------------------------------------------------------------------------------


@on("state_space")
def test_states_carry_everything_and_begin_anew_with_a_document(trained):
    model = opened(trained("state_space")).adapter.model.double()
    tokens = torch.randint(48, 56, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens)
        cache = model.init_cache(2)
        model(tokens[:, :60], cache=cache)
        kept = cache.snapshot()
        other = model(tokens[:, :7], cache=cache)
        cache.restore(kept)
        assert not torch.allclose(other, model(tokens[:, 60:67], cache=cache))
        cache.select(torch.tensor([1]))
        torch.testing.assert_close(
            model(tokens[1:, 67:], cache=cache), whole[1:, 67:], rtol=1e-10, atol=1e-10
        )
        doc_ids = (torch.arange(100) >= 37).int().expand(2, 100)
        two = model(tokens, doc_ids=doc_ids)
        torch.testing.assert_close(two[:, 37:], model(tokens[:, 37:]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(two[:, :37], whole[:, :37], rtol=1e-10, atol=1e-10)
    assert {part.shape for part in cache.parts.values()} == {(1, 32)}, "as large after any number of tokens"


@on("experts")
def test_experts_are_counted_and_balanced(trained):
    folder = trained("experts")
    for line in lines(folder):
        assert sum(line[f"expert_{i}"] for i in range(4)) == pytest.approx(1)
        assert 0.9 < line["loss_balance"] < 4 and 0.25 <= line["busiest"] <= 1
    bias = load_tensors(folder / "checkpoint-60", "model.pt")["layers.0.mlp.bias"]
    assert bias.abs().max() > 0
    torch.testing.assert_close(bias / 0.01, (bias / 0.01).round(), rtol=0, atol=1e-3)  # steps of bias_rate
    adapter = opened(folder).adapter
    adapter.load = torch.tensor([[4.0, 0, 0, 0]] * 2)
    adapter.after_step(0, torch.tensor(1.0))
    assert torch.equal(adapter.model.layers[0].mlp.bias, bias), "nothing moves in a step that is skipped"
    adapter.after_step(0, torch.tensor(0.0))
    moved = adapter.model.layers[0].mlp.bias - bias
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.01, 0.01, 0.01]))
    idle = 2 * 3 * (2 * 96 + 96) * 32
    assert adapter.active_parameters() == sum(p.numel() for p in adapter.parameters()) - idle


@on("experts")
def test_experts_count_the_tokens_of_all_processes(tmp_path):
    """Two processes move the biases as one does, which sees all tokens."""
    words = ["--hydra_model_cfg=experts.yaml", "num_iterations=4", "batch_size=8", "optimizer=sgd"]
    assert "busiest" in ran(*words, f"output_dir={tmp_path}/one"), "on the console"
    done = subprocess.run(
        [sys.executable, ROOT / "mytrainer.py", *words, f"output_dir={tmp_path}/two", "num_gpus=2"],
        cwd=TOYS,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = (load_tensors(tmp_path / name / "checkpoint-4", "model.pt") for name in ("one", "two"))
    for name in ("layers.0.mlp.bias", "layers.1.mlp.bias"):
        assert torch.equal(one[name], two[name]) and one[name].any()


@on("three_tokens")
def test_three_tokens_stay_within_a_document(trained):
    found = opened(trained("three_tokens"))
    tokens = np.array([[256, 48, 49, 256, 50, 51, 52]])
    batch = Batch(
        tokens=tokens,
        doc_ids=np.array([[0, 0, 0, 1, 1, 1, 1]], np.int32),
        weights=np.ones((1, 4), np.float32),
        end_weights=np.zeros((1, 4), np.float32),
        rows=np.arange(1),
        bytes=3,
    )
    prepared = found.adapter.prepare(batch, EVAL)
    assert prepared.denominators == {"tokens": 4, "tokens_2": 3, "tokens_3": 2}
    assert prepared.tensors["weights_3"].tolist() == [[1, 0, 0, 1]]
    before = found.adapter.likelihood(batch, EVAL).nats
    with torch.no_grad():
        for head in found.adapter.model.later.values():
            head.weight.zero_()
    assert torch.equal(found.adapter.likelihood(batch, EVAL).nats, before), "the score is the next token's"
    first, last = lines(trained("three_tokens"))[0], lines(trained("three_tokens"))[-1]
    for name in ("loss_ce", "loss_token_2", "loss_token_3"):
        assert last[name] < 0.6 * first[name]
    assert last["loss"] == last["loss_ce"] < last["loss_token_2"], "what is further away is harder"


@on("recurrent_depth")
def test_depths_are_drawn_paid_for_and_asked_for(trained):
    folder = trained("recurrent_depth")
    adapter = opened(folder).adapter
    depths = [line["depth"] for line in lines(folder)]
    assert set(depths) == {1, 2, 3, 4}
    drawn = [
        adapter.depth(Context(seed=1337, step=step, phase="train", rows_in_step=16)) for step in range(60)
    ]
    assert drawn == depths, "a function of seed and step"
    paid = sum(adapter.model.flops(32, depth).training_per_token for depth in depths)
    assert summary(folder)["flops"] == pytest.approx(16 * 32 * paid)

    def score(*words):
        out = ran("eval", "--checkpoint", folder, "--device", "cpu", *words)
        return json.loads(out)["score"]["bits_per_byte"]

    assert score("model_cfg.eval_depth=4") == score() != score("model_cfg.eval_depth=1")
    status, _, err = run("eval", "--checkpoint", folder, "model_cfg.d_model=64")
    assert status == 2 and "fixed with the architecture" in err


@on("byte_hierarchy")
def test_bytes_are_read_whatever_the_tokenizer(trained):
    status, _, err = run("--hydra_model_cfg=byte_hierarchy.yaml", "tokenizer=bpe-512")
    assert status and "reads bytes" in err and "Traceback" not in err
    adapter = opened(trained("byte_hierarchy")).adapter
    text = np.frombuffer(b"\x00" + b"01234567" * 4, np.uint8).astype(np.int64)[None]
    ones = np.ones((1, 32), np.float32)
    batch = Batch(text, np.zeros((1, 33), np.int32), ones, 0 * ones, np.arange(1), 32)
    found = adapter.likelihood(batch, EVAL)
    assert found.per_token.shape == (1, 32)
    torch.testing.assert_close(found.per_token.sum(1), found.nats)
    changed = text.copy()
    changed[0, 18] = 48  # in the middle of a patch
    after = adapter.likelihood(replace(batch, tokens=changed), EVAL).per_token
    assert torch.equal(after[:, :17], found.per_token[:, :17]) and not torch.equal(after, found.per_token)


@on("sphere")
def test_weights_and_their_averages_stay_on_the_sphere(trained):
    folder = trained("sphere")
    saved = load_tensors(folder / "checkpoint-60", "model.pt")
    average = load_tensors(folder / "checkpoint-60", "ema.pt")["shadow"]
    matrices = {name for name, weight in saved.items() if name.startswith("layers") and weight.ndim == 2}
    assert len(matrices) == 14
    scored = dict(opened(folder).adapter.model.named_parameters())
    for name in matrices:
        for weights in (saved, scored):
            torch.testing.assert_close(weights[name].norm(dim=1), torch.ones(len(weights[name])))
        assert average[name].norm(dim=1).mean() < 0.9999, "an average of points of a sphere lies inside of it"
    adapter = opened(folder).adapter
    kept = adapter.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        kept *= 2
    adapter.constrain(torch.tensor(1.0))
    assert kept.norm(dim=1).min() > 1.9, "nothing moves in a step that is skipped"


@on("sphere")
def test_what_rounding_takes_off_the_sphere_is_put_back(trained, tmp_path):
    words = ["--to", "safetensors", "--save_precision", "bf16", "--output", tmp_path / "out"]
    ran("export", "--checkpoint", trained("sphere"), *words)
    written = read_tensors(tmp_path / "out" / WEIGHTS)["layers.0.mlp.up_proj.weight"].float().norm(dim=1)
    found = opened(tmp_path / "out").adapter.model.layers[0].mlp.up_proj.weight.norm(dim=1)
    assert (written - 1).abs().max() > 1e-5
    torch.testing.assert_close(found, torch.ones(len(found)))


@on("frozen_base")
def test_the_base_is_elsewhere_and_known_again(trained, tmp_path):
    folder = trained("frozen_base")
    held = load_tensors(folder / "checkpoint-60", "model.pt")
    assert set(held) == {"adapter.down.weight", "adapter.up.weight", "lm_head.weight"}
    assert set(load_tensors(folder / "checkpoint-60", "ema.pt")["shadow"]) == set(held)
    model = opened(folder).adapter.model
    assert not any(p.requires_grad for p in model.base.parameters())
    base = TOYS / "shapes/base.txt"
    assert load_json(folder, "config.json")["provenance"] == {"base": model.cfg.digest}
    moved = shutil.copy(base, tmp_path / "moved.txt")
    score = ran("eval", "--checkpoint", folder, "--device", "cpu", f"model_cfg.base={moved}")
    assert json.loads(score)["score"] == summary(folder)["score"]
    other = tmp_path / "other.txt"
    other.write_text("another base")
    ran("export", "--checkpoint", folder, "--to", "safetensors", "--output", tmp_path / "out")
    assert set(read_tensors(tmp_path / "out" / WEIGHTS)) == set(held)
    again = [["eval", "--checkpoint", where] for where in (folder, tmp_path / "out")]
    for words in (*again, [f"resume={folder}", "num_iterations=70"]):
        status, _, err = run(*words, f"model_cfg.base={other}")
        assert status and "was trained on another base" in err and "Traceback" not in err


@on("mixture_of_depths")
def test_half_of_the_tokens_pass_and_the_choice_is_foretold(trained):
    folder = trained("mixture_of_depths")
    first, *_, last = lines(folder)
    assert last["loss_router"] < first["loss_router"] and last["foretold"] > 0.6
    adapter = opened(folder).adapter
    tokens = torch.randint(48, 56, (2, 32), generator=torch.Generator().manual_seed(0))
    doc_ids = torch.zeros_like(tokens)
    with torch.no_grad():
        chosen = adapter.model(tokens, doc_ids=doc_ids, choose=True)
        decided = adapter.model(tokens, doc_ids=doc_ids)
    assert (chosen.extra["passed"].sum(-1) == 16).all()
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (passed,) = {line["val_passed"] for line in logged if "val_passed" in line}
    assert 0.2 < passed < 0.8, "as many pass without the row's choice"
    assert torch.equal(decided.extra["passed"] > 0, decided.extra["score"] > 0)
    every = block_flops(adapter.model_cfg, 32)
    saved = every.training_per_token - block_flops(adapter.model_cfg, 16).training_per_token / 2
    control = every * 2 + matmul_flops(adapter.model.head_weight.numel())
    routers = matmul_flops(32).training_per_token
    assert adapter.flops(32).training_per_token == control.training_per_token - saved + routers
