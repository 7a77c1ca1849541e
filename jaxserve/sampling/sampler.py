"""Logits to tokens: the one sampler of decode, prefill and verify.

The order is vLLM's: raw log-probabilities; then ``processors`` (masks, bad words, min_tokens, bias, penalties); then
temperature, min_p, top_k, top_p (``truncate``); then the draw. The draw is Gumbel-max, written as

    argmax over kept ids of  logits + temperature * noise

which has the distribution softmax(logits / temperature), can't overflow at small temperatures, and is plain argmax in
rows of temperature 0. Equal values: the lowest id wins. A row in which every id is masked gives id 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.sampling import logprobs, processors
from jaxserve.sampling.logprobs import LogprobArrays
from jaxserve.sampling.noise import position_keys
from jaxserve.sampling.rows import SampleRows
from jaxserve.sampling.state import SamplingState
from jaxserve.sampling.tier import Tier
from jaxserve.sampling.truncate import truncate
from pallas_kernels.gumbel_argmax.api import gumbel_argmax


def sample(
    logits: jax.Array,  # float32[M, Vp]
    rows: SampleRows,
    state: SamplingState,
    *,
    tier: Tier,
    vocab_size: int,
    max_logprobs: int,
    implementation: str,
    token_mask: jax.Array | None = None,  # uint32[M, W], bit set = allowed
) -> tuple[jax.Array, LogprobArrays | None]:
    """One token per row, int32[M], always in 0..vocab_size-1.

    Args:
        rows: from ``rows.make_rows``: which choice and which position of it each row is.
        tier: what is compiled in; a row gives the same token in every tier that honours its settings.
        vocab_size: ids from here to Vp are padding and never sampled.
        max_logprobs: C of the returned log-probabilities; they come in tiers that cover SCORED, else None.
        implementation: of truncation_threshold and gumbel_argmax, see their api.py.
        token_mask: ids a grammar allows, in any tier.
    """
    logits = logits.astype(jnp.float32)
    # The draw takes no padding, whatever that holds. XLA for TPU needs half the memory for it if it finds a mask before
    # it, also where there is no padding.
    if tier > Tier.PLAIN or implementation == "xla":
        logits = processors.mask_padding(logits, vocab_size)
    raw = logits
    if token_mask is not None:
        logits = processors.apply_token_mask(logits, token_mask)
    if tier.covers(Tier.SCORED):
        logits = processors.process(logits, rows, state)
    if tier.covers(Tier.TRUNCATED):
        slots = rows.slots
        settings = state.temperature[slots], state.top_k[slots], state.top_p[slots], state.min_p[slots]
        logits = truncate(logits, *settings, implementation)
    temperature = keys = None
    if tier.covers(Tier.PLAIN):
        temperature, keys = state.temperature[rows.slots], position_keys(state.key[rows.slots], rows.output_index)
    token_ids = gumbel_argmax(logits, temperature, keys, vocab_size, implementation)
    if not tier.covers(Tier.SCORED):
        return token_ids, None
    return token_ids, logprobs.compute(raw, token_ids, max_logprobs)
