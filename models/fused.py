"""Which models run what stands between two layers' attention in one launch or in four, where there are few tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from pallas_kernels.post_attention.api import num_launches, supports
from pallas_kernels.post_attention.plan import ITEM_ROWS, Shape
from pallas_kernels.post_attention.product_plan import MAX_ROWS
from pallas_kernels.post_attention.types import PostAttentionSpec

from .config import ModelConfig


@dataclass(frozen=True)
class GPU:
    """A device: its compute capability, such as "9.0", and how many multiprocessors it has."""

    capability: str
    multiprocessors: int

    @classmethod
    def of(cls, device: Any) -> GPU:
        return cls(device.compute_capability, device.core_count)


@dataclass(frozen=True)
class FusedLayers:
    """Static: the op's settings, its shape but for the rows, and the GPU's multiprocessors."""

    spec: PostAttentionSpec
    shape: Shape
    num_ctas: int

    def launches(self, num_tokens: int) -> int:
        """Of one layer, 1 or 4, in a step of so many tokens, padding included; 0 if it doesn't run like this."""
        shape = self.rows(num_tokens)
        if supports(shape, self.spec, jnp.bfloat16, num_ctas=self.num_ctas) is not None:
            return 0
        return num_launches(shape, self.num_ctas)

    def rows(self, num_tokens: int) -> Shape:
        return replace(self.shape, M=num_tokens)


def fuse_layers(
    config: ModelConfig, *, norm_offset: float, plain: bool, dtype: jnp.dtype, gpu: GPU | str
) -> FusedLayers | str:
    """The layers of a model on a GPU; or why they aren't fused.

    Args:
        norm_offset: of the layers' norms.
        plain: whether layers are ``x + attn(norm(x))``, then ``x + mlp(norm(x))``, and nothing else.
        gpu: that has the whole model to itself, or why none has.
    """
    if isinstance(gpu, str):
        return gpu
    if not plain:
        return f"layers of {config.architecture} have more norms"
    if config.qkv_bias:
        return "qkv has a bias"
    heads = config.num_heads + 2 * config.num_kv_heads
    shape = Shape(
        M=ITEM_ROWS,
        A=config.num_heads * config.head_dim,
        E=config.model_dim,
        F=config.ffn_dim,
        Q=heads * config.head_dim,
    )
    spec = PostAttentionSpec(eps=config.norm_eps, norm_offset=norm_offset, activation=config.activation)
    reasons = [
        supports(replace(shape, M=rows), spec, dtype, num_ctas=gpu.multiprocessors, capability=gpu.capability)
        for rows in range(ITEM_ROWS, MAX_ROWS + 1, ITEM_ROWS)
    ]
    return FusedLayers(spec, shape, gpu.multiprocessors) if None in reasons else str(reasons[0])
