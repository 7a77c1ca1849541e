"""What stands between one layer's attention and the next one's, as one op: output product, residual, norm, gated MLP,
residual, norm, and the next layer's qkv product.

Kernels of their own for each of these spend more time on starting, and on waiting for their slowest part, than on
reading a small model's weights. With few rows of a small model the op is one launch (gpu.py), with more of either four
(gpu_products.py); where ``supports`` says why not, a caller composes a layer of XLA's products. The op rounds less
often than those: sums of products stay in float32 until the residual is added or the gate is multiplied by up.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.lower_once import run_lowered
from pallas_kernels.post_attention.plan import COLUMNS, ITEM_ROWS, Shape, phases, word_places
from pallas_kernels.post_attention.product_plan import plan_products
from pallas_kernels.post_attention.reference import ACTIVATIONS
from pallas_kernels.post_attention.types import LayerWeights, NextWeights, PostAttentionSpec, Words

# Of one launch: with more rows its CTAs hand each other too much, with more bytes of weights they read too unevenly.
_MAX_ROWS_OF_ONE, _MAX_BYTES_OF_ONE = 32, 64 << 20
CAPABILITY = "9.0"
_MAX_PIECES = 48  # that a thread awaits at once, in 4 registers each


class UnsupportedPostAttentionError(ValueError):
    """The op can't run; the message says why."""


def supports(
    shape: Shape, spec: PostAttentionSpec, dtype: Any, *, num_ctas: int, capability: str = CAPABILITY
) -> str | None:
    """Why the op can't run, or isn't worth it; None if it can.

    Args:
        dtype: of activations and weights.
        num_ctas: multiprocessors of the GPU.
        capability: of the GPU.
    """
    sizes = {"attention width": shape.A, "model dim": shape.E, "ffn dim": shape.F, "qkv width": shape.Q}
    odd = [f"{name} is {size}" for name, size in sizes.items() if size % COLUMNS]
    if capability != CAPABILITY:
        return f"it is written for compute capability {CAPABILITY}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"it computes in bfloat16, not {jnp.dtype(dtype).name}"
    if spec.activation not in ACTIVATIONS:
        return f"its activations are {' and '.join(ACTIVATIONS)}, not {spec.activation}"
    if odd:
        return f"{odd[0]}, no multiple of {COLUMNS}"
    if shape.M % ITEM_ROWS or shape.M <= 0:
        return f"it takes rows in multiples of {ITEM_ROWS}, not {shape.M}"
    one, four = _refuses_one(shape, num_ctas), _refuses_four(shape, num_ctas)
    return f"in one launch: {one}; in four: {four}" if one and four else None


def num_launches(shape: Shape, num_ctas: int) -> int:
    """Of the op where it is supported: 1 or 4."""
    return 4 if _refuses_one(shape, num_ctas) else 1


def _refuses_one(shape: Shape, num_ctas: int) -> str | None:
    """Why the op isn't one launch."""
    if shape.M > _MAX_ROWS_OF_ONE:
        return f"{shape.M} rows, above {_MAX_ROWS_OF_ONE}"
    if layer_bytes(shape) > _MAX_BYTES_OF_ONE:
        return f"a layer has {layer_bytes(shape) >> 20} MiB, above {_MAX_BYTES_OF_ONE >> 20}"
    pieces = max(p.num_parts * p.max_column_pieces for p in phases(shape, num_ctas))
    if pieces > _MAX_PIECES:
        return f"a column's sum would come in {pieces} pieces, above {_MAX_PIECES}"
    return None


def _refuses_four(shape: Shape, num_ctas: int) -> str | None:
    """Why the op isn't four launches."""
    plans = plan_products(shape, num_ctas)
    return plans if isinstance(plans, str) else None


def layer_bytes(shape: Shape) -> int:
    """Of the weights that one launch reads."""
    return 2 * (shape.A * shape.E + 3 * shape.E * shape.F + shape.E * shape.Q)


def empty_words(shape: Shape, num_ctas: int) -> Words | None:
    """What the first launch of a step is given. None where a layer has four: those hand each other whole results."""
    if num_launches(shape, num_ctas) == 4:
        return None
    places = word_places(shape, num_ctas)
    sizes = places.num_piece_words, places.num_words, places.num_words
    return Words(*(jnp.full(size, -1, jnp.int32) for size in sizes))


def post_attention(
    attended: jax.Array,  # [M, A] bfloat16
    x: jax.Array,  # [M, E] bfloat16
    layer: LayerWeights,
    following: NextWeights,
    words: Words | None,
    spec: PostAttentionSpec,
    num_ctas: int,
) -> tuple[jax.Array, jax.Array, Words | None]:
    """The residual stream [M, E] after ``layer``, and ``following``'s qkv [M, Q].

    Args:
        attended: what the layer's attention gave, heads side by side.
        x: the residual stream before it.
        words: ``empty_words`` of the same shape and ``num_ctas`` for a step's first layer, then what the last one
            returned: None with four launches. They're written in place where nothing else reads them later.
        num_ctas: multiprocessors of the GPU. All CTAs of a single launch wait for each other, so that many must be able
            to run at once: the GPU is this process's own, and nothing else that waits runs on it at the time.

    Raises:
        UnsupportedPostAttentionError: the kernel can't compute these shapes.
        ValueError: shapes don't fit together.
    """
    shape = Shape(attended.shape[0], attended.shape[1], x.shape[1], layer.down.shape[0], following.qkv.shape[1])
    M, A, E, F, Q = shape.M, shape.A, shape.E, shape.F, shape.Q
    for name, array, expected in (
        ("x", x, (M, E)),
        ("o", layer.o, (A, E)),
        ("mlp_norm", layer.mlp_norm, (E,)),
        ("gate_up", layer.gate_up, (E, 2 * F)),
        ("down", layer.down, (F, E)),
        ("attn_norm", following.attn_norm, (E,)),
        ("qkv", following.qkv, (E, Q)),
    ):
        if array.shape != expected or array.dtype != attended.dtype:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; expected {attended.dtype}{list(expected)}")
    reason = supports(shape, spec, attended.dtype, num_ctas=num_ctas)
    if reason is not None:
        raise UnsupportedPostAttentionError(f"post_attention can't run: {reason}")
    launches = num_launches(shape, num_ctas)
    if (words is None) != (launches == 4):
        raise ValueError(f"words are {'missing' if words is None else 'given'}; launches of a layer here: {launches}")
    arrays = {"attended": attended, "x": x, "layer": layer, "following": following}
    # Imported here: a machine without a GPU may lack what the kernels' modules need.
    if launches == 4:
        four = importlib.import_module("pallas_kernels.post_attention.gpu_products")
        return *run_lowered(four.post_attention, {"spec": spec, "multiprocessors": num_ctas}, **arrays), None
    one = importlib.import_module("pallas_kernels.post_attention.gpu")
    return run_lowered(one.post_attention, {"spec": spec, "num_ctas": num_ctas}, **arrays, words=words)
