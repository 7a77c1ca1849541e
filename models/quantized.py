"""Weights in 8 and 4 bits. Sums are float32; what is read from memory shrinks, and in one case what is multiplied.

``ScaledWeight``: int8 or fp8 (e4m3) with one scale an output channel. The scale comes out of the sum, so the product is
that of the small numbers, widened exactly to the activations' dtype, and the result is multiplied once. XLA:GPU widens
inside its matrix product: no wide copy of the weight is made.

``Fp8Weight``: the same fp8 numbers; the activations become fp8 too, with one scale a token that is found on the fly,
and the product is one of fp8 matrices.

``Int4Weight``: ``value * scale + offset`` with a scale and an offset for each group of inputs. They don't come out of
the sum, so the weight is widened before the product; XLA:GPU makes a copy of it for that in every step.

Shape letters: I contracted axes of a weight, O its other axes, V vocabulary, E model dim, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from .linear import einsum

INT8_MOST = 127
INT4_MOST = 15
FP8 = jnp.float8_e4m3fn
FP8_MOST = 448.0
GROUP_LEN = 64  # inputs that share a scale and an offset in int4


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaledWeight:
    """``values * scales``, symmetric."""

    values: jax.Array  # int8 or float8_e4m3fn, [I and O, as in the plain weight]
    scales: jax.Array  # float32[O]

    def einsum(self, spec: str, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """See ``linear.einsum``. The values are exact in every dtype of ``x``."""
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
class Fp8Weight:
    """``values * scales``, for products in fp8. Contracted axes come last: fp8 matrix units want them side by side."""

    values: jax.Array  # float8_e4m3fn[O, I]
    scales: jax.Array  # float32[O]

    def einsum(self, spec: str, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array:
        """See ``linear.einsum``; each token's largest magnitude becomes 448."""
        left, right = spec.split("->")[0].split(",")
        shared = "".join(axis for axis in left if axis in right)
        turned = f"{left},{right.replace(shared, '')}{shared}->{spec.split('->')[1]}"
        contracted = tuple(range(left.index(shared[0]), len(left)))
        values, scales = _scale(x, contracted, FP8_MOST)
        product = einsum(turned, values.astype(FP8), self.values, jnp.dtype(jnp.float32))
        scales = scales.reshape(*scales.shape[: contracted[0]], *[1] * (product.ndim - contracted[0]))
        return (product * scales * self.scales).astype(out_dtype)

    def take(
        self,
        token_ids: jax.Array,  # int32[T]
        dtype: jnp.dtype,
    ) -> jax.Array:
        """[T, E] of a vocabulary's table [V, E] with a scale a row; ids are clipped."""
        return ScaledWeight(self.values, self.scales).take(token_ids, dtype)


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


def packed_kinds(params: Any) -> set[type]:
    """Of a tree of parameters: in what ways its weights are packed."""
    kinds = (ScaledWeight, Fp8Weight, Int4Weight)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, kinds))
    return {type(leaf) for leaf in leaves if isinstance(leaf, kinds)}


def quantize_int8(
    weight: jax.Array,  # [I and O]
    contracted: tuple[int, ...],
) -> ScaledWeight:
    """Each output channel's largest magnitude becomes 127."""
    values, scales = _scale(weight, contracted, INT8_MOST)
    return ScaledWeight(jnp.round(values).astype(jnp.int8), jnp.squeeze(scales, contracted))


def quantize_fp8(
    weight: jax.Array,  # [I and O]
    contracted: tuple[int, ...],
) -> ScaledWeight:
    """Each output channel's largest magnitude becomes 448; values are rounded to float8_e4m3fn."""
    values, scales = _scale(weight, contracted, FP8_MOST)
    return ScaledWeight(values.astype(FP8), jnp.squeeze(scales, contracted))


def quantize_fp8_products(
    weight: jax.Array,  # [I and O]
    contracted: tuple[int, ...],
) -> Fp8Weight:
    """``quantize_fp8``, laid out for products in fp8."""
    packed = quantize_fp8(weight, contracted)
    return Fp8Weight(jnp.transpose(packed.values, contracted_last(weight.ndim, contracted)), packed.scales)


def contracted_last(ndim: int, contracted: tuple[int, ...]) -> tuple[int, ...]:
    """The order of a weight's axes in an ``Fp8Weight``."""
    return (*(axis for axis in range(ndim) if axis not in contracted), *contracted)


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


def _scale(
    x: jax.Array,
    axes: tuple[int, ...],
    most: float,
) -> tuple[jax.Array, jax.Array]:  # float32, as x; float32, the axes kept as 1
    """``x`` divided so that the largest magnitude along ``axes`` is ``most``, and what it was divided by."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True)
    scales = jnp.where(largest > 0, largest / most, 1.0)
    return wide / scales, scales
