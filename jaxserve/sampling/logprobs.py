"""Log-probabilities of the raw distribution: log_softmax of the model's float32 logits, before any processor.

The order of ids everywhere is: higher logit first, then lower id. So an id of rank r <= C stands at column r-1 of the
candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxserve.sampling.processors import mask_padding

_CHUNK = 128  # ids; about the square root of V * C, which makes the two stages equally long


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogprobArrays:
    """M tokens, C candidates; the device twin of ``scheduler.plan.Logprobs``."""

    token_logprob: jax.Array  # float32[M], of the chosen token
    token_rank: jax.Array  # int32[M], 1 = most likely
    top_ids: jax.Array  # int32[M, C], most likely first
    top_logprobs: jax.Array  # float32[M, C]


def compute(
    logits: jax.Array,  # float32[M, Vp], padded ids at -inf
    token_ids: jax.Array,  # int32[M], the chosen ones
    max_logprobs: int,
) -> LogprobArrays:
    """Log-probability and rank of the chosen ids, and the C = max_logprobs most likely ids.

    Where C exceeds the vocabulary, the last candidates have log-probability -inf and their ids mean nothing.
    """
    normaliser = jax.nn.logsumexp(logits, axis=1)
    chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1)  # [M, 1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    better = (logits > chosen) | ((logits == chosen) & (ids < token_ids[:, None]))
    top_logits, top_ids = top_candidates(logits, max_logprobs)
    return LogprobArrays(
        token_logprob=chosen[:, 0] - normaliser,
        token_rank=1 + jnp.sum(better, axis=1, dtype=jnp.int32),
        top_ids=top_ids,
        top_logprobs=top_logits - normaliser[:, None],
    )


def top_candidates(
    logits: jax.Array,  # float32[M, V]
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """The ``count`` largest logits (float32[M, count]) and their ids (int32[M, count]), exactly, without sorting V.

    The ids lie in the ``count`` chunks with the largest maxima: each chunk ahead of theirs holds an id ahead of them.
    """
    M, V = logits.shape
    num_chunks = max(-(-V // _CHUNK), -(-count // _CHUNK))
    logits = jnp.where(logits == 0, 0.0, logits)  # lax.top_k tells -0.0 from 0.0
    padded = jnp.pad(logits, ((0, 0), (0, num_chunks * _CHUNK - V)), constant_values=-jnp.inf)
    chunks = padded.reshape(M, num_chunks, _CHUNK)
    _, best = jax.lax.top_k(jnp.max(chunks, axis=2), min(count, num_chunks))  # ties: the lower index first
    best = jnp.sort(best, axis=1)  # so that position order is id order
    candidates = jnp.take_along_axis(chunks, best[:, :, None], axis=1)  # [M, n, chunk]
    ids = best[:, :, None] * _CHUNK + jnp.arange(_CHUNK, dtype=jnp.int32)
    values, where = jax.lax.top_k(candidates.reshape(M, -1), count)
    return values, jnp.take_along_axis(ids.reshape(M, -1), where, axis=1)


def prompt_logprobs(
    hidden: jax.Array,  # [T, E]
    targets: jax.Array,  # int32[T], the token that follows each hidden state
    lm_head: Callable[[jax.Array], jax.Array],  # [C, E] -> float32[C, Vp]
    *,
    vocab_size: int,
    max_logprobs: int,
    chunk_rows: int = 64,
) -> LogprobArrays:
    """Log-probabilities of given tokens, M = T; never holds more than ``chunk_rows`` rows of logits.

    Targets out of range are taken as the nearest id; a padding row may hold anything.
    """
    T = hidden.shape[0]
    chunk_rows = min(chunk_rows, T)
    num_chunks = -(-T // chunk_rows)
    spare = num_chunks * chunk_rows - T
    hidden = jnp.pad(hidden, ((0, spare), (0, 0))).reshape(num_chunks, chunk_rows, hidden.shape[1])
    targets = jnp.clip(jnp.pad(targets, (0, spare)), 0, vocab_size - 1).reshape(num_chunks, chunk_rows)

    def one_chunk(chunk: tuple[jax.Array, jax.Array]) -> LogprobArrays:
        rows, ids = chunk
        return compute(mask_padding(lm_head(rows), vocab_size), ids, max_logprobs)

    stacked = jax.lax.map(one_chunk, (hidden, targets))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], stacked)
