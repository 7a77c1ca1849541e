"""The draw of a sampler as one op: argmax over the vocabulary of logits plus scaled Gumbel noise.

``pallas_gpu`` is one kernel for Hopper (gpu.py), ``xla`` is reference.py.

Shape letters: M rows, V vocabulary, Vp padded vocabulary.
"""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp

from pallas_kernels.gumbel_argmax import reference
from pallas_kernels.gumbel_argmax.noise import HALF
from pallas_kernels.lower_once import run_lowered

IMPLEMENTATIONS = ("pallas_gpu", "xla")


def supports(vocab_size: int, padded_vocab: int) -> str | None:
    """Why ``pallas_gpu`` refuses rows of ``padded_vocab`` logits, or None."""
    if vocab_size < HALF:
        return f"vocab_size is {vocab_size}; the GPU kernel reads {HALF} ids at a time"
    if padded_vocab >= 2**31:
        return f"padded_vocab is {padded_vocab}; the GPU kernel's ids are int32"
    return None


def gumbel_argmax(
    logits: jax.Array,  # float32[M, Vp], no NaN
    temperature: jax.Array | None,  # float32[M], at least 0; None draws no noise
    keys: jax.Array | None,  # uint32[M, 2], one for each draw
    vocab_size: int,
    implementation: str,
) -> jax.Array:  # int32[M]
    """The lowest id among those with the largest ``logits + temperature * noise``, see noise.py.

    It has the distribution softmax(logits / temperature). Ids from ``vocab_size`` on are never drawn, whatever their
    logits are. A row that is -inf everywhere gives 0.

    Raises:
        ValueError: shapes, dtypes or the implementation; or its kernel can't run this vocabulary.
    """
    M = logits.shape[0]
    if logits.dtype != jnp.float32 or logits.ndim != 2 or not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(f"logits is {logits.dtype}{list(logits.shape)}; allowed: float32[M, {vocab_size} or more]")
    if (temperature is None) != (keys is None):
        raise ValueError("temperature and keys: either both or neither")
    if temperature is not None and keys is not None:
        for name, x, shape, dtype in (("temperature", temperature, (M,), "float32"), ("keys", keys, (M, 2), "uint32")):
            if x.shape != shape or x.dtype != dtype:
                raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; allowed: {dtype}{list(shape)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    if implementation == "xla":
        return reference.gumbel_argmax(logits, temperature, keys, vocab_size)
    reason = supports(vocab_size, logits.shape[1])
    if reason is not None:
        raise ValueError(f"implementation 'pallas_gpu' can't be used: {reason}")
    # Imported here: a machine without a GPU may lack what the kernel's module needs.
    gpu = importlib.import_module("pallas_kernels.gumbel_argmax.gpu")
    return run_lowered(gpu.gumbel_argmax, {"vocab_size": vocab_size}, logits=logits, temperature=temperature, keys=keys)
