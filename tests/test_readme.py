"""What the documents tell people to type and to open is there, and works."""

import contextlib
import json
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import mytrainer
from adapters import build_adapter
from configs import compose
from configs.compose import check, compose_tree, prepare
from configs.files import options
from configs.grid import check_grid
from configs.sweeps import repeated
from data import SOURCES
from data.prepared import MANIFEST, TOKENIZER
from data.tokenizers import ByteTokenizer
from models import ARCHITECTURES
from tests.data.foreign import byte_level, saved
from trainer.commands.launch import config_text

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "configs/README.md", "CHANGELOG.md"]
FOLDERS = ["configs", "models", "adapters", "trainer", "data", "kernels", "tests", ".ci", ".github"]


def text(document):
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document):
    """The contents of the fenced code blocks."""
    return [body for _, body in re.findall(r"^```(\w*)\n(.*?)^```", text(document), re.S | re.M)]


def commands(document):
    """Every shell command that a document shows, in blocks and in lines, comments and continuations resolved."""
    lines = [line for body in blocks(document) for line in body.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text(document), flags=re.S | re.M)
    lines += re.findall(r"`([^`\n]+)`", prose)
    for line in lines:
        for part in line.split(" && "):
            if re.match(
                r"(python3?|torchrun|accelerate|pip|pytest|ruff|mypy|pre-commit|\.ci/\w+)( |$)", part
            ):
                yield shlex.split(part, comments=True)


SHOWN = [(d, words) for d in DOCUMENTS for words in commands(d)]
OURS = [(d, words) for d, words in SHOWN if any(w.endswith("mytrainer.py") for w in words)]


def named(cases):
    return [pytest.param(*case, id=f"{case[0]}: {' '.join(case[1])[:70]}") for case in cases]


