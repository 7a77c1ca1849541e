"""Fixtures of the engine's tests: a tokenizer with a byte a token, engines that are built once, and their oracles."""

import functools
import sys
from pathlib import Path

import pytest
from fakes import fast_byte_tokenizer

TESTS = Path(__file__).resolve().parents[1]
for folder in ("models", "sampling"):  # oracles that the tests of other packages have
    if str(TESTS / folder) not in sys.path:
        sys.path.append(str(TESTS / folder))


@pytest.fixture(scope="session")
def byte_tokenizer_path(tmp_path_factory):
    """A directory with a real fast tokenizer: ids 0..255 are bytes."""
    path = tmp_path_factory.mktemp("byte_tokenizer")
    fast_byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def tiny(byte_tokenizer_path):
    """``tiny(name, **EngineConfig settings)``: an engine of a tiny model, built the first time it is asked for."""
    from tiny_engines import Tiny

    made = []

    @functools.cache
    def make(name, **settings):
        made.append(Tiny(name, byte_tokenizer_path, **settings))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture(scope="session")
def reference():
    """``reference(name)``: the oracle of a tiny model."""
    from dense_reference import Reference

    return functools.cache(Reference)
