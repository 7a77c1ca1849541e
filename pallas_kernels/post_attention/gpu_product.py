"""A product of few rows for Hopper, with what precedes and follows it: weights stream through, all else is small.

A CTA has one tile (product_plan.py). One warpgroup (wg 1) copies slices of the weight, and of the activations beside
them, by TMA into a ring of shared memory; wg 0 multiplies the weight, transposed, by the activations, so that a product
is as wide as there are rows. What the caller needs besides the sums is read before the first slice is there.

CTAs of a cluster, which share a tile, hand each other their sums over distributed shared memory: each gives every one
that finishes rows what it has of those, and those add what they got in the order of the ranks, so that results don't
depend on time. Stores count themselves at the other's barrier when they're done. Who finishes waits for all; the others
end before, and nobody writes to them.

| barrier | of | arrives | waits |
|---|---|---|---|
| full | each slot of the ring | TMA | wg 0 |
| free | each slot | wg 0 | wg 1 |
| arrived | the cluster's sums | wg 0 of every rank | wg 0 |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.lane import when
from pallas_kernels.post_attention.gpu_columns import LAYOUT, NUM_WARPS
from pallas_kernels.post_attention.plan import COLUMNS
from pallas_kernels.post_attention.product_plan import SLICE, ProductPlan, plan_ahead
from pallas_kernels.ragged_paged_attention.gpu_tile import smem_tile, smem_transforms

_SUM_TILES = (32, 16, 8)  # columns of float32 that shared memory holds as one tile


class Place(NamedTuple):
    """What a warpgroup finishes: ``num_rows`` rows from ``row`` on of the 64 columns from ``column`` on."""

    tile: jax.Array  # int32[]
    column: jax.Array  # int32[]
    row: jax.Array  # int32[]
    num_rows: int
    scratch: Any  # ref float32[4, num_rows] in shared memory


# (place, refs of what is read, refs of what is written) -> what is done with each part's sums, float32[64, num_rows]
Prepare = Callable[[Place, Sequence[Any], Sequence[Any]], Callable[[Sequence[jax.Array]], None]]


def product(
    name: str,
    x: jax.Array,  # bfloat16[M, K]
    weight: jax.Array,  # bfloat16[K, num_parts * N]
    read: Sequence[jax.Array],
    written: Sequence[jax.ShapeDtypeStruct],
    prepare: Prepare,
    plan: ProductPlan,
    following: tuple[jax.Array, ProductPlan] | None,
) -> Sequence[jax.Array]:  # as ``written``
    """One launch, called so in traces. ``prepare`` reads what it needs, and says what becomes of the sums.

    ``following``: weight and plan of the product that is launched next, if it is.
    """
    M, _ = x.shape
    P, C, R = plan.num_parts, plan.split, plan.share_rows
    N = weight.shape[1] // P

    def kernel(x_ref: Any, w_ref: Any, *refs: Any) -> None:
        refs, ahead_ref = (refs[1:], refs[0]) if following else (refs, None)
        *operands, (x_smem, w_smem, full, free, scratch, *exchange) = refs
        wg, tile = lax.axis_index("wg"), lax.axis_index("tile")
        rank = lax.axis_index("rank") if C > 1 else jnp.int32(0)

        def stream() -> None:
            @pl.loop(0, plan.num_slices)
            def _(i: jax.Array) -> None:
                slot = lax.rem(i, jnp.int32(plan.stages))

                @when(i >= plan.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                depth = pl.ds((rank * plan.num_slices + i) * SLICE, SLICE)
                for part in range(P):
                    columns = pl.ds(part * N + tile * COLUMNS, COLUMNS)
                    plgpu.copy_gmem_to_smem(w_ref.at[depth, columns], w_smem.at[slot, part], full.at[slot])
                plgpu.copy_gmem_to_smem(x_ref.at[:, depth], x_smem.at[slot], full.at[slot])

            if following:
                _ask_for(ahead_ref, following[1], tile * C + rank, plan.num_ctas)

        def multiply(*sums: Any) -> tuple[jax.Array, ...]:
            @pl.loop(0, plan.num_slices)
            def _(i: jax.Array) -> None:
                slot = lax.rem(i, jnp.int32(plan.stages))
                plgpu.barrier_wait(full.at[slot])
                for part, acc in enumerate(sums):
                    plgpu.wgmma(acc, w_smem.at[slot, part].transpose((1, 0)), x_smem.at[slot].transpose((1, 0)))
                # The slice before is done: what it read is free.
                plgpu.wgmma_wait(P)

                @when(i > 0)
                def _() -> None:
                    plgpu.barrier_arrive(free.at[lax.rem(i - 1, jnp.int32(plan.stages))])

            plgpu.wgmma_wait(0)
            return tuple(acc[...] for acc in sums)

        def hand_over(sums: Sequence[jax.Array]) -> None:
            shares, arrived = exchange
            for finisher in range(M // R):
                for part, value in enumerate(sums):
                    plgpu.async_store_smem(
                        value[:, finisher * R : (finisher + 1) * R],
                        shares.at[rank, part],
                        arrived,
                        cluster_idx=jnp.int32(finisher),
                        cluster_dim="rank",
                        optimized=False,
                    )

        def add() -> list[jax.Array]:
            shares, arrived = exchange
            plgpu.barrier_wait(arrived)
            sums = []
            for part in range(P):
                total = plgpu.load(shares.at[0, part], layout=LAYOUT, optimized=False)
                for other in range(1, C):
                    total = total + plgpu.load(shares.at[other, part], layout=LAYOUT, optimized=False)
                sums.append(total)
            return sums

        def compute() -> None:
            # Ranks that finish nothing prepare like the last one that does.
            row = jnp.minimum(rank * R, M - R)
            place = Place(tile, tile * COLUMNS, row, R, scratch)
            finish = prepare(place, operands[: len(read)], operands[len(read) :])
            sums = pl.run_scoped(multiply, *[plgpu.ACC((COLUMNS, M), jnp.float32)] * P)
            if C == 1:
                finish(sums)
                return
            hand_over(sums)
            when(rank < M // R)(lambda: finish(add()))

        when(wg == 0)(compute)
        when(wg == 1)(stream)

    return plgpu.kernel(
        kernel,
        out_type=written,
        grid=(plan.num_tiles,),
        grid_names=("tile",),
        cluster=(C,) if C > 1 else (),
        cluster_names=("rank",) if C > 1 else (),
        num_threads=2,
        thread_name="wg",
        scratch_types=[_scratch_types(M, plan)],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # What one warpgroup tells another goes over barriers that are said here.
            unsafe_no_auto_barriers=True,
            # Layouts are said here: to infer them takes longer than all else of lowering a step.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name=f"post_attention_{name}",
    )(x, weight, *([following[0]] if following else []), *read)


def _scratch_types(num_rows: int, plan: ProductPlan) -> list[Any]:
    """The ring with its barriers, room for sums of squares, and of a cluster what it exchanges."""
    P, C, R = plan.num_parts, plan.split, plan.share_rows
    ring = [
        smem_tile((plan.stages, num_rows, SLICE), jnp.bfloat16),
        smem_tile((plan.stages, P, SLICE, COLUMNS), jnp.bfloat16),
        plgpu.Barrier(num_arrivals=P + 1, num_barriers=plan.stages),
        plgpu.Barrier(num_barriers=plan.stages),
        plgpu.SMEM((NUM_WARPS, R), jnp.float32),
    ]
    if C == 1:
        return ring
    columns = next(columns for columns in _SUM_TILES if R % columns == 0)
    shares = plgpu.SMEM((C, P, COLUMNS, R), jnp.float32, transforms=smem_transforms(columns, jnp.float32))
    # One barrier: JAX 0.11 counts an index twice where it is another CTA's that is arrived at.
    return [*ring, shares, plgpu.Barrier(num_arrivals=C * P)]


def _ask_for(weight: Any, plan: ProductPlan, cta: jax.Array, num_ctas: int) -> None:
    """Has a CTA's part of what a product begins with brought into the L2 cache."""
    ahead = plan_ahead(plan, num_ctas)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR))
    def ask(_: Any, weight: Any, cta: Any) -> None:
        begin = arith.muli(cta.registers.item(), ptx.i32(ahead.part_bytes))
        size = arith.minui(arith.subi(ptx.i32(ahead.run_bytes), begin), ptx.i32(ahead.part_bytes))
        wanted = arith.andi(
            ptx.less(begin, ptx.i32(ahead.run_bytes)), arith.cmpi(arith.CmpIPredicate.eq, ptx.thread(), ptx.i32(0))
        )
        for rank in range(plan.split):
            first = arith.addi(begin, ptx.i32(rank * ahead.rank_bytes))
            address = ptx.address(weight, first, ir.IntegerType.get_signless(8))
            mgpu.inline_ptx(
                "cp.async.bulk.prefetch.L2.global [$0], $1;", address, size, predicate=wanted, has_side_effects=True
            )

    ask(weight, cta)
