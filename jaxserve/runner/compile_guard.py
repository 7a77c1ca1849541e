"""Counts compilations while serving: the set of executables is closed, so there must be none."""

from __future__ import annotations

import logging
import threading
from types import TracebackType
from typing import Any, Self

import jax.monitoring

logger = logging.getLogger("jaxserve")

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileGuard:
    """Counts the compilations of the thread that entered it."""

    def __init__(self) -> None:
        self.num_compiles = 0
        self._thread = 0

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT and threading.get_ident() == self._thread:
            self.num_compiles += 1
            logger.warning("an executable was compiled while serving (%.2f s)", duration_secs)
