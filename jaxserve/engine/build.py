"""``EngineConfig`` -> ``Engine``: opens the checkpoint, resolves what the user left open, loads, compiles, warms up."""

from __future__ import annotations

import dataclasses
import logging
import os
import random
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config import EngineConfig, Limits
from jaxserve.engine.core import EngineCore
from jaxserve.engine.describe import describe
from jaxserve.engine.design import design
from jaxserve.engine.draft_costs import adaptive_rule, without_hopeless_drafts
from jaxserve.engine.drafter import abstract_drafter, load_drafter, open_drafter
from jaxserve.engine.memory_share import ask_for_memory, tell_share
from jaxserve.engine.step_cost import fixed_step_cost
from jaxserve.errors import ConfigError
from jaxserve.models.config import ModelConfig
from jaxserve.models.sharding import named_shardings
from jaxserve.runner.attend import PagedAttention
from jaxserve.runner.buckets import burst_buckets, num_slots, row_buckets, token_buckets
from jaxserve.runner.compile import Trial, pool_free_tasks, run_trial
from jaxserve.runner.compiler import Compiler
from jaxserve.runner.config import NgramConfig, RunnerConfig
from jaxserve.runner.draft import DraftModel
from jaxserve.runner.executable_cache import ExecutableCache, make_directory
from jaxserve.runner.executables import burst_keys, propose_keys, sample_keys
from jaxserve.runner.jax_cache import jax_cache_in
from jaxserve.runner.memory import EXPLICIT, MemoryPlan, check_fits, plan_blocks
from jaxserve.runner.runner import Runner
from jaxserve.scheduler.adaptive import AdaptiveDrafts
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.weights.checkpoint import open_checkpoint
from jaxserve.weights.load import load_params
from jaxserve.weights.quantize import abstract_params, bytes_on_a_device
from jaxserve.weights.tokenizer import eos_token_ids, load_tokenizer
from pallas_kernels.lowering_processes import LoweringProcesses
from pallas_kernels.ragged_paged_attention.api import Selection

logger = logging.getLogger("jaxserve")

_DEFAULTS = {  # by platform: max_num_seqs, max_num_batched_tokens, block_size
    "cpu": (8, 512, 16),
    "gpu": (256, 8192, 64),
    "tpu": (256, 8192, 128),
}
_MOST_LOWERING_PROCESSES = 8  # more would hardly be faster: what remains is traced by one thread at a time
_STEPS_PER_DISPATCH = {"gpu": 4}  # by platform; elsewhere 1


@dataclass(frozen=True)
class Engine:
    """A running engine and what its fronts need to know of it.

    ``config`` has every ``None`` resolved that the model or the machine decides; ``info`` is for people. ``seeds``
    draws those of requests that have none, for all fronts, so that no two of them say the same.
    """

    core: EngineCore
    config: EngineConfig
    model_config: ModelConfig
    tokenizer: Any
    eos_token_ids: tuple[int, ...]
    sampling_defaults: Mapping[str, Any]
    max_model_len: int
    limits: Limits
    seeds: random.Random
    info: dict[str, Any]


def build_engine(config: EngineConfig, *, progress: bool | None = None) -> Engine:
    """Builds an engine that is ready to serve; its core isn't started. ``progress`` shows bars; None: on a terminal.

    Raises:
        CheckpointError: the model can't be read.
        ConfigError: a setting doesn't fit the model or the machine.
    """
    if config.compilation_cache_dir is not None:
        make_directory(config.compilation_cache_dir)
    with _lowering_processes(config) as lowering, jax_cache_in(config.compilation_cache_dir):
        return _build(config, lowering, progress)


def _lowering_processes(config: EngineConfig) -> LoweringProcesses:
    """None for who has a cache of JAX's own, which knows only kernels again that one process lowers in one order."""
    cores = os.cpu_count() or 1
    in_jax_cache = config.compilation_cache_dir is None and jax.config.jax_compilation_cache_dir is not None
    return LoweringProcesses(0 if cores == 1 or in_jax_cache else min(cores, _MOST_LOWERING_PROCESSES))


