"""The op as one kernel for Hopper: what the projection wrote is read once, queries and the pool are written once.

A CTA is one warpgroup with the rows of ``tile_tokens`` tokens and one KV head: key, value, and up to MAX_QUERIES query
heads (further ones are CTAs of their own). A row is held as its two halves, so that the rotation pairs registers of one
thread. A thread has up to 8 neighbouring values of a half, read and written as one piece of up to 16 bytes; the sum of
a norm goes over the 4 to 16 threads of a row. All of a CTA's reads start before its first result is written.

Queries are stored from registers. Keys and values pass through shared memory: a token's slot is then one TMA store of
its key and value, at an address that only the token knows.

A token moves 2 * 2 * Hk * (G+2) * D bytes in bfloat16, half read and half written, and reads the D * 4 bytes of its
angles once from memory (and Hk times from cache): 16.9 KB for Hk = 8, G = 2, D = 128. At the 2.95 TB/s that a copy
reaches on an H100 that is 5.7 ns a token: 47 us for 8192 tokens, and nothing beside a launch for 8.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lane import when
from pallas_kernels.qkv_prologue.types import QKNorm, RopeTable
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVPool, RaggedBatch

HEAD_DIMS = (64, 128, 256)
KV_DTYPES = ("bfloat16", "float8_e4m3fn")
MAX_QUERIES = 8  # query heads of one CTA: their rows wait in registers
MIN_TILE = 8  # tokens
NUM_SMS = 132
_THREADS = 128
Halves = tuple[jax.Array, ...]  # of rows: two arrays [tokens of the tile, D/2]
_FP8_MAX = 448.0  # the largest float8_e4m3fn


def supports(spec: AttentionSpec) -> str | None:
    """Why this op is refused, or None."""
    if spec.dtype != "bfloat16":
        return f"dtype is {spec.dtype}; the GPU kernel reads bfloat16"
    if spec.kv_dtype not in KV_DTYPES:
        return f"kv_dtype is {spec.kv_dtype}; the GPU kernel writes {' and '.join(KV_DTYPES)}"
    if spec.head_dim not in HEAD_DIMS:
        return f"head_dim is {spec.head_dim}; the GPU kernel has {HEAD_DIMS}"
    return None


def tile_tokens(num_tokens: int, num_kv_heads: int, head_dim: int) -> int:
    """Tokens of a tile: as many as fill 16 byte accesses, fewer where that would leave multiprocessors idle."""
    tile = 8 * _THREADS // (head_dim // 2)
    while tile > MIN_TILE and (tile > num_tokens or -(-num_tokens // tile) * num_kv_heads < NUM_SMS):
        tile //= 2
    return tile


@functools.partial(jax.jit, static_argnames=("spec",))
def qkv_prologue(
    qkv: jax.Array,  # [T, Hk, G+2, D] bfloat16
    rope: RopeTable,
    norm: QKNorm | None,
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
) -> tuple[jax.Array, KVPool]:  # [T, Hq, D] bfloat16
    """See api.qkv_prologue. An inner jit: the layers of a step share one lowering."""
    num_tokens = qkv.shape[0]

    def padded(x: jax.Array, fill: int = 0) -> jax.Array:
        missing = max(MIN_TILE - num_tokens, 0)
        return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=fill) if missing else x

    cos, sin = rope
    nowhere = pool.values.shape[0]
    values = jax.new_ref(pool.values)
    q = _run(
        padded(qkv),
        padded(cos),
        padded(sin),
        padded(batch.token_block, nowhere),
        padded(batch.token_offset),
        norm,
        pool.scales,
        values,
        spec,
    )
    return q[:num_tokens], KVPool(jax.freeze(values), pool.scales)


def _run(
    qkv: jax.Array,  # [T, Hk, G+2, D]
    cos: jax.Array,  # float32[T, D/2]
    sin: jax.Array,  # float32[T, D/2]
    token_block: jax.Array,  # int32[T]
    token_offset: jax.Array,  # int32[T]
    norm: QKNorm | None,
    scales: jax.Array | None,  # float32[2, Hk], fp8 only; None is 1.0
    values: Any,  # ref [N, 2, Hk, B, D], written in place
    spec: AttentionSpec,
) -> jax.Array:  # [T, Hq, D]
    T, Hk, columns, D = qkv.shape
    G, half, N = columns - 2, D // 2, values.shape[0]
    TT = tile_tokens(T, Hk, D)
    queries = next(n for n in range(min(G, MAX_QUERIES), 0, -1) if G % n == 0)
    parts = G // queries
    # Axes: tile of the CTA | warp, row of the warp | thread of the row, its values.
    tiling = plgpu.Tiling(((TT, half), (TT // 4, half), (TT * half // _THREADS,)))
    layout = plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)
    fp8 = spec.kv_dtype == "float8_e4m3fn"
    operands: list[Any] = [qkv, cos, sin, token_block, token_offset]
    if norm is not None:
        operands += [norm.q_weight, norm.k_weight]
    if scales is not None:
        operands.append(scales)

    def kernel(*refs: Any) -> None:
        qkv_ref, cos_ref, sin_ref, block_ref, offset_ref, *optional, values_ref, q_ref, kv_smem = refs
        q_weight, k_weight = (optional.pop(0), optional.pop(0)) if norm is not None else (None, None)
        scales_ref = None if scales is None else optional.pop(0)
        cta = lax.axis_index("cta")
        part, place = lax.rem(cta, jnp.int32(parts)), lax.div(cta, jnp.int32(parts))
        head = lax.rem(place, jnp.int32(Hk))
        # The last tile is moved back to end at T: two CTAs then write the same values to the same places.
        first = jnp.minimum(lax.div(place, jnp.int32(Hk)) * TT, T - TT)
        tokens = pl.ds(first, TT)
        load = functools.partial(plgpu.load, layout=layout, optimized=False)

        def column(index: Any) -> Halves:
            return tuple(load(qkv_ref.at[tokens, head, index, pl.ds(i * half, half)]) for i in range(2))

        def spread(x: jax.Array, axis: int) -> jax.Array:
            return plgpu.layout_cast(lax.broadcast_in_dim(x, (TT, half), [axis]), layout)

        def norm_scale(ref: Any) -> Halves | None:
            if norm is None:
                return None
            pair = [load(ref.at[pl.ds(i * half, half)], layout=layout.reduce(0)) for i in range(2)]
            return tuple(spread(x.astype(jnp.float32) + norm.offset, 1) for x in pair)

        def turned(pair: Halves, scale: Halves | None) -> Halves:
            """float32, normed and rotated."""
            a, b = (x.astype(jnp.float32) for x in pair)
            if norm is not None and scale is not None:
                inverse = spread(lax.rsqrt((a * a + b * b).sum(axis=1) * (1 / D) + norm.eps), 0)
                a, b = a * inverse * scale[0], b * inverse * scale[1]
            return a * cosine - b * sine, b * cosine + a * sine

        def stage(kind: int, pair: Halves) -> None:
            """Keys (0) or values (1) to shared memory, in the pool's dtype."""
            if fp8:
                scale = 1.0 if scales_ref is None else scales_ref[kind, head]
                pair = tuple(jnp.clip(x.astype(jnp.float32) / scale, -_FP8_MAX, _FP8_MAX) for x in pair)
            for i, x in enumerate(pair):
                kv_smem[:, kind, i * half : (i + 1) * half] = x.astype(values.dtype)

        def write_keys_and_values() -> None:
            key, value = column(G), column(G + 1)
            slots = [(block_ref[first + i], offset_ref[first + i]) for i in range(TT)]
            stage(0, turned(key, k_scale))
            stage(1, value)
            plgpu.commit_smem()
            for i, (block, offset) in enumerate(slots):

                @when(block < N)
                def _(i: int = i, block: jax.Array = block, offset: jax.Array = offset) -> None:
                    to = values_ref.at[block, :, head, offset]
                    plgpu.copy_smem_to_gmem(kv_smem.at[i], to, commit_group=False)

            plgpu.commit_smem_to_gmem_group()

        rows = [column(part * queries + g) for g in range(queries)]
        cosine, sine = load(cos_ref.at[tokens]), load(sin_ref.at[tokens])
        q_scale, k_scale = norm_scale(q_weight), norm_scale(k_weight)
        if parts == 1:
            write_keys_and_values()
        else:
            when(part == 0)(write_keys_and_values)
        for g, row in enumerate(rows):
            for i, x in enumerate(turned(row, q_scale)):
                to = q_ref.at[tokens, head * G + part * queries + g, pl.ds(i * half, half)]
                to[...] = x.astype(q_ref.dtype)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((T, Hk * G, D), qkv.dtype),
        grid=(pl.cdiv(T, TT) * Hk * parts,),
        grid_names=("cta",),
        scratch_types=[plgpu.SMEM((TT, 2, D), values.dtype)],
        compiler_params=plgpu.CompilerParams(
            # Nothing that a thread reads is written here.
            unsafe_no_auto_barriers=True,
            # Warpgroup semantics choose a swizzle for kv_smem, but store to slices of it as if each began a period
            # of 1024 bytes, which is not what the TMA reads: no swizzle here, and none is needed.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="qkv_prologue",
    )(*operands, values)
