"""The device side of a step, as pure functions: stage, admit, forward, sample. Each is compiled for a few sizes.

    stage(slots, packet) -> slots                        the plan's rows, block-table updates, drafts
    admit(slots, words) -> slots                         new choices; every field of their slots is overwritten
    forward(params, kv, slots, scratch) -> kv, scratch   embed, layers, KV write; hidden states to sample from
    sample(params, slots, scratch) -> slots, words       LM head, sampler, accept; what the host wants to know

With a draft model, draft.py's ``propose`` runs between stage and forward. ``burst`` does stage, forward and sample for
several plans in one call: small steps take the device less time than calls take the host.

All state is donated, so its addresses never change, and every effect is ordered by data dependence.

Shape letters: S slots, R rows of the bucket, T tokens of the bucket, K draft length, M = R * (K+1), E model dim,
P block-table columns, A admissions, C logprob candidates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.models.registry import Model
from jaxserve.runner.attend import PagedAttention
from jaxserve.runner.buckets import burst_width, forward_width
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.draft import propose as draft_tokens
from jaxserve.runner.layout import lay_out
from jaxserve.runner.packet import Fields, unpack_plan
from jaxserve.runner.state import Scratch, SlotState, StagedPlan
from jaxserve.sampling.logprobs import LogprobArrays, prompt_logprobs
from jaxserve.sampling.rows import make_rows
from jaxserve.sampling.sampler import sample as sample_rows
from jaxserve.sampling.state import commit_tokens, reset_rows
from jaxserve.sampling.tier import Tier
from jaxserve.speculation.ngram import propose
from jaxserve.speculation.verify import accept
from pallas_kernels.ragged_paged_attention.types import KVPool


def stage(
    slots: SlotState,
    packet: jax.Array,  # int32[packet_len], see packet.py
    *,
    config: RunnerConfig,
    num_rows: int | None = None,
) -> SlotState:
    """Puts a plan on the device. Draft counts of the plan are caps where drafts are looked up here.

    ``num_rows`` bounds the plan's rows, so that fewer of them are looked up; None is ``max_num_seqs``.
    """
    rows, drafts, updates = unpack_plan(packet, config)
    row_slots, widths, num_drafts, samples = rows
    if config.ngram is not None:
        R = num_rows or config.max_num_seqs
        where = jnp.minimum(row_slots[:R], config.max_num_seqs - 1)
        found, num_found = propose(
            slots.tokens[where],
            slots.tokens_len[where],
            num_drafts[:R],
            K=config.max_drafts,
            n_min=config.ngram.min_len,
            n_max=config.ngram.max_len,
        )
        drafts = jax.lax.dynamic_update_slice(drafts, found, (0, 0))
        widths = widths.at[:R].add(num_found - num_drafts[:R])
        num_drafts = jax.lax.dynamic_update_slice(num_drafts, num_found, (0,))
    table = slots.block_table.at[0, updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")
    plan = _overwrite(slots.plan, StagedPlan(row_slots, widths, num_drafts, drafts, samples > 0))
    return replace(slots, block_table=table, plan=plan)


def admit(
    slots: SlotState,
    words: jax.Array,  # int32[A, fields.num_words], see packet.py
    *,
    fields: Fields,
) -> SlotState:
    """Overwrites every field of the admitted slots; nothing of their former choices is left."""
    row = fields.unpack(words)
    where = row.pop("slot")
    tokens, tokens_len = row.pop("tokens"), row.pop("tokens_len")
    computed_len, blocks = row.pop("computed_len"), row.pop("blocks")
    return replace(
        slots,
        tokens=slots.tokens.at[where].set(tokens, mode="drop"),
        tokens_len=slots.tokens_len.at[where].set(tokens_len, mode="drop"),
        computed_len=slots.computed_len.at[where].set(computed_len, mode="drop"),
        block_table=slots.block_table.at[0, where].set(blocks, mode="drop"),
        sampling=reset_rows(slots.sampling, where, row, tokens, tokens_len),
    )


def forward(
    params: tuple[Any, ...],  # Model.trunk_params of each model
    kv: tuple[tuple[KVPool, ...], ...],  # of each model
    slots: SlotState,
    scratch: Scratch,
    *,
    models: tuple[tuple[Model, PagedAttention], ...],
    config: RunnerConfig,
    num_tokens: int,
    num_rows: int,
) -> tuple[tuple[tuple[KVPool, ...], ...], Scratch]:
    """Computes the staged rows' tokens in a bucket of T = num_tokens, R = num_rows, see ``compute``."""
    kv, hidden = compute(
        params,
        kv,
        slots,
        models=models,
        config=config,
        num_tokens=num_tokens,
        num_rows=num_rows,
        max_width=forward_width(num_tokens, num_rows, config.max_drafts),
    )
    return kv, _overwrite(scratch, hidden)


