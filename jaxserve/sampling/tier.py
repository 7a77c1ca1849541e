"""How much of the sampler a step is compiled with. Imports no jax."""

from __future__ import annotations

from enum import IntEnum

from jaxserve.sampling_params import SamplingParams


class Tier(IntEnum):
    """Static and hashable. A tier is a set of parts, one bit each; argmax is in all of them.

    A step needs the parts of all its rows, which is the bitwise or of their tiers. A row gives the same token in every
    tier that covers its own.
    """

    GREEDY = 0
    PLAIN = 1  # temperature and Gumbel noise
    TRUNCATED = 2 | PLAIN  # min_p, top_k, top_p
    SCORED = 4 | PLAIN  # masks, bad words, min_tokens, bias, penalties, logprobs
    FULL = TRUNCATED | SCORED

    def covers(self, other: Tier) -> bool:
        return self & other == other


def tier_for(params: SamplingParams) -> Tier:
    """The smallest tier that honours ``params``."""
    scored = (
        params.logprobs is not None
        or params.min_tokens > 0
        or bool(params.logit_bias)
        or params.allowed_token_ids is not None
        or bool(params.bad_words)
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
        or params.repetition_penalty != 1.0
    )
    if params.greedy:  # truncation never removes the most likely id
        return Tier.SCORED if scored else Tier.GREEDY
    if params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0:
        return Tier.FULL if scored else Tier.TRUNCATED
    return Tier.SCORED if scored else Tier.PLAIN
