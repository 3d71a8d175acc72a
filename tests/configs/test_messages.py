"""What people read when something is wrong: where it is, what is allowed, what to do."""

from __future__ import annotations

import pytest

from configs import compose
from configs.compose import prepare, tree_of
from configs.files import CONFIGS, description, options
from configs.grid import check_grid
from configs.messages import ConfigError
from models import ARCHITECTURES

FILES, TYPES = ", ".join(options()), ", ".join(sorted(ARCHITECTURES))

CASES = [
    # words, text that the message must contain
    ([], [f"no model chosen. Give --hydra_model_cfg=configs/<name>.yaml; available: {FILES}"]),
    (["configs/gpt3.yaml"], ["no such file: configs/gpt3.yaml (tried ", "Did you mean ", "'configs/gpt2.yaml'?"]),
    (["model=$MODEL"], ["no such file: $MODEL. A variable of the shell that is not set, or within '' quotes"]),
    (["--config-path", ".", "-cn", "gpt2"], ["It is in configs/, whose place --config-path takes; --config-dir adds"]),
    (["model=vanila"], ["no such file: vanila", "Did you mean 'vanilla'?"]),
    (["model=configs/x*.yaml"], ["the pattern 'configs/x*.yaml' matches no config"]),
    (["model=glob(x*)"], ["matches no config"]),
    (["model=gpt2,vanilla"], ["2 configs given for one run. Add -m to run them as a sweep"]),
    (["configs/training.yaml"], [f"configs/training.yaml is the shared base, not a model. Choose one of: {FILES}"]),
    (["mine.yaml", "--cfg", "job", "-m"], ["command line: --cfg shows one run, and -m starts several. Leave out -m"]),
    (["mine.yaml", "seed=1,2", "--info", "-m"], ["command line: --info shows one run, and -m starts several"]),
    (["model=configs"], ["'configs' is a directory", "--hydra_model_cfg='configs/*.yaml' -m"]),
    (["model=mine.toml"], ["cannot read '.toml'. Accepted: .yaml .yml .json"]),
    (["mine.toml"], ["cannot read '.toml'"]),
    (["mine.yaml", "num_iteration=3"], ["command line: unknown key 'num_iteration'", "'num_iterations'?"]),
    (["mine.yaml", "+lr=3"], ["unknown key 'lr'", "'learning_rate'"]),
    (["mine.yaml", "max_steps=3"], ["unknown key 'max_steps'", "'num_iterations'"]),
    (["mine.yaml", "model_cfg.n_embd=3"], ["unknown key 'model_cfg.n_embd' for type 'fake_arch:Model'", "d_model'"]),
    (["mine.yaml", "model_cfg.learning_rate=3"], ["unknown key 'model_cfg.learning_rate'", "'learning_rate'"]),
    (["model=moe", "model_cfg.dispatch=loop"], ["for type 'moe'. It is no field here: ", "kernels.grouped_linear"]),
    (["model=mtp", "+model_cfg.use_liger=true"], ["It is no field here: ", "kernels.linear_cross_entropy"]),
    (["model=mtp", "model_cfg.spec_heads=2"], ["It is no field here: ", "generate --speculative --draft N"]),
    (["model=ngpt", "model_cfg.use_fp8=true"], ["It is no field here: products in FP8 are not offered"]),
    (["model=moe", "model_cfg.alphas=[]"], ["command line: model_cfg.alphas: must not be empty"]),
    (["model=moe", "model_cfg.alphas=0.1"], ["command line: model_cfg.alphas: expected list or null, got 0.1 (float)"]),
    (["model=deepseek-mtp"], ["type mtp here: --hydra_model_cfg=configs/mtp.yaml model_cfg.use_deepseek_mtp=true"]),
    (["mine.yaml", "model_cfg.n_layrs=3"], ["Did you mean 'model_cfg.n_layers'"]),
    (["mine.yaml", "model_dim=3"], ["'model_dim' is an architecture field here: set model_cfg.d_model"]),
    (["mine.yaml", "output_dir=gr\udcfcn"], [r"output_dir: 'gr\udcfcn' is not UTF-8 text", "PYTHONUTF8=1"]),
    (["mine.yaml", "model_cfg.d_model=abc"], ["model_cfg.d_model: expected int, got 'abc' (str)"]),
    (["mine.yaml", "model_cfg.d_model=96.0"], ["expected int, got 96.0 (float). Write 96"]),
    (["mine.yaml", "seed='3'"], ["seed: expected int, got '3' (str). Write 3 without quotes"]),
    (["mine.yaml", "seed=true"], ["seed: expected int, got True (bool)"]),
    (["mine.yaml", "seed=99999999999999999999999"], ["seed: must satisfy 0 <= seed <= 9223372036854775807, got 9999"]),
    (["mine.yaml", "output_dir=''"], ["command line: output_dir: must not be empty"]),
    (["mine.yaml", "output_dir="], ["command line: output_dir: must not be empty"]),
    (["mine.yaml", "resume=''"], ["command line: resume: must not be empty"]),
    (["mine.yaml", "synthetic_bytes=9"], ["synthetic_bytes: must satisfy 1000 <= synthetic_bytes, got 9"]),
    (["mine.yaml", "env.FOO=[1]"], ["command line: env.FOO: expected str, got [1] (list)"]),
    (["mine.yaml", "env.FOO={a:1}"], ["command line: env.FOO: expected str, got {'a': 1} (dict)"]),
    (["mine.yaml", "seed=null"], ["seed: expected int, got null. Left out it is"]),
    (["mine.yaml", "packing=null"], ["packing: expected bool, got null. Left out it is true"]),
    (["mine.yaml", "dataset_split=null"], ["dataset_split: expected str, got null. Left out it is train"]),
    (["mine.yaml", "dataset_split="], ["dataset_split: must not be empty"]),
    (["mine.yaml", "eval_split=''"], ["eval_split: must not be empty"]),
    (["mine.yaml", "env.FOO=null"], ["env.FOO: expected str, got null"]),
    (["mine.yaml", "z_loss=-1"], ["z_loss: must satisfy 0 <= z_loss"]),
    (["mine.yaml", "learning_rate=nan"], ["learning_rate: must satisfy 0 < learning_rate"]),
    (["mine.yaml", "model_cfg.dropout=1.5"], ["model_cfg.dropout: must satisfy 0 <= dropout <= 1, got 1.5"]),
    (["mine.yaml", "val_bytes=0"], ["val_bytes: must satisfy 1 <= val_bytes, got 0"]),
    (
        ["mine.yaml", "scheduler=cosin"],
        ["'cosin' is not one of cooldown, cooldown_inverse_sqrt, cosine, linear", "mean 'cosine'?"],
    ),
    (["mine.yaml", "kernels=chunkd"], ["kernels.default: 'chunkd' is not one of auto", "mean 'chunked'?"]),
    (["mine.yaml", "kernels.linear_cross_entropi=auto"], ["kernels.linear_cross_entropi: ", "'linear_cross_entropy'?"]),
    (["mine.yaml", "kernels.linear_cross_entropy=3"], ["kernels.linear_cross_entropy: expected str, got 3 (int)"]),
    (["mine.yaml", "batch_size=big"], ["batch_size: 'big' is not one of auto, int"]),
    (["mine.yaml", "device=gpu"], ["device: 'gpu' is not one of auto, cpu, cuda, cuda:<n>, mps"]),
    (["mine.yaml", "model_name=a/b"], ["model_name: 'a/b' cannot name a run: letters, digits", "Nearest: 'a-b'"]),
    (["mine.yaml", "model_name=.."], ["model_name: '..' cannot name a run", "not dots alone"]),
    (
        ["mine.yaml", "model_cfg.d_model=770", "model_cfg.n_heads=6"],
        ["model_cfg.d_model (770) must be divisible by model_cfg.n_heads (6); nearest: 768, 774"],
    ),
    (["mine.yaml", "train_seq_len=2048"], ["train_seq_len (2048) must not exceed model_cfg.n_ctx (1024)"]),
    (["mine.yaml", "batch_size=5"], ["global_batch_size (48) must be divisible by batch_size (5)", "45, 50"]),
    (
        ["mine.yaml", "batch_size=5", "gradient_accumulation_steps=2", "global_batch_size=48"],
        ["global_batch_size (48) must equal gradient_accumulation_steps (2) * batch_size (5) = 10"],
    ),
    (["mine.yaml", "num_gpus=5", "device=cpu"], ["divisible by num_gpus (5 processes) = 5; nearest: 45, 50"]),
    (["mine.yaml", "num_gpus=2", "device=cuda:1"], ["num_gpus is 2 but device=cuda:1 is a single one"]),
    (["mine.yaml", "ddp_backend=nccl", "device=cpu"], ["ddp_backend: 'nccl' needs CUDA"]),
    (["mine.yaml", "warmup_steps=9", "num_iterations=9"], ["warmup_steps (9) must be less than num_iterations (9)"]),
    (["mine.yaml", "min_lr=1"], ["min_lr (1.0) must not exceed learning_rate (0.001)"]),
    (["mine.yaml", "batch_stages=[]"], ["batch_stages: must not be empty"]),
    (
        ["mine.yaml", "batch_stages=[{until:0.5,rows:8},{until:0.9}]"],
        ["batch_stages: until must rise from stage to stage and end at 1, got 0.5, 0.9"],
    ),
    (
        ["mine.yaml", "batch_stages=[{until:0.5,rows:8},{until:0.5,rows:8},{until:1}]"],
        ["batch_stages: until must rise from stage to stage and end at 1, got 0.5, 0.5, 1"],
    ),
    (
        ["mine.yaml", "batch_stages=[{until:1,rows:8}]"],
        ["the last stage has global_batch_size rows (48), got 8", "or set global_batch_size=8"],
    ),
    (
        ["mine.yaml", "batch_size=6", "batch_stages=[{until:0.5,rows:8},{until:1}]"],
        ["batch_stages: rows (8) must be divisible by", "6; nearest: 6, 12"],
    ),
    (
        ["mine.yaml", "gradient_accumulation_steps=4", "batch_stages=[{until:0.5,rows:8},{until:1}]"],
        ["batch_stages: rows (8) must be divisible by", "12; nearest: 12"],
    ),
    (["mine.yaml", "batch_stages=[{until:2}]"], ["must satisfy 0 < batch_stages.0.until <= 1, got 2"]),
    (["mine.yaml", "batch_stages=[{until:x}]"], ["batch_stages.0.until: expected float, got 'x' (str)"]),
    (["mine.yaml", "batch_stages=[{rows:2}]"], ["required key 'batch_stages.0.until' has no value"]),
    (["mine.yaml", "batch_stages=[{until:1,row:2}]"], ["unknown key 'batch_stages.0.row'. Did you mean 'rows'"]),
    (
        ["mine.yaml", "muon_momentum_ends=0.97"],
        ["muon_momentum_ends (0.97) must not exceed muon_momentum (0.95)", "Nearest: muon_momentum_ends=0.95"],
    ),
    (
        ["mine.yaml", "muon_momentum_ends=0.8", "muon_momentum_rise=0.7", "muon_momentum_fall=0.5"],
        ["muon_momentum_rise (0.7) and muon_momentum_fall (0.5) must not exceed", "muon_momentum_fall=0.3"],
    ),
    (
        ["mine.yaml", "muon_momentum_ends=0.8", "muon_momentum_rise=0", "muon_momentum_fall=0"],
        ["muon_momentum_ends has no effect while muon_momentum_rise and muon_momentum_fall are 0"],
    ),
    (["mine.yaml", "data=text"], ["data=text needs input_file=<file or folder>"]),
    (["mine.yaml", "data=embedded", "input_file=a.txt"], ["input_file is read by data=text or data=jsonl or"]),
    (["mine.yaml", "data=text", "input_file=mine.yaml", "val_files=mina.yaml"], ["'mina.yaml' does not exist. Did"]),
    (["mine.yaml", "document_separator=' '"], ["document_separator: ", "a line of its own"]),
    (["mine.yaml", "data=text", "input_file=no.txt"], ["input_file: no such file or folder: no.txt"]),
    (["mine.yaml", "data=txt"], ["no data 'txt'. Did you mean 'text'? Available: bin, embedded, fineweb10B,"]),
    (["mine.yaml", "preset=huge"], ["no preset 'huge'", "Available: 150M, 200M, 250M, code, nano, none, shak"]),
    (["mine.yaml", "tokenizer=gpt3"], ["tokenizer: 'gpt3' is not one of auto, byte, bpe-<N>"]),
    (["mine.yaml", "tokenizer=bpe-100"], ["tokenizer: 'bpe-100' is too small"]),
    (["mine.yaml", "resume=auto"], ["resume=auto needs model_name or output_dir"]),
    (["mine.yaml", "resume=nowhere"], ["resume: no such run or checkpoint: nowhere"]),
    (
        ["mine.yaml", "resume=auto", "model_name=x", "init_from_checkpoint=mine.yaml"],
        ["resume and init_from_checkpoint exclude each other"],
    ),
    (["mine.yaml", "early_stopping=true", "val_loss_every=0"], ["early_stopping needs evaluations"]),
    (["mine.yaml", "save_only_best=true", "save_checkpoint=false"], ["save_only_best needs save_checkpoint"]),
    (["mine.yaml", "save_best_model=true", "save_checkpoint=false"], ["save_best_model needs save_checkpoint"]),
    (
        ["model=bd3lm", "model_cfg.n_ctx=64", "model_cfg.block_size=32"],
        ["Keep model_cfg.n_ctx; of type bd3lm, the block is model_cfg.block_length, the context model_cfg.n_ctx"],
    ),
    (
        ["model=bd3lm", "model_cfg.block_size=32"],
        ["command line: model_cfg.block_size is not clear for type 'bd3lm': the block is model_cfg.block_length, the"],
    ),
    (["model=vanilla", "type=bd3lm", "model_cfg.block_size=32"], ["model_cfg.block_size is not clear for type"]),
    (["type=gpt2,bd3lm", "mine.yaml", "model_cfg.block_size=32", "-m"], ["not clear for type 'bd3lm'"]),
    (["mine.yaml", "type=gtp2"], [f"unknown type 'gtp2'. Did you mean 'gpt2'? Registered: {TYPES}"]),
    (["mine.yaml", "type=no_such_module:X"], ["type: cannot import 'no_such_module:X'"]),
    (["mine.yaml", "model_adapter=fake_arch:Nope"], ["model_adapter: cannot import 'fake_arch:Nope'"]),
    (["mine.yaml", "~seed"], ["'seed' is required and cannot be deleted"]),
    (["mine.yaml", "--max_iter", "3"], ["unknown option --max_iter. Did you mean '--num_iterations'"]),
    (["mine.yaml", "--seed"], ["--seed needs a value"]),
    (["mine.yaml", "--cfg", "jobs"], ["--cfg: 'jobs' is not one of job, hydra, all. Did you mean 'job'?"]),
    (["trian", "mine.yaml"], ["'trian' is neither a command nor key=value", "mean 'train'"]),
    (["mine.yaml", "seed=[1,"], ["command line: seed: cannot read the value"]),
    (["mine.yaml", "hydra/launcher=ray"], ["needs the package hydra-ray-launcher: pip install \"mytrainer[ray]\""]),
    (["mine.yaml", "hydra/sweeper=ax"], ["needs the package hydra-ax-sweeper: pip install \"mytrainer[ax]\""]),
    (["mine.yaml", "seed=1,2"], ["seed has several values for one run. Add -m to run them as a sweep\n"]),
    (
        ["mine.yaml", "sample_prompt=Hello, you"],
        ["sample_prompt has several values for one run. Add -m", """for the shell: 'sample_prompt="Hello, you"'"""],
    ),
    (["mine.yaml", "output_dir=a,b"], ["quote it twice, once for the shell: 'output_dir"]),
    (["mine.yaml", "seq_len=3", "train_seq_len=3"], ["seq_len and train_seq_len name the same field. Keep train_seq"]),
    (["mine.yaml", "--seq_len", "3", "train_seq_len=3"], ["seq_len and train_seq_len name the same field"]),
    (
        ["mine.yaml", "model_cfg.d_model=32", "model_cfg.model_dim=choice(32,48)", "-m"],
        ["model_cfg.d_model and model_cfg.model_dim name the same field. Keep model_cfg.d_model"],
    ),
    (["mine.yaml", "model_cfg={d_model: 32}", "model_cfg.model_dim=32"], ["name the same field"]),
    (["mine.yaml", "model_name=" + "x" * 256], ["cannot name a run", "255 of them at most"]),
    (["mine.yaml", "output_dir=a\nb"], [r"command line: output_dir: 'a\nb': a path cannot hold a line break"]),
    (["mine.yaml", "output_dir=a\0b"], ["a path cannot hold a NUL"]),
    (["mine.yaml", f"resume={'x' * 300}"], ["resume: 'xxx", "has 300 bytes, and a file or folder 255 at most"]),
    (["mine.yaml", "resume=~nobody-here/run"], ["resume: '~nobody-here/run': there is no home folder for '~nobo"]),
    (["model=~nobody-here/mine.yaml"], ["--hydra_model_cfg: '~nobody-here/mine.yaml': there is no home folder"]),
    (["--hydra_model_cfg", "preset=nano"], ["--hydra_model_cfg has no value of its own: 'preset=nano' stands where"]),
    (["gpt2"], ["'gpt2' is neither a command", "The model: --hydra_model_cfg=gpt2"]),
    (["--model_name", "nobody"], ["no run called 'nobody'", "add --hydra_model_cfg=configs/<name>.yaml"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "texts"), CASES, ids=[" ".join(w)[:60] or "nothing" for w, _ in CASES])
def test_message(work, words, texts):
    with pytest.raises(ConfigError) as caught:
        compose(words, notify=lambda text: None)
    for text in texts:
        assert text in caught.value.report()
    assert len(caught.value.problems) == 1


FILES = [
    ("[1, 2", "x.yaml:", "line "),
    ("seed: 1\nseed: 2\ndefaults: [training, _self_]", "x.yaml:2", "duplicate"),
    ("seed: 3", "x.yaml", "defaults must contain 'training'"),
    ("defaults: [_self_, training]", "x.yaml:1", "lists _self_ before training"),
    ("seed: 3\ndefaults: [_self_, mine]", "x.yaml:2", "lists _self_ before training"),
    ("defaults: [training, nowhere, _self_]", "x.yaml:1", "no such config: nowhere (tried nowhere.yaml"),
    ("defaults: training", "x.yaml:1", "defaults must be a list"),
    ("defaults: [training, override hydra/launcher: joblib, _self_]", "x.yaml:1", "hydra/launcher=joblib"),
    ("defaults: [mine, _self_]\n\nnum_iteration: 3", "x.yaml:3", "unknown key 'num_iteration'"),
    ("defaults: [mine, _self_]\nmodel_cfg:\n  d_model: '96'", "x.yaml:3", "expected int, got '96' (str)"),
    ("defaults: [mine, _self_]\nmodel_cfg:\n  d_model: 97", "x.yaml:3", "divisible"),
    ("defaults: [mine, _self_]\nmodel_cfg:\n  n_heads: 5", "mine.yaml:6", "nearest: 95, 100"),
    (
        "defaults: [mine, _self_]\nmodel_cfg: {d_model: 96, model_dim: 48}",
        "x.yaml:2",
        "name the same field and differ",
    ),
    ("defaults: [mine, _self_]\nseq_len: 3\ntrain_seq_len: 4", "x.yaml:3", "name the same field and differ"),
    ("defaults: [mine, _self_]\npreset: huge", "x.yaml", "no preset 'huge'"),
    ("defaults: [mine, _self_]\nkernels: fast", "x.yaml:2", "kernels.default: 'fast' is not one of"),
    ("defaults: [mine, _self_]\nkernels: 3", "x.yaml:2", "kernels: expected mapping, got 3 (int)"),
    ("- 1\n- 2", "x.yaml", "mapping"),
    ("defaults: [mine]\nenv: 4", "x.yaml:2: env", "expected mapping, got 4"),
    (
        "defaults: [bd3lm, _self_]\nmodel_cfg:\n  block_size: 32",
        "x.yaml:3",
        "the block is model_cfg.block_length",
    ),
    (
        "defaults: [training]\ntype: bd3lm\nmodel_cfg: {block_size: 32}",
        "x.yaml:3",
        "the context model_cfg.n_ctx",
    ),
    ("defaults: [mine]\noutput_dir: ~nobody-here/x", "x.yaml:2: output_dir", "there is no home folder"),
    ("defaults: [mine]\nmodel_name: a/b", "x.yaml:2: model_name", "Nearest: 'a-b'"),
    ("just words", "x.yaml:1", "expected 'key: value' lines"),
    ("defaults: [mine, _self_]\ndevice: ${nope}", "x.yaml:2: device: ", "${nope} names no field"),
    (
        "defaults: [mine, _self_]\nseed: ${sed}",
        "x.yaml:2: seed: ",
        "${sed} names no field. Did you mean 'seed'?",
    ),
    (
        "defaults: [mine, _self_]\nmodel_cfg:\n  tag: ${oc.env:NO_X}",
        "x.yaml:3: model_cfg.tag",
        "NO_X is not set",
    ),
]


@pytest.mark.parametrize(("text", "where", "what"), FILES, ids=[t[0][:40] for t in FILES])
def test_message_about_a_file(write, text, where, what):
    write("x.yaml", text)
    with pytest.raises(ConfigError) as caught:
        compose(["x.yaml"], notify=lambda text: None)
    (problem,) = caught.value.problems
    assert problem.startswith(where) and what in problem


@pytest.mark.parametrize("length", [1, 2, 3])
def test_inheritance_cycles_are_named(write, length):
    for i in range(length):
        write(f"c{i}.yaml", f"defaults: [training, c{(i + 1) % length}, _self_]")
    with pytest.raises(
        ConfigError, match="inheritance cycle: " + " -> ".join([*(f"c{i}.yaml" for i in range(length)), "c0"])
    ):
        compose(["c0.yaml"])


def test_a_file_that_is_not_text(work):
    (work / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"x.yaml: not UTF-8 text"):
        compose(["x.yaml"])


def test_all_problems_of_a_stage_come_together(work):
    with pytest.raises(ConfigError) as caught:
        compose(["mine.yaml", "seed=x", "batch_size=0", "scheduler=y", "model_cfg.d_model=97"])
    assert len(caught.value.problems) == 3  # the architecture comes in a later stage
    assert caught.value.report().endswith("3 problems; nothing was started")


def test_dropout_of_one_is_a_warning(work):
    notes: list[str] = []
    compose(["mine.yaml", "model_cfg.dropout=1.0"], notes.append)
    assert any("dropout is 1.0" in n for n in notes)


def test_the_last_of_a_repeated_override_counts(work):
    notes: list[str] = []
    cfg, _ = compose(["mine.yaml", "seed=1", "--seed", "3", "seed=2"], notes.append)
    assert cfg.seed == 2 and any("seed is given more than once" in n for n in notes)
    cfg, _ = compose(
        ["mine.yaml", "data=text", "configs/data=synthetic", "preset=tiny", "preset=none"], notes.append
    )
    assert (cfg.data, cfg.preset) == ("synthetic", "none")
    cfg, _ = compose(["mine.yaml", "seed=1,2", "seed=5"], notes.append)
    assert cfg.seed == 5


def test_the_last_of_a_repeated_override_counts_in_a_sweep(work):
    plan = prepare(["mine.yaml", "model_cfg.d_model=32", "model_cfg.d_model=choice(48,64)", "-m"])
    assert [o for o in plan.overrides if "d_model" in o] == ["++model_cfg.d_model=choice(48,64)"]
    assert [p.model_cfg.d_model for p in check_grid(plan)] == [48, 64]
    assert any("model_cfg.d_model is given more than once; the last value counts" in n for n in plan.notices)
    plan = prepare(
        ["mine.yaml", "seed=1,2", "hydra.sweeper.max_batch_size=1", "hydra.sweeper.max_batch_size=2", "-m"]
    )
    assert [o for o in plan.overrides if "max_batch" in o] == ["hydra.sweeper.max_batch_size=2"]


def test_the_key_of_a_context_stays_a_spelling_of_it_elsewhere(work):
    assert (
        compose(["model=gpt2", "model_cfg.block_size=64", "train_seq_len=64"], lambda text: None)[1].n_ctx
        == 64
    )


def test_an_architecture_cannot_call_a_field_as_a_spelling_of_another(work):
    with (work / "fake_arch.py").open("a") as file:
        file.write("\n\nclass Blocky:\n    class Config(Config):\n        block_size: int = 3\n")
    with pytest.raises(
        ConfigError, match=r"Config of fake_arch:Blocky calls a field 'block_size' \(read as n_ctx\)"
    ):
        compose(["mine.yaml", "type=fake_arch:Blocky"])


def test_a_home_is_resolved_behind_an_equals_sign_too(work, monkeypatch):
    monkeypatch.setenv("HOME", str(work))
    cfg, _ = compose(["mine.yaml", "output_dir=~/out", "tokenizer=byte"], lambda text: None)
    assert (cfg.output_dir, cfg.tokenizer) == (f"{work}/out", "byte")
    with pytest.raises(
        ConfigError, match=f"init_from_checkpoint: no such checkpoint or run folder: {work}/run"
    ):
        compose(["mine.yaml", "init_from_checkpoint=~/run"])


def test_a_comma_in_the_name_of_a_model_file(work, write):
    write("a,b.yaml", "defaults: [mine, _self_]\nseed: 4\n")
    assert compose(["--hydra_model_cfg=a,b.yaml"], lambda text: None)[0].seed == 4


def test_a_file_of_text_alone_means_data_text(work, write):
    notes: list[str] = []
    write("a.txt", "hello")
    cfg, _ = compose(["mine.yaml", "input_file=a.txt"], notes.append)
    assert (cfg.data, cfg.input_file) == ("text", "a.txt") and "input_file is given: data=text" in notes
    plan = prepare(["model=gpt2", "input_file=a.txt"])
    assert tree_of(plan)["preset"] == "none"  # as with other data
    write("own.yaml", "defaults: [mine, _self_]\ninput_file: a.txt\n")
    assert compose(["own.yaml"], notes.append)[0].data == "text"
    write("other.yaml", "defaults: [mine, _self_]\ndata: synthetic\n")
    with pytest.raises(
        ConfigError,
        match="input_file is read by data=text or data=jsonl or data=parquet or data=bin only, and data is 'synthetic'",
    ):
        compose(["other.yaml", "input_file=a.txt"])


def test_files_of_json_lines_alone_mean_data_jsonl(work, write):
    notes: list[str] = []
    for name in ("a.jsonl", "b.jsonl"):
        write(name, '{"text": "hello"}\n')
    for words, field in (
        (["input_file=a.jsonl"], "input_file"),
        (["train_files=[a.jsonl,b.jsonl]"], "train_files"),
    ):
        cfg, _ = compose(["mine.yaml", *words], notes.append)
        assert cfg.data == "jsonl" and f"{field} is given: data=jsonl" in notes
    assert cfg.train_files == ["a.jsonl", "b.jsonl"]
    assert compose(["mine.yaml", "train_files=[ab].jsonl"], notes.append)[0].train_files == "[ab].jsonl"
    assert compose(["mine.yaml", "input_file=a.jsonl", "val_files=[]"], notes.append)[0].val_files == []
    with pytest.raises(
        ConfigError,
        match="train_files is read by data=jsonl or data=parquet or data=bin only, and data is 'text'",
    ):
        compose(["mine.yaml", "data=text", "input_file=a.jsonl", "train_files=a.jsonl"])
    with pytest.raises(ConfigError, match="data=hf needs dataset_name=<folder or name>"):
        compose(["mine.yaml", "data=hf"])
    with pytest.raises(ConfigError, match="dataset_name is read by data=hf only"):
        compose(["mine.yaml", "data=jsonl", "train_files=a.jsonl", "dataset_name=x"])
    with pytest.raises(ConfigError, match="data=jsonl needs train_files=<files> or input_file="):
        compose(["mine.yaml", "data=jsonl"])
    with pytest.raises(ConfigError, match="train_files: 'c.*' matches no file"):
        compose(["mine.yaml", "train_files=c*.jsonl"])


def test_started_processes_must_match(work, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="num_gpus is 4 but 2 processes were started. Use: torchrun"):
        compose(["mine.yaml", "num_gpus=4"])


def test_a_file_is_named_in_full_from_the_root_of_the_disk(work, monkeypatch):
    (work / "bad.yaml").write_text("defaults: [training, _self_]\ntype: 'fake_arch:Model'\nseed: x\n")
    with pytest.raises(ConfigError, match=r"^bad.yaml:3: seed"):
        compose(["bad.yaml"])
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match=rf"^{work}/bad.yaml:3: seed"):
        compose([f"{work}/bad.yaml"])


