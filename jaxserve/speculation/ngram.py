"""Drafts from the choice's own tokens (prompt lookup): what followed the last time the text ended as it ends now.

Runs on the device over the token history, so that the next step needs no host round trip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def propose(
    tokens: jax.Array,  # int32[R, Lmax], ids are 0 or more; positions past tokens_len may hold anything
    tokens_len: jax.Array,  # int32[R]
    max_drafts: jax.Array,  # int32[R]
    *,
    K: int,
    n_min: int,
    n_max: int,
) -> tuple[jax.Array, jax.Array]:
    """Drafts (int32[R, K]) and their number (int32[R], at most max_drafts and K).

    The longest suffix of n_max..n_min tokens that occurs earlier (it may overlap itself) and is followed by a token; of
    its occurrences the most recent; the drafts are the known tokens that follow it. No such suffix: no drafts. Columns
    past the number of drafts hold -1.
    """
    R, max_len = tokens.shape
    after = jnp.arange(max_len)  # a candidate: index of the token after an occurrence
    last = jnp.maximum(tokens_len - 1, 0)
    same = jnp.ones((R, max_len), bool)
    match_len = jnp.zeros((R, max_len), jnp.int32)
    for back in range(n_max):
        suffix = jnp.take_along_axis(tokens, jnp.maximum(last - back, 0)[:, None], axis=1)  # [R, 1]
        shifted = jnp.pad(tokens, ((0, 0), (back + 1, 0)), constant_values=-1)[:, :max_len]  # tokens[after - 1 - back]
        same = same & (shifted == suffix)
        match_len = match_len + same
    usable = (match_len >= n_min) & (after < tokens_len[:, None])
    score = jnp.where(usable, match_len * max_len + after, -1)
    best = jnp.max(score, axis=1)  # longest, then most recent
    first = jnp.maximum(best, 0) % max_len
    num_drafts = jnp.where(best >= 0, jnp.minimum(tokens_len - first, jnp.clip(max_drafts, 0, K)), 0)
    where = first[:, None] + jnp.arange(K)
    drafts = jnp.take_along_axis(tokens, jnp.minimum(where, max_len - 1), axis=1)
    return jnp.where(jnp.arange(K) < num_drafts[:, None], drafts, -1), num_drafts.astype(jnp.int32)
