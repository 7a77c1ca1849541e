"""Random weights of a model's true shapes: for speed measurements and for tests that need no checkpoint."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models.config import ModelConfig
from jaxserve.weights.mapping import Param, fit

NORM_SPREAD = 0.1
BIAS_SPREAD = 0.02


class DummyWeights:
    """Draws parameters on the device, each from the seed and its own path.

    Matrices are normal with variance 1 / fan-in, so that activations keep their size through the layers; norms are 1
    (Gemma: 0, as it adds the 1) plus a little noise. The values don't depend on padding, copied heads or sharding.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._key = jax.random.key(seed)
        self._drawers: dict[Any, Callable[..., Array]] = {}  # layers share their compiled functions

    def make(self, path: str, param: Param, leaf: jax.ShapeDtypeStruct, sharding: Any) -> Array:
        """The parameter at ``path``, of ``leaf``'s shape and dtype."""
        key = (param.kind, param.shape, leaf.shape, leaf.dtype, sharding)
        if key not in self._drawers:
            self._drawers[key] = jax.jit(partial(_draw, param, leaf.shape, leaf.dtype), out_shardings=sharding)
        mean, spread = _moments(self._config, param)
        return self._drawers[key](jax.random.fold_in(self._key, zlib.crc32(path.encode())), mean, spread)


def _moments(config: ModelConfig, param: Param) -> tuple[float, float]:
    """Mean and standard deviation."""
    if param.kind == "vector":
        return (0.0 if config.architecture == "gemma3" else 1.0), NORM_SPREAD
    if param.kind == "qkv_bias":
        return 0.0, BIAS_SPREAD
    if param.kind == "vocab":
        return 0.0, config.model_dim**-0.5
    fan_in = math.prod(param.shape[:-1]) if param.kind == "o" else param.shape[0]
    return 0.0, fan_in**-0.5


def _draw(param: Param, shape: tuple[int, ...], dtype: Any, key: Array, mean: Array, spread: Array) -> Array:
    values = mean + spread * jax.random.normal(key, param.shape, jnp.float32)
    return fit(param, values.astype(dtype), shape)
