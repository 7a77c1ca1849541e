"""The noise: Threefry as JAX defines it, 32 bits of its own for every id, Gumbel in distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling_reference import gumbel_of, noise_bits

from jaxserve.sampling.noise import choice_key, position_keys
from pallas_kernels.gumbel_argmax import noise


def bits_of(keys, output_index, width):
    return noise.random_bits(position_keys(jnp.asarray(keys), jnp.asarray(output_index)), width)


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, -1, 2**63 - 1])
@pytest.mark.parametrize("width", [37, 512, 513, 1031, 2600])
def test_equals_jax_random(seed, width):
    ours = bits_of(choice_key(seed, 3)[None], np.array([5]), width)
    np.testing.assert_array_equal(ours[0], noise_bits(seed, 3, 5, width))


def test_both_words_of_a_seed_count():
    for seed in (-1, 2**63 - 1):
        assert (choice_key(seed, 0) != choice_key(seed & 0xFFFFFFFF, 0)).any()


def test_no_two_ids_share_a_word_of_a_counter():
    pair, high = noise.counter(np.arange(5000, dtype=np.uint32))
    assert len({*zip(pair.tolist(), high.tolist(), strict=True)}) == 5000


def test_padding_batch_and_slot_change_nothing():
    keys = np.stack([choice_key(seed, index) for seed in range(4) for index in range(2)])
    steps = np.arange(8, dtype=np.int32) * 3
    alone = [np.asarray(bits_of(keys[i : i + 1], steps[i : i + 1], 700)) for i in range(8)]
    order = np.array([5, 0, 7, 2, 2, 6])
    batch = np.asarray(jax.jit(bits_of, static_argnums=2)(keys[order], steps[order], 1536))
    for row, i in enumerate(order):
        np.testing.assert_array_equal(batch[row, :700], alone[i][0])


def test_every_coordinate_matters():
    base = bits_of(choice_key(1, 2)[None], np.array([3]), 1100)
    for seed, index, step in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        other = bits_of(choice_key(seed, index)[None], np.array([step]), 1100)
        assert np.mean(np.asarray(base) == np.asarray(other)) < 0.05


def test_gumbel_in_distribution_and_finite():
    keys = np.stack([choice_key(seed, 0) for seed in range(64)])
    drawn = np.sort(np.asarray(noise.gumbel(bits_of(keys, np.zeros(64, np.int32), 4096))).ravel())
    assert np.isfinite(drawn).all() and drawn[0] > -2.9 and drawn[-1] < 23
    cdf = np.exp(-np.exp(-drawn.astype(np.float64)))
    steps = np.arange(1, drawn.size + 1) / drawn.size
    assert np.abs(cdf - steps).max() < 1.63 / np.sqrt(drawn.size)  # Kolmogorov-Smirnov at 1%


def test_ids_of_a_pair_are_independent():
    """Both words of one counter: neither equal nor correlated."""
    keys = np.stack([choice_key(seed, 0) for seed in range(16)])
    drawn = gumbel_of(np.asarray(bits_of(keys, np.zeros(16, np.int32), 4096))).reshape(-1, 2, 512)
    assert abs(np.corrcoef(drawn[:, 0].ravel(), drawn[:, 1].ravel())[0, 1]) < 4 / np.sqrt(drawn.size / 2)
