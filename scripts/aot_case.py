"""aot_case.py NAME RESULT: compiles one case of aot_gate.py, checks what came out, and writes the figures to the file
RESULT. aot_gate.py runs it, with the environment that it needs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from aot_checks import (
    MIB,
    attention_vmem,
    check_fused,
    check_kernels,
    check_lowering,
    check_memory,
    check_sampler,
    check_vmem,
    check_weights,
    kernel_calls,
    num_lowered,
)
from aot_gate import CPU_LIMIT, MAX_MODEL_LEN, MAX_SEQS, ROOT, Case, cases
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.models.fused import GPU
from jaxserve.models.registry import build
from jaxserve.models.sharding import named_shardings
from jaxserve.runner.attend import POOL, WHOLE, PagedAttention, attention_specs
from jaxserve.runner.compiler import Compiler, Task
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.executables import BurstKey, SampleKey
from jaxserve.runner.state import init_scratch, init_slots
from jaxserve.sampling.tier import Tier
from jaxserve.weights.config_file import read_model_toml
from jaxserve.weights.quantize import abstract_params
from pallas_kernels.ragged_paged_attention import api
from pallas_kernels.ragged_paged_attention.tpu import SPARE_VMEM
from pallas_kernels.ragged_paged_attention.types import AttentionSpec, RaggedBatch

TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
H100_CONFIG = ROOT / "scripts" / "data" / "h100_target_config.txt"
STEP_LAYERS = 2
BURST_LEN = 4


@dataclass(frozen=True)
class Lowered:
    """A lowered executable and what is expected of it."""

    stage: Any  # jax.stages.Lowered
    donated_bytes: int  # that must be aliased
    temp_mib: int  # bound on temporary memory
    attention_layers: int = 0
    tier: Tier | None = None  # of a sampler in it
    options: Mapping[str, Any] | None = None  # of XLA's compiler, as an engine gives them


def run_case(case: Case) -> dict[str, Any]:
    """Figures of the case, and ``failures``: what doesn't hold."""
    mesh = Mesh(np.array(topology(case.target).devices[:1]), ("tp",))
    # Without the abstract mesh, tracing a kernel asks the machine's own device for its properties.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if case.kind == "layers":
            figures = lower_all_layers(case, mesh)
        else:
            lower = {"op": lower_op, "step": lower_step, "sample": lower_full_sampler, "burst": lower_burst}[case.kind]
            figures = compile_and_check(case, lower(case, mesh))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    figures["cpu_seconds"] = round(sum(u.ru_utime + u.ru_stime for u in usage), 1)
    figures["peak_mib"] = usage[0].ru_maxrss // 1024
    return figures


def topology(target: str) -> Any:
    if target == "h100":
        return topologies.get_topology_desc(platform="cuda", target_config=H100_CONFIG.read_text(), topology="1x1x1")
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[target])


# -- what is expected ---------------------------------------------------------------------


def compile_and_check(case: Case, executables: dict[str, Lowered]) -> dict[str, Any]:
    figures: dict[str, Any] = {"failures": [], "temp_mib": 0.0}
    for name, lowered in executables.items():
        compiled = lowered.stage.compile(lowered.options)
        memory = compiled.memory_analysis()
        figures["temp_mib"] = max(figures["temp_mib"], round(memory.temp_size_in_bytes / MIB, 1))
        failures = check_memory(memory, lowered.donated_bytes, lowered.temp_mib)
        failures += check_weights(compiled.as_text())
        kernels = kernel_calls(compiled.as_text())
        failures += check_lowering(num_lowered(lowered.stage.as_text()), len(kernels))
        if lowered.attention_layers:
            figures["kernels"] = dict(sorted(kernels.items()))
            failures += check_kernels(case, kernels, lowered.attention_layers)
            failures += check_fused(case, kernels, lowered.attention_layers)
        # In a whole step XLA puts what goes in and out of a kernel there as well.
        if case.kind == "op" and case.target != "h100":
            vmem = attention_vmem(compiled.as_text())
            figures["vmem_mib"] = {name: round(used, 2) for name, (_, used) in vmem.items()}
            failures += check_vmem(kernels, vmem, SPARE_VMEM >> 20)
        if lowered.tier is not None:
            failures += check_sampler(case, kernels, truncates=lowered.tier.covers(Tier.TRUNCATED))
        figures["failures"] += [f"{name}: {failure}" for failure in failures]
    return figures


def lower_all_layers(case: Case, mesh: Any) -> dict[str, Any]:
    """The whole model's forward has as many lowered kernels as its first two layers."""
    few, every = (
        num_lowered(step_compiler(case, mesh, num_layers).forward(case.num_tokens, MAX_SEQS).lower().as_text())
        for num_layers in (STEP_LAYERS, None)
    )
    return {"failures": check_lowering(every, few), "lowered": every}


# -- what is compiled ---------------------------------------------------------------------


