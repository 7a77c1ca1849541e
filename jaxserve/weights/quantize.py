"""Which weights are quantised and how: the served model's while they are loaded, and a quantised copy's that drafts.

Weights that products read are packed (``models.quantized``): the projections, and in the integer formats the LM head's
table, which in a tied model is the embedding too. All other parameters (norms, biases, an untied embedding, which is
looked up and not multiplied) stay as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.linear import PackedWeight
from jaxserve.models.quantized import (
    contracted_last,
    quantize_fp8,
    quantize_fp8_products,
    quantize_int4,
    quantize_int8,
)
from jaxserve.models.registry import Model, Params

_CONTRACTED = {"qkv": (0,), "o": (0, 1, 2), "gate_up": (0,), "down": (0,)}  # axes that the product sums over
_TABLE = (1,)  # of [V, E]
# The LM head decides between near tokens, and in a tied model it is what the first layer reads. In 4 bits it cost
# SmolLM2 one to four points of a copy's agreement with the original; in fp8 it stays whole, as in vLLM.
_HEAD: dict[Quantization, Quantization | None] = {"int8": "int8", "int4": "int8", "fp8": None, "fp8_weight_only": None}
_PACK: dict[Quantization, Callable[[jax.Array, tuple[int, ...]], PackedWeight]] = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "fp8": quantize_fp8_products,
    "fp8_weight_only": quantize_fp8,
}


@dataclass(frozen=True)
class Packing:
    """How one parameter is packed."""

    format: Quantization
    contracted: tuple[int, ...]

    def pack(self, weight: jax.Array) -> PackedWeight:
        """Traceable."""
        return _PACK[self.format](weight, self.contracted)

    def abstract(self, shape: tuple[int, ...], sharding: NamedSharding | None) -> PackedWeight:
        """``pack`` of a weight of that shape as ``jax.ShapeDtypeStruct``, sharded as the weight is.

        What has other axes than the weight is whole on every device where the mesh doesn't divide it.
        """
        packed = jax.eval_shape(self.pack, jax.ShapeDtypeStruct(shape, "float32"))
        if sharding is None:
            return packed
        mesh = sharding.mesh
        axes = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]  # mesh axis of each axis of the weight
        if self.format == "fp8":
            kept = [axes[i] for i in contracted_last(len(shape), self.contracted)]
        else:
            kept = axes
        outputs = [axis for i, axis in enumerate(axes) if i not in self.contracted]

        def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            split = kept if leaf.ndim == len(shape) else outputs
            fits = [axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(split, leaf.shape, strict=True)]  # fmt: skip
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*fits)))

        return jax.tree.map(place, packed)


def packing_of(config: ModelConfig, path: str, quantization: Quantization | None) -> Packing | None:
    """How the parameter at a dotted path (``layers.0.attn.qkv.weight``) is packed; None: it stays as it is."""
    if quantization is None or not path.endswith(".weight"):
        return None
    owner = path.split(".")[-2]
    if owner in _CONTRACTED:
        return Packing(quantization, _CONTRACTED[owner])
    head = _HEAD[quantization]
    if head is not None and owner == ("embed" if config.tie_embeddings else "lm_head"):
        return Packing(head, _TABLE)
    return None


def quantize_params(model: Model, params: Params, quantization: Quantization) -> Params:
    """``params`` with packed weights, sharded as they are; the others are the same arrays, not copies.

    Args:
        model: whose parameters these are.
        params: arrays on a mesh, each with a NamedSharding; they stay as they are.
    """

    def quantize(path: Any, leaf: jax.Array) -> Any:
        packing = packing_of(model.config, dotted(path), quantization)
        return leaf if packing is None else _packer(packing, leaf.shape, leaf.sharding)(leaf)

    return jax.block_until_ready(jax.tree.map_with_path(quantize, params))


def abstract_params(model: Model, shardings: Params, quantization: Quantization | None) -> Params:
    """The parameters as they will be on the devices: shapes with shardings."""

    def convert(path: Any, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
        packing = packing_of(model.config, dotted(path), quantization)
        if packing is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        return packing.abstract(leaf.shape, sharding)

    return jax.tree.map_with_path(convert, model.params, shardings)


def dotted(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def params_bytes(params: Params) -> int:
    """Bytes of all leaves, over all devices; 4-bit values count half a byte."""
    return sum(leaf.size * _bits(leaf) for leaf in jax.tree.leaves(params)) // 8


def bytes_on_a_device(params: Any) -> int:
    """Bytes of the leaves' shards on one device; 4-bit values count half a byte."""
    leaves = jax.tree.leaves(params)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _bits(leaf) for leaf in leaves) // 8


def _bits(leaf: Any) -> int:
    return 4 if leaf.dtype.name in ("int4", "uint4") else 8 * leaf.dtype.itemsize


@functools.lru_cache(maxsize=64)  # all layers share one compiled function per shape
def _packer(packing: Packing, shape: tuple[int, ...], sharding: NamedSharding) -> Callable[[jax.Array], PackedWeight]:
    places = jax.tree.map(lambda leaf: leaf.sharding, packing.abstract(shape, sharding))
    return jax.jit(packing.pack, out_shardings=places)
