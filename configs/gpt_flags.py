"""Options that GPT trainers have: `--config_file configs/150M.json --max_iters 2000`, `--n_layer 8 --n_embd 512`.

Each is turned as in a file of directives (`formats/gpt_keys.TABLE`). A size from a file stays what it is, whatever
options say of it; sizes without any model are those of a `gpt2`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.formats.directives import typed
from configs.formats.gpt_keys import TABLE, WORDS
from configs.schema import GENERIC_FIELDS
from naming import not_one_of

CONFIG_FILE = "config_file"
# Options that say a size, with what each is where another one says a part of it.
SIZES: dict[str, str] = {
    "n_layer": "6",
    "n_head": "6",
    "n_embd": "384",
    "block_size": "256",
    "batch_size": "32",
    "dropout": "0.2",
    "bias": "false",
    "vocab_size": "null",
}
_TOKENIZERS = ("gpt2", "char")
_OWN = {
    "tokenization": lambda value: {"tokenizer": value},
    "init_from_model": lambda value: {"init_from_checkpoint": f"checkpoints/{value}"},
}
NAMES = {key for key in WORDS if key not in GENERIC_FIELDS} | _OWN.keys()  # which our own fields do not have
SWITCHES = {"bias", "decay_lr", "compile", "always_save_checkpoint", "use_rope", "use_rmsnorm", "use_swiglu"}


def config_file(words: Sequence[str]) -> str:
    """The value of `--config_file` on a command line, "" without one."""
    found = ""
    for word, behind in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") == CONFIG_FILE:
            found = value if equals else behind
    return found


def is_size(path: str) -> bool:
    return Path(path).suffix == ".json"


def overrides(key: str, value: str) -> list[str]:
    """`key=value` in our fields. ValueError for what the option does not take."""
    if key == "tokenization" and value not in _TOKENIZERS:
        raise ValueError(not_one_of(value, _TOKENIZERS))
    given = typed(value)
    turn = _OWN.get(key) or TABLE[WORDS[key]][key]
    return [f"{field}={value if of is given else _word(of)}" for field, of in turn(given).items()]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
