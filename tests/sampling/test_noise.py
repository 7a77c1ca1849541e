"""The noise: Threefry as JAX defines it, one counter per element, Gumbel in distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling.noise import choice_key, gumbel, random_bits


def bits_by_jax(key: jax.Array, choice_index: int, output_index: int, width: int) -> np.ndarray:
    with jax.threefry_partitionable(True):
        key = jax.random.fold_in(jax.random.fold_in(key, choice_index), output_index)
        return np.asarray(jax.random.bits(key, (width,)))


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1])
@pytest.mark.parametrize("width", [37, 101, 1031])
def test_equals_jax_random(seed, width):
    ours = random_bits(jnp.asarray(choice_key(seed, 3))[None], jnp.array([5]), width)
    key = jax.random.wrap_key_data(jnp.array([0, seed], jnp.uint32))
    np.testing.assert_array_equal(ours[0], bits_by_jax(key, 3, 5, width))


@pytest.mark.parametrize(("seed", "words"), [(-1, (0xFFFFFFFF, 0xFFFFFFFF)), (2**63 - 1, (0x7FFFFFFF, 0xFFFFFFFF))])
def test_both_words_of_a_seed_count(seed, words):
    ours = random_bits(jnp.asarray(choice_key(seed, 0))[None], jnp.array([0]), 17)
    key = jax.random.wrap_key_data(jnp.array(words, jnp.uint32))
    np.testing.assert_array_equal(ours[0], bits_by_jax(key, 0, 0, 17))
    assert (choice_key(seed, 0) != choice_key(seed & 0xFFFFFFFF, 0)).any()


def test_padding_batch_and_slot_change_nothing():
    keys = np.stack([choice_key(seed, index) for seed in range(4) for index in range(2)])
    steps = np.arange(8, dtype=np.int32) * 3
    alone = [np.asarray(gumbel(keys[i : i + 1], steps[i : i + 1], 37)) for i in range(8)]
    order = np.array([5, 0, 7, 2, 2, 6])
    batch = np.asarray(jax.jit(gumbel, static_argnums=2)(keys[order], steps[order], 1024))
    for row, i in enumerate(order):
        np.testing.assert_allclose(batch[row, :37], alone[i][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(
            random_bits(keys, steps, 37)[i], random_bits(keys[order], steps[order], 101)[row, :37]
        )


def test_every_coordinate_matters():
    base = random_bits(choice_key(1, 2)[None], np.array([3]), 101)
    for seed, index, step in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        other = random_bits(choice_key(seed, index)[None], np.array([step]), 101)
        assert np.mean(np.asarray(base) == np.asarray(other)) < 0.05


def test_gumbel_in_distribution_and_finite():
    keys = np.stack([choice_key(seed, 0) for seed in range(64)])
    noise = np.sort(np.asarray(gumbel(keys, np.zeros(64, np.int32), 4096)).ravel())
    assert np.isfinite(noise).all() and noise[0] > -2.9 and noise[-1] < 23
    cdf = np.exp(-np.exp(-noise.astype(np.float64)))
    steps = np.arange(1, noise.size + 1) / noise.size
    assert np.abs(cdf - steps).max() < 1.63 / np.sqrt(noise.size)  # Kolmogorov-Smirnov at 1%
