"""The Mosaic GPU kernels: what they refuse (anywhere), and the contract of every implementation (on a Hopper GPU).

Mosaic's interpreter runs no wgmma with operands in registers, which the prefill kernel uses, and no PTX, with which the
decode kernel stores: their numbers need the hardware.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import AttentionContract, check, make_case, make_spec

from pallas_kernels.ragged_paged_attention import gpu, gpu_decode, gpu_prefill
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, KVLayout, KVPool, RaggedBatch

BASE: dict[str, object] = {"dtype": "bfloat16", "kv_dtype": "bfloat16", "block_size": 64, "head_dim": 64}
SHARED_MEMORY = 227 << 10  # bytes that a block may have on Hopper


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32", "kv_dtype": "float32"}, "dtype is float32"),
        ({"kv_dtype": "int8"}, "kv_dtype is int8"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"block_size": 16}, "block_size is 16; the GPU kernel has (64, "),  # the smallest legal one
        ({"num_heads": 17, "num_kv_heads": 1}, "17 query heads share a KV head"),
    ],
)
def test_refusals_name_what_is_not_supported(changes: dict[str, object], reason: str) -> None:
    refusal = gpu.supports(make_spec(**{**BASE, **changes}))
    assert refusal is not None and refusal.startswith(reason)


@pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
@pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
@pytest.mark.parametrize("num_heads", range(1, gpu.MAX_GROUP + 1))
def test_required_shapes_are_supported_and_fit_into_shared_memory(head_dim: int, kv_dtype: str, num_heads: int) -> None:
    spec = make_spec(**{**BASE, "num_heads": num_heads, "num_kv_heads": 1, "head_dim": head_dim, "kv_dtype": kv_dtype})
    assert gpu.supports(spec) is None
    assert gpu.kv_layout(spec) == KVLayout(storage_dim=head_dim)
    decode, prefill = gpu.configs(spec)
    fp8 = kv_dtype != "bfloat16"
    # Queries and their copy for wgmma, the softmax's weights and its maxima, K and V, and widened V.
    rows = gpu.decode_tile_tokens(spec, None) * gpu_decode.group_rows(spec)
    decode_bytes = rows * (head_dim * (2 + 2) + 64 * 2 + 128 + 4)
    decode_bytes += decode.stages * 64 * head_dim * 2 * (1 if fp8 else 2) + decode.wide_stages * 64 * head_dim * 2
    prefill_bytes = 128 * head_dim * (2 + 2) + prefill.stages * prefill.block_kv * head_dim * 2 * 2
    prefill_bytes += fp8 * prefill.raw_stages * 64 * head_dim
    assert decode_bytes < SHARED_MEMORY - 2048
    assert prefill_bytes < SHARED_MEMORY - 2048


@pytest.mark.parametrize("num_heads", range(1, gpu.MAX_GROUP + 1))
def test_tiles_hold_whole_tokens(num_heads: int) -> None:
    spec = make_spec(**{**BASE, "num_heads": num_heads, "num_kv_heads": 1})
    for head_dim in gpu.HEAD_DIMS:
        spec = make_spec(**{**BASE, "num_heads": num_heads, "num_kv_heads": 1, "head_dim": head_dim})
        assert num_heads <= gpu_decode.group_rows(spec) <= num_heads + 8
        assert gpu.decode_tile_tokens(spec, 1) == 1
        assert gpu.decode_tile_tokens(spec, None) == gpu.decode_tile_tokens(spec, 8) >= 2
    assert gpu_prefill.ROWS // 2 < gpu_prefill.tile_tokens(spec) * num_heads <= gpu_prefill.ROWS


def test_registers_of_a_block_suffice() -> None:
    """setmaxnreg waits forever for registers that the block wasn't given at its start."""
    for kv_dtype in gpu.KV_DTYPES:
        for head_dim in gpu.HEAD_DIMS:
            decode, _ = gpu.configs(make_spec(**{**BASE, "kv_dtype": kv_dtype, "head_dim": head_dim}))
            fetchers = 1 if kv_dtype == "bfloat16" else 2
            asked = decode.compute_registers + decode.memory_registers + decode.widen_registers
            warpgroups = 1 + fetchers
            # A thread starts with a multiple of 8 registers.
            assert asked <= warpgroups * (65536 // (warpgroups * 128) // 8 * 8)


@pytest.mark.gpu
class TestPallasGpu(AttentionContract):
    base = BASE

    def attend(
        self, q: jax.Array, pool: KVPool, batch: RaggedBatch, spec: AttentionSpec, sinks: object
    ) -> jax.Array:  # [T, Hq, D]
        return gpu.attend(q, pool, batch, spec, sinks)

    def supports(self, spec: AttentionSpec) -> str | None:
        return gpu.supports(spec)

    def kv_layout(self, spec: AttentionSpec) -> KVLayout:
        return gpu.kv_layout(spec)

    def run(self, rows: list[tuple[int, int]], spec: AttentionSpec, **sizes: int) -> None:
        """Pads batches to a few sizes: each further one compiles kernels of its own, for seconds."""
        used = sum(width for _, width in rows)
        rows = [*rows, *[(0, 0)] * (8 - len(rows))]
        longest = max(context for context, _ in rows)
        defaults = {
            "num_tokens": 8 if used <= 8 else -(-used // 256) * 256,  # T <= R: without the prefill kernel
            "table_width": 8 if longest <= 8 * spec.block_size else 80,
            "num_blocks": 128 if longest <= 8 * spec.block_size else 256,
        }
        super().run(rows, spec, **{**defaults, **sizes})

    def test_batches_without_padding(self) -> None:
        super().run([(300, 9), (70, 1), (64, 64), (9, 2)], self.spec())
        super().run([(300, 1), (70, 1), (64, 1), (1, 1)], self.spec())

    @pytest.mark.parametrize("num_heads", [3, 8, 96])
    def test_padding_tokens_get_zeros(self, num_heads: int) -> None:
        """More of them than workers; also of more heads than a tile has rows."""
        spec = self.spec(num_heads=num_heads, num_kv_heads=num_heads if num_heads < 8 else 8)
        for rows in ([(70, 1), (300, 1)], [(70, 1), (300, 200)]):
            used = sum(width for _, width in rows)
            for num_rows in (len(rows), 512):  # with and without the prefill kernel
                case = make_case(
                    spec, [*rows, *[(0, 0)] * (num_rows - len(rows))], layout=self.kv_layout(spec), num_tokens=512
                )
                out = np.asarray(gpu.attend(case.q, case.pool, case.batch, spec).astype(jnp.float32))
                np.testing.assert_array_equal(out[used:], 0.0)
                assert np.abs(out[:used]).max() > 0

    @pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
    @pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
    def test_prefill_beside_decode(self, head_dim: int, kv_dtype: str) -> None:
        rows = [(1000, 1000), (700, 300), (65, 1), (400, 20), (90, 9), (5, 5), (0, 0), (300, 127), (4000, 1)]
        self.run(rows, self.spec(head_dim=head_dim, kv_dtype=kv_dtype, num_heads=8, scale=head_dim**-0.5))

    @pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
    @pytest.mark.parametrize("head_dim", gpu.HEAD_DIMS)
    def test_blocks_of_128(self, head_dim: int, kv_dtype: str) -> None:
        """Two units a block: split contexts, short rows beside a prefill, and a batch of the decode kernel alone."""
        spec = self.spec(head_dim=head_dim, kv_dtype=kv_dtype, block_size=128)
        self.run([(1000, 1000), (700, 300), (65, 1), (129, 20), (127, 9), (5, 5), (0, 0), (4000, 1)], spec)
        self.run([(4099, 1), (128, 1), (129, 1), (64, 1), (1, 1), (0, 0), (2050, 1)], spec)

    @pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
    @pytest.mark.parametrize(
        ("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 64), (7, 1, 128), (32, 2, 128), (6, 2, 256)]
    )
    def test_rows_that_are_known_to_have_one_token(
        self, num_heads: int, num_kv_heads: int, head_dim: int, kv_dtype: str
    ) -> None:
        spec = self.spec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            kv_dtype=kv_dtype,
            scale=head_dim**-0.5,
            has_sinks=True,
        )
        rows = [(1, 1), (64, 1), (65, 1), (0, 0), (1000, 1), (4099, 1), (127, 1), (0, 0)]
        case = make_case(spec, rows, layout=self.kv_layout(spec), num_tokens=8)
        check(self.attend, dataclasses.replace(case, batch=dataclasses.replace(case.batch, max_width=1)))

    @pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
    @pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(8, 128), (2, 64)])
    def test_rows_of_one_token_beside_prompts(self, num_kv_heads: int, head_dim: int, kv_dtype: str) -> None:
        """Rows of two to eight tokens are several tiles of the decode kernel, as many as it has tokens."""
        heads = {"num_heads": 4 * num_kv_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        spec = self.spec(**heads, kv_dtype=kv_dtype, scale=head_dim**-0.5)
        rows = [(1, 1), (65, 1), (0, 0), (2050, 1), (2, 2), (700, 5), (90, 9), (300, 300), (64, 1), (1500, 130)]
        for num_tokens in (None, 512):
            case = make_case(spec, rows, layout=self.kv_layout(spec), num_tokens=num_tokens)
            check(self.attend, dataclasses.replace(case, batch=dataclasses.replace(case.batch, max_width=1)))

    @pytest.mark.parametrize("window", [1, 100, 700])
    @pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
    def test_windows_over_split_contexts(self, kv_dtype: str, window: int) -> None:
        self.run([(4099, 1), (2050, 3), (700, 1)], self.spec(kv_dtype=kv_dtype, sliding_window=window))

    @pytest.mark.parametrize("kv_dtype", gpu.KV_DTYPES)
    def test_launches_that_share_a_plan(self, kv_dtype: str) -> None:
        """As a step's layers do: their workers count them in it. Each gives what it gives alone, bit for bit."""
        spec = self.spec(head_dim=128, num_heads=8, kv_dtype=kv_dtype, scale=128**-0.5)
        rows = [(4099, 1), (2050, 5), (77, 5), (1300, 3), (64 * 60, 1)]  # all split
        case = make_case(spec, [*rows, *[(0, 0)] * 11], layout=self.kv_layout(spec), num_tokens=16)
        # Equal calls would be merged into one.
        queries = [case.q * (1 + i / 64) for i in range(24)]

        def chain(queries: list[jax.Array], pool: KVPool, batch: RaggedBatch) -> list[jax.Array]:
            return [gpu.attend(q, pool, batch, spec) for q in queries]

        run = jax.jit(chain)
        compiled = run.lower(queries, case.pool, case.batch).compile()
        assert compiled.as_text().count('custom_call_target="mosaic_gpu_v2"') == len(queries)
        together = [compiled(queries, case.pool, case.batch) for _ in range(3)]
        alone = [run([q], case.pool, case.batch)[0] for q in queries]
        check(lambda *_: together[0][0], case)
        for outs in together:
            for out, want in zip(outs, alone, strict=True):
                np.testing.assert_array_equal(np.asarray(out.astype(jnp.float32)), want.astype(jnp.float32))

    def test_prefill_beside_splits_repeats_itself(self) -> None:
        spec = self.spec(head_dim=128)
        case = make_case(spec, [(4099, 1), (300, 200), (77, 5)], layout=self.kv_layout(spec))
        runs = [np.asarray(gpu.attend(case.q, case.pool, case.batch, spec).astype(jnp.float32)) for _ in range(2)]
        np.testing.assert_array_equal(*runs)

    def test_tuning_changes_speed_only(self) -> None:
        """Also with more workers than multiprocessors."""
        spec = self.spec()
        case = make_case(spec, [(3001, 1), (40, 4), (900, 1)], layout=self.kv_layout(spec))
        decode, prefill = gpu.configs(spec)
        out = [
            gpu.attend_tuned(
                case.q,
                case.pool,
                case.batch,
                spec,
                None,
                decode_config=dataclasses.replace(decode, **changes),
                prefill_config=prefill,
            ).astype(jnp.float32)
            for changes in (
                {},
                {"stages": 2},
                {"num_ctas": 264, "stages": 2},
                {"stages": 3},
            )
        ]
        for other in out[1:]:
            np.testing.assert_allclose(out[0], other, atol=1e-2, rtol=1e-2)
