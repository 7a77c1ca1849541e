"""Random weights of a model's true shapes: for speed measurements and for tests that need no checkpoint."""

from __future__ import annotations

import math
import zlib
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from jaxserve.models.config import ModelConfig
from jaxserve.weights.mapping import Param, canonical_params

NORM_SPREAD = 0.1
BIAS_SPREAD = 0.02


class DummySource:
    """Canonical parameters, each drawn on the device from the seed and its own path.

    Matrices are normal with variance 1 / fan-in, so that activations keep their size through the layers; norms are 1
    (Gemma: 0, as it adds the 1) plus a little noise. Padding, copied heads and sharding come later and change no value.
    """

    fused = True
    dtype = "float32"

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self._config = config
        self._params = canonical_params(config, fused=True)
        self._key = jax.random.key(seed)
        self.shapes = {path: param.shape for path, param in self._params.items()}

    def read(self, name: str) -> Array:
        param = self._params[name]
        key = jax.random.fold_in(self._key, zlib.crc32(name.encode()))
        values = _draw(key, *self._moments(param), num_values=math.prod(param.shape))
        return values.reshape(param.shape)

    def label(self, name: str) -> str:
        return name

    def _moments(self, param: Param) -> tuple[float, float]:
        """Mean and standard deviation."""
        if param.kind == "vector":
            return (0.0 if self._config.architecture == "gemma3" else 1.0), NORM_SPREAD
        if param.kind == "qkv_bias":
            return 0.0, BIAS_SPREAD
        if param.kind == "vocab":
            return 0.0, self._config.model_dim**-0.5
        fan_in = math.prod(param.shape[:-1]) if param.kind == "o" else param.shape[0]
        return 0.0, fan_in**-0.5


# Drawn flat: compiling a draw of four dimensions takes seconds on CPU, and all of a length share one executable.
@partial(jax.jit, static_argnames="num_values")
def _draw(
    key: Array,  # key[]
    mean: Array,  # f32[]
    spread: Array,  # f32[]
    *,
    num_values: int,
) -> Array:
    return mean + spread * jax.random.normal(key, (num_values,), jnp.float32)