@pytest.fixture
def somewhere(tmp_path, monkeypatch):
    """A directory with what the documents take for granted: a home, notes, chats, settings, a run called dante, an
    older run."""
    for name, value in (("HOME", str(tmp_path)), ("HYDRA_FULL_ERROR", "0"), ("PYTHONPATH", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("configs.hardware.cuda_device_count", lambda: 0)
    monkeypatch.setattr("configs.frontend.missing_program", lambda launcher: [])  # SLURM is there
    (tmp_path / "my_notes").mkdir()
    (tmp_path / "chats.jsonl").touch()
    (tmp_path / "train_mine.py").write_text("n_layer = 6\n")
    (tmp_path / "my experiments").mkdir()
    (tmp_path / "my experiments/mine.yaml").write_text("defaults: [gpt2, _self_]\n")
    return tmp_path


def make_run(folder, model_name=None):
    """A run as training leaves it, for `resume=` and `--model_name` to find."""
    words = ["--hydra_model_cfg=gpt2", *([f"model_name={model_name}"] if model_name else [])]
    cfg, model_cfg = compose(words, notify=lambda text: None)
    (folder / "checkpoint-20").mkdir(parents=True)
    (folder / "config.yaml").write_text(config_text(cfg))
    saved = {"type": cfg.type, "model_cfg": model_cfg.model_dump(), "train_seq_len": cfg.train_seq_len}
    saved |= {"preset": cfg.preset, "batch_size": 4, "model_adapter": None}
    (folder / "config.json").write_text(json.dumps(saved))


def make_sweep(folder):
    """What a sweep records of its command."""
    told = {"models": ["gpt2"], "words": ["preset=nano", "seed=1,2", "-m"]}
    folder.mkdir(parents=True)
    (folder / "multirun.yaml").write_text(json.dumps({"hydra": {"callbacks": {"sweep": told}}}))


def make_weights(folder):
    """A folder of transformers with a GPT-2 of 124M parameters, as far as its config.json tells."""
    saved(
        folder, byte_level(), tokenizer_config={"eos_token": "<|endoftext|>"}, config={"model_type": "gpt2"}
    )
    (folder / "model.safetensors").touch()


def make_shards(folder):
    """A folder of `prepare`, as far as a configuration looks into it."""
    ByteTokenizer().save(folder / TOKENIZER)
    (folder / MANIFEST).touch()


class Parsed(Exception):
    """The command line was understood; the work itself is tested elsewhere."""


def parsed(*args, **kwargs):
    raise Parsed


@pytest.mark.parametrize(("document", "words"), named(OURS))
def test_commands_are_understood(somewhere, monkeypatch, capsys, document, words):
    if any(mark in word for word in words for mark in ("<", "...")):
        pytest.skip("a pattern, not a command")
    program = next(i for i, word in enumerate(words) if word.endswith("mytrainer.py"))
    if words[0] in ("torchrun", "accelerate"):
        processes = next(w.partition("=")[2] for w in words if w.startswith(("--nproc", "--num_processes")))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", processes)
    argv = words[program + 1 :]
    for word in argv:
        if word.startswith("init_from_checkpoint="):
            begin = Path(word.partition("=")[2])
            make_run(begin) if begin.parent.name == "checkpoints" else make_weights(begin)
    if argv and argv[0] in mytrainer.COMMANDS and argv[0] != "train":
        if argv[0] == "bench":
            monkeypatch.setattr("trainer.commands.bench.step._loop_overhead", parsed)
            for work in ("kernels._measure", "ahead.compiled_table", "tune.tune"):
                monkeypatch.setattr(f"trainer.commands.bench.{work}", parsed)
            monkeypatch.setattr("trainer.commands.bench.generate.restore_named", parsed)
        for name in (
            "generate.restore_named",
            "evaluate.restore_named",
            "evaluate.read_certificate",
            "export.open_source",
            "prepare.prepare",
            "prepare.fetch",
            "doctor.lines_of",
            "leaderboard.train_all",
            "attribute.train_all",
            "compare._read",
        ):
            monkeypatch.setattr(f"trainer.commands.{name}", parsed)
        monkeypatch.setattr("trainer.bench.text.open_source", parsed)  # of show
        with contextlib.suppress(Parsed):
            assert mytrainer.main(argv) == 0, capsys.readouterr().err
        return
    for word in argv:
        if word.startswith("input_file=shards/"):
            make_shards(Path(word.partition("=")[2]))
        if word.startswith("resume="):
            (make_sweep if "-m" in argv else make_run)(Path(word.partition("=")[2]))
    if "--model_name" in argv and not any("hydra_model_cfg" in word for word in argv):
        make_run(Path("checkpoints/dante"), "dante")
    if any(word.startswith("hydra/launcher=submitit") for word in argv):
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    if any(word.startswith("hydra/sweeper=optuna") for word in argv):
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    again = repeated(argv)
    plan = prepare(again[0] if again else argv)
    if plan.request.multirun:
        check_grid(plan)
    elif plan.models:
        check(plan, compose_tree(plan.overrides))


def test_the_documents_show_commands_of_every_kind():
    """The collection above would pass as well if it found nothing."""
    shown = {words[words.index("mytrainer.py") + 1] for _, words in OURS if words[-1] != "mytrainer.py"}
    assert {"generate", "eval", "bench", "show", "prepare"} <= shown and len(OURS) > 15


@pytest.mark.parametrize(("document", "words"), named([case for case in SHOWN if case not in OURS]))
def test_other_commands_name_what_exists(document, words):
    project = tomllib.loads(text("pyproject.toml"))
    if words[0] == "pip":
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(words)):
            assert set(extra.split(",")) <= project["project"]["optional-dependencies"].keys()
    elif words[0] == "pytest" and "-m" in words:
        markers = [m.partition(":")[0] for m in project["tool"]["pytest"]["ini_options"]["markers"]]
        assert words[words.index("-m") + 1] in markers
    elif words[0].startswith(".ci/"):
        assert os.access(ROOT / words[0], os.X_OK)
    for word in words[1:]:
        if re.fullmatch(r"[\w./]+\.(py|yaml)|(tests|configs)/[\w/]*", word):
            assert (ROOT / word).exists(), word


def mentioned(document):
    """Links, and names of files of the project in backquotes."""
    links = re.findall(r"\]\(([^)#\s]+)\)", text(document))
    quoted = re.findall(r"`([\w./-]+)`", text(document))
    ours = [q for q in quoted if q.split("/")[0] in FOLDERS and "/" in q or q.endswith((".toml", ".md"))]
    return sorted({name for name in [*links, *ours] if not name.startswith(("http://", "https://"))})


@pytest.mark.parametrize(("document", "name"), [(d, n) for d in DOCUMENTS for n in mentioned(d)])
def test_what_is_mentioned_exists(document, name):
    beside = (ROOT / document).parent / name
    assert beside.exists() or (ROOT / name).exists(), f"{document} mentions {name}"


@pytest.mark.parametrize("document", ["README.md", "configs/README.md"])
def test_trees_of_files_are_those_that_exist(document):
    """`models/   what it is` in a block: every name of a file or folder in such a tree."""
    folder = (ROOT / document).parent
    for body in blocks(document):
        if "python " in body or "pip " in body or "checkpoint-<step>" in body:
            continue
        for name in re.findall(r"(?:^|\s)([\w.-]+(?:\.(?:py|yaml|md)|/))(?=\s|$)", body):
            assert (folder / name).exists(), f"{document}: {name}"


def first_cells(document, header):
    table = re.search(rf"^\| {re.escape(header)} \|.*\n\|[-| ]+\n((?:\|.*\n)+)", text(document), re.M)
    return [re.match(r"\| `([^`]+)`", row)[1] for row in table[1].splitlines()]


def test_the_tables_are_complete():
    assert sorted(first_cells("README.md", "type")) == sorted(ARCHITECTURES)
    assert sorted(first_cells("README.md", "`data=`")) == sorted(SOURCES)


def test_every_size_is_named():
    for document in ("README.md", "configs/README.md"):
        assert all(re.search(rf"\b{name}\b", text(document)) for name in options("preset")), document


def test_sizes_of_byte_models_are_those_of_the_table():
    presets = re.search(r"^\| part around .*$", text("README.md"), re.M)[0]
    for type_ in ("megabyte", "hnet", "hnet_x_nsa"):
        row = re.search(rf"^\| `{type_}`: .*$", text("README.md"), re.M)[0]
        told = re.findall(r"\d+\.\d\d", row)
        for preset, millions in zip(re.findall(r"`(\w+)`", presets), told, strict=True):
            cfg, model_cfg = compose([f"model={type_}", f"preset={preset}"], notify=lambda text: None)
            adapter = build_adapter(cfg, model_cfg, ByteTokenizer(), "meta")
            assert f"{adapter.parameter_count / 1e6:.2f}" == millions, (type_, preset)


def test_the_page_on_configurations_names_every_file():
    page = (ROOT / "configs/README.md").read_text(encoding="utf-8")
    folder = ROOT / "configs"
    code = [p.name for p in folder.glob("*.py")]
    ours = [
        p.name for p in folder.glob("*.yaml") if p.stem in (*ARCHITECTURES, "training")
    ]  # not what people add
    options_ = [p.stem for p in folder.glob("*/*.yaml") if p.parent.name in ("data", "preset", "papers")]
    missing = [
        name for name in (*code, *ours, *options_) if not re.search(rf"(?<![\w.]){re.escape(name)}\b", page)
    ]
    assert not missing and len(ours) == len(ARCHITECTURES) + 1


def test_the_changelog_names_every_architecture_and_command():
    changelog = text("CHANGELOG.md")
    assert all(f"`{name}`" in changelog for name in ARCHITECTURES)
    aliases = {"worker", "show_configs"}
    assert all(f"`{name}`" in changelog for name in mytrainer.COMMANDS.keys() - aliases)


def test_nothing_is_left_to_fill_in():
    for document in DOCUMENTS:
        assert not re.search(r"@@|TODO|FIXME|TBD", text(document)), document


@pytest.mark.slow
def test_what_is_shown_of_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (program,) = [body for kind, body in re.findall(r"^```(\w+)\n(.*?)^```", text("README.md"), re.S | re.M)]
    names: dict = {}
    exec(program, names)
    assert names["run"]["steps"] == 40 and len(names["score"].nats) == len(names["score"].spans)
    printed = capsys.readouterr().out
    assert f"{names['run']['score']['bits_per_byte']} {names['run']['folder']}" in printed
    assert re.search(
        r"torch.Size\(\[(\d+), 192\]\) torch.Size\(\[\1, 192\]\)\ntorch.Size\(\[\1, 1024\]\)", printed
    )
