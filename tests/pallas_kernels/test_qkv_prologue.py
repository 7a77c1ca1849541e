"""What stands between projection and attention: against its definition, and every refusal."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import make_spec
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.qkv_prologue import gpu
from pallas_kernels.qkv_prologue.api import qkv_prologue
from pallas_kernels.qkv_prologue.types import QKNorm, RopeTable
from pallas_kernels.ragged_paged_attention import gpu as gpu_attention
from pallas_kernels.ragged_paged_attention.api import UnsupportedAttentionError
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

_N = 9  # blocks of a pool
_ROUNDED_ONCE = 2**-8  # bfloat16


def make_rope(num_tokens: int, head_dim: int) -> RopeTable:
    angles = np.random.default_rng(1).uniform(-4, 4, (num_tokens, head_dim // 2))
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def make_norm(spec: AttentionSpec, offset: float = 0.0) -> QKNorm:
    q_weight, k_weight = np.random.default_rng(2).normal(1.0 - offset, 0.3, (2, spec.head_dim))
    return QKNorm(jnp.asarray(q_weight, spec.dtype), jnp.asarray(k_weight, spec.dtype), 1e-6, offset)


def make_batch(num_tokens: int, block_size: int) -> RaggedBatch:
    """Distinct slots in random order; every fifth token is padding, just past the pool or far past it."""
    rng = np.random.default_rng(3)
    slots = rng.permutation(_N * block_size)[:num_tokens]
    blocks, offsets = slots // block_size, slots % block_size
    blocks[4::5] = np.where(np.arange(len(blocks[4::5])) % 2, _N, 2**31 - 1)
    return RaggedBatch(
        block_table=jnp.zeros((1, 1), jnp.int32),
        context_lens=jnp.zeros(1, jnp.int32),
        cu_q_lens=jnp.zeros(2, jnp.int32),
        token_block=jnp.asarray(blocks, jnp.int32),
        token_offset=jnp.asarray(offsets, jnp.int32),
    )


def make_qkv(spec: AttentionSpec, num_tokens: int) -> jax.Array:  # [T, Hk, G+2, D]
    group = spec.num_heads // spec.num_kv_heads
    values = np.random.default_rng(4).standard_normal((num_tokens, spec.num_kv_heads, group + 2, spec.head_dim))
    return jnp.asarray(values * 3, spec.dtype)


def make_pool(spec: AttentionSpec, storage_dim: int) -> KVPool:
    """Not empty, so that a write in the wrong place shows; fp8 scales differ by head."""
    pool = KVLayout(storage_dim).empty_pool(spec, _N)
    values = jnp.asarray(np.random.default_rng(5).integers(-8, 8, pool.values.shape), jnp.float32)
    scales = pool.scales
    if spec.kv_dtype == "float8_e4m3fn":
        scales = 2.0 ** jnp.arange(-2.0, 2 * spec.num_kv_heads - 2.0).reshape(2, spec.num_kv_heads) * 0.3
    return KVPool(values.astype(spec.kv_dtype), scales)


def expected_heads(
    qkv: jax.Array, rope: RopeTable, norm: QKNorm | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # float64 [T, Hq, D], [T, Hk, D], [T, Hk, D]
    """By definition: head by head, the rotation as a product of complex numbers."""
    cos, sin = (np.asarray(part, np.float64) for part in rope)
    wide = np.asarray(qkv.astype(jnp.float32), np.float64)
    num_tokens, num_kv_heads, columns, head_dim = wide.shape
    half = head_dim // 2

    def turned(head: np.ndarray, weight: jax.Array | None) -> np.ndarray:  # [T, D]
        if weight is not None:
            scale = np.asarray(weight.astype(jnp.float32), np.float64) + norm.offset
            head = head / np.sqrt((head**2).mean(axis=-1, keepdims=True) + norm.eps) * scale
        number = (head[:, :half] + 1j * head[:, half:]) * (cos + 1j * sin)
        return np.concatenate([number.real, number.imag], axis=-1)

    weights = (None, None) if norm is None else (norm.q_weight, norm.k_weight)
    q = [turned(wide[:, h, g], weights[0]) for h in range(num_kv_heads) for g in range(columns - 2)]
    k = [turned(wide[:, h, columns - 2], weights[1]) for h in range(num_kv_heads)]
    return np.stack(q, axis=1), np.stack(k, axis=1), wide[:, :, columns - 1]


def check(
    spec: AttentionSpec,
    num_tokens: int,
    offset: float | None,
    implementation: str,
    storage_dim: int,
    tolerance: float,
    *,
    with_scales: bool = True,
) -> None:
    """Queries, and every slot of the pool, written or not; without norms if ``offset`` is None."""
    norm = None if offset is None else make_norm(spec, offset)
    qkv, rope, batch = make_qkv(spec, num_tokens), make_rope(num_tokens, spec.head_dim), make_batch(num_tokens, 64)
    before = make_pool(spec, storage_dim)
    if not with_scales:
        before = replace(before, scales=None)
    untouched = np.asarray(before.values.astype(jnp.float32))
    run = jax.jit(qkv_prologue, static_argnums=(5, 6))
    q, pool = run(qkv, rope, norm, before, batch, spec, implementation)
    assert q.dtype == spec.dtype and pool.values.dtype == before.values.dtype
    expected_q, k, v = expected_heads(qkv, rope, norm)
    np.testing.assert_allclose(np.asarray(q.astype(jnp.float32)), expected_q, rtol=tolerance, atol=tolerance)

    scale = np.ones((2, spec.num_kv_heads)) if before.scales is None else np.asarray(before.scales)
    scale = scale[..., None, None]  # [2, Hk, 1, 1]
    stored, written = untouched * scale, np.zeros((_N, 64), bool)
    for t, (block, offset) in enumerate(zip(*map(np.asarray, (batch.token_block, batch.token_offset)), strict=True)):
        if block < _N:
            written[block, offset] = True
            new = np.stack([k[t], v[t]])
            stored[block, :, :, offset, : spec.head_dim] = new
            stored[block, :, :, offset, spec.head_dim :] = 0
    fp8 = spec.kv_dtype == "float8_e4m3fn"
    if fp8:
        stored = np.clip(stored, -448 * scale, 448 * scale)
    got = np.asarray(pool.values.astype(jnp.float32))
    by_slot = got.swapaxes(1, 3), untouched.swapaxes(1, 3)
    np.testing.assert_array_equal(by_slot[0][~written], by_slot[1][~written])
    # fp8 has half a step of 2^-3 of the value, and 2^-10 of the scale below its smallest normal number.
    relative, absolute = (2**-4 * 1.1, tolerance + 2**-10 * scale.max()) if fp8 else (tolerance, tolerance)
    np.testing.assert_allclose(got * scale, stored, rtol=relative, atol=absolute)


@pytest.mark.parametrize("norm", [None, 0.0, 1.0], ids=["plain", "norm", "norm_from_one"])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=["g3", "g1", "g4"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn")])
def test_the_composition_is_what_its_definition_says(
    norm: float | None, heads: tuple[int, int], dtypes: tuple[str, str]
) -> None:
    spec = make_spec(
        num_heads=heads[0], num_kv_heads=heads[1], head_dim=16, block_size=64, dtype=dtypes[0], kv_dtype=dtypes[1]
    )
    # bfloat16: norm and rotation round, each by half of 2^-8 of a value that the rotation may shrink.
    check(spec, 23, norm, "xla", storage_dim=32, tolerance=1e-5 if spec.dtype == "float32" else 2**-6)


def test_a_projection_of_other_heads_is_refused() -> None:
    spec = make_spec(num_heads=4, num_kv_heads=2, head_dim=16, block_size=64)
    arguments = make_rope(5, 16), None, make_pool(spec, 16), make_batch(5, 64), spec, "xla"
    with pytest.raises(ValueError, match=r"qkv is float32\[5, 2, 3, 16\], spec says float32\[T, 2, 4, 16\]"):
        qkv_prologue(jnp.zeros((5, 2, 3, 16)), *arguments)
    with pytest.raises(ValueError, match=r"qkv is bfloat16\[5, 2, 4, 16\], spec says float32"):
        qkv_prologue(jnp.zeros((5, 2, 4, 16), jnp.bfloat16), *arguments)


def gpu_spec(num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: str = "bfloat16") -> AttentionSpec:
    return make_spec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=64,
        dtype="bfloat16",
        kv_dtype=kv_dtype,
    )


@pytest.mark.parametrize(
    ("spec", "num_tokens", "offset"),
    [
        (gpu_spec(4, 2, 128), 16, 0.0),
        (gpu_spec(9, 3, 64), 19, None),  # the last tile is moved back
        (gpu_spec(2, 1, 256), 8, 1.0),
        (gpu_spec(2, 2, 64), 5, 0.0),  # fewer tokens than a tile
        (gpu_spec(9, 1, 64), 8, 0.0),  # several CTAs of queries
        (gpu_spec(2, 2, 128, "float8_e4m3fn"), 9, 0.0),
    ],
    ids=lambda value: f"{value.num_heads}x{value.num_kv_heads}x{value.head_dim}" if hasattr(value, "scale") else None,
)
def test_the_gpu_kernel_in_the_interpreter(spec: AttentionSpec, num_tokens: int, offset: float | None) -> None:
    with plgpu.force_gpu_interpret_mode():
        check(spec, num_tokens, offset, "pallas_gpu", spec.head_dim, _ROUNDED_ONCE)


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_fp8_without_scales(implementation: str) -> None:
    """As the engine's pools are: all scales are 1."""
    with plgpu.force_gpu_interpret_mode():
        check(gpu_spec(2, 2, 64, "float8_e4m3fn"), 9, None, implementation, 64, _ROUNDED_ONCE, with_scales=False)


