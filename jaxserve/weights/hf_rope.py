"""Rope settings of a config.json, in both spellings.

transformers 5 writes ``rope_parameters`` (one dict, or one per layer type); older versions ``rope_theta`` and
``rope_scaling``, and for Gemma 3 ``rope_local_base_freq``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.models.config import LinearScaling, Llama3Scaling, RopeConfig

KNOWN = ("default", "linear", "llama3")
GLOBAL, LOCAL = "full_attention", "sliding_attention"


def rope_configs(
    settings: Mapping[str, Any], *, theta: float, local_theta: float | None = None
) -> dict[str, RopeConfig]:
    """The rope of each layer type.

    Args:
        settings: a config.json.
        theta: the family's default base.
        local_theta: default base of windowed layers, where the family gives them a base of their own.

    Raises:
        UnsupportedModelError: a rope type that isn't known, or partial rotary.
        CheckpointError: a value is missing or not a number.
    """
    if _number(settings, "partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {settings['partial_rotary_factor']} isn't supported")
    written, old = (settings.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    for key, value in (("rope_parameters", written), ("rope_scaling", old)):
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{key} is {value!r}; expected an object")
    per_type = any(key in written for key in (GLOBAL, LOCAL))
    _refuse_disagreement(old, (written.get(GLOBAL) or {}) if per_type else written)
    base = {"rope_theta": _number(settings, "rope_theta", theta)} | dict(old)
    base_local = dict(base)
    if local_theta is not None:  # windowed layers are never scaled
        base_local = {"rope_theta": _number(settings, "rope_local_base_freq", local_theta)}
    if not per_type:
        base |= written
        base_local |= written if local_theta is None else {}
    return {
        GLOBAL: _rope(base | (written.get(GLOBAL) or {}) if per_type else base),
        LOCAL: _rope(base_local | (written.get(LOCAL) or {}) if per_type else base_local),
    }


def _refuse_disagreement(old: Mapping[str, Any], written: Mapping[str, Any]) -> None:
    """A config.json may have both spellings, for readers of either, and they must say the same."""
    old, written = ({"rope_type" if k == "type" else k: v for k, v in one.items()} for one in (old, written))
    for key in old.keys() & written.keys():
        if old[key] != written[key]:
            raise CheckpointError(
                f"{key} is {old[key]!r} in rope_scaling and {written[key]!r} in rope_parameters; expected the same"
            )


def _rope(parameters: Mapping[str, Any]) -> RopeConfig:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = _number(parameters, "rope_theta")
    if _number(parameters, "partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(f"partial_rotary_factor {parameters['partial_rotary_factor']} isn't supported")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, LinearScaling(_number(parameters, "factor")))
    if kind == "llama3":
        scaling = Llama3Scaling(
            factor=_number(parameters, "factor"),
            low_freq_factor=_number(parameters, "low_freq_factor"),
            high_freq_factor=_number(parameters, "high_freq_factor"),
            original_max_position=int(_number(parameters, "original_max_position_embeddings")),
        )
        return RopeConfig(theta, scaling)
    raise UnsupportedModelError(f"rope scaling {kind!r} isn't supported; known: {', '.join(KNOWN)}")


def _number(settings: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = settings.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CheckpointError(f"rope setting {key!r} is {value!r}; expected a positive number")
    return float(value)
