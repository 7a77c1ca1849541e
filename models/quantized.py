"""Weights in 8 and 4 bits. Activations keep their dtype; sums are float32; only what is read from memory shrinks.

int8: one scale an output channel. The scale comes out of the sum, so the product is that of the small integers, and the
result is multiplied once. int4: ``value * scale + offset`` with a scale and an offset for each group of inputs. They
don't come out of the sum, so the weight is widened on its way into the product.

Shape letters: I contracted axes of a weight, O its other axes, V vocabulary, E model dim, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from .linear import einsum

INT8_MOST = 127
INT4_MOST = 15
GROUP_LEN = 64  # inputs that share a scale and an offset in int4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int8Weight:
    """``values * scales``, symmetric."""

    values: jax.Array  # int8[I and O, as in the plain weight]
    scales: jax.Array  # float32[O]

    def einsum(self, spec: str, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """See ``linear.einsum``. int8 is exact in every dtype of ``x``."""
        product = einsum(spec, x, self.values.astype(x.dtype), jnp.dtype(jnp.float32))
        return (product * self.scales).astype(out_dtype)

    def take(
        self,
        token_ids: jax.Array,  # int32[T]
        dtype: jnp.dtype,
    ) -> jax.Array:
        """[T, E] of a vocabulary's table [V, E] with a scale a row; ids are clipped."""
        rows = jnp.take(self.values, token_ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * jnp.take(self.scales, token_ids, axis=0, mode="clip")[:, None]).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Int4Weight:
    """``values * scales + offsets``; ``axis`` of the weight is cut into groups, the other contracted ones into ones."""

    values: jax.Array  # uint4, shape of the plain weight
    scales: jax.Array  # bfloat16, the same with groups along ``axis``
    offsets: jax.Array  # bfloat16, as scales
    axis: int = field(metadata={"static": True})

    def einsum(self, spec: str, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """See ``linear.einsum``."""
        return einsum(spec, x, self._widen(self.values, self.scales, self.offsets, x.dtype), out_dtype)

    def take(
        self,
        token_ids: jax.Array,  # int32[T]
        dtype: jnp.dtype,
    ) -> jax.Array:
        """[T, E] of a vocabulary's table [V, E] with groups along E; ids are clipped."""
        values, scales, offsets = (
            jnp.take(x, token_ids, axis=0, mode="clip") for x in (self.values, self.scales, self.offsets)
        )
        return self._widen(values, scales, offsets, dtype)

    def _widen(self, values: jax.Array, scales: jax.Array, offsets: jax.Array, dtype: jnp.dtype) -> jax.Array:
        grouped = values.astype(jnp.float32).reshape(split_axis(values.shape, self.axis, scales.shape[self.axis]))
        scales, offsets = (jnp.expand_dims(x.astype(jnp.float32), self.axis + 1) for x in (scales, offsets))
        return (grouped * scales + offsets).reshape(values.shape).astype(dtype)


def quantize_int8(
    weight: jax.Array,  # [I and O]
    contracted: tuple[int, ...],
) -> Int8Weight:
    """Each output channel's largest magnitude becomes 127."""
    wide = weight.astype(jnp.float32)
    most = jnp.max(jnp.abs(wide), axis=contracted, keepdims=True)
    scales = jnp.where(most > 0, most / INT8_MOST, 1.0)
    values = jnp.round(wide / scales).astype(jnp.int8)
    return Int8Weight(values, jnp.squeeze(scales, contracted))


def quantize_int4(
    weight: jax.Array,  # [I and O]
    contracted: tuple[int, ...],
) -> Int4Weight:
    """Each group's smallest value becomes 0, its largest 15; groups lie along the last contracted axis."""
    axis = contracted[-1]
    num_groups = weight.shape[axis] // group_len(weight.shape[axis])
    grouped = weight.astype(jnp.float32).reshape(split_axis(weight.shape, axis, num_groups))
    low, high = jnp.min(grouped, axis=axis + 1), jnp.max(grouped, axis=axis + 1)
    # The values are fitted to the rounded scales and offsets, which are what they are widened with.
    scales = jnp.where(high > low, (high - low) / INT4_MOST, 1.0).astype(jnp.bfloat16)
    offsets = low.astype(jnp.bfloat16)
    wide_scales, wide_offsets = (jnp.expand_dims(x.astype(jnp.float32), axis + 1) for x in (scales, offsets))
    steps = jnp.clip(jnp.round((grouped - wide_offsets) / wide_scales), 0, INT4_MOST)
    return Int4Weight(steps.reshape(weight.shape).astype(jnp.uint4), scales, offsets, axis)


def group_len(size: int) -> int:
    """The longest group of at most ``GROUP_LEN`` that divides an axis."""
    return next(length for length in range(min(GROUP_LEN, size), 0, -1) if size % length == 0)


def split_axis(shape: tuple[int, ...], axis: int, parts: int) -> tuple[int, ...]:
    return (*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])