def compute(
    params: tuple[Any, ...],  # Model.trunk_params of each model
    kv: tuple[tuple[KVPool, ...], ...],  # of each model
    slots: SlotState,
    *,
    models: tuple[tuple[Model, PagedAttention], ...],
    config: RunnerConfig,
    num_tokens: int,
    num_rows: int,
    max_width: int | None = None,
) -> tuple[tuple[tuple[KVPool, ...], ...], Scratch]:
    """The models' passes over the staged rows' tokens, and what they leave: ``sampled`` [R, K+1, E], ``tokens`` [T, E].

    ``max_width`` bounds a row's tokens, where known (``RaggedBatch``). The first model is the one that speaks. A draft
    model may follow: only its KV is wanted.
    """
    T, R, S, K = num_tokens, num_rows, config.max_num_seqs, config.max_drafts
    widths = slots.plan.widths[:R]
    where = jnp.minimum(slots.plan.slots[:R], S - 1)  # padding rows point at some slot; their width is 0
    first_position = slots.computed_len[where]
    layout = lay_out(
        slots.block_table[0], where, first_position, widths, num_tokens=T, config=config, max_width=max_width
    )
    slot, position = layout.slot, layout.position
    token_ids = slots.tokens[slot, jnp.minimum(position, config.max_model_len - 1)]
    if K:
        ahead = position - slots.tokens_len[slot]
        draft = slots.plan.drafts[layout.row, jnp.clip(ahead, 0, K - 1)]
        token_ids = jnp.where(ahead >= 0, draft, token_ids)
    hidden, pools = [], []
    for (model, attention), weights, own_kv in zip(models, params, kv, strict=True):
        x, own_kv = model.hidden(weights, token_ids, position, own_kv, attention.bind(layout.batch))  # [T, E]
        hidden.append(x)
        pools.append(own_kv)
    # The sampler's positions are the last 1 + num_drafts of each row.
    first = layout.ends - 1 - slots.plan.num_drafts[:R]
    wanted = jnp.clip(first[:, None] + jnp.arange(K + 1), 0, T - 1)  # [R, K+1]
    return tuple(pools), Scratch(sampled=hidden[0][wanted], tokens=hidden[0])


def sample(
    params: Any,  # Model.head_params
    slots: SlotState,
    scratch: Scratch,
    *,
    model: Model,
    config: RunnerConfig,
    tier: Tier,
    implementation: str,
    num_rows: int,
    num_drafts: int,
) -> tuple[SlotState, jax.Array]:
    """Samples at R = num_rows rows and 1 + num_drafts positions each, and advances the slots.

    Returns:
        The slots, and int32[R, 3 + K], with logprobs more: tokens emitted, tokens drafted, the K + 1 tokens sampled,
        and for each of those what ``pack_logprobs`` says.
    """
    R, S, K = num_rows, config.max_num_seqs, num_drafts
    where = slots.plan.slots[:R]
    drafts, drafted = slots.plan.drafts[:R, :K], slots.plan.num_drafts[:R]
    samples, widths = slots.plan.samples[:R], slots.plan.widths[:R]
    hidden = scratch.sampled[:R, : K + 1].reshape(R * (K + 1), -1)
    logits = model.logits(params, hidden)  # [M, V]
    rows = make_rows(slots.sampling, where, slots.tokens, slots.tokens_len, drafts)
    token_ids, logprobs = sample_rows(
        logits,
        rows,
        slots.sampling,
        tier=tier,
        vocab_size=config.vocab_size,
        max_logprobs=config.limits.max_logprobs,
        implementation=implementation,
    )
    sampled = token_ids.reshape(R, K + 1)
    emitted = accept(sampled, drafts, drafted, samples & (where < S))  # [R]

    old_len = slots.tokens_len[jnp.minimum(where, S - 1)]
    column = jnp.arange(K + 1)
    at = jnp.where(column < emitted[:, None], old_len[:, None] + column, config.max_model_len)  # past the end: dropped
    rejected = jnp.where(samples, drafted - (emitted - 1), 0)
    advanced = replace(
        slots,
        tokens=slots.tokens.at[where[:, None], at].set(sampled, mode="drop"),
        tokens_len=slots.tokens_len.at[where].add(emitted, mode="drop"),
        computed_len=slots.computed_len.at[where].add(widths - rejected, mode="drop"),
    )
    if tier.covers(Tier.SCORED):
        advanced = replace(advanced, sampling=commit_tokens(slots.sampling, where, sampled, emitted))
    words = [emitted[:, None], drafted[:, None], sampled]
    if logprobs is not None:
        words.append(pack_logprobs(logprobs).reshape(R, -1))
    return advanced, jnp.concatenate(words, axis=1)


