"""What another process lowers is what this one would have; whatever becomes of such a process, the op is lowered."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import Case, make_case, make_spec
from jax.sharding import AbstractDevice

from pallas_kernels import lower_once, lowering_processes
from pallas_kernels.gumbel_argmax import gpu as gumbel_argmax
from pallas_kernels.lower_once import Op, lowered_by, run_lowered
from pallas_kernels.lowering_processes import LoweringProcesses, _Process
from pallas_kernels.ragged_paged_attention import reference
from pallas_kernels.ragged_paged_attention.types import KVLayout

SPEC = make_spec()


@pytest.fixture(autouse=True)
def lowered_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_once, "_LOWERED_FOR", {"cpu": "cpu"})


@pytest.fixture(scope="module")
def processes():
    with LoweringProcesses(2) as made:
        yield made


@pytest.fixture
def case() -> Case:
    return make_case(SPEC, [(40, 3), (7, 7), (0, 0), (20, 1)], layout=KVLayout(SPEC.head_dim))


def attend(case: Case) -> jax.Array:
    """Trees of our own types go in: a pool, a batch with a static field."""
    arrays = {"q": case.q, "pool": case.pool, "batch": dataclasses.replace(case.batch, max_width=7), "sinks": None}
    return jax.jit(lambda arrays: run_lowered(reference.attend, {"spec": SPEC}, **arrays))(arrays)


def op_of(num: int) -> Op:
    """Kernels for a GPU, of a small op."""
    shapes = {"logits": (num, 256), "temperature": (num,), "keys": (num, 2)}
    kinds = {"logits": jnp.float32, "temperature": jnp.float32, "keys": jnp.uint32}
    leaves, tree = jax.tree.flatten({name: jax.ShapeDtypeStruct(shapes[name], kinds[name]) for name in shapes})
    device = AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    kinds_of_leaves = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return Op(gumbel_argmax.gumbel_argmax, (("vocab_size", 250),), tree, kinds_of_leaves, "cuda", device)


def test_results_are_those_of_the_op(processes, case, caplog):
    with lowered_by(processes.lowerer):
        got = attend(case)
    np.testing.assert_array_equal(got, jax.jit(reference.attend, static_argnames="spec")(
        case.q, case.pool, case.batch, spec=SPEC, sinks=None
    ))  # fmt: skip
    assert not caplog.records, "another process lowered it"


def test_kernels_of_a_gpu_are_lowered_where_there_is_none(processes, caplog):
    there, here = (lower(op_of(8)) for lower in (processes._lower, Op.lower))
    assert there.results == here.results
    assert all(b"mosaic_gpu_v2" in lowered.text for lowered in (there, here))
    assert not caplog.records, "another process lowered it"


def test_equal_ops_are_lowered_once_though_threads_ask_at_the_same_time(processes, monkeypatch):
    lower, asked = _Process.lower, []
    monkeypatch.setattr(_Process, "lower", lambda process, op: asked.append(op) or lower(process, op))
    with ThreadPoolExecutor(6) as threads:
        functions = list(threads.map(processes.lowerer, [op_of(num) for num in (16, 24, 16, 24, 16, 24)]))
    assert len(asked) == len(set(map(id, functions))) == 2
    assert functions[:2] * 3 == functions


def test_a_process_that_ends_costs_a_warning(case, caplog):
    with LoweringProcesses(1) as processes, lowered_by(processes.lowerer):
        want = attend(case)
        processes._processes[0].popen.kill()
        processes._processes[0].popen.wait()
        got = attend(make_case(SPEC, [(40, 3), (7, 7), (0, 0), (20, 1)], layout=KVLayout(SPEC.head_dim), num_tokens=16))
    np.testing.assert_allclose(got[:11], want, rtol=1e-6, atol=1e-6)
    assert "has ended" in caplog.text and "attend is lowered here" in caplog.text


def test_a_process_that_ends_within_a_reply_costs_a_warning(monkeypatch, caplog):
    lowered = pickle.dumps(op_of(8).lower())
    half = f"import os; os.write({{writing}}, bytes.fromhex('{lowered[: len(lowered) // 2].hex()}'[:90000]))"
    popen = subprocess.Popen

    def start(command, pass_fds, **settings):
        return popen([*command[:2], half.format(writing=pass_fds[0])], pass_fds=pass_fds, **settings)

    monkeypatch.setattr(subprocess, "Popen", start)
    with LoweringProcesses(1) as processes:
        assert callable(processes.lowerer(op_of(8)))
    assert "has ended" in caplog.text


def test_what_a_process_prints_is_no_reply(monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    (tmp_path / "sitecustomize.py").write_text(f"print('hello'); open({str(seen)!r}, 'w').close()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with LoweringProcesses(1) as processes:
        assert processes._lower(op_of(8)).results == 0
        assert processes._processes[0].popen.poll() is None
    assert seen.exists()


def test_a_start_that_is_called_off_leaves_no_process(monkeypatch):
    """By an error elsewhere, while a thread starts them."""
    started, start = [], lowering_processes._start

    def slowly():
        started.append(start())
        time.sleep(0.2)
        return started[-1]

    monkeypatch.setattr(lowering_processes, "_start", slowly)
    with ThreadPoolExecutor(1) as thread:
        with LoweringProcesses(3) as processes:
            lowered = thread.submit(processes.lowerer, op_of(8))
            while not started:
                time.sleep(0.01)
        with pytest.raises(RuntimeError, match="were ended"):
            lowered.result()
    assert all(process.popen.poll() is not None for process in started)


@pytest.mark.parametrize("executable", ["/nowhere/python", None])
def test_without_another_process_ops_are_lowered_here(monkeypatch, caplog, executable):
    monkeypatch.setattr(sys, "executable", executable)
    with LoweringProcesses(2) as processes:
        assert callable(processes.lowerer(op_of(8)))
    assert "0 of 2 processes" in caplog.text


def test_an_op_that_cannot_be_lowered_fails_as_it_does_here():
    op = dataclasses.replace(op_of(8), settings=())
    with LoweringProcesses(1) as processes:
        for _ in range(2):
            with pytest.raises(TypeError, match="vocab_size"):
                processes.lowerer(op)


def test_none_starts_before_it_is_needed_and_none_stays():
    with LoweringProcesses(2) as processes:
        assert processes._processes == [] and processes.num_callers == 2
        processes.lowerer(op_of(8))
        started = list(processes._processes)
        assert len(started) == 2 and all(process.popen.poll() is None for process in started)
    assert all(process.popen.poll() is not None for process in started)
    with pytest.raises(RuntimeError, match="were ended"):
        processes.lowerer(op_of(32))


def test_where_ops_are_not_lowered_apart_one_thread_traces(monkeypatch):
    monkeypatch.setattr(lower_once, "_LOWERED_FOR", {})
    assert LoweringProcesses(4).num_callers == 1


def test_a_script_without_a_main_guard_runs_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import jax, jax.numpy as jnp\n"
        "from pallas_kernels.gumbel_argmax.noise import gumbel\n"
        "from pallas_kernels.lower_once import Op\n"
        "from pallas_kernels.lowering_processes import LoweringProcesses\n"
        "print('run')\n"
        "op = Op(gumbel, (), jax.tree.structure({'bits': 0}), (((3,), jnp.dtype('uint32')),), 'cpu', None)\n"
        "with LoweringProcesses(1) as processes:\n"
        "    print(processes.lowerer(op)(bits=jnp.zeros(3, jnp.uint32)).shape)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["run", "(3,)"], run.stderr
