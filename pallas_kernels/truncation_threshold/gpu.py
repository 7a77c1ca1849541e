"""The op as one kernel for Hopper: a CTA finds its row's threshold alone, reading only chunks that matter to it.

The row is cut into chunks of CHUNK ids, and XLA sorts the chunks by their largest logit, so that those holding an id at
or above any bound are a prefix: a bound is weighed by reading that prefix. Every search narrows a range of floats
(numbered in order, see ``_place``) to a quarter a pass, weighing the three bounds between the quarters. What narrows it
beforehand is exact: k chunks have their largest logit at or above the k-th largest of these, so the row has k ids there
and top_k's threshold isn't below; top_p's isn't below the logit under which even all ids of a row hold less than 1 - p.
So a row of top_k 50 reads some 50 chunks, which the L1 cache holds; flat rows, and the sum that top_p alone asks for,
read all of it from the L2 cache. No case needs another path.

An id weighs 1, to count (as float32, exact to 2^24), or exp2((logit - highest) * rate), for probabilities. The
warpgroups share out the chunks by groups; per pass they exchange a sum per warp and bound through shared memory, of
which there are two, so that a pass needs one barrier. All add them in the same order and so agree on how to go on.
Adding in a fixed order, floats round monotonically: a higher bound never weighs more.

At 64 rows of 151,936 the order costs a reading of the logits (39 MB) and a small sort. The kernel takes a CTA about
0.5 us a pass for 50 chunks and 6 to 8 us for all 1187; a search has 12 passes for a range of 2^24 floats.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 128  # ids, one a thread
_WARPGROUPS = 4
_WARPS = 4  # of a warpgroup
_GROUP = 16  # chunks whose loads are in flight together
_BOUNDS = 3  # weighed in a pass
_SLACK = np.float32(1e-5)  # of a probability: more than sums of float32 are off by
_NOTHING = np.float32(-np.inf)
_TINY = np.finfo(np.float32).tiny
Scalar = Any  # a value in the kernel, of shape ()


@functools.partial(jax.jit, static_argnames=("interpret",))
def truncation_threshold(
    logits: jax.Array,  # float32[M, V]
    temperature: jax.Array,  # float32[M]
    top_k: jax.Array,  # int32[M]
    top_p: jax.Array,  # float32[M]
    min_p: jax.Array,  # float32[M]
    *,
    interpret: Any = None,
) -> jax.Array:
    """float32[M], see api.truncation_threshold. A V that isn't whole chunks costs a copy of the logits."""
    M, V = logits.shape
    missing = -V % CHUNK
    chunks = jnp.pad(logits, ((0, 0), (0, missing)), constant_values=_NOTHING) if missing else logits
    chunks = chunks.reshape(M, -1, _WARPS, CHUNK // _WARPS)
    C = chunks.shape[1]
    falling, order = lax.sort(
        (-jnp.max(chunks, axis=(2, 3)), lax.broadcasted_iota(jnp.int32, (M, C), 1)), num_keys=1, is_stable=False
    )
    # From here down, V ids together hold less than 1 - p, by a factor of e.
    nucleus = temperature * (jnp.log(jnp.maximum(1.0 - top_p - _SLACK, 0.0) / V) - 1.0)
    rate = np.float32(np.log2(np.e)) / temperature
    return _run(chunks, order, falling, top_k, top_p, temperature * jnp.log(min_p), nucleus, rate, interpret)


def _run(
    chunks: jax.Array,  # float32[M, C, warps, lanes]
    order: jax.Array,  # int32[M, C], by the largest logit of a chunk, falling
    falling: jax.Array,  # float32[M, C], minus these logits
    top_k: jax.Array,  # int32[M]
    top_p: jax.Array,  # float32[M]
    least: jax.Array,  # float32[M], min_p's threshold less the row's largest logit
    nucleus: jax.Array,  # float32[M], a bound below top_p's threshold, less that too
    rate: jax.Array,  # float32[M], of weights
    interpret: Any,
) -> jax.Array:  # float32[M]
    M, C = order.shape
    shape = chunks.shape[2:]
    # Axes: the warp, its lanes, the value of a lane.
    layout = plgpu.Layout.TILED(plgpu.Tiling((shape, (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def kernel(
        chunks_ref: Any,
        order_ref: Any,
        falling_ref: Any,
        top_k_ref: Any,
        top_p_ref: Any,
        least_ref: Any,
        nucleus_ref: Any,
        rate_ref: Any,
        threshold_ref: Any,
        sums_smem: Any,
        barrier: Any,
    ) -> None:
        row, warpgroup = lax.axis_index("row"), lax.axis_index("warpgroup")

        def largest(place: Scalar) -> Scalar:
            """The largest logit of a chunk."""
            return -falling_ref[row, jnp.clip(place, 0, C - 1)]

        highest = largest(jnp.int32(0))

        def weigh(bounds: list[Scalar], rate: Scalar | None, turn: Scalar) -> list[Scalar]:
            """What the ids at or above each of ``bounds``, rising, weigh; ``turn`` is another one in the next call."""

            def more(carry: tuple[Any, ...]) -> Scalar:
                first, first_largest, *_ = carry
                return (first < C) & (first_largest >= bounds[0])

            def add_group(carry: tuple[Any, ...]) -> tuple[Any, ...]:
                first, _, *sums = carry
                places = [first + i for i in range(_GROUP)]
                chunks = [order_ref[row, jnp.minimum(place, C - 1)] for place in places]
                logits = [plgpu.load(chunks_ref.at[row, chunk], layout=layout, optimized=False) for chunk in chunks]
                for place, x in zip(places, logits, strict=True):
                    x = x + jnp.where(place < C, 0.0, _NOTHING)
                    # Ones and zeros to multiply with: to choose weights takes an instruction more.
                    reached = [jnp.where(x >= bound, 1.0, 0.0) for bound in bounds]
                    if rate is not None:
                        weight = jnp.exp2((x - highest) * rate)
                        reached = [weight * one for one in reached]
                    sums = [total + more for total, more in zip(sums, reached, strict=True)]
                first = first + _WARPGROUPS * _GROUP
                return first, largest(first), *sums

            first = warpgroup * _GROUP
            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout)
            _, _, *sums = lax.while_loop(more, add_group, (first, largest(first), *[zero] * len(bounds)))
            for i, lanes in enumerate(sums):
                sums_smem[turn, i, warpgroup] = lanes.sum(axis=1)
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)
            parts = [(group, warp) for group in range(_WARPGROUPS) for warp in range(_WARPS)]
            return [sum((sums_smem[turn, i, *part] for part in parts), jnp.float32(0)) for i in range(len(bounds))]

        def search(low: Scalar, high: Scalar, wanted: Scalar, rate: Scalar | None, turn: Scalar) -> Any:
            """The highest place of low..high at or above which ids weigh ``wanted`` or more, ``low`` where none does.

            A search that counts may stop below it, with no id between. Returns the turn to go on with, too.
            """

            def narrow(carry: tuple[Any, ...]) -> tuple[Any, ...]:
                low, high, turn = carry
                quarter = (high >> 2) - (low >> 2) + 1  # the difference itself may exceed int32
                places = [jnp.minimum(low + i * quarter, high) for i in range(1, _BOUNDS + 1)]
                weights = weigh([_logit(place) for place in places], rate, turn)
                for place, weight in zip(places, weights, strict=True):
                    enough = weight >= wanted
                    low = jnp.where(enough, place, low)
                    high = jnp.where(enough, high, jnp.minimum(high, place - 1))
                    if rate is None:
                        high = jnp.where(weight == wanted, place, high)
                return low, high, 1 - turn

            low, _, turn = lax.while_loop(lambda carry: carry[0] < carry[1], narrow, (low, high, turn))
            return low, turn

        k, p = top_k_ref[row], top_p_ref[row]
        highest_place, turn, least = _place(highest), jnp.int32(0), least_ref[row]
        floor = highest + least
        low = _place(floor) + jnp.where(floor - highest < least, 1, 0)  # the sum may be rounded down
        kth = jnp.where((k > 0) & (k <= C), largest(k - 1), _NOTHING)
        low = jnp.maximum(low, _place(kth))
        low, turn = search(low, jnp.where(k > 0, highest_place, low), k.astype(jnp.float32), None, turn)

        (total,) = weigh([jnp.where(p < 1.0, _logit(low), jnp.inf)], rate_ref[row], turn)
        # At least the smallest normal number: a smaller product counts as 0, which no ids at all would reach.
        wanted = jnp.maximum(p * total, _TINY)
        low = jnp.where(p < 1.0, jnp.maximum(low, _place(highest + nucleus_ref[row])), low)
        high = jnp.where(p < 1.0, highest_place, low)
        low, _ = search(low, high, wanted, rate_ref[row], 1 - turn)
        threshold_ref[row] = _logit(low)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M,), jnp.float32),
        grid=(M,),
        grid_names=("row",),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((2, _BOUNDS, _WARPGROUPS, _WARPS), jnp.float32),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            # What another thread reads is written before a barrier of our own.
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
        kernel_name="truncation_threshold",
    )(chunks, order, falling, top_k, top_p, least, nucleus, rate)


def _place(logit: Scalar) -> Scalar:  # float32[]
    """int32[]: ordered as the floats are."""
    bits = lax.bitcast_convert_type(logit, jnp.int32)
    return jnp.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)


def _logit(place: Scalar) -> Scalar:  # int32[]
    """float32[]: the inverse of ``_place``."""
    return lax.bitcast_convert_type(jnp.where(place < 0, place ^ np.int32(0x7FFFFFFF), place), jnp.float32)