def burst(
    params: tuple[Any, ...],  # Model.trunk_params of each model
    heads: tuple[Any, ...],  # the first model's Model.head_params; of a draft model all params
    kv: tuple[tuple[KVPool, ...], ...],  # of each model
    slots: SlotState,
    packets: jax.Array,  # int32[N, packet_len]: a packet for each step
    *,
    models: tuple[tuple[Model, PagedAttention], ...],
    config: RunnerConfig,
    tier: Tier,
    implementations: tuple[str, ...],
    num_tokens: int,
    num_rows: int,
) -> tuple[tuple[tuple[KVPool, ...], ...], SlotState, jax.Array]:
    """N steps, one after the other, each as ``stage``, ``forward`` and ``sample`` make it.

    Returns:
        KV pools, slots, and the steps' results int32[N, R, ...], see ``sample``.
    """

    def one(carry: tuple[Any, SlotState], packet: jax.Array) -> tuple[Any, jax.Array]:
        kv, slots = carry
        slots = stage(slots, packet, config=config, num_rows=num_rows)
        if len(models) > 1:
            model, attention = models[1]
            draft_kv, slots = draft_tokens(
                heads[1],
                kv[1],
                slots,
                model=model,
                attention=attention,
                config=config,
                tier=tier,
                implementation=implementations[1],
                num_rows=num_rows,
            )
            kv = (kv[0], draft_kv)
        kv, hidden = compute(
            params,
            kv,
            slots,
            models=models,
            config=config,
            num_tokens=num_tokens,
            num_rows=num_rows,
            max_width=burst_width(num_tokens, num_rows, config.max_drafts),
        )
        slots, words = sample(
            heads[0],
            slots,
            hidden,
            model=models[0][0],
            config=config,
            tier=tier,
            implementation=implementations[0],
            num_rows=num_rows,
            num_drafts=config.max_drafts,
        )
        return (kv, slots), words

    # The number of steps is static: XLA runs such a loop without asking the device after each turn.
    (kv, slots), words = jax.lax.scan(one, (kv, slots), packets)
    return kv, slots, words


def _overwrite[T](old: T, new: T) -> T:
    """The start of each array of ``old``, or all of it, replaced by ``new``'s.

    So ``old`` is an argument that is read, which JAX doesn't drop, and its donated buffer is where the result goes:
    addresses, and with them the recorded graphs, stay as they are.
    """
    return jax.tree.map(lambda into, what: jax.lax.dynamic_update_slice(into, what, (0,) * into.ndim), old, new)


def prompt_scores(
    params: Any,  # Model.head_params
    slots: SlotState,
    scratch: Scratch,
    window: jax.Array,  # int32[3]: row of the plan, first of the row's tokens, that token's position
    *,
    model: Model,
    config: RunnerConfig,
    num_tokens: int,
) -> jax.Array:
    """int32[num_tokens, 2 + 2C]: log-probabilities of what follows num_tokens of a row's tokens in the prompt."""
    row, offset, position = window
    index = jnp.cumsum(slots.plan.widths)[row] - slots.plan.widths[row] + offset + jnp.arange(num_tokens)
    targets = slots.tokens[
        slots.plan.slots[row], jnp.minimum(position + 1 + jnp.arange(num_tokens), config.max_model_len - 1)
    ]
    scores = prompt_logprobs(
        scratch.tokens[jnp.minimum(index, config.max_num_batched_tokens - 1)],
        targets,
        lambda rows: model.logits(params, rows),
        vocab_size=config.vocab_size,
        max_logprobs=config.limits.max_logprobs,
    )
    return pack_logprobs(scores)


def pack_logprobs(scores: LogprobArrays) -> jax.Array:
    """int32[M, 2 + 2C]: logprob bits, rank, candidate ids, candidate logprob bits."""
    bits = jax.lax.bitcast_convert_type
    return jnp.concatenate(
        [
            bits(scores.token_logprob, jnp.int32)[:, None],
            scores.token_rank[:, None],
            scores.top_ids,
            bits(scores.top_logprobs, jnp.int32),
        ],
        axis=1,
    )
