"""Which tokens a forward pass computes: rows of given widths, packed one after the other.

Shape letters: R rows, T packed tokens, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.runner.config import RunnerConfig
from pallas_kernels.ragged_paged_attention.types import RaggedBatch


@dataclass(frozen=True)
class Layout:
    """Where each packed token belongs. Tokens past the rows' are padding: position 0 of some row, written nowhere."""

    row: jax.Array  # int32[T], in 0..R-1
    slot: jax.Array  # int32[T]
    position: jax.Array  # int32[T]
    ends: jax.Array  # int32[R], one past each row's last packed token
    batch: RaggedBatch


def lay_out(
    block_table: jax.Array,  # int32[S, P]
    slots: jax.Array,  # int32[R], in 0..S-1; padding rows point at some slot, and their width is 0
    first: jax.Array,  # int32[R], position of each row's first token
    widths: jax.Array,  # int32[R]
    *,
    num_tokens: int,
    config: RunnerConfig,
    max_width: int | None = None,
) -> Layout:
    """Packs the rows into T = num_tokens tokens, which must hold them. ``max_width`` bounds the widths, where known."""
    ends = jnp.cumsum(widths)
    starts = ends - widths
    token = jnp.arange(num_tokens)
    # Compared with all, as searching makes a loop, which XLA keeps out of its graphs.
    row = jnp.minimum(jnp.searchsorted(ends, token, side="right", method="compare_all"), len(widths) - 1)  # [T]
    real = token < ends[-1]
    position = jnp.where(real, first[row] + token - starts[row], 0)
    table = block_table[slots]  # [R, P]
    block = table[row, position // config.block_size]
    batch = RaggedBatch(
        block_table=table,
        context_lens=jnp.where(widths > 0, first + widths, 0),
        cu_q_lens=jnp.concatenate([jnp.zeros(1, jnp.int32), ends]),
        token_block=jnp.where(real, block, config.num_blocks),
        token_offset=position % config.block_size,
        max_width=max_width,
    )
    return Layout(row, slots[row], position, ends, batch)
