"""The op as one kernel for Hopper: logits are read once, and a (value, id) for each of a row's parts is written.

A CTA is one warpgroup with one part of one row. It walks the part a pair of halves at a time, 1024 ids: a thread has 4
neighbouring ids of each half, one Threefry serves both, and a thread keeps the best value and id of each of its 4
places. The ids that are left at a row's end are walked by halves whose last one is moved back to end there. A
reduction over the warpgroup ends the CTA; XLA reduces over parts.

Rows of temperature 0 take a branch without noise. They are bound by memory: M * V * 4 bytes at 2.95 TB/s, 53 us for 256
rows of 151936 ids (measured: 61, with noise 95). Noise is bound by arithmetic: per pair of ids Threefry has about 75
integer instructions, of which an H100 starts 64 a clock and multiprocessor.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gumbel_argmax.noise import HALF, PAIR, counter, threefry2x32, uniform
from pallas_kernels.gumbel_argmax.reference import lowest_of_largest

# About: four times what the multiprocessors hold at once, so that rows with and without noise even out. For 256 rows,
# all noisy or every second one, that took 95 and 78 us; a quarter of it 100 and 76.
MAX_CTAS = 4096
_AT_ONCE = 2  # pairs whose loads are in flight together where there is no noise to compute meanwhile
Best = tuple[jax.Array, jax.Array]  # float32[HALF] values, int32[HALF] their ids

# -log2(1 - x) / x for x in [0, 1/4], highest power first, to 7e-7 of it.
_SERIES = (0.5137495, 0.30503586, 0.48617417, 0.7211767, 1.4426959)


def part_pairs(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """Number of parts of a row, and whole pairs of halves in each of them but the last."""
    num_pairs = max(vocab_size // PAIR, 1)
    pairs = pl.cdiv(num_pairs, pl.cdiv(MAX_CTAS, num_rows))
    return pl.cdiv(num_pairs, pairs), pairs


def scaled_noise(bits: jax.Array) -> jax.Array:
    """float32: the noise of uint32 bits, times -1 / ln 2, up to an addend that is the same for all: it moves no argmax.

    It is log2(-log2(1 - x)). For x up to 1/4 a series replaces the inner logarithm, which would lose x to the 1. PTX
    promises of lg2.approx 2^-22 of its value, or 2^-22 for arguments in [1/2, 2]. So the inner one is right to 6e-7 of
    its value, and noise to 7e-6, the most in its upper tail, at 22; float32 has 2e-6 between neighbours there.
    """
    x = uniform(bits)
    series: Any = np.float32(_SERIES[0])
    for term in _SERIES[1:]:
        series = series * x + np.float32(term)
    return lax.log2(jnp.where(x < 0.25, x * series, -lax.log2(1.0 - x)))


@functools.partial(jax.jit, static_argnames=("vocab_size",))
def gumbel_argmax(
    logits: jax.Array,  # float32[M, Vp]
    temperature: jax.Array | None,  # float32[M]
    keys: jax.Array | None,  # uint32[M, 2]
    vocab_size: int,
) -> jax.Array:  # int32[M]
    """See api.gumbel_argmax."""
    M, Vp = logits.shape
    parts, pairs = part_pairs(M, vocab_size)
    num_pairs, left = divmod(vocab_size, PAIR)
    layout = plgpu.Layout.WG_STRIDED((HALF,), vec_size=math.gcd(4, vocab_size, Vp))
    operands = [logits] if temperature is None or keys is None else [logits, temperature, keys]

    def kernel(*refs: Any) -> None:
        logits_ref, *noise_refs, value_ref, id_ref = refs
        row, part = lax.axis_index("row"), lax.axis_index("part")
        lane = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (HALF,), 0), layout)

        def load(first: jax.Array) -> jax.Array:
            return plgpu.load(logits_ref.at[row, pl.ds(first, HALF)], layout=layout, optimized=False)

        def better(best: Best, value: jax.Array, ids: jax.Array) -> Best:
            wins = value > best[0]  # ids ascend, so the lowest of equals stays
            return jnp.where(wins, value, best[0]), jnp.where(wins, ids, best[1])

        def walk(noisy: bool) -> Best:
            begin, end = part * pairs, jnp.minimum((part + 1) * pairs, num_pairs)
            at_once = 1 if noisy else _AT_ONCE
            if noisy:
                temperature_ref, keys_ref = noise_refs
                scale = temperature_ref[row] * np.float32(math.log(2))
                key = keys_ref[row, 0], keys_ref[row, 1]

            def perturbed(value: jax.Array, bits: jax.Array) -> jax.Array:
                return value - scale * scaled_noise(bits)

            def whole(step: jax.Array, best: Best) -> Best:
                """Of some pairs. The part's last one stands in for those past the end: seen again, it wins nothing."""
                at = [jnp.minimum(begin + step * at_once + i, end - 1) for i in range(at_once)]
                firsts = [index * PAIR + half * HALF for index in at for half in range(2)]
                values = [load(first) for first in firsts]
                if noisy:
                    words = [
                        threefry2x32(key, (np.uint32(0), (index * HALF + lane).astype(jnp.uint32))) for index in at
                    ]
                    values = [perturbed(*x) for x in zip(values, itertools.chain(*words), strict=True)]
                for first, value in zip(firsts, values, strict=True):
                    best = better(best, value, first + lane)
                return best

            def rest(step: jax.Array, best: Best) -> Best:
                """Of a half, from ``walked`` on and no further than the vocabulary."""
                walked = num_pairs * PAIR + step * HALF
                first = jnp.minimum(walked, vocab_size - HALF)
                value, ids = load(first), first + lane
                if noisy:
                    counters, high = counter(ids.astype(jnp.uint32))
                    value = perturbed(value, jnp.where(high, *threefry2x32(key, (np.uint32(0), counters))))
                return better(best, jnp.where(ids >= walked, value, -jnp.inf), ids)

            nothing = jnp.full((HALF,), -jnp.inf, jnp.float32), jnp.zeros((HALF,), jnp.int32)
            best = tuple(plgpu.layout_cast(x, layout) for x in nothing)
            best = lax.fori_loop(0, pl.cdiv(end - begin, at_once), whole, best)
            return lax.fori_loop(0, jnp.where(part == parts - 1, pl.cdiv(left, HALF), 0), rest, best)

        if noise_refs:
            is_noisy = jnp.where(noise_refs[0][row] == 0, 0, 1)
            values, ids = lax.switch(is_noisy, [functools.partial(walk, noisy) for noisy in (False, True)])
        else:
            values, ids = walk(noisy=False)
        value = jnp.max(values)
        value_ref[row, part] = value
        id_ref[row, part] = jnp.min(jnp.where(values == value, ids, 2**31 - 1))

    values, ids = plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((M, parts), dtype) for dtype in (jnp.float32, jnp.int32)],
        grid=(M, parts),
        grid_names=("row", "part"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # logarithms, see scaled_noise
            # Nothing that a thread reads is written here.
            unsafe_no_auto_barriers=True,
            # Layouts are said here: to infer them takes longer than all else of lowering a step.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        kernel_name="gumbel_argmax",
    )(*operands)
    return lowest_of_largest(values, ids, 1)[1]
