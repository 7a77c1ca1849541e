"""The sampler's randomness: Threefry-2x32 with explicit counters.

The noise for vocabulary id ``v`` at output position ``i`` is a function of ``(seed, choice_index, i, v)`` alone::

    key   = fold_in(fold_in(key(seed), choice_index), i)       # as jax.random's Threefry keys
    bits  = hi ^ lo  of  threefry(key, (0, v))                 # = jax.random.bits(key, (V,))[v] for any V
    x     = (bits + 0.5) * 2**-32, at most 1 - 2**-24
    noise = -log(-log1p(-x))                                   # standard Gumbel

Every element has its own counter: padding, batch, slot and sharding can't change it. ``log1p`` of a small ``x`` keeps
all 32 bits where Gumbel-max decides, in the upper tail: noise lies in [-2.82, 22.9].

``threefry2x32`` works on numpy and on JAX arrays alike: the host folds seed and choice, the device folds the rest.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_HALF_ULP = 2.0**-33
_LARGEST = 1.0 - 2.0**-24


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Twenty rounds of Threefry-2x32. All words are uint32 arrays (numpy or JAX) that broadcast together."""
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


def choice_key(seed: int, choice_index: int) -> np.ndarray:
    """``fold_in(key(seed), choice_index)`` on the host: uint32[2].

    ``seed`` is any 64-bit integer, negative ones in two's complement; both of its words count.
    """
    word = seed & 0xFFFFFFFFFFFFFFFF
    key = np.array([[word >> 32], [word & 0xFFFFFFFF]], np.uint32)
    zero = np.zeros(1, np.uint32)
    folded = threefry2x32((key[0], key[1]), (zero, np.array([choice_index], np.uint32)))
    return np.concatenate(folded)


def random_bits(
    keys: jax.Array,  # uint32[M, 2], choice keys
    output_index: jax.Array,  # int32[M]
    width: int,
) -> jax.Array:
    """uint32[M, width]: element (m, v) depends on ``keys[m]``, ``output_index[m]`` and ``v`` only."""
    k0, k1 = keys[:, 0], keys[:, 1]
    k0, k1 = threefry2x32((k0, k1), (jnp.zeros_like(k0), output_index.astype(jnp.uint32)))
    ids = jax.lax.broadcasted_iota(jnp.uint32, (keys.shape[0], width), 1)
    hi, lo = threefry2x32((k0[:, None], k1[:, None]), (jnp.zeros_like(ids), ids))
    return hi ^ lo


def gumbel(
    keys: jax.Array,  # uint32[M, 2], choice keys
    output_index: jax.Array,  # int32[M]
    width: int,
) -> jax.Array:
    """float32[M, width] of standard Gumbel noise, finite everywhere; see the module's docstring."""
    uniform = random_bits(keys, output_index, width).astype(jnp.float32) * np.float32(2.0**-32) + np.float32(_HALF_ULP)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, np.float32(_LARGEST))))
