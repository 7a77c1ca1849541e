"""The threshold of min_p, top_k and top_p: both implementations against sorting in float64, on CPU interpreted."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.truncation_threshold import gpu
from pallas_kernels.truncation_threshold.api import IMPLEMENTATIONS, MAX_IDS, truncation_threshold

_ROUNDING = 1e-5  # of a probability


@dataclasses.dataclass(frozen=True)
class Row:
    logits: np.ndarray  # float32[V]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def check(row: Row, threshold: float) -> None:
    """Whether the kept ids are right: exactly those of min_p and top_k, within rounding those of top_p."""
    logits = row.logits.astype(np.float64)
    kept = logits >= threshold
    if np.all(logits == -np.inf):
        assert not np.isnan(threshold)
        return
    with np.errstate(divide="ignore"):
        scaled = (logits - logits.max()) / max(row.temperature, 1e-30)
        allowed = scaled >= np.log(np.float64(np.float32(row.min_p)))
    if 0 < row.top_k <= allowed.sum():
        allowed &= logits >= np.sort(logits)[-row.top_k]
    assert kept[logits.argmax()] and not (kept & ~allowed).any()
    if row.top_p >= 1:
        np.testing.assert_array_equal(kept, allowed)
        return
    mass = np.where(allowed, np.exp(scaled), 0)
    wanted = np.float64(np.float32(row.top_p)) * mass.sum()
    assert mass[kept].sum() >= wanted * (1 - _ROUNDING)
    without_last = kept & (logits > logits[kept].min())
    assert mass[without_last].sum() < max(wanted * (1 + _ROUNDING), np.finfo(np.float32).tiny)


def check_all(rows: list[Row], implementation: str | None) -> None:
    """In one batch; None interprets the kernel."""
    logits = np.stack([row.logits for row in rows])
    names = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32}
    settings = [np.array([getattr(row, name) for row in rows], dtype) for name, dtype in names.items()]
    if implementation is None:
        settings[0] = np.maximum(settings[0], np.float32(1e-30))
        found = gpu.truncation_threshold(logits, *settings, interpret=plgpu.InterpretGPUParams())
    else:
        found = jax.jit(truncation_threshold, static_argnums=5)(logits, *settings, implementation)
    for row, threshold in zip(rows, np.asarray(found), strict=True):
        check(row, float(threshold))


def make_rows(V: int, ks: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Every kind of row, mixed."""
    rng = np.random.default_rng(seed)
    peaked = rng.normal(0, 4, V).astype(np.float32)
    flat = rng.normal(0, 0.01, V).astype(np.float32)
    holes = np.where(rng.random(V) < 0.7, -np.inf, peaked).astype(np.float32)
    equal = np.full(V, 1.5, np.float32)
    ties = np.round(peaked)  # across chunks, at any k
    across_zero = np.where(ties > 3, -ties, ties) * np.float32(1e-3)  # its largest is 0.003, with both zeros below
    few = np.full(V, -np.inf, np.float32)
    few[[3, V // 2, V - 1]] = 0.0, -0.0, -2.0
    rows = [Row(x, top_k=k, top_p=p) for k in ks for x, p in ((peaked, 0.9), (ties, 1.0), (flat, 0.5))]
    rows += [Row(x, top_p=p) for x, p in ((peaked, 0.95), (flat, 0.9), (ties, 0.3), (few, 0.9), (across_zero, 0.7))]
    rows += [Row(x, 0.7, 5, 0.8) for x in (equal, holes, few, across_zero)]
    return [
        *rows,
        Row(peaked),
        Row(few),
        Row(equal, top_p=0.1),
        Row(peaked, 0.0, 3, 0.9),
        Row(ties, 0.0, 3, 0.9),
        Row(peaked, 3.0, 0, 0.99, 0.05),
        Row(peaked, 0.1, 20, 1.0, 0.3),
        Row(ties, 1.0, 0, 1.0, 1.0),
        Row(peaked, top_p=1e-38),
        Row(flat, top_p=np.float32(1 - 2**-24)),
        Row(np.full(V, -np.inf, np.float32), 1.0, 3, 0.5, 0.1),
        Row(np.full(V, -np.inf, np.float32)),
    ]


@pytest.mark.parametrize("V", [37, 1000])
def test_reference(V: int) -> None:
    check_all(make_rows(V, (1, 2, 36, 37, 900, 2000)), "xla")


def test_the_kernel_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer threads, and fewer loads at once: a warpgroup has several groups, one of them with places past the end."""
    monkeypatch.setattr(gpu, "_WARPGROUPS", 2)
    monkeypatch.setattr(gpu, "_GROUP", 2)
    gpu.truncation_threshold.clear_cache()
    check_all(make_rows(8 * gpu.CHUNK + 5, (1, 10, 700)), None)
    gpu.truncation_threshold.clear_cache()


def test_refusals() -> None:
    x, f, i = np.zeros((2, 8), np.float32), np.ones(2, np.float32), np.zeros(2, np.int32)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x.astype(np.float16), f, i, f, f, "xla"), r"logits is float16\[2, 8\]"),
        ((x, f, f, f, f, "xla"), r"top_k is float32\[2\]; allowed: int32\[2\]"),
        ((x, f, i, f, f[:1], "xla"), r"min_p is float32\[1\]; allowed: float32\[2\]"),
        ((x, f, i, f, f, "cuda"), f"implementation is 'cuda'; allowed: {', '.join(IMPLEMENTATIONS)}"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            truncation_threshold(*arguments)
    wide = jax.ShapeDtypeStruct((2, MAX_IDS + 1), np.float32)
    with pytest.raises(ValueError, match="'pallas_gpu' can't be used: 16777217 ids"):
        jax.eval_shape(lambda wide: truncation_threshold(wide, f, i, f, f, "pallas_gpu"), wide)


@pytest.mark.gpu
class TestOnHopper:
    @pytest.mark.parametrize("V", [37, 128, 1000, 49152, 128256, 151936, 262145])
    def test_every_kind_of_row(self, V: int) -> None:
        check_all(make_rows(V, (1, 63, 64, 65, 1000, 1187, 1188, 50000)), "pallas_gpu")

    @pytest.mark.parametrize("num_rows", [1, 8, 64, 256])
    def test_batches(self, num_rows: int) -> None:
        rng = np.random.default_rng(num_rows)
        scale = rng.uniform(0.01, 4, (num_rows, 1))
        logits = (rng.standard_normal((num_rows, 32000)) * scale).astype(np.float32)
        settings = zip(rng.choice([0, 1, 50, 300], num_rows), rng.choice([0.5, 0.95, 1.0], num_rows), strict=True)
        check_all([Row(x, 1.0, int(k), float(p)) for x, (k, p) in zip(logits, settings, strict=True)], "pallas_gpu")

    def test_equal_to_xla_where_sums_are_exact(self) -> None:
        """Few values, whose sums don't round: not one id may differ."""
        rng = np.random.default_rng(0)
        logits = np.where(rng.random((8, 151936)) < 0.5, 0.0, -np.inf).astype(np.float32)
        logits[rng.random(logits.shape) < 0.1] = -1e4
        logits[:, 7] = 0.0
        one = np.ones(8, np.float32)
        for k, p, m in ((0, 0.5, 0.0), (50, 0.9, 0.0), (140000, 1.0, 0.0), (0, 0.3, 0.5)):
            arguments = logits, one, np.full(8, k, np.int32), p * one, m * one
            kept = [logits >= np.asarray(truncation_threshold(*arguments, i))[:, None] for i in IMPLEMENTATIONS]
            np.testing.assert_array_equal(*kept)
