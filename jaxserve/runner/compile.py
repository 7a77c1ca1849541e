"""Makes the closed set, in parallel, before the first request: from the cache where it is there."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
from tqdm import tqdm

from jaxserve.runner.compiler import Compiler, Task
from jaxserve.runner.executable_cache import ExecutableCache
from jaxserve.runner.executables import (
    Executables,
    SampleKey,
    burst_keys,
    propose_keys,
    sample_keys,
    temp_bytes,
)
from jaxserve.runner.jax_cache import ApartFromJaxCache
from jaxserve.sampling.tier import Tier
from pallas_kernels.lower_once import lowered_by
from pallas_kernels.lowering_processes import LoweringProcesses

logger = logging.getLogger("jaxserve")


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Keeps Python's garbage collector from running, in all of the process.

    What tracing makes stays until its executable is compiled, and nearly all of it goes without a collection then: to
    go through it again and again takes a twelfth of the time of tracing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _ThisThread(Executor):
    """Runs what it is given at once, so that it sees what JAX is told for this thread alone."""

    def submit[**P, R](self, fn: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        future: Future[R] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _threads(num: int | None) -> Iterator[Executor]:
    """That many; after an error what hasn't begun never does."""
    pool = ThreadPoolExecutor(num)
    try:
        yield pool
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


@dataclass(frozen=True)
class Trial:
    """What is known before a pool has its size.

    Attributes:
        temp: bytes of temporary memory that the neediest executable needs on one device.
        lowered: by name, those of ``pool_free_tasks`` that were traced meanwhile.
    """

    temp: int = 0
    lowered: Mapping[str, jax.stages.Lowered] = field(default_factory=dict)


def run_trial(
    tasks: Sequence[Task],
    pool_free: Mapping[Any, Task],
    cache: ExecutableCache | None,
    lowering: LoweringProcesses,
) -> Trial:
    """Compiles the tasks only to see what memory they need, and traces those of ``pool_free`` while that goes on.

    Nothing is traced where ``cache`` knows what the tasks need: it has the executables then.
    """
    known = {task.name: None if cache is None else cache.load_temp(task) for task in tasks}
    unknown = {task.name: task for task in tasks if known[task.name] is None}
    early = {task.name: task for task in pool_free.values()} if unknown else {}
    with _no_collections(), _threads(os.cpu_count()) as compilers, _tracers(lowering) as tracers:
        lowered = {}

        def attempt(task: Task) -> Future[Any]:
            lowered[task.name] = traced = _trace(task, lowering)
            return compilers.submit(_compile, task, traced, None, None)

        tried = {name: tracers.submit(attempt, task) for name, task in unknown.items()}
        others = {name: tracers.submit(_trace, task, lowering) for name, task in early.items() if name not in unknown}
        for name, compiling in tried.items():
            known[name] = size = temp_bytes(compiling.result().result())
            if cache is not None:
                cache.store_temp(unknown[name], size)
        lowered |= {name: traced.result() for name, traced in others.items()}
    largest = max(size for size in known.values() if size is not None)
    return Trial(largest, {name: lowered[name] for name in early})


def pool_free_tasks(compiler: Compiler) -> dict[Any, Task]:
    """What is the same for a pool of any size: all that doesn't run layers."""
    tasks: dict[Any, Task] = {("sample", key): compiler.sample(key) for key in reversed(sample_keys(compiler.config))}
    return tasks | {"stage": compiler.stage(), "admit": compiler.admit(), "prompt_scores": compiler.prompt_scores()}


