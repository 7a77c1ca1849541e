"""Where JAX keeps what it compiles by itself while an engine starts, and afterwards."""

import jax
import numpy as np
import pytest

from jaxserve.runner.jax_cache import jax_cache_in


def test_an_engines_directory_is_jaxs_while_the_engine_starts_and_no_longer(tmp_path):
    users, engines = tmp_path / "user's", tmp_path / "engine's"

    def compile_new(number):
        jax.jit(lambda x: x * number)(np.ones(3)).block_until_ready()
        return tuple(len(list(where.glob("jit__lambda-*-cache"))) for where in (users, engines))

    with jax_cache_in(str(users)):
        assert compile_new(2.5) == (1, 0)
        with pytest.raises(RuntimeError), jax_cache_in(str(engines)):
            assert compile_new(3.5) == (1, 1)
            raise RuntimeError("the engine can't start")
        with jax_cache_in(None):
            assert compile_new(4.5) == (2, 1)
    assert jax.config.jax_compilation_cache_dir not in (str(users), str(engines))
