"""Ragged paged attention: one op for decode, verify and prefill, and the choice of the implementation that runs it.

The implementations are ``pallas_gpu`` (gpu.py, Mosaic GPU, Hopper), ``pallas_tpu`` (tpu.py) and ``xla``
(reference.py). Which one runs is decided once, by ``select_implementation``; afterwards the name is a static
argument.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import jax

from pallas_kernels.lower_once import run_lowered
from pallas_kernels.ragged_paged_attention import kv_write
from pallas_kernels.ragged_paged_attention.types import (
    AttentionSpec,
    Implementation,
    KVLayout,
    KVPool,
    RaggedBatch,
    Sinks,
)

IMPLEMENTATIONS = ("pallas_gpu", "pallas_tpu", "xla")  # in order of preference
_PLATFORM = {"pallas_gpu": "gpu", "pallas_tpu": "tpu"}
_PLATFORM_ALIASES = {"cuda": "gpu"}


class UnsupportedAttentionError(ValueError):
    """The requested implementation can't run this attention here; the message says why."""


@dataclass(frozen=True)
class Selection:
    """The implementation that runs, and why the ones before it don't."""

    implementation: Implementation
    explanation: str  # one line, for the log


def select_implementation(
    spec: AttentionSpec, platform: str, requested: str = "auto", compute_capability: str | None = None
) -> Selection:
    """Chooses who runs ``spec``.

    Args:
        spec: the attention of one layer on one shard.
        platform: ``jax.Device.platform`` of the device that runs it: "cpu", "gpu" (or "cuda") or "tpu".
        requested: "auto" takes the first of ``IMPLEMENTATIONS`` that works; a name takes that one or raises.
        compute_capability: of the GPU ("9.0" is Hopper), where the caller knows it.

    Raises:
        UnsupportedAttentionError: ``requested`` is a name and that implementation refuses, or isn't known.
    """
    if requested != "auto":
        reason = refusal(spec, platform, requested, compute_capability)
        if reason is not None:
            raise UnsupportedAttentionError(f"attention implementation {requested!r} can't be used: {reason}")
        return Selection(requested, f"attention runs on {requested}, as requested")
    refusals: list[tuple[Implementation, str]] = []
    for name in IMPLEMENTATIONS:
        reason = refusal(spec, platform, name, compute_capability)
        if reason is None:
            because = "".join(f"; not {other}: {why}" for other, why in refusals)
            return Selection(name, f"attention runs on {name}{because}")
        refusals.append((name, reason))
    raise UnsupportedAttentionError(  # reached only if the reference refuses something
        "no attention implementation fits: " + "; ".join(f"{name}: {why}" for name, why in refusals)
    )


def refusal(
    spec: AttentionSpec, platform: str, implementation: Implementation, compute_capability: str | None = None
) -> str | None:
    """Why ``implementation`` can't run ``spec`` on ``platform``, or None if it can."""
    if implementation not in IMPLEMENTATIONS:
        return f"unknown implementation {implementation!r}; known: auto, {', '.join(IMPLEMENTATIONS)}"
    wanted = _PLATFORM.get(implementation)
    platform = _PLATFORM_ALIASES.get(platform, platform)
    if wanted is not None and platform != wanted:
        return f"it needs platform {wanted!r}, this is {platform!r}"
    if implementation == "pallas_gpu" and compute_capability is not None and compute_capability != "9.0":
        return f"it needs a Hopper GPU (compute capability 9.0), this one has {compute_capability}"
    return _module(implementation).supports(spec)


def kv_layout(spec: AttentionSpec, implementation: Implementation) -> KVLayout:
    """How ``implementation`` wants the pool to be stored."""
    return _module(implementation).kv_layout(spec)


def ragged_paged_attention(
    q: jax.Array,  # [T, Hq, D], in spec.dtype
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    implementation: Implementation,
    sinks: Sinks = None,  # float32[Hq]
) -> jax.Array:  # [T, Hq, D], in spec.dtype
    """Attention of packed query tokens to their rows' keys in the pool.

    Query token i of row r stands at position ``p = context_len - width + i`` and sees the row's keys at positions
    ``max(0, p - window + 1) .. p``, scores ``softcap(q.k * scale)``, softmax over them and, with sinks, over one more
    score per head that has no value. This step's keys must already be in the pool (``write_kv``). Entries of the
    table past a row's context may be anything; the blocks behind them aren't used. Outputs of padding tokens are
    finite.

    Raises:
        ValueError: shapes or dtypes don't fit ``spec``, or sinks are given to a spec without them (or the other way
            round).
    """
    _check_arguments(q, pool, spec, sinks)
    if implementation == "pallas_gpu":
        return run_lowered(_module(implementation).attend, {"spec": spec}, q=q, pool=pool, batch=batch, sinks=sinks)
    return _jitted(implementation)(q, pool, batch, spec, sinks)


@functools.partial(jax.jit, static_argnames=("spec", "implementation"))
def write_kv(
    k: jax.Array,  # [T, Hk, D]
    v: jax.Array,  # [T, Hk, D]
    pool: KVPool,
    batch: RaggedBatch,
    spec: AttentionSpec,
    implementation: Implementation = "xla",
) -> KVPool:
    """Writes this step's keys and values (see kv_write.py), in place where the caller's jit donates the pool.

    Pass the ``implementation`` that attends: on TPU XLA's scatter isn't always in place, and a kernel writes.
    """
    if implementation == "pallas_tpu":
        return importlib.import_module("pallas_kernels.ragged_paged_attention.tpu_write").write_kv(
            k, v, pool, batch, spec
        )
    return kv_write.write_kv(k, v, pool, batch, spec)


def _check_arguments(q: jax.Array, pool: KVPool, spec: AttentionSpec, sinks: Sinks) -> None:
    if q.shape[1:] != (spec.num_heads, spec.head_dim) or q.dtype != spec.dtype:
        raise ValueError(f"q is {q.dtype}{list(q.shape)}, spec says {spec.dtype}[T, {spec.num_heads}, {spec.head_dim}]")
    if pool.values.shape[1:4] != (2, spec.num_kv_heads, spec.block_size) or pool.values.dtype != spec.kv_dtype:
        raise ValueError(
            f"the pool is {pool.values.dtype}{list(pool.values.shape)}, "
            f"spec says {spec.kv_dtype}[N, 2, {spec.num_kv_heads}, {spec.block_size}, Ds]"
        )
    if spec.kv_dtype == "int8" and pool.scales is None:
        raise ValueError("an int8 pool needs scales")
    if (sinks is not None) != spec.has_sinks:
        raise ValueError(f"sinks are {'given' if sinks is not None else 'missing'}, spec.has_sinks is {spec.has_sinks}")


def _module(implementation: Implementation) -> ModuleType:
    # Imported here: a machine without that accelerator may lack what the kernel's module needs.
    name = {"pallas_gpu": "gpu", "pallas_tpu": "tpu", "xla": "reference"}[implementation]
    return importlib.import_module(f"pallas_kernels.ragged_paged_attention.{name}")


@functools.cache
def _jitted(implementation: Implementation) -> Callable[..., jax.Array]:
    """The implementation under its own jit: a step with 32 equal layers lowers it once."""
    return jax.jit(_module(implementation).attend, static_argnums=3)
