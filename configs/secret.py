"""Secrets: values of variables whose names say so. They reach the environment of a run and its fields, and no file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc
from pydantic import TypeAdapter, ValidationError

from configs.concealed import SHORTEST, concealed, lacking, take
from configs.messages import ConfigError, is_secret
from configs.schema import RunConfig

# What the folder of a run is called by, and what its files are read by.
_SEEN = {"output_dir", "model_name", "resume", "type", "model_adapter", "model_cfg", "env"}
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


_read: list[str] | None = None  # secrets that a field has read, while one is resolved


@contextmanager
def kept_secret() -> Iterator[None]:
    """While this lasts values can be taken from variables with secret names by fields of `field_of` alone."""
    OmegaConf.register_new_resolver("oc.env", _env, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def field_of(key: str, read: Callable[[], Any]) -> Any:
    """The value of a field, which `read` resolves. It may hold secrets, which are concealed from then on, where the
    field can be read again with `<redacted>` in the place of a text."""
    global _read
    _read = []
    try:
        value = read()
    finally:
        found, _read = _read, None
    if not found:
        return value
    take(found)
    if not _can_be_redacted(key, value):
        raise ConfigError(_refusal(key, "it cannot be left out of the run's files"))
    return value


def _can_be_redacted(key: str, value: Any) -> bool:
    field = RunConfig.model_fields.get(key)
    if field is None or key in _SEEN:
        return False
    kind: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    with_it = concealed(value)
    try:
        TypeAdapter(kind).validate_python(with_it, strict=True)
    except ValidationError:
        return False
    return lacking(with_it)


def _refusal(key: str, why: str) -> str:
    return (
        f"command line: {key}: takes the value of a variable that is a secret by its name, and {why}. Programs find it "
        f"under env.<NAME>, which is never stored: env.API_KEY='${{oc.env:API_KEY}}'"
    )


def _env(key: str, *default: Any) -> str | None:
    if not is_secret(key) or key not in os.environ:
        return oc.env(key, *default)
    value = os.environ[key]
    why = f"would stand in the run's files{'' if _read is None else f': it has less than {SHORTEST} characters'}"
    if _read is None or len(value) < SHORTEST:
        raise ValueError(
            f"the value of {key}, a secret by its name, {why}. Programs find it under env.<NAME>, which is never "
            f"stored: env.{key}='${{oc.env:{key}}}'"
        )
    _read.append(value)
    return value
