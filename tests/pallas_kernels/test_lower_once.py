"""Lowering an op by itself changes nothing but how often it is lowered. Here on CPU, with what stands for a kernel."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import lower_once
from pallas_kernels.lower_once import run_lowered


class Pool(NamedTuple):
    values: jax.Array
    scales: jax.Array | None


def attend(x, pool, scale):
    """Adds to a pool in place, like an op with a KV write."""
    ref = jax.new_ref(pool.values)
    ref[0] += x * scale
    values = jax.freeze(ref)
    return values.sum() + x, Pool(values, pool.scales)


@pytest.fixture(params=[False, True], ids=["as_it_is", "by_itself"])
def by_itself(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(lower_once, "_LOWERED_FOR", {"cpu": "cpu"})
    return request.param


def step(x, pool, scale=2.0):
    """Two layers."""
    for _ in range(2):
        x, pool = run_lowered(attend, {"scale": scale}, x=x, pool=pool)
    return x, pool


def start():
    return jnp.arange(4.0), Pool(jnp.ones((3, 4)), None)


def expected(x, values, scale=2.0):
    x, values = np.asarray(x), np.array(values)
    for _ in range(2):
        values[0] += x * scale
        x = values.sum() + x
    return x, values


def test_results_are_those_of_the_op(by_itself):
    for x in (start()[0], jnp.ones(4)):
        got, pool = jax.jit(step)(x, start()[1])
        want, values = expected(x, np.ones((3, 4)))
        np.testing.assert_allclose(got, want)
        np.testing.assert_allclose(pool.values, values)
        assert pool.scales is None


def test_it_is_lowered_once_for_all_executables(by_itself):
    """Of one size and settings. What is traced is kept either way, so it is the text that is looked at."""
    x, pool = start()
    texts = [jax.jit(lambda x, pool, n=n: (step(x, pool)[0] * n, pool)).lower(x, pool).as_text() for n in (2, 3)]
    assert all(text.count("call_exported_attend") == (3 if by_itself else 0) for text in texts), "a function, two calls"
    before = lower_once.lower_here.cache_info()
    jax.jit(lambda x, pool: step(x, pool)[0] + 1)(x, pool)
    step(jnp.arange(5.0), Pool(jnp.ones((3, 5)), None))
    jax.jit(lambda x, pool: step(x, pool, scale=3.0)[0])(x, pool)
    after = lower_once.lower_here.cache_info()
    assert after.misses - before.misses == (2 if by_itself else 0), "another size, another setting"


def test_it_is_lowered_once_for_what_comes_from_a_mesh_and_for_its_own_results(by_itself):
    here = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("tp",)), PartitionSpec())
    x, pool = jax.device_put(start(), here)
    with jax.sharding.use_abstract_mesh(here.mesh.abstract_mesh):
        text = jax.jit(lambda x, pool: step(x, pool)).lower(x, pool).as_text()
    assert text.count("func.func private @call_exported_attend") == int(by_itself)


def test_a_donated_pool_is_written_in_place(by_itself):
    x, pool = start()
    memory = jax.jit(step, donate_argnums=1).lower(x, pool).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pool.values.nbytes


def test_in_a_loop_and_on_several_devices(by_itself):
    """Each device its own op, as attention runs under tensor parallelism."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    parts = PartitionSpec("tp"), PartitionSpec(None, "tp")

    def both(x, values):
        return jax.shard_map(
            lambda x, values: step(x, Pool(values, None))[0], mesh=mesh, in_specs=parts, out_specs=parts[0]
        )(x, values)

    x = jnp.arange(8.0)
    got, _ = jax.jit(lambda x, v: jax.lax.scan(lambda x, _: (both(x, v), None), x, length=2))(x, jnp.ones((3, 8)))
    want = np.asarray(x)
    for _ in range(2):
        want = np.concatenate([expected(part, np.ones((3, 4)))[0] for part in np.split(want, 2)])
    np.testing.assert_allclose(got, want, rtol=1e-6)
