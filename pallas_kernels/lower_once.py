"""An op of CUDA kernels is lowered once in a process, not once in every executable that runs it.

JAX keeps what it has traced, and lowers it anew for each executable: 0.3 to 1 s of Python for our kernels of one size,
which up to four executables of an engine share. Here the op is lowered by itself, as ``jax.export`` does it, and
executables take it in as text. XLA inlines that, and finds the kernel compiled when a second executable asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractMesh

# Devices' platform -> what JAX lowers for. On a CPU the kernels run in an interpreter: there is nothing to keep.
_LOWERED_FOR = {"gpu": "cuda"}
# No promise is made of the kernels' custom call from one version of JAX to the next. Nothing here outlives the process.
_CHECKS = (export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2"),)


def run_lowered(op: Callable[..., Any], settings: Mapping[str, Hashable], **arrays: Any) -> Any:
    """``op(**settings, **arrays)`` under a jit of its own, so that the layers of a step share it.

    Args:
        op: a function of a module, pure but for kernels.
        settings: of its arguments, those that are no arrays.
        arrays: pytrees of arrays; None is one without any.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    run = _jitted(op, tuple(settings.items()))
    if platform in _LOWERED_FOR:
        leaves, tree = jax.tree.flatten(arrays)
        run = _lowered(run, tree, tuple((leaf.shape, leaf.dtype) for leaf in leaves), _LOWERED_FOR[platform], device)
    return run(**arrays)


@functools.cache
def _jitted(op: Callable[..., Any], settings: tuple[tuple[str, Hashable], ...]) -> Any:
    return jax.jit(functools.partial(op, **dict(settings)))


@functools.cache
def _lowered(
    run: Any,  # jitted
    tree: Any,
    leaves: tuple[tuple[tuple[int, ...], Any], ...],  # shapes and dtypes
    platform: str,
    device: Any,
) -> Callable[..., Any]:
    arrays = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    # It is one device's, whatever mesh its caller is in.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        exported = export.export(run, platforms=(platform,), disabled_checks=_CHECKS)(**arrays)
    return jax.jit(exported.call)
