"""Ragged paged attention in plain XLA: the definition that every kernel is tested against, and the CPU implementation.

All arithmetic is float32. KV is read in chunks of a few blocks with an online softmax, and the loop over chunks ends
at the longest context among the rows at hand, so neither temporary memory nor time depends on the table's width.
Queries come in two kinds, because a CPU pays for every padded row:

- narrow rows (decode, verify) are batched over rows, ``width`` query tokens each;
- wide rows (prefill chunks) are cut into tiles of up to 64 query tokens, one tile after the other.

Shape letters: see types.py. W rows in a group, Q query tokens of each, C keys in a chunk (a multiple of B).
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.tiles import cut_tiles
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch, Sinks

_MASKED = -1e30  # finite: a fully masked chunk must not make exp(-inf - -inf)
_MAX_NARROW = 8  # query tokens of a narrow row, at most
_MAX_TILE = 64  # query tokens of a tile of a wide row
_MAX_GROUP = 16  # narrow rows attended to at once
_GROUP_KEYS = 512  # keys fetched at once by a group: K and V stay in a CPU's L2 cache
_PRECISION = lax.Precision.HIGHEST


def supports(spec: AttentionSpec) -> str | None:
    """None: the reference does everything that a spec can say."""
    del spec
    return None


def kv_layout(spec: AttentionSpec) -> KVLayout:
    """The reference stores heads unpadded (and reads padded ones too)."""
    return KVLayout(storage_dim=spec.head_dim)


@dataclass(frozen=True)
class _Queries:
    """W groups of Q consecutive query tokens, each within one row."""

    q: jax.Array  # float32[W, Q, Hk, G, D], scaled
    row: jax.Array  # int32[W]
    first_pos: jax.Array  # int32[W], absolute position of the first token
    length: jax.Array  # int32[W], tokens that count; 0 = nothing to do


def attend(
    q: jax.Array,  # [T, Hq, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks = None,  # float32[Hq]
) -> jax.Array:  # [T, Hq, D]
    """Attention of every query token to its row's keys at positions up to its own: see api.ragged_paged_attention."""
    T, R = q.shape[0], batch.context_lens.shape[0]
    G, D = spec.num_heads // spec.num_kv_heads, spec.head_dim
    scaled = q.astype(jnp.float32).reshape(T, spec.num_kv_heads, G, D) * spec.scale
    width = 1 if T <= R else min(_MAX_NARROW, T)
    out = _attend_narrow(scaled, pool, batch, spec, sinks, width)
    if width < T:
        out = _attend_wide(out, scaled, pool, batch, spec, sinks, narrow_width=width)
    return out.reshape(T, spec.num_heads, D).astype(q.dtype)


