"""The share of a GPU's memory that XLA takes, which must be said before its backend exists."""

from __future__ import annotations

import logging
import os

from jaxserve.config import EngineConfig

logger = logging.getLogger("jaxserve")


def ask_for_memory(config: EngineConfig) -> str:
    """Asks for ``gpu_memory_utilization`` (JAX takes 75% unless told otherwise); returns the share that stays in force.

    That is another one where the user, or an engine before this one, has said it by either of the variable's names.
    """
    # XLA refuses both at once, with an error that JAX takes for a GPU that can't be used.
    older = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if older is not None:
        return older
    return os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", f"{config.gpu_memory_utilization:.3f}")


def tell_share(config: EngineConfig, share: str) -> None:
    """Warns where the ``share`` in force isn't the one that was asked for."""
    if abs(float(share) - config.gpu_memory_utilization) >= 1e-3:
        logger.warning(
            "gpu_memory_utilization is %s, but this process takes a share of %s (by XLA_CLIENT_MEM_FRACTION, or by an "
            "engine before this one); the KV cache gets what that leaves",
            config.gpu_memory_utilization,
            share,
        )
