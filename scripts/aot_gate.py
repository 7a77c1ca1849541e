"""Compiles the attention kernels and whole steps for TPU and H100 on a machine without either, and checks what came
out.

    python3.12 -m venv .venv-aot && .venv-aot/bin/pip install -r scripts/aot_requirements.txt
    .venv-aot/bin/python scripts/aot_gate.py                 # every case
    .venv-aot/bin/python scripts/aot_gate.py v5e.step        # the cases whose name starts so

Each case compiles in a process of its own with a timeout: a kernel that doesn't fit can take minutes to be refused.
A case passes if

- it compiles: the compiler itself refuses a kernel that overflows VMEM, SMEM or shared memory;
- the donated KV pool is aliased to the output in whole, so that it is written in place;
- temporary memory is under the case's bound, far below the pool's size: a copy of the pool is found;
- the expected number of our kernels is in the compiled program, so attention doesn't fall back to XLA.

The last line is JSON: name -> figures and failures. The exit status is 1 if any case failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
H100_CONFIG = ROOT / "scripts" / "data" / "h100_target_config.txt"
NO_HARDWARE = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # gates of two checkouts may run at once
    "PYTHONPATH": str(ROOT),
}
TIMEOUT = 600.0  # seconds a case
MAX_SEQS = 256
MAX_MODEL_LEN = 32768
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One compilation. ``op`` compiles write + attention of one layer, ``step`` the runner's forward of two layers."""

    target: str  # key of TOPOLOGY, or "h100"
    kind: str  # "op" | "step"
    label: str
    num_tokens: int
    temp_mib: int  # bound on temporary memory
    model: str = ""  # step: name of configs/models
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # op: of the Llama-3.1-8B attention layer

    @property
    def name(self) -> str:
        return f"{self.target}.{self.kind}.{self.label}"

    @property
    def implementation(self) -> str:
        return "pallas_gpu" if self.target == "h100" else "pallas_tpu"

    @property
    def kernels_per_layer(self) -> int:
        """TPU: the KV write, short rows, long rows. GPU: short rows, combine, and long rows if T > R."""
        return 2 if self.target == "h100" and self.num_tokens <= MAX_SEQS else 3

    @property
    def block_size(self) -> int:
        return self.changes.get("block_size", 64 if self.target == "h100" else 128)


def cases() -> list[Case]:
    """Everything that is gated."""
    found = []
    for target in (*TOPOLOGY, "h100"):
        # On GPU the partial results of split-KV are temporary memory; on TPU int8's touched blocks of scales are.
        ops: list[tuple[str, int, int, dict[str, Any]]] = [
            ("decode", MAX_SEQS, 48, {}),
            ("mixed", 8192, 48, {}),
            ("decode_fp8", MAX_SEQS, 48, {"kv_dtype": "float8_e4m3fn"}),
            ("verify_g2", 5 * MAX_SEQS, 48, {"num_heads": 16}),
            ("mixed_d64", 512, 48, {"head_dim": 64}),
            ("mixed_d256_window", 512, 48, {"head_dim": 256, "num_heads": 4, "num_kv_heads": 1, "sliding_window": 512}),
        ]
        if target != "h100":
            ops += [
                ("mixed_int8", 512, 96, {"kv_dtype": "int8"}),
                ("mixed_block32", 512, 48, {"block_size": 32}),
                ("mixed_float32", 512, 48, {"dtype": "float32", "kv_dtype": "float32"}),
                ("mixed_soft_cap_sinks_g16", 512, 48, {"soft_cap": 30.0, "has_sinks": True, "num_kv_heads": 2}),
            ]
        found += [Case(target, "op", label, tokens, temp, "", changes) for label, tokens, temp, changes in ops]
        for model in ("llama-3.1-8b", "qwen3-0.6b"):
            found.append(Case(target, "step", f"{model}_decode", MAX_SEQS, 64, model))
            found.append(Case(target, "step", f"{model}_mixed", 2048, 320, model))
    return found


# -- parent: one process a case ---------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="*", help="run the cases whose name starts with one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--here", action="store_true", help="compile the one named case in this process")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if case.name.startswith(tuple(arguments.prefixes or [""]))]
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if arguments.here:
        (case,) = [case for case in chosen if case.name == arguments.prefixes[0]]
        print(json.dumps(compile_case(case)))
        return 0
    if not chosen:
        print(f"no case starts with {' or '.join(arguments.prefixes)}", file=sys.stderr)
        return 2
    results = {}
    for case in chosen:
        result = results[case.name] = run_apart(case)
        verdict = "; ".join(result["failures"]) or "ok"
        print(
            f"{case.name:42s} {result.get('seconds', 0):6.1f} s  temp {result.get('temp_mib', 0):8.1f} MiB  {verdict}",
            flush=True,
        )
    print(json.dumps(results))
    return int(any(result["failures"] for result in results.values()))


