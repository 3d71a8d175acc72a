"""Public shards are fetched whole or not at all, go on where they were cut off, and are checked; by a stand-in of the
hub on this machine."""

from __future__ import annotations

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

import mytrainer
from data.errors import DataError
from data.fetch import fetch, names_of
from tests.data.shard_files import llm_c

IDS = np.arange(4000) % 50257
NAME = "fineweb_train_000001.bin"


class Hub(BaseHTTPRequestHandler):
    """`/datasets/<owner>/<set>/resolve/main/<name>` sends on to `/stored/<name>`, as for large files."""

    files: dict[str, bytes]
    digest: str | None
    cut: int | None  # a connection ends behind so many bytes
    ranges = True
    asked: list[tuple[str, str, str | None]]

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, with_body):
        name = self.path.rpartition("/")[2]
        self.asked.append((self.command, self.path, self.headers.get("Range")))
        if name not in self.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        raw = self.files[name]
        if not self.path.startswith("/stored/"):
            self.send_response(302)
            self.send_header("X-Linked-Size", str(len(raw)))
            self.send_header("X-Linked-ETag", f'"{self.digest or hashlib.sha256(raw).hexdigest()}"')
            self.send_header("X-Repo-Commit", "ab" * 20)
            self.send_header("Location", f"http://{self.headers['Host']}/stored/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "") if self.ranges else None
        body = raw[int(start[1]) :] if start else raw
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", "ab" * 20)
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.end_headers()
        if with_body:
            self.wfile.write(body if self.cut is None else body[: self.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    raw = llm_c(tmp_path / "made.bin", IDS).read_bytes()
    files = {name: raw for name in names_of("fineweb10B", 2)}
    handler = type("Here", (Hub,), {"files": files, "digest": None, "cut": None, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=["huggingface_hub", "nothing"])
def installed(request, monkeypatch) -> str:
    """What there is to fetch with."""
    monkeypatch.setattr("data.fetch.find_spec", lambda name: name if name == request.param else None)
    return request.param


@pytest.fixture
def alone(monkeypatch) -> None:
    monkeypatch.setattr("data.fetch.find_spec", lambda name: None)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".cache"}  # the package's own


def test_a_shard_is_fetched_once(hub, alone, tmp_path) -> None:
    seen = []
    assert fetch("fineweb10B", NAME, tmp_path / "out", lambda *state: seen.append(state))
    assert (tmp_path / "out" / NAME).read_bytes() == hub.files[NAME] and names(tmp_path / "out") == {NAME}
    assert hub.asked[0][:2] == (
        "HEAD",
        f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{NAME}",
    )
    size = len(hub.files[NAME])
    assert seen[0] == (0, size) and seen[-1] == (size, size)
    hub.asked.clear()
    assert not fetch("fineweb10B", NAME, tmp_path / "out")
    assert not hub.asked


@pytest.mark.parametrize("ranges", [True, False])
def test_what_was_cut_off_goes_on(hub, alone, tmp_path, ranges) -> None:
    hub.cut, hub.ranges = 3000, ranges
    with pytest.raises(
        DataError, match=r"000001.bin could not be fetched \(.*\)\. What has come of it is kept"
    ):
        fetch("fineweb10B", NAME, tmp_path)
    assert not (tmp_path / NAME).exists() and (tmp_path / f".{NAME}.part").stat().st_size == 3000
    hub.cut = None
    hub.asked.clear()
    assert fetch("fineweb10B", NAME, tmp_path)
    assert (tmp_path / NAME).read_bytes() == hub.files[NAME] and not (tmp_path / f".{NAME}.part").exists()
    assert hub.asked[-1] == ("GET", f"/stored/{NAME}", "bytes=3000-")


def test_a_shard_that_is_damaged_is_fetched_again(hub, installed, tmp_path) -> None:
    (tmp_path / NAME).write_bytes(hub.files[NAME][:-10])
    assert fetch("fineweb10B", NAME, tmp_path)
    assert (tmp_path / NAME).read_bytes() == hub.files[NAME]


def test_other_bytes_are_refused(hub, alone, tmp_path) -> None:
    hub.digest = "ab" * 32
    with pytest.raises(DataError, match=r"came with sha256 \w{16}, and abababababababab was announced"):
        fetch("fineweb10B", NAME, tmp_path)
    hub.digest = None
    for raw, told in (
        (b"<html>", "is no shard: .*has no header|is no shard"),
        (hub.files[NAME][:-2], "3,999 are there"),
    ):
        hub.files[NAME] = raw
        with pytest.raises(DataError, match=told):
            fetch("fineweb10B", NAME, tmp_path)
    assert names(tmp_path) == {"made.bin"}


def test_a_shard_that_there_is_not_is_told(hub, installed, tmp_path) -> None:
    with pytest.raises(DataError, match=r"there is no .*000009.bin.*: the set has fewer shards"):
        fetch("fineweb10B", "fineweb_train_000009.bin", tmp_path)


def test_without_a_network_the_way_out_is_named(alone, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(
        DataError, match=r"hf download kjj0/fineweb10B-gpt2 .*--local-dir <folder>.*data_root=<folder>"
    ):
        fetch("fineweb10B", NAME, tmp_path)


def test_without_a_network_so_does_the_package(tmp_path, monkeypatch) -> None:
    """Which tries again for a while: here it has done so."""

    def failed(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", failed)
    with pytest.raises(
        DataError, match=r"could not be fetched \(no network\).*hf download kjj0/fineweb10B-gpt2 "
    ):
        fetch("fineweb10B", NAME, tmp_path)


def test_the_command_fetches_what_the_source_reads(hub, installed, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    assert mytrainer.main(["prepare", "fineweb10B", "--shards", "2"]) == 0
    assert names(tmp_path / "data/fineweb10B") == set(names_of("fineweb10B", 2))
    out = capsys.readouterr().out
    assert "fineweb_train_000002.bin fetched (3 of 3)" in out and "data=fineweb10B" in out
    assert mytrainer.main(["prepare", "fineweb10B", "--shards", "2", "--out", "data/fineweb10B"]) == 0
    assert "fineweb_train_000002.bin was there already" in capsys.readouterr().out
    for words, told in (
        (["fineweb10B"], "shards: how many to fetch"),
        (["fineweb10B", "--shards", "0"], "at least 1"),
        (
            ["fineweb10B", "--shards", "1", "tokenizer=gpt2"],
            "'tokenizer=gpt2': prepare fineweb10B takes --shards N",
        ),
        (["data=text", "--shards", "1"], "shards: it belongs to fineweb10B or finewebedu10B"),
    ):
        assert mytrainer.main(["prepare", *words]) == 2
        assert told in capsys.readouterr().err


def test_the_package_is_asked_for_the_same_and_its_file_checked(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data.fetch.find_spec", lambda name: name)
    assert fetch("fineweb10B", NAME, tmp_path / "out")
    assert (tmp_path / "out" / NAME).read_bytes() == hub.files[NAME]
    assert hub.asked[0][:2] == ("HEAD", f"/datasets/kjj0/fineweb10B-gpt2/resolve/main/{NAME}")
    other = "fineweb_train_000002.bin"
    hub.files[other] = hub.files[NAME][:-2]
    with pytest.raises(DataError, match="what came is no shard: .*3,999 are there"):
        fetch("fineweb10B", other, tmp_path / "out")
    assert names(tmp_path / "out") == {NAME}
