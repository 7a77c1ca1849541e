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
import numpy as np

from jaxserve.sampling import logprobs, processors
from jaxserve.sampling.logprobs import LogprobArrays
from jaxserve.sampling.noise import gumbel
from jaxserve.sampling.rows import SampleRows
from jaxserve.sampling.state import SamplingState
from jaxserve.sampling.tier import Tier
from jaxserve.sampling.truncate import in_parts, truncate


def sample(
    logits: jax.Array,  # float32[M, Vp]
    rows: SampleRows,
    state: SamplingState,
    *,
    tier: Tier,
    vocab_size: int,
    max_logprobs: int,
    token_mask: jax.Array | None = None,  # uint32[M, W], bit set = allowed
) -> tuple[jax.Array, LogprobArrays | None]:
    """One token per row, int32[M], always in 0..vocab_size-1.

    Args:
        rows: from ``rows.make_rows``: which choice and which position of it each row is.
        tier: what is compiled in; a row gives the same token in every tier that honours its settings.
        vocab_size: ids from here to Vp are padding and never sampled.
        max_logprobs: C of the returned log-probabilities; they come in tiers that cover SCORED, else None.
        token_mask: ids a grammar allows, in any tier.
    """
    logits = processors.mask_padding(logits.astype(jnp.float32), vocab_size)
    raw = logits
    if token_mask is not None:
        logits = processors.apply_token_mask(logits, token_mask)
    if tier.covers(Tier.SCORED):
        logits = processors.process(logits, rows, state)
    if tier.covers(Tier.TRUNCATED):
        slots = rows.slots
        logits = truncate(logits, state.temperature[slots], state.top_k[slots], state.top_p[slots], state.min_p[slots])
    if tier.covers(Tier.PLAIN):
        noise = gumbel(state.key[rows.slots], rows.output_index, logits.shape[1])
        logits = logits + state.temperature[rows.slots][:, None] * noise
    token_ids = first_largest(logits)
    if not tier.covers(Tier.SCORED):
        return token_ids, None
    return token_ids, logprobs.compute(raw, token_ids, max_logprobs)


def first_largest(
    logits: jax.Array,  # float32[M, V], no NaN
) -> jax.Array:
    """int32[M]: the lowest id among those of the row's largest logits.

    ``jnp.argmax`` over parts of the row first: a handful of whole rows can't occupy a GPU.
    """
    parts = in_parts(logits, -jnp.inf)  # [M, parts, ids of a part]
    ids = jnp.arange(parts.shape[1] * parts.shape[2], dtype=jnp.int32).reshape(parts.shape[1:])
    nothing = jnp.float32(-jnp.inf), np.int32(2**31 - 1)

    def better(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a_wins = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(a_wins, a[0], b[0]), jnp.where(a_wins, a[1], b[1])

    found = jax.lax.reduce((parts, jnp.broadcast_to(ids, parts.shape)), nothing, better, (2,))
    return jax.lax.reduce(found, nothing, better, (1,))[1]
