"""Pallas' TPU simulator, set to find races and reads of what was never written.

Of the kernels that ran, it keeps the races of the last one only; ``recorded_races`` keeps those of all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

SIMULATOR = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan")


@contextmanager
def recorded_races() -> Iterator[list[Any]]:
    """The state of race detection of every kernel that the simulator starts meanwhile; complete once its results are.

    ``races_found`` of a state says what was found.
    """
    states: list[Any] = []
    new_state = interpret_pallas_call.RaceDetectionState

    def record(*arguments: Any, **named: Any) -> Any:
        states.append(new_state(*arguments, **named))
        return states[-1]

    with mock.patch.object(interpret_pallas_call, "RaceDetectionState", record):
        yield states
