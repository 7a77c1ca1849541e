"""top_k, top_p, min_p against sorting."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import kept_ids

from jaxserve.sampling.truncate import truncate
from pallas_kernels.truncation_threshold.reference import descend

jitted = jax.jit(functools.partial(truncate, implementation="xla"))
ROWS, WIDTH = 4, 37


def kept_by(logits, temperature, top_k, top_p, min_p) -> list[set[int]]:
    out = np.asarray(
        jitted(
            np.asarray(logits, np.float32),
            np.asarray(temperature, np.float32),
            np.asarray(top_k, np.int32),
            np.asarray(top_p, np.float32),
            np.asarray(min_p, np.float32),
        )
    )
    kept = np.isfinite(out)
    np.testing.assert_array_equal(out[kept], np.asarray(logits, np.float32)[kept])
    return [set(np.flatnonzero(row).tolist()) for row in kept]


def on_the_edge(logits, temperature, top_k, top_p, min_p) -> bool:
    """Whether rounding may decide: a cumulative mass within 1e-5 of top_p, or a probability ratio of min_p."""
    sets = [
        kept_ids(logits, temperature, top_k, p, m)
        for p in (top_p * (1 - 1e-5), min(top_p * (1 + 1e-5), 1.0))
        for m in (min_p * (1 - 1e-5), min(min_p * (1 + 1e-5), 1.0))
    ]
    return any(s != sets[0] for s in sets)


values = st.one_of(
    st.sampled_from([-3.0, -1.0, -0.0, 0.0, 0.5, 2.0, 2.0000002, 1e-30, -1e-30]),
    st.floats(-20, 20, width=32, allow_subnormal=False),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_kept_set_equals_sorting(data):
    logits = np.array(data.draw(st.lists(values, min_size=ROWS * WIDTH, max_size=ROWS * WIDTH)), np.float32)
    logits = logits.reshape(ROWS, WIDTH)
    temperature = [data.draw(st.sampled_from([0.1, 0.6, 1.0, 3.0])) for _ in range(ROWS)]
    top_k = [data.draw(st.sampled_from([0, 1, 2, 5, 36, 37, 100])) for _ in range(ROWS)]
    top_p = [data.draw(st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])) for _ in range(ROWS)]
    min_p = [data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) for _ in range(ROWS)]
    kept = kept_by(logits, temperature, top_k, top_p, min_p)
    for r in range(ROWS):
        args = (logits[r], np.float32(temperature[r]), top_k[r], np.float32(top_p[r]), np.float32(min_p[r]))
        if not on_the_edge(*args):
            assert kept[r] == kept_ids(*args), (r, args[1:])
        assert int(np.argmax(logits[r])) in kept[r]


def test_wide_rows_with_masked_ids():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (6, 1031)).astype(np.float32)
    logits[:, rng.integers(0, 1031, 300)] = -np.inf
    top_k, top_p, min_p = [50, 0, 700, 1, 0, 20], [0.9, 0.3, 1.0, 1.0, 0.99, 0.5], [0, 0, 0, 0, 0.02, 0.1]
    kept = kept_by(logits, [0.7] * 6, top_k, top_p, min_p)
    for r in range(6):
        args = (logits[r], np.float32(0.7), top_k[r], np.float32(top_p[r]), np.float32(min_p[r]))
        want = {v for v in kept_ids(*args) if np.isfinite(logits[r, v])}
        assert on_the_edge(*args) or kept[r] == want


def test_neutral_rows_pass_through_bit_for_bit():
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 4, (3, 101)).astype(np.float32)
    logits[:, 50:60] = -np.inf
    out = jitted(
        logits, np.ones(3, np.float32), np.array([0, 5, 0]), np.array([1, 1, 0.5], np.float32), np.zeros(3, np.float32)
    )
    np.testing.assert_array_equal(np.asarray(out)[0], logits[0])


@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-20, 1e6])
def test_extreme_temperatures_keep_the_most_likely(temperature):
    logits = np.array([[1.0, 5.0, 4.9999, -np.inf, 5.0]], np.float32)
    (kept,) = kept_by(logits, [temperature], [0], [0.3], [0.0])
    assert {1, 4} <= kept and (temperature > 1 or kept == {1, 4})


def test_a_row_of_masked_ids_gives_no_nan():
    out = jitted(
        np.full((1, 37), -np.inf, np.float32),
        np.ones(1, np.float32),
        np.array([3]),
        np.array([0.5], np.float32),
        np.array([0.1], np.float32),
    )
    assert not np.isnan(np.asarray(out)).any()


WAYS = [(1, False), (3, True), (5, False)]


@pytest.mark.parametrize(("digit_bits", "unroll"), WAYS)
def test_every_way_to_descend_counts_alike(digit_bits, unroll):
    rng = np.random.default_rng(2)
    keys = rng.integers(0, 2**32, (5, 101), dtype=np.uint32)
    keys[:, 0:98:7] = keys[:, 1:99:7]  # ties
    keys[0, 3], keys[1, 4] = 2**32 - 1, 0
    wanted = np.array([1, 2, 50, 101, 102], np.int32)
    found = jax.jit(functools.partial(descend, digit_bits=digit_bits, unroll=unroll))(keys, wanted, None)
    for r in range(5):
        fits = [int(t) for t in keys[r] if (keys[r] >= t).sum() >= wanted[r]]
        assert int(found[r]) == max(fits, default=0)


@pytest.mark.parametrize(("digit_bits", "unroll"), WAYS)
def test_every_way_to_descend_weighs_alike(digit_bits, unroll):
    rng = np.random.default_rng(3)
    logits = np.sort(rng.normal(0, 2, (6, 101)).astype(np.float32), axis=1)[:, ::-1]
    temperature = np.array([0.5, 1, 2, 3, 1, 1], np.float32)
    mass = np.exp((logits.astype(np.float64) - logits[:, :1]) / temperature[:, None]).cumsum(axis=1)
    last = np.array([0, 1, 7, 50, 100, 101])  # the column that completes what is wanted; 101: nothing does
    ends = np.concatenate([np.zeros((6, 1)), mass, mass[:, -1:] + 1], axis=1)
    wanted = (ends[np.arange(6), last] + ends[np.arange(6), last + 1]) / 2
    bits = logits.view(np.uint32).astype(np.int64)
    keys = np.where(logits < 0, 2**32 - 1 - bits, bits + 2**31).astype(np.uint32)
    shuffle = rng.permutation(101)
    found = jax.jit(functools.partial(descend, digit_bits=digit_bits, unroll=unroll))(
        keys[:, shuffle], wanted.astype(np.float32), (logits[:, 0], temperature)
    )
    np.testing.assert_array_equal(found[:5], keys[np.arange(5), last[:5]])
    assert int(found[5]) == 0


@pytest.mark.parametrize("top_p", [1.2e-38, 1e-38, 1e-45, 0.0])
def test_the_smallest_nucleus_is_the_most_likely_id(top_p):
    """Also where float32 has no normal number for it, and none at all."""
    logits = np.random.default_rng(0).standard_normal((1, WIDTH))
    assert kept_by(logits, [1.0], [0], [top_p], [0.0]) == [{int(logits.argmax())}]
