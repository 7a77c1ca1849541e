"""min_p, top_k and top_p without a sort: the kept ids of a row are those at or above a threshold.

The threshold is exact. Ties: ids whose logits equal the threshold's are all kept. So top_k keeps more than k ids only
where several share the k-th largest logit, and top_p's is the smallest upper set of logit values whose mass reaches p.
As in vLLM, min_p counts relative to the untruncated maximum, top_k among what min_p left, and top_p on the renormalised
rest. The most likely id is always kept; a row whose settings are neutral keeps everything.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.truncation_threshold.api import truncation_threshold


def truncate(
    logits: jax.Array,  # float32[M, V]
    temperature: jax.Array,  # float32[M]
    top_k: jax.Array,  # int32[M], 0 is off
    top_p: jax.Array,  # float32[M], 1 is off
    min_p: jax.Array,  # float32[M], 0 is off
    implementation: str,
) -> jax.Array:
    """float32[M, V] with -inf at every id that isn't kept; ``implementation``: see truncation_threshold/api.py."""
    threshold = truncation_threshold(logits, temperature, top_k, top_p, min_p, implementation)
    return jnp.where(logits >= threshold[:, None], logits, -jnp.inf)
