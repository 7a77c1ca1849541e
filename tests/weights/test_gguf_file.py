"""The GGUF container, against the gguf package's own writer and reader."""

import struct

import gguf
import numpy as np
import pytest
from gguf_writing import close
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import CheckpointError, UnsupportedModelError
from jaxserve.weights.gguf_file import GGUFFile

QUANTIZED = [kind for kind in gguf.GGMLQuantizationType if kind in gguf.quants._type_traits]


@pytest.fixture
def path(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "file.gguf", "llama")
    writer.add_uint32("a.count", 7)
    writer.add_float32("a.eps", 1e-5)
    writer.add_bool("a.flag", True)
    writer.add_string("a.text", "h\u00e9llo")
    writer.add_array("a.texts", ["x", "", "\u2581y"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_tensor("matrix", np.arange(12, dtype=np.float32).reshape(3, 4))
    writer.add_tensor("vector", np.arange(5, dtype=np.float16))
    close(writer)
    return tmp_path / "file.gguf"


def test_metadata_and_tensors(path):
    file = GGUFFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert (file.metadata["a.count"], file.metadata["a.eps"], file.metadata["a.flag"]) == (7, 1e-5, True)
    assert file.metadata["a.text"] == "h\u00e9llo"
    assert file.metadata["a.texts"] == ["x", "", "\u2581y"]
    assert file.metadata["a.numbers"].tolist() == [1, 2, 3]
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"matrix": (3, 4), "vector": (5,)}
    np.testing.assert_array_equal(file.read("matrix"), np.arange(12).reshape(3, 4))
    np.testing.assert_array_equal(file.read("vector"), np.arange(5))
    assert file.read("vector").dtype == np.float32
    assert file.read("matrix").flags.writeable  # not the mapped file


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_every_quantisation_of_the_gguf_package(tmp_path, kind):
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    # Small bytes keep the scales in range; what they mean is the package's business.
    data = np.random.default_rng(0).integers(0, 60, (3, 2 * block_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    close(writer)
    file = GGUFFile(tmp_path / "q.gguf")
    assert file.tensors["w"].shape == (3, 2 * block)
    np.testing.assert_array_equal(file.read("w"), gguf.quants.dequantize(data, kind))


def test_a_tensor_type_that_cannot_be_dequantised_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("w", np.zeros((2, 2), np.int32))
    close(writer)
    with pytest.raises(UnsupportedModelError, match="'w' is I32"):
        GGUFFile(tmp_path / "q.gguf")


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_every_truncation_is_found(tmp_path_factory, share):
    directory = tmp_path_factory.mktemp("cut")
    writer = gguf.GGUFWriter(directory / "whole.gguf", "llama")
    writer.add_array("a.texts", ["one", "two"])
    writer.add_tensor("w", np.ones((3, 8), np.float32))  # 96 bytes: the file ends with them
    close(writer)
    whole = (directory / "whole.gguf").read_bytes()
    (directory / "cut.gguf").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError):
        GGUFFile(directory / "cut.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(40), "isn't a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "GGUF version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "GGUF version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**60), "truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"k", 99), "value type 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 2**40), "truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1s", 1, b"\xff"), "truncated or damaged"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sI", 1, b"t", 9), "9 dimensions"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GGUFFile(tmp_path / "bad.gguf")


def test_a_directory_is_not_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="can't read"):
        GGUFFile(tmp_path)
