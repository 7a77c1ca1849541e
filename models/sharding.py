"""Logical axis names -> mesh axes. Every parameter names its axes once (layers.py); here is which of them are split.

Tensor parallelism splits KV heads (with their query heads), the ffn dimension and the vocabulary over mesh axis "tp".
Each layer then needs two sums over "tp": after the attention output and after the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .config import ModelConfig


@dataclass(frozen=True)
class ShardingRules:
    """Mesh axis of each logical axis; None keeps it whole on every device."""

    vocab: str | None = "tp"
    kv_heads: str | None = "tp"
    ffn: str | None = "tp"
    embed: str | None = None
    q_group: str | None = None
    head_dim: str | None = None

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        return PartitionSpec(*(None if axis is None else getattr(self, axis) for axis in axes))


def partition_specs(param_axes: Any, rules: ShardingRules | None = None) -> Any:
    """The tree of ``Model.param_axes`` with a PartitionSpec in place of every tuple of axis names."""
    rules = rules or ShardingRules()
    return jax.tree.map(rules.spec, param_axes, is_leaf=lambda node: isinstance(node, tuple))


def named_shardings(param_axes: Any, mesh: Mesh, rules: ShardingRules | None = None) -> Any:
    """The same tree with a NamedSharding on ``mesh``."""
    specs = partition_specs(param_axes, rules)
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


def kv_heads_for(config: ModelConfig, tp: int) -> int:
    """KV heads that a model needs when ``tp`` devices share it: its own, or copies where there are too few.

    Raises:
        ValueError: heads or ffn can't be divided over ``tp`` devices; says which and why.
    """
    own = config.num_kv_heads
    if config.ffn_dim % tp:
        raise ValueError(f"tensor parallel size {tp} doesn't divide the ffn dimension {config.ffn_dim}")
    if config.num_heads % tp:
        raise ValueError(f"tensor parallel size {tp} doesn't divide the {config.num_heads} query heads")
    if own % tp == 0:
        return own
    if tp % own:
        raise ValueError(f"tensor parallel size {tp} is neither a divisor nor a multiple of the {own} KV heads")
    return tp


def padded_vocab_for(vocab_size: int, tp: int, multiple: int = 1) -> int:
    """Smallest vocabulary size that ``tp`` devices can share in pieces of a multiple of ``multiple`` rows."""
    step = tp * multiple
    return -(-vocab_size // step) * step
