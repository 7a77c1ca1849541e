"""The file of ``--config``: engine settings at its top level, sampling settings in its ``[sampling]`` table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from jaxserve.config import EngineConfig, Limits, read_toml
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.sampling_params import RepetitionDetection, SamplingParams

TABLES: dict[str, type] = {"limits": Limits, "repetition_detection": RepetitionDetection}


def read_settings(path: str, not_sampling: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Engine and sampling settings, each checked by itself: what doesn't fit together may yet be changed by flags.

    Args:
        not_sampling: settings of SamplingParams that a command line doesn't offer.

    Raises:
        ConfigError: the file can't be read, or holds something unknown or wrong; names the file and the setting.
    """
    engine = read_toml(path)
    sampling = _table(path, "sampling", engine.pop("sampling", {}))
    _known(path, "an unknown engine setting ", engine, EngineConfig)
    for name, cls in TABLES.items():
        if name in engine:
            _known(path, f"an unknown setting of {name}, ", _table(path, name, engine[name]), cls)
    if "speculative_config" in engine:
        _table(path, "speculative_config", engine["speculative_config"])
    for name, value in engine.items():
        try:
            checked = EngineConfig(**{"model": "any", name: value})
        except ConfigError as error:
            raise ConfigError(f"{path!r}: {error}") from error
        if name in TABLES:
            engine[name] = getattr(checked, name)
    _known(path, "an unknown sampling setting ", sampling, SamplingParams)
    for name, value in sampling.items():
        if name in not_sampling:
            raise ConfigError(f"{path!r} sets sampling.{name}, which the command line doesn't offer")
        try:
            SamplingParams.from_dict({"max_tokens": None, name: value})
        except InvalidRequestError as error:
            raise ConfigError(f"{path!r}, [sampling]: {error}") from error
    return engine, sampling


def _table(path: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path!r}: {name} is {value!r}; allowed: a table, [{name}]")
    return value


def _known(path: str, what: str, settings: Mapping[str, Any], cls: type) -> None:
    known = sorted(f.name for f in fields(cls))
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"{path!r} has {what}{unknown[0]!r}; known: {', '.join(known)}")
