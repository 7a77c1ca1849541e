"""What the sampler knows of every slot: a donated pytree on the device.

Shape letters: S slots, U slots being reset, R rows of a step, K draft length, V vocabulary, W words of a bit mask, Lmax
longest context, Cs/Cb/Nw/Lw the caps of ``jaxserve.config.Limits`` (stop ids, biases, bad words, tokens in one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxserve.config import Limits
from jaxserve.sampling import bitmask
from jaxserve.sampling.host import row_spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """One entry a slot. Lists of ids are padded with -1. Slots that were never reset hold zeros."""

    temperature: jax.Array  # float32[S], 0 is greedy
    top_k: jax.Array  # int32[S], 0 is off
    top_p: jax.Array  # float32[S], 1 is off
    min_p: jax.Array  # float32[S], 0 is off
    presence: jax.Array  # float32[S]
    frequency: jax.Array  # float32[S]
    repetition: jax.Array  # float32[S], 1 is off
    key: jax.Array  # uint32[S, 2], of seed and choice index
    min_len: jax.Array  # int32[S], prompt + output length below which stop ids are masked
    prompt_len: jax.Array  # int32[S]
    stop_ids: jax.Array  # int32[S, Cs]
    bias_ids: jax.Array  # int32[S, Cb]
    bias_values: jax.Array  # float32[S, Cb]
    allowed: jax.Array  # uint32[S, W]
    bad_words: jax.Array  # int32[S, Nw, Lw], right-aligned
    prompt_mask: jax.Array  # uint32[S, W], ids that occur in the prompt
    output_counts: jax.Array  # int32[S, V], how often the output holds each id; kept for choices that need SCORED


def init_state(num_slots: int, vocab_size: int, limits: Limits) -> SamplingState:
    """A state of zeros. ``vocab_size`` may be a padded one: the sampler cuts or pads to the width of its logits."""
    fields = {
        name: jnp.zeros((num_slots, *shape), dtype) for name, (shape, dtype) in row_spec(vocab_size, limits).items()
    }
    return SamplingState(
        **fields,
        prompt_mask=jnp.zeros((num_slots, bitmask.num_words(vocab_size)), jnp.uint32),
        output_counts=jnp.zeros((num_slots, vocab_size), jnp.int32),
    )


def reset_rows(
    state: SamplingState,
    slots: jax.Array,  # int32[U], distinct; S or more = drop the row
    rows: Mapping[str, jax.Array],  # each [U, ...], as row_spec says
    tokens: jax.Array,  # int32[U, Lmax], prompt, then what was emitted before a preemption
    tokens_len: jax.Array,  # int32[U]
) -> SamplingState:
    """Overwrites every field of the given slots; nothing of their former choices is left."""
    num_ids = state.output_counts.shape[1]
    mask_width = state.prompt_mask.shape[1] * bitmask.WORD
    row = jnp.arange(tokens.shape[0])[:, None]
    position = jnp.arange(tokens.shape[1])
    in_prompt = position < rows["prompt_len"][:, None]
    in_output = ~in_prompt & (position < tokens_len[:, None])
    nowhere = max(num_ids, mask_width)
    prompt_ids = jnp.where(in_prompt & (tokens >= 0), tokens, nowhere)
    output_ids = jnp.where(in_output & (tokens >= 0), tokens, nowhere)
    prompt_flags = jnp.zeros((tokens.shape[0], mask_width), bool).at[row, prompt_ids].set(True, mode="drop")
    counts = jnp.zeros((tokens.shape[0], num_ids), jnp.int32).at[row, output_ids].add(1, mode="drop")
    fresh = {**rows, "prompt_mask": bitmask.pack(prompt_flags), "output_counts": counts}
    return SamplingState(
        **{name: getattr(state, name).at[slots].set(value, mode="drop") for name, value in fresh.items()}
    )


def commit_tokens(
    state: SamplingState,
    slots: jax.Array,  # int32[R], distinct; S or more = padding
    token_ids: jax.Array,  # int32[R, K+1]
    num_emitted: jax.Array,  # int32[R]
) -> SamplingState:
    """Counts the tokens that a step emitted: ``token_ids[r, :num_emitted[r]]``.

    To be called in the tiers that read counts, ``SCORED`` and above. A choice keeps its settings until its slot is
    reset, so one whose settings need counts is in such a tier in all of its steps.
    """
    emitted = jnp.arange(token_ids.shape[1]) < num_emitted[:, None]
    ids = jnp.where(emitted & (token_ids >= 0), token_ids, state.output_counts.shape[1])
    counts = state.output_counts.at[slots[:, None], ids].add(1, mode="drop")
    return replace(state, output_counts=counts)
