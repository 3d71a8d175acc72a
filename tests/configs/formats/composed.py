"""What tests of every format ask of a command line."""

import pytest

from configs.compose import compose
from configs.messages import ConfigError


def quiet(*words: str):
    """(run, architecture) of it."""
    return compose(list(words), notify=lambda text: None)


def refused(*words: str) -> list[str]:
    """What is wrong with it."""
    with pytest.raises(ConfigError) as error:
        quiet(*words)
    return error.value.problems
