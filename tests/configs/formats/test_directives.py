"""`.config` files: how they are read, what each key means, inheritance, and what is said of mistakes."""

from __future__ import annotations

import random

import pytest

from configs import compose
from configs.compose import prepare
from configs.files import CONFIGS, read
from configs.formats import directives
from configs.formats.gpt_keys import TABLE
from configs.messages import ConfigError
from tests.configs.formats.composed import quiet, refused

SIZES = "MODEL n_layer=2 n_head=2 n_embd=64\nDATA block_size=32 batch_size=4\n"


@pytest.fixture
def stored(tmp_path):
    """A file of this text; its path as a word of the command line."""

    def store(text, name="mine.config"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return store


def slow(*names: str):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


def pairs(stored, text: str) -> dict[str, object]:
    path = CONFIGS / stored(text)
    return {f"{e.section} {e.key}": e.value for e in directives.load(path, "x")[1]}


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("True", True),
        ("false", False),
        ("None", None),
        ("null", None),
        ("+12", 12),
        ("1_000", 1000),
        ("0", 0),
        ("-0", 0),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("5.", 5.0),
        ("3e3", 3000.0),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("0x10", "0x10"),
        ("a#b", "a#b"),
        ("a=b", "a=b"),
        ('a"b', 'a"b'),
        ('"12"', "12"),
        ("'a b # c'", "a b # c"),
        (r'"a\"\\\n\t"', 'a"\\\n\t'),
        ("[]x", None),
        ("[1,a,[.5,'b c']]", [1, "a", [0.5, "b c"]]),
        ("[ q_proj , v_proj ]", ["q_proj", "v_proj"]),
    ],
)
def test_a_value_is_what_it_looks_like_and_in_quotes_text(stored, written, value):
    if written == "[]x":  # an empty list has no value, and nothing follows a value
        with pytest.raises(ConfigError):
            pairs(stored, f"ADVANCED k={written}")
        return
    (found,) = pairs(stored, f"ADVANCED k={written}").values()
    assert found == value and type(found) is type(value)


def test_lines_are_joined_comments_and_blanks_left_out(stored):
    text = "\n  # one\nMODEL n_layer=1 # two\n\tDATA batch_size=2\\\n block_size=3 \\\n"
    text += "  dataset='x' # \\\nTRAIN beta1=.5\n"
    assert pairs(stored, text) == {
        "MODEL n_layer": 1,
        "DATA batch_size": 2,
        "DATA block_size": 3,
        "DATA dataset": "x",
        "TRAIN beta1": 0.5,
    }


def test_marks_and_line_ends_of_editors_change_nothing(stored):
    text = "MODEL n_layer=2 \\\n n_head=2\nENV A=x\n"
    edited = stored(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), "edited.config")
    assert read(CONFIGS / edited).values == read(CONFIGS / stored(text)).values


def test_any_value_in_quotes_comes_back_as_it_is(stored):
    rng = random.Random(5)
    letters = "ab \\\"'#=[],\n\t.é$0"
    values = ["".join(rng.choices(letters, k=rng.randrange(12))) for _ in range(300)]
    quoted = [v.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for v in values]
    text = "".join(f'ADVANCED k{i}="{q}"  # {q}\n' for i, q in enumerate(quoted))
    assert list(pairs(stored, text).values()) == values


# --- meaning ---------------------------------------------------------------------------------------------

