"""Writing keys and values: where they land, how they are quantised, and that nothing else changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make_spec
from simulator import SIMULATOR, recorded_races

from pallas_kernels.ragged_paged_attention import api, tpu_write
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

_N, _B, _Hk, _D = 7, 16, 2, 64
# Token 3 and 5 are padding: exactly one past the pool, and far past it.
_BLOCKS, _OFFSETS = [4, 0, 4, _N, 6, 2**30, 2], [15, 0, 3, 1, 9, 0, 8]


def _spec(kv_dtype: str) -> AttentionSpec:
    return make_spec(num_kv_heads=_Hk, head_dim=_D, block_size=_B, kv_dtype=kv_dtype)


def _batch() -> RaggedBatch:
    return RaggedBatch(
        block_table=jnp.zeros((1, 1), jnp.int32),
        context_lens=jnp.zeros(1, jnp.int32),
        cu_q_lens=jnp.zeros(2, jnp.int32),
        token_block=jnp.asarray(_BLOCKS, jnp.int32),
        token_offset=jnp.asarray(_OFFSETS, jnp.int32),
    )


def _new(seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Keys and values of every token, NaN in the padding ones."""
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, len(_BLOCKS), _Hk, _D)).astype(np.float32)
    padding = np.array(_BLOCKS) >= _N
    k[padding] = v[padding] = np.nan
    return jnp.asarray(k), jnp.asarray(v)


def _read(pool: KVPool, spec: AttentionSpec, block: int, offset: int) -> np.ndarray:
    """float32[2, Hk, Ds], dequantised."""
    values = np.asarray(pool.values[block, :, :, offset].astype(jnp.float32))
    if spec.kv_dtype == "int8":
        return values * np.asarray(pool.scales[block, :, :, offset])[..., None]
    if spec.kv_dtype == "float8_e4m3fn":
        return values * np.asarray(pool.scales)[..., None]
    return values


@pytest.mark.parametrize(
    ("kv_dtype", "tolerance"),
    # Half a step of the format, relative to the value (or, for int8, to the head's largest value).
    [("float32", 0.0), ("bfloat16", 2**-8), ("float8_e4m3fn", 2**-4), ("int8", 0.5 / 127)],
)
@pytest.mark.parametrize("storage_dim", [_D, 128])
def test_every_token_lands_in_its_slot_and_nowhere_else(kv_dtype: str, tolerance: float, storage_dim: int) -> None:
    spec = _spec(kv_dtype)
    pool = KVLayout(storage_dim).empty_pool(spec, _N)
    if kv_dtype == "float8_e4m3fn":
        pool = KVPool(pool.values, jnp.asarray([[0.5, 2.0], [1.0, 0.25]]))
    k, v = _new()
    out = api.write_kv(k, v, pool, _batch(), spec)

    written = np.zeros((_N, _B), bool)
    for t, (block, offset) in enumerate(zip(_BLOCKS, _OFFSETS, strict=True)):
        if block >= _N:
            continue
        written[block, offset] = True
        new = np.stack([k[t], v[t]])
        got = _read(out, spec, block, offset)
        scale = np.abs(new).max(axis=-1, keepdims=True) if kv_dtype == "int8" else np.abs(new)
        smallest = 2**-9 * 2.0 if kv_dtype == "float8_e4m3fn" else 0.0  # subnormal spacing times the largest scale
        assert (np.abs(got[..., :_D] - new) <= tolerance * scale * 1.0001 + smallest).all()
        assert (got[..., _D:] == 0).all()
    untouched = np.asarray(out.values.astype(jnp.float32)).swapaxes(1, 3)[~written]
    assert (untouched == 0).all()
    if kv_dtype == "int8":
        assert (np.asarray(out.scales).swapaxes(1, 3)[~written] == 1).all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn", "int8"])
@pytest.mark.parametrize("interpret", [True, SIMULATOR], ids=["numbers", "simulator"])
def test_the_tpu_kernel_writes_what_the_scatter_writes(kv_dtype: str, interpret: Any) -> None:
    """Runs within a segment, across segments and blocks, lone tokens, and padding in the middle and at the end."""
    spec = make_spec(num_kv_heads=2, head_dim=64, block_size=64, kv_dtype=kv_dtype)
    runs = [(3, 5, 1), (5, 28, 8), (6, 63, 1), (0, 0, 2), (_N, 0, 1), (2, 30, 34), (_N, 0, 3)]
    slots = [(block, offset + i) for block, offset, length in runs for i in range(length)]
    blocks, offsets = (jnp.asarray(column, jnp.int32) for column in zip(*slots, strict=True))
    batch = dataclasses.replace(
        _batch(), token_block=blocks, token_offset=offsets, context_lens=jnp.zeros(len(runs), jnp.int32)
    )
    rng = np.random.default_rng(1)
    k, v = jnp.asarray(rng.standard_normal((2, len(slots), 2, 64)), jnp.float32)
    pool = KVLayout(128).empty_pool(spec, _N)
    pool = KVPool(jnp.asarray(rng.integers(-100, 100, pool.values.shape)).astype(kv_dtype), pool.scales)
    expected = api.write_kv(k, v, pool, batch, spec)
    write = jax.jit(tpu_write.write_kv, static_argnums=4, static_argnames="interpret")
    with recorded_races() as races:
        written = jax.block_until_ready(write(k, v, pool, batch, spec, interpret=interpret))
    assert jnp.array_equal(written.values.astype(jnp.float32), expected.values.astype(jnp.float32))
    if kv_dtype != "bfloat16":
        assert jnp.array_equal(written.scales, expected.scales)
    assert len(races) == (interpret is SIMULATOR)
    assert not any(state.races_found for state in races)


def test_fp8_saturates_instead_of_turning_into_nan() -> None:
    spec = _spec("float8_e4m3fn")
    k, v = _new()
    out = api.write_kv(k * 1e6, v, KVLayout(_D).empty_pool(spec, _N), _batch(), spec)
    stored = np.asarray(out.values[4, 0, :, 15].astype(jnp.float32))
    assert np.isfinite(stored).all() and np.abs(stored).max() == 448.0


def test_int8_of_zeros_is_zero() -> None:
    spec = _spec("int8")
    zeros = jnp.zeros((len(_BLOCKS), _Hk, _D))
    out = api.write_kv(zeros, zeros, KVLayout(_D).empty_pool(spec, _N), _batch(), spec)
    assert (out.values == 0).all() and jnp.isfinite(out.scales).all()


# fp8 is missing: XLA:CPU, which has no fp8, widens such a pool around the scatter.
@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
def test_a_donated_pool_is_written_in_place(kv_dtype: str) -> None:
    spec = _spec(kv_dtype)
    pool = KVLayout(128).empty_pool(spec, 1000)
    k, v = _new()
    compiled = (
        jax.jit(lambda k, v, pool, batch: api.write_kv(k, v, pool, batch, spec), donate_argnums=2)
        .lower(k, v, pool, _batch())
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= pool.values.nbytes
    assert memory.temp_size_in_bytes < pool.values.nbytes // 20
