"""Rope against the rotation of complex numbers, and its scalings against their published rules."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models.config import LinearScaling, Llama3Scaling, RopeConfig
from jaxserve.models.rope import inverse_frequencies, rope_tables
from pallas_kernels.qkv_prologue.reference import apply_rope

POSITIONS = np.array([0, 1, 2, 63, 257, 8191], np.int32)


def rotate(x, positions, frequencies):
    """Dimension i is the real part, i + D/2 the imaginary part, of a number turned by position * frequency."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[:, None, None] * np.asarray(frequencies))
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("head_dim", [2, 12, 64])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-3), (jnp.bfloat16, 2e-2)])
def test_rotation(head_dim, dtype, tolerance):
    rope = RopeConfig(10000.0)
    x = jax.random.normal(jax.random.key(0), (len(POSITIONS), 3, head_dim)).astype(dtype)
    table = rope_tables([rope], jnp.asarray(POSITIONS), head_dim)[rope]
    frequencies = [10000.0 ** (-i / (head_dim / 2)) for i in range(head_dim // 2)]
    turned = apply_rope(x, table)
    assert turned.dtype == dtype
    expected = rotate(np.asarray(x, np.float64), POSITIONS, frequencies)
    np.testing.assert_allclose(np.asarray(turned, np.float64), expected, atol=tolerance, rtol=tolerance)


def test_position_zero_changes_nothing():
    rope = RopeConfig(10000.0)
    x = jax.random.normal(jax.random.key(0), (1, 2, 12))
    np.testing.assert_array_equal(apply_rope(x, rope_tables([rope], jnp.zeros(1, jnp.int32), 12)[rope]), x)


def test_linear_scaling_divides_positions():
    plain, scaled = RopeConfig(1e6), RopeConfig(1e6, LinearScaling(8.0))
    tables = rope_tables([plain, scaled], jnp.arange(0, 800, 8), 20)
    unscaled = rope_tables([plain], jnp.arange(100), 20)[plain]
    for stretched, expected in zip(tables[scaled], unscaled, strict=True):
        np.testing.assert_allclose(stretched, expected, atol=1e-5)


def test_llama3_scaling_by_wavelength():
    scaling = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
    longest, shortest = 8192 / 1.0, 8192 / 4.0
    expected, kinds = [], set()
    for frequency in inverse_frequencies(RopeConfig(500000.0), 128):
        wavelength = 2 * math.pi / frequency
        if wavelength < shortest:
            expected.append(frequency)
            kinds.add("kept")
        elif wavelength > longest:
            expected.append(frequency / 8.0)
            kinds.add("slowed")
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            expected.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
            kinds.add("blended")
    assert kinds == {"kept", "slowed", "blended"}
    np.testing.assert_allclose(inverse_frequencies(RopeConfig(500000.0, scaling), 128), expected, rtol=1e-12)


def test_layers_with_equal_ropes_share_a_table():
    local, far = RopeConfig(1e4), RopeConfig(1e6, LinearScaling(8.0))
    assert list(rope_tables([local, far, RopeConfig(1e4), local], jnp.arange(4), 12)) == [local, far]
