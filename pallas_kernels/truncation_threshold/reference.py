"""The op in plain XLA: its implementation on everything but Hopper GPUs.

Thresholds are found exactly, by descending through the bits of the logits (float32 bits, reordered so as to compare as
unsigned integers) from the highest, some bits a pass, one fused reduction over the row a pass. See api.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.parts import in_parts


def truncation_threshold(
    logits: jax.Array,  # float32[M, V]
    temperature: jax.Array,  # float32[M], above 0
    top_k: jax.Array,  # int32[M]
    top_p: jax.Array,  # float32[M]
    min_p: jax.Array,  # float32[M]
) -> jax.Array:  # float32[M]
    """See api.truncation_threshold."""
    highest = jnp.max(logits, axis=1)
    highest = jnp.where(jnp.isfinite(highest), highest, 0.0)  # a row with every id masked
    scale = (highest, temperature)
    least = temperature * jnp.log(min_p)
    floor = highest + least
    lowest = _ordered_bits(floor) + (floor - highest < least)  # the sum may be rounded down
    keys = _ordered_bits(logits)
    keys = jnp.where(keys >= lowest[:, None], keys, np.uint32(0))

    wanted = jnp.where(top_k > 0, top_k, np.int32(2**31 - 1))
    kth = _threshold(keys, wanted, None)
    keys = jnp.where(keys >= kth[:, None], keys, np.uint32(0))

    # At least the smallest normal number: a smaller product counts as 0, which no ids at all would reach.
    mass = jnp.maximum(top_p * jnp.sum(_mass(keys, *scale), axis=1), np.finfo(np.float32).tiny)
    wanted_mass = jnp.where(top_p < 1.0, mass, jnp.inf)
    nucleus = _threshold(keys, wanted_mass, scale)
    return _from_ordered_bits(jnp.maximum(jnp.maximum(lowest, kth), nucleus))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32, ordered as the floats are; 0.0 and -0.0 are equal, and no float gives 0."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = np.uint32(0x80000000)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _from_ordered_bits(keys: jax.Array) -> jax.Array:
    """float32: the inverse of ``_ordered_bits``; 0 gives NaN."""
    sign = np.uint32(0x80000000)
    return jax.lax.bitcast_convert_type(jnp.where(keys >= sign, keys ^ sign, ~keys), jnp.float32)


def _mass(
    keys: jax.Array,  # uint32[M, ...]
    highest: jax.Array,  # float32[M]
    temperature: jax.Array,  # float32[M]
) -> jax.Array:
    """float32[M, ...]: probabilities relative to the row's largest; each pass computes them anew, to read less."""
    shape = (-1, *[1] * (keys.ndim - 1))
    scaled = (_from_ordered_bits(keys) - highest.reshape(shape)) / temperature.reshape(shape)
    return jnp.where(keys > 0, jnp.exp(scaled), 0.0)


def _threshold(
    keys: jax.Array,  # uint32[M, V]
    wanted: jax.Array,  # int32[M] ids, or float32[M] of mass
    scale: tuple[jax.Array, jax.Array] | None,  # highest and temperature, float32[M] each; None counts ids
) -> jax.Array:
    """uint32[M]: the largest t for which the ids with ``keys >= t`` weigh ``wanted`` or more; 0 where none does."""
    return jax.lax.platform_dependent(
        keys,
        wanted,
        scale,
        cpu=functools.partial(descend, digit_bits=1, unroll=False),  # bound by arithmetic, and by compile time
        default=functools.partial(descend, digit_bits=3, unroll=True),  # by memory; a loop would break CUDA graphs
    )


def descend(
    keys: jax.Array,  # uint32[M, V]
    wanted: jax.Array,  # int32[M] or float32[M]
    scale: tuple[jax.Array, jax.Array] | None,
    *,
    digit_bits: int,
    unroll: bool,
) -> jax.Array:
    """uint32[M]: what ``_threshold`` promises, found ``digit_bits`` at a time from the highest.

    A pass weighs the ids above 2**digit_bits - 1 thresholds: as many sibling reductions of one operand, which the
    compiler fuses (on GPU at most eight). Each is over parts of the row first: one row alone can't occupy a GPU.
    """
    keys = in_parts(keys, 0)  # below every threshold

    def weigh(bound: jax.Array) -> jax.Array:
        kept = keys >= bound[:, None, None]
        if scale is None:
            return jnp.sum(kept, axis=2, dtype=jnp.int32)
        return jnp.sum(jnp.where(kept, _mass(keys, *scale), 0.0), axis=2)

    def one_pass(step: jax.Array | int, threshold: jax.Array) -> jax.Array:
        shift = jnp.uint32(digit_bits) * (jnp.uint32(num_passes - 1) - jnp.uint32(step))
        digits = jnp.arange(1, 1 << digit_bits, dtype=jnp.uint32)[:, None]
        bounds = threshold | (digits << shift)  # [digits, M]
        valid = (digits << shift) >> shift == digits  # the first digit may reach past bit 31
        weights = jnp.stack([weigh(bound) for bound in bounds])  # [digits, M, parts]
        enough = valid & (jnp.sum(weights, axis=2) >= wanted)
        return threshold | (jnp.sum(enough, axis=0, dtype=jnp.uint32) << shift)

    num_passes = -(-32 // digit_bits)
    threshold = jnp.zeros_like(keys[:, 0, 0])
    return jax.lax.fori_loop(0, num_passes, one_pass, threshold, unroll=unroll)