def lower_op(case: Case, mesh: Any) -> dict[str, Lowered]:
    """Write + attention of one layer."""
    llama = AttentionSpec(32, 8, 128, case.block_size, "bfloat16", "bfloat16", 0.09)
    spec = dataclasses.replace(llama, **case.changes)
    reason = api.refusal(spec, "gpu" if case.target == "h100" else "tpu", case.implementation)
    if reason is not None:
        raise ValueError(f"{case.implementation} refuses: {reason}")
    here = NamedSharding(mesh, PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    T, R, P = case.num_tokens, MAX_SEQS, MAX_MODEL_LEN // spec.block_size
    layout = api.kv_layout(spec, case.implementation)
    num_blocks = (1 << 30) // layout.bytes_per_block(spec)
    pool = place(jax.eval_shape(lambda: layout.empty_pool(spec, num_blocks)), mesh, PartitionSpec())
    batch = RaggedBatch(array(R, P), array(R), array(R + 1), array(T), array(T))
    q, k = (array(T, heads, spec.head_dim, dtype=spec.dtype) for heads in (spec.num_heads, spec.num_kv_heads))
    sinks = array(spec.num_heads, dtype=jnp.float32) if spec.has_sinks else None

    def layer(q: Any, k: Any, v: Any, pool: Any, batch: Any, sinks: Any) -> Any:
        pool = api.write_kv(k, v, pool, batch, spec, case.implementation)
        return api.ragged_paged_attention(q, pool, batch, spec, case.implementation, sinks), pool

    stage = jax.jit(layer, donate_argnums=3).lower(q, k, k, pool, batch, sinks)
    # The scales of fp8 don't change, so they are no output.
    donated = pool if spec.kv_dtype == "int8" else pool.values
    return {"op": Lowered(stage, num_bytes(donated), case.temp_mib, attention_layers=1)}


def lower_step(case: Case, mesh: Any) -> dict[str, Lowered]:
    """What a step runs: the plan's upload, the forward, the sampler."""
    compiler = step_compiler(case, mesh, STEP_LAYERS)
    forward = compiler.forward(case.num_tokens, MAX_SEQS)
    return {
        "stage": lower_task(compiler.stage(), case.temp_mib),
        "forward": lower_task(forward, case.temp_mib, attention_layers=STEP_LAYERS),
        **lower_sampler(compiler, Tier.GREEDY),
    }


def lower_sampler(compiler: Compiler, tier: Tier) -> dict[str, Lowered]:
    logits_bytes = 4 * MAX_SEQS * compiler.config.vocab_size  # float32
    task = compiler.sample(SampleKey(tier, 0, MAX_SEQS))
    return {"sample": lower_task(task, math.ceil(8 * logits_bytes / MIB), tier=tier)}


def lower_full_sampler(case: Case, mesh: Any) -> dict[str, Lowered]:
    """The sampler with every processor."""
    return lower_sampler(step_compiler(case, mesh, STEP_LAYERS), Tier.FULL)


def lower_burst(case: Case, mesh: Any) -> dict[str, Lowered]:
    """Several decode steps in one call."""
    key = BurstKey(Tier.PLAIN, case.num_tokens, case.num_tokens, BURST_LEN)
    burst = step_compiler(case, mesh, STEP_LAYERS).burst(key)
    return {"burst": lower_task(burst, case.temp_mib, attention_layers=STEP_LAYERS, tier=key.tier)}


def lower_task(task: Task, temp_mib: int, *, attention_layers: int = 0, tier: Tier | None = None) -> Lowered:
    donated = num_bytes([task.args[i] for i in task.donate])
    return Lowered(task.lower(), donated, temp_mib, attention_layers, tier, task.options)


def step_compiler(case: Case, mesh: Any, num_layers: int | None) -> Compiler:
    """The runner's compiler for the model's first layers (None: all)."""
    model_config = read_model_toml(ROOT / "configs" / "models" / f"{case.model}.toml")
    model_config = dataclasses.replace(model_config, layers=model_config.layers[:num_layers])
    gpu = GPU.of(mesh.devices.flat[0]) if case.target == "h100" else "not a GPU"
    model = build(model_config, dtype="bfloat16", padded_vocab=model_config.vocab_size, gpu=gpu)
    specs = attention_specs(
        model_config, block_size=case.block_size, dtype="bfloat16", kv_dtype=case.kv_dtype, shards=1
    )
    attention = PagedAttention(specs, case.implementation, mesh)
    config = RunnerConfig(
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=8192,
        block_size=case.block_size,
        num_blocks=(2 << 30) // attention.bytes_per_block(),
        vocab_size=model_config.vocab_size,
        token_buckets=((case.num_tokens, MAX_SEQS),),
        burst_len=BURST_LEN,
        burst_buckets=((case.num_tokens, case.num_tokens),),
        row_buckets=(MAX_SEQS,),
    )
    scratch = jax.eval_shape(lambda: init_scratch(config, model_config.model_dim, jnp.dtype("bfloat16")))
    return Compiler(
        model=model,
        attention=attention,
        config=config,
        fields=None,  # type: ignore[arg-type]  # layout of admissions: not part of a step
        params=abstract_params(model, named_shardings(model.param_axes, mesh), case.quantization),
        kv=place(jax.eval_shape(lambda: attention.empty_pools(config.num_blocks)), mesh, POOL),
        slots=place(jax.eval_shape(lambda: init_slots(config)), mesh, WHOLE),
        scratch=place(scratch, mesh, WHOLE),
    )


def place(tree: Any, mesh: Any, spec: PartitionSpec) -> Any:
    where = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)


def num_bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    (chosen,) = [case for case in cases() if case.name == sys.argv[1]]
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT, CPU_LIMIT + 1))
    Path(sys.argv[2]).write_text(json.dumps(run_case(chosen)))