MEANING = {
    "MODEL n_layer=3": {"model_cfg.n_layers": 3},
    "MODEL n_head=2": {"model_cfg.n_heads": 2},
    "MODEL n_embd=64": {"model_cfg.d_model": 64},
    "MODEL dropout=0": {"model_cfg.dropout": 0},
    "MODEL bias=True": {"model_cfg.bias": True},
    "MODEL vocab_size=300": {"model_cfg.vocab_size": 300},
    "MODEL use_rope=false": {"model_cfg.use_rope": False},
    "MODEL use_rmsnorm=false": {"model_cfg.use_rmsnorm": False},
    "MODEL use_swiglu=false": {"model_cfg.use_swiglu": False},
    "MODEL block_size=16": {"model_cfg.n_ctx": 16, "train_seq_len": 16, "val_seq_len": None},
    "MODEL type=gpt2": {"type": "gpt2"},
    "MODEL rope_theta=500": {"model_cfg.rope_theta": 500},
    "MODEL num_kv_heads=2": {"model_cfg.n_kv_heads": 2},
    "DATA dataset=owt": {
        "data": "bin",
        "train_files": "data/owt/train*.bin",
        "val_files": "data/owt/val*.bin",
    },
    "DATA block_size=16": {"model_cfg.n_ctx": 16, "train_seq_len": 16, "val_seq_len": None},
    "DATA batch_size=6": {"global_batch_size": 6, "batch_size": "auto", "gradient_accumulation_steps": None},
    "DATA batch_size=6 gradient_accumulation_steps=4": {"global_batch_size": 24, "batch_stages": None},
    "TRAIN learning_rate=1e-3": {"learning_rate": 1e-3},
    "TRAIN weight_decay=0": {"weight_decay": 0},
    "TRAIN max_iters=7": {"num_iterations": 7},
    "TRAIN beta1=.8 beta2=.9": {"adam_beta1": 0.8, "adam_beta2": 0.9},
    "TRAIN grad_clip=0.0": {"max_grad_norm": 0.0},
    "TRAIN init_from=scratch": {"resume": "none", "init_from_checkpoint": None},
    "TRAIN init_from=resume": {"resume": "auto", "init_from_checkpoint": None},
    "TRAIN init_from=weights": {"resume": "none", "init_from_checkpoint": "weights"},
    "LR_SCHEDULE decay_lr=True": {"scheduler": "cosine"},
    "LR_SCHEDULE decay_lr=False": {"scheduler": "constant"},
    "LR_SCHEDULE warmup_iters=9": {"warmup_steps": 9, "warmup_ratio": None},
    "LR_SCHEDULE lr_decay_iters=9 min_lr=1e-5": {"lr_decay_steps": 9, "min_lr": 1e-5},
    "SYSTEM device=cuda:1 seed=3": {"device": "cuda:1", "seed": 3},
    "SYSTEM dtype=float32": {"mixed_precision": "no"},
    "SYSTEM dtype=bfloat16": {"mixed_precision": "bf16"},
    "SYSTEM dtype=float16": {"mixed_precision": "fp16"},
    "SYSTEM compile=False": {"torch_compile": False},
    "LOGGING out_dir=o": {"output_dir": "o"},
    "LOGGING eval_interval=1 log_interval=2 eval_iters=3": {
        "val_loss_every": 1,
        "logging_steps": 2,
        "val_steps": 3,
    },
    "LOGGING always_save_checkpoint=False": {"save_checkpoint": True, "save_only_best": True},
    "LOGGING always_save_checkpoint=True": {"save_checkpoint": True, "save_only_best": False},
    "LOGGING eval_only=True wandb_log=False": {"eval_only": True, "use_wandb": False},
    "LOGGING wandb_project=p wandb_run_name='2024'": {"wandb_project": "p", "wandb_run_name": "2024"},
    "DDP backend=gloo num_gpus=2": {"ddp_backend": "gloo", "num_gpus": 2},
    "DDP strategy=ddp": {},
    "ADVANCED ema_decay=.5": {"ema_decay": 0.5},
    "ADVANCED multiple_of=32": {"model_cfg.multiple_of": 32},
    "ADVANCED n_layers=4": {"model_cfg.n_layers": 4},
    "ADVANCED kernels.attention=sdpa": {"kernels.attention": "sdpa"},
    "ADVANCED kernels=reference": {"kernels.default": "reference"},
    "ADVANCED lora_targets=[q_proj,v_proj]": {"lora_targets": ["q_proj", "v_proj"]},
    "ENV A=True B=007 C='x y'": {"env.A": "True", "env.B": "007", "env.C": "x y"},
}


def flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@pytest.mark.parametrize("line", MEANING)
def test_a_key_is_these_fields_and_no_others(stored, line):
    found = dict(flat(read(CONFIGS / stored(line)).values))
    wanted = {"type": "vanilla", **MEANING[line]}
    assert wanted.items() <= found.items()
    assert all(type(found[k]) is type(v) for k, v in wanted.items())
    rows = {"global_batch_size", "batch_size", "gradient_accumulation_steps", "batch_stages"}
    assert found.keys() - wanted.keys() <= (rows if "batch_size" in line else set())


def test_every_key_of_the_table_has_its_meaning_above():
    said = {tuple(pair) for line in MEANING for pair in _keys(line)}
    assert said >= {(section, key) for section, keys in TABLE.items() for key in keys}


def _keys(line):
    section, *rest = line.split(" ")
    return [(section, word.partition("=")[0]) for word in rest if "=" in word]


@pytest.mark.parametrize("name", [*slow("small", "standard", "large"), "inheritance-test"])
def test_shipped_files_are_what_they_say(name):
    sizes = {
        "small": (2, 128, 4, 32),
        "standard": (6, 384, 6, 32),
        "large": (12, 768, 12, 480),
        "inheritance-test": (8, 512, 8, 16),
    }
    cfg, model_cfg = quiet(str(CONFIGS / f"{name}.config"))
    found = (model_cfg.n_layers, model_cfg.d_model, model_cfg.n_heads, cfg.global_batch_size)
    assert cfg.type == "vanilla" and cfg.preset == "none" and found == sizes[name]
    assert {p.stem for p in CONFIGS.glob("*.config")} == set(sizes)


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ("TRAIN learning_rate=3e-4", [], True),
        ("TRAIN max_iters=3", [], False),
        ("TRAIN max_iters=3", ["learning_rate=3e-4"], True),
        ("TRAIN max_iters=3", ["learning_rate=3e-4", "muon_learning_rate=0.01"], False),
        ("TRAIN learning_rate=3e-4\nADVANCED optimizer=adamw", [], False),
    ],
)
def test_a_rate_that_is_not_that_of_the_matrices_is_said_to_be_so(stored, file, words, said):
    notices: list[str] = []
    compose([stored(file), *words], notify=notices.append)
    found = [text for text in notices if "everything but the matrices" in text]
    assert len(found) == said
    assert (
        not said
        or "learning_rate (0.0003)" in found[0]
        and "muon steps at muon_learning_rate (0.02)" in found[0]
    )


def test_the_command_line_wins_and_what_batch_size_is_there_is_said():
    said: list[str] = []
    words = ["--hydra_model_cfg=configs/small.config", "--batch_size=16", "model_cfg.n_layers=3"]
    cfg, model_cfg = compose(words, notify=said.append)
    assert (cfg.batch_size, cfg.global_batch_size, model_cfg.n_layers) == (16, 32, 3)
    assert any("rows of a micro-step" in text and "32" in text for text in said)
    assert any("taken as vanilla (gpt2: MODEL type=gpt2)" in text for text in said)


@pytest.mark.parametrize("type_", [*slow("mdl", "ngpt", "current-best", "gpt2"), "mamba"])
def test_any_architecture_can_be_named(stored, type_):
    sizes = SIZES if type_ != "mamba" else SIZES.replace("n_head=2 ", "")
    cfg, model_cfg = quiet(stored(f"MODEL type={type_}\n{sizes}"))
    assert (cfg.type, model_cfg.n_layers, cfg.train_seq_len) == (type_.replace("-best", "_best_gpt"), 2, 32)


def test_a_key_under_model_is_the_types_own_field_and_under_data_the_context(stored):
    text = "MODEL type=bd3lm n_layer=2 n_embd=64 n_head=2 block_size=8\nDATA block_size=32 batch_size=4\n"
    cfg, model_cfg = quiet(stored(text))
    assert (model_cfg.block_length, model_cfg.n_ctx, cfg.train_seq_len) == (8, 32, 32)


# --- FROM ------------------------------------------------------------------------------------------------


