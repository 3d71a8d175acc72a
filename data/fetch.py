"""FineWeb's public shards, fetched from the hub of Hugging Face (`prepare fineweb10B --shards N`).

Through the package huggingface_hub where it is installed, which knows what the hub has come to. Else a file lies beside
its place, under a name of its own, until it has the size that the server says, and the sha256 where it says that. Both
go on with what came before a connection ended. A file is taken when it has the header and number of tokens of a shard.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data.bin import PUBLIC
from data.cache import file_digest
from data.errors import DataError
from data.shards import GPT2_HEADER, open_shard

__all__ = ["fetch", "folder_of", "names_of"]

HUB = "https://huggingface.co"  # HF_ENDPOINT names another
OWNER = "kjj0"
TIMEOUT = 30  # seconds without an answer
BLOCK = 1 << 20
_SHA256 = re.compile(r'"?([0-9a-f]{64})"?')

Progress = Callable[[int, int], object]  # bytes of a file that are here, and of all


def names_of(data: str, shards: int) -> list[str]:
    """The validation shard and that many for training, which are counted from 1."""
    start = PUBLIC[data]
    return [f"{start}_val_000000.bin", *(f"{start}_train_{number:06}.bin" for number in range(1, shards + 1))]


def folder_of(data: str) -> Path:
    """Where `data=<name>` looks for them if nothing else is said."""
    return Path("data") / data


def fetch(data: str, name: str, folder: Path, progress: Progress = lambda done, total: None) -> bool:
    """One file into a folder; whether it had to be fetched.

    Raises:
        DataError: it cannot be fetched, or what came is no such shard; the message names the way out.
        OSError: it cannot be written.
    """
    target = folder / name
    if target.exists() and not _problem(target):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    if find_spec("huggingface_hub") is not None:
        _through_hub(data, name, folder)
    else:
        _by_itself(data, name, folder, progress)
    return True


def _through_hub(data: str, name: str, folder: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    target = folder / name
    try:
        hf_hub_download(
            f"{OWNER}/{data}-gpt2",
            name,
            repo_type="dataset",
            local_dir=folder,
            endpoint=os.environ.get("HF_ENDPOINT"),
            force_download=target.exists(),  # it is damaged
        )
    except Exception as error:  # of the package, its HTTP client, the system: it says in words what it is
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise DataError(_fewer(f"{name} in {OWNER}/{data}-gpt2")) from error
        raise DataError(_way_out(data, name, folder, error)) from error
    if problem := _problem(target):
        target.unlink()
        raise DataError(f"what came is no shard: {problem}")


def _by_itself(data: str, name: str, folder: Path, progress: Progress) -> None:
    target, part = folder / name, folder / f".{name}.part"
    url = f"{os.environ.get('HF_ENDPOINT') or HUB}/datasets/{OWNER}/{data}-gpt2/resolve/main/{name}"
    try:
        digest = _download(url, part, progress)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            raise DataError(_fewer(url)) from error
        raise DataError(_way_out(data, name, folder, error)) from error
    except (OSError, HTTPException) as error:
        if isinstance(error, OSError) and error.filename:  # of this disk
            raise
        raise DataError(_way_out(data, name, folder, error)) from error
    if digest is not None and (found := file_digest(part)) != digest:
        part.unlink()
        raise DataError(
            f"{name} came with sha256 {found[:16]}, and {digest[:16]} was announced. Fetch it again"
        )
    if problem := _problem(part):
        part.unlink()
        raise DataError(f"{url} is no shard: {problem}")
    os.replace(part, target)


def _fewer(what: str) -> str:
    return f"there is no {what}: the set has fewer shards. Ask for less: --shards N"


def _problem(path: Path) -> str:
    """What is wrong with a shard of GPT-2 ids, nothing where it is one."""
    try:
        kind = open_shard(path, np.dtype(np.uint16)).kind
    except DataError as error:
        return str(error)
    return "" if kind == GPT2_HEADER else f"{str(path)!r} has another header ({kind})"


def _download(url: str, part: Path, progress: Progress) -> str | None:
    """The file behind what is there of it; its sha256, where the server says it."""
    there = part.stat().st_size if part.exists() else 0
    total, digest = _announced(url)
    if there > total:
        part.unlink()
        there = 0
    progress(there, total)
    if there < total:
        request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            if there and answer.status != 206:  # a server that gives the whole
                there = 0
            with open(part, "ab" if there else "wb") as file:
                while block := answer.read(BLOCK):
                    file.write(block)
                    there += len(block)
                    progress(there, total)
    if there != total:
        raise ConnectionError(f"the connection ended at {there:,} of {total:,} bytes")
    return digest


def _announced(url: str) -> tuple[int, str | None]:
    """Bytes of a file, and its sha256 where the hub keeps it as a large one."""
    headers: dict[str, str] = {}

    class Following(urllib.request.HTTPRedirectHandler):
        """The hub says it where it sends on to the place of the file."""

        def redirect_request(self, *args: Any) -> urllib.request.Request | None:
            headers.update(_said(args[4]))
            following = super().redirect_request(*args)
            if following is not None:
                following.method = "HEAD"
            return following

    opener = urllib.request.build_opener(Following)
    request = urllib.request.Request(url, method="HEAD")
    with opener.open(request, timeout=TIMEOUT) as answer:
        headers = {**_said(answer.headers), **headers}
    size = headers.get("x-linked-size") or headers.get("content-length")
    if size is None or not size.isdecimal():
        raise ConnectionError("the server does not say how large the file is")
    digest = _SHA256.fullmatch(headers.get("x-linked-etag", ""))
    return int(size), digest[1] if digest else None


def _said(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _way_out(data: str, name: str, folder: Path, error: Exception) -> str:
    return (
        f"{name} could not be fetched ({error}). What has come of it is kept: the same command goes on. Or fetch it "
        f"elsewhere: hf download {OWNER}/{data}-gpt2 {name} --repo-type dataset --local-dir <folder>; and "
        f"bring that folder here as {str(folder)!r}, or name it: data_root=<folder>"
    )
