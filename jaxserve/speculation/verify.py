"""Which of a step's tokens count.

The sampler has drawn a token at all K+1 positions, each after the drafts before it, with the same noise as without
drafts. So a position's token is the true one as long as all drafts before it are; the first token that differs from its
draft, or the one after the last draft, is true as well and is emitted too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accept(
    sampled: jax.Array,  # int32[R, K+1]
    drafts: jax.Array,  # int32[R, K]
    num_drafts: jax.Array,  # int32[R]; more than K counts as K
    samples: jax.Array,  # bool[R], whether the row yields tokens in this step
) -> jax.Array:
    """int32[R]: how many of ``sampled[r]`` are emitted: 1 + accepted drafts, or 0 where the row doesn't sample."""
    K = drafts.shape[1]
    right = (sampled[:, :K] == drafts) & (jnp.arange(K) < num_drafts[:, None])
    accepted = jnp.sum(jnp.cumprod(right.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    return jnp.where(samples, accepted + 1, 0)
