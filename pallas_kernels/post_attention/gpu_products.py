"""The op as four launches for Hopper, one a product, where one launch for all doesn't pay: more weights, or more rows.

Each launch does what stands around its product as well (gpu_product.py), so that none but these four are left of a
layer: the residual and the norm's sum of squares follow the output product and down, the norm's factor and the
activation the other two. A norm's factor for each row is applied to a product's sums: the product starts from
``x * weight``, rounded once as ``x * factor * weight`` would be. Squares are summed by tile, and over the tiles by who
needs them, always in the same order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.post_attention import gpu_columns
from pallas_kernels.post_attention.gpu_activations import ACTIVATIONS
from pallas_kernels.post_attention.gpu_product import Place, product
from pallas_kernels.post_attention.plan import COLUMNS, Shape
from pallas_kernels.post_attention.product_plan import ProductPlan, plan_products
from pallas_kernels.post_attention.types import LayerWeights, NextWeights, PostAttentionSpec

Finish = Callable[[Sequence[jax.Array]], None]
Next = tuple[jax.Array, ProductPlan] | None  # weight and plan of the product that is launched next


class _Stream(NamedTuple):
    """The residual stream, and what the next product and its norm need of it."""

    x: jax.Array  # bfloat16[M, E]
    weighted: jax.Array  # bfloat16[M, E]: times the norm's weight
    squares: jax.Array  # float32[E / 64, M]: sums of squares of each row's next 64 values


@functools.partial(jax.jit, static_argnames=("spec", "multiprocessors"))
def post_attention(
    attended: jax.Array,  # bfloat16[M, A]
    x: jax.Array,  # bfloat16[M, E]
    layer: LayerWeights,
    following: NextWeights,
    spec: PostAttentionSpec,
    multiprocessors: int,
) -> tuple[jax.Array, jax.Array]:  # [M, E], [M, Q]
    """See api.post_attention. An inner jit: the layers of a step share one lowering."""
    shape = Shape(attended.shape[0], attended.shape[1], x.shape[1], layer.down.shape[0], following.qkv.shape[1])
    plans = plan_products(shape, multiprocessors)
    if isinstance(plans, str):
        raise ValueError(plans)
    o, gate_up, down, qkv = plans
    activate = functools.partial(_activate, ACTIVATIONS[spec.activation])
    stream = _add("o", attended, layer.o, x, layer.mlp_norm, spec, o, (layer.gate_up, gate_up))
    inner = _of_normed("gate_up", stream, layer.gate_up, activate, spec, gate_up, (layer.down, down))
    stream = _add("down", inner, layer.down, stream.x, following.attn_norm, spec, down, (following.qkv, qkv))
    return stream.x, _of_normed("qkv", stream, following.qkv, _only, spec, qkv, None)


def _add(
    name: str,
    inputs: jax.Array,  # bfloat16[M, K]
    weight: jax.Array,  # bfloat16[K, E]
    x: jax.Array,  # bfloat16[M, E]
    norm: jax.Array,  # bfloat16[E], of the norm that follows
    spec: PostAttentionSpec,
    plan: ProductPlan,
    next_product: Next,
) -> _Stream:
    """``x + inputs @ weight``."""
    M, E = x.shape

    def prepare(place: Place, read: Sequence[Any], written: Sequence[Any]) -> Finish:
        x_ref, norm_ref = read
        new_ref, weighted_ref, squares_ref = written
        residual = gpu_columns.load_tile(x_ref, place.row, place.column, place.num_rows)
        scale = gpu_columns.load_columns(norm_ref, place.column, place.num_rows) + spec.norm_offset

        def finish(sums: Sequence[jax.Array]) -> None:
            [total] = sums
            rounded = (residual + total).astype(jnp.bfloat16)
            value = rounded.astype(jnp.float32)
            gpu_columns.store_tile(rounded, new_ref, place.row, place.column)
            gpu_columns.store_tile((value * scale).astype(jnp.bfloat16), weighted_ref, place.row, place.column)
            gpu_columns.store_sums(value * value, place.scratch, squares_ref, place.tile, place.row)

        return finish

    stream = jax.ShapeDtypeStruct((M, E), jnp.bfloat16)
    squares = jax.ShapeDtypeStruct((E // COLUMNS, M), jnp.float32)
    return _Stream(*product(name, inputs, weight, [x, norm], [stream, stream, squares], prepare, plan, next_product))


def _of_normed(
    name: str,
    stream: _Stream,
    weight: jax.Array,  # bfloat16[E, num_parts * N]
    result: Callable[[Sequence[jax.Array]], jax.Array],  # of the sums of the parts
    spec: PostAttentionSpec,
    plan: ProductPlan,
    next_product: Next,
) -> jax.Array:  # bfloat16[M, N]
    """``result`` of the norm times the weight."""
    M, E = stream.x.shape

    def prepare(place: Place, read: Sequence[Any], written: Sequence[Any]) -> Finish:
        [squares_ref], [out_ref] = read, written
        squares = gpu_columns.sum_over_first(squares_ref, place.row, place.num_rows)
        factor = lax.rsqrt(squares * (1 / E) + spec.eps)

        def finish(sums: Sequence[jax.Array]) -> None:
            out = result([total * factor for total in sums]).astype(jnp.bfloat16)
            gpu_columns.store_tile(out, out_ref, place.row, place.column)

        return finish

    kind = jax.ShapeDtypeStruct((M, plan.num_tiles * COLUMNS), jnp.bfloat16)
    [out] = product(name, stream.weighted, weight, [stream.squares], [kind], prepare, plan, next_product)
    return out


def _activate(activation: Callable[[jax.Array], jax.Array], sums: Sequence[jax.Array]) -> jax.Array:
    gate, up = sums
    return activation(gate) * up


def _only(sums: Sequence[jax.Array]) -> jax.Array:
    [total] = sums
    return total
