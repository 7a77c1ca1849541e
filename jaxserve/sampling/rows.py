"""The rows that one step samples: K+1 positions of each of its R choices, M = R * (K+1), choice-major.

Position j of a choice that has emitted G tokens samples output index G+j after the drafts 0..j-1: what every processor
sees is the prefix of that length, exactly as if the drafts had been emitted one step at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.sampling.host import NO_ID
from jaxserve.sampling.state import SamplingState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SampleRows:
    slots: jax.Array  # int32[M], in 0..S-1 (padding rows point at some slot; what they sample is dropped)
    output_index: jax.Array  # int32[M], emitted tokens before the position, drafts included
    drafts: jax.Array  # int32[M, K], NO_ID from the position on
    recent: jax.Array  # int32[M, Lw-1], the output's last tokens before the position; NO_ID before the output's start


def make_rows(
    state: SamplingState,
    slots: jax.Array,  # int32[R]; S or more = padding
    tokens: jax.Array,  # int32[S, Lmax], history by slot: prompt, then output
    tokens_len: jax.Array,  # int32[S], by slot, without drafts
    drafts: jax.Array,  # int32[R, K]
) -> SampleRows:
    """Rows for a step, verify or not (K = 0). Drafts past a row's num_drafts may hold anything."""
    num_slots, max_len = tokens.shape
    R, K = drafts.shape
    tail = state.bad_words.shape[2] - 1
    slots = jnp.clip(slots, 0, num_slots - 1)
    start, end = state.prompt_len[slots], tokens_len[slots]  # [R]
    drafts = jnp.maximum(drafts, NO_ID)

    where = end[:, None] + jnp.arange(-tail, 0)  # [R, tail]
    history = tokens[slots[:, None], jnp.clip(where, 0, max_len - 1)]
    history = jnp.where(where >= start[:, None], history, NO_ID)
    window = jnp.concatenate([history, drafts], axis=1)  # [R, tail + K]
    position = jnp.arange(K + 1)
    recent = window[:, position[:, None] + jnp.arange(tail)]  # [R, K+1, tail]
    prior = jnp.where(jnp.arange(K) < position[:, None], drafts[:, None, :], NO_ID)  # [R, K+1, K]
    index = (end - start)[:, None] + position  # [R, K+1]

    M = R * (K + 1)
    return SampleRows(
        slots=jnp.broadcast_to(slots[:, None], (R, K + 1)).reshape(M),
        output_index=index.reshape(M),
        drafts=prior.reshape(M, K),
        recent=recent.reshape(M, tail),
    )
