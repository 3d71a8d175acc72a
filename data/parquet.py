"""`data=parquet`: files of Apache Parquet, whose column `text_field` is the text of documents, a row each.

A file is read one row group after the other and of that one batch of rows, and no other column of it. Rows whose text
is null or empty are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from data import named
from data.chats.messages import chat_document, chat_fields
from data.config import CHATS, Mode
from data.errors import DataError
from data.named import KINDS, FilesConfig, named_files
from data.stream import FilePart, Row, Stream, fields_of, joined, utf8
from naming import did_you_mean, shorten

BATCH_ROWS = 256  # decoded together
BUFFER = 1 << 20  # bytes of a column that are read together


class ParquetConfig(FilesConfig, Protocol):
    text_field: str | list[str]
    training_mode: Mode


def load(cfg: ParquetConfig) -> Stream:
    """The files that `train_files` or `input_file`, and `val_files`, name.

    Raises:
        DataError: no such files, nothing says which of them are held out, or pyarrow is not installed.
    """
    files = named_files(cfg, KINDS["parquet"])
    _require_package()
    chats = cfg.training_mode == CHATS
    return files.stream(
        lambda name, path: ParquetPart(name, path, cfg.text_field, chats), cfg.text_field, chats
    )


def absolute(cfg: ParquetConfig) -> dict[str, list[str]]:
    """As `data.named.absolute`."""
    _require_package()
    return named.absolute(cfg, KINDS["parquet"])


def _require_package() -> None:
    if find_spec("pyarrow") is None:
        raise DataError("data=parquet needs the package pyarrow: pip install -e '.[data]'")


@dataclass(frozen=True)
class ParquetPart(FilePart):
    """One file. `field`: the column with the text, or several that make it up; with `chats` those of a chat."""

    field: str | Sequence[str]
    chats: bool = False

    def rows(self) -> Iterator[Row]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = 0
        try:
            # Read and not mapped: a mapped file that is cut off meanwhile ends the process.
            with pq.ParquetFile(self.path, memory_map=False, pre_buffer=False, buffer_size=BUFFER) as file:
                columns = self._columns(file.schema_arrow)
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(columns)):
                        for values in zip(*[batch.column(name) for name in columns], strict=True):
                            row += 1
                            said = [value.as_py() for value in values]
                            yield Row(row, self._text(dict(zip(columns, said, strict=True)), row))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{str(self.path)!r}, row {row:,} is not UTF-8: byte 0x{error.object[error.start]:02x} at byte "
                f"{error.start} of its text. Mend or leave out the row"
            ) from None
        except (pa.ArrowException, OSError) as error:
            where = f"behind row {row:,}" if row else "from its start"
            raise DataError(
                f"{str(self.path)!r} cannot be read as parquet {where}: {' '.join(str(error).split()).rstrip('.')}. "
                f"Fetch it again if it is damaged or cut off"
            ) from error

    def _text(self, row: dict[str, Any], place: int) -> bytes | None:
        if self.chats:
            return chat_document(row, self.field, f"{str(self.path)!r}, row {place:,}")
        text = joined(list(row.values()))
        return None if text is None else utf8(text)

    def _columns(self, schema: Any) -> tuple[str, ...]:
        """Those that are read. DataError where there are none such."""
        if self.chats:
            return chat_fields(self.field, schema.names, repr(str(self.path)))
        for field in fields_of(self.field):
            self._require_text(schema, field)
        return fields_of(self.field)

    def _require_text(self, schema: Any, field: str) -> None:
        import pyarrow.types as types

        names = schema.names
        if field not in names:
            has = f"it has {shorten([repr(name) for name in names])}" if names else "it has none"
            raise DataError(
                f"{str(self.path)!r} lacks the column {field!r} ({has}). Set text_field=<the one with the text>."
                f"{did_you_mean(field, names)}"
            )
        kind = schema.field(field).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_null)
        if not any(is_one(value) for is_one in strings):
            raise DataError(
                f"{str(self.path)!r}: column {field!r} is of type {kind}, and the text of a document is a string. "
                f"Set text_field=<a column of strings>"
            )
