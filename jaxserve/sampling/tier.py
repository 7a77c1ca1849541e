"""How much of the sampler a step is compiled with. Imports no jax."""

from __future__ import annotations

from enum import IntEnum

from jaxserve.sampling_params import SamplingParams


class Tier(IntEnum):
    """Static, hashable and ordered: each tier does what the one below it does, so a step takes the max of its rows.

    A row gives the same token in every tier that is high enough for it.
    """

    GREEDY = 0  # argmax
    PLAIN = 1  # + temperature and Gumbel noise
    TRUNCATED = 2  # + min_p, top_k, top_p
    FULL = 3  # + masks, bad words, min_tokens, bias, penalties, logprobs


def tier_for(params: SamplingParams) -> Tier:
    """The lowest tier that honours ``params``."""
    needs_full = (
        params.logprobs is not None
        or params.min_tokens > 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )
    if needs_full:
        return Tier.FULL
    if params.greedy:  # truncation never removes the most likely id
        return Tier.GREEDY
    if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
        return Tier.TRUNCATED
    return Tier.PLAIN
