"""A parameter tree with its products' weights in 8 or 4 bits: the quantised copy of a model, made on the device.

Every weight that a product reads is packed (``models.quantized``): the projections and the LM head's table, which in a
tied model is the embedding too. All other parameters (norms, biases, an untied embedding, which is looked up and not
multiplied) are the same arrays as in the given tree, not copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.models.quantized import Int4Weight, Int8Weight, quantize_int4, quantize_int8
from jaxserve.models.registry import Model, Params

Quantization = Literal["int8", "int4"]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)

_CONTRACTED = {"qkv": (0,), "o": (0, 1, 2), "gate_up": (0,), "down": (0,)}  # axes that the product sums over
_TABLE = (1,)  # of [V, E]


def quantize_params(model: Model, params: Params, quantization: Quantization) -> Params:
    """``params`` with packed weights, sharded as they are. The LM head's table takes 8 bits in either case.

    It decides between near tokens, and in a tied model it is what the first layer reads: in 4 bits it cost SmolLM2 one
    to four points more of agreement with the original.

    Args:
        model: whose parameters these are.
        params: arrays on a mesh, each with a NamedSharding; they stay as they are.
    """
    head = "embed" if model.config.tie_embeddings else "lm_head"
    tops = {name: params[name] for name in params if name not in (head, "layers")}
    packed = {name: _pack(leaf, _TABLE, "int8") for name, leaf in params[head].items()}
    return jax.block_until_ready(
        {**tops, head: packed, "layers": [_quantize_layer(layer, quantization) for layer in params["layers"]]}
    )


def params_bytes(params: Params) -> int:
    """Bytes of all leaves, over all devices; 4-bit values count half a byte."""
    return sum(leaf.size * _bits(leaf) for leaf in jax.tree.leaves(params)) // 8


def _bits(leaf: jax.Array) -> int:
    return 4 if leaf.dtype.name in ("int4", "uint4") else 8 * leaf.dtype.itemsize


def _quantize_layer(node: Any, quantization: Quantization, contracted: tuple[int, ...] | None = None) -> Any:
    if not isinstance(node, dict):
        return node
    return {
        name: _pack(child, contracted, quantization)
        if name == "weight" and contracted is not None
        else _quantize_layer(child, quantization, _CONTRACTED.get(name))
        for name, child in node.items()
    }


def _pack(weight: jax.Array, contracted: tuple[int, ...], quantization: Quantization) -> Int8Weight | Int4Weight:
    return _packer(contracted, quantization, weight.sharding, weight.shape)(weight)


@functools.lru_cache(maxsize=64)  # all layers share one compiled function per shape
def _packer(
    contracted: tuple[int, ...], quantization: Quantization, sharding: NamedSharding, shape: tuple[int, ...]
) -> Callable[[jax.Array], Int8Weight | Int4Weight]:
    quantize = quantize_int8 if quantization == "int8" else quantize_int4
    pack = functools.partial(quantize, contracted=contracted)
    shapes = jax.eval_shape(pack, jax.ShapeDtypeStruct(shape, "float32"))
    axes = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]  # mesh axis of each axis of the weight

    def place(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        kept = axes if leaf.ndim == len(shape) else [axis for i, axis in enumerate(axes) if i not in contracted]
        fits = [axis if axis and size % sharding.mesh.shape[axis] == 0 else None
                for axis, size in zip(kept, leaf.shape, strict=True)]  # fmt: skip
        return NamedSharding(sharding.mesh, PartitionSpec(*fits))

    return jax.jit(pack, out_shardings=jax.tree.map(place, shapes))
