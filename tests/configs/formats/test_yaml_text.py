"""YAML as people write it: what cannot be read is told with its line, and what would take all memory is not begun."""

from __future__ import annotations

import random

import pytest
from omegaconf import OmegaConf

from configs.formats.yaml_text import Unreadable, literal, parse

BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: '${HOME'\n", 2, r"'\$\{HOME' cannot be read.*write \\\$\{"),
        ("a: 1\nb: !!int ''\n", 2, "'' cannot be read as int"),
        ("a: 1\nb: !!bool x\n", 2, "'x' cannot be read as bool"),
        ("a: !!float x\n", 1, "'x' cannot be read as float"),
        (f"a: {'9' * 5000}\n", 1, r"'99.*\.\.\.' cannot be read as int: Exceeds the limit"),
        ("a: &x {b: *x}\n", 1, "an alias leads back to where it stands"),
        (BOMB, 6, "aliases come to more than 100,000 values"),
        (f"a: {'[' * 301}{']' * 301}\n", 1, "nested 50 deep at most"),
        (f"a: {'{b: ' * 5000}{'}' * 5000}\n", None, "nested 50 deep at most"),
        (f"a: &x {'[' * 40}{']' * 40}\nb: {'[' * 20}*x{']' * 20}\n", 2, "nested 50 deep at most"),
        ("? null\n: 1\n", None, "NoneType"),
    ],
    ids=range(11),
)
def test_what_cannot_be_read_is_told_with_its_line(text, line, said):
    with pytest.raises(Unreadable, match=said) as error:
        parse(text)
    assert error.value.line == line


def test_aliases_and_depths_that_people_use_are_read():
    values, _, _ = parse(f"a: &a {{b: 1}}\nc: [*a, *a]\nd: {'[' * 48}{']' * 48}\n")
    assert values["c"] == [{"b": 1}, {"b": 1}]


def test_any_text_comes_back_as_it_was_written():
    rng = random.Random(3)
    texts = ["\\${", "\\\\${a}", "${"]
    texts += ["".join(rng.choices("\\${}a:'\" ", k=rng.randrange(10))) for _ in range(150)]
    written = OmegaConf.to_yaml(OmegaConf.create(literal({"a": texts, "b": {"c": "${d}"}})))
    assert OmegaConf.to_container(OmegaConf.create(written), resolve=True) == {"a": texts, "b": {"c": "${d}"}}