def run_apart(case: Case) -> dict[str, Any]:
    """Compiles a case in a process of its own. Figures, and ``failures``: what doesn't hold."""
    command = [sys.executable, __file__, "--here", case.name]
    try:
        done = subprocess.run(
            command, env={**os.environ, **NO_HARDWARE}, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failures": [f"not compiled after {TIMEOUT:.0f} s"]}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if re.match(r"\S*(Error|Exception)\b.*", line)]
        return {"failures": [(lines or done.stderr.splitlines() or ["no output"])[-1][:500]]}
    return json.loads(done.stdout.splitlines()[-1])


# -- child: compile and look ---------------------------------------------------------


def compile_case(case: Case) -> dict[str, Any]:
    """Compiles the case for its target and checks the result."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    if case.target == "h100":
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H100_CONFIG.read_text(), topology="1x1x1"
        )
    else:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY[case.target])
    mesh = Mesh(np.array(topology.devices[:1]), ("tp",))
    build: Callable[..., tuple[Any, int, int]] = {"op": lower_op, "step": lower_step}[case.kind]
    started = time.perf_counter()
    # Without the abstract mesh, tracing a kernel asks the machine's own device for its properties.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered, kv_bytes, num_layers = build(case, mesh)
    compiled = lowered.compile()
    memory = compiled.memory_analysis()
    kernels = count_kernels(compiled.as_text())
    temp_mib = memory.temp_size_in_bytes / MIB
    failures = []
    if memory.alias_size_in_bytes < kv_bytes:
        failures.append(f"{memory.alias_size_in_bytes} bytes are aliased, the KV pool has {kv_bytes}")
    if temp_mib > case.temp_mib:
        failures.append(f"{temp_mib:.1f} MiB of temporary memory, the bound is {case.temp_mib}")
    if kernels != num_layers * case.kernels_per_layer:
        failures.append(
            f"{kernels} calls of our kernels in {num_layers} layers, {case.kernels_per_layer} a layer expected"
        )
    return {
        "failures": failures,
        "seconds": round(time.perf_counter() - started, 1),
        "temp_mib": round(temp_mib, 1),
        "kv_mib": round(kv_bytes / MIB, 1),
        "kernels": kernels,
    }


def count_kernels(program: str) -> int:
    """Calls of Pallas kernels in a compiled program."""
    return len(re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*)"', program))


def lower_op(case: Case, mesh: Any) -> tuple[Any, int, int]:
    """(lowered write + attention of one layer, bytes of its pool, 1)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels.ragged_paged_attention import api
    from pallas_kernels.ragged_paged_attention.types import AttentionSpec, RaggedBatch

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
    pool = jax.tree.map(
        lambda x: array(*x.shape, dtype=x.dtype), jax.eval_shape(lambda: layout.empty_pool(spec, num_blocks))
    )
    batch = RaggedBatch(array(R, P), array(R), array(R + 1), array(T), array(T))
    q, k = (array(T, heads, spec.head_dim, dtype=spec.dtype) for heads in (spec.num_heads, spec.num_kv_heads))
    sinks = array(spec.num_heads, dtype=jnp.float32) if spec.has_sinks else None

    def layer(q: Any, k: Any, v: Any, pool: Any, batch: Any, sinks: Any) -> Any:
        pool = api.write_kv(k, v, pool, batch, spec, case.implementation)
        return api.ragged_paged_attention(q, pool, batch, spec, case.implementation, sinks), pool

    kv_bytes = math.prod(pool.values.shape) * pool.values.dtype.itemsize
    return jax.jit(layer, donate_argnums=3).lower(q, k, k, pool, batch, sinks), kv_bytes, 1


def lower_step(case: Case, mesh: Any) -> tuple[Any, int, int]:
    """(the runner's lowered forward of the model's first two layers, bytes of their pools, 2)."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from jaxserve.models.registry import build
    from jaxserve.runner.attend import POOL, WHOLE, PagedAttention, attention_specs
    from jaxserve.runner.config import RunnerConfig
    from jaxserve.runner.executables import Compiler
    from jaxserve.runner.state import init_scratch, init_slots
    from jaxserve.weights.config_file import read_model_toml

    model_config = read_model_toml(ROOT / "configs" / "models" / f"{case.model}.toml")
    model_config = dataclasses.replace(model_config, layers=model_config.layers[:2])
    model = build(model_config, dtype="bfloat16", padded_vocab=model_config.vocab_size)
    specs = attention_specs(model_config, block_size=case.block_size, dtype="bfloat16", kv_dtype="bfloat16", shards=1)
    attention = PagedAttention(specs, case.implementation, mesh)
    config = RunnerConfig(
        max_num_seqs=MAX_SEQS,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=8192,
        block_size=case.block_size,
        num_blocks=(2 << 30) // attention.bytes_per_block(),
        vocab_size=model_config.vocab_size,
        token_buckets=((case.num_tokens, MAX_SEQS),),
        row_buckets=(MAX_SEQS,),
    )

    def place(tree: Any, spec: Any) -> Any:
        where = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    kv = place(jax.eval_shape(lambda: attention.empty_pools(config.num_blocks)), POOL)
    compiler = Compiler(
        model=model,
        attention=attention,
        config=config,
        fields=None,  # type: ignore[arg-type]  # layout of admissions: not part of a forward
        params=place(model.params, WHOLE),
        kv=kv,
        slots=place(jax.eval_shape(lambda: init_slots(config)), WHOLE),
        scratch=place(
            jax.eval_shape(lambda: init_scratch(config, model_config.model_dim, jnp.dtype("bfloat16"))), WHOLE
        ),
    )
    kv_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kv))
    return compiler.lower_forward(case.num_tokens, MAX_SEQS), kv_bytes, len(specs)


if __name__ == "__main__":
    sys.exit(main())
