"""JAX's own persistent compilation cache: where it is while an engine starts, and kept apart from ours.

An executable that was read from it can't be written again: XLA:CPU loses some of its functions on the way, and says so
only when it runs. So while our executables are compiled JAX keeps none of them, and one that it has all the same (from
a user's own cache) is used but not written.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import jax
import jax.monitoring
from jax.experimental.compilation_cache.compilation_cache import reset_cache

_HIT_EVENT = "/jax/compilation_cache/cache_hits"
_SETTING = "jax_persistent_cache_min_compile_time_secs"


@contextlib.contextmanager
def jax_cache_in(directory: str | None) -> Iterator[None]:
    """JAX keeps what it compiles meanwhile in ``directory``; None: wherever the user has it do so, if anywhere."""
    if directory is None:
        yield
        return
    before = jax.config.jax_compilation_cache_dir
    _move_jax_cache(directory)
    try:
        yield
    finally:
        _move_jax_cache(before)


def _move_jax_cache(directory: str | None) -> None:
    jax.config.update("jax_compilation_cache_dir", directory)
    reset_cache()  # JAX opens it once, and would stay with that one


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
