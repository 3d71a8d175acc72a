"""Values, trees, texts and words of command lines that nobody should write and somebody will."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from configs.schema import GENERIC_FIELDS
from configs.validate import architecture_config

MARKER = "executed"  # a file that code makes where it runs
_RUN = f"__import__('pathlib').Path('{MARKER}').touch()"
BAIT = f"from pathlib import Path\nPath({MARKER!r}).touch()\nclass Model: pass\ndef run(*a, **k): pass\n"

_NUMBERS = [
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.0,
    -0.0,
    1e-320,
    1e308,
    0.1,
    1e400,
    -1e400,
    1e400 - 1e400,
]
_TEXTS = [
    *(
        "",
        " ",
        "null",
        "~",
        "true",
        "yes",
        "on",
        "010",
        "0x10",
        "12:30",
        "1e5",
        "1_000",
        "NaN",
        ".inf",
        "???",
    ),
    *("${HOME", "${", "${}", "${oc.env:HOME}", "${oc.env:NO_SUCH}", "${oc.env:}", "${model_cfg}", "${seed}"),
    *(
        "${learning_rate}",
        "${hydra:runtime.cwd}",
        "${oc.decode:1}",
        "${oc.create:{a:1}}",
        "${no.such:x}",
        "$HOME",
    ),
    *(
        "${..a}",
        "${.}",
        "${oc.select:x}",
        "${oc.deprecated:seed}",
        "${now:%Y}",
        "\\${x}",
        "${${seed}}",
        "${a:[}",
    ),
    *(
        "A=1",
        "a,b",
        "[1,2",
        "{a:1",
        "'",
        '"',
        "a'b\"c",
        "\\",
        "a\\",
        "a b",
        "=",
        "=x",
        ":",
        ":b",
        "a:",
        "a:b:c",
    ),
    *(
        "~nosuchuser",
        "~",
        "~/x",
        "/dev/zero",
        "/dev/null",
        "/",
        ".",
        "..",
        "../../etc/passwd",
        "//",
        "a/",
        "*",
        "[a",
    ),
    *(
        "é",
        "\u0000",
        "a\nb",
        "\r",
        "\x1b[31m",
        "\u2028",
        "\ud800",
        "\ufeff",
        "\U0001f600",
        "a" * 300,
        "9" * 5000,
    ),
    *(
        "bait",
        "bait.run",
        "bait:",
        ":run",
        _RUN,
        "import bait",
        "cuda:99",
        "cuda:-1",
        "auto",
        "none",
        "gpt2",
        "nano",
    ),
    *(
        "20261126",
        "2026-11-26",
        "2026-11-26 10:00:00",
        "!!python/name:bait.run",
        "<<",
        "&a",
        "*a",
        "- a",
        "# a",
        "%",
    ),
    *(
        "range(1,3)",
        "range(1,3,0)",
        "range(1,1e9)",
        "choice(1,2)",
        "interval(1,2)",
        "glob(*)",
        "shuffle(1,2)",
    ),
]
# Entries of `defaults`; other.yaml lies beside the file.
_ENTRIES = [
    "other",
    "other@hydra",
    "other@hydra.job",
    "other@model_cfg",
    "other@env",
    "optional no",
    "no",
    5,
    None,
    [],
    "mine",
]
_ENTRIES += [
    "../other",
    "/other",
    "hydra/launcher/basic",
    "~nosuchuser/x",
    "other@",
    "@hydra",
    "bait",
    "/etc/passwd",
    "fifo",
]
_ENTRIES += [
    {"override hydra/launcher": "joblib"},
    {"/hydra/launcher": "joblib"},
    {"preset": "nano"},
    {"other@hydra": None},
]
_ENTRIES += [{"optional hydra/launcher": "joblib"}, {"preset": ["nano", "micro"]}, {"a": {"b": 1}}, {1: 2}]
_CALL = {"_target_": "bait.run", "_args_": []}
_TAGS = ["!!python/object/apply:bait.run []", "!!python/object/new:bait.Model {}", "!!python/module:bait ''"]
_TAGS += ["!!python/name:bait.run ''", "!!binary AAAA", "!!binary A", "!!set {a, b}", "!!omap [a: 1]", "!x y"]
_TAGS += [
    "!!timestamp 2026-11-26",
    "!!int x",
    "!!float x",
    "!!bool x",
    "!!null x",
    "!!int ''",
    "!!map [1]",
    "!!seq {}",
]
_NATIVE = [
    *GENERIC_FIELDS,
    "defaults",
    "hydra",
    "env",
    "model_cfg",
    "kernels",
    "preset",
    "data",
    "type",
    "resume",
]
_INNER = [
    "d_model",
    "n_layers",
    "n_heads",
    "n_ctx",
    "vocab_size",
    "dropout",
    "bias",
    "model_dim",
    "block_size",
    "x.y",
]
_FOREIGN = [
    "n_layer",
    "n_embd",
    "n_head",
    "block_size",
    "batch_size",
    "dropout",
    "bias",
    "vocab_size",
    "max_iters",
]
_FOREIGN += [
    "learning_rate",
    "dataset",
    "init_from",
    "dtype",
    "device",
    "compile",
    "out_dir",
    "gradient_accumulation_steps",
]
_STRANGE = [
    "",
    " ",
    "a b",
    "a.b",
    "a=b",
    "é",
    "_target_",
    "__class__",
    "<<",
    "~x",
    "+x",
    "1",
    "null",
    "x" * 200,
    "${x}",
]
_HYDRA = [
    "hydra.run.dir",
    "hydra.mode",
    "hydra/launcher",
    "hydra.callbacks",
    "hydra.searchpath",
    "hydra.job.env_set",
]
_FLAGS = [
    "-m",
    "-c",
    "-p",
    "-i",
    "-h",
    "-r",
    "--cfg",
    "--info",
    "--multirun",
    "--resolve",
    "--package",
    "--config-dir",
]
_FLAGS += [
    "--config-path",
    "--config-name",
    "-cn",
    "-cp",
    "--hydra_model_cfg",
    "--model",
    "--learning_rate",
    "--seed",
]
_DIRECTIVES = [
    "FROM",
    "MODEL",
    "DATA",
    "TRAIN",
    "LR_SCHEDULE",
    "SYSTEM",
    "LOGGING",
    "DDP",
    "ADVANCED",
    "ENV",
    "RUN",
]


def prepare(folder: Path) -> None:
    """Import what every case needs, torch among it, before the hook listens and memory is counted."""
    import torch  # noqa: F401

    import models
    import trainer.commands.convert
    import trainer.commands.train  # noqa: F401

    for name in models.ARCHITECTURES:
        architecture_config(name, None, lambda key: "")


def number(rng: random.Random) -> Any:
    return rng.choice(_NUMBERS)


def text(rng: random.Random) -> str:
    """A text that means something somewhere, or none at all."""
    if rng.random() < 0.85:
        return rng.choice(_TEXTS)
    return "".join(rng.choices("abz019 .:=,'\"\\${}[]()#~-+_/\n\t\u00e9", k=rng.randrange(12)))


def key(rng: random.Random) -> str:
    pool = rng.choices([_NATIVE, _INNER, _FOREIGN, _STRANGE], [6, 3, 3, 2])[0]
    return rng.choice(pool)


def value(rng: random.Random, depth: int = 0) -> Any:
    """A scalar, or a small tree of them."""
    pick = rng.random() + 0.1 * depth
    if pick < 0.1:
        return {key(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    if pick < 0.2:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if pick < 0.25:
        return dict(_CALL)
    if pick < 0.45:
        return number(rng)
    return rng.choice([None, True, False]) if pick < 0.55 else text(rng)


def tree(rng: random.Random) -> dict[str, Any]:
    """A model file's worth of keys; most build on `training`, as else nothing more is looked at."""
    found = {key(rng): value(rng) for _ in range(rng.choice([0, 1, 1, 1, 2, 5]))}
    found["model_cfg"] = {rng.choice(_INNER): value(rng) for _ in range(rng.choice([0, 0, 1, 3]))}
    if rng.random() < 0.8:
        found["defaults"] = ["training", "_self_"]
        found["type"] = "gpt2"
        if rng.random() < 0.2:
            found["defaults"].insert(1, rng.choice(_ENTRIES))
    if rng.random() < 0.2:
        found["env"] = {rng.choice(["A", "KEY", "LD_PRELOAD", "", "a=b", "\0"]): value(rng)}
    return found


