"""A tile's results from registers to global memory, without a way through shared memory.

A store by TMA waits for the tile to be written to shared memory, for a fence, and then for the copy to have read it. Of
a decode tile's 64 rows most are padding: a few threads store the others directly, and nobody waits.

Shape letters: D head dim, N rows of the array that is written.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels import ptx


def store_rows(
    value: jax.Array,  # [rows, D]
    ref: Any,  # [N, D] in global memory
    first_row: jax.Array,  # int32[], of ref, for token 0
    num_tokens: jax.Array,  # int32[], that are stored
    *,
    layout: Any,  # of ``value``
    token_rows: int,  # rows of ``value`` that a token takes
    stored_rows: int,  # of them, those that are stored
    token_stride: int,  # rows of ``ref`` between tokens
) -> None:
    """Stores each token's first rows: row ``t * token_rows + i`` to row ``first_row + t * token_stride + i``."""

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def store(_: Any, value: Any, ref: Any, first_row: Any, num_tokens: Any) -> None:
        columns = ptx.i32(value.shape[1])
        for (row, column), register in zip(value.layout.thread_idxs(value.shape), value.registers.flat, strict=True):
            row, column = ptx.as_word(row), ptx.as_word(column)
            token = arith.divui(row, ptx.i32(token_rows))
            of_token = arith.remui(row, ptx.i32(token_rows))
            wanted = arith.cmpi(arith.CmpIPredicate.slt, token, num_tokens.registers.item())
            if stored_rows < token_rows:
                real = arith.cmpi(arith.CmpIPredicate.slt, of_token, ptx.i32(stored_rows))
                wanted = arith.andi(wanted, real)
            target = arith.addi(arith.muli(token, ptx.i32(token_stride)), of_token)
            target = arith.muli(arith.addi(first_row.registers.item(), target), columns)
            address = ptx.address(ref, arith.addi(target, column), value.mlir_dtype)
            ptx.store(address, _words(register), order="", predicate=wanted)

    store(value, ref, first_row, num_tokens)


def _words(register: Any) -> list[Any]:
    """The neighbouring values that a thread has of one row, as words; a single value of 16 bits as it is."""
    vector_type = ir.VectorType(register.type)
    num_bits = vector_type.shape[0] * mgpu.bitwidth(vector_type.element_type)
    bits = min(num_bits, 32)
    words = vector.bitcast(ir.VectorType.get((num_bits // bits,), ir.IntegerType.get_signless(bits)), register)
    return [vector.extract(words, [], [i]) for i in range(num_bits // bits)]
