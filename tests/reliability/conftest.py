"""Fixtures of the reliability tests: one real engine that drafts, and prompts whose answers no rounding can change."""

import sys
from pathlib import Path

import pytest
from fakes import fast_byte_tokenizer

TESTS = Path(__file__).resolve().parents[1]
for folder in ("engine", "scheduler", "models", "sampling"):  # worlds and oracles that the tests of other packages have
    if str(TESTS / folder) not in sys.path:
        sys.path.append(str(TESTS / folder))


@pytest.fixture(scope="package")
def engine(tmp_path_factory):
    """A tiny Llama with n-gram drafts of up to four tokens; ``serve(engine, ...)`` makes LLMs on it, one at a time."""
    from serving import SMALL
    from tiny_engines import Tiny

    path = tmp_path_factory.mktemp("byte_tokenizer")
    fast_byte_tokenizer().save_pretrained(path)
    tiny = Tiny("llama", str(path), **SMALL)
    yield tiny
    tiny.close()


@pytest.fixture(scope="package")
def cases():
    """Prompts and what greedy decoding must say to them, from dense attention over the whole prefix."""
    from serving import make_cases

    return make_cases()


@pytest.fixture(scope="package")
def oracle():
    """Dense attention over the whole prefix."""
    from dense_reference import Reference

    return Reference("llama")
