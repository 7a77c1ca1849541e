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

_SCALAR = plgpu.Layout.WG_SPLAT(())


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

    @plgpu.inline_mgpu(arg_types=(layout, plgpu.RefType(), _SCALAR, _SCALAR))
    def store(_: Any, value: Any, ref: Any, first_row: Any, num_tokens: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)

        def constant(number: int) -> Any:
            return mgpu.c(number, i32)

        base, columns = mgpu.memref_ptr(ref), value.shape[1]
        for (row, column), register in zip(value.layout.thread_idxs(value.shape), value.registers.flat, strict=True):
            row, column = arith.index_castui(i32, row), arith.index_castui(i32, column)
            token, of_token = arith.divui(row, constant(token_rows)), arith.remui(row, constant(token_rows))
            wanted = arith.cmpi(arith.CmpIPredicate.slt, token, num_tokens.registers.item())
            if stored_rows < token_rows:
                real = arith.cmpi(arith.CmpIPredicate.slt, of_token, constant(stored_rows))
                wanted = arith.andi(wanted, real)
            target = arith.addi(arith.muli(token, constant(token_stride)), of_token)
            target = arith.muli(arith.addi(first_row.registers.item(), target), constant(columns))
            address = mgpu.getelementptr(base, [arith.addi(target, column)], value.mlir_dtype)
            _store(address, register, wanted)

    store(value, ref, first_row, num_tokens)


def _store(address: Any, register: Any, predicate: Any) -> None:
    """The neighbouring values that a thread has of one row."""
    [num_values] = ir.VectorType(register.type).shape
    num_bits = num_values * mgpu.bitwidth(ir.VectorType(register.type).element_type)
    word_bits = min(num_bits, 32)
    num_words = num_bits // word_bits
    word = ir.IntegerType.get_signless(word_bits)
    words = vector.bitcast(ir.VectorType.get((num_words,), word), register)
    values = [vector.extract(words, [], [i]) for i in range(num_words)]
    kind = "" if num_words == 1 else f".v{num_words}"
    places = ", ".join(f"${i + 1}" for i in range(num_words))
    places = places if num_words == 1 else f"{{{places}}}"
    mgpu.inline_ptx(
        f"st.global{kind}.b{word_bits} [$0], {places};", address, *values, predicate=predicate, has_side_effects=True
    )
