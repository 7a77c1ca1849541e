"""How CTAs hand each other values inside one launch: each word is its own flag.

A word that is ``EMPTY`` hasn't been written. Who needs it reads it until it is something else: that is one way through
the L2 cache, where a counter takes the writer's fence, the count, the reader's poll and then the read. Words are
written and read with relaxed accesses of the GPU's scope, which are single-copy atomic; no order between words is used.

``EMPTY`` is a NaN as float32 and as a pair of bfloat16 that no instruction makes: a NaN of arithmetic or of a
conversion is 0x7fffffff or 0x7fff.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels import ptx
from pallas_kernels.post_attention.plan import COLUMNS, ITEM_ROWS, TILE
from pallas_kernels.ragged_paged_attention.gpu_tile import smem_transforms

EMPTY = -1
_CHUNK = 4  # words that a thread reads at once

# A thread has 4 neighbouring columns of a row; a row's 16 threads are in one warp.
ITEM = plgpu.Layout.TILED(
    plgpu.Tiling(((ITEM_ROWS, COLUMNS), (ITEM_ROWS // 4, COLUMNS), (4,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_SUM = plgpu.ShapeDtypeStruct((ITEM_ROWS, COLUMNS), jnp.float32, layout=ITEM)


def publish_piece(
    piece: jax.Array,  # float32[64, M], in the WGMMA layout
    words: Any,  # int32[n] in global memory
    begin: jax.Array,  # int32[], of the words that are written
) -> None:
    """A piece of a sum, transposed: ``[M, 64]`` words."""

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), ptx.SCALAR))
    def store(_: Any, piece: Any, words: Any, begin: Any) -> None:
        first = ptx.address(words, begin.registers.item())
        for (column, row), pair in zip(piece.layout.thread_idxs(piece.shape), piece.registers.flat, strict=True):
            place = arith.addi(arith.muli(ptx.as_word(row), ptx.i32(COLUMNS)), ptx.as_word(column))
            for i in range(2):
                value = arith.bitcast(ptx.word(), vector.extract(pair, [], [i]))
                ptx.store(mgpu.getelementptr(first, [arith.addi(place, ptx.i32(i * COLUMNS))], ptx.word()), [value])

    store(piece, words, begin)


def sum_pieces(
    words: Any,  # int32[n] in global memory
    begins: Sequence[Sequence[jax.Array]],  # int32[], of each sum's pieces: of their 8 rows of 64 words
    num_pieces: jax.Array,  # int32[], of those that count; the others may be any of them again
) -> list[jax.Array]:  # float32[8, 64]
    """Awaits the pieces and adds them in their order. Leaves their words empty for the next launch."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ptx.SCALAR, *[ptx.SCALAR] * sum(map(len, begins))), return_type=[_SUM] * len(begins)
    )
    def read(_: Any, words: Any, num_pieces: Any, *flat: Any) -> list[Any]:
        row, column = _item_place()
        place = arith.addi(arith.muli(row, ptx.i32(COLUMNS)), column)
        addresses = [ptx.address(words, arith.addi(place, begin.registers.item())) for begin in flat]
        values = _poll(addresses, _CHUNK)
        for address in addresses:
            ptx.store(address, [ptx.i32(EMPTY)] * _CHUNK)
        sums, rest = [], list(values)
        for pieces in begins:
            mine, rest = rest[: len(pieces)], rest[len(pieces) :]
            total = _floats(mine[0])
            for i, piece in enumerate(mine[1:], 1):
                counts = arith.cmpi(arith.CmpIPredicate.sgt, num_pieces.registers.item(), ptx.i32(i))
                total = arith.select(counts, arith.addf(total, _floats(piece)), total)
            sums.append(_item_array(total))
        return sums

    return read(words, num_pieces, *[begin for pieces in begins for begin in pieces])


def publish_item(
    value: jax.Array,  # bfloat16[8, 64] in the ITEM layout
    words: Any,  # int32[n] in global memory
    begin: jax.Array,  # int32[], of its first row
    stride: int,  # words between rows
) -> None:
    """Activations for the next product."""

    @plgpu.inline_mgpu(arg_types=(ITEM, plgpu.RefType(), ptx.SCALAR))
    def store(_: Any, value: Any, words: Any, begin: Any) -> None:
        row, column = _item_place()
        place = arith.addi(arith.muli(row, ptx.i32(stride)), arith.shrui(column, ptx.i32(1)))
        pairs = vector.bitcast(ir.VectorType.get((2,), ptx.word()), value.registers.item())
        ptx.store(
            ptx.address(words, arith.addi(begin.registers.item(), place)),
            [vector.extract(pairs, [], [i]) for i in range(2)],
        )

    store(value, words, begin)


