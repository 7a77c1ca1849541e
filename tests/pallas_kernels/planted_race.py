"""Two kernels in the simulator, one of which reads a buffer before it waits for the copy into it. Prints what was
found, as JSON. A program of its own: the simulator is global, and a kernel with a race could upset the tests beside it.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from simulator import SIMULATOR, recorded_races


def copied(*, waits: bool) -> bool:
    """Whether a kernel that copies ones raced. The simulator of jax 0.12 raises, that of 0.11 keeps it to itself."""

    def kernel(x: Any, out: Any, buffer: Any, sem: Any) -> None:
        copy = pltpu.make_async_copy(x, buffer, sem)
        copy.start()
        if waits:
            copy.wait()
        out[...] = buffer[...]
        if not waits:
            copy.wait()

    x = jnp.ones((8, 128))
    call = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
        interpret=SIMULATOR,
    )
    with recorded_races() as races:
        try:
            unwritten = bool(np.isnan(np.asarray(call(x))).all())  # waits for the kernel
        except jax.errors.JaxRuntimeError as error:
            if "RACE DETECTED" not in str(error):
                raise
            return True
    (state,) = races
    if unwritten != state.races_found:
        raise RuntimeError(f"raced: {state.races_found}, read what was never written: {unwritten}")
    return bool(state.races_found)


if __name__ == "__main__":
    found = {"waits": copied(waits=True), "reads_first": copied(waits=False)}
    print(json.dumps(found))
