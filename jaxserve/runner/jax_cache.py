"""JAX's own persistent compilation cache, kept apart from ours.

An executable that was read from it can't be written again: XLA:CPU loses some of its functions on the way, and says so
only when it runs. So while our executables are compiled JAX keeps none of them, and one that it has all the same (from
a user's own cache) is used but not written.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any, Self

import jax
import jax.monitoring

_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_SETTING = "jax_persistent_cache_min_compile_time_secs"


class ApartFromJaxCache:
    """A context manager; while it is entered, JAX's cache is read but not written. Any thread may compile in it."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._before = 0.0

    def __enter__(self) -> Self:
        self._before = getattr(jax.config, _SETTING)
        jax.config.update(_SETTING, float("inf"))
        jax.monitoring.register_event_listener(self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_listener(self._heard)
        jax.config.update(_SETTING, self._before)

    def compile(self, lowered: jax.stages.Lowered, options: Any) -> tuple[Any, bool]:
        """The executable, and whether it may be written: not if JAX read it from its cache."""
        self._local.hit = False
        compiled = lowered.compile(options)
        return compiled, not self._local.hit

    def _heard(self, event: str, **_: Any) -> None:
        if event == _HIT_EVENT:  # on the thread that compiles
            self._local.hit = True
