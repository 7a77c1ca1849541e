"""Fills a model's parameter tree from a checkpoint, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array
from tqdm import tqdm

from jaxserve.models.config import ModelConfig
from jaxserve.weights.checkpoint import Checkpoint
from jaxserve.weights.dummy import DummyWeights
from jaxserve.weights.mapping import Param, canonical_params, check_fits, fit, fuse


def load_params(
    checkpoint: Checkpoint, model: Any, *, sharding: Any = None, seed: int = 0, progress: bool = True
) -> Any:
    """The parameters of ``model``, on the device.

    Host memory holds one parameter at a time: it is read, moved to the device, fused there, and dropped.

    Args:
        checkpoint: an opened checkpoint; its tensors were compared with its config when it was opened.
        model: the abstract model (``models.build``); shapes and dtypes of ``model.params`` are what is made.
        sharding: a tree of ``jax.sharding.Sharding`` like ``model.params``, or None for the default device.
        seed: of dummy weights.
        progress: shows a bar.

    Raises:
        CheckpointError: the model's parameters aren't those of the checkpoint's config, or a file can't be read.
    """
    abstract, tree = by_path(model.params), jax.tree.structure(model.params)
    shardings = jax.tree.leaves(sharding) if sharding is not None else [None] * len(abstract)
    params = canonical_params(checkpoint.config, fused=checkpoint.source is not None and checkpoint.source.fused)
    check_fits(params, abstract)
    make = _maker(checkpoint, seed)
    loaded: list[Array] = []
    bar = tqdm(abstract.items(), desc="Loading weights", unit="param", disable=not progress)
    for (path, leaf), where in zip(bar, shardings, strict=True):
        if loaded:
            loaded[-1].block_until_ready()  # bounds the host copies that wait for their transfer
        loaded.append(make(path, params[path], leaf, where))
    return jax.block_until_ready(jax.tree.unflatten(tree, loaded))


def by_path(params: Any) -> dict[str, Any]:
    """The leaves of a parameter tree by dotted path (``layers.0.attn.qkv.weight``), in the tree's own order."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(params)
    }


def _maker(checkpoint: Checkpoint, seed: int) -> Callable[[str, Param, jax.ShapeDtypeStruct, Any], Array]:
    config, source = checkpoint.config, checkpoint.source
    if source is None:
        return DummyWeights(config, seed).make
    fused: dict[Any, Callable[..., Array]] = {}  # one compiled function per kind, shape, dtype and sharding

    def make(path: str, param: Param, leaf: jax.ShapeDtypeStruct, where: Any) -> Array:
        key = (param.kind, leaf.shape, leaf.dtype, where)
        if key not in fused:
            fused[key] = jax.jit(partial(_fused, config, param, leaf.shape, leaf.dtype), out_shardings=where)
        return fused[key](*(source.read(name) for name, _ in param.sources))

    return make


def _fused(config: ModelConfig, param: Param, shape: tuple[int, ...], dtype: Any, *tensors: Array) -> Array:
    return fit(param, fuse(param, tensors, config).astype(dtype), shape)
