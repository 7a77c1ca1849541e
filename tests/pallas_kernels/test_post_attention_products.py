"""What stands between two attentions in four launches: how each product is shared, and on a GPU what comes out."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from post_attention_operands import SPEC, check_errors, make_operands

from pallas_kernels.post_attention import api
from pallas_kernels.post_attention.plan import COLUMNS, Shape
from pallas_kernels.post_attention.product_plan import (
    MAX_ROWS,
    SLICE,
    ProductPlan,
    plan_ahead,
    plan_product,
    plan_products,
)
from pallas_kernels.post_attention.types import PostAttentionSpec

QWEN3 = Shape(M=64, A=2048, E=1024, F=3072, Q=4096)  # Qwen3-0.6B
QWEN3_1_7B = Shape(M=64, A=2048, E=2048, F=6144, Q=4096)
QWEN3_4B = Shape(M=8, A=4096, E=2560, F=9728, Q=6144)
LLAMA = Shape(M=8, A=4096, E=4096, F=14336, Q=6144)  # Llama-3.1-8B
NARROW = Shape(M=64, A=1024, E=640, F=5120, Q=4096)
ODD = Shape(M=56, A=2048, E=1152, F=6144, Q=3072)
SMEM = 228 << 10  # of a multiprocessor
CTA_SMEM = 227 << 10  # of one CTA

rows = st.integers(1, MAX_ROWS // 8).map(lambda n: 8 * n)
products = st.tuples(rows, st.integers(1, 160), st.integers(1, 300), st.integers(1, 2))


def smem(plan: ProductPlan, num_rows: int) -> int:
    """Bytes of a CTA's shared memory: buffers of whole KB, 8 for a barrier, and 1 KB that every CTA takes besides."""
    activations, weights = (plan.stages * SLICE * n * 2 for n in (num_rows, plan.num_parts * COLUMNS))
    shares = plan.split * plan.num_parts * COLUMNS * plan.share_rows * 4 if plan.split > 1 else 0
    buffers = activations, weights, 4 * plan.share_rows * 4, shares
    return sum(-(-size // 1024) * 1024 for size in buffers) + 8 * (2 * plan.stages + 1) + 1024


# -- how the work is shared -------------------------------------------------------------------------------------------


@given(products)
def test_a_plan_covers_its_product_and_fits(product: tuple[int, int, int, int]) -> None:
    num_rows, slices, tiles, parts = product
    plan = plan_product(num_rows, slices * SLICE, tiles * COLUMNS, parts, multiprocessors=132)
    if isinstance(plan, str):
        assert "CTAs" in plan
        return
    at_once = 132 * (2 if num_rows <= 16 else 1)
    assert plan.num_ctas <= at_once or not 0 < plan.num_ctas % at_once < at_once / 2, "none is left for the end"
    assert (plan.num_tiles, plan.num_parts, plan.split * plan.num_slices) == (tiles, parts, slices)
    assert plan.num_ctas >= 48 and plan.split <= 8
    assert plan.stages <= plan.num_slices
    assert plan.stages >= min(2, plan.num_slices), "one slice is on its way while another is multiplied"
    assert smem(plan, num_rows) <= CTA_SMEM + 1024
    if num_rows <= 16:
        assert 2 * smem(plan, num_rows) <= SMEM, "two CTAs share a multiprocessor"
    assert num_rows % plan.share_rows == plan.share_rows % 8 == 0
    assert num_rows // plan.share_rows <= plan.split, "each share of rows has a CTA that finishes it"


@given(products, st.integers(1, 400))
def test_what_is_asked_ahead_is_each_byte_once(product: tuple[int, int, int, int], num_ctas: int) -> None:
    num_rows, slices, tiles, parts = product
    plan = plan_product(num_rows, slices * SLICE, tiles * COLUMNS, parts, multiprocessors=132)
    if isinstance(plan, str):
        return
    ahead = plan_ahead(plan, num_ctas)
    assert ahead.rank_bytes * plan.split == slices * SLICE * tiles * COLUMNS * parts * 2
    assert 0 < ahead.run_bytes <= ahead.rank_bytes
    parts_of_a_run = [
        (begin, min(ahead.part_bytes, ahead.run_bytes - begin))
        for begin in (cta * ahead.part_bytes for cta in range(num_ctas))
        if begin < ahead.run_bytes
    ]
    assert all(number % 16 == 0 for part in parts_of_a_run for number in part) and ahead.rank_bytes % 16 == 0
    ends = [0, *(begin + size for begin, size in parts_of_a_run)]
    assert [begin for begin, _ in parts_of_a_run] == ends[:-1] and ends[-1] == ahead.run_bytes


def test_few_tiles_are_shared_by_clusters() -> None:
    def splits(shape: Shape) -> list[int]:
        return [plan.split for plan in plan_products(shape, 132)]

    assert splits(LLAMA) == splits(replace(LLAMA, M=64)) == [2, 1, 2, 1]
    assert splits(QWEN3) == [4, 1, 4, 1]
    assert splits(QWEN3_4B) == [2, 1, 4, 1]
    nemo = Shape(M=64, A=4096, E=5120, F=14336, Q=6144)
    assert splits(nemo) == [1, 1, 1, 1], "160 CTAs wouldn't run at once"
    assert splits(replace(nemo, M=8)) == [2, 1, 2, 1]
    assert splits(NARROW) == [8, 1, 8, 1]


@pytest.mark.parametrize(
    ("shape", "launches"),
    [
        (replace(QWEN3, M=8), 1),
        (replace(QWEN3, M=32), 1),
        (replace(QWEN3, M=40), 4),
        (QWEN3, 4),
        (LLAMA, 4),
        (replace(LLAMA, M=64), 4),
    ],
)
def test_small_layers_with_few_rows_are_one_launch(shape: Shape, launches: int) -> None:
    assert api.supports(shape, SPEC, jnp.bfloat16, num_ctas=132) is None
    assert api.num_launches(shape, 132) == launches
    assert (api.empty_words(shape, 132) is None) == (launches == 4)


def test_a_few_ctas_left_for_the_end_are_refused() -> None:
    """152 tiles of gate and up, one a multiprocessor with 64 rows: the last 20 would take as long as the others."""
    reason = api.supports(replace(QWEN3_4B, M=64), SPEC, jnp.bfloat16, num_ctas=132)
    assert "in four: a product of 2560 x 9728, 20 of whose 152 CTAs would come last" in reason


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [QWEN3, LLAMA, replace(QWEN3_1_7B, M=24), NARROW, ODD])
def test_the_kernels_are_traced_anywhere(shape: Shape) -> None:
    """Without a GPU as well, so that what JAX warns of is seen; that they compile is a gate's matter."""
    operands = jax.eval_shape(lambda: make_operands(shape))
    run = jax.jit(api.post_attention, static_argnums=(4, 5, 6))
    x, qkv, words = run.trace(*operands, None, SPEC, 132).out_info
    assert (x.shape, qkv.shape, words) == ((shape.M, shape.E), (shape.M, shape.Q), None)


def test_words_are_given_where_a_layer_is_one_launch_and_only_there() -> None:
    operands = jax.eval_shape(lambda: make_operands(QWEN3))
    with pytest.raises(ValueError, match="words are given; launches of a layer here: 4"):
        words = api.empty_words(replace(QWEN3, M=8), 132)
        jax.eval_shape(lambda *args: api.post_attention(*args, words, SPEC, 132), *operands)
    operands = jax.eval_shape(lambda: make_operands(replace(QWEN3, M=8)))
    with pytest.raises(ValueError, match="words are missing; launches of a layer here: 1"):
        jax.eval_shape(lambda *args: api.post_attention(*args, None, SPEC, 132), *operands)


@pytest.mark.gpu
class TestOnHopper:
    """Against the reference in float32, whose rounding errors in bfloat16 are the yardstick."""

    @staticmethod
    def run(operands: tuple, spec: PostAttentionSpec = SPEC) -> tuple[jax.Array, jax.Array]:
        run = jax.jit(api.post_attention, static_argnums=(4, 5, 6))
        x, qkv, words = run(*operands, None, spec, jax.devices()[0].core_count)
        assert words is None
        return x, qkv

    @pytest.mark.parametrize(
        ("shape", "spec"),
        [
            *((replace(QWEN3, M=rows), SPEC) for rows in (40, 64)),
            *((replace(LLAMA, M=rows), SPEC) for rows in (8, 24, 64)),
            *((replace(QWEN3_4B, M=rows), SPEC) for rows in (8, 16)),
            (replace(QWEN3_1_7B, M=48), SPEC),
            (NARROW, SPEC),
            (ODD, SPEC),
            *((shape, PostAttentionSpec(1e-5, 1.0, "gelu_tanh")) for shape in (QWEN3, LLAMA)),
        ],
        ids=str,
    )
    def test_it_errs_no_more_than_xla_does(self, shape: Shape, spec: PostAttentionSpec) -> None:
        assert api.num_launches(shape, 132) == 4
        operands = make_operands(shape, spec)
        check_errors(self.run(operands, spec), operands, spec)

    @pytest.mark.parametrize("shape", [QWEN3, LLAMA, replace(LLAMA, M=64)], ids=str)
    def test_runs_are_equal(self, shape: Shape) -> None:
        """Bit for bit, twenty in a row of two inputs in turn: sums are added in one order, whoever is first."""
        cases = [make_operands(shape, seed=seed) for seed in range(2)]
        first = [self.run(case) for case in cases]
        for number in range(20):
            for got, want in zip(self.run(cases[number % 2]), first[number % 2], strict=True):
                np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))

    def test_rows_of_nan_spoil_no_other(self) -> None:
        attended, x, layer, following = make_operands(LLAMA)
        want = self.run((attended, x, layer, following))
        got = self.run((attended.at[2].set(jnp.nan), x.at[5].set(jnp.inf), layer, following))
        spoiled = np.isin(np.arange(LLAMA.M), (2, 5))
        for mine, clean in zip(got, want, strict=True):
            mine, clean = (np.asarray(a, np.float32) for a in (mine, clean))
            np.testing.assert_array_equal(mine[~spoiled], clean[~spoiled])
            assert not np.isfinite(mine[spoiled]).all(axis=1).any()
