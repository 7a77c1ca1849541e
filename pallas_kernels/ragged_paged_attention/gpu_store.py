"""A tile's results from registers to global memory, without a way through shared memory.

A store by TMA waits for the tile to be written to shared memory, for a fence, and then for the copy to have read it.
Here the threads that have columns which are no padding store them directly, and nobody waits.

Shape letters: D head dim, M columns (queries) of a tile, N rows of the array that is written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import ptx


def store_columns(
    value: jax.Array,  # [D, M] in the WGMMA layout
    ref: Any,  # [N, D] in global memory
    first_row: jax.Array,  # int32[], of ref, for token 0
    num_tokens: jax.Array,  # int32[], that are stored
    *,
    token_rows: int,  # columns of ``value`` that a token takes
    stored_rows: int,  # of them, those that are stored
    token_stride: int,  # rows of ``ref`` between tokens
) -> None:
    """Stores each token's first columns: ``t * token_rows + i`` to row ``first_row + t * token_stride + i``."""
    dim, _ = value.shape

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: Any, value: Any, ref: Any, first_row: Any, num_tokens: Any) -> None:
        bits = ir.IntegerType.get_signless(mgpu.bitwidth(value.mlir_dtype))
        for (column, row), pair in zip(value.layout.thread_idxs(value.shape), value.registers.flat, strict=True):
            column = ptx.as_word(column)
            for i in range(2):
                row_i = arith.addi(ptx.as_word(row), ptx.i32(i))
                token, of_token = arith.divui(row_i, ptx.i32(token_rows)), arith.remui(row_i, ptx.i32(token_rows))
                wanted = ptx.less(token, num_tokens.registers.item())
                if stored_rows < token_rows:
                    wanted = arith.andi(wanted, ptx.less(of_token, ptx.i32(stored_rows)))
                target = arith.addi(arith.muli(token, ptx.i32(token_stride)), of_token)
                target = arith.addi(first_row.registers.item(), target)
                place = arith.addi(arith.muli(target, ptx.i32(dim)), column)
                register = arith.bitcast(bits, vector.extract(pair, [], [i]))
                ptx.store(ptx.address(ref, place, value.mlir_dtype), [register], order="", predicate=wanted)

    store(value, ref, first_row, num_tokens)


def store_zeros(
    ref: Any,  # [N, D] in global memory
    first_token: jax.Array,  # int32[]
    end_token: int,
    step: int,  # tokens
    token_rows: int,  # rows of ``ref`` that a token has
) -> None:
    """Zeros for every ``step``-th token of a range."""
    num_words = token_rows * ref.shape[1] * jnp.dtype(ref.dtype).itemsize // 4
    chunk = 4 * ptx.WARPGROUP

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR))
    def store(_: Any, ref: Any, token: Any) -> None:
        mine = arith.muli(ptx.thread(), ptx.i32(4))
        first = arith.muli(token.registers.item(), ptx.i32(num_words))
        for i in range(-(-num_words // chunk)):
            word = arith.addi(mine, ptx.i32(i * chunk))
            inside = None if (i + 1) * chunk <= num_words else ptx.less(word, ptx.i32(num_words))
            ptx.store(ptx.address(ref, arith.addi(first, word)), [ptx.i32(0)] * 4, order="", predicate=inside)

    @pl.loop(0, lax.div(jnp.maximum(end_token - first_token, 0) + (step - 1), jnp.int32(step)))
    def _(i: jax.Array) -> None:
        store(ref, first_token + i * step)
