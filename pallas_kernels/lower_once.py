"""An op of CUDA kernels is lowered once, not once in every executable that runs it, and maybe by another process.

JAX keeps what it has traced, and lowers it anew for each executable: 0.3 to 1.5 s of Python for kernels of one size,
which up to four executables of an engine share. Here the op is lowered by itself, as ``jax.export`` does it, and
executables take it in as text. XLA inlines that, and finds the kernel compiled when a second executable asks for it.

Text can come from anywhere: ``lowering_processes`` has it made by several processes at a time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
from jax import export
from jax.sharding import AbstractMesh

# Devices' platform -> what JAX lowers for. On a CPU the kernels run in an interpreter: there is nothing to keep.
_LOWERED_FOR = {"gpu": "cuda"}
# No promise is made of the kernels' custom call from one version of JAX to the next. No text outlives its process.
_CHECKS = (export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2"),)


@dataclass(frozen=True)
class LoweredOp:
    """A text and how its results make a tree.

    Attributes:
        text: of ``jax.export``, for arrays without a tree.
        results: the results' tree, of their numbers.
    """

    text: bytes
    results: Any

    def function(self) -> Callable[..., Any]:
        """From keyword arguments, which are trees of arrays, to results; executables share its text."""
        call, tree = export.deserialize(bytearray(self.text)).call, jax.tree.structure(self.results)
        return jax.jit(lambda **arrays: jax.tree.unflatten(tree, map(_here, call(*jax.tree.leaves(arrays)))))


@dataclass(frozen=True)
class Op:
    """All that the kernels of an op depend on. Two that are equal may have one text; it can be pickled.

    Attributes:
        run: a function of a module, pure but for kernels.
        settings: names and values of its arguments that are no arrays.
        tree: of its other arguments, by name.
        leaves: their shapes and dtypes.
        platform: what JAX lowers for.
        device: abstract, or None: the default one.
    """

    run: Callable[..., Any]
    settings: tuple[tuple[str, Hashable], ...]
    tree: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    platform: str
    device: Any

    def lower(self) -> LoweredOp:
        """On this thread, in this process."""
        results = []

        def flat(*leaves: Any) -> tuple[Any, ...]:
            out = self.run(**dict(self.settings), **jax.tree.unflatten(self.tree, leaves))
            found, tree = jax.tree.flatten(out)
            results.append(_numbered(tree))
            return tuple(found)

        flat.__name__ = flat.__qualname__ = self.run.__name__  # as profiles show it
        arrays = [jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves]
        # It is one device's, whatever mesh its caller is in.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=self.device)):
            exported = export.export(jax.jit(flat), platforms=(self.platform,), disabled_checks=_CHECKS)(*arrays)
        return LoweredOp(bytes(exported.serialize()), results[0])

    def __reduce__(self) -> tuple[Any, ...]:
        # What jit returns can't be pickled, nor can the structure of a tree of our own types.
        run = self.run.__module__, self.run.__name__
        return _op_of, (*run, self.settings, _numbered(self.tree), self.leaves, self.platform, self.device)


@functools.cache
def lower_here(op: Op) -> Callable[..., Any]:
    """Lowers on this thread, what hasn't been yet."""
    return op.lower().function()


_lowerer: ContextVar[Callable[[Op], Callable[..., Any]]] = ContextVar("lowerer", default=lower_here)


@contextlib.contextmanager
def lowered_by(lowerer: Callable[[Op], Callable[..., Any]]) -> Iterator[None]:
    """What this thread traces meanwhile has its ops from ``lowerer``, which must give equal ops one function."""
    token = _lowerer.set(lowerer)
    try:
        yield
    finally:
        _lowerer.reset(token)


def lowers_apart() -> bool:
    """Whether ops are lowered by themselves for the device that this thread traces for."""
    return _platform() in _LOWERED_FOR


def run_lowered(run: Callable[..., Any], settings: Mapping[str, Hashable], **arrays: Any) -> Any:
    """``run(**settings, **arrays)`` under a jit of its own, so that the layers of a step share it.

    Args:
        run: a function of a module, pure but for kernels.
        settings: of its arguments, those that are no arrays.
        arrays: pytrees of arrays; None is one without any.
    """
    named = tuple(settings.items())
    if not lowers_apart():
        return _jitted(run, named)(**arrays)
    leaves, tree = jax.tree.flatten(arrays)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return _lowerer.get()(Op(run, named, tree, kinds, _LOWERED_FOR[_platform()], _device()))(**arrays)


@functools.cache
def _jitted(run: Callable[..., Any], settings: tuple[tuple[str, Hashable], ...]) -> Any:
    return jax.jit(functools.partial(run, **dict(settings)))


def _op_of(module: str, name: str, settings: Any, arrays: Any, leaves: Any, platform: str, device: Any) -> Op:
    run = getattr(importlib.import_module(module), name)
    return Op(run, settings, jax.tree.structure(arrays), leaves, platform, device)


def _here(x: jax.Array) -> jax.Array:  # [...] -> [...]
    """In the caller's mesh, by way of two reshapes that XLA drops.

    What an exported op returns is in no mesh, which makes it an array of another type: an op that is called with it
    would be lowered again.
    """
    return x.reshape(1, *x.shape).reshape(x.shape)


def _numbered(tree: Any) -> Any:
    """One of such a tree, of the numbers of its leaves."""
    return jax.tree.unflatten(tree, range(tree.num_leaves))


def _device() -> Any:
    return jax.sharding.get_abstract_mesh().abstract_device


def _platform() -> str:
    device = _device()
    return jax.default_backend() if device is None else device.platform