def as_yaml(rng: random.Random, found: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(found))
    written = yaml.safe_dump(
        plain, allow_unicode=bool(rng.getrandbits(1)), default_flow_style=rng.choice([None, False])
    )
    if rng.random() < 0.15:
        written += f"\n{rng.choice(_NATIVE)}_: {rng.choice(_TAGS)}\n"
    if rng.random() < 0.1:
        written += rng.choice(
            [bomb(rng), "a: &x {b: *x}\n", "a: &x [*x]\n", nested(rng), "<<: 1\n", "? [a]\n: 1\n"]
        )
    return written


def as_json(rng: random.Random, found: dict[str, Any]) -> str:
    flat = {rng.choice(_FOREIGN): value(rng) for _ in range(2)} if rng.random() < 0.7 else found
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0, "bias": True}
    written = json.dumps(sizes | flat if rng.random() < 0.6 else flat)
    return (
        rng.choice(["[" * 100_000, '{"a":' * 5_000, "{}{}", "[]", "NaN"]) if rng.random() < 0.05 else written
    )


def as_directives(rng: random.Random, found: dict[str, Any]) -> str:
    lines = [f"FROM {text(rng)}"] if rng.random() < 0.2 else []
    for _ in range(rng.randrange(1, 6)):
        pairs = [f"{rng.choice([*_FOREIGN, *found])}={_bare(rng)}" for _ in range(rng.choice([1, 1, 3]))]
        lines.append(f"{rng.choice(_DIRECTIVES)} {' '.join(pairs)}")
    return "\n".join(lines) + rng.choice(["", "\n", "\\", "\\\n", "\\\n\n"])


