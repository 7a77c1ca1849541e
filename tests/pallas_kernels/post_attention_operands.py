"""Random operands of the op post_attention, and what its results may differ by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.post_attention import reference
from pallas_kernels.post_attention.plan import Shape
from pallas_kernels.post_attention.types import LayerWeights, NextWeights, PostAttentionSpec

SPEC = PostAttentionSpec(eps=1e-6, norm_offset=0.0, activation="silu")


def make_operands(
    shape: Shape, spec: PostAttentionSpec = SPEC, seed: int = 0
) -> tuple[jax.Array, jax.Array, LayerWeights, NextWeights]:
    M, A, E, F, Q = shape.M, shape.A, shape.E, shape.F, shape.Q
    keys = iter(jax.random.split(jax.random.key(seed), 8))

    def normal(*size: int, scale: float = 1.0) -> jax.Array:
        return (scale * jax.random.normal(next(keys), size, jnp.float32)).astype(jnp.bfloat16)

    layer = LayerWeights(
        o=normal(A, E, scale=A**-0.5),
        mlp_norm=(1.0 - spec.norm_offset + normal(E, scale=0.3)).astype(jnp.bfloat16),
        gate_up=normal(E, 2 * F, scale=E**-0.5),
        down=normal(F, E, scale=F**-0.5),
    )
    following = NextWeights(
        (1.0 - spec.norm_offset + normal(E, scale=0.3)).astype(jnp.bfloat16), normal(E, Q, scale=E**-0.5)
    )
    return normal(M, A), normal(M, E, scale=3.0), layer, following


def check_errors(got: Sequence[jax.Array], operands: Any, spec: PostAttentionSpec) -> None:
    """Against the reference in float32: no larger than those of the reference in bfloat16, which rounds more often."""
    exact = reference.post_attention(*jax.tree.map(lambda a: a.astype(jnp.float32), operands), spec)
    composed = reference.post_attention(*operands, spec)
    for name, mine, xla, truth in zip(("x", "qkv"), got, composed, exact, strict=True):
        error, yardstick = (np.abs(np.asarray(a, np.float32) - np.asarray(truth)) for a in (mine, xla))
        assert error.max() <= 1.5 * yardstick.max(), name
        assert error.mean() <= 1.05 * yardstick.mean(), name
