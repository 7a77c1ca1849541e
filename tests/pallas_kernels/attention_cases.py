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
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

# Machine code without optimisation: these tests compile far longer than they run.
FAST_COMPILE = {"xla_backend_optimization_level": 0}

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
    num_blocks: int | None = None,  # N; None = what the rows need and three spare ones
    with_scales: bool = True,  # fp8 only; without them they count as 1.0
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
    N = num_blocks or sum(needed) + 3
    free = rng.permutation(N)[::-1].tolist()  # a permuted table
    values = _poisoned(layout.values_shape(spec, N), spec.kv_dtype)
    scales_shape = layout.scales_shape(spec, N)
    scales = None
    if spec.kv_dtype == "int8":
        scales = np.full(scales_shape, np.nan, np.float32)
    elif scales_shape is not None and with_scales:
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
        factor = 1.0 if scales is None else scales[None, :, :, None]
        stored = (kv / factor).astype(ml_dtypes.float8_e4m3fn)
        return stored, None, stored.astype(np.float64) * factor
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


def row_mixes(block_size: int) -> dict[str, list[tuple[int, int]]]:
    """Batches of (context length, width) around every edge: of blocks, of tiles, of emptiness."""
    B = block_size
    edges = [1, B - 1, B, B + 1, 3 * B + 5, 7 * B - 1]
    return {
        "decode": [(context, 1) for context in edges],
        "decode_with_empty_rows": [(0, 0), (B + 3, 1), (0, 0), (1, 1), (2 * B, 1), (0, 0)],
        "verify": [
            (width + context, width) for context, width in zip([0, B - 2, B, 3 * B + 1], [5, 5, 1, 3], strict=True)
        ],
        "prefill": [(5 * B + 7, 5 * B + 7), (3 * B + 1, B + 2), (2, 2)],
        "mixed": [(9, 1), (4 * B + 3, 2 * B + 9), (B, 4), (0, 0), (6 * B, 1), (B + 1, B + 1)],
        "nothing": [(0, 0), (0, 0)],
    }


