"""The TPU kernel without a TPU: its numbers under ``interpret=True``, its memory accesses in the simulator.

The whole contract is slow here (each case compiles an unrolled interpretation); the default run takes a sample of it.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import pytest
from attention_cases import FAST_COMPILE, FEATURES, AttentionContract, check, make_case, make_spec
from simulator import SIMULATOR, recorded_races

from pallas_kernels.ragged_paged_attention import tpu
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

_attend = jax.jit(tpu.attend, static_argnums=3, static_argnames="interpret", compiler_options=FAST_COMPILE)


class Interpreted(AttentionContract):
    base = {"block_size": 32, "num_heads": 2, "num_kv_heads": 1}

    def attend(
        self, q: jax.Array, pool: KVPool, batch: RaggedBatch, spec: AttentionSpec, sinks: object
    ) -> jax.Array:  # [T, Hq, D]
        return _attend(q, pool, batch, spec, sinks, interpret=True)

    def supports(self, spec: AttentionSpec) -> str | None:
        return tpu.supports(spec)

    def kv_layout(self, spec: AttentionSpec) -> KVLayout:
        return tpu.kv_layout(spec)


@pytest.mark.slow
class TestTpu(Interpreted):
    pass


class TestTpuSample:
    """One case of each kind, small."""

    impl = Interpreted()

    def test_decode_around_block_edges_and_empty_rows(self) -> None:
        spec = self.impl.spec()
        self.impl.run([(1, 1), (31, 1), (0, 0), (32, 1), (33, 1), (229, 1), (0, 0)], spec, table_width=9)

    @pytest.mark.parametrize("feature", ["everything", "fp8"])
    def test_mixed(self, feature: str) -> None:
        spec = self.impl.spec(**FEATURES[feature], num_heads=3)
        self.impl.run([(9, 1), (131, 73), (32, 4), (0, 0), (192, 1), (33, 9)], spec)

    @pytest.mark.parametrize("block_size", [64, 128, 256])
    def test_larger_blocks(self, block_size: int) -> None:
        B = block_size
        self.impl.run([(B + 1, 1), (1, 1), (2 * B, 1)], self.impl.spec(block_size=B))

    def test_group_of_16(self) -> None:
        self.impl.run([(70, 2), (3, 3)], self.impl.spec(num_heads=16))

    def test_two_heads_of_256_and_a_few_tokens(self) -> None:
        spec = self.impl.spec(head_dim=256, num_heads=2, num_kv_heads=2)
        self.impl.run([(70, 2), (3, 3)], spec)


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        ([(70, 1), (1, 1), (0, 0), (40, 1), (33, 1)], {"num_kv_heads": 2}),  # decode
        ([(70, 1), (30, 9), (12, 12), (40, 3)], {"num_kv_heads": 1, "kv_dtype": "int8", "sliding_window": 20}),
    ],
    ids=["decode", "mixed_int8_window"],
)
def test_no_access_races_with_a_dma_or_reads_what_was_never_written(
    rows: list[tuple[int, int]], changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of one block, so that tiny contexts have several of them.
    monkeypatch.setattr(tpu, "_CHUNK_BYTES", 1 << 15)
    spec = make_spec(block_size=32, num_heads=2, **changes)
    jax.clear_caches()
    with recorded_races() as races:
        check(partial(_attend, interpret=SIMULATOR), make_case(spec, rows, layout=tpu.kv_layout(spec)))
    assert len(races) == 2  # short rows and long rows
    assert not any(state.races_found for state in races)


def test_the_simulator_finds_a_missing_wait() -> None:
    """That the test above can fail."""
    program = Path(__file__).with_name("planted_race.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == {"waits": False, "reads_first": True}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 16}, "block_size 16 (it does 32, "),  # the smallest legal one
        ({"head_dim": 512}, "head_dim 512"),
        ({"num_heads": 17, "num_kv_heads": 1}, "17 query heads"),
        ({"dtype": "float16"}, "dtype float16"),
        ({"kv_dtype": "int4"}, "kv_dtype int4"),
        ({"num_heads": 512, "num_kv_heads": 32, "head_dim": 256, "block_size": 256}, "don't fit into 40 MiB of VMEM"),
    ],
)
def test_a_refusal_names_what_is_not_supported(change: dict[str, object], named: str) -> None:
    refusal = tpu.supports(make_spec(**{"block_size": 64, **change}))
    assert refusal is not None and named in refusal


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8, 16, 32])
def test_what_is_not_refused_fits_into_every_generation(num_kv_heads: int) -> None:
    """Buffers and the compiler's 24 MiB, of the 64 that a core has at least. Only the very largest are refused."""
    for group, head_dim, block_size, (dtype, kv_dtype) in itertools.product(
        (1, 2, 3, 4, 8, 16),
        (64, 128, 256),
        (32, 64, 128, 256),
        [("bfloat16", "bfloat16"), ("float32", "float32"), ("bfloat16", "int8"), ("bfloat16", "float8_e4m3fn")],
    ):
        spec = make_spec(
            num_heads=group * num_kv_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
            dtype=dtype, kv_dtype=kv_dtype,
        )  # fmt: skip
        if tpu.supports(spec) is not None:
            assert num_kv_heads == 32 and group >= 8 and dtype == "float32"
            continue
        for tile, max_chunk in ((8, 1024), (tpu._wide_tile(spec, 8192), 512)):
            shape = tpu.call_shape(spec, tpu.kv_layout(spec).storage_dim, 256, tile, max_chunk, num_cores=1)
            assert shape.vmem_bytes() + (24 << 20) <= 64 << 20


def test_scratch_of_the_docstring() -> None:
    """The VMEM that tpu.py's derivation states for Llama-3.1-8B."""
    spec = make_spec(num_heads=32, num_kv_heads=8, head_dim=128, block_size=128, dtype="bfloat16", kv_dtype="bfloat16")
    decode = tpu.call_shape(spec, 128, 256, tile=1, max_chunk=1024, num_cores=1)
    prefill = tpu.call_shape(spec, 128, 256, tile=128, max_chunk=512, num_cores=1)
    assert decode.chunk == prefill.chunk == 512
    assert round(decode.vmem_bytes() / 2**20, 1) == 4.2
    assert round(prefill.vmem_bytes() / 2**20) == 18
