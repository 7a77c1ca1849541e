"""Drafts of a draft model: K one-token passes of it at the start of a step, from the newest token on.

    propose(params, kv, slots) -> kv, slots      fills the staged plan's drafts, up to each row's number

It samples as the target's sampler will: with the same settings, the same noise, and the drafts before a position as its
prefix. So a draft is what the target samples wherever the two models' distributions agree on the winner.

The draft model's KV lies in pools of its own under the target's block table: a block holds both models' keys and values
of the same tokens, so prefix hits, chunks, preemption and resumes serve both. ``step.forward`` writes it for every
token of every step; here it is written for the newest token and the drafts, at positions that the plan has reserved.

Shape letters: S slots, R rows of the bucket, K draft length, M = R * (K+1), E model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.registry import Model
from jaxserve.runner.attend import PagedAttention
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.layout import lay_out
from jaxserve.runner.state import SlotState
from jaxserve.sampling.host import NO_ID
from jaxserve.sampling.rows import SampleRows, make_rows
from jaxserve.sampling.sampler import sample as sample_rows
from jaxserve.sampling.tier import Tier
from pallas_kernels.ragged_paged_attention.types import KVPool


@dataclass(frozen=True, eq=False)
class DraftModel:
    """A second, cheaper model of the same vocabulary.

    Attributes:
        model: abstract.
        attention: how its layers attend; the target's mesh and block size.
        params: its parameters, on the mesh.
        share: bytes of it that a one-token pass reads, as a share of the target's.
    """

    model: Model
    attention: PagedAttention
    params: Any
    share: float


def propose(
    params: Any,  # the draft model's, whole
    kv: tuple[KVPool, ...],  # the draft model's
    slots: SlotState,
    *,
    model: Model,
    attention: PagedAttention,
    config: RunnerConfig,
    tier: Tier,
    implementation: str,
    num_rows: int,
) -> tuple[tuple[KVPool, ...], SlotState]:
    """Drafts as many tokens as the plan asks for in each of its first R = num_rows rows.

    ``implementation``: see ``sampler.sample``.
    """
    R, S, K = num_rows, config.max_num_seqs, config.max_drafts
    plan = slots.plan
    where = jnp.minimum(plan.slots[:R], S - 1)  # padding rows point at some slot; they draft nothing
    wanted = plan.num_drafts[:R]
    newest_at = jnp.maximum(slots.tokens_len[where] - 1, 0)
    newest = slots.tokens[where, newest_at]

    def draft_one(j: jax.Array, carry: tuple[tuple[KVPool, ...], jax.Array]) -> tuple[tuple[KVPool, ...], jax.Array]:
        pools, drafts = carry
        active = (wanted > j).astype(jnp.int32)
        layout = lay_out(slots.block_table[0], where, newest_at + j, active, num_tokens=R, config=config, max_width=1)
        token = jnp.where(j == 0, newest, drafts[:, jnp.maximum(j - 1, 0)])  # [R]
        hidden, pools = model.hidden(
            params, token[layout.row], layout.position, pools, attention.bind(layout.batch)
        )  # [R, E], packed
        logits = model.logits(params, hidden[jnp.maximum(layout.ends - 1, 0)])  # [R, V]
        rows = _position(make_rows(slots.sampling, where, slots.tokens, slots.tokens_len, drafts), j, R)
        token_ids, _ = sample_rows(
            logits,
            rows,
            slots.sampling,
            tier=tier,
            vocab_size=config.vocab_size,
            max_logprobs=config.limits.max_logprobs,
            implementation=implementation,
        )
        return pools, drafts.at[:, j].set(jnp.where(active > 0, token_ids, NO_ID))

    start = kv, jnp.full((R, K), NO_ID, jnp.int32)
    if config.unroll_drafts:
        kv, drafts = jax.lax.fori_loop(0, K, draft_one, start, unroll=True)
    else:
        kv, drafts = jax.lax.fori_loop(0, jnp.max(wanted), draft_one, start)
    drafts = jax.lax.dynamic_update_slice(plan.drafts, drafts, (0, 0))
    return kv, replace(slots, plan=replace(plan, drafts=drafts))


def _position(rows: SampleRows, j: jax.Array, num_rows: int) -> SampleRows:
    """Position ``j`` of each choice: M rows -> R rows. Drafts from ``j`` on are NO_ID and so not part of its prefix."""

    def pick(x: jax.Array) -> jax.Array:
        by_choice = x.reshape(num_rows, -1, *x.shape[1:])
        return jax.lax.dynamic_index_in_dim(by_choice, j, axis=1, keepdims=False)

    return jax.tree.map(pick, rows)
