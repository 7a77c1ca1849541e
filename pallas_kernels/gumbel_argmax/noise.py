"""Standard Gumbel noise of a key and a token id: Threefry-2x32 with explicit counters.

    (hi, lo) = threefry(key, (0, pair))            # ids 512 apart share a counter, see ``counter``
    bits     = hi of the lower id, lo of the higher
    x        = (bits + 0.5) * 2**-32, at most 1 - 2**-24
    noise    = -log(-log1p(-x))

Noise of an id depends on nothing else: padding, batch and sharding can't change it. ``log1p`` of a small ``x`` keeps
all 32 bits where Gumbel-max decides, in the upper tail: noise lies in [-2.82, 22.9].

``threefry2x32`` and ``counter`` work on numpy arrays, on JAX arrays and inside of kernels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

HALF = 512  # neighbouring ids that take the same word of their counters
PAIR = 2 * HALF

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_LARGEST = 1.0 - 2.0**-24


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Twenty rounds of Threefry-2x32. All words are uint32 arrays that broadcast together."""
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ np.uint32(_PARITY))
    x0, x1 = counter[0] + k0, counter[1] + k1
    for group in range(5):
        for bits in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = ((x1 << np.uint32(bits)) | (x1 >> np.uint32(32 - bits))) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def counter(ids: Any) -> tuple[Any, Any]:
    """uint32 ids -> the counter of their pair, and bool: whether they take its high word."""
    block = ids >> np.uint32(9)
    pair = ((block >> np.uint32(1)) << np.uint32(9)) | (ids & np.uint32(HALF - 1))
    return pair, (block & np.uint32(1)) == np.uint32(0)


def random_bits(
    keys: jax.Array,  # uint32[M, 2]
    width: int,
) -> jax.Array:
    """uint32[M, width]: element (m, v) depends on ``keys[m]`` and ``v`` only."""
    pair, high = counter(jax.lax.broadcasted_iota(jnp.uint32, (keys.shape[0], width), 1))
    hi, lo = threefry2x32((keys[:, :1], keys[:, 1:]), (jnp.zeros_like(pair), pair))
    return jnp.where(high, hi, lo)


def uniform(bits: jax.Array) -> jax.Array:
    """float32 in [2**-33, 1 - 2**-24]."""
    x = bits.astype(jnp.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return jnp.minimum(x, np.float32(_LARGEST))


def gumbel(bits: jax.Array) -> jax.Array:
    """float32 noise of uint32 bits, finite everywhere."""
    return -jnp.log(-jnp.log1p(-uniform(bits)))
