"""Speed of the GPU attention kernels on one H100, against the ceilings that are measured in the same run.

Decode is held against a device-to-device copy (bytes of K and V over time), prefill against cuDNN's dense causal
attention on the same shape (a chunk over a cached context: against cuDNN's rate on 1 x 8192). A case is a compiled
chain of 32 calls or more, like the layers of a step: each call's output is the next one's query, the work lists are
computed once, and the pools (random, 512 MB in all or more, so that L2 doesn't help) take turns. Times are per
call, of chains dispatched back to back.

    python scripts/bench_kernels.py [--cases decode 1x8192] [--repeats 5] [--plot roofline.png] [--json out.json]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from pallas_kernels.ragged_paged_attention import gpu
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVPool, RaggedBatch

_POOL_BYTES = 512 << 20  # of all pools of a case together, at least
_COPY_BYTES = 2 << 30
_MIN_CALLS = 32  # in one compiled chain


@dataclass(frozen=True)
class Case:
    """One line of the table. ``rows`` are (context length, query tokens)."""

    name: str
    rows: tuple[tuple[int, int], ...]
    bar: float  # fraction of the ceiling
    group: int = 4
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64
    kv_dtype: str = "bfloat16"
    idle_rows: int = 0  # of the bucket, with as many padding tokens
    baseline: tuple[int, int] | None = None  # batch and length of the cuDNN run; None = the copy

    def spec(self) -> AttentionSpec:
        heads, dim = self.group * self.num_kv_heads, self.head_dim
        return AttentionSpec(heads, self.num_kv_heads, dim, self.block_size, "bfloat16", self.kv_dtype, dim**-0.5)

    @property
    def kv_bytes(self) -> int:
        """Keys and values that must be read once."""
        per_token = 2 * self.num_kv_heads * self.head_dim * jnp.dtype(self.kv_dtype).itemsize
        return per_token * sum(context for context, _ in self.rows)

    @property
    def flops(self) -> float:
        """Multiplications and additions of visible query-key pairs."""
        pairs = sum(width * (context - width) + width * (width + 1) // 2 for context, width in self.rows)
        return 4.0 * pairs * self.group * self.num_kv_heads * self.head_dim


def _decode(requests: int, context: int, width: int = 1) -> tuple[tuple[int, int], ...]:
    return ((context, width),) * requests


def _ragged(requests: int, shortest: int, longest: int) -> tuple[tuple[int, int], ...]:
    lengths = np.random.default_rng(0).integers(shortest, longest, requests, endpoint=True)
    return tuple((int(n), 1) for n in lengths)


CASES = (
    Case("decode_64x4096", _decode(64, 4096), 0.92),
    Case("decode_256x1024", _decode(256, 1024), 0.92),
    Case("decode_64x4096_g2", _decode(64, 4096), 0.92, group=2),
    Case("decode_256x1024_g2", _decode(256, 1024), 0.92, group=2),
    Case("decode_8x4096", _decode(8, 4096), 0.70),
    Case("decode_1x32768", _decode(1, 32768), 0.70),
    Case("decode_16x512", _decode(16, 512), 0.50),
    Case("decode_ragged_128", _ragged(128, 100, 4096), 0.85),
    Case("decode_143_of_256", _ragged(143, 600, 1600), 0.85, group=2, idle_rows=113),
    Case("decode_256_near_576", _ragged(256, 512, 640), 0.85, group=2),
    Case("decode_short_and_long", _decode(192, 60) + _decode(64, 4096), 0.85, group=2),
    Case("decode_d64_64x4096", _decode(64, 4096), 0.80, head_dim=64),
    Case("decode_d256_64x4096", _decode(64, 4096), 0.80, head_dim=256),
    Case("decode_b128_64x4096", _decode(64, 4096), 0.92, block_size=128),
    Case("decode_fp8_64x4096", _decode(64, 4096), 0.70, kv_dtype="float8_e4m3fn"),
    Case("verify_64x4096", _decode(64, 4096, 5), 0.85),
    Case("prefill_1x8192", _decode(1, 8192, 8192), 0.85, baseline=(1, 8192)),
    Case("prefill_8x2048", _decode(8, 2048, 2048), 0.85, baseline=(8, 2048)),
    Case("prefill_chunk_512_of_8192", _decode(1, 8192, 512), 0.70, baseline=(1, 8192)),
)


def seconds_per_call(run: Callable[[jax.Array], jax.Array], x: jax.Array, calls: int, repeats: int) -> list[float]:
    """Times of one call, one for each repeat; ``run`` is a compiled chain of ``calls`` calls."""
    for _ in range(3):
        y = run(x)
    y.block_until_ready()
    start = time.perf_counter()
    run(x).block_until_ready()
    executions = max(4, int(0.05 / (time.perf_counter() - start)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(executions):
            y = run(x)
        y.block_until_ready()
        times.append((time.perf_counter() - start) / (executions * calls))
    return times


def copy_bandwidth(repeats: int) -> float:
    """Bytes per second, read and written, of copying 2 GiB."""
    x = jnp.ones(_COPY_BYTES // 2, jnp.bfloat16)
    times = seconds_per_call(jax.jit(lambda a: a * 2), x, 1, repeats)
    return 2 * _COPY_BYTES / statistics.median(times)


def cudnn_seconds(case: Case, repeats: int) -> float:
    """cuDNN's dense causal attention on the case's baseline shape."""
    assert case.baseline is not None
    batch, length = case.baseline
    heads = case.group * case.num_kv_heads
    keys = jax.random.split(jax.random.key(1), 3)
    q = jax.random.normal(keys[0], (batch, length, heads, case.head_dim), jnp.bfloat16)
    k, v = (jax.random.normal(key, (batch, length, case.num_kv_heads, case.head_dim), jnp.bfloat16) for key in keys[1:])

    @jax.jit
    def chain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        for _ in range(_MIN_CALLS):
            q = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
        return q

    return statistics.median(seconds_per_call(lambda q: chain(q, k, v), q, _MIN_CALLS, repeats))


def case_inputs(case: Case) -> tuple[jax.Array, list[KVPool], RaggedBatch]:
    """Random queries, enough pools, and the batch with a permuted block table."""
    spec, B = case.spec(), case.block_size
    rows = case.rows + ((0, 0),) * case.idle_rows
    contexts, widths = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    blocks = -(-contexts // B)
    N, P, R, T = int(blocks.sum()) + 1, int(blocks.max()), len(rows), int(widths.sum()) + case.idle_rows
    order = np.random.default_rng(0).permutation(N - 1).astype(np.int32) + 1
    table = np.zeros((R, P), np.int32)
    for r, first in enumerate(np.cumsum(blocks) - blocks):
        table[r, : blocks[r]] = order[first : first + blocks[r]]
    shape = gpu.kv_layout(spec).values_shape(spec, N)

    @jax.jit
    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16).astype(case.kv_dtype)

    num_pools = max(1, -(-_POOL_BYTES // case.kv_bytes))
    scales = jnp.ones((2, case.num_kv_heads), jnp.float32) if case.kv_dtype == "float8_e4m3fn" else None
    pools = [KVPool(draw(jax.random.key(i)), scales) for i in range(num_pools)]
    q = jax.random.normal(jax.random.key(99), (T, spec.num_heads, spec.head_dim), jnp.bfloat16)
    cu_q_lens = jnp.asarray(np.concatenate([[0], np.cumsum(widths)]), jnp.int32)
    zeros = jnp.zeros(T, jnp.int32)
    return q, pools, RaggedBatch(jnp.asarray(table), jnp.asarray(contexts), cu_q_lens, zeros, zeros)


def time_case(case: Case, repeats: int, attend: Callable[..., jax.Array] = gpu.attend) -> tuple[list[float], float]:
    """(seconds of one call, one for each repeat; seconds to lower and compile the chain)."""
    spec = case.spec()
    q, pools, batch = case_inputs(case)
    passes = max(1, _MIN_CALLS // len(pools))

    @jax.jit
    def chain(q: jax.Array, pools: list[KVPool], batch: RaggedBatch) -> jax.Array:
        for pool in pools * passes:
            q = attend(q, pool, batch, spec)
        return q

    start = time.perf_counter()
    compiled = chain.lower(q, pools, batch).compile()
    compile_seconds = time.perf_counter() - start
    return seconds_per_call(lambda x: compiled(x, pools, batch), q, passes * len(pools), repeats), compile_seconds


def measure(case: Case, copy: float, repeats: int) -> dict[str, Any]:
    """One case against its ceiling."""
    times, compile_seconds = time_case(case, repeats)
    seconds = statistics.median(times)
    if case.baseline is None:
        ceiling, achieved, unit = copy / 1e12, case.kv_bytes / seconds / 1e12, "TB/s"
    else:
        batch, length = case.baseline
        dense = Case("dense", _decode(batch, length, length), 0, case.group, case.num_kv_heads, case.head_dim)
        ceiling, achieved, unit = (
            dense.flops / cudnn_seconds(case, repeats) / 1e12,
            case.flops / seconds / 1e12,
            "TFLOP/s",
        )
    return {
        "case": case.name,
        "us": seconds * 1e6,
        "us_min": min(times) * 1e6,
        "us_max": max(times) * 1e6,
        "achieved": achieved,
        "ceiling": ceiling,
        "unit": unit,
        "fraction": achieved / ceiling,
        "bar": case.bar,
        "met": achieved / ceiling >= case.bar,
        "compile_s": compile_seconds,
        "flops": case.flops,
        "kv_bytes": case.kv_bytes,
    }


def plot(results: list[dict[str, Any]], copy: float, path: str) -> None:
    """Roofline: TFLOP/s over FLOP per byte of K and V, below the copy bandwidth and cuDNN's best rate."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    peaks = [r["ceiling"] for r in results if r["unit"] == "TFLOP/s"]
    intensity = np.geomspace(1, 1e5, 200)
    roof = intensity * copy / 1e12
    axes.loglog(intensity, np.minimum(roof, max(peaks)) if peaks else roof, color="black", label="measured ceilings")
    for r in results:
        axes.plot(r["flops"] / r["kv_bytes"], r["flops"] / r["us"] / 1e6, "o", label=f"{r['case']} {r['fraction']:.0%}")
    axes.set(xlabel="FLOP per byte of K and V", ylabel="TFLOP/s", title="Ragged paged attention on one H100")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", help="parts of case names; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", default="roofline.png", help="a PNG; empty: none")
    parser.add_argument("--json", help="also write the JSON there")
    arguments = parser.parse_args()
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("a plot needs matplotlib: pip install '.[bench]', or --plot '' for none")
    chosen = [c for c in CASES if not arguments.cases or any(part in c.name for part in arguments.cases)]
    copy = copy_bandwidth(arguments.repeats)
    print(f"copy {copy / 1e12:.3f} TB/s on {jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    results = []
    for case in chosen:
        r = measure(case, copy, arguments.repeats)
        results.append(r)
        verdict = "met" if r["met"] else "MISSED"
        print(
            f"{r['case']:28s} {r['us']:9.1f} us ({r['us_min']:.1f}..{r['us_max']:.1f})  {r['achieved']:7.2f} of "
            f"{r['ceiling']:7.2f} {r['unit']}  {r['fraction']:6.1%}  bar {r['bar']:.0%} {verdict}"
            f"  compile {r['compile_s']:.1f} s",
            flush=True,
        )
    if arguments.plot:
        plot(results, copy, arguments.plot)
    report = {"device": jax.devices()[0].device_kind, "copy_tb_per_s": copy / 1e12, "results": results}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
