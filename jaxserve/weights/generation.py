"""What a checkpoint says about generating: the tokens that end an answer, and its sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError

# name: (lowest, highest) allowed value
_SAMPLING_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, float("inf")),
    "top_k": (-1, float("inf")),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, float("inf")),
}


def eos_ids(settings: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """``eos_token_id`` of a config.json or generation_config.json: an id, a list of ids, or none.

    Raises:
        CheckpointError: it is something else.
    """
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise CheckpointError(f"eos_token_id of {where!r} is {value!r}; expected a token id or a list of token ids")
    return tuple(ids)


def sampling_defaults(generation: Mapping[str, Any], where: str) -> dict[str, float | int]:
    """The sampling settings of a generation_config.json, under their ``SamplingParams`` names.

    ``do_sample: false`` is greedy, as in Hugging Face transformers: ``temperature`` 0 and no truncation.

    Raises:
        CheckpointError: a setting isn't a number in its range.
    """
    defaults: dict[str, float | int] = {}
    for name, (low, high) in _SAMPLING_RANGES.items():
        if (value := generation.get(name)) is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise CheckpointError(f"{name} of {where!r} is {value!r}; expected a number from {low:g} to {high:g}")
        defaults[name] = value
    if generation.get("do_sample") is False:
        penalty = {k: v for k, v in defaults.items() if k == "repetition_penalty"}
        return {"temperature": 0.0} | penalty
    return defaults


def union(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """All ids once, in order of first appearance."""
    return tuple(dict.fromkeys(i for group in groups for i in group))