def test_a_chain_is_applied_from_its_root_and_mistakes_are_told_where_they_are(stored):
    stored(SIZES + "ENV A=1 B=2\nADVANCED ema_decay=0.5\n", "root.config")
    stored("FROM root\nMODEL n_layer=3\nENV B=3\n", "middle.config")
    cfg, model_cfg = quiet(stored("FROM middle.config\nDATA gradient_accumulation_steps=5\n"))
    assert (model_cfg.n_layers, model_cfg.d_model, cfg.ema_decay) == (3, 64, 0.5)
    assert (cfg.env, cfg.global_batch_size) == ({"A": "1", "B": "3"}, 20)
    (problem,) = refused(stored("FROM middle\nMODEL n_embd=65\n"))
    assert "mine.config:2" in problem and "65" in problem and "divisible by model_cfg.n_heads (2)" in problem


def test_the_type_at_the_end_of_a_chain_decides_what_its_root_means(stored):
    stored(SIZES, "root.config")
    cfg, model_cfg = quiet(stored("FROM root\nMODEL type=gpt2\n"))
    assert cfg.type == "gpt2" and not hasattr(model_cfg, "use_rope") and model_cfg.n_layers == 2


def test_files_of_other_formats_can_be_built_on(stored):
    cfg, model_cfg = quiet(stored("FROM tiny.json\nMODEL n_layer=2\nDATA gradient_accumulation_steps=3\n"))
    assert (cfg.type, model_cfg.n_layers, model_cfg.d_model, cfg.global_batch_size) == ("gpt2", 2, 192, 48)
    stored("defaults: [sedd]\nmodel_cfg: {n_layers: 5}\n", "mine.yaml")
    cfg, model_cfg = quiet(stored("FROM mine.yaml\nDATA batch_size=4\n"))
    assert (cfg.type, model_cfg.n_layers, cfg.global_batch_size) == ("sedd", 5, 4)
    (problem,) = refused(stored("FROM tiny.json\nMODEL type=sedd\n"))
    assert "type sedd" in problem and "tiny.json, on which it builds, is of type gpt2" in problem


def test_an_inherited_value_that_does_not_fit_is_named_with_its_file(stored):
    text = "FROM standard.config\nMODEL n_layer=8 n_embd=512\nDATA batch_size=16\nLOGGING wandb_run_name=custom\n"
    (problem,) = refused(stored(text))
    assert "model_cfg.d_model (512) must be divisible by model_cfg.n_heads (6)" in problem
    assert "standard.config:2" in problem


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_is_shown(stored, length):
    names = ["mine.config", *(f"{i}.config" for i in range(1, length))]
    for name, parent in zip(names, [*names[1:], names[0]], strict=True):
        path = stored(f"FROM {parent}\n", name)
    (problem,) = refused(path.replace(names[-1], "mine.config"))
    order = [problem.index(f"/{name} -> ") for name in names]
    assert "inheritance cycle: " in problem and order == sorted(order) and problem.endswith("mine.config")


def test_a_parent_is_looked_for_beside_the_file_and_then_in_configs_alone(stored, tmp_path):
    (missing,) = refused(stored("\nFROM base\n"))
    places = [f"{tmp_path}/base", f"{tmp_path}/base.config", "configs/base", "configs/base.config"]
    assert "mine.config:2: FROM 'base': no such config (tried" in missing
    assert [missing.index(p) for p in places] == sorted(missing.index(p) for p in places)
    outside = stored(SIZES, "a/outside.config")
    for reference in ("../a/outside.config", outside):
        (problem,) = refused(stored(f"FROM {reference}\n", "b/mine.config"))
        assert "mine.config:1" in problem and f"leads to {outside}, out of" in problem
    said: list[str] = []
    compose([stored(f"FROM {CONFIGS}/small.config\n")], notify=said.append)
    assert any(f"mine.config:1: FROM leads to {CONFIGS}/small.config" in text for text in said)
    (tmp_path / "b" / "link.config").symlink_to(outside)
    assert "out of" in refused(stored("FROM link\n", "b/mine.config"))[0]


