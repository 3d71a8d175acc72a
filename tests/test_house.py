"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "models", "adapters", "trainer", "data", "configs")
# Imports point one way. What a package may import at all, at module level or inside a function.
ALLOWED = {
    "kernels": {"data"},  # the folder of derived files, in which compiled kernels lie
    "configs": {"models", "data"},  # lazily: tables, and the one model file that validates a run
    "data": set(),
    "models": {"kernels", "configs"},
    "adapters": {"models", "kernels", "configs", "data"},
    "trainer": {"adapters", "models", "kernels", "configs", "data"},
}
FILES = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]


def imports(tree, top_level_only=False):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module, node.lineno


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    if (
        path.name in ("test_configs.py", "default_model_adapter.py", "show_configs.py")
        and package == "configs"
    ):
        return  # programs and the lazy re-export; the next test keeps them off the import path
    for name, line in imports(ast.parse(path.read_text())):
        top = name.split(".")[0]
        if top in PACKAGES and top != package:
            assert top in ALLOWED[package], f"{path.name}:{line}: {package} imports {name}"


@pytest.mark.parametrize("name", ["naming.py", "mytrainer_guest.py"])
def test_what_everybody_uses_imports_nothing_of_the_project(name):
    assert not [module for module, _ in imports(ast.parse((ROOT / name).read_text())) if module in MODULES]


def test_the_names_that_are_ours_in_somebody_elses_process():
    import mytrainer_guest

    assert set(mytrainer_guest.NAMES) == {*PACKAGES, "naming"}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in [*FILES, ROOT / "naming.py"]}


def imported_at_once(module):
    """Modules of the project that importing this one imports, packages around it excepted."""
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (n for n in names if n in MODULES and not f"{module}.".startswith(f"{n}."))


def test_no_imports_run_in_a_circle():
    done = set()

    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in imported_at_once(module):
                visit(other, [*path, module])
            done.add(module)

    for module in MODULES:
        visit(module, [])
    assert "trainer.optim.muon" in set(imported_at_once("trainer.optim.groups")), "it sees what is imported"


LIGHT = (
    "configs",
    "configs.schema",
    "configs.compose",
    "configs.completion",
    "configs.dump",
    "configs.grid",
    "models",
    "models.huggingface.folder",
    "data",
    "kernels",
    "trainer.optim",
    "trainer.run",
)


@pytest.mark.slow
@pytest.mark.parametrize("module", LIGHT)
def test_importing_these_brings_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def takes_the_encoding_of_the_locale(call):
    """A call that reads or writes text and names no encoding."""
    words, function = {word.arg for word in call.keywords}, ast.unparse(call.func)
    if "encoding" in words:
        return False
    if function in ("open", "os.fdopen"):
        mode = ast.unparse(call.args[1]) if len(call.args) > 1 else ""
        return "b" not in mode
    return function.endswith((".read_text", ".write_text")) or bool(words & {"text", "universal_newlines"})


def test_all_text_is_utf8_whatever_the_locale():
    def found(code):
        calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
        return [call.lineno for call in calls if takes_the_encoding_of_the_locale(call)]

    wrong = "open(p)", "open(p, 'a')", "p.read_text()", "q().write_text(t)", "run([], text=True)"
    right = (
        "open(p, 'rb')",
        "open(p, 'w', encoding='utf-8')",
        "p.read_text(encoding='utf-8')",
        "os.open(p, 0)",
    )
    assert all(map(found, wrong)) and not any(map(found, right))
    files = [*FILES, *ROOT.glob("*.py")]
    assert not {
        str(f.relative_to(ROOT)): lines for f in files if (lines := found(f.read_text(encoding="utf-8")))
    }


def test_no_name_is_made_of_a_process_number():
    """In containers every process is number 1."""
    assert not [f.name for f in FILES if "getpid" in f.read_text(encoding="utf-8")]


def test_the_trainer_names_no_architecture():
    from models import ARCHITECTURES

    for path in sorted((ROOT / "trainer").rglob("*.py")):
        if path.parent.name == "bench":
            continue  # compares gpt2 with a plain loop
        # A machine has a memory too, and a form of export is called so in the table of forms.
        other = path.parent.name == "doctor" or path == ROOT / "trainer/export/__init__.py"
        types = {*ARCHITECTURES} - ({"memory"} if other else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in types, f"{path.name}:{node.lineno} names {node.value!r}"


def test_every_generic_field_is_read_by_the_code():
    """A field that is accepted and ignored is worse than none."""
    from configs.schema import GENERIC_FIELDS

    code = (
        "\n".join(p.read_text() for p in FILES if p.parts[-2] != "configs")
        + (ROOT / "mytrainer.py").read_text()
    )
    launch = "\n".join(
        (ROOT / "configs" / name).read_text() for name in ("choose.py", "compose.py", "frontend.py")
    )
    unread = [f for f in GENERIC_FIELDS if f".{f}" not in code + launch and f'"{f}"' not in code + launch]
    assert not unread
