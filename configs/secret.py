"""Secrets: values of variables whose names say so. They reach the environment of a run, and no file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from configs.messages import ConfigError, is_secret

_VARIABLE = re.compile(r"oc\.env:\s*['\"]?(\w+)")


def reads_secret(text: object) -> bool:
    """Whether a text stands for the value of a variable with a secret name: `${oc.env:MY_TOKEN}`."""
    return isinstance(text, str) and any(is_secret(name) for name in _VARIABLE.findall(text))


def secret_value(name: str, given: object) -> str:
    """What a secret `env.<name>` is set to. ConfigError where that cannot be known."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        raise ConfigError(f"env: {name!r} is no name of a variable; letters, digits and '_' can be in one")
    if not isinstance(given, str) or "${" not in given:
        return str(given)
    try:
        return str(OmegaConf.create({"value": given}).value)
    except OmegaConfBaseException as error:
        reason = str(error).strip().partition("\n")[0].rpartition(": ")[2]
        raise ConfigError(
            f"env.{name}: {given!r} cannot be read: {reason}. A secret is a text, or a variable: ${{oc.env:<NAME>}}"
        ) from None


@contextmanager
def kept_secret() -> Iterator[None]:
    """While this lasts no value can be taken from a variable with a secret name: it would stand in the run's files."""
    OmegaConf.register_new_resolver("oc.env", _env, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def _env(key: str, *default: Any) -> str | None:
    if is_secret(key) and key in os.environ:
        raise ValueError(
            f"the value of {key}, a secret by its name, would stand in the run's files. Programs find it under "
            f"env.<NAME>, which is never stored: env.{key}='${{oc.env:{key}}}'"
        )
    return oc.env(key, *default)
