"""Tiles of a transposed product in a warpgroup's registers: what goes in and out of them.

A tile is float32[64, R] in the WGMMA layout: 64 columns of a matrix in global memory down, R of its rows across. A
thread has, of a column, pairs of neighbouring rows: 2 * (lane % 4) + 8 * j and the one after it, for every j.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import ptx
from pallas_kernels.post_attention.plan import COLUMNS

LAYOUT = plgpu.Layout.WGMMA
_GROUP = 8  # rows that a quad of lanes has together
_QUADS = 8  # of a warp
_ACROSS_QUADS = (4, 8, 16)  # distances of lanes that have the same rows
NUM_WARPS = 4  # of a warpgroup


def load_tile(ref: Any, row: jax.Array, column: jax.Array, num_rows: int) -> jax.Array:
    """Of a ref bfloat16[M, N] in global memory, from a row and a column on: float32[64, num_rows]."""

    def values(ref: Any, row: Any, column: Any) -> Callable[[Any, Any], list[Any]]:
        width = ir.MemRefType(ref.type).shape[1]

        def pair(c: Any, r: Any) -> list[Any]:
            first = arith.addi(arith.muli(arith.addi(row, r), ptx.i32(width)), arith.addi(column, c))
            return [_load_bfloat16(ref, arith.addi(first, ptx.i32(i * width))) for i in range(2)]

        return pair

    return _make_tile(values, num_rows, ref, row, column)


def load_columns(ref: Any, column: jax.Array, num_rows: int) -> jax.Array:
    """Of a ref bfloat16[N] in global memory, from a column on, the same for every row: float32[64, num_rows]."""

    def values(ref: Any, column: Any) -> Callable[[Any, Any], list[Any]]:
        return lambda c, _: [_load_bfloat16(ref, arith.addi(column, c))] * 2

    return _make_tile(values, num_rows, ref, column)


def sum_over_first(ref: Any, row: jax.Array, num_rows: int) -> jax.Array:
    """Of a ref float32[n, M] in global memory, the sums over n of so many columns from ``row`` on: each row's in all of
    float32[64, num_rows]. Always added in the same order.
    """

    def values(ref: Any, row: Any) -> Callable[[Any, Any], list[Any]]:
        num_terms, width = ir.MemRefType(ref.type).shape
        f32 = ir.F32Type.get()
        quad = arith.divui(_lane(), ptx.i32(4))
        sums = []
        for j in range(num_rows // _GROUP):
            place = arith.addi(row, arith.addi(_first_row(), ptx.i32(j * _GROUP)))
            totals = [mgpu.c(0.0, f32)] * 2
            for n in range(0, num_terms, _QUADS):
                term = arith.addi(quad, ptx.i32(n))
                # Past the last term, that one again, and it doesn't count.
                counts = ptx.less(term, ptx.i32(num_terms))
                term = arith.minui(term, ptx.i32(num_terms - 1))
                address = ptx.address(ref, arith.addi(arith.muli(term, ptx.i32(width)), place))
                pair = [arith.bitcast(f32, word) for word in ptx.load(address, 2, order="")]
                totals = [
                    arith.select(counts, arith.addf(total, value), total)
                    for total, value in zip(totals, pair, strict=True)
                ]
            sums.append([_add_across_quads(total) for total in totals])
        found = iter(sums[j] for j in _groups(num_rows))
        return lambda *_: next(found)

    return _make_tile(values, num_rows, ref, row)


def store_tile(value: jax.Array, ref: Any, row: jax.Array, column: jax.Array) -> None:
    """Of bfloat16[64, R]: to a ref bfloat16[M, N] in global memory, from a row and a column on."""

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: Any, value: Any, ref: Any, row: Any, column: Any) -> None:
        width, i16 = ir.MemRefType(ref.type).shape[1], ir.IntegerType.get_signless(16)
        for (c, r), pair in zip(value.layout.thread_idxs(value.shape), value.registers.flat, strict=True):
            row_place = arith.muli(arith.addi(row.registers.item(), ptx.as_word(r)), ptx.i32(width))
            first = arith.addi(row_place, arith.addi(column.registers.item(), ptx.as_word(c)))
            for i in range(2):
                address = ptx.address(ref, arith.addi(first, ptx.i32(i * width)), value.mlir_dtype)
                ptx.store(address, [arith.bitcast(i16, vector.extract(pair, [], [i]))], order="")

    store(value, ref, row, column)


def store_sums(value: jax.Array, scratch: Any, ref: Any, first: jax.Array, row: jax.Array) -> None:
    """Of float32[64, R], the sums over 64: to a ref float32[n, M] in global memory, at ``first``, from ``row`` on.

    Args:
        scratch: ref float32[4, R] in shared memory, of this warpgroup.
    """
    num_rows = value.shape[1]

    @plgpu.inline_mgpu(arg_types=(LAYOUT, plgpu.RefType(), plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: Any, value: Any, scratch: Any, ref: Any, first: Any, row: Any) -> None:
        f32 = ir.F32Type.get()
        totals: dict[tuple[int, int], Any] = {}
        for j, pair in zip(_groups(num_rows), value.registers.flat, strict=True):
            for i in range(2):
                term = vector.extract(pair, [], [i])
                totals[j, i] = arith.addf(totals[j, i], term) if (j, i) in totals else term
        base = mgpu.memref_ptr(scratch)
        warp = arith.divui(ptx.thread(), ptx.i32(mgpu.WARP_SIZE))
        mine = arith.addi(arith.muli(warp, ptx.i32(num_rows)), _first_row())
        one_of_a_row = ptx.less(_lane(), ptx.i32(4))
        for (j, i), total in totals.items():
            place = arith.addi(mine, ptx.i32(j * _GROUP + i))
            mgpu.inline_ptx(
                "st.shared.f32 [$0], $1;",
                mgpu.getelementptr(base, [place], f32),
                _add_across_quads(total),
                predicate=one_of_a_row,
                has_side_effects=True,
            )
        mgpu.warpgroup_barrier()
        with mgpu.when(ptx.less(ptx.thread(), ptx.i32(num_rows))):
            terms = []
            for w in range(NUM_WARPS):
                place = arith.addi(ptx.thread(), ptx.i32(w * num_rows))
                address = mgpu.getelementptr(base, [place], f32)
                terms.append(
                    mgpu.inline_ptx("ld.shared.f32 $0, [$1];", address, result_types=f32, has_side_effects=True)
                )
            total = arith.addf(arith.addf(terms[0], terms[1]), arith.addf(terms[2], terms[3]))
            target = arith.muli(first.registers.item(), ptx.i32(ir.MemRefType(ref.type).shape[1]))
            target = arith.addi(target, arith.addi(row.registers.item(), ptx.thread()))
            ptx.store(ptx.address(ref, target), [arith.bitcast(ptx.word(), total)], order="")

    store(value, scratch, ref, first, row)


def _make_tile(values: Callable[..., Callable[[Any, Any], list[Any]]], num_rows: int, ref: Any, *scalars: Any) -> Any:
    """float32[64, num_rows]: ``values(ref, *scalars)`` gives for a thread's column and row its pair from there on."""
    shape = (COLUMNS, num_rows)
    kind = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=LAYOUT)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[ptx.SCALAR] * len(scalars)), return_type=kind)
    def make(_: Any, ref: Any, *scalars: Any) -> Any:
        layout = LAYOUT.to_mgpu()
        pair_type = ir.VectorType.get((2,), ir.F32Type.get())
        pair = values(ref, *(scalar.registers.item() for scalar in scalars))
        registers = np.empty(layout.registers_shape(shape), dtype=object)
        for place, (c, r) in zip(np.ndindex(registers.shape), layout.thread_idxs(shape), strict=True):
            registers[place] = vector.from_elements(pair_type, pair(ptx.as_word(c), ptx.as_word(r)))
        return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return make(ref, *scalars)


def _groups(num_rows: int) -> Iterator[int]:
    """The group of 8 rows that each register of a thread belongs to, in their order."""
    return iter(place[1] for place in np.ndindex(LAYOUT.to_mgpu().registers_shape((COLUMNS, num_rows))))


def _lane() -> Any:
    return arith.remui(ptx.thread(), ptx.i32(mgpu.WARP_SIZE))


def _first_row() -> Any:
    """Of a thread's first pair."""
    return arith.muli(arith.remui(_lane(), ptx.i32(4)), ptx.i32(2))


def _add_across_quads(value: Any) -> Any:
    for distance in _ACROSS_QUADS:
        value = arith.addf(value, mgpu.shfl_bfly(value, distance))
    return value


def _load_bfloat16(ref: Any, place: Any) -> Any:
    """As float32."""
    address = ptx.address(ref, place, ir.BF16Type.get())
    i16 = ir.IntegerType.get_signless(16)
    bits = mgpu.inline_ptx("ld.global.b16 $0, [$1];", address, result_types=i16, has_side_effects=True)
    return arith.bitcast(ir.F32Type.get(), arith.shli(arith.extui(ptx.word(), bits), ptx.i32(16)))