def _build(config: EngineConfig, lowering: LoweringProcesses, progress: bool | None) -> Engine:
    began = time.perf_counter()
    share = ask_for_memory(config)
    checkpoint = open_checkpoint(config.model, config.load_format)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(checkpoint, config.tokenizer)
    eos = checkpoint.eos_token_ids if tokenizer is None else eos_token_ids(checkpoint, tokenizer)
    platform = _platform()
    if platform == "gpu":
        tell_share(config, share)
    config = _resolve(config, checkpoint.config, platform)
    draft_checkpoint = open_drafter(config, checkpoint.config, _known(config.max_model_len), tokenizer)
    config = without_hopeless_drafts(config, platform)
    mesh = _mesh(config.tensor_parallel_size)
    model, attention, selection = design(config, checkpoint.config, _known(config.block_size), mesh)
    shardings = named_shardings(model.param_axes, mesh)
    abstract = abstract_params(model, shardings, config.quantization)
    _check_room(config, attention, bytes_on_a_device(abstract))
    runner_config = _runner_config(config, checkpoint.config, platform)
    sketch = abstract_drafter(config, draft_checkpoint, (model, attention))
    trying = _start_trial(config, Runner(model, abstract, attention, runner_config, sketch).compiler(), lowering)
    params = load_params(
        checkpoint,
        model,
        sharding=shardings,
        seed=config.seed,
        quantization=config.quantization,
        progress=progress,
    )
    drafter: DraftModel | None = None
    if config.speculative_config is not None and config.speculative_config.method == "draft_model":
        target = checkpoint, model, attention, params
        drafter = load_drafter(config, config.speculative_config, draft_checkpoint, target, progress=progress)
    loaded = time.perf_counter()
    trial = trying.result()
    memory = _plan_memory(config, Runner(model, params, attention, runner_config, drafter), trial.temp)
    check_fits(memory, max_model_len=_known(config.max_model_len), block_size=_known(config.block_size))
    planned = time.perf_counter()
    runner_config = dataclasses.replace(runner_config, num_blocks=memory.num_blocks)
    runner = Runner(model, params, attention, runner_config, drafter)
    executables = runner.start(
        cache_dir=config.compilation_cache_dir,
        progress=progress,
        temp_limit=memory.most_temp,
        lowered=trial.lowered,
        lowering=lowering,
    )
    sizes = {tokens: model.launches(tokens) == 1 for tokens, _ in runner_config.token_buckets}
    rule = adaptive_rule(config, platform, sizes, drafter)
    fixed_cost = fixed_step_cost(platform, model.layer_size / mesh.size)
    scheduler = Scheduler(_scheduler_config(config, runner_config, rule, fixed_cost))
    core = EngineCore(
        scheduler,
        runner,
        run_ahead=config.run_ahead,
        watchdog_seconds=config.watchdog_seconds,
        strict_compile=config.strict_compile,
    )
    sampler = runner.compiler().sampler_implementation(model)
    seconds = {
        "load": loaded - began,
        "plan memory": planned - loaded,
        **executables.seconds,
        "total": time.perf_counter() - began,
    }
    engine = Engine(
        core=core,
        config=config,
        model_config=checkpoint.config,
        tokenizer=tokenizer,
        eos_token_ids=eos,
        sampling_defaults=checkpoint.sampling_defaults,
        max_model_len=_known(config.max_model_len),
        limits=config.limits,
        seeds=random.Random(config.seed),
        info=describe(config, checkpoint, eos, mesh, model, selection, memory, executables, sampler, seconds),
    )
    _tell_choice(selection, config.attention_implementation, platform)
    logger.info("KV cache: %s", memory.describe()["kv cache"])
    return engine


