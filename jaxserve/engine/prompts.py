"""The shapes that a prompt may have, made into one. Imports no jax.

A prompt is a string, a sequence of token ids, or a mapping with ``prompt`` and/or ``prompt_token_ids``, and perhaps
``cache_salt``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.errors import InvalidRequestError
from jaxserve.text.codec import check_unicode

PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ParsedPrompt:
    """One prompt: text, or token ids, or both (then the ids count and the text is only reported)."""

    text: str | None
    token_ids: tuple[int, ...] | None
    cache_salt: str | None = None


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[ParsedPrompt]:
    """All prompts of a call, in order. A string, a mapping or a list of token ids is one prompt."""
    if isinstance(prompts, (str, Mapping)) or _is_token_ids(prompts):
        return [parse_prompt(prompts)]
    if not _is_list(prompts):
        raise InvalidRequestError(
            f"prompts is {_show(prompts)}; allowed: a string, token ids, a dict with 'prompt' or 'prompt_token_ids', "
            "or a list of these"
        )
    return [parse_prompt(prompt) for prompt in prompts]


def parse_prompt(prompt: Any) -> ParsedPrompt:
    """One prompt.

    Raises:
        InvalidRequestError: it is empty, of an unknown shape, or holds something that isn't a token id.
    """
    if isinstance(prompt, str):
        return ParsedPrompt(_text(prompt), None)
    if isinstance(prompt, Mapping):
        return _from_mapping(prompt)
    return ParsedPrompt(None, _token_ids(prompt))


def _from_mapping(prompt: Mapping[str, Any]) -> ParsedPrompt:
    given = {key: value for key, value in prompt.items() if value is not None}
    if unknown := [key for key in given if key not in PROMPT_KEYS]:
        raise InvalidRequestError(f"the prompt has key {unknown[0]!r}; allowed: {', '.join(PROMPT_KEYS)}")
    if "prompt" not in given and "prompt_token_ids" not in given:
        raise InvalidRequestError(f"the prompt has keys {list(prompt)}; it needs 'prompt' or 'prompt_token_ids'")
    salt = given.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequestError(f"cache_salt is {salt!r}; allowed: a string that isn't empty")
    if salt is not None:
        check_unicode("cache_salt", salt)
    ids = _token_ids(given["prompt_token_ids"]) if "prompt_token_ids" in given else None
    text = _text(given["prompt"]) if "prompt" in given else None
    return ParsedPrompt(text, ids, salt)


def _text(text: Any) -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(f"the prompt is {_show(text)}; allowed: a string")
    if not text:
        raise InvalidRequestError("the prompt is empty; it needs at least one character")
    check_unicode("the prompt", text)
    return text


def _token_ids(ids: Any) -> tuple[int, ...]:
    if not _is_list(ids):
        raise InvalidRequestError(f"the prompt is {_show(ids)}; allowed: a string, token ids or a dict")
    if len(ids) == 0:
        raise InvalidRequestError("the prompt is empty; it needs at least one token id")
    for item in ids:
        if not _is_int(item):
            raise InvalidRequestError(f"the prompt holds {_show(item)}; allowed: token ids, which are integers")
    return tuple(map(int, ids))


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0  # an array of no dimension has no length
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_token_ids(value: Any) -> bool:
    return _is_list(value) and len(value) > 0 and _is_int(value[0])


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}... ({type(value).__name__})" if len(text) > 60 else f"{text} ({type(value).__name__})"
