"""Compiled executables on disk, so that a second start neither traces nor compiles.

JAX's own persistent cache is looked up by the lowered program: it saves compiling, not the tracing and lowering before
it, which for some twenty programs of many layers take longer than everything else of a warm start. Here the key is
what the programs are made from: the sources of this package, its settings, the shapes, the versions, the device.

Reading a file runs what is in it: the directory must be as trustworthy as the installation.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable

import jaxserve.models
import pallas_kernels
from jaxserve.errors import ConfigError
from jaxserve.runner.compiler import Compiler, Task

logger = logging.getLogger("jaxserve")


def make_directory(directory: str) -> None:
    """Makes the directory for executables, before anything is loaded that would be lost.

    One that is there and can't be written may still be read from: that costs a warning, later.

    Raises:
        ConfigError: it isn't there and can't be made.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"compilation_cache_dir is {directory!r}, which can't be made ({error.strerror}); allowed: a directory, or "
            "a path where one can be made"
        ) from error


@dataclass(frozen=True)
class ExecutableCache:
    """The executables of one compiler in one directory.

    Attributes:
        devices: what they run on.
        identity: digest of everything but the task's name that an executable depends on.
    """

    directory: Path
    devices: tuple[Any, ...]
    identity: str

    @classmethod
    def of(cls, directory: str, compiler: Compiler) -> ExecutableCache:
        devices = tuple(compiler.attention.mesh.devices.flat)
        parts = [_sources(), *_machine(devices), *_statics(compiler)]
        return cls(Path(directory) / "jaxserve", devices, _digest(part.encode() for part in parts))

    def load(self, task: Task) -> Any | None:
        """The compiled task; None where there is none, or, with a warning, where it can't be read."""
        path = self._path(task, ".executable")
        try:
            return serialize_executable.deserialize_and_load(
                _unseal(path.read_bytes()),
                jax.tree.structure((task.args, {})),
                jax.tree.structure(task.out),
                backend=self.devices[0].client,
                execution_devices=self.devices,
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, jax.errors.JaxRuntimeError) as e:
            logger.warning("%s can't be used, so %s is compiled again: %s", path, task.name, e)
            return None

    def store(self, task: Task, compiled: Any) -> None:
        """Keeps the compiled task; where it can't be written, with a warning, it isn't kept."""
        data, in_tree, out_tree = serialize_executable.serialize(compiled)
        if in_tree != jax.tree.structure((task.args, {})) or out_tree != jax.tree.structure(task.out):
            raise RuntimeError(f"{task.name} was compiled for other arguments or results than its task's")
        self._write(self._path(task, ".executable"), _seal(data))

    def load_temp(self, task: Task) -> int | None:
        """Bytes of temporary memory, where ``store_temp`` was told."""
        path = self._path(task, ".temp")
        return int(path.read_text()) if path.exists() else None

    def store_temp(self, task: Task, num_bytes: int) -> None:
        self._write(self._path(task, ".temp"), str(num_bytes).encode())

    def _path(self, task: Task, suffix: str) -> Path:
        return self.directory / f"{task.name}-{_digest([self.identity.encode(), _shapes(task).encode()])}{suffix}"

    def _write(self, path: Path, data: bytes) -> None:
        """In full or not at all: other processes may read."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.directory, delete_on_close=False) as file:
                file.write(data)
                file.close()
                os.replace(file.name, path)
        except OSError as e:
            logger.warning("%s can't be written, so the next start makes it again: %s", path, e)


def _seal(data: bytes) -> bytes:
    return hashlib.sha256(data).digest() + data


def _unseal(sealed: bytes) -> bytes:
    """What was sealed.

    Raises:
        ValueError: it was damaged since. What is damaged isn't unpickled: anything could come of that.
    """
    size = hashlib.sha256().digest_size
    digest, data = sealed[:size], sealed[size:]
    if hashlib.sha256(data).digest() != digest:
        raise ValueError("the file is damaged")
    return data


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:32]


@functools.cache
def _sources() -> str:
    """Digest of the package's own files, code and tuning data."""
    folders = [str(Path(__file__).parents[1]), *jaxserve.models.__path__, *pallas_kernels.__path__]
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.suffix in (".py", ".json")]
    return _digest(path.name.encode() + b"\0" + path.read_bytes() for path in sorted(set(files)))


def _machine(devices: tuple[Any, ...]) -> list[str]:
    """What the compiler is, what it compiles for, and what it was told."""
    client = devices[0].client
    settings = {name: value for name, value in jax.config.values.items() if "cache" not in name and "log" not in name}
    flags = os.environ.get("XLA_FLAGS", ""), os.environ.get("LIBTPU_INIT_ARGS", "")
    return [
        f"{version('jax')} {version('jaxlib')} {client.platform} {client.platform_version}",
        repr([(device.id, device.device_kind) for device in devices]),
        repr(sorted(settings.items(), key=lambda item: item[0])),
        repr(flags),
    ]


def _statics(compiler: Compiler) -> list[str]:
    """Settings that are compiled in; tasks' names say the rest."""
    statics = [repr(compiler.config), repr(compiler.fields)]
    models = [(compiler.model, compiler.attention)]
    if compiler.drafter is not None:
        models.append((compiler.drafter.model, compiler.drafter.attention))
    for model, attention in models:
        mesh = sorted(attention.mesh.shape.items())
        model_statics = model.config, str(model.dtype), model.fused
        statics.append(repr((*model_statics, attention.specs, attention.implementation, mesh)))
    return statics


def _shapes(task: Task) -> str:
    """Of the arguments, with where they lie."""
    leaves, tree = jax.tree.flatten(task.args)
    return repr((str(tree), [(leaf.shape, str(leaf.dtype), str(leaf.sharding.spec)) for leaf in leaves]))