def _attend_narrow(
    q: jax.Array,  # float32[T, Hk, G, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks,
    width: int,
) -> jax.Array:  # float32[T, Hk, G, D]
    """Output of the rows of at most ``width`` tokens, zero elsewhere."""
    T, R = q.shape[0], batch.context_lens.shape[0]
    starts, lengths = batch.cu_q_lens[:-1], jnp.diff(batch.cu_q_lens)
    lengths = jnp.where(lengths <= width, lengths, 0)
    group = min(R, _MAX_GROUP)

    def attend_group(first_row: jax.Array | int) -> jax.Array:  # float32[group, width, Hk, G, D]
        row = first_row + jnp.arange(group)
        token = jnp.clip(starts[row][:, None] + jnp.arange(width), 0, T - 1)
        first_pos = batch.context_lens[row] - lengths[row]
        return _online_softmax(_Queries(q[token], row, first_pos, lengths[row]), pool, batch, spec, sinks)

    if group == R:
        tiles = attend_group(0)
    else:

        def body(i: jax.Array, tiles: jax.Array) -> jax.Array:
            # The last group is moved back to end at R: it computes some rows twice, to the same values.
            first_row = jnp.minimum(i * group, R - group)
            return lax.dynamic_update_slice_in_dim(tiles, attend_group(first_row), first_row, axis=0)

        last_row = jnp.max(jnp.where(lengths > 0, jnp.arange(R) + 1, 0))
        tiles = lax.fori_loop(0, (last_row + group - 1) // group, body, jnp.zeros((R, width, *q.shape[1:])))

    token = jnp.arange(T)
    row = jnp.minimum(jnp.sum(batch.cu_q_lens[1:] <= token[:, None], axis=1), R - 1)  # int32[T]
    offset = token - starts[row]
    in_row = offset < lengths[row]
    return jnp.where(in_row[:, None, None, None], tiles[row, jnp.minimum(offset, width - 1)], 0.0)


def _attend_wide(
    out: jax.Array,  # float32[T, Hk, G, D]
    q: jax.Array,  # float32[T, Hk, G, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    sinks: Sinks,
    narrow_width: int,
) -> jax.Array:  # float32[T, Hk, G, D]
    """``out`` with the rows of more than ``narrow_width`` tokens filled in."""
    T = q.shape[0]
    tile = min(_MAX_TILE, T)
    tiles = cut_tiles(batch, T, tile, above=narrow_width)
    # A tile near the end may reach past T: pad, so that its slice isn't moved.
    q = jnp.pad(q, ((0, tile), (0, 0), (0, 0), (0, 0)))
    out = jnp.pad(out, ((0, tile), (0, 0), (0, 0), (0, 0)))

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        first_token, length = tiles.first_token[i], tiles.length[i]
        q_tile = lax.dynamic_slice_in_dim(q, first_token, tile)
        queries = _Queries(q_tile[None], tiles.row[i, None], tiles.first_pos[i, None], length[None])
        new = _online_softmax(queries, pool, batch, spec, sinks)[0]
        old = lax.dynamic_slice_in_dim(out, first_token, tile)
        ours = (jnp.arange(tile) < length)[:, None, None, None]
        return lax.dynamic_update_slice_in_dim(out, jnp.where(ours, new, old), first_token, axis=0)

    return lax.fori_loop(0, tiles.count[0], body, out)[:T]


def _online_softmax(
    queries: _Queries, pool: KVPool, batch: RaggedBatch, spec: AttentionSpec, sinks: Sinks
) -> jax.Array:  # float32[W, Q, Hk, G, D]
    """Attention of W tiles to their rows' keys, chunk by chunk up to the longest context among them."""
    W, Q, Hk, G, D = queries.q.shape
    B = spec.block_size
    table_width = batch.block_table.shape[1]
    num_blocks = min(max(1, _GROUP_KEYS // (W * B)), table_width)  # in a chunk
    C = num_blocks * B

    end = jnp.where(queries.length > 0, queries.first_pos + queries.length, 0)  # int32[W], keys that are read
    pos = queries.first_pos[:, None] + jnp.arange(Q)  # int32[W, Q]
    num_chunks = (jnp.max(end) + C - 1) // C
    first_chunk: jax.Array | int = 0
    if spec.sliding_window is not None:
        oldest = jnp.where(queries.length > 0, queries.first_pos - spec.sliding_window + 1, jnp.max(end))
        first_chunk = jnp.maximum(jnp.min(oldest), 0) // C
    fp8_scales = pool.scales if spec.kv_dtype == "float8_e4m3fn" else None  # [2, Hk]
    q = queries.q.transpose(0, 2, 3, 1, 4).reshape(W, Hk, G * Q, D)
    if fp8_scales is not None:
        q = q * fp8_scales[0][None, :, None, None]

    def fetch(part: jax.Array, blocks: jax.Array) -> jax.Array:  # [W, Hk, C, ...]
        """Reads one of K, V or their scales: heads before tokens, so that a dot needs no transpose."""
        found = part[blocks[:, None, :], jnp.arange(Hk)[None, :, None]]
        return found.reshape(W, Hk, C, *found.shape[4:])

    def body(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        maximum, total, acc = carry
        key_pos = i * C + jnp.arange(C)
        columns = jnp.minimum(i * num_blocks + jnp.arange(num_blocks), table_width - 1)
        blocks = jnp.clip(batch.block_table[queries.row[:, None], columns], 0, pool.values.shape[0] - 1)
        written = (key_pos < end[:, None])[:, None]  # [W, 1, C]; anything else may hold NaN

        k = fetch(pool.values[:, 0], blocks)[..., :D].astype(jnp.float32)
        v = jnp.where(written[..., None], fetch(pool.values[:, 1], blocks)[..., :D].astype(jnp.float32), 0.0)
        scores = jnp.einsum("whqd,whcd->whqc", q, k, precision=_PRECISION)
        if spec.kv_dtype == "int8":
            assert pool.scales is not None
            scores = scores * fetch(pool.scales[:, 0], blocks)[:, :, None]
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        seen = (key_pos <= pos[..., None]) & written  # [W, Q, C]
        if spec.sliding_window is not None:
            seen &= key_pos > pos[..., None] - spec.sliding_window
        scores = jnp.where(jnp.tile(seen, (1, G, 1))[:, None], scores, _MASKED)

        new_maximum = jnp.maximum(maximum, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_maximum[..., None])
        decay = jnp.exp(maximum - new_maximum)
        total = total * decay + jnp.sum(weights, axis=-1)
        if spec.kv_dtype == "int8":
            assert pool.scales is not None
            v_scale = jnp.where(written, fetch(pool.scales[:, 1], blocks), 0.0)
            weights = weights * v_scale[:, :, None]
        acc = acc * decay[..., None] + jnp.einsum("whqc,whcd->whqd", weights, v, precision=_PRECISION)
        return new_maximum, total, acc

    # A sink is one more key with a given score and a zero value: the state after having seen it alone.
    maximum = jnp.full((W, Hk, G * Q), _MASKED)
    total = jnp.zeros((W, Hk, G * Q))
    if spec.has_sinks:
        maximum = jnp.broadcast_to(jnp.repeat(sinks.reshape(Hk, G), Q, axis=1), maximum.shape).astype(jnp.float32)
        total = jnp.ones_like(total)
    _, total, acc = lax.fori_loop(first_chunk, num_chunks, body, (maximum, total, jnp.zeros((W, Hk, G * Q, D))))
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    if fp8_scales is not None:
        out = out * fp8_scales[1][None, :, None, None]
    return out.reshape(W, Hk, G, Q, D).transpose(0, 3, 1, 2, 4)