def publish_rows(
    value: jax.Array,  # float32[8, 64] in the ITEM layout, the same in all columns
    words: Any,  # int32[n] in global memory
    begin: jax.Array,  # int32[], of its first row
    stride: int,  # words between rows
) -> None:
    """A word for each row."""

    @plgpu.inline_mgpu(arg_types=(ITEM, plgpu.RefType(), ptx.SCALAR))
    def store(_: Any, value: Any, words: Any, begin: Any) -> None:
        row, column = _item_place()
        with mgpu.when(arith.cmpi(arith.CmpIPredicate.eq, column, ptx.i32(0))):
            address = ptx.address(words, arith.addi(begin.registers.item(), arith.muli(row, ptx.i32(stride))))
            ptx.store(address, [arith.bitcast(ptx.word(), vector.extract(value.registers.item(), [], [0]))])

    store(value, words, begin)


def sum_rows(
    words: Any,  # int32[n] in global memory
    begin: jax.Array,  # int32[], of the first row
    stride: int,  # words between rows
    num_words: int,  # of a row
) -> jax.Array:  # float32[8, 64], the same in all columns
    """Awaits the words of 8 rows and adds each row's in their order."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR), return_type=_SUM)
    def read(_: Any, words: Any, begin: Any) -> Any:
        row, _ = _item_place()
        first = arith.addi(begin.registers.item(), arith.muli(row, ptx.i32(stride)))
        whole = num_words // _CHUNK * _CHUNK
        chunks = _poll([ptx.address(words, arith.addi(first, ptx.i32(i))) for i in range(0, whole, _CHUNK)], _CHUNK)
        singles = _poll([ptx.address(words, arith.addi(first, ptx.i32(i))) for i in range(whole, num_words)], 1)
        values = [arith.bitcast(ir.F32Type.get(), word) for group in (*chunks, *singles) for word in group]
        total = functools.reduce(arith.addf, values)
        return _item_array(vector.broadcast(ir.VectorType.get((_CHUNK,), ir.F32Type.get()), total))

    return read(words, begin)


def receive(
    source: Any,  # int32[n] words of [M, num_slices * slice_len] bfloat16 from ``begin`` on, or that matrix itself
    begin: int,
    num_slices: int,
    tiles: Any,  # bfloat16[slots, U, M, slice_len] in shared memory
    slot: jax.Array,  # int32[], of the tiles
    first: jax.Array,  # int32[], slice of the first unit; past the last one comes the first again
    num_units: jax.Array,  # int32[], that are asked for, at least 1
    *,
    polled: bool,
) -> None:
    """Copies units of activations into shared memory, where the tensor cores find them; all at once."""
    _, U, M, slice_len = tiles.shape
    row_chunks, row_tiles = slice_len // 8, slice_len // TILE  # a chunk is 16 bytes
    row_words = num_slices * slice_len // 2

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(smem_transforms(TILE, jnp.bfloat16)), *[ptx.SCALAR] * 3)
    )
    def copy(_: Any, source: Any, tiles: Any, slot: Any, first: Any, num_units: Any) -> None:
        slot, first, num_units = (x.registers.item() for x in (slot, first, num_units))
        thread = ptx.thread()
        slot_place = arith.muli(slot, ptx.i32(U * M * slice_len * 2))
        last = arith.subi(num_units, ptx.i32(1))
        addresses, places = [], []
        for i in range(U * M * row_chunks // ptx.WARPGROUP):
            chunk = arith.addi(thread, ptx.i32(i * ptx.WARPGROUP))
            rows, column = arith.divui(chunk, ptx.i32(row_chunks)), arith.remui(chunk, ptx.i32(row_chunks))
            unit, row = arith.divui(rows, ptx.i32(M)), arith.remui(rows, ptx.i32(M))
            # Past the last unit that is asked for, that one again.
            wanted = arith.remui(arith.addi(first, arith.minui(unit, last)), ptx.i32(num_slices))
            word = arith.addi(arith.muli(row, ptx.i32(row_words)), arith.muli(wanted, ptx.i32(slice_len // 2)))
            addresses.append(
                ptx.address(source, arith.addi(word, arith.addi(ptx.i32(begin), arith.muli(column, ptx.i32(_CHUNK)))))
            )
            # Tiles of 8 rows of 128 bytes, whose chunks are swizzled.
            row_tile, in_tile = arith.divui(rows, ptx.i32(8)), arith.remui(rows, ptx.i32(8))
            tile = arith.addi(arith.muli(row_tile, ptx.i32(row_tiles)), arith.divui(column, ptx.i32(8)))
            swizzled = arith.muli(arith.xori(arith.remui(column, ptx.i32(8)), in_tile), ptx.i32(16))
            place = arith.addi(arith.muli(tile, ptx.i32(1024)), arith.addi(arith.muli(in_tile, ptx.i32(128)), swizzled))
            places.append(arith.addi(slot_place, place))
        values = _poll(addresses, _CHUNK) if polled else [ptx.load(address, _CHUNK) for address in addresses]
        base = mgpu.memref_ptr(tiles)
        for place, words in zip(places, values, strict=True):
            address = mgpu.getelementptr(base, [place], ir.IntegerType.get_signless(8))
            mgpu.inline_ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", address, *words, has_side_effects=True)

    copy(source, tiles, slot, first, num_units)


def empty(words: Any, cta: jax.Array, num_ctas: int) -> None:  # int32[n] in global memory, int32[]
    """Empties this CTA's share of the words, with one warpgroup."""
    [size] = words.shape
    share = ptx.WARPGROUP * _CHUNK

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR))
    def store(_: Any, words: Any, cta: Any) -> None:
        thread = ptx.thread()
        mine = arith.muli(arith.addi(arith.muli(cta.registers.item(), ptx.i32(ptx.WARPGROUP)), thread), ptx.i32(_CHUNK))
        for i in range(-(-size // (share * num_ctas))):
            place = arith.addi(mine, ptx.i32(i * share * num_ctas))
            with mgpu.when(arith.cmpi(arith.CmpIPredicate.slt, place, ptx.i32(size))):
                ptx.store(ptx.address(words, place), [ptx.i32(EMPTY)] * _CHUNK)

    store(words, cta)


def _item_place() -> tuple[Any, Any]:
    """Row and first column of a thread in the ITEM layout."""
    [place] = ITEM.to_mgpu().thread_idxs((ITEM_ROWS, COLUMNS))
    row, column = (ptx.as_word(index) for index in place)
    return row, column


def _item_array(value: Any) -> Any:
    """Of a vector<4xf32> of each thread."""
    layout = ITEM.to_mgpu()
    registers = np.array([value], dtype=object).reshape(layout.registers_shape((ITEM_ROWS, COLUMNS)))
    return mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _floats(words: Sequence[Any]) -> Any:
    integers = vector.from_elements(ir.VectorType.get((len(words),), ptx.word()), list(words))
    return vector.bitcast(ir.VectorType.get((len(words),), ir.F32Type.get()), integers)


def _poll(addresses: Sequence[Any], num_words: int) -> list[list[Any]]:
    """Reads the words at each address until none of all is empty; always all, so that they come together."""
    if not addresses:
        return []
    types = [ptx.word()] * (1 + num_words * len(addresses))
    loop = scf.WhileOp(types, [ptx.i32(0)])
    with ir.InsertionPoint(loop.before.blocks.append(ptx.word())) as point:
        times = arith.addi(point.block.arguments[0], ptx.i32(1))
        words = [word for address in addresses for word in ptx.load(address, num_words)]
        largest = functools.reduce(arith.maxui, words)
        scf.condition(arith.cmpi(arith.CmpIPredicate.eq, largest, ptx.i32(EMPTY)), [times, *words])
    with ir.InsertionPoint(loop.after.blocks.append(*types)) as point:
        times = point.block.arguments[0]
        ptx.give_up_after(times)
        scf.yield_([times])
    words = list(loop.results)[1:]
    return [words[i : i + num_words] for i in range(0, len(words), num_words)]
