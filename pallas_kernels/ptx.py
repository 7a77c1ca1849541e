"""Single threads' accesses to global memory, inside ``plgpu.inline_mgpu``: what Mosaic has no operation for.

A word is an int32. Addresses are pointers of LLVM.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

WARPGROUP = 128  # threads
# Reads of a word that doesn't change, in half a minute at least: who should write it isn't running.
_PATIENCE = 1 << 26
SCALAR = plgpu.Layout.WG_SPLAT(())  # of an int32[] that goes into the inline function


def word() -> Any:
    """The type of a word."""
    return ir.IntegerType.get_signless(32)


def i32(value: int) -> Any:
    """A constant word."""
    return mgpu.c(value, word())


def less(a: Any, b: Any) -> Any:
    """Of two words, signed."""
    return arith.cmpi(arith.CmpIPredicate.slt, a, b)


def thread() -> Any:
    """This one's number in its warpgroup."""
    return arith.remui(mgpu.thread_idx(), i32(WARPGROUP))


def give_up_after(times: Any) -> None:
    """Fails the launch once a word has been read too often in vain."""
    mgpu.inline_ptx("trap;", predicate=arith.cmpi(arith.CmpIPredicate.eq, times, i32(_PATIENCE)))


def as_word(index: Any) -> Any:
    """Of an index."""
    return arith.index_castui(word(), index)


def address(ref: Any, place: Any, dtype: Any = None) -> Any:
    """Of the element at ``place``, a word, in a ref; of its words where no ``dtype`` of MLIR is given."""
    return mgpu.getelementptr(mgpu.memref_ptr(ref), [place], word() if dtype is None else dtype)


def load(address: Any, num_words: int, order: str = ".relaxed.gpu") -> tuple[Any, ...]:
    """1, 2 or 4 words.

    Args:
        order: empty where nobody writes them in this launch.
    """
    if num_words == 1:
        return (
            mgpu.inline_ptx(f"ld{order}.global.b32 $0, [$1];", address, result_types=word(), has_side_effects=True),
        )
    places = ", ".join(f"${i}" for i in range(num_words))
    return mgpu.inline_ptx(
        f"ld{order}.global.v{num_words}.b32 {{{places}}}, [${num_words}];",
        address,
        result_types=[word()] * num_words,
        has_side_effects=True,
    )


def store(address: Any, values: Sequence[Any], order: str = ".relaxed.gpu", predicate: Any = None) -> None:
    """1, 2 or 4 values of 16 or 32 bits.

    Args:
        order: empty where nobody reads them before the kernel's end.
        predicate: whether this thread stores; None does.
    """
    kind = "" if len(values) == 1 else f".v{len(values)}"
    places = ", ".join(f"${i + 1}" for i in range(len(values)))
    places = places if len(values) == 1 else f"{{{places}}}"
    bits = mgpu.bitwidth(values[0].type)
    mgpu.inline_ptx(
        f"st{order}.global{kind}.b{bits} [$0], {places};",
        address,
        *values,
        predicate=predicate,
        has_side_effects=True,
    )
