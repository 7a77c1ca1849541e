"""Fills a model's parameter tree from a checkpoint, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

from jaxserve.models.config import ModelConfig
from jaxserve.models.registry import Model, Params
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.dummy import DummySource
from jaxserve.weights.mapping import Kind, Param, canonical_params, check_fits, fit, fuse
from jaxserve.weights.source import TensorSource


def load_params(
    checkpoint: Checkpoint, model: Model, *, sharding: Params | None = None, seed: int = 0, progress: bool = True
) -> Params:
    """The parameters of ``model``, on the device.

    Parameter by parameter, tensors are read, moved to the device, fused there, and dropped: host memory never holds
    more than two parameters' tensors.

    Args:
        checkpoint: an opened checkpoint; its tensors were compared with its config when it was opened.
        model: the abstract model (``models.build``); shapes and dtypes of ``model.params`` are what is made.
        sharding: a tree of ``jax.sharding.Sharding`` like ``model.params``, or None for the default device.
        seed: of dummy weights.
        progress: shows a bar.

    Raises:
        CheckpointError: the model's parameters aren't those of the checkpoint's config, or a file can't be read.
    """
    config = checkpoint.config
    source: TensorSource = checkpoint.source or DummySource(config, seed)
    abstract, tree = by_path(model.params), jax.tree.structure(model.params)
    shardings = [None] * len(abstract) if sharding is None else jax.tree.leaves(sharding)
    params = canonical_params(config, fused=source.fused)
    check_fits(params, abstract)
    loaded: list[Array] = []
    bar = tqdm(abstract.items(), desc="Loading weights", unit="param", disable=not progress)
    for (path, leaf), where in zip(bar, shardings, strict=True):
        if loaded:
            loaded[-1].block_until_ready()  # bounds the host copies that wait for their transfer
        loaded.append(_read_param(source, params[path], config, leaf, where))
    return jax.block_until_ready(jax.tree.unflatten(tree, loaded))


def by_path(params: Params) -> dict[str, Any]:
    """The leaves of a parameter tree by dotted path (``layers.0.attn.qkv.weight``), in the tree's own order."""
    leaves = jax.tree.leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _read_param(
    source: TensorSource, param: Param, config: ModelConfig, leaf: jax.ShapeDtypeStruct, sharding: Any
) -> Array:
    assemble = _assembler(param.kind, None if param.fused else config, leaf.shape, leaf.dtype, sharding)
    return assemble(*(source.read(name) for name, _ in param.sources))


@lru_cache(maxsize=256)  # all layers share one compiled function per kind and shape, and so do later loads
def _assembler(
    kind: Kind, config: ModelConfig | None, shape: tuple[int, ...], dtype: np.dtype, sharding: Any
) -> Callable[..., Array]:
    """Tensors in Hugging Face layout -> a parameter of ``shape``; without a config, from the canonical parameter."""

    def assemble(*tensors: Array) -> Array:
        canonical = tensors[0] if config is None else fuse(kind, tensors, config)
        return fit(kind, canonical.astype(dtype), shape)

    return jax.jit(assemble, out_shardings=sharding)
