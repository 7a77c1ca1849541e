"""How the workers of a tile bring its results together, within the decode kernel's launch.

A worker that goes on with a tile which another one began publishes what it has: results that are normalised by
themselves, and the log2 of their sums of exponentials. The one that began the tile awaits those of all that go on, and
joins them with its own in their order: out = sum_i 2^(lse_i - lse) out_i with lse = log2 sum_i 2^lse_i.

That a worker has published is told by the number of launches so far, LAUNCHES in the plan's row for it. All are equal
when a launch begins, since each worker counts each launch, so a worker's own says what to wait for. The kernel writes
that column in place, in an operand that XLA takes for read-only, so that a step's layers share it without being told of
each other. It is read by this kernel alone, and a copy holds equal numbers, too. What it needs is that kernels which
share a plan run one after the other: layers do, and a draft model's pass beside its target's as long as XLA runs a
device's kernels in one stream and its command buffers in order. It does unless it is told otherwise
(xla_gpu_command_buffer_scheduling_mode=CONCURRENT, programmatic dependent launch).

A worker publishes before it waits for any, and waits for later ones only, whose CTAs have lower indices. So none waits
for a CTA that hasn't started, however few run at once, as long as a GPU starts CTAs in their order. Words are in the
order of registers: a thread reads what the same thread of another worker wrote.

Shape letters: D head dim, M columns (queries) of a tile, C workers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels import ptx
from pallas_kernels.lane import when
from pallas_kernels.ragged_paged_attention import gpu_plan as plan
from pallas_kernels.ragged_paged_attention.gpu_tile import columns_of

RESULTS = plgpu.Layout.WGMMA
SUMS = RESULTS.reduce(0)
_CHUNK = 4  # words that a thread writes and reads at once
_AT_ONCE, _WORDS_AT_ONCE = 8, 96  # pieces that are joined together, and a thread's words of them: they are in registers


def all_words(num_workers: int, dim: int, columns: int) -> jax.ShapeDtypeStruct:
    """Room for a piece of each worker."""
    return jax.ShapeDtypeStruct((num_workers, ptx.WARPGROUP * _thread_words(dim, columns)), jnp.int32)


def _thread_words(dim: int, columns: int) -> int:
    """Words that a thread has of a piece: results, and a sum for each of its columns; whole chunks."""
    words = dim * columns // ptx.WARPGROUP + columns // 4
    return -(-words // _CHUNK) * _CHUNK


def num_launches(workers: Any, worker: jax.Array) -> jax.Array:  # ref int32[C, ...] in global memory -> int32[]
    """Before this one, as the worker counts them."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ptx.SCALAR), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=ptx.SCALAR)
    )
    def read(_: Any, workers: Any, worker: Any) -> Any:
        [word] = ptx.load(_launches_of(workers, worker.registers.item()), 1)
        return mosaic.FragmentedArray.splat(word, (), is_signed=True)

    return read(workers, worker)


def count_launch(workers: Any, worker: jax.Array, launches: jax.Array) -> None:
    """Says that this worker has published, or has nothing to publish, in the launch after so many."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR, ptx.SCALAR))
    def write(_: Any, workers: Any, worker: Any, launches: Any) -> None:
        # All threads' words come before it: they met, and it is a release of the GPU's scope.
        mgpu.warpgroup_barrier()
        number = arith.addi(launches.registers.item(), ptx.i32(1))
        first = arith.cmpi(arith.CmpIPredicate.eq, ptx.thread(), ptx.i32(0))
        ptx.store(_launches_of(workers, worker.registers.item()), [number], order=".release.gpu", predicate=first)

    write(workers, worker, launches)


def join(
    results: jax.Array,  # float32[D, M]
    sums: jax.Array,  # float32[M]
    words: Any,  # int32[C, n] in global memory
    workers: Any,  # int32[C, ...]
    worker: jax.Array,  # int32[], whose piece the first two are
    num_after: jax.Array,  # int32[], of the workers that come after it, those whose pieces are awaited
    launches: jax.Array,  # int32[], before this one
) -> jax.Array:  # float32[D, M]
    """The results of all of them together."""
    dim, columns = results.shape
    at_once = max(1, min(_AT_ONCE, _WORDS_AT_ONCE // _thread_words(dim, columns)))
    when(num_after > 0)(lambda: _await_launch(workers, worker + 1, num_after, launches))

    def add(group: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, m, l = carry
        # The last one stands in for those past the end.
        indices = [group * at_once + k for k in range(at_once)]
        received = [_receive(words, worker + 1 + jnp.minimum(index, num_after - 1), dim, columns) for index in indices]
        for index, (value, lse) in zip(indices, received, strict=True):
            lse = lse + jnp.where(index < num_after, 0.0, -jnp.inf)
            m_new = jnp.maximum(m, lse)
            alpha, weight = jnp.exp2(m - m_new), jnp.exp2(lse - m_new)
            acc = acc * columns_of(alpha, dim) + value * columns_of(weight, dim)
            m, l = m_new, l * alpha + weight
        return acc, m, l

    one = plgpu.layout_cast(jnp.full((columns,), 1.0, jnp.float32), SUMS)
    acc, _, l = lax.fori_loop(0, pl.cdiv(num_after, at_once), add, (results, sums, one))
    return acc * columns_of(1.0 / l, dim)


def _await_launch(workers: Any, first: jax.Array, num: jax.Array, launches: jax.Array) -> None:
    """Until ``num`` workers from ``first`` on have counted the launch after so many; a thread looks at one of them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[ptx.SCALAR] * 3))
    def wait(_: Any, workers: Any, first: Any, num: Any, launches: Any) -> None:
        first, num, launches = (x.registers.item() for x in (first, num, launches))
        loop = scf.WhileOp([ptx.word(), ptx.word()], [ptx.thread(), ptx.i32(0)])
        with ir.InsertionPoint(loop.before.blocks.append(ptx.word(), ptx.word())) as point:
            mine, times = point.block.arguments
            scf.condition(ptx.less(mine, num), [mine, times])
        with ir.InsertionPoint(loop.after.blocks.append(ptx.word(), ptx.word())) as point:
            mine, times = point.block.arguments
            [word] = ptx.load(_launches_of(workers, arith.addi(first, mine)), 1, order=".acquire.gpu")
            waits = arith.cmpi(arith.CmpIPredicate.eq, word, launches)
            ptx.give_up_after(times)
            following = arith.select(waits, mine, arith.addi(mine, ptx.i32(ptx.WARPGROUP)))
            scf.yield_([following, arith.addi(times, ptx.i32(1))])
        mgpu.warpgroup_barrier()

    wait(workers, first, num, launches)


