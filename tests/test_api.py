"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import jaxserve

FRONT = """
import sys
import jaxserve
from jaxserve import LLM, AsyncEngine, EngineConfig, RequestOutput, SamplingParams
import jaxserve.cli_flags, jaxserve.text.chat
assert "jax" not in sys.modules, "importing the fronts imported jax"
"""


def test_every_public_name_is_there():
    for name in jaxserve.__all__:
        assert getattr(jaxserve, name).__name__ == name
    assert set(jaxserve.__all__) <= set(dir(jaxserve))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = jaxserve.nonsense


def test_importing_the_fronts_imports_no_jax():
    subprocess.run([sys.executable, "-c", FRONT], check=True)


def test_every_error_is_exported():
    import jaxserve.errors as errors

    tree = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, errors.JaxserveError)}
    assert tree <= set(jaxserve.__all__)