def test_the_gpu_kernel_has_no_races() -> None:
    """Of whole tiles: a tile that is moved back writes what its neighbour writes."""
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        check(gpu_spec(18, 2, 64), 16, 0.0, "pallas_gpu", 64, _ROUNDED_ONCE)
    assert not gpu_callbacks.get_races().races_found


def test_tiles_are_small_where_there_is_little_to_do() -> None:
    assert gpu.tile_tokens(8, 8, 128) == gpu.tile_tokens(64, 8, 128) == 8
    assert gpu.tile_tokens(2048, 8, 128) == 16
    assert [gpu.tile_tokens(8192, 8, head_dim) for head_dim in gpu.HEAD_DIMS] == [32, 16, 8]


def test_the_kernel_runs_whatever_attention_runs() -> None:
    assert set(gpu_attention.HEAD_DIMS) <= set(gpu.HEAD_DIMS)
    assert set(gpu_attention.KV_DTYPES) <= set(gpu.KV_DTYPES)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "dtype is float32"),
        ({"kv_dtype": "int8"}, "kv_dtype is int8"),
        ({"head_dim": 96}, "head_dim is 96"),
    ],
)
def test_the_gpu_kernel_refuses_by_name(changes: dict[str, object], reason: str) -> None:
    spec = make_spec(**{"head_dim": 64, "block_size": 64, "dtype": "bfloat16", "kv_dtype": "bfloat16", **changes})
    arguments = make_rope(8, spec.head_dim), None, make_pool(spec, spec.head_dim), make_batch(8, 64), spec, "pallas_gpu"
    with pytest.raises(UnsupportedAttentionError, match=f"'pallas_gpu' can't be used: {reason}"):
        qkv_prologue(make_qkv(spec, 8), *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
@pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
class TestOnHopper:
    @pytest.mark.parametrize("num_tokens", [1, 8, 13, 64, 333, 512])
    @pytest.mark.parametrize("offset", [None, 0.0, 1.0], ids=["plain", "norm", "norm_from_one"])
    def test_sizes(self, num_tokens: int, offset: float | None, head_dim: int, kv_dtype: str) -> None:
        check(gpu_spec(4, 2, head_dim, kv_dtype), num_tokens, offset, "pallas_gpu", head_dim, _ROUNDED_ONCE)

    @pytest.mark.parametrize("group", range(1, gpu_attention.MAX_GROUP + 1))
    def test_head_groupings(self, group: int, head_dim: int, kv_dtype: str) -> None:
        check(gpu_spec(3 * group, 3, head_dim, kv_dtype), 40, 0.0, "pallas_gpu", head_dim, _ROUNDED_ONCE)

    def test_a_donated_pool_is_written_in_place(self, head_dim: int, kv_dtype: str) -> None:
        spec = gpu_spec(8, 4, head_dim, kv_dtype)
        pool = KVLayout(head_dim).empty_pool(spec, 1000)
        arguments = make_qkv(spec, 64), make_rope(64, head_dim), make_norm(spec), pool, make_batch(64, 64)
        run = jax.jit(lambda *args: qkv_prologue(*args, spec, "pallas_gpu"), donate_argnums=3)
        memory = run.lower(*arguments).compile().memory_analysis()
        assert memory.alias_size_in_bytes >= pool.values.nbytes
        assert memory.temp_size_in_bytes < pool.values.nbytes // 20