def _tell_choice(selection: Selection, requested: str, platform: str) -> None:
    """Who runs attention: a warning where the platform has a kernel of its own that refused."""
    fell_back = requested == "auto" and selection.implementation == "xla" and platform != "cpu"
    logger.log(logging.WARNING if fell_back else logging.INFO, selection.explanation)


def _platform() -> str:
    platform = jax.default_backend()
    if platform not in _DEFAULTS:
        raise ConfigError(f"JAX runs on {platform!r}; allowed: {', '.join(_DEFAULTS)}")
    if platform == "cpu" and shutil.which("nvidia-smi"):
        logger.warning("an NVIDIA GPU is here, but JAX is CPU-only; pip install 'jaxserve-llm[cuda13]' to use it")
    return platform


def _resolve(config: EngineConfig, model: ModelConfig, platform: str) -> EngineConfig:
    """Replaces every None that the model or the machine decides."""
    seqs, tokens, block_size = _DEFAULTS[platform]
    max_model_len = config.max_model_len or model.max_position
    if max_model_len > model.max_position:
        raise ConfigError(f"max_model_len is {max_model_len}; allowed: 2..{model.max_position} (the model's context)")
    seqs = config.max_num_seqs or seqs
    batched = config.max_num_batched_tokens or max(tokens, seqs)
    if batched < seqs:
        raise ConfigError(
            f"max_num_batched_tokens is {batched}; allowed: at least max_num_seqs ({seqs}), a token for each"
        )
    dtype = config.dtype if config.dtype != "auto" else ("float32" if platform == "cpu" else "bfloat16")
    return dataclasses.replace(
        config,
        dtype=dtype,
        kv_cache_dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        max_model_len=max_model_len,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        block_size=config.block_size or block_size,
        steps_per_dispatch=config.steps_per_dispatch
        or (_STEPS_PER_DISPATCH.get(platform, 1) if config.run_ahead else 1),
    )


def _mesh(size: int) -> Mesh:
    devices = jax.devices()
    if size > len(devices):
        raise ConfigError(f"tensor_parallel_size is {size}; allowed: 1..{len(devices)} (the devices that JAX sees)")
    return Mesh(np.array(devices[:size]), ("tp",))


