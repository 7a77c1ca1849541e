"""min_p, top_k and top_p as one op: the logit at or above which a row's ids are kept.

As in vLLM, min_p counts relative to the row's maximum, top_k among what min_p left, and top_p on the renormalised rest.
All three keep an upper set of the logits' values, so ids whose logits equal the threshold's are all kept.

``pallas_gpu`` is one kernel for Hopper and a sort for it to start from (gpu.py), ``xla`` is reference.py.

Shape letters: M rows, V vocabulary.
"""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.lower_once import run_lowered
from pallas_kernels.truncation_threshold import reference

MAX_IDS = 1 << 24  # float32, in which the kernel counts, counts no further
IMPLEMENTATIONS = ("pallas_gpu", "xla")
_COLDEST = np.float32(1e-30)  # keeps 0 / temperature at 0; a greedy row keeps its maxima only


def supports(num_ids: int) -> str | None:
    """Why ``pallas_gpu`` refuses rows of so many logits, or None."""
    if num_ids > MAX_IDS:
        return f"{num_ids} ids; the GPU kernel counts to {MAX_IDS}"
    return None


def truncation_threshold(
    logits: jax.Array,  # float32[M, V], no NaN; -inf is masked
    temperature: jax.Array,  # float32[M], at least 0
    top_k: jax.Array,  # int32[M], 0 is off
    top_p: jax.Array,  # float32[M], 1 is off
    min_p: jax.Array,  # float32[M], 0 is off
    implementation: str,
) -> jax.Array:  # float32[M]
    """Kept ids are those with ``logits >= threshold``, at least the most likely one.

    The threshold is -inf where a row's settings are neutral, and may lie between the last kept logit and the next. Of
    top_p it is exact for sums of float32: ids may differ where a cumulative mass is within rounding of it. A row that
    is masked everywhere may have any threshold but NaN.

    Raises:
        ValueError: shapes, dtypes or the implementation; or its kernel can't run this vocabulary.
    """
    M = logits.shape[0]
    if logits.dtype != jnp.float32 or logits.ndim != 2:
        raise ValueError(f"logits is {logits.dtype}{list(logits.shape)}; allowed: float32[M, V]")
    settings = (("temperature", temperature), ("top_k", top_k), ("top_p", top_p), ("min_p", min_p))
    for name, x in settings:
        dtype = "int32" if name == "top_k" else "float32"
        if x.shape != (M,) or x.dtype != dtype:
            raise ValueError(f"{name} is {x.dtype}{list(x.shape)}; allowed: {dtype}[{M}]")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}; allowed: {', '.join(IMPLEMENTATIONS)}")
    temperature = jnp.maximum(temperature, _COLDEST)
    if implementation == "xla":
        return reference.truncation_threshold(logits, temperature, top_k, top_p, min_p)
    reason = supports(logits.shape[1])
    if reason is not None:
        raise ValueError(f"implementation 'pallas_gpu' can't be used: {reason}")
    # Imported here: a machine without a GPU may lack what the kernel's module needs.
    gpu = importlib.import_module("pallas_kernels.truncation_threshold.gpu")
    arrays = {"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return run_lowered(gpu.truncation_threshold, {}, **arrays)
