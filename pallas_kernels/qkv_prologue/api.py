"""What stands between the qkv projection and attention, as one op: split into heads, qk-norm, rope, KV write.

It runs on the implementation that attends (ragged_paged_attention/api.py chooses it): on ``pallas_gpu`` as one kernel
(gpu.py), elsewhere as XLA computes reference.py, with the KV write of that implementation. Shape letters: see types.py
here and there.
"""

from __future__ import annotations

import importlib

import jax

from pallas_kernels.lower_once import run_lowered
from pallas_kernels.qkv_prologue import reference
from pallas_kernels.qkv_prologue.types import QKNorm, RopeTable
from pallas_kernels.ragged_paged_attention.api import UnsupportedAttentionError, write_kv
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, Implementation, KVPool, RaggedBatch


def qkv_prologue(
    qkv: jax.Array,  # [T, Hk, G+2, D], in spec.dtype
    rope: RopeTable,
    norm: QKNorm | None,
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    implementation: Implementation,
) -> tuple[jax.Array, KVPool]:  # [T, Hq, D], in spec.dtype
    """Queries for attention, and the pool with this step's keys and values.

    Of each KV head, ``qkv`` holds the G query heads, the key and the value. Queries and keys are normed (unless
    ``norm`` is None) and turned by ``rope``. Token t's key and value go to (``token_block[t]``, ``token_offset[t]``),
    in place where the caller's jit donates the pool, and nowhere if that block is N or more. Queries of such padding
    tokens are computed like all others. No two tokens of a step may share a (block, offset).

    Raises:
        UnsupportedAttentionError: the implementation's kernel can't run ``spec``.
        ValueError: shapes or dtypes don't fit ``spec``.
    """
    group = spec.num_heads // spec.num_kv_heads
    expected = (spec.num_kv_heads, group + 2, spec.head_dim)
    if qkv.shape[1:] != expected or qkv.dtype != spec.dtype:
        raise ValueError(
            f"qkv is {qkv.dtype}{list(qkv.shape)}, spec says {spec.dtype}[T, {', '.join(map(str, expected))}]"
        )
    if implementation == "pallas_gpu":
        # Imported here: a machine without a GPU may lack what the kernel's module needs.
        gpu = importlib.import_module("pallas_kernels.qkv_prologue.gpu")
        reason = gpu.supports(spec)
        if reason is not None:
            raise UnsupportedAttentionError(f"attention implementation {implementation!r} can't be used: {reason}")
        return run_lowered(gpu.qkv_prologue, {"spec": spec}, qkv=qkv, rope=rope, norm=norm, pool=pool, batch=batch)
    q, k, v = reference.heads(qkv, rope, norm)
    return q, write_kv(k, v, pool, batch, spec, implementation)
