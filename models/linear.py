"""Products with a weight. A weight is an array, or a packed (quantised) pytree that knows how to multiply itself."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp


class PackedWeight(Protocol):
    """What a weight that isn't a plain array has to offer; it must be a registered pytree."""

    def einsum(self, spec: str, x: jax.Array, out_dtype: jnp.dtype) -> jax.Array: ...


Weight = jax.Array | PackedWeight


def einsum(spec: str, x: jax.Array, weight: Weight, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """``jnp.einsum(spec, x, weight)`` with the precision that the dtype of ``x`` promises.

    float32 is computed at HIGHEST precision (JAX's default would be TF32 on GPU and bfloat16 on TPU). Lower dtypes
    accumulate in float32, which is what matrix units do, and round once, to ``out_dtype`` (``x``'s dtype unless given).

    The contracted axes of a weight must stand together, and so must its other axes: then the product is one plain
    matrix product and the weight is read where it lies, not transposed first.
    """
    out_dtype = jnp.dtype(out_dtype or x.dtype)
    if not isinstance(weight, jax.Array):
        return weight.einsum(spec, x, out_dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, weight, precision=precision, preferred_element_type=out_dtype)
