"""The op as one persistent kernel for Hopper: a layer's products in one launch.

One CTA a multiprocessor, all of them resident at once, walks four phases: the output product, gate and up, down, the
next layer's qkv. Weights depend on nothing, so one warpgroup (wg 1) streams them by TMA through all phases into a ring
of shared memory, as far ahead as the ring is deep; what separates the phases is waited for by the others only:

- A phase's weight is a line of units, cut into equal shares (plan.py). What a share has of one column of units is a
  piece of its sum. wg 0 multiplies the weight, transposed, by the activations, so that a product is as wide as there
  are rows, and hands the piece on (exchange.py).
- What the phase needs of whole sums (residual and sum of squares, the activation, the result) is done by items of 8
  rows and 64 columns, spread over the CTAs' wg 0. An item awaits its column's pieces and adds them in their order, so
  the result doesn't depend on time. Pieces are emptied by the item that reads them.
- wg 2 awaits what the items hand on, and lays it out in shared memory for the next phase, a fetch of a few units at a
  time. Those words have many readers, so wg 1 of the next launch empties them: launches use two lines of them in turn.

A norm's factor for each row is applied to the products' sums, when its sum of squares is known: the products start
from ``x * weight``, rounded once as ``x * factor * weight`` would be.

| barrier | of | arrives | waits |
|---|---|---|---|
| w_full | each slot of the ring | TMA | wg 0; wg 1, to bound what is on its way |
| w_free | ``_FREED`` slots | wg 0 | wg 1 |
| a_full, a_free | each of two fetches | wg 2; wg 0 | wg 0; wg 2 |

Nothing waits in a circle: items of phase i wait for pieces of phase i, those for activations of items of phase i - 1,
and weights for slots that wg 0 frees in the order of the phases. Each waiter waits for every phase of its barrier, and
a barrier's next phase needs the waiter's own arrival, so none is missed.

Reading the weights of a layer of Qwen3-0.6B takes 10.7 us at 2.95 TB/s. For what was measured see docs/performance.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lane import when
from pallas_kernels.post_attention import exchange
from pallas_kernels.post_attention.gpu_activations import ACTIVATIONS
from pallas_kernels.post_attention.plan import COLUMNS, ITEM_ROWS, Phase, Shape, phases, word_places
from pallas_kernels.post_attention.types import LayerWeights, NextWeights, PostAttentionSpec, Words
from pallas_kernels.ragged_paged_attention.gpu_tile import smem_tile

_SMEM_TILES = 224  # KB for weights and activations
_FREED = 2  # units that are freed at once: all 128 threads arrive at a barrier, one after the other
# Units of weights on their way. More than memory's latency asks for make everybody's other accesses wait behind them.
_IN_FLIGHT = 2


def _fetch_units(M: int, slice_len: int) -> int:
    """Units of activations that are asked for at once: up to 16 chunks of 16 bytes a thread."""
    return min(512, 256 * 64 // M) // slice_len


@functools.partial(jax.jit, static_argnames=("spec", "num_ctas"))
def post_attention(
    attended: jax.Array,  # [M, A] bfloat16
    x: jax.Array,  # [M, E] bfloat16
    layer: LayerWeights,
    following: NextWeights,
    words: Words,
    spec: PostAttentionSpec,
    num_ctas: int,
) -> tuple[jax.Array, jax.Array, Words]:  # [M, E], [M, Q]
    """See api.post_attention. An inner jit: the layers of a step share one lowering."""
    M, A = attended.shape
    E, F = x.shape[1], layer.down.shape[0]
    shape = Shape(M, A, E, F, following.qkv.shape[1])
    line = phases(shape, num_ctas)
    places = word_places(shape, num_ctas)
    groups, slice_len = M // ITEM_ROWS, line[0].slice_len
    U = _fetch_units(M, slice_len)
    weight_stages = (_SMEM_TILES * 1024 - 2 * U * M * slice_len * 2) // (slice_len * COLUMNS * 2) // _FREED * _FREED
    # The ring must hold the unit at work, all parts of it, and the next one's, beside a group that isn't free yet.
    if weight_stages < 4 + _FREED:
        raise ValueError(f"{weight_stages} units of weights in shared memory are too few")
    weights = [layer.o, layer.gate_up, layer.down, following.qkv]
    bfloat16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    out_type = [bfloat16((M, E)), bfloat16((M, E)), bfloat16((M, shape.Q))]

    def kernel(*refs: Any) -> None:
        attended_ref, x_ref, mlp_norm_ref, next_norm_ref, *rest = refs
        *weight_refs, pieces_ref, current_ref, stale_ref, mid_ref, out_ref, qkv_ref, scratch = rest
        w_smem, w_full, w_free, a_smem, a_full, a_free = scratch
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        load = functools.partial(plgpu.load, layout=exchange.ITEM, optimized=False)

        shares = [[p.begin(jnp.minimum(cta + i, p.num_ctas)) for i in range(2)] for p in line]
        starts = [(jnp.int32(0), jnp.int32(0))]  # units of weights and fetches of activations before each phase
        for p, (begin, end) in zip(line, shares, strict=True):
            units, fetches = starts[-1]
            starts.append((units + (end - begin) * p.num_parts, fetches + lax.div(end - begin + (U - 1), jnp.int32(U))))

        def stream_weights() -> None:
            for p, ref, (begin, end), (start, _) in zip(line, weight_refs, shares, starts, strict=False):

                @pl.loop(begin, end)
                def _(unit: jax.Array, p: Phase = p, ref: Any = ref, begin: Any = begin, start: Any = start) -> None:
                    column = lax.div(unit, jnp.int32(p.num_slices))
                    first_row = (unit - column * p.num_slices) * slice_len
                    for part in range(p.num_parts):
                        place = start + (unit - begin) * p.num_parts + part
                        slot = lax.rem(place, jnp.int32(weight_stages))

                        @when((place >= weight_stages) & (lax.rem(place, jnp.int32(_FREED)) == 0))
                        def _(slot: jax.Array = slot) -> None:
                            plgpu.barrier_wait(w_free.at[lax.div(slot, jnp.int32(_FREED))])

                        @when(place >= _IN_FLIGHT)
                        def _(place: jax.Array = place) -> None:
                            plgpu.barrier_wait(w_full.at[lax.rem(place - _IN_FLIGHT, jnp.int32(weight_stages))])

                        rows = pl.ds(first_row, slice_len)
                        columns = pl.ds((column + part * p.num_columns) * COLUMNS, COLUMNS)
                        plgpu.copy_gmem_to_smem(ref.at[rows, columns], w_smem.at[slot], w_full.at[slot])

        def receive_activations() -> None:
            for i, (p, (begin, end), (_, start)) in enumerate(zip(line, shares, starts, strict=False)):

                @pl.loop(0, starts[i + 1][1] - start)
                def _(
                    fetch: jax.Array, p: Phase = p, begin: Any = begin, end: Any = end, i: int = i, start: Any = start
                ) -> None:
                    unit = begin + fetch * U
                    slot = lax.rem(start + fetch, jnp.int32(2))

                    @when(start + fetch >= 2)
                    def _() -> None:
                        plgpu.barrier_wait(a_free.at[slot])

                    exchange.receive(
                        current_ref if i else attended_ref,
                        places.activations[i - 1] if i else 0,
                        p.num_slices,
                        a_smem,
                        slot,
                        lax.rem(unit, jnp.int32(p.num_slices)),
                        jnp.minimum(end - unit, U),
                        polled=i > 0,
                    )
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(a_full.at[slot])

        def multiply(i: int) -> None:
            """The pieces of this CTA's share of a phase."""
            p, (begin, end), (w_start, a_start) = line[i], shares[i], starts[i]
            first = lax.div(begin, jnp.int32(p.num_slices))
            num_pieces = jnp.where(end > begin, lax.div(end + (p.num_slices - 1), jnp.int32(p.num_slices)) - first, 0)

            @pl.loop(0, num_pieces)
            def _(piece: jax.Array) -> None:
                column = first + piece
                start = jnp.maximum(begin, column * p.num_slices)
                stop = jnp.minimum(end, (column + 1) * p.num_slices)

                def fetch_of(index: jax.Array) -> tuple[jax.Array, jax.Array]:
                    """Slot of the fetch that a unit comes in, and the unit's place there."""
                    fetch = lax.div(index - begin, jnp.int32(U))
                    return lax.rem(a_start + fetch, jnp.int32(2)), index - begin - fetch * U

                def products(*accumulators: Any) -> tuple[jax.Array, ...]:
                    @pl.loop(start, stop)
                    def _(index: jax.Array) -> None:
                        slot, place = fetch_of(index)

                        @when(place == 0)
                        def _() -> None:
                            plgpu.barrier_wait(a_full.at[slot])

                        for part, acc in enumerate(accumulators):
                            w_slot = lax.rem(w_start + (index - begin) * p.num_parts + part, jnp.int32(weight_stages))
                            plgpu.barrier_wait(w_full.at[w_slot])
                            weight = w_smem.at[w_slot].transpose((1, 0))
                            plgpu.wgmma(acc, weight, a_smem.at[slot, place].transpose((1, 0)))
                        # The unit before is done: what it read is free.
                        plgpu.wgmma_wait(p.num_parts)
                        when(index > start)(functools.partial(release, index - 1))

                    plgpu.wgmma_wait(0)
                    release(stop - 1)
                    return tuple(acc[...] for acc in accumulators)

                def release(index: jax.Array) -> None:
                    for part in range(p.num_parts):
                        place = w_start + (index - begin) * p.num_parts + part

                        @when(lax.rem(place, jnp.int32(_FREED)) == _FREED - 1)
                        def _(place: jax.Array = place) -> None:
                            group = lax.div(lax.rem(place, jnp.int32(weight_stages)), jnp.int32(_FREED))
                            plgpu.barrier_arrive(w_free.at[group])

                    slot, place = fetch_of(index)

                    @when((place == U - 1) | (index == end - 1))
                    def _() -> None:
                        plgpu.barrier_arrive(a_free.at[slot])

                sums = pl.run_scoped(products, *[plgpu.ACC((COLUMNS, M), jnp.float32)] * p.num_parts)
                for part, value in enumerate(sums):
                    exchange.publish_piece(value, pieces_ref, piece_words(i, cta * p.max_cta_pieces + piece, part))

        def piece_words(i: int, slot: jax.Array, part: int) -> jax.Array:
            return places.pieces[i] + (slot * line[i].num_parts + part) * (M * COLUMNS)

        def each_item(i: int, body: Callable[[jax.Array, jax.Array], None]) -> None:
            """``body(column, first row)`` for this CTA's items of a phase."""
            num_items = line[i].num_items(M)

            @pl.loop(0, -(-num_items // num_ctas))
            def _(round_: jax.Array) -> None:
                item = cta + round_ * num_ctas

                @when(item < num_items)
                def _() -> None:
                    column = lax.div(item, jnp.int32(groups))
                    body(column, (item - column * groups) * ITEM_ROWS)

        def whole(i: int, column: jax.Array, row: jax.Array) -> list[jax.Array]:
            """The sums of a column's pieces, for each part: float32[ITEM_ROWS, COLUMNS]."""
            p = line[i]
            first, last = p.cta_of(column * p.num_slices), p.cta_of(column * p.num_slices + (p.num_slices - 1))
            owners = [jnp.minimum(first + n, last) for n in range(p.max_column_pieces)]
            slots = [owner * p.max_cta_pieces + column - p.first_column(owner) for owner in owners]
            begins = [[piece_words(i, slot, part) + row * COLUMNS for slot in slots] for part in range(p.num_parts)]
            return exchange.sum_pieces(pieces_ref, begins, last - first + 1)

        def factor(which: int, row: jax.Array) -> jax.Array:
            """A norm's factor of each row: float32[ITEM_ROWS, COLUMNS], the same in all columns."""
            begin = places.squares[which] + row * places.square_stride
            total = exchange.sum_rows(current_ref, begin, places.square_stride, E // COLUMNS)
            return lax.rsqrt(total * (1 / E) + spec.eps)

        def add_residual(i: int, old: Any, new: Any, norm: Any) -> None:
            """The residual stream, and what the next product and its norm need of it.

            Phases 0 and 2 have the same items, so each thread reads of ``mid`` what it wrote itself.
            """

            def item(column: jax.Array, row: jax.Array) -> None:
                rows, columns = pl.ds(row, ITEM_ROWS), pl.ds(column * COLUMNS, COLUMNS)
                residual = load(old.at[rows, columns]).astype(jnp.float32)
                weight = load(norm.at[columns], layout=exchange.ITEM.reduce(0)).astype(jnp.float32) + spec.norm_offset
                weight = plgpu.layout_cast(lax.broadcast_in_dim(weight, (ITEM_ROWS, COLUMNS), [1]), exchange.ITEM)
                rounded = (residual + whole(i, column, row)[0]).astype(jnp.bfloat16)
                value = rounded.astype(jnp.float32)
                begin = places.activations[i] + row * (E // 2) + column * (COLUMNS // 2)
                exchange.publish_item((value * weight).astype(jnp.bfloat16), current_ref, begin, E // 2)
                squares = lax.broadcast_in_dim((value * value).sum(axis=1), (ITEM_ROWS, COLUMNS), [0])
                squares = plgpu.layout_cast(squares, exchange.ITEM)
                begin = places.squares[i // 2] + row * places.square_stride + column
                exchange.publish_rows(squares, current_ref, begin, places.square_stride)
                new.at[rows, columns][...] = rounded

            each_item(i, item)

        def activate(column: jax.Array, row: jax.Array) -> None:
            scale = factor(0, row)
            gate, up = whole(1, column, row)
            inner = (ACTIVATIONS[spec.activation](gate * scale) * (up * scale)).astype(jnp.bfloat16)
            begin = places.activations[1] + row * (F // 2) + column * (COLUMNS // 2)
            exchange.publish_item(inner, current_ref, begin, F // 2)

        def finish(column: jax.Array, row: jax.Array) -> None:
            scale = factor(1, row)
            value = whole(3, column, row)[0] * scale
            qkv_ref.at[pl.ds(row, ITEM_ROWS), pl.ds(column * COLUMNS, COLUMNS)][...] = value.astype(jnp.bfloat16)

        @when(wg == 0)
        def _() -> None:
            multiply(0)
            add_residual(0, x_ref, mid_ref, mlp_norm_ref)
            multiply(1)
            each_item(1, activate)
            multiply(2)
            add_residual(2, mid_ref, out_ref, next_norm_ref)
            multiply(3)
            each_item(3, finish)

        @when(wg == 1)
        def _() -> None:
            stream_weights()
            exchange.empty(stale_ref, cta, num_ctas)

        when(wg == 2)(receive_activations)

    pieces, current, stale = (jax.new_ref(line) for line in words)
    _, out, qkv = plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=(num_ctas,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        scratch_types=[
            [
                smem_tile((weight_stages, slice_len, COLUMNS), jnp.bfloat16),
                plgpu.Barrier(num_barriers=weight_stages),
                plgpu.Barrier(num_barriers=weight_stages // _FREED),
                smem_tile((2, U, M, slice_len), jnp.bfloat16),
                plgpu.Barrier(num_barriers=2),
                plgpu.Barrier(num_barriers=2),
            ]
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # What one warpgroup tells another goes over barriers and words that are said here.
            unsafe_no_auto_barriers=True,
            # Layouts are said here: to infer them takes longer than all else of lowering a step.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="post_attention",
    )(attended, x, layer.mlp_norm, following.attn_norm, *weights, pieces, current, stale)
    # What is empty now serves the next launch.
    return out, qkv, Words(jax.freeze(pieces), jax.freeze(stale), jax.freeze(current))
