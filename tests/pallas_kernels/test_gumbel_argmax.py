"""The draw: against numpy and jax.random, the kernel against the reference, the kernel's noise, every refusal.

The interpreter runs the kernel on the CPU, with exact logarithms.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gumbel_argmax import gpu, noise
from pallas_kernels.gumbel_argmax.api import gumbel_argmax, supports

_EXTREMES = np.array([0, 1, 2, 255, 2**29, 2**30 - 1, 2**30, 2**30 + 1, 2**31, 2**32 - 257, 2**32 - 2, 2**32 - 1])
_LG2_ERROR = 2.0**-22  # what PTX allows lg2.approx

run = functools.partial(jax.jit, static_argnums=(3, 4))(gumbel_argmax)


def make_keys(num_rows: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 2**32, (num_rows, 2), dtype=np.uint32)


def make_temperature(num_rows: int) -> np.ndarray:
    """Every third row is greedy."""
    return np.resize(np.array([0.6, 0.0, 1.3], np.float32), num_rows)


def make_logits(num_rows: int, vocab_size: int, padded_vocab: int) -> np.ndarray:
    """Many equal values, holes of -inf, and padding that would win."""
    logits = np.random.default_rng(2).normal(0, 3, (num_rows, padded_vocab)).astype(np.float32).round(1)
    logits[:, 3:vocab_size:7] = -np.inf
    logits[:, vocab_size:] = np.inf
    return logits


def noise_of(key: np.ndarray, vocab_size: int) -> np.ndarray:
    """float64[vocab_size], with jax.random's Threefry: ids 512 apart have the two words of one element."""
    with jax.enable_x64(True), jax.threefry_partitionable(True):
        words = jax.random.bits(
            jax.random.wrap_key_data(key, impl="threefry2x32"), (-(-vocab_size // 1024), 1, 512), np.uint64
        )
        words = np.asarray(words)
    bits = np.concatenate([words >> 32, words & 0xFFFFFFFF], axis=1).reshape(-1)[:vocab_size]
    return -np.log(-np.log1p(-(bits.astype(np.float64) + 0.5) * 2.0**-32))


def check(num_rows: int, vocab_size: int, padded_vocab: int, implementation: str) -> None:
    """With and without noise, by definition. Scores that are 1e-4 apart count as equal where there is noise."""
    logits = make_logits(num_rows, vocab_size, padded_vocab)
    temperature, keys = make_temperature(num_rows), make_keys(num_rows)
    real = logits[:, :vocab_size].astype(np.float64)
    greedy = run(logits, None, None, vocab_size, implementation)
    np.testing.assert_array_equal(greedy, real.argmax(axis=1))
    drawn = np.asarray(run(logits, temperature, keys, vocab_size, implementation))
    assert drawn.dtype == np.int32
    for m in range(num_rows):
        if temperature[m] == 0:
            assert drawn[m] == greedy[m]
        else:
            scores = real[m] + float(temperature[m]) * noise_of(keys[m], vocab_size)
            assert scores[drawn[m]] > scores.max() - 1e-4


def check_edges(vocab_size: int, padded_vocab: int, implementation: str) -> None:
    """Rows of -inf and of NaN, the only id, and equal ids wherever a part, a half or the vocabulary ends."""
    places = sorted({0, 1, 511, 512, 1023, 1024, 2047, vocab_size - 513, vocab_size - 512, vocab_size - 1})
    places = [v for v in places if 0 <= v < vocab_size]
    logits = np.full((2 * len(places) + 2, padded_vocab), -np.inf, np.float32)
    for i, v in enumerate(places):
        logits[i, v] = -5.0  # alone
        logits[len(places) + i, places[i:]] = 2.0  # ties from here on
    logits[-1, :vocab_size] = np.nan
    logits[:, vocab_size:] = np.inf
    temperature, keys = np.zeros(len(logits), np.float32), make_keys(len(logits))
    expected = [*places, *places, 0]
    for arguments in ((None, None), (temperature, keys)):
        drawn = np.asarray(run(logits, *arguments, vocab_size, implementation))
        np.testing.assert_array_equal(drawn[:-1], expected)
        assert 0 <= drawn[-1] < padded_vocab
    drawn = run(logits, temperature + 1, keys, vocab_size, implementation)
    np.testing.assert_array_equal(np.asarray(drawn)[: len(places)], places)
    assert int(drawn[-2]) == 0


@pytest.mark.parametrize(("vocab_size", "padded_vocab"), [(1, 1), (37, 37), (37, 64), (512, 512), (3000, 3072)])
def test_the_reference_is_what_its_definition_says(vocab_size: int, padded_vocab: int) -> None:
    check(7, vocab_size, padded_vocab, "xla")


def test_the_references_edges() -> None:
    check_edges(2600, 2624, "xla")


@pytest.mark.parametrize(
    ("vocab_size", "padded_vocab"),
    [(512, 512), (513, 515), (1000, 1024), (1024, 1024), (1540, 1540), (2046, 2048), (5000, 5120)],
)
def test_the_gpu_kernel_in_the_interpreter(vocab_size: int, padded_vocab: int) -> None:
    with plgpu.force_gpu_interpret_mode():
        check(3, vocab_size, padded_vocab, "pallas_gpu")


def test_the_kernels_edges_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of several pairs, the last of them shorter."""
    monkeypatch.setattr(gpu, "MAX_CTAS", 44)
    assert gpu.part_pairs(22, 5300) == (2, 3)
    with plgpu.force_gpu_interpret_mode():
        check_edges(5300, 5300, "pallas_gpu")


def test_the_gpu_kernel_has_no_races() -> None:
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        check(2, 2100, 2100, "pallas_gpu")
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_rows_are_independent_of_batch_and_padding(implementation: str) -> None:
    logits, temperature, keys = make_logits(4, 1100, 1152), make_temperature(4), make_keys(4)
    with plgpu.force_gpu_interpret_mode():
        together = np.asarray(run(logits, temperature, keys, 1100, implementation))
        for m in (0, 2):
            alone = run(logits[m : m + 1, :1100], temperature[m : m + 1], keys[m : m + 1], 1100, implementation)
            assert int(alone[0]) == together[m]


@pytest.mark.parametrize("error", [0.0, _LG2_ERROR, -_LG2_ERROR])
def test_the_kernels_noise(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Right to 1e-5 but for one addend, with each logarithm as wrong as PTX allows."""
    exact = lax.log2

    def approximate(x: jax.Array) -> jax.Array:
        value = exact(x)
        return value + error * jnp.where((x > 0.5) & (x < 2), 1.0, jnp.abs(value))

    bits = np.concatenate([_EXTREMES, np.random.default_rng(3).integers(0, 2**32, 200_000)]).astype(np.uint32)
    bits = np.concatenate([bits, bits[:100_000] >> np.arange(100_000, dtype=np.uint32) % 32])  # the upper tail too
    x = np.minimum((bits.astype(np.float64) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # Near 1, float32 has 2^-24 between neighbours: the definition rounds x, so it is judged by the x that it has.
    x = np.where(x > 0.5, np.asarray(noise.uniform(jnp.asarray(bits)), np.float64), x)
    monkeypatch.setattr(lax, "log2", approximate)
    ours = np.asarray(gpu.scaled_noise(jnp.asarray(bits)), np.float64) + np.log2(np.log(2))
    assert np.abs(-np.log(2) * ours + np.log(-np.log1p(-x))).max() < (1e-5 if error else 4e-6)


def test_parts_fill_the_machine() -> None:
    assert gpu.part_pairs(8, 151936) == (148, 1)
    assert gpu.part_pairs(64, 151936) == (50, 3)
    assert gpu.part_pairs(256, 151936) == (15, 10)
    assert gpu.part_pairs(5000, 151936) == (1, 148)
    assert gpu.part_pairs(1, 600) == (1, 1)


def test_what_is_refused() -> None:
    logits, temperature, keys = make_logits(2, 600, 600), make_temperature(2), make_keys(2)
    assert supports(600, 600) is None
    assert "vocab_size is 511" in str(supports(511, 600))
    with pytest.raises(ValueError, match="'pallas_gpu' can't be used: vocab_size is 37"):
        gumbel_argmax(logits, None, None, 37, "pallas_gpu")
    with pytest.raises(ValueError, match=r"logits is float32\[2, 600\]; allowed: float32\[M, 601 or more\]"):
        gumbel_argmax(logits, None, None, 601, "xla")
    with pytest.raises(ValueError, match=r"logits is float16"):
        gumbel_argmax(logits.astype(np.float16), None, None, 600, "xla")
    with pytest.raises(ValueError, match="either both or neither"):
        gumbel_argmax(logits, temperature, None, 600, "xla")
    with pytest.raises(ValueError, match=r"keys is uint32\[1, 2\]; allowed: uint32\[2, 2\]"):
        gumbel_argmax(logits, temperature, keys[:1], 600, "xla")
    with pytest.raises(ValueError, match="implementation is 'pallas_tpu'; allowed: pallas_gpu, xla"):
        gumbel_argmax(logits, temperature, keys, 600, "pallas_tpu")


@pytest.mark.gpu
class TestOnHopper:
    @pytest.mark.parametrize("num_rows", [1, 8, 64, 256])
    @pytest.mark.parametrize(
        ("vocab_size", "padded_vocab"),
        [
            (512, 512),
            (1000, 1000),
            (50257, 50304),
            (49152, 49152),
            (128256, 128256),
            (151936, 151936),
            (151669, 151936),
        ],
    )
    def test_sizes(self, num_rows: int, vocab_size: int, padded_vocab: int) -> None:
        check(num_rows, vocab_size, padded_vocab, "pallas_gpu")

    @pytest.mark.parametrize(("vocab_size", "padded_vocab"), [(513, 515), (2046, 2048), (151936, 151936)])
    def test_edges(self, vocab_size: int, padded_vocab: int) -> None:
        check_edges(vocab_size, padded_vocab, "pallas_gpu")

    def test_noise_is_right_to_2e_minus_5(self) -> None:
        """Between two ids alone: the one that leads by so much wins."""
        V, keys = 4096, make_keys(256)
        pairs = np.random.default_rng(4).permuted(np.tile(np.arange(V), (256, 1)), axis=1)[:, :2]
        temperature = np.ones(256, np.float32)
        lead = np.array([np.subtract(*noise_of(key, V)[pair]) for key, pair in zip(keys, pairs, strict=True)])
        for winner, margin in ((0, 2e-5), (1, -2e-5)):
            logits = np.full((256, V), -np.inf, np.float32)
            logits[np.arange(256), pairs[:, 0]] = margin - lead
            logits[np.arange(256), pairs[:, 1]] = 0.0
            drawn = run(logits, temperature, keys, V, "pallas_gpu")
            np.testing.assert_array_equal(drawn, pairs[:, winner])