@pytest.mark.parametrize(
    ("words", "fields", "why"),
    [
        (["mdl", "model_cfg.sigma_max=5.0"], "model_cfg.sigma_max", "alpha_type=loglinear"),
        (
            ["mdl", "model_cfg.alpha_type=geometric", "model_cfg.alpha_min=0.1"],
            "model_cfg.alpha_min",
            "alpha_type=geometric",
        ),
        (["mdl", "model_cfg.num_timesteps=9"], "model_cfg.num_timesteps", "continuous_time=true"),
        (["sedd", "model_cfg.num_timesteps=9"], "model_cfg.num_timesteps", "nelbo_draws="),
        (["sedd", "model_cfg.sigma_min=0.1"], "model_cfg.sigma_min", "noise_schedule=loglinear"),
        (["sedd", "model_cfg.predictor=euler"], "model_cfg.predictor", "noise_schedule=loglinear"),
        (
            ["bd3lm", "model_cfg.num_sampling_steps=9", "model_cfg.final_step=argmax"],
            "model_cfg.num_sampling_steps, model_cfg.final_step",
            "sampler=first_hitting",
        ),
        (
            ["mdl", "model_cfg.sampler=analytic", "model_cfg.final_step=argmax"],
            "model_cfg.final_step",
            "sampler=analytic",
        ),
        (
            ["d3pm", "model_cfg.zero_mask_logit=true", "model_cfg.l0_mode=x0"],
            "model_cfg.l0_mode",
            "zero_mask_logit=true",
        ),
        (
            ["d3pm", "model_cfg.gaussian_beta_max=0.1"],
            "model_cfg.gaussian_beta_max",
            "noise_schedule=mutual_info",
        ),
        (
            ["d3pm", "model_cfg.noise_schedule=linear", "model_cfg.gaussian_beta_max=0.1"],
            "model_cfg.gaussian_beta_max",
            "transition_type=absorbing",
        ),
        (
            ["vanilla", "model_cfg.ffn_hidden=64", "model_cfg.multiple_of=32"],
            "model_cfg.multiple_of",
            "model_cfg.ffn_hidden=64",
        ),
        (
            ["vanilla", "model_cfg.use_rope=false", "model_cfg.rope_theta=9.0"],
            "model_cfg.rope_theta",
            "use_rope=false",
        ),
        (
            ["mtp", "model_cfg.n_mtp_tokens=1", "model_cfg.isoparam=false", "model_cfg.head_topology=causal"],
            "model_cfg.isoparam, model_cfg.head_topology",
            "(because of model_cfg.n_mtp_tokens=1)",
        ),
        (
            ["mtm", "model_cfg.trunk=moe", "model_cfg.trunk_cfg.bias_update_speed=0.1"],
            "model_cfg.trunk_cfg.bias_update_speed",
            "(because of model_cfg.trunk_cfg.gate_type=mixtral)",
        ),
        (
            ["mtm", "model_cfg.trunk=moe", "model_cfg.trunk_cfg={d_ff_expert: 64, ffn_hidden: 32}"],
            "model_cfg.trunk_cfg.ffn_hidden",
            "model_cfg.trunk_cfg.d_ff_expert=64",
        ),
        (
            ["d3pm", "model_cfg.nearest_neighbors=3"],
            "model_cfg.nearest_neighbors",
            "transition_type=absorbing",
        ),
    ],
)
def test_fields_of_an_architecture_that_another_one_makes_meaningless_are_named(words, fields, why):
    notes = []
    compose([f"model={words[0]}", "preset=nano", *words[1:]], notes.append)
    (note,) = [n for n in notes if n.startswith("not read by this run")]
    assert fields in note and why in note


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["d3pm", "model_cfg.transition_type=gaussian", "model_cfg.noise_schedule=mutual_info"],
            "not defined for transition_type=gaussian. Set it to cosine or linear",
        ),
        (
            [
                "d3pm",
                "model_cfg.transition_type=nearest_neighbor",
                "model_cfg.nn_construction=sinkhorn",
                "model_cfg.nn_embedding_path=x.npy",
            ],
            "not defined for nn_construction=sinkhorn",
        ),
        (
            ["d3pm", "model_cfg.transition_type=nearest_neighbor", "model_cfg.nn_embedding_path=x.npy"],
            "nn_embedding_path: no such file: x.npy",
        ),
        (
            ["mdl", "model_cfg.continuous_time=false", "model_cfg.use_subs_parameterization=false"],
            "sampler=ancestral_cache needs model_cfg.use_subs_parameterization=true",
        ),
        (["moe", "model_cfg.betas=[0,-1]"], r"line: model_cfg.betas.1: must satisfy 0 <= betas.1, got -1$"),
        (["moe", "model_cfg.alphas=[-1]"], r"line: model_cfg.alphas.0: must satisfy 0 <= alphas.0, got -1$"),
        (
            ["mtp", "model_cfg.mtp_loss_weights=[x,1]"],
            r"^command line: model_cfg.mtp_loss_weights.0: expected float, got 'x' \(str\)$",
        ),
        (
            ["mtp", "model_cfg.mtp_loss_weights=[0,0]"],
            r"leaves nothing to train. Nearest: \[1.0, 0.0\], or null",
        ),
        (
            ["mtm", "model_cfg.trunk_cfg=[]"],
            r"^command line: model_cfg.trunk_cfg: expected mapping, got \[\] \(list\)$",
        ),
        (["mtm", "model_cfg.trunk_cfg.norm_eps=x"], r"trunk_cfg.norm_eps: expected float, got 'x' \(str\)$"),
        (
            ["mtm", "model_cfg.trunk_cfg.model_dim=3"],
            "^command line: model_cfg.trunk_cfg.d_model: the trunk has",
        ),
        (["mtm", "model_cfg.n_kv_heads=2"], "Did you mean 'model_cfg.trunk_cfg.n_kv_heads'"),
        (["mtm", "model_cfg.bias=true"], r"Did you mean 'model_cfg.trunk_cfg.bias'\?$"),
        (
            ["sedd", "z_loss=1e-4"],
            r"command line: z_loss \(0.0001\) belongs to a cross-entropy over all tokens, and SEDDAdapter trains type "
            "'sedd' on another objective. Nearest: z_loss=0",
        ),
    ],
)
def test_what_an_architecture_cannot_do_is_said_before_anything_starts(words, message):
    with pytest.raises(ConfigError, match=message):
        compose([f"model={words[0]}", "preset=nano", *words[1:]], lambda text: None)