FEATURES: dict[str, dict[str, object]] = {
    "plain": {},
    "bfloat16": {"dtype": "bfloat16", "kv_dtype": "bfloat16"},
    "window": {"sliding_window": 37},
    "window_of_one": {"sliding_window": 1},
    "soft_cap": {"soft_cap": 1.5},
    "sinks": {"has_sinks": True},
    "fp8": {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn"},
    "int8": {"dtype": "bfloat16", "kv_dtype": "int8"},
    "everything": {"sliding_window": 50, "soft_cap": 3.0, "has_sinks": True, "dtype": "bfloat16", "kv_dtype": "int8"},
}
GROUPINGS = [(G, 1) for G in range(1, 17)] + [(4, 4), (9, 3), (12, 2), (32, 8)]  # (Hq, Hk)


class AttentionContract:
    """What holds for every implementation. Subclasses say how to run theirs; GPU's runs on its machine.

    A spec that the implementation refuses is skipped with its reason, so an implementation's coverage is what it runs.
    """

    base: dict[str, object] = {}  # changes to make_spec's defaults

    def attend(
        self, q: jax.Array, pool: KVPool, batch: RaggedBatch, spec: AttentionSpec, sinks: object
    ) -> jax.Array:  # [T, Hq, D]
        raise AssertionError("a subclass says how its implementation is run")

    def supports(self, spec: AttentionSpec) -> str | None:
        raise AssertionError("a subclass says what its implementation refuses")

    def kv_layout(self, spec: AttentionSpec) -> KVLayout:
        raise AssertionError("a subclass says how its implementation stores the pool")

    def run(self, rows: list[tuple[int, int]], spec: AttentionSpec, **sizes: int) -> None:
        """Checks one batch; ``sizes`` are make_case's."""
        if reason := self.supports(spec):
            pytest.skip(reason)
        check(self.attend, make_case(spec, rows, layout=self.kv_layout(spec), **sizes))

    def spec(self, **changes: object) -> AttentionSpec:
        return make_spec(**{**self.base, **changes})

    @pytest.mark.parametrize("mix", row_mixes(16))
    def test_every_mix_of_rows(self, mix: str) -> None:
        spec = self.spec()
        self.run(row_mixes(spec.block_size)[mix], spec)

    @pytest.mark.parametrize("feature", FEATURES)
    def test_every_feature(self, feature: str) -> None:
        spec = self.spec(**FEATURES[feature])
        self.run(row_mixes(spec.block_size)["mixed"], spec)

    @pytest.mark.slow
    @pytest.mark.parametrize("feature", FEATURES)
    @pytest.mark.parametrize("mix", row_mixes(16))
    def test_every_feature_on_every_mix(self, feature: str, mix: str) -> None:
        spec = self.spec(**FEATURES[feature])
        self.run(row_mixes(spec.block_size)[mix], spec)

    @pytest.mark.parametrize("mix", ["decode", "mixed"])
    def test_fp8_without_scales(self, mix: str) -> None:
        """As the engine's pools are."""
        spec = self.spec(**FEATURES["fp8"])
        self.run(row_mixes(spec.block_size)[mix], spec, with_scales=False)

    def test_padding_of_tokens_rows_and_table_changes_nothing(self) -> None:
        spec = self.spec()
        rows = row_mixes(spec.block_size)["mixed"]
        used = sum(width for _, width in rows)
        self.run([*rows, (0, 0), (0, 0)], spec, num_tokens=-(-used // 64) * 64 + 64, table_width=40)

    def test_many_rows(self) -> None:
        """More rows than any implementation handles at once, the last ones idle."""
        spec = self.spec()
        B = spec.block_size
        rows = [((7 * i) % (3 * B) + 1, 1) for i in range(41)] + [(0, 0)] * 7
        self.run(rows, spec, num_tokens=48)

    @pytest.mark.slow
    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), GROUPINGS)
    def test_every_head_grouping(self, num_heads: int, num_kv_heads: int) -> None:
        spec = self.spec(num_heads=num_heads, num_kv_heads=num_kv_heads)
        B = spec.block_size
        self.run([(B + 3, 1), (0, 0), (2 * B, B + 1), (9, 3)], spec)

    @pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(9, 3), (5, 1), (4, 4), (16, 1)])
    def test_head_groupings(self, num_heads: int, num_kv_heads: int) -> None:
        self.test_every_head_grouping(num_heads, num_kv_heads)

    @pytest.mark.parametrize("head_dim", [64, 128, 256])
    def test_head_dims(self, head_dim: int) -> None:
        spec = self.spec(head_dim=head_dim, scale=head_dim**-0.5)
        self.run(row_mixes(spec.block_size)["verify"], spec)

    def test_long_context_with_sinks(self) -> None:
        """Long enough for several chunks or splits, so that their partial results are combined."""
        spec = self.spec(has_sinks=True, num_heads=2, num_kv_heads=1)
        self.run([(4099, 1), (2050, 3), (700, 1)], spec)

    @settings(max_examples=20, deadline=None)
    @given(data=st.data())
    def test_any_mix(self, data: st.DataObject) -> None:
        spec = self.spec(sliding_window=data.draw(st.sampled_from([None, 23])), num_heads=2, num_kv_heads=1)
        B, R, T, P = spec.block_size, 5, 64, 6
        rows, left = [], T
        for _ in range(R):
            width = data.draw(st.one_of(st.just(0), st.just(1), st.integers(1, 8), st.integers(1, 50)))
            width = min(width, left)
            left -= width
            context = data.draw(st.integers(width, P * B)) if width else 0
            rows.append((context, width))
        self.run(rows, spec, num_tokens=T, table_width=P, num_blocks=R * P + 1, seed=data.draw(st.integers(0, 99)))
