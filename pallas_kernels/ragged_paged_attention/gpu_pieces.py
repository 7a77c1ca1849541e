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
from jax.experimental.mosaic import gpu as mosaic
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, scf, vector

from pallas_kernels import ptx
from pallas_kernels.ragged_paged_attention import gpu_plan as plan

RESULTS = plgpu.Layout.WGMMA
SUMS = RESULTS.reduce(0)
_THREADS = 128
_CHUNK = 4  # words that a thread writes and reads at once
# Reads of a number that doesn't change, in half a minute at least: who should write it isn't running.
_PATIENCE = 1 << 26


def thread_words(dim: int, columns: int) -> int:
    """Words that a thread has of a piece: results, and a sum for each of its columns; whole chunks."""
    words = dim * columns // _THREADS + columns // 4
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
        first = arith.cmpi(arith.CmpIPredicate.eq, _thread(), ptx.i32(0))
        ptx.store(_launches_of(workers, worker.registers.item()), [number], order=".release.gpu", predicate=first)

    write(workers, worker, launches)


def await_launch(workers: Any, first: jax.Array, num: jax.Array, launches: jax.Array) -> None:
    """Until ``num`` workers from ``first`` on have counted the launch after so many; a thread looks at one of them."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[ptx.SCALAR] * 3))
    def wait(_: Any, workers: Any, first: Any, num: Any, launches: Any) -> None:
        first, num, launches = (x.registers.item() for x in (first, num, launches))
        loop = scf.WhileOp([ptx.word(), ptx.word()], [_thread(), ptx.i32(0)])
        with ir.InsertionPoint(loop.before.blocks.append(ptx.word(), ptx.word())) as point:
            mine, times = point.block.arguments
            scf.condition(ptx.less(mine, num), [mine, times])
        with ir.InsertionPoint(loop.after.blocks.append(ptx.word(), ptx.word())) as point:
            mine, times = point.block.arguments
            [word] = ptx.load(_launches_of(workers, arith.addi(first, mine)), 1, order=".acquire.gpu")
            waits = arith.cmpi(arith.CmpIPredicate.eq, word, launches)
            mgpu.inline_ptx("trap;", predicate=arith.cmpi(arith.CmpIPredicate.eq, times, ptx.i32(_PATIENCE)))
            following = arith.select(waits, mine, arith.addi(mine, ptx.i32(_THREADS)))
            scf.yield_([following, arith.addi(times, ptx.i32(1))])
        mgpu.warpgroup_barrier()

    wait(workers, first, num, launches)


def publish(
    results: jax.Array,  # float32[D, M] in the layout RESULTS
    sums: jax.Array,  # float32[M], SUMS
    words: Any,  # int32[C, 128 * n] in global memory, n >= thread_words
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


def receive(
    words: Any,  # int32[C, 128 * n] in global memory
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
        places = _chunks(words, worker.registers.item(), thread_words(dim, columns))
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


def _thread() -> Any:
    return arith.remui(mgpu.thread_idx(), ptx.i32(_THREADS))


def _launches_of(workers: Any, worker: Any) -> Any:
    [_, columns] = ir.MemRefType(workers.type).shape
    return ptx.address(workers, arith.addi(arith.muli(worker, ptx.i32(columns)), ptx.i32(plan.LAUNCHES)))


def _chunks(words: Any, worker: Any, num_words: int) -> Iterator[Any]:
    """Addresses of this thread's chunks of a worker's piece."""
    [_, size] = ir.MemRefType(words.type).shape
    first = arith.muli(worker, ptx.i32(size))
    mine = arith.addi(first, arith.muli(_thread(), ptx.i32(_CHUNK)))
    for i in range(num_words // _CHUNK):
        yield ptx.address(words, arith.addi(mine, ptx.i32(i * _CHUNK * _THREADS)))
