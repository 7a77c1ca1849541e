"""The GGUF container: metadata and a table of tensors, with every extent checked against the file's size.

Our own reader, because the ``gguf`` package's wraps every vocabulary entry in numpy views (2.6 s for 49k tokens, 0.1 s
here) and takes a truncated file for a whole one. Dequantisation is the package's.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from jaxserve.errors import CheckpointError, UnsupportedModelError

VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32  # bytes
MAX_DIMS = 4

# GGUF value types: the scalars by their numpy dtype, then the two of variable size.
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies. ``shape`` is slowest dimension first, as in numpy (the file lists fastest first)."""

    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # bytes from the file's start
    num_bytes: int


class GGUFFile:
    """Metadata and tensor table of a GGUF file; tensors are dequantised when asked for.

    Attributes:
        path: the file.
        metadata: values by key; arrays of numbers are numpy arrays, arrays of strings are lists.
        tensors: the table, by the file's own names.

    Raises:
        CheckpointError: not a GGUF file, a version that isn't known, truncated or damaged.
        UnsupportedModelError: one of several parts of a split model, or a tensor type that can't be dequantised.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"can't read {str(path)!r}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{str(path)!r} is empty; copy it again") from error
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, _Damaged) as error:
            raise CheckpointError(f"{str(path)!r} is truncated or damaged ({error}); copy it again") from error

    def read(self, name: str) -> np.ndarray:
        """Tensor ``name`` as float32 in memory of its own."""
        tensor = self.tensors[name]
        data = np.frombuffer(self._bytes, np.uint8, tensor.num_bytes, tensor.offset)
        values = dequantize(data.reshape(*tensor.shape[:-1], -1), tensor.kind)
        if tensor.kind == GGMLQuantizationType.F32:
            values = values.copy()  # the package's view would keep the parameter in the mapped file
        return values.reshape(tensor.shape)

    def _parse(self) -> None:
        self._at = 0
        magic, version = self._take("<4sI")
        if magic != b"GGUF":
            raise CheckpointError(f"{str(self.path)!r} isn't a GGUF file (it starts with {magic!r})")
        if version not in VERSIONS:
            raise CheckpointError(f"{str(self.path)!r} has GGUF version {version}; known: little-endian {VERSIONS}")
        num_tensors, num_values = self._take("<QQ")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self._string()
            self.metadata[key] = self._value(self._take("<I")[0])
        if self.metadata.get("split.count", 0) > 1:
            raise UnsupportedModelError(
                f"{str(self.path)!r} is one of {self.metadata['split.count']} parts; merge them with "
                "`llama-gguf-split --merge` first"
            )
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._tensor(name, dims, kind, start + offset) for name, dims, kind, offset in infos}

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dims = self._take(f"<{self._num_dims()}Q")
        kind, offset = self._take("<IQ")
        return name, dims, kind, offset

    def _num_dims(self) -> int:
        (count,) = self._take("<I")
        if not 0 < count <= MAX_DIMS:
            raise _Damaged(f"a tensor has {count} dimensions")
        return count

    def _tensor(self, name: str, dims: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise UnsupportedModelError(f"tensor {name!r} has ggml type {kind}, which isn't known") from error
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        try:
            dequantize(np.zeros((1, block_bytes), np.uint8), quantization)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"tensor {name!r} is {quantization.name}, which can't be dequantised"
            ) from error
        num_values = math.prod(dims)
        if not dims or dims[0] % block:
            raise _Damaged(f"tensor {name!r} of shape {dims} doesn't divide into {quantization.name} blocks")
        num_bytes = num_values // block * block_bytes
        if offset + num_bytes > len(self._bytes):
            raise _Damaged(f"tensor {name!r} ends at byte {offset + num_bytes}, the file at {len(self._bytes)}")
        return GGUFTensor(tuple(reversed(dims)), quantization, offset, num_bytes)

    def _take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(layout, self._bytes, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._bytes, self._at)
        start = self._at + 8
        if start + length > len(self._bytes):
            raise _Damaged(f"a string at byte {start} is {length} bytes long")
        self._at = start + length
        return self._bytes[start : start + length].decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            element, count = self._take("<IQ")
            if element == _STRING:
                return [self._string() for _ in range(count)]
            return self._numbers(element, count)
        value = self._numbers(kind, 1)[0]
        return float(str(value)) if value.dtype == np.float32 else value.item()  # 1e-05, not 9.99999974737e-06

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise _Damaged(f"value type {kind} at byte {self._at}")
        dtype = np.dtype(_SCALARS[kind])
        if self._at + count * dtype.itemsize > len(self._bytes):
            raise _Damaged(f"an array at byte {self._at} has {count} elements")
        values = np.frombuffer(self._bytes, dtype, count, self._at)
        self._at += count * dtype.itemsize
        return values


class _Damaged(Exception):
    """What is wrong at a place in the file."""
