"""`data=hf`: data sets of Hugging Face, through their package `datasets`: folders on this disk, saved by it
(`save_to_disk`) or of data files that it reads, and names of the hub.

A name of the hub is fetched once, row by row, into the cache and trained on from there, `dataset_bytes` of its training
text at most; from then on no network is needed. Files on disk are read once too. Code that comes with a set is never
run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from data.chats.messages import chat_document, chat_fields
from data.config import CHATS, Mode
from data.errors import DataError
from data.stream import FilePart, Row, Stamp, Stream, fields_of, joined, utf8
from naming import expand_path, not_one_of, shorten

BATCH_ROWS = 256
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
ROWS = (".jsonl", ".json", ".parquet")  # how single files end that are a set
USUAL_EVAL_SPLIT = "test"


class HuggingFaceConfig(Protocol):
    dataset_name: str | None
    data_root: str | None  # prefix for a relative folder
    dataset_subset: str | None
    dataset_split: str
    eval_split: str | None  # None: documents are held out by a hash of their text
    dataset_bytes: int | None
    text_field: str | list[str]
    training_mode: Mode


def load(cfg: HuggingFaceConfig) -> Stream:
    """The splits of a set. One that has a single split is split by a hash of the text.

    Raises:
        DataError: the package is not installed, there is no such set, subset or split, or it cannot be fetched.
    """
    _require_package()
    folder = _folder(cfg)
    notes: tuple[str, ...] = ()
    eval_split = cfg.eval_split
    if eval_split == cfg.dataset_split:
        raise DataError(
            f"eval_split: {eval_split!r} is what is trained on (dataset_split). Name another split, or eval_split=null "
            f"to hold out documents by a hash of their text"
        )
    if folder:  # those of the hub are not looked up where the text is in the cache
        splits = _splits(cfg, folder)
        _require_split("dataset_split", cfg.dataset_split, splits)
        if eval_split == USUAL_EVAL_SPLIT and splits == [cfg.dataset_split]:
            notes, eval_split = (f"the set has no split but {cfg.dataset_split}",), None
        if eval_split is not None:
            _require_split("eval_split", eval_split, splits)
    train, heldout = (
        None if split is None else [SplitPart(cfg, folder, split, limit)]
        for split, limit in ((cfg.dataset_split, cfg.dataset_bytes), (eval_split, None))
    )
    read_as = {
        "source": "hf",
        "subset": cfg.dataset_subset,
        "text_field": cfg.text_field,
        "dataset_bytes": cfg.dataset_bytes,
    }
    subset = f" ({cfg.dataset_subset})" if cfg.dataset_subset else ""
    name = f"{folder.name if folder else cfg.dataset_name}{subset}"
    return Stream(
        name,
        train or [],
        heldout,
        read_as,
        cfg.eval_split is None,
        notes,
        chats=cfg.training_mode == CHATS,
    )


def absolute(cfg: HuggingFaceConfig) -> dict[str, str]:
    """The fields with paths that mean the same from any folder. DataError for what cannot be a set."""
    _require_package()
    folder = _folder(cfg)
    return {"dataset_name": str(folder.absolute())} if folder else {}


def _require_package() -> None:
    if find_spec("datasets") is None:
        raise DataError("data=hf needs the package datasets: pip install -e '.[data]'")


def _folder(cfg: HuggingFaceConfig) -> Path | None:
    """The folder or file of a set on this disk; None for a name of the hub."""
    if not cfg.dataset_name:
        raise DataError("data=hf needs dataset_name=<folder or name>")
    path = expand_path(cfg.data_root or "") / expand_path(cfg.dataset_name)
    if path.is_dir() or (path.is_file() and path.suffix in ROWS):
        return path
    if path.exists():
        raise DataError(
            f"dataset_name: {str(path)!r} is no file of rows ({', '.join(ROWS)}) and no folder. Text is read by "
            f"data=text input_file=<file>, files that are packed by data=jsonl train_files=<file>"
        )
    if not HUB_NAME.fullmatch(cfg.dataset_name):
        raise DataError(
            f"dataset_name: there is no folder {str(path)!r}, and no set of the hub is called so (owner/name)"
        )
    return None


def _splits(cfg: HuggingFaceConfig, folder: Path) -> list[str]:
    opened = _opened(cfg, folder)
    return sorted(opened) if hasattr(opened, "keys") else [cfg.dataset_split]


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))


def _opened(cfg: HuggingFaceConfig, folder: Path) -> Any:
    """A set on this disk: by split, or the one that was saved alone."""
    import datasets

    saved = is_saved(folder)
    if saved and cfg.dataset_subset:
        raise DataError(
            f"dataset_subset: {str(folder)!r} was saved by save_to_disk, and such a folder has no subsets. Leave it out"
        )
    if folder.is_file() and cfg.dataset_subset:
        raise DataError(f"dataset_subset: {str(folder)!r} is one file, which has no subsets. Leave it out")
    try:
        if folder.is_file():
            files = {"train": folder.name}
            return datasets.load_dataset(str(folder.parent), data_files=files, streaming=True)
        if saved:
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder), cfg.dataset_subset, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset_name: {str(folder)!r} cannot be read by datasets: {_first_line(error)}"
        ) from error


def _of_hub(cfg: HuggingFaceConfig, split: str) -> Any:
    """A split of a name of the hub, read over the network; whatever goes wrong, the local way is named."""
    import datasets

    try:
        return datasets.load_dataset(cfg.dataset_name, cfg.dataset_subset, split=split, streaming=True)
    except (
        Exception
    ) as error:  # of the package, its HTTP client, the operating system: it says in words what it is
        raise DataError(
            f"dataset_name: {cfg.dataset_name!r} is no folder here, and split {split} could not be fetched from the "
            f"hub ({_first_line(error)}). With a network, fetch it: hf download {cfg.dataset_name} --repo-type "
            f"dataset --local-dir <folder>; then set dataset_name=<folder>. A set without split {split} may need "
            f"another dataset_split or eval_split (null: documents are held out by a hash)"
        ) from error


def _first_line(error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}".rstrip(": .")


def _require_split(field: str, name: str, splits: Sequence[str]) -> None:
    if name not in splits:
        raise DataError(f"{field}: {not_one_of(name, splits)}")


@dataclass(frozen=True)
class SplitPart:
    """One split of a set; `limit`: bytes of its text behind which it ends."""

    cfg: HuggingFaceConfig
    folder: Path | None
    name: str
    limit: int | None

    def stamps(self) -> list[Stamp]:
        """Of a name of the hub the name alone: what was fetched is what there is."""
        if self.folder is None:
            return [(f"hub:{self.cfg.dataset_name}", 0, 0)]
        if self.folder.is_file():
            return FilePart(self.folder.name, self.folder).stamps()
        found = []
        for place, folders, files in os.walk(self.folder):
            folders.sort()
            for name in sorted(files):
                found += FilePart(name, Path(place, name)).stamps()
        return found

    def rows(self) -> Iterator[Row]:
        rows = self._opened()
        fields = self._fields(rows.column_names)
        taken = 0
        for place, values in enumerate(self._values(rows, fields), start=1):
            text = self._text(dict(zip(fields, values, strict=True)), place)
            yield Row(place, text)
            taken += len(text or b"")
            if self.limit is not None and taken >= self.limit:
                return

    def _fields(self, columns: list[str] | None) -> tuple[str, ...]:
        """Those that are read; `columns`: what there is, None where the set does not say it."""
        given = self.cfg.text_field
        if self.cfg.training_mode == CHATS:
            if columns is None and given == "text":
                raise DataError(
                    f"{self._called()} does not say which columns it has. Set text_field=<the one with the turns>"
                )
            return fields_of(given) if columns is None else chat_fields(given, columns, self._called())
        for field in fields_of(given):
            if columns is not None and field not in columns:
                raise DataError(
                    f"{self._called()} lacks the column {field!r} (it has "
                    f"{shorten([repr(name) for name in columns])}). Set text_field=<the one with the text>"
                )
        return fields_of(given)

    def _text(self, row: dict[str, Any], place: int) -> bytes | None:
        if self.cfg.training_mode == CHATS:
            return chat_document(row, self.cfg.text_field, f"{self._called()}, row {place:,}")
        for field, value in row.items():
            if value is not None and not isinstance(value, str):
                raise DataError(
                    f"{self._called()}, row {place:,}: {field!r} is of type {type(value).__name__}, and the text of a "
                    f"document is a string. Set text_field=<a column of strings>"
                )
        text = joined(list(row.values()))
        return None if text is None else utf8(text)

    def _values(self, rows: Any, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        try:
            for batch in rows.select_columns(list(fields)).iter(batch_size=BATCH_ROWS):
                yield from zip(*[batch[field] for field in fields], strict=True)
        except Exception as error:  # of the package, of Arrow or of the network
            raise DataError(
                f"{self._called()} cannot be read: {_first_line(error)}{self._way_out()}"
            ) from error

    def _opened(self) -> Any:
        cfg = self.cfg
        if self.folder is None:
            return _of_hub(cfg, self.name)
        opened = _opened(cfg, self.folder)
        return opened[self.name] if hasattr(opened, "keys") else opened

    def _way_out(self) -> str:
        """The package makes columns of all fields, of types that it guesses; ours read one field."""
        if self.folder is None or next(self.folder.rglob("*.arrow"), None):
            return ""
        return ". Of files of JSON lines or parquet this field alone is read by data=jsonl or parquet"

    def _called(self) -> str:
        return f"{str(self.folder) if self.folder else self.cfg.dataset_name!r}, split {self.name}"
