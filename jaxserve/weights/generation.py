"""What a checkpoint says about generating: the tokens that end an answer, and its sampling defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.errors import CheckpointError, InvalidRequestError
from jaxserve.sampling_params import CHECKPOINT_SETTINGS, SamplingParams


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
        CheckpointError: no request could have these settings.
    """
    defaults = {name: value for name in CHECKPOINT_SETTINGS if (value := generation.get(name)) is not None}
    if generation.get("do_sample") is False:
        penalty = {k: v for k, v in defaults.items() if k == "repetition_penalty"}
        defaults = {"temperature": 0.0} | penalty
    try:
        SamplingParams(**defaults)
    except InvalidRequestError as error:
        raise CheckpointError(f"{where!r} has a sampling default that no request may have: {error}") from error
    return defaults


def check_eos_ids(ids: tuple[int, ...], vocab_size: int, where: str) -> None:
    """Every id must be the model's.

    Raises:
        CheckpointError: one is outside the vocabulary.
    """
    if wrong := [i for i in ids if i >= vocab_size]:
        raise CheckpointError(
            f"eos_token_id {wrong[0]} of {where!r} is outside the vocabulary; expected 0..{vocab_size - 1}"
        )


def union(*groups: tuple[int, ...]) -> tuple[int, ...]:
    """All ids once, in order of first appearance."""
    return tuple(dict.fromkeys(i for group in groups for i in group))
