"""Python files of settings: what is read of them, and that nothing in them is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import compose
from configs.compose import prepare
from configs.files import read
from configs.formats import legacy_py
from tests.configs.formats.composed import quiet, refused

SETTINGS = '''"""A small model of characters."""
out_dir = "out"
eval_interval = 250  # often
always_save_checkpoint = False
_name = "mini"
wandb_run_name = f"{_name}-gpt-{eval_interval}"
gradient_accumulation_steps = 5 * 2
batch_size = 4
block_size = 32
n_layer = 2
n_head = n_layer
n_embd = 64
learning_rate: float = 1e-3
max_iters = 5_000
lr_decay_iters = max_iters
min_lr = learning_rate / 10
'''


@pytest.fixture
def stored(tmp_path):
    """A file of this text; its path as a word of the command line."""

    def store(text, name="train_mine.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return store


def value_of(stored, expression: str, before: str = ""):
    entries = legacy_py.load(Path(stored(f"{before}x = {expression}\n")), "x")
    (entry,) = (e for e in entries if e.key == "x")
    return entry.value


def test_a_file_of_settings_is_a_run_and_the_command_line_wins(stored):
    said: list[str] = []
    cfg, model_cfg = compose(
        [stored(SETTINGS), "num_iterations=7", "lr_decay_steps=null"], notify=said.append
    )
    assert (cfg.type, cfg.output_dir, cfg.save_only_best, cfg.wandb_run_name) == (
        "vanilla",
        "out",
        True,
        "mini-gpt-250",
    )
    assert (cfg.global_batch_size, cfg.train_seq_len, cfg.num_iterations) == (40, 32, 7)
    assert (model_cfg.n_layers, model_cfg.n_heads, model_cfg.d_model) == (2, 2, 64)
    assert (cfg.learning_rate, cfg.min_lr) == (1e-3, 1e-4)
    assert any("taken as vanilla (gpt2: type = 'gpt2')" in text for text in said)


@pytest.mark.parametrize(
    ("words", "rows", "said"),
    [
        (["--batch_size=6"], (6, 60), "a step has the 60 of "),
        (["--batch_size=16"], (16, 80), "batch_size 16 times the gradient_accumulation_steps of "),
        (["--batch_size=16", "gradient_accumulation_steps=2"], (16, 32), None),
        (["--batch_size=16", "global_batch_size=48"], (16, 48), None),
    ],
    ids=["a part of them", "no part of them", "both", "the whole"],
)
def test_rows_on_the_command_line(stored, words, rows, said):
    """Of a file whose steps have 60."""
    notices: list[str] = []
    file = stored("n_layer = 2\nn_head = 2\nn_embd = 64\nbatch_size = 12\ngradient_accumulation_steps = 5\n")
    cfg, _ = compose([str(file), *words], notify=notices.append)
    assert (cfg.batch_size, cfg.global_batch_size) == rows
    assert [text for text in notices if "batch_size" in text and said and said in text] or said is None


def test_it_means_what_the_same_keys_mean_as_directives(stored):
    keys = {"MODEL": ["n_layer=2", "n_embd=64", "n_head=2"], "DATA": ["block_size=32", "batch_size=4"]}
    keys |= {"LR_SCHEDULE": ["decay_lr=True", "warmup_iters=3"], "SYSTEM": ["dtype='float32'"]}
    as_python = "".join(f"{key}\n" for pairs in keys.values() for key in pairs)
    as_directives = "".join(f"{name} {' '.join(pairs)}\n" for name, pairs in keys.items())
    assert read(Path(stored(as_python))).values == read(Path(stored(as_directives, "mine.config"))).values


def test_files_can_be_built_on_and_named_types_are_taken(stored):
    stored("type = 'gpt2'\nn_layer = 2\nbatch_size = 3\n", "base.py")
    cfg, model_cfg = quiet(stored("FROM base.py\nDATA gradient_accumulation_steps=4\n", "mine.config"))
    assert (cfg.type, model_cfg.n_layers, cfg.global_batch_size) == ("gpt2", 2, 12)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("-2", -2),
        ("not True", False),
        ("None", None),
        ("7 // 2 + 7 % 4 - 2 ** 3 * 1.5", 3 + 3 - 12.0),
        ("(1, [2.5, 'a'], {'b': 1})", [1, [2.5, "a"], {"b": 1}]),
        ("'a' + \"b\"", "ab"),
        ("0x10", 16),
        ("1_000", 1000),
    ],
)
def test_values_are_those_of_python(stored, expression, value):
    found = value_of(stored, expression)
    assert found == value and type(found) is type(value)


def test_the_last_of_several_assignments_counts_as_in_python(stored):
    entries = legacy_py.load(Path(stored("a = b = 1\nb = a + 1\n_c = 3\n")), "x")
    assert [(e.key, e.value, e.line) for e in entries] == [("a", 1, 1), ("b", 2, 2)]


def test_marks_and_line_ends_of_editors_change_nothing(stored):
    edited = stored(b"\xef\xbb\xbf" + SETTINGS.replace("\n", "\r\n").encode(), "edited.py")
    assert read(Path(edited)).values == read(Path(stored(SETTINGS))).values


ATTACKS = [
    "import os\nos.system('touch {marker}')",
    "from pathlib import Path",
    "x = open('{marker}', 'w')",
    "open('{marker}', 'w')",
    "x: open('{marker}', 'w') = 1\nx.y = 2",
    "def f(): pass",
    "f = lambda: open('{marker}', 'w')",
    "x = [open('{marker}', 'w') for _ in (1,)]",
    "x = (y := 1)",
    "if True:\n    x = open('{marker}', 'w')",
    "for x in open('{marker}', 'w'): pass",
    "while open('{marker}', 'w'): pass",
    "with open('{marker}', 'w'): pass",
    "x = [*open('{marker}', 'w')]",
    "x = {{**open('{marker}', 'w')}}",
    'x = f\'{{open("{marker}", "w")}}\'',
    "a = 1\nx = f'{{a!r}}'",
    "a = 1\nx = f'{{a:>9999999}}'",
    "x = ''.join([])",
    "a = [1]\nx = a[0]",
    "x = 1 if open('{marker}', 'w') else 2",
    "x = open('{marker}', 'w') or 1",
    "x = 1 < 2",
    "x += 1",
    "a, b = 1, 2",
    "a = [1]\na[0] = 2",
    "x: int",
    "del x",
    "assert open('{marker}', 'w')",
    "class A: x = open('{marker}', 'w')",
    "@open('{marker}', 'w')\ndef f(): pass",
    "async def f(): pass",
    "x = await_",
    "x = 1j",
    "x = b'a'",
    "x = ...",
    "x = 'a' * 3",
    "x = [1] + [2]",
    "x = '%d' % 3",
    "x = True + 1",
    "x = ~1",
    "x = 1 << 2",
    "x = 1 @ 2",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_more_than_a_value_is_refused_and_not_run(stored, tmp_path, attack):
    marker = tmp_path / "marker"
    text = attack.format(marker=marker)
    told = refused(stored(f"n_layer = 2\n{text}\n"))
    assert (
        "train_mine.py:" in told[0] and "may only assign literals" in told[0] and "is not allowed" in told[0]
    )
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("n_layer = 2\nimport time\n", [":2: 'import time' is not allowed"]),
        (
            "wandb_run_name = 'ft-' + str(time.time())",
            [":1: 'wandb_run_name = 'ft-' + str(time.time())'", "set wandb_run_name on the command line"],
        ),
        ("n_layer = n_layers", [":1:", "n_layers is not assigned above"]),
        ("n_layer = 1 / 0", [":1:", "division by zero"]),
        ("n_layer = 2 ** 65", ["an exponent is at most 64"]),
        ("n_layer = (-8) ** 0.5", ["complex"]),
        ("n_layer = 10 ** 19", ["a number is finite and at most 1e+18"]),
        ("n_layer = 0x" + "f" * 100_000, ["a number is finite and at most 1e+18"]),
        ("n_layer = 1e999", ["a number is finite"]),
        ("n_layer = 1e17 * 1e17 - 1e999", ["a number is finite"]),
        ("n_layer = " + "[" * 60 + "]" * 60, ["nested 50 deep at most"]),
        ("n_layer = " + "(" * 5000, ["train_mine.py:1"]),
        ("n_layer = " + "-" * 100_000 + "1", ["train_mine.py"]),
        ("n_layer = " + "9" * 5000, ["train_mine.py"]),
        ("_a = 'x'\n" + "_a = _a + _a\n" * 60, ["10000 letters and entries at most"]),
        ("_a = [1]\n" + "_a = [_a, _a, _a, _a]\n" * 40, ["10000 letters and entries at most"]),
        ("n_layer = 2 +", [":1: not Python: invalid syntax"]),
        ("n_layer = 010", [":1: not Python"]),
        ("x = 1\n" * 300_000, ["characters, and a file of settings 1048576 at most"]),
        (
            "n_layer = 2\n\nnum_iterations = 3",
            [":3: unknown key 'num_iterations'. Did you mean 'max_iters'?"],
        ),
        ("n_layers = 2", [":1: unknown key 'n_layers'. Did you mean 'n_layer'?"]),
        ("colour = 2", [":1: unknown key 'colour'. Known: always_save_checkpoint,"]),
        ("batch_size = 2.0", [":1: batch_size: expected int, got 2.0 (float)"]),
        ("out_dir = '${oc.env:HOME}'", [":1: '${oc.env:HOME}'"]),
        ("dataset = '../../etc'", [":1: dataset: the name of a folder in data/"]),
        ("type = 'seddd'", [":1:", "Did you mean 'sedd'?"]),
        # what the schema and the architecture say
        ("learning_rate = '3'", [":1: learning_rate: expected float, got '3' (str)"]),
        ("\nn_embd = 770", [":2: model_cfg.d_model (770) must be divisible by", "768"]),
        ("n_embd = {}", [":1: model_cfg.d_model: expected int, got {} (dict)"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_mistakes_are_told_with_their_line(stored, text, parts):
    told = "\n".join(refused(stored(text)))
    assert "train_mine.py" in told and all(part in told for part in parts), told


def test_of_a_program_no_more_than_the_beginning_is_told():
    assert len(refused("configs/schema.py")) == 5


def test_a_pattern_means_python_files_where_it_ends_so(stored, tmp_path):
    stored("n_layer = 2\n")
    stored("defaults: [vanilla]\n", "mine.yaml")
    for pattern, names in (("*", ["mine.yaml"]), ("*.py", ["train_mine.py"])):
        plan = prepare([f"--hydra_model_cfg={tmp_path}/{pattern}", "-m"])
        assert [model.path.name for model in plan.models.values()] == names
