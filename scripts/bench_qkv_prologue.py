"""Speed of what stands between the qkv projection and attention on one H100: the kernel, and XLA's composition of it.

A case is a compiled chain of 32 calls, like the layers of a step, each with a projection of its own; one pool goes
through all of them, donated, and so do the arrays of their queries: with results at new addresses XLA would record its
graph again in each run. Times are per call, of chains dispatched back to back; the ceiling is a device-to-device copy
of as many bytes, measured in the same run. Below some thousand tokens the device is done before the host has dispatched
the next chain: such times are the host's, and ``profile_step.py`` has the kernel's.

    python scripts/bench_qkv_prologue.py [--tokens 8 64 256 2048 8192] [--repeats 5]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import copy_bandwidth

from pallas_kernels.qkv_prologue.api import qkv_prologue
from pallas_kernels.qkv_prologue.types import QKNorm
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

# The attention layers of Qwen3-0.6B and Llama-3.1-8B: query heads, KV heads, head dim, qk-norm.
SHAPES = {"qwen3-0.6b": (16, 8, 128, True), "llama-3.1-8b": (32, 8, 128, False)}
BLOCK_SIZE = 64
CALLS = 32  # in one compiled chain
MEASURE_SECONDS = 0.05


def chain_seconds(spec: AttentionSpec, normed: bool, num_tokens: int, implementation: str, repeats: int) -> list[float]:
    """Times of one call, one for each repeat."""
    group, half = spec.num_heads // spec.num_kv_heads, spec.head_dim // 2
    shape = (num_tokens, spec.num_kv_heads, group + 2, spec.head_dim)
    projections = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(CALLS)]
    angles = jax.random.normal(jax.random.key(CALLS), (num_tokens, half))
    rope = jnp.cos(angles), jnp.sin(angles)
    weight = jnp.ones(spec.head_dim, jnp.bfloat16)
    norm = QKNorm(weight, weight, 1e-6, 0.0) if normed else None
    num_blocks = 2 * num_tokens // BLOCK_SIZE + 16
    slots = np.random.default_rng(0).permutation(num_blocks * BLOCK_SIZE)[:num_tokens]
    batch = RaggedBatch(
        block_table=jnp.zeros((1, 1), jnp.int32),
        context_lens=jnp.zeros(1, jnp.int32),
        cu_q_lens=jnp.zeros(2, jnp.int32),
        token_block=jnp.asarray(slots // BLOCK_SIZE, jnp.int32),
        token_offset=jnp.asarray(slots % BLOCK_SIZE, jnp.int32),
    )

    def chain(pool: KVPool, queries: list[jax.Array], projections: list[jax.Array]) -> tuple[KVPool, list[jax.Array]]:
        written = []
        for old, qkv in zip(queries, projections, strict=True):
            q, pool = qkv_prologue(qkv, rope, norm, pool, batch, spec, implementation)
            written.append(jax.lax.dynamic_update_slice(old, q, (0,) * q.ndim))
        return pool, written

    pool = KVLayout(spec.head_dim).empty_pool(spec, num_blocks)
    queries = [jnp.zeros((num_tokens, spec.num_heads, spec.head_dim), jnp.bfloat16) for _ in projections]
    run = jax.jit(chain, donate_argnums=(0, 1)).lower(pool, queries, projections).compile()

    def seconds(executions: int) -> float:
        nonlocal pool, queries
        start = time.perf_counter()
        for _ in range(executions):
            pool, queries = run(pool, queries, projections)
        jax.block_until_ready((pool, queries))
        return time.perf_counter() - start

    seconds(3)
    executions = max(4, int(MEASURE_SECONDS / seconds(1)))
    return [seconds(executions) / (executions * CALLS) for _ in range(repeats)]


def measure(model: str, num_tokens: int, copy: float, repeats: int) -> dict[str, Any]:
    """The kernel's time of one call, the composition's, and a copy's."""
    num_heads, num_kv_heads, head_dim, normed = SHAPES[model]
    spec = AttentionSpec(num_heads, num_kv_heads, head_dim, BLOCK_SIZE, "bfloat16", "bfloat16", head_dim**-0.5)
    moved = num_tokens * (2 * 2 * (num_heads + 2 * num_kv_heads) * head_dim + 4 * head_dim)
    result: dict[str, Any] = {"model": model, "tokens": num_tokens, "bytes": moved, "copy_us": moved / copy * 1e6}
    for implementation in ("pallas_gpu", "xla"):
        times = chain_seconds(spec, normed, num_tokens, implementation, repeats)
        result[implementation] = {
            "us": statistics.median(times) * 1e6,
            "us_min": min(times) * 1e6,
            "us_max": max(times) * 1e6,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[8, 64, 256, 2048, 8192])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    copy = copy_bandwidth(arguments.repeats)
    print(f"copy {copy / 1e12:.3f} TB/s on {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    results = []
    for model in SHAPES:
        for num_tokens in arguments.tokens:
            r = measure(model, num_tokens, copy, arguments.repeats)
            results.append(r)
            ours, theirs = r["pallas_gpu"], r["xla"]
            print(
                f"{model:14s} {num_tokens:6d} tokens  kernel {ours['us']:7.1f} us ({ours['us_min']:.1f}.."
                f"{ours['us_max']:.1f})  XLA {theirs['us']:7.1f} us  copy {r['copy_us']:7.1f} us",
                flush=True,
            )
    print(json.dumps({"device": jax.devices()[0].device_kind, "copy_tb_per_s": copy / 1e12, "results": results}))


if __name__ == "__main__":
    main()