def test_paths_that_lead_away_are_said_before_the_start(stored, tmp_path):
    said: list[str] = []
    text = f"{SIZES}LOGGING out_dir={tmp_path}/run wandb_project=/x\nADVANCED input_file=../mine.txt data_root=here\n"
    plan = prepare([stored(text)])
    said = [text for text in plan.notices if "leads to" in text]
    assert len(said) == 2
    assert any(f"mine.config:3: out_dir leads to {tmp_path}/run" in text for text in said)
    assert any("mine.config:4: input_file leads to /" in text for text in said)


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("MODEL n_layer=2\nMODLE n_head=2", [":2: unknown directive 'MODLE'. Did you mean 'MODEL'?"]),
        ("model n_layer=2", [":1: unknown directive 'model'"]),
        ("n_layer=2", [":1: expected a directive before 'n_layer=2'"]),
        ("\nMODEL learning_rate=1", [":2: 'learning_rate' belongs under TRAIN, not MODEL"]),
        ("MODEL ema_decay=0.5", [":1: 'ema_decay' belongs under ADVANCED, not MODEL"]),
        ("ADVANCED max_iters=3", [":1: 'max_iters' belongs under TRAIN, not ADVANCED"]),
        ("ADVANCED env.A=3", ["belongs under ENV"]),
        ("ADVANCED defaults=[x]", [":1: unknown key 'defaults'"]),
        ("ADVANCED hydra.run.dir=x", [":1: unknown key 'hydra.run.dir'"]),
        ("ADVANCED model_cfg=3", [":1: unknown key 'model_cfg'"]),
        ("TRAIN num_iterations=3", [":1: unknown key 'num_iterations'", "TRAIN max_iters"]),
        ("TRAIN max_iter=3", [":1: unknown key 'max_iter'. Did you mean 'max_iters'?"]),
        ("MODEL n_layers_=3", [":1: unknown key 'n_layers_'. Did you mean 'n_layers'"]),
        ("MODEL n_layer=2\n\nMODEL n_layer=2", [":3: 'n_layer' was already set on line 1"]),
        ("MODEL n_layer=2 n_layer=2", [":1: 'n_layer' was already set on line 1"]),
        (
            "MODEL n_layer=2\nADVANCED n_layers=2",
            [":2: 'n_layers' sets model_cfg.n_layers, as 'n_layer' on line 1"],
        ),
        ("DATA batch_size=2\nADVANCED global_batch_size=4", ["sets global_batch_size, as"]),
        ("MODEL n_layer", [":1: expected key=value, got 'n_layer'"]),
        ("MODEL n_layer = 2", [":1: expected key=value, got 'n_layer'"]),
        ("MODEL n_layer= 2", [":1: expected key=value, got 'n_layer='"]),
        ("MODEL n_layer=", [":1: expected key=value, got 'n_layer='"]),
        ("MODEL", [":1: expected key=value behind MODEL"]),
        ("MODEL # n_layer=2", [":1: expected key=value behind MODEL"]),
        ("ENV lower=2", [":1: expected key=value, got 'lower=2'"]),
        ("MODEL n_layer='2", [":1: the quote is not closed"]),
        ("MODEL n_layer='2'3", [":1: expected a blank behind '2'"]),
        (r"MODEL type='\q'", [r":1: \q stands for nothing"]),
        ("ADVANCED lora_targets=[a", [":1: the list is not closed"]),
        ("ADVANCED lora_targets=" + "[" * 60 + "]" * 60, ["nested 50 deep at most"]),
        ("MODEL dropout=nan", [":1: expected a finite number, got nan"]),
        ("MODEL dropout=-inf", [":1: expected a finite number, got -inf"]),
        ("MODEL dropout=1e999", [":1: expected a finite number, got 1e999"]),
        ("MODEL n_layer=010", [":1: 010 begins with a zero. Write 10"]),
        ("MODEL n_layer=" + "9" * 5000, ["300 digits at most"]),
        ("DATA batch_size=2.0", [":1: batch_size: expected int, got 2.0 (float)"]),
        ("DATA batch_size=True", [":1: batch_size: expected int, got True (bool)"]),
        ("DATA batch_size=0", [":1: batch_size: must satisfy batch_size >= 1, got 0. Nearest: 1"]),
        (
            "DATA gradient_accumulation_steps=2",
            [":1: gradient_accumulation_steps means nothing without batch_size"],
        ),
        ("DATA dataset=../x", [":1: dataset: the name of a folder in data/"]),
        ("SYSTEM dtype=bfloat", [":1: dtype: 'bfloat' is not one of", "Did you mean 'bfloat16'"]),
        ("LR_SCHEDULE decay_lr=1", [":1: decay_lr: expected true or false, got 1"]),
        ("DDP strategy=fsdp", [":1: strategy: 'fsdp' is not offered"]),
        ("LOGGING out_dir='${oc.env:HOME}'", [":1: '${oc.env:HOME}': '${'"]),
        ("MODEL n_layer=2\nFROM small", [":2: FROM is the first directive"]),
        ("FROM small\nFROM large", [":2: FROM is the first directive"]),
        ("FROM", [":1: FROM takes the name of one file, got nothing"]),
        ("FROM small large", [":1: FROM takes the name of one file"]),
        ("FROM schema.toml", ["no such config (tried"]),
        ("FROM README.md", [":1: FROM 'README.md': cannot read '.md'"]),
        ("MODEL type=seddd", [":1:", "seddd", "Did you mean 'sedd'?"]),
        ("MODEL type=3", [":1: type: expected a name, got 3"]),
        # what the schema and the architecture say, with the line of the file
        ("TRAIN max_iters=3e3", [":1: num_iterations: expected int, got 3000.0 (float). Write 3000"]),
        ("MODEL n_layer='2'", [":1: model_cfg.n_layers: expected int, got '2' (str)"]),
        ("MODEL dropout=1.5", [":1: model_cfg.dropout: must satisfy 0 <= dropout <= 1, got 1.5"]),
        ("LOGGING wandb_run_name=2024", [":1: wandb_run_name: expected str or null, got 2024 (int)"]),
        ("LOGGING wandb_log=maybe", [":1: use_wandb: 'maybe' is not one of"]),
        (
            "MODEL n_embd=770",
            [":1: model_cfg.d_model (770) must be divisible by model_cfg.n_heads (12)", "768"],
        ),
        ("MODEL type=gpt2 use_rope=True", [":1:", "use_rope", "gpt2"]),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_mistakes_are_told_with_their_line(stored, text, parts):
    told = "\n".join(refused(stored(text)))
    assert "mine.config" in told and all(part in told for part in parts), told


