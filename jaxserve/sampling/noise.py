"""The sampler's randomness: where the Threefry keys of its noise come from.

The noise for vocabulary id ``v`` at output position ``i`` is a function of ``(seed, choice_index, i, v)`` alone::

    key   = fold_in(fold_in(key(seed), choice_index), i)       # as jax.random's Threefry keys
    pair  = (v // 1024) * 512 + v % 512                        # ids 512 apart share a counter
    hi,lo = threefry(key, (0, pair))                           # = jax.random.bits(key, (n,), uint64)[pair] for any n
    bits  = hi  if (v // 512) % 2 == 0 else  lo
    x     = (bits + 0.5) * 2**-32, at most 1 - 2**-24
    noise = -log(-log1p(-x))                                   # standard Gumbel

Every id has its own 32 bits: padding, batch, slot and sharding can't change them. From ``key`` on it is
pallas_kernels/gumbel_argmax/noise.py. The host folds seed and choice, the device folds the position.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gumbel_argmax.noise import threefry2x32


def choice_key(seed: int, choice_index: int) -> np.ndarray:
    """``fold_in(key(seed), choice_index)`` on the host: uint32[2].

    ``seed`` is any 64-bit integer, negative ones in two's complement; both of its words count.
    """
    word = seed & 0xFFFFFFFFFFFFFFFF
    key = np.array([[word >> 32], [word & 0xFFFFFFFF]], np.uint32)
    zero = np.zeros(1, np.uint32)
    folded = threefry2x32((key[0], key[1]), (zero, np.array([choice_index], np.uint32)))
    return np.concatenate(folded)


def position_keys(
    keys: jax.Array,  # uint32[M, 2], choice keys
    output_index: jax.Array,  # int32[M]
) -> jax.Array:  # uint32[M, 2]
    """``fold_in(key, output_index)`` of each row."""
    k0, k1 = keys[:, 0], keys[:, 1]
    return jnp.stack(threefry2x32((k0, k1), (jnp.zeros_like(k0), output_index.astype(jnp.uint32))), axis=1)