def as_python(rng: random.Random, found: dict[str, Any]) -> str:
    lines = []
    for _ in range(rng.randrange(1, 6)):
        name = rng.choice([*_FOREIGN, "_x", "type"])
        lines.append(rng.choice([f"{name} = {value(rng)!r}", *_statements(rng, name)]))
    return "\n".join(lines) + "\n"


def _statements(rng: random.Random, name: str) -> list[str]:
    return [
        f"{name} = {_RUN}",
        f"import bait; {name} = bait.run()",
        f"{name} = [].__class__.__base__.__subclasses__()",
        f"{name} = 9**9**9",
        f"{name} = 2**64 * 2**64",
        f"{name} = 'a' * 10**9",
        f"{name} = [0] * 10**9",
        f"{name} = f'{{{_RUN}}}'",
        f"{name} = 1/0",
        f"{name} = 1 if {name} else 2",
        f"{name}: int = {rng.randrange(9)}",
        f"{name} = " + "(" * 60 + "1" + ")" * 60,
        f"{name} = " + "-" * rng.choice([40, 5000]) + "1",
        f"{name} = " + "1+" * rng.choice([40, 3000]) + "1",
        f"if True:\n  {name} = 1",
        f"{name} = {name} = 1",
        f"eval({_RUN!r})",
    ]


def _bare(rng: random.Random) -> str:
    return rng.choice([text(rng), repr(value(rng)), f'"{text(rng)}"', "[" * rng.choice([3, 60, 4000])])