def test_all_problems_of_a_file_are_told_together(stored):
    problems = refused(stored("MODEL n_layer\nMODLE a=1\nDATA =2\n"))
    assert [p.partition("mine.config:")[2][0] for p in problems] == ["1", "2", "3"]
    problems = refused(stored("MODEL foo=1\nDATA bar=1\n"))
    assert len(problems) == 2


def test_text_that_is_not_utf8_is_refused(stored):
    assert "not UTF-8 text" in refused(stored(b"MODEL type=\xff"))[0]


@pytest.mark.parametrize("name", [*slow("PYTHONPATH", "PATH", "CXX"), "LD_PRELOAD"])
def test_no_file_changes_what_programs_load_and_the_command_line_may(stored, name):
    for file in (
        stored(f"{SIZES}ENV A=1 {name}=/x\n"),
        stored(f"defaults: [vanilla]\nenv:\n  {name}: /x\n", "m.yaml"),
    ):
        (problem,) = refused(file)
        assert ":3: " in problem and f"env.{name} changes what programs load" in problem
        assert quiet(file, f"env.{name}=/y")[0].env[name] == "/y"
    stored(f"ENV {name}=/x\n", "parent.config")
    assert f"parent.config:1: env.{name}" in refused(stored("FROM parent\n"))[0]


def test_a_name_that_only_looks_like_one_of_those_is_free(stored):
    assert quiet(stored(f"{SIZES}ENV LDAP_HOST=a MY_PATH=b PYTHONUTF8=1\n"))[0].env["MY_PATH"] == "b"