@pytest.mark.parametrize(
    ("type_", "word"),
    [("sedd", "transition_type=gaussian"), ("moe", "alphas=[-1]"), ("mtp", "mtp_loss_weights=[x]")],
)
def test_one_wrong_value_is_one_problem(type_, word):
    with pytest.raises(ConfigError) as error:
        compose([f"model={type_}", "preset=nano", f"model_cfg.{word}"], lambda text: None)
    assert len(error.value.problems) == 1 and word.partition("=")[0] in error.value.problems[0]


def test_fields_of_a_decoder_within_are_spelled_in_files_and_words_alike(write):
    """One field in two spellings: the word wins, and neither is lost."""
    file = write(
        "within.yaml", "defaults: [mtm, _self_]\nmodel_cfg:\n  trunk_cfg: {num_kv_heads: 2, qk_norm: true}\n"
    )
    for word in ("num_kv_heads=3", "n_kv_heads=3"):
        _, cfg = compose([f"model={file}", "preset=nano", f"model_cfg.trunk_cfg.{word}"], lambda text: None)
        assert (cfg.trunk_config.n_kv_heads, cfg.trunk_config.qk_norm) == (3, True)


def test_a_list_for_a_mapping_in_a_file_is_said(write):
    file = write("within.yaml", "defaults: [mtm, _self_]\nmodel_cfg:\n  trunk_cfg: []\n")
    with pytest.raises(ConfigError, match="Cannot merge DictConfig with ListConfig"):
        compose([f"model={file}", "preset=nano"], lambda text: None)