def publish(
    results: jax.Array,  # float32[D, M] in the layout RESULTS
    sums: jax.Array,  # float32[M], SUMS
    words: Any,  # int32[C, n] in global memory, see all_words
    worker: jax.Array,  # int32[], whose piece it is
) -> None:
    """Writes a piece; ``count_launch`` says that it is there."""

    @plgpu.inline_mgpu(arg_types=(RESULTS, SUMS, plgpu.RefType(), ptx.SCALAR))
    def write(_: Any, results: Any, sums: Any, words: Any, worker: Any) -> None:
        values = [
            arith.bitcast(ptx.word(), vector.extract(register, [], [i]))
            for register in (*results.registers.flat, *sums.registers.flat)
            for i in range(2)
        ]
        values += [ptx.i32(0)] * (-len(values) % _CHUNK)
        places = _chunks(words, worker.registers.item(), len(values))
        for address, chunk in zip(places, itertools.batched(values, _CHUNK), strict=True):
            ptx.store(address, chunk, order="")

    write(results, sums, words, worker)


def _receive(
    words: Any,  # int32[C, n] in global memory
    worker: jax.Array,  # int32[]
    dim: int,
    columns: int,
) -> tuple[jax.Array, jax.Array]:  # float32[D, M], float32[M]
    """The piece of a worker, which must have counted the launch."""

    def shape(layout: Any, *sizes: int) -> Any:
        return plgpu.ShapeDtypeStruct(sizes, jnp.float32, layout=layout)

    kinds = [shape(RESULTS, dim, columns), shape(SUMS, columns)]

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ptx.SCALAR), return_type=kinds)
    def read(_: Any, words: Any, worker: Any) -> list[Any]:
        places = _chunks(words, worker.registers.item(), _thread_words(dim, columns))
        loaded = iter([word for address in places for word in ptx.load(address, _CHUNK)])
        found = []
        for kind in kinds:
            layout = kind.layout.to_mgpu()
            registers = np.empty(layout.registers_shape(kind.shape), dtype=object)
            for place in np.ndindex(registers.shape):
                pair = vector.from_elements(ir.VectorType.get((2,), ptx.word()), [next(loaded), next(loaded)])
                registers[place] = vector.bitcast(ir.VectorType.get((2,), ir.F32Type.get()), pair)
            found.append(mosaic.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None))
        return found

    results, sums = read(words, worker)
    return results, sums


def _launches_of(workers: Any, worker: Any) -> Any:
    [_, columns] = ir.MemRefType(workers.type).shape
    return ptx.address(workers, arith.addi(arith.muli(worker, ptx.i32(columns)), ptx.i32(plan.LAUNCHES)))


def _chunks(words: Any, worker: Any, num_words: int) -> Iterator[Any]:
    """Addresses of this thread's chunks of a worker's piece."""
    [_, size] = ir.MemRefType(words.type).shape
    first = arith.muli(worker, ptx.i32(size))
    mine = arith.addi(first, arith.muli(ptx.thread(), ptx.i32(_CHUNK)))
    for i in range(num_words // _CHUNK):
        yield ptx.address(words, arith.addi(mine, ptx.i32(i * _CHUNK * ptx.WARPGROUP)))