def _runner_config(config: EngineConfig, model: ModelConfig, platform: str) -> RunnerConfig:
    """Everything but the number of blocks, which is that of a trial here."""
    slots = num_slots(_known(config.max_num_seqs), platform)
    tokens = max(_known(config.max_num_batched_tokens), slots)  # a decode step has a token for every slot
    rows = row_buckets(slots, platform)
    burst_len = _known(config.steps_per_dispatch)
    drafts = config.speculative_config
    ngram = None
    if drafts is not None and drafts.method == "ngram":
        ngram = NgramConfig(min_len=_known(drafts.prompt_lookup_min), max_len=_known(drafts.prompt_lookup_max))
    return RunnerConfig(
        max_num_seqs=slots,
        max_model_len=_known(config.max_model_len),
        max_num_batched_tokens=tokens,
        block_size=_known(config.block_size),
        num_blocks=-(-_known(config.max_model_len) // _known(config.block_size)),
        vocab_size=model.vocab_size,
        max_drafts=drafts.num_speculative_tokens if drafts else 0,
        ngram=ngram,
        unroll_drafts=platform == "gpu",  # a loop would be kept out of its graphs
        limits=config.limits,
        token_buckets=token_buckets(tokens, rows, platform),
        row_buckets=rows,
        burst_len=burst_len,
        burst_buckets=burst_buckets(rows, drafts.num_speculative_tokens if drafts else 0) if burst_len > 1 else (),
    )


def _memory_stats(mesh: Mesh) -> dict[str, int]:
    """What the first device says of its memory; a CPU says nothing."""
    return mesh.devices.flat[0].memory_stats() or {}


def _check_room(config: EngineConfig, attention: PagedAttention, params: int) -> None:
    """Refuses, before weights are read, a pool that is too small if nothing but ``params`` bytes takes memory."""
    stats = _memory_stats(attention.mesh)
    roomiest = plan_blocks(
        limit=stats.get("bytes_limit"),
        params=params,
        state=0,
        temp=0,
        block=attention.bytes_per_block(),
        override=config.num_gpu_blocks_override,
        kv_bytes=config.kv_cache_memory_bytes,
    )
    check_fits(roomiest, max_model_len=_known(config.max_model_len), block_size=_known(config.block_size))


def _start_trial(config: EngineConfig, compiler: Compiler, lowering: LoweringProcesses) -> Future[Trial]:
    """Compiles the largest executable of each kind with a small pool, while weights are loaded, and traces what has
    nothing to do with the pool; neither where temporaries don't matter."""
    stats = _memory_stats(compiler.attention.mesh)
    thread = ThreadPoolExecutor(1, "trial")
    if stats.get("bytes_limit") is None or any(getattr(config, name) is not None for name in EXPLICIT):
        found = thread.submit(Trial)
    else:
        found = thread.submit(_try, compiler, config.compilation_cache_dir, lowering)
    thread.shutdown(wait=False)
    return found


def _plan_memory(config: EngineConfig, runner: Runner, temp: int) -> MemoryPlan:
    """Where the memory goes; ``runner`` has a pool of a trial size and isn't started, ``temp`` is its temporaries'."""
    compiler = runner.compiler()
    stats = _memory_stats(compiler.attention.mesh)
    block = compiler.attention.bytes_per_block()
    # A twin shares some arrays with its target.
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(compiler.params)}
    if compiler.drafter is not None:
        block += compiler.drafter.attention.bytes_per_block()
        leaves |= {id(leaf): leaf for leaf in jax.tree.leaves(compiler.drafter.params)}
    return plan_blocks(
        limit=stats.get("bytes_limit"),
        params=stats.get("bytes_in_use", bytes_on_a_device(list(leaves.values()))),
        state=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((compiler.slots, compiler.scratch))),
        temp=temp,
        block=block,
        override=config.num_gpu_blocks_override,
        kv_bytes=config.kv_cache_memory_bytes,
    )


def _try(compiler: Compiler, cache_dir: str | None, lowering: LoweringProcesses) -> Trial:
    cache = None if cache_dir is None else ExecutableCache.of(cache_dir, compiler)
    largest = [
        compiler.forward(*compiler.config.token_buckets[-1]),
        compiler.sample(sample_keys(compiler.config)[-1]),
        *(compiler.burst(key) for key in burst_keys(compiler.config)[-1:]),
    ]
    if compiler.drafter is not None:
        largest.append(compiler.propose(compiler.drafter, propose_keys(compiler.config)[-1]))
    return run_trial(largest, pool_free_tasks(compiler), cache, lowering)


def _scheduler_config(
    config: EngineConfig, runner: RunnerConfig, adaptive: AdaptiveDrafts | None, fixed_cost: int
) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=_known(config.max_num_seqs),
        max_model_len=runner.max_model_len,
        max_num_batched_tokens=_known(config.max_num_batched_tokens),
        step_sizes=tuple(tokens for tokens, rows in runner.token_buckets if tokens > rows),
        fixed_step_cost=fixed_cost,
        block_size=runner.block_size,
        num_blocks=runner.num_blocks,
        max_drafts=runner.max_drafts,
        adaptive_drafts=adaptive,
        enable_prefix_caching=config.enable_prefix_caching,
        policy=config.scheduling_policy,
        run_ahead=max(config.run_ahead, 2 * runner.burst_len - 1),  # a burst is planned while another is in flight
        max_seconds=config.max_seconds,
        repetition=config.repetition,
        repetition_detection=config.repetition_detection,
        vocab_size=runner.vocab_size,
    )


def _known[T](value: T | None) -> T:
    """A value that is resolved by now."""
    if value is None:
        raise RuntimeError("an engine setting was used before it was resolved")
    return value
