"""Products with a weight. A weight is an array, or a packed (quantised) pytree that knows how to multiply itself."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp


class PackedWeight(Protocol):
    """What a weight that isn't a plain array has to offer; it must be a registered pytree."""

    def einsum(self, spec: str, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array: ...

    def take(self, token_ids: jax.Array, dtype: jnp.dtype) -> jax.Array: ...


Weight = jax.Array | PackedWeight


def einsum(spec: str, x: jax.Array, weight: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """``jnp.einsum(spec, x, weight)`` with the precision that the dtype of ``x`` promises.

    float32 is computed at HIGHEST precision (JAX's default would be TF32 on GPU and bfloat16 on TPU). Lower dtypes
    accumulate in float32, which is what matrix units do, and round once, to ``out_dtype`` (``x``'s dtype unless given).

    The result's axes are those of ``x``, then those of the weight, without the contracted ones. A weight's contracted
    axes stand together and in the order that ``x`` has them: then the product is one plain matrix product that reads
    the weight where it lies. (``jnp.einsum`` may contract them in another order, and XLA then copies the weight.)
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if not isinstance(weight, jax.Array):
        return weight.einsum(spec, x, out_dtype)
    operands, result = spec.split("->")
    left, right = operands.split(",")
    shared = [axis for axis in left if axis in right]
    if "".join(shared) not in right or result != "".join(axis for axis in left + right if axis not in shared):
        raise ValueError(f"{spec!r} isn't one plain matrix product")
    contracted = [left.index(axis) for axis in shared], [right.index(axis) for axis in shared]
    return jax.lax.dot_general(
        x,
        weight,
        (contracted, ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype,
    )


def take(
    table: Weight,  # [V, E]
    token_ids: jax.Array,  # int32[T]
    dtype: jnp.dtype,
) -> jax.Array:
    """Rows of a vocabulary's table, [T, E] in ``dtype``. Ids are clipped, so that any padding token is harmless."""
    if not isinstance(table, jax.Array):
        return table.take(token_ids, dtype)
    return jnp.take(table, token_ids, axis=0, mode="clip").astype(dtype)
