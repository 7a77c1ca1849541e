"""For Mosaic GPU kernels, above all those with Lane semantics."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax


def when(condition: jax.Array) -> Callable[[Callable[[], None]], None]:  # bool[]
    """``pl.when``, lowered in less than a millisecond instead of 12.

    ``pl.when`` makes an integer of the condition, and jax 0.11 starts ptxas to ask for its version each time it lowers
    a conversion of a type this small.
    """

    def run(body: Callable[[], None]) -> None:
        lax.switch(jnp.where(condition, 1, 0), (lambda: None, body))

    return run
