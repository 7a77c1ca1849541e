"""Everything that changes logits before temperature and truncation, in vLLM's order.

1. ids outside the vocabulary (padding) are -inf
2. ``allowed_token_ids``, and the step's grammar mask
3. ``bad_words``: the last id of a word whose other ids are the output's tail (the output's only, not the prompt's)
4. ``min_tokens``: stop ids and EOS, while the output is too short
5. ``logit_bias``
6. penalties: repetition (prompt and output), then frequency and presence (output)

1 to 4 only put ids at -inf, where bias and penalties leave them; so they may be applied together. 3 and 4 give way
where they would leave nothing of ``allowed_token_ids``: a bad word of several ids may end in the last id that is
allowed, which nobody knows before the other ids are there. A row whose settings are neutral passes through bit for bit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.sampling import bitmask
from jaxserve.sampling.host import NO_ID
from jaxserve.sampling.rows import SampleRows
from jaxserve.sampling.state import SamplingState


def mask_padding(
    logits: jax.Array,  # float32[M, Vp]
    vocab_size: int,
) -> jax.Array:
    """float32[M, Vp] with -inf at ids ``vocab_size`` and up."""
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(ids < vocab_size, logits, -jnp.inf)


def apply_token_mask(
    logits: jax.Array,  # float32[M, Vp]
    token_mask: jax.Array,  # uint32[M, W], bit set = allowed
) -> jax.Array:
    """float32[M, Vp] with -inf at ids that aren't allowed."""
    return jnp.where(bitmask.unpack(token_mask, logits.shape[1]), logits, -jnp.inf)


def process(
    logits: jax.Array,  # float32[M, Vp], padded ids at -inf
    rows: SampleRows,
    state: SamplingState,
) -> jax.Array:
    """float32[M, Vp]: steps 2 (without grammar) to 6 of the module's docstring."""
    logits = apply_token_mask(logits, state.allowed[rows.slots])
    logits = _add_listed(logits, rows, state)
    return _penalise(logits, rows, state)


def _add_listed(logits: jax.Array, rows: SampleRows, state: SamplingState) -> jax.Array:
    """Bad words, stop ids and biases: short lists of ids, so one scatter-add; a mask adds -inf."""
    slots = rows.slots
    words = state.bad_words[slots]  # [M, Nw, Lw]
    prefix, last = words[:, :, :-1], words[:, :, -1]
    hit = jnp.all((prefix == NO_ID) | (prefix == rows.recent[:, None, :]), axis=-1)  # [M, Nw]
    too_short = state.prompt_len[slots] + rows.output_index < state.min_len[slots]  # [M]
    stops = jnp.where(too_short[:, None], state.stop_ids[slots], NO_ID)  # [M, Cs]
    forbidden = jnp.concatenate([jnp.where(hit, last, NO_ID), stops], axis=1)  # [M, Nw + Cs]
    mask = jnp.where(_leaves_some(state.allowed[slots], forbidden), -jnp.inf, 0.0)  # [M]
    ids = jnp.concatenate([forbidden, state.bias_ids[slots]], axis=1)
    values = jnp.concatenate(
        [jnp.broadcast_to(mask[:, None], forbidden.shape), state.bias_values[slots]], axis=1, dtype=logits.dtype
    )
    ids = jnp.where(ids == NO_ID, logits.shape[1], ids)  # a negative index would count from the end
    return logits.at[jnp.arange(ids.shape[0])[:, None], ids].add(values, mode="drop")


def _leaves_some(
    allowed: jax.Array,  # uint32[M, W]
    forbidden: jax.Array,  # int32[M, C], with NO_ID where there is none
) -> jax.Array:
    """bool[M]: whether some allowed id isn't forbidden; counted, as reading all logits of a row takes much longer."""
    order = jnp.arange(forbidden.shape[1])
    again = jnp.any((forbidden[:, :, None] == forbidden[:, None, :]) & (order < order[:, None]), axis=-1)  # [M, C]
    counted = (forbidden != NO_ID) & ~again & bitmask.holds(allowed, forbidden)
    return jnp.sum(counted, axis=1) < jnp.sum(jax.lax.population_count(allowed), axis=1, dtype=jnp.int32)


def _penalise(logits: jax.Array, rows: SampleRows, state: SamplingState) -> jax.Array:
    width = logits.shape[1]
    slots = rows.slots
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    counts = bitmask.fit(state.output_counts[slots], width)  # [M, Vp]
    for k in range(rows.drafts.shape[1]):
        counts = counts + (rows.drafts[:, k, None] == ids)
    in_output = counts > 0
    seen = in_output | bitmask.unpack(state.prompt_mask[slots], width)
    repetition = jnp.where(seen, state.repetition[slots][:, None], 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - state.frequency[slots][:, None] * counts.astype(logits.dtype)
    return logits - jnp.where(in_output, state.presence[slots][:, None], 0.0)
