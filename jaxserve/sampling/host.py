"""One choice's sampling settings as fixed-shape numpy arrays, ready to be uploaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxserve.config import Limits
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling import bitmask
from jaxserve.sampling.noise import choice_key
from jaxserve.sampling_params import SamplingParams

NO_ID = -1  # pads lists of token ids


def row_spec(vocab_size: int, limits: Limits) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shape and dtype of every array of ``host_row``. All are 32 bits wide, so a row can travel as one int32 buffer."""
    f32, i32, u32 = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint32)
    return {
        "temperature": ((), f32),
        "top_k": ((), i32),
        "top_p": ((), f32),
        "min_p": ((), f32),
        "presence": ((), f32),
        "frequency": ((), f32),
        "repetition": ((), f32),
        "key": ((2,), u32),
        "min_len": ((), i32),
        "prompt_len": ((), i32),
        "stop_ids": ((limits.max_stop_token_ids,), i32),
        "bias_ids": ((limits.max_logit_bias,), i32),
        "bias_values": ((limits.max_logit_bias,), f32),
        "allowed": ((bitmask.num_words(vocab_size),), u32),
        "bad_words": ((limits.max_bad_words, limits.max_bad_word_len), i32),
    }


def host_row(
    params: SamplingParams,
    *,
    seed: int,
    choice_index: int,
    eos_token_ids: Iterable[int],
    prompt_len: int,
    bad_words_ids: Sequence[Sequence[int]],
    vocab_size: int,
    limits: Limits,
) -> dict[str, np.ndarray]:
    """Everything that ``SamplingState`` holds of one slot, but what it derives from the tokens; see ``row_spec``.

    Args:
        seed: the request's seed, 64 bits, drawn at admission where the caller gave none.
        eos_token_ids: masked before ``min_tokens`` together with ``stop_token_ids``, also with ``ignore_eos``.
        prompt_len: tokens of the prompt, not counting what was emitted before a preemption.
        bad_words_ids: ``params.bad_words`` as token ids; one word may have several entries.

    Raises:
        InvalidRequestError: a list is longer than its limit, or a token id is outside the vocabulary.
    """
    stop_ids = sorted({*eos_token_ids, *(params.stop_token_ids or ())})
    bias = params.logit_bias or {}
    words = np.full((limits.max_bad_words, limits.max_bad_word_len), NO_ID, np.int32)
    _check_length("bad_words", len(bad_words_ids), limits.max_bad_words, "token sequences")
    for row, word in zip(words, bad_words_ids, strict=False):
        _check_length("bad_words", len(word), limits.max_bad_word_len, "tokens in one word")
        _check_ids("bad_words", word, vocab_size)
        if word:  # right-aligned: the last column is the id to be forbidden
            row[-len(word) :] = word
    _check_ids("logit_bias", bias, vocab_size)
    if params.allowed_token_ids is None:
        allowed = np.full(bitmask.num_words(vocab_size), 0xFFFFFFFF, np.uint32)
    else:
        _check_ids("allowed_token_ids", params.allowed_token_ids, vocab_size)
        allowed = bitmask.from_ids(params.allowed_token_ids, vocab_size)
    return {
        "temperature": np.array(params.temperature, np.float32),
        "top_k": np.array(max(params.top_k, 0), np.int32),
        "top_p": np.array(params.top_p, np.float32),
        "min_p": np.array(params.min_p, np.float32),
        "presence": np.array(params.presence_penalty, np.float32),
        "frequency": np.array(params.frequency_penalty, np.float32),
        "repetition": np.array(params.repetition_penalty, np.float32),
        "key": choice_key(seed, choice_index),
        "min_len": np.array(prompt_len + params.min_tokens, np.int32),
        "prompt_len": np.array(prompt_len, np.int32),
        "stop_ids": _padded("stop_token_ids (EOS included)", stop_ids, limits.max_stop_token_ids, np.int32, NO_ID),
        "bias_ids": _padded("logit_bias", list(bias), limits.max_logit_bias, np.int32, NO_ID),
        "bias_values": _padded("logit_bias", list(bias.values()), limits.max_logit_bias, np.float32, 0),
        "allowed": allowed,
        "bad_words": words,
    }


def _padded(name: str, values: Sequence[float], size: int, dtype: type[np.generic], fill: int) -> np.ndarray:
    _check_length(name, len(values), size, "entries")
    out = np.full(size, fill, dtype)
    out[: len(values)] = values
    return out


def _check_length(name: str, length: int, limit: int, what: str) -> None:
    if length > limit:
        raise InvalidRequestError(f"{name} has {length} {what}; allowed: at most {limit}")


def _check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(f"{name} holds token id {token_id}; allowed: 0..{vocab_size - 1}")
