"""jaxserve: an LLM serving engine for TPU and GPU in JAX.

``import jaxserve`` starts no backend: names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig, Limits
    from jaxserve.engine.async_engine import AsyncEngine
    from jaxserve.errors import (
        CheckpointError,
        CompileAfterWarmupError,
        ConfigError,
        EngineDeadError,
        InvalidRequestError,
        JaxserveError,
        KVCacheTooSmallError,
        TokenizerError,
        UnsupportedModelError,
    )
    from jaxserve.llm import LLM
    from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from jaxserve.sampling_params import RepetitionDetection, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine",
    "CheckpointError",
    "CompileAfterWarmupError",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineDeadError",
    "InvalidRequestError",
    "JaxserveError",
    "KVCacheTooSmallError",
    "LLM",
    "Limits",
    "Logprob",
    "RepetitionDetection",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "TokenizerError",
    "UnsupportedModelError",
]
_HOMES = {
    "jaxserve.config": ("EngineConfig", "Limits"),
    "jaxserve.engine.async_engine": ("AsyncEngine",),
    "jaxserve.llm": ("LLM",),
    "jaxserve.outputs": ("CompletionOutput", "Logprob", "RequestMetrics", "RequestOutput"),
    "jaxserve.sampling_params": ("RepetitionDetection", "SamplingParams"),
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'jaxserve' has no attribute {name!r}")
    home = next((module for module, names in _HOMES.items() if name in names), "jaxserve.errors")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
