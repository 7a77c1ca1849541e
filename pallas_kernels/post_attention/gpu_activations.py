"""Activations of a gate inside Mosaic GPU kernels with Lane semantics, in float32."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # as reference.py names them
    "silu": lambda x: x / (1.0 + jnp.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + jnp.tanh(0.7978845608 * (x + 0.044715 * x * x * x))),
}
