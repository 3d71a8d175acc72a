"""JSON files of sizes: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import json

import pytest

from adapters import build_adapter
from configs import compose
from configs.compose import prepare, tree_of
from configs.files import CONFIGS, read
from data.tokenizers import ByteTokenizer
from tests.configs.formats.composed import quiet, refused

# layers, heads, width, context, rows, dropout; parameters of the built model with its output tied and by itself
SHIPPED = {
    "tiny": (4, 4, 192, 128, 16, 0.1, 11_454_144, 21_112_512),
    "small": (6, 6, 384, 256, 32, 0.2, 30_036_864, 49_353_600),
    "150M": (16, 12, 768, 256, 32, 0.2, 152_101_632, 190_735_104),
    "200M": (16, 14, 896, 256, 32, 0.2, 199_472_000, 244_544_384),
    "250M": (16, 16, 1024, 256, 32, 0.2, 253_133_824, 304_645_120),
    "code": (16, 12, 768, 512, 32, 0.1, None, None),
    "shakespeare": (8, 6, 384, 256, 32, 0.2, None, None),
}
PLAIN = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "dropout": 0.25, "bias": True}


@pytest.fixture
def stored(tmp_path):
    """A file of these entries, and of text as it is."""

    def store(entries, name="mine.json"):
        path = tmp_path / name
        path.write_bytes(
            entries if isinstance(entries, bytes) else json.dumps(entries, indent=1).encode("utf-8")
        )
        return path

    return store


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("small", "code") else [pytest.mark.slow]) for n in SHIPPED]
)
def test_a_shipped_file_is_a_gpt2_of_its_sizes(name):
    layers, heads, width, context, rows, dropout, *_ = SHIPPED[name]
    cfg, model_cfg = quiet(str(CONFIGS / f"{name}.json"))
    sizes = {"n_layers": layers, "n_heads": heads, "d_model": width, "n_ctx": context, "vocab_size": 50304}
    assert cfg.type == "gpt2" and cfg.preset == "none"
    assert sizes.items() <= model_cfg.model_dump().items()
    assert (model_cfg.dropout, model_cfg.bias) == (dropout, False)
    assert (cfg.train_seq_len, cfg.global_batch_size, cfg.batch_size) == (context, rows, "auto")


def test_a_size_alone_is_the_file_of_that_size():
    (alone, alone_cfg), (file, file_cfg) = quiet("preset=tiny"), quiet(str(CONFIGS / "tiny.json"))
    assert alone_cfg == file_cfg and alone == file.model_copy(update={"preset": "tiny"})
    assert "no model chosen" in refused("preset=nano")[0]  # of which there is none


def test_every_json_file_in_configs_is_shipped():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(SHIPPED)


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        pytest.param(n, tied, marks=[] if tied and n in ("tiny", "150M") else [pytest.mark.slow])
        for n in SHIPPED
        if SHIPPED[n][-1]
        for tied in (True, False)
    ],
)
def test_the_built_model_has_the_parameters_of_the_formula(name, tied):
    layers, _, d, context, *_, total_tied, total_untied = SHIPPED[name]
    cfg, model_cfg = quiet(str(CONFIGS / f"{name}.json"), f"model_cfg.tie_embeddings={tied}")
    model = build_adapter(cfg, model_cfg, ByteTokenizer(), device="meta").model
    formula = (50304 * (1 if tied else 2) + context) * d + layers * (12 * d * d + 2 * d) + d
    assert sum(p.numel() for p in model.parameters()) == formula == (total_tied if tied else total_untied)


def test_everything_else_is_as_in_the_file_of_the_type(stored):
    mine = tree_of(prepare([str(stored(PLAIN))]))
    theirs = tree_of(prepare(["model=gpt2", "preset=none"]))
    assert {k for k in theirs if mine[k] != theirs[k]} == {"model_cfg", "train_seq_len", "global_batch_size"}
    kept = set(theirs["model_cfg"]) - {"n_layers", "n_heads", "d_model", "n_ctx", "dropout", "vocab_size"}
    assert all(mine["model_cfg"][k] == theirs["model_cfg"][k] for k in kept)


def test_the_command_line_wins(stored):
    cfg, model_cfg = quiet(str(stored(PLAIN)), "model_cfg.n_layers=3", "global_batch_size=5", "device=cpu")
    assert (model_cfg.n_layers, cfg.global_batch_size, cfg.device) == (3, 5, "cpu")


def test_what_is_left_out_is_said_and_so_is_what_the_file_is(stored):
    said: list[str] = []
    path = stored({**PLAIN, "name": "Mine", "description": "of mine", "device": "cpu"})
    cfg, model_cfg = compose([str(path)], notify=said.append)
    assert (cfg.global_batch_size, model_cfg.vocab_size, cfg.device) == (32, 50304, "cpu")
    told = " ".join(said)
    assert "batch_size not given: 32" in told and "vocab_size not given: 50304" in told
    assert "Mine, of mine" in told


def test_marks_and_line_ends_of_editors_change_nothing(stored):
    plain = json.dumps(PLAIN, indent=1)
    edited = stored(b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode(), "edited.json")
    assert read(edited).values == read(stored(PLAIN)).values


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"n_layer": 2,\n "n_layers": 3}', [":2: unknown key 'n_layers'", "n_layer"]),
        ('{"n_layer": 2,\n "n_layer": 3}', [":2: 'n_layer' was already set on line 1"]),
        ('{"n_layer": 2,\n}', [":2: line 2, column 1"]),
        ('{"n_layer": 010}', [":1: line 1"]),
        ('{"n_layer": 2 // two\n}', [":1: line 1"]),
        ('{\n"n_layer": 2.0}', [":2: n_layer: expected int, got 2.0 (float)"]),
        ('{\n"n_layer": true}', [":2: n_layer: expected int, got true (bool)"]),
        ('{\n"n_layer": "2"}', [':2: n_layer: expected int, got "2" (str)']),
        ('{\n"n_layer": 0}', [":2: n_layer: must satisfy n_layer >= 1, got 0. Nearest: 1"]),
        ('{\n"bias": 1}', [":2: bias: expected bool, got 1 (int)"]),
        ('{\n\n"dropout": NaN}', [":3: dropout: expected a finite number, got nan"]),
        ('{\n"dropout": 1e999}', [":2: dropout: expected a finite number, got inf"]),
        ("[1]", [":1: a preset is one object"]),
        ("", [":1: line 1, column 1"]),
        ("[" * 100_000, ["cannot be read"]),
        ("{}", [f"required key '{k}' has no value" for k in ("block_size", "n_embd", "dropout", "bias")]),
    ],
)
def test_mistakes_are_told_with_their_line(stored, text, parts):
    told = "\n".join(refused(str(stored(text.encode()))))
    assert "mine.json" in told and all(part in told for part in parts)


def test_text_that_is_not_utf8_is_refused(stored):
    assert "not UTF-8 text" in refused(str(stored(b'{"name": "\xff"}')))[0]


def test_ranges_and_constraints_are_those_of_the_type_with_the_line_of_the_file(stored):
    (dropout,) = refused(str(stored({**PLAIN, "dropout": 1.5})))
    assert "mine.json:6: model_cfg.dropout" in dropout
    (heads,) = refused(str(stored({**PLAIN, "n_embd": 65})))
    assert "mine.json" in heads and "65" in heads and "divisible" in heads


def test_a_pattern_of_json_files_is_a_sweep(stored, tmp_path):
    for name in ("one.json", "two.json"):
        stored(PLAIN, name)
    plan = prepare([f"--hydra_model_cfg={tmp_path}/*.json", "-m"])
    assert [model.path.name for model in plan.models.values()] == ["one.json", "two.json"]
