"""What git says of a folder, and what it does not run to say so."""

import os
import subprocess

import pytest

from trainer.run.manifest import git_state


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder with one commit, and a script that leaves a mark."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    folder, mark = tmp_path / "copy", tmp_path / "executed"
    folder.mkdir()
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    script.chmod(0o755)

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=folder, check=True)

    git("init", "-q")
    (folder / "file").write_text("one\n")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    return folder, git, script, mark


def touched(folder):
    """Git looks into a file whose times have changed."""
    os.utime(folder / "file", (1, 1))


def test_the_commit_and_whether_something_changed(repository):
    folder, _, _, _ = repository
    commit, dirty = git_state(folder)
    assert len(commit) == 40 and dirty is False
    (folder / "untracked").touch()
    touched(folder)
    assert git_state(folder) == (commit, False)
    (folder / "file").write_text("two\n")
    assert git_state(folder) == (commit, True)
    (folder / ".git/HEAD").write_text("nothing")
    assert git_state(folder.parent) == (None, None)


@pytest.mark.parametrize("kind", ["fsmonitor", "hook", "clean", "process", "name with =", "environment"])
def test_programs_of_its_configuration_are_not_run(repository, monkeypatch, kind):
    folder, git, script, mark = repository
    if kind == "fsmonitor":
        git("config", "core.fsmonitor", str(script))
    elif kind == "hook":
        (folder / ".git/hooks").mkdir(exist_ok=True)
        (folder / ".git/hooks/post-index-change").write_text(script.read_text())
        (folder / ".git/hooks/post-index-change").chmod(0o755)
    elif kind == "environment":
        for name, value in (("COUNT", "1"), ("KEY_0", "core.fsmonitor"), ("VALUE_0", str(script))):
            monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    else:
        name = "a=b" if kind == "name with =" else "x.y"
        (folder / ".git/info").mkdir(exist_ok=True)
        (folder / ".git/info/attributes").write_text(f"file filter={name}\n")
        git("config", f"filter.{name}.{'process' if kind == 'process' else 'clean'}", str(script))
        git("config", f"filter.{name}.required", "true")
    touched(folder)
    commit, dirty = git_state(folder)
    assert not mark.exists()
    assert len(commit) == 40 and dirty is (None if kind == "name with =" else False)
    touched(folder)
    monkeypatch.delenv("GIT_CONFIG_GLOBAL")
    subprocess.run(["git", "status"], cwd=folder, capture_output=True, timeout=20)
    assert mark.exists(), "of itself git runs it"
