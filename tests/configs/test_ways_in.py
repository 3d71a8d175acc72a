"""Commands as people type them who come from other trainers, or from a page about this one: each is understood."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mytrainer
from configs import compose
from configs.compose import prepare
from configs.files import CONFIGS
from configs.grid import check_grid

RUNS = [
    ("--hydra_model_cfg=configs/sedd.yaml num_iterations=100 model_cfg.d_model=256", {"n_heads": 4}),
    ("--hydra_model_cfg configs/gpt2.yaml preset=tiny", {"d_model": 192}),
    ("hydra_model_cfg=gpt2 preset=tiny", {"d_model": 192}),
    ("--config configs/gpt2.yaml preset=tiny", {"d_model": 192}),
    ("--config-name=gpt2 preset=tiny", {"d_model": 192}),
    ("configs/small.config --batch_size=16", {"d_model": 128, "n_heads": 4}),
    ("configs/inheritance-test.config", {"n_layers": 8, "d_model": 512, "n_heads": 8}),
    ("configs/train_mydata.py --batch_size=16", {"d_model": 64}),
    ("--hydra_model_cfg=configs/mamba.yaml preset=150M", {"d_model": 768}),
    ("--hydra_model_cfg=gpt2 preset=configs/150M.json", {"n_layers": 16}),
    ("--hydra_model_cfg=gpt2 preset=150M model_cfg.n_layers=8", {"n_layers": 8}),
    ("--hydra_model_cfg=configs/150M.json", {"n_layers": 16, "bias": False}),
    ("--hydra_model_cfg=gpt2 --config_file configs/150M.json", {"n_layers": 16}),
    (
        "--config_file configs/150M.json --model_name dante --input_file input.txt --max_iters 7",
        {"n_layers": 16},
    ),
    ("--config_file configs/150M.json --n_layer 8 --eval_interval 5 --eval_iters 2", {"n_layers": 16}),
    ("--n_layer 4 --n_head 4 --n_embd 64 --tokenization char --input_file input.txt", {"d_model": 64}),
]
SHOWN = [
    ("--hydra_model_cfg=configs/sedd.yaml --cfg job", "type: sedd"),
    ("--hydra_model_cfg=configs/sedd.yaml --cfg job --resolve --package model_cfg", "n_heads:"),
    ("--hydra_model_cfg=configs/sedd.yaml --info defaults-tree", "training"),
    ("--hydra_model_cfg=configs/sedd.yaml --info searchpath", "Provider"),
    ("--hydra_model_cfg=configs/sedd.yaml --help", "--hydra_model_cfg"),
    ("convert configs/small.config --to yaml", "defaults:"),
    ("convert configs/150M.json --to config", "MODEL"),
    ("show_configs", "150M.json"),
    ("show_configs --config_file configs/150M.json", "(152.10M)"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder without anything of the project, hence `configs/` is the project's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 0)
    Path("input.txt").write_text("To be, or not to be\n" * 200)
    Path("configs").mkdir()
    Path("configs/train_mydata.py").write_text(
        "out_dir = 'out-mydata'\nn_layer = 2\nn_head = 2\nn_embd = 64\nblock_size = 32\nbatch_size = 12\n"
    )
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("line", "sizes"), RUNS, ids=[line for line, _ in RUNS])
def test_a_run(place, line, sizes):
    _, model_cfg = compose(line.split(), notify=lambda text: None)
    assert sizes.items() <= model_cfg.model_dump().items()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2", "base_small"])
def test_a_run_of_processes_that_others_start(place, monkeypatch, model):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    cfg, _ = compose([f"--hydra_model_cfg=configs/{model}.yaml", "num_gpus=4"], notify=lambda text: None)
    assert cfg.num_gpus == 4


@pytest.mark.slow
@pytest.mark.parametrize(("line", "said"), SHOWN, ids=[line for line, _ in SHOWN])
def test_what_is_shown(place, monkeypatch, capsys, line, said):
    monkeypatch.setattr("sys.argv", ["mytrainer.py", *line.split()])
    assert mytrainer.main(line.split()) == 0
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_sweeps(place, monkeypatch):
    def grid(*words: str):
        return check_grid(prepare([*words, "-m"]))

    found = grid("--hydra_model_cfg=configs/sedd.yaml,configs/gpt2.yaml", "model_cfg.d_model=64,128")
    assert [(c.cfg.type, c.model_cfg.n_heads) for c in found] == [
        ("sedd", 1), ("sedd", 2), ("gpt2", 1), ("gpt2", 2)
    ]  # fmt: skip
    assert len(grid("--hydra_model_cfg=gpt2", "preset=tiny,small")) == 2
    searched = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=20"]
    assert grid("--hydra_model_cfg=sedd", *searched, "learning_rate=tag(log,interval(1e-5,1e-2))") is None
    Path("srun").write_text("")
    Path("srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(place), prepend=os.pathsep)
    launched = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    assert len(grid("--hydra_model_cfg=configs/sedd.yaml", *launched)) == 1


@pytest.mark.slow
def test_a_sweep_over_all_files_of_a_pattern(place):
    plan = prepare(["--hydra_model_cfg=configs/m*.yaml", "-m"])
    assert set(plan.models) == {path.stem for path in CONFIGS.glob("m*.yaml")}
