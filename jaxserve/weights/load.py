"""Fills a model's parameter tree from a checkpoint, one parameter at a time, quantising it on the way if asked to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from jaxserve.config import Quantization
from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Model, Params
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.dummy import DummySource
from jaxserve.weights.mapping import Kind, Param, canonical_params, check_fits, fit, fuse
from jaxserve.weights.quantize import Packing, dotted, packing_of
from jaxserve.weights.source import TensorSource


def load_params(
    checkpoint: Checkpoint,
    model: Model,
    *,
    sharding: Params | None = None,
    seed: int = 0,
    quantization: Quantization | None = None,
    known: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> Params:
    """The parameters of ``model``, on the device.

    Parameter by parameter, tensors are read, moved to the device, fused and quantised there, and dropped: no more than
    two parameters are ever held in full.

    Args:
        checkpoint: an opened checkpoint; its tensors were compared with its config when it was opened.
        model: the abstract model (``models.build``); shapes and dtypes of ``model.params`` are what is made.
        sharding: a tree of ``jax.sharding.Sharding`` like ``model.params``, or None for the default device.
        seed: of dummy weights.
        quantization: packs the weights of products (``quantize.packing_of``), from the checkpoint's own precision.
        known: parameters by dotted path that are taken as they are instead of being read.
        progress: shows a bar; None: on a terminal.

    Raises:
        CheckpointError: the model's parameters aren't those of the checkpoint's config, or a file can't be read.
    """
    config = checkpoint.config
    source: TensorSource = checkpoint.source or DummySource(config, seed)
    abstract, tree = by_path(model.params), jax.tree.structure(model.params)
    shardings = [None] * len(abstract) if sharding is None else jax.tree.leaves(sharding)
    params = canonical_params(config, fused=source.fused)
    check_fits(params, abstract)
    loaded: list[Any] = []
    bar = tqdm(
        abstract.items(), desc="Loading weights", unit="param", disable=None if progress is None else not progress
    )
    for (path, leaf), where in zip(bar, shardings, strict=True):
        if known is not None and path in known:
            loaded.append(known[path])
            continue
        if loaded:
            jax.block_until_ready(loaded[-1])  # bounds the host copies that wait for their transfer
        packing = packing_of(model.config, path, quantization)
        loaded.append(_read_param(source, params[path], config, leaf, where, packing))
    return jax.block_until_ready(jax.tree.unflatten(tree, loaded))


def by_path(params: Params) -> dict[str, Any]:
    """The leaves of a parameter tree by dotted path (``layers.0.attn.qkv.weight``), in the tree's own order."""
    return {dotted(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _read_param(
    source: TensorSource,
    param: Param,
    config: ModelConfig,
    leaf: jax.ShapeDtypeStruct,
    sharding: Any,
    packing: Packing | None,
) -> Any:
    assemble = _assembler(param.kind, None if param.fused else config, leaf.shape, leaf.dtype, sharding, packing)
    return assemble(*(source.read(name) for name, _ in param.sources))


@lru_cache(maxsize=256)  # all layers share one compiled function per kind and shape, and so do later loads
def _assembler(
    kind: Kind,
    config: ModelConfig | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: Any,
    packing: Packing | None,
) -> Callable[..., Any]:
    """Tensors in Hugging Face layout -> a parameter of ``shape``; without a config, from the canonical parameter."""

    def assemble(*tensors: Array) -> Any:
        canonical = tensors[0] if config is None else fuse(kind, tensors, config)
        if packing is not None:
            return packing.pack(fit(kind, canonical.astype(np.float32), shape))
        return fit(kind, canonical.astype(dtype), shape)

    if packing is not None and sharding is not None:
        sharding = jax.tree.map(lambda part: part.sharding, packing.abstract(shape, sharding))
    return jax.jit(assemble, out_shardings=sharding)
