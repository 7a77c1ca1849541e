"""min_p, top_k and top_p without a sort: the kept ids of a row are those at or above a threshold.

The threshold is found exactly, by descending through the bits of the logits (float32 bits, reordered so as to compare
as unsigned integers) from the highest: four bits a pass, one fused reduction over the row a pass, eight passes.

Ties: ids whose logits equal the threshold's are all kept. So top_k keeps more than k ids only where several share the
k-th largest logit, and top_p's is the smallest upper set of logit values whose mass reaches p. As in vLLM, min_p counts
relative to the untruncated maximum, top_k among what min_p left, and top_p on the renormalised rest. The most likely id
is always kept; a row whose settings are neutral keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_DIGIT_BITS = 4
_COLDEST = np.float32(1e-30)  # keeps 0 / temperature at 0; a greedy row keeps its maxima only


def truncate(
    logits: jax.Array,  # float32[M, V]
    temperature: jax.Array,  # float32[M]
    top_k: jax.Array,  # int32[M], 0 is off
    top_p: jax.Array,  # float32[M], 1 is off
    min_p: jax.Array,  # float32[M], 0 is off
) -> jax.Array:
    """float32[M, V] with -inf at every id that isn't kept."""
    highest = jnp.max(logits, axis=1, keepdims=True)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)  # a row with every id masked
    scaled = (logits - highest) / jnp.maximum(temperature, _COLDEST)[:, None]  # [M, V], at most 0
    keys = jnp.where(scaled >= jnp.log(min_p)[:, None], _ordered_bits(logits), np.uint32(0))

    wanted = jnp.where(top_k > 0, top_k, np.int32(2**31 - 1))
    kth = _descend(keys, wanted, lambda kept: kept.astype(jnp.int32))
    keys = jnp.where(keys >= kth[:, None], keys, np.uint32(0))

    mass = jnp.where(keys > 0, jnp.exp(scaled), 0.0)  # [M, V]
    wanted_mass = jnp.where(top_p < 1.0, top_p * jnp.sum(mass, axis=1), jnp.inf)
    nucleus = _descend(keys, wanted_mass, lambda kept: jnp.where(kept, mass, 0.0))
    return jnp.where((keys > 0) & (keys >= nucleus[:, None]), logits, -jnp.inf)


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32, ordered as the floats are; 0.0 and -0.0 are equal, and no float gives 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = np.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _descend(
    keys: jax.Array,  # uint32[M, V]
    wanted: jax.Array,  # [M]
    weigh: Callable[[jax.Array], jax.Array],  # bool[M, V] -> weights [M, V] of the ids that are in
) -> jax.Array:
    """uint32[M]: the largest t for which the ids with ``keys >= t`` weigh ``wanted`` or more; 0 where none does."""
    threshold = jnp.zeros(keys.shape[0], jnp.uint32)
    for shift in range(32 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        digit = jnp.zeros(keys.shape[0], jnp.uint32)
        for candidate in range(1, 1 << _DIGIT_BITS):  # sibling reductions of one operand: the compiler fuses them
            bound = threshold | np.uint32(candidate << shift)
            weight = jnp.sum(weigh(keys >= bound[:, None]), axis=1)
            digit = digit + (weight >= wanted).astype(jnp.uint32)
        threshold = threshold | (digit << np.uint32(shift))
    return threshold
