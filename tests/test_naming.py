"""What names stand for, and what is said about wrong ones."""

import math
import shlex
from types import SimpleNamespace

import pytest

from naming import (
    Entry,
    command_line,
    did_you_mean,
    expand_path,
    load,
    look_up,
    not_one_of,
    require_fit,
    shapes,
    shorten,
)

TABLE = {"root": Entry("math:sqrt", ("digits",), "the square root"), "sine": Entry("math:sin")}


def test_an_entry_names_what_is_imported_on_use():
    assert look_up(TABLE, "root", "function").load() is math.sqrt
    assert TABLE["root"].reads == ("digits",) and TABLE["sine"].reads == ()


def test_a_name_that_a_table_does_not_have():
    with pytest.raises(
        ValueError, match=r"^function: 'rot' is not one of root, sine\. Did you mean 'root'\?$"
    ):
        look_up(TABLE, "rot", "function")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("math", "'math': expected package.module:Name"),
        ("a-b:C", "'a-b:C': expected package.module:Name. Nearest: 'a_b:C'"),
        ("math:sqr", "'math:sqr': module 'math' has no 'sqr'. Did you mean 'sqrt'?"),
        ("math:zzz", "'math:zzz': module 'math' has no 'zzz'"),
        ("collections.nowhere:X", "'collections.nowhere:X': no module named 'collections.nowhere'"),
        ("no_such_package.inside:X", "'no_such_package.inside:X': no module named 'no_such_package'"),
    ],
)
def test_what_cannot_be_loaded(spec, message):
    with pytest.raises(ValueError) as caught:
        load(spec)
    assert str(caught.value) == message


def test_a_missing_dependency_is_not_taken_for_a_wrong_name(tmp_path, monkeypatch):
    (tmp_path / "module_with_a_gap.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="surely_not_installed"):
        load("module_with_a_gap:Model")


def test_suggestions():
    assert did_you_mean("zzz", ["cosine"]) == ""
    assert did_you_mean("cosin", ["linear", "cosine"]) == " Did you mean 'cosine'?"
    assert did_you_mean("ab1", ["ab2", "ab3"], limit=1).count("'") == 2
    assert did_you_mean("abc1", ["abc2", "abc3", "abc4"]).endswith(" or 'abc2'?")
    assert not_one_of(3, [1, 2]) == "'3' is not one of 1, 2"


def test_lists_are_shortened():
    names = list("abcdefg")
    assert shorten(names[:5]) == "a, b, c, d, e"
    assert shorten(names) == "a, b, c, d, e and 2 more"
    assert shorten(names, most=1) == "a and 6 more"


def test_every_difference_between_two_states_is_named():
    def state(**sizes):
        return shapes({name: SimpleNamespace(shape=shape) for name, shape in sizes.items()})

    require_fit("the file", state(a=(2, 3)), state(a=(2, 3)))
    with pytest.raises(ValueError) as caught:
        require_fit("the file", state(a=(2, 3), b=(1,), c=()), state(a=(3, 2), c=(), d=(), e=()))
    assert str(caught.value) == (
        "the file does not fit this model (missing 1: b; unexpected 2: d, e; wrong 1: a is (3, 2), needed is (2, 3))"
    )
    require_fit("the names", dict.fromkeys("ab"), dict.fromkeys("ba"))


def test_a_command_is_printed_as_a_shell_takes_it():
    words = ["resume=my run", "a b.yaml", "x='1'", "plain=1"]
    printed = command_line(*words)
    assert shlex.split(printed) == ["python", "mytrainer.py", *words] and printed.endswith(" plain=1")


def test_paths_are_resolved_or_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_path("~/run") == tmp_path / "run" and str(expand_path("a/~b")) == "a/~b"
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nobody has a home
    for wrong, message in (
        ("~/run", r"there is no home folder for '~' here. Write the path in full, or ./~/run"),
        ("a\nb", "cannot hold a line break"),
        ("a\0b", "cannot hold a NUL"),
        (f"a/{'é' * 128}", "has 256 bytes, and a file or folder 255 at most"),
    ):
        with pytest.raises(ValueError, match=message):
            expand_path(wrong)
    assert expand_path(f"a/{'é' * 127}x").parent.name == "a"
