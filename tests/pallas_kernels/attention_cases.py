"""What every implementation of ragged paged attention is tested with: an independent oracle, poisoned inputs, and
cases.

The oracle is dense NumPy in float64, one query head and one token at a time. Inputs are poisoned: every pool slot
that isn't the key of some row (unused blocks, the tail of the last block, blocks behind unused table entries) and
every padding query are NaN, and unused table entries point outside the pool or at poisoned blocks.

Shape letters: see pallas_kernels.ragged_paged_attention.types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

Attend = Callable[..., jax.Array]  # (q, pool, batch, spec, sinks) -> [T, Hq, D]


def make_spec(**changes: object) -> AttentionSpec:
    """A small float32 attention layer, with ``changes``."""
    base = AttentionSpec(
        num_heads=4, num_kv_heads=2, head_dim=64, block_size=16, dtype="float32", kv_dtype="float32", scale=0.125
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """Arguments of the op with what the oracle needs: the true keys and values, dequantised."""

    spec: AttentionSpec
    q: jax.Array  # [T, Hq, D]
    pool: KVPool
    batch: RaggedBatch
    sinks: jax.Array | None  # float32[Hq]
    keys: list[np.ndarray]  # per row: float64[context, Hk, D]
    values: list[np.ndarray]  # per row: float64[context, Hk, D]
    rows: tuple[tuple[int, int], ...]  # (context length, width); width 0 = padding row


def make_case(
    spec: AttentionSpec,
    rows: list[tuple[int, int]],  # (context length, width)
    *,
    layout: KVLayout,
    num_tokens: int | None = None,  # T; None = no padding tokens
    table_width: int | None = None,  # P; None = as wide as the longest row needs
    seed: int = 0,
) -> Case:
    """A batch of ``rows`` whose pool holds random keys and values for exactly the tokens that count."""
    rng = np.random.default_rng(seed)
    B, Hk, D = spec.block_size, spec.num_kv_heads, spec.head_dim
    contexts, widths = np.array([c for c, _ in rows]), np.array([w for _, w in rows])
    used_tokens = int(widths.sum())
    T = num_tokens or max(used_tokens, 1)
    needed = [-(-c // B) if w else 0 for c, w in rows]
    P = table_width or max(1, *needed)
    N = sum(needed) + 3
    free = rng.permutation(N)[::-1].tolist()  # a permuted table
    values = _poisoned(layout.values_shape(spec, N), spec.kv_dtype)
    scales_shape = layout.scales_shape(spec, N)
    scales = None
    if spec.kv_dtype == "int8":
        scales = np.full(scales_shape, np.nan, np.float32)
    elif scales_shape is not None:
        scales = rng.uniform(0.5, 2.0, scales_shape).astype(np.float32)
    # Unused entries: outside the pool on both sides, or a poisoned block.
    spare = [-7, N, 2**30, *free[:3]]
    table = rng.choice(spare, (len(rows), P)).astype(np.int32)
    true_keys, true_values = [], []
    for r, (context, width) in enumerate(rows):
        if width == 0:
            true_keys.append(np.zeros((0, Hk, D)))
            true_values.append(np.zeros((0, Hk, D)))
            continue
        blocks = np.array([free.pop() for _ in range(needed[r])])
        table[r, : needed[r]] = blocks
        kv = rng.standard_normal((context, 2, Hk, D)).astype(np.float32)
        stored, scale, true = _quantise(kv, spec, scales)
        padded = np.zeros((context, 2, Hk, layout.storage_dim), stored.dtype)
        padded[..., :D] = stored
        position = np.arange(context)
        values[blocks[position // B], :, :, position % B] = padded
        if spec.kv_dtype == "int8":
            scales[blocks[position // B], :, :, position % B] = scale
        true_keys.append(true[:, 0])
        true_values.append(true[:, 1])
    q = np.full((T, spec.num_heads, D), np.nan, np.float32)
    q[:used_tokens] = rng.standard_normal((used_tokens, spec.num_heads, D))
    # Padding rows claim a context of garbage length: only their width says that they don't count.
    contexts = np.where(widths > 0, contexts, rng.integers(0, 3 * B, len(rows)))
    batch = RaggedBatch(
        block_table=jnp.asarray(table),
        context_lens=jnp.asarray(contexts, jnp.int32),
        cu_q_lens=jnp.asarray(np.concatenate([[0], np.cumsum(widths)]), jnp.int32),
        token_block=jnp.full(T, N, jnp.int32),
        token_offset=jnp.zeros(T, jnp.int32),
    )
    sinks = jnp.asarray(rng.standard_normal(spec.num_heads), jnp.float32) if spec.has_sinks else None
    pool = KVPool(jnp.asarray(values), None if scales is None else jnp.asarray(scales))
    return Case(spec, jnp.asarray(q, spec.dtype), pool, batch, sinks, true_keys, true_values, tuple(rows))


def _poisoned(shape: tuple[int, ...], kv_dtype: str) -> np.ndarray:
    """NaN everywhere; int8 has none, there the poison is the largest value (and NaN in its scale)."""
    if kv_dtype == "int8":
        return np.full(shape, 127, np.int8)
    return np.full(shape, np.nan, jnp.dtype(kv_dtype))


def _quantise(
    kv: np.ndarray, spec: AttentionSpec, scales: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """(stored, scale per token and head, dequantised float64) of float32[context, 2, Hk, D]."""
    if spec.kv_dtype == "int8":
        scale = np.abs(kv).max(axis=-1) / 127
        stored = np.rint(kv / scale[..., None]).astype(np.int8)
        return stored, scale, stored.astype(np.float64) * scale.astype(np.float64)[..., None]
    if spec.kv_dtype == "float8_e4m3fn":
        assert scales is not None
        stored = (kv / scales[None, :, :, None]).astype(ml_dtypes.float8_e4m3fn)
        return stored, None, stored.astype(np.float64) * scales[None, :, :, None]
    stored = kv.astype(jnp.dtype(spec.kv_dtype))
    return stored, None, stored.astype(np.float64)


def oracle(case: Case) -> np.ndarray:
    """float64[used tokens, Hq, D]: softmax attention by its definition."""
    spec = case.spec
    G = spec.num_heads // spec.num_kv_heads
    q = np.asarray(case.q.astype(jnp.float32), np.float64)
    sinks = None if case.sinks is None else np.asarray(case.sinks, np.float64)
    out, token = [], 0
    for r, (context, width) in enumerate(case.rows):
        for i in range(width):
            position = context - width + i
            oldest = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
            heads = []
            for h in range(spec.num_heads):
                k, v = case.keys[r][oldest : position + 1, h // G], case.values[r][oldest : position + 1, h // G]
                score = k @ q[token, h] * spec.scale
                if spec.soft_cap is not None:
                    score = spec.soft_cap * np.tanh(score / spec.soft_cap)
                weight = np.exp(score - score.max())
                total = weight.sum() + (0 if sinks is None else np.exp(sinks[h] - score.max()))
                heads.append(weight @ v / total)
            out.append(heads)
            token += 1
    return np.array(out).reshape(token, spec.num_heads, spec.head_dim)


def check(attend: Attend, case: Case, tolerance: float | None = None) -> None:
    """Runs ``attend`` on the case: used tokens equal the oracle's, padding tokens are finite.

    The default tolerance is absolute, on outputs of about unit size: 2e-5 in float32, 2e-2 in bfloat16 (its output
    rounding alone is 4e-3, and a kernel may round the softmax weights to bfloat16 too).
    """
    if tolerance is None:
        tolerance = 2e-5 if case.spec.dtype == "float32" else 2e-2
    out = attend(case.q, case.pool, case.batch, case.spec, case.sinks)
    assert out.shape == case.q.shape and out.dtype == case.q.dtype
    actual = np.asarray(out.astype(jnp.float32))
    assert np.isfinite(actual).all(), "a poisoned slot or a padding row leaked into the output"
    expected = oracle(case)
    np.testing.assert_allclose(actual[: len(expected)], expected, atol=tolerance, rtol=tolerance)


def run_xla(q: jax.Array, pool: KVPool, batch: RaggedBatch, spec: AttentionSpec, sinks: object) -> jax.Array:
    """The reference, through the public op."""
    return api.ragged_paged_attention(q, pool, batch, spec, "xla", sinks)
