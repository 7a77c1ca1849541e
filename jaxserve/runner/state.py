"""What lives on the device between steps. Three donated pytrees: slots, KV pools, scratch.

Shape letters: S slots, P block-table columns, K draft length, T tokens of the largest step, E model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.runner.config import RunnerConfig
from jaxserve.sampling.state import SamplingState, init_state


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StagedPlan:
    """The rows of the step in hand. Rows past the plan's have slot S and width 0."""

    slots: jax.Array  # int32[S]
    widths: jax.Array  # int32[S], tokens to compute, drafts included
    num_drafts: jax.Array  # int32[S]
    drafts: jax.Array  # int32[S, K]
    samples: jax.Array  # bool[S]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SlotState:
    """Everything the device knows of the running choices."""

    tokens: jax.Array  # int32[S, max_model_len], prompt and output
    tokens_len: jax.Array  # int32[S]
    computed_len: jax.Array  # int32[S]
    block_table: jax.Array  # int32[1, S, P]; the leading axis is the layer group
    sampling: SamplingState
    plan: StagedPlan


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scratch:
    """Hidden states that one executable leaves for the next, in buffers whose addresses never change."""

    sampled: jax.Array  # [S, K+1, E], at the positions that the sampler may need
    tokens: jax.Array  # [T, E], of all of the step's tokens, for prompt logprobs


def init_slots(config: RunnerConfig) -> SlotState:
    """Slots that hold nothing."""
    S, K = config.max_num_seqs, config.max_drafts

    def zeros(*shape: int) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return SlotState(
        tokens=zeros(S, config.max_model_len),
        tokens_len=zeros(S),
        computed_len=zeros(S),
        block_table=zeros(1, S, config.table_width),
        sampling=init_state(S, config.vocab_size, config.limits),
        plan=StagedPlan(
            slots=jnp.full((S,), S, jnp.int32),
            widths=zeros(S),
            num_drafts=zeros(S),
            drafts=zeros(S, K),
            samples=jnp.zeros((S,), bool),
        ),
    )


def init_scratch(config: RunnerConfig, model_dim: int, dtype: jnp.dtype) -> Scratch:
    return Scratch(
        sampled=jnp.zeros((config.max_num_seqs, config.max_drafts + 1, model_dim), dtype),
        tokens=jnp.zeros((config.max_num_batched_tokens, model_dim), dtype),
    )