def compile_all(
    compiler: Compiler,
    cache: ExecutableCache | None,
    lowering: LoweringProcesses,
    *,
    progress: bool | None,
    lowered: Mapping[str, jax.stages.Lowered] | None = None,
) -> Executables:
    """Loads and compiles on as many threads as there are cores, and traces on as many as ``lowering`` serves.

    If those are several, they don't see what JAX is told for the calling thread alone (``with jax.debug_nans(True)``).

    ``progress`` shows a bar; None: on a terminal. ``lowered``: by name, tasks that are traced already.
    """
    lowered = lowered or {}
    tasks, proposals = _tasks(compiler)
    clock = time.perf_counter
    hidden = None if progress is None else not progress
    with (
        ApartFromJaxCache() if cache is not None else contextlib.nullcontext() as apart,
        _no_collections(),
        tqdm(total=len(tasks), desc="Compiling", unit="exe", disable=hidden) as bar,
        _threads(os.cpu_count()) as compilers,
        _tracers(lowering) as tracers,
    ):
        began = clock()
        found = {} if cache is None else dict(zip(tasks, compilers.map(cache.load, tasks.values()), strict=True))
        done = {name: compiled for name, compiled in found.items() if compiled is not None}
        num_from_cache = len(done)
        bar.update(num_from_cache)
        loaded = clock()

        def begin(task: Task) -> Future[Any]:
            traced = lowered.get(task.name) or _trace(task, lowering)
            future = compilers.submit(_compile, task, traced, cache, apart)
            future.add_done_callback(lambda future: bar.update(not future.cancelled() and not future.exception()))
            return future

        begun = {name: tracers.submit(begin, task) for name, task in tasks.items() if name not in done}
        compiling = {name: future.result() for name, future in begun.items()}
        all_traced = clock() if begun else loaded
        done |= {name: future.result() for name, future in compiling.items()}
    seconds = {"load executables": loaded - began, "trace": all_traced - loaded, "compile": clock() - all_traced}
    config = compiler.config
    return Executables(
        stage=done["stage"],
        admit=done["admit"],
        prompt_scores=done["prompt_scores"],
        forward={key: done["forward", key] for key in config.token_buckets},
        sample={key: done["sample", key] for key in sample_keys(config)},
        burst={key: done["burst", key] for key in burst_keys(config)},
        propose={key: done["propose", key] for key in proposals},
        prompt_score_tokens=compiler.prompt_score_tokens,
        num_from_cache=num_from_cache,
        seconds=seconds,
    )


def _tasks(compiler: Compiler) -> tuple[dict[Any, Task], tuple[SampleKey, ...]]:
    """All tasks in the order of their tracing, and which the draft model's are.

    The last ones traced are waited for: the small ones. Before them come the large ones, and those with the same
    products lie apart: XLA:GPU tunes a product once if it has the result when the next executable asks.
    """
    config = compiler.config
    buckets, bursts = config.token_buckets[::-1], burst_keys(config)[::-1]
    mixed = [key for key in buckets if key[0] > key[1]]
    common = [key for key in bursts if key.tier is Tier.PLAIN]
    tasks: dict[Any, Task] = {("burst", key): compiler.burst(key) for key in common}
    tasks |= {("forward", key): compiler.forward(*key) for key in mixed}
    tasks |= {("burst", key): compiler.burst(key) for key in bursts if key not in common}
    proposals: tuple[SampleKey, ...] = ()
    if compiler.drafter is not None:
        proposals = propose_keys(config)
        tasks |= {("propose", key): compiler.propose(compiler.drafter, key) for key in reversed(proposals)}
    tasks |= {("forward", key): compiler.forward(*key) for key in buckets if key not in mixed}
    return tasks | pool_free_tasks(compiler), proposals


def _tracers(lowering: LoweringProcesses) -> contextlib.AbstractContextManager[Executor]:
    return _threads(lowering.num_callers) if lowering.num_callers > 1 else _ThisThread()


def _trace(task: Task, lowering: LoweringProcesses) -> jax.stages.Lowered:
    with lowered_by(lowering.lowerer):
        return task.lower()


def _compile(task: Task, lowered: Any, cache: ExecutableCache | None, apart: ApartFromJaxCache | None) -> Any:
    if cache is None or apart is None:
        return lowered.compile(task.options)
    compiled, may_be_written = apart.compile(lowered, task.options)
    if may_be_written:
        cache.store(task, compiled)
    else:
        logger.info("%s is in JAX's own cache, so it isn't kept as a whole executable", task.name)
    return compiled