def bomb(rng: random.Random) -> str:
    """Nine lists, each of nine times the one before."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, rng.choice([4, 9, 30]))]
    return "\n".join(lines) + "\n"


def nested(rng: random.Random) -> str:
    depth = rng.choice([30, 301, 2000])
    opened, closed = rng.choice([("[", "]"), ("{a: ", "}")])
    return f"deep: {opened * depth}{closed * depth}\n"


def random_bytes(rng: random.Random) -> bytes:
    alphabet = rng.choice(
        [bytes(range(256)), b" \n\t:-[]{}\"'#&*!|>%@`?,=abc01\\", b"\xff\xfe\xef\xbb\xbf\x00a:\n"]
    )
    return bytes(rng.choices(alphabet, k=rng.choice([0, 1, 5, 40, 400, 4000])))


def mutated(rng: random.Random, data: bytes) -> bytes:
    """A file with one to four accidents."""
    for _ in range(rng.randrange(1, 5)):
        data = _accident(rng, data)
    return data


def _accident(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    pick = rng.randrange(11)
    if pick == 0:
        place = rng.randrange(len(data) + 1)
        return data[:place] + bytes([rng.randrange(256)]) + data[place + rng.randrange(2) :]
    if pick == 1:
        return data[: rng.randrange(len(data) + 1)]
    if pick == 2:
        return b"\n".join([*lines[:at], *lines[at + 1 :]])
    if pick == 3:
        return b"\n".join([*lines[:at], lines[at], *lines[at:]])
    if pick == 4:
        return rng.choice(
            [
                b"\xef\xbb\xbf" + data,
                data.replace(b"\n", b"\r\n"),
                data.replace(b"\n", b"\r"),
                data.decode("utf-8", "replace").encode("utf-16"),
            ]
        )
    if pick <= 8:  # another value
        for mark in rng.sample([b": ", b"=", b" = "], 3):
            head, found, _ = lines[at].partition(mark)
            if found:
                new = rng.choice([text(rng), json.dumps(value(rng)), rng.choice(_TAGS)])
                lines[at] = head + found + new.encode("utf-8", "surrogatepass")
                return b"\n".join(lines)
        return data
    new = rng.choice(
        [f"{key(rng)}: {json.dumps(value(rng))}", f"{key(rng)}={text(rng)}", f"hydra: {json.dumps(_CALL)}"]
    )
    lines.insert(at, new.encode("utf-8", "surrogatepass"))
    return b"\n".join(lines)


def words(rng: random.Random) -> list[str]:
    """Further words of a command line."""
    return [_word(rng) for _ in range(rng.choice([1, 1, 1, 2, 4]))]


def _word(rng: random.Random) -> str:
    pick = rng.random()
    name = rng.choice(
        [key(rng), f"model_cfg.{rng.choice(_INNER)}", f"env.{rng.choice(['A', 'KEY', 'a.b', ''])}"]
    )
    if pick < 0.6:
        return f"{rng.choice(['', '', '', '', '--', '+', '++', '~'])}{name}={_given(rng)}"
    if pick < 0.7:
        return f"{rng.choice(_HYDRA)}={_given(rng)}"
    if pick < 0.72:
        return rng.choice(
            ["--cfg=job", "--cfg=all", "--info=config", "--help", f"--package={name}", "--resolve"]
        )
    if pick < 0.85:
        return rng.choice(_FLAGS) + rng.choice(["", f"={_given(rng)}"])
    return rng.choice(["~" + name, "--" + name, text(rng), text(rng), "show"])


def _given(rng: random.Random) -> str:
    """A value as one types it."""
    pick = rng.random()
    if pick < 0.5:
        return text(rng).replace("\0", "")
    if pick < 0.7:
        return json.dumps(value(rng))
    few = ",".join(text(rng).replace("\0", "") for _ in range(rng.randrange(1, 4)))
    function = rng.choice(
        ["range", "choice", "interval", "sort", "shuffle", "glob", "tag", "int", "str", "nosuch"]
    )
    return few if pick < 0.8 else f"{function}({few})" if pick < 0.95 else "[" * rng.choice([5, 400]) + "1"
