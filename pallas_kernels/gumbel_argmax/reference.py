"""The op in plain XLA: its definition, and its implementation on everything but Hopper GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gumbel_argmax import noise
from pallas_kernels.parts import in_parts


def gumbel_argmax(
    logits: jax.Array,  # float32[M, Vp]
    temperature: jax.Array | None,  # float32[M]
    keys: jax.Array | None,  # uint32[M, 2]
    vocab_size: int,
) -> jax.Array:  # int32[M]
    """See api.gumbel_argmax."""
    if temperature is not None and keys is not None:
        logits = logits + temperature[:, None] * noise.gumbel(noise.random_bits(keys, logits.shape[1]))
    if vocab_size < logits.shape[1]:
        logits = jnp.where(jnp.arange(logits.shape[1]) < vocab_size, logits, -jnp.inf)
    values = in_parts(logits, -jnp.inf)  # [M, parts, ids of a part]
    ids = jnp.arange(values.shape[1] * values.shape[2], dtype=jnp.int32).reshape(values.shape[1:])
    best = lowest_of_largest(values, jnp.broadcast_to(ids, values.shape), 2)
    return lowest_of_largest(*best, 1)[1]


def lowest_of_largest(
    values: jax.Array,  # float32[...], no NaN
    ids: jax.Array,  # int32[...]
    axis: int,
) -> tuple[jax.Array, jax.Array]:
    """The largest values along ``axis``, and the lowest id among those that have it; 0 where all are -inf."""

    def better(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a_wins = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(a_wins, a[0], b[0]), jnp.where(a_wins, a[1], b[1])

    return jax.lax.reduce((values, ids), (jnp.float32(-jnp.inf), np.int32(0)), better, (axis,))