def test_models_are_listed_by_whole_sentences():
    """`show` prints the first line of each file's comment."""
    for type_ in ARCHITECTURES:
        said = description(CONFIGS / f"{type_}.yaml")
        assert said.endswith(".") and len(said) > 20, said


def test_a_size_on_the_command_line_is_said_to_leave_the_preset_out():
    notes = []
    cfg, _ = compose(["model=mdl", "model_cfg.n_layers=2"], notes.append)
    assert cfg.preset == "none" and any("model_cfg.n_layers is given. Add preset=nano" in n for n in notes)


@pytest.mark.parametrize(
    ("word", "type_", "sequential"), [("base-mtp", "mtp", False), ("deepseek-mtp", "mtp", True)]
)
def test_other_words_for_a_type(work, word, type_, sequential):
    """In a file and on the command line; what goes with a word may be said besides, and not otherwise."""
    (work / "words.yaml").write_text(f"defaults: [training, _self_]\ntype: {word}\n")
    (work / "plain.yaml").write_text("defaults: [training, _self_]\ntype: mtp\n")
    heard: list[str] = []
    of_file = compose(["words.yaml"], notify=heard.append)
    of_line = compose(["plain.yaml", f"type={word}"], notify=heard.append)
    for cfg, model_cfg in (of_file, of_line):
        assert cfg.type == type_ and model_cfg.use_deepseek_mtp is sequential
    assert sum(f"'{word}' is read as '{type_}" in told for told in heard) == 2
    if sequential:
        with pytest.raises(
            ConfigError, match="type: deepseek-mtp is mtp with model_cfg.use_deepseek_mtp=true"
        ):
            (work / "words.yaml").write_text(
                f"defaults: [training, _self_]\ntype: {word}\nmodel_cfg: {{use_deepseek_mtp: false}}\n"
            )
            compose(["words.yaml"])


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("train_seq_len=100", "96, 104"), ("val_seq_len=7", "8"), ("val_seq_len=9", "8, 16")],
)
def test_rows_of_patches_are_whole(work, word, nearest):
    words = ["--hydra_model_cfg=mine.yaml", 'type="fake_arch:Patches"', "preset=none", word]
    length = word.replace("=", " (") + ")"
    with pytest.raises(ConfigError) as caught:
        compose(words, notify=lambda text: None)
    assert caught.value.problems == [
        f"command line: {length} must be a multiple of model_cfg.patch (8); nearest: {nearest}"
    ]
    compose([*words[:-1], "train_seq_len=96", "val_seq_len=8"], notify=lambda text: None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("use_lora", "it has moved: use the top-level field use_lora"),
        ("num_chapters", "the fields of type 'memory' are flat: use model_cfg.num_chapters"),
        ("nonsense", "there is no such section"),
    ],
)
def test_a_section_of_flat_fields_is_told_where_they_are(name, expected):
    with pytest.raises(ConfigError) as raised:
        compose(["--hydra_model_cfg=memory", f"model_cfg.memory.{name}=1"], notify=lambda _: None)
    (problem,) = raised.value.problems
    assert problem.startswith(f"command line: unknown key 'model_cfg.memory.{name}'") and expected in problem


def test_words_of_others_in_a_section_are_told_by_our_names_and_lines(work):
    inner = "model_cfg:\n  section:\n    num_layers: 3\n"
    (work / "other.yaml").write_text(f"defaults: [mine, _self_]\n{inner}")
    with pytest.raises(ConfigError, match=r"^other.yaml:4: .*are flat: use model_cfg.n_layers$"):
        compose(["other.yaml"], notify=lambda _: None)
