"""The compile gate's own logic. What it compiles needs an environment of its own: see scripts/aot_gate.py."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module, and aot_checks for aot_gate
    spec.loader.exec_module(module)
    return module


gate = _load("aot_gate")
checks = _load("aot_checks")


def _case(target: str, num_tokens: int = 256) -> Any:
    return gate.Case(target, "op", "decode", num_tokens, 48)


def test_every_target_has_whole_steps_of_both_models() -> None:
    names = [case.name for case in gate.cases()]
    assert len(set(names)) == len(names)
    for target in ("v5e", "v5p", "v6e", "tpu7x", "h100"):
        for model in ("llama-3.1-8b", "qwen3-0.6b"):
            assert {f"{target}.step.{model}_decode", f"{target}.step.{model}_mixed"} <= set(names)


def _compiled(*kernels: tuple[str, str]) -> str:
    """Lines of a compiled program that call kernels of these targets and names."""
    return "\n".join(
        f'%a = custom-call(%q), custom_call_target="{target}", metadata={{op_name="jit(f)/layer_0/{name}/pallas_call"}}'
        for target, name in kernels
    )


def test_kernels_are_counted_by_their_names() -> None:
    program = _compiled(
        ("tpu_custom_call", "kv_write"),
        ("mosaic_gpu_v2", "ragged_paged_attention_decode"),
        ("mosaic_gpu_v2", "ragged_paged_attention_decode"),
        ("__cublas$gemm", "ragged_paged_attention_decode"),
    )
    assert checks.kernel_calls(program) == {"kv_write": 1, "ragged_paged_attention_decode": 2}


def test_attention_that_fell_back_to_xla_is_found() -> None:
    names = ["ragged_paged_attention_1", "ragged_paged_attention_128"]
    layer = [("tpu_custom_call", name) for name in names]
    whole = checks.kernel_calls(_compiled(*layer, *layer))
    assert not checks.check_kernels(_case("v5e"), whole, num_layers=2)
    assert checks.check_kernels(_case("v5e"), whole, num_layers=3)
    half = checks.kernel_calls(_compiled(*layer, layer[0]))
    assert checks.check_kernels(_case("v5e"), half, num_layers=2)
    assert not checks.check_kernels(_case("h100", num_tokens=512), whole, num_layers=2)
    assert checks.check_kernels(_case("h100", num_tokens=8), whole, num_layers=2)  # one kernel a layer


def test_layers_that_are_not_fused_are_found() -> None:
    launch = ("mosaic_gpu_v2", "post_attention")
    none, one, two = (checks.kernel_calls(_compiled(*[launch] * n)) for n in range(3))
    burst = gate.Case("h100", "burst", "qwen3-0.6b", 8)
    assert not checks.check_fused(burst, one, num_layers=2)
    assert checks.check_fused(burst, none, num_layers=2) == ["0 kernels post_attention; 1 expected"]
    assert checks.check_fused(burst, two, num_layers=2)
    assert not checks.check_fused(_case("h100"), none, num_layers=2)
    assert checks.check_fused(_case("h100"), one, num_layers=2)
    large, four = (
        gate.Case("h100", "burst", "llama-3.1-8b", 8, 64, "llama-3.1-8b"),
        [("mosaic_gpu_v2", f"post_attention_{name}") for name in ("o", "gate_up", "down", "qkv")],
    )
    assert not checks.check_fused(large, checks.kernel_calls(_compiled(*four)), num_layers=2)
    assert checks.check_fused(large, checks.kernel_calls(_compiled(launch, *four[1:])), num_layers=2) == [
        "1 kernels post_attention; 0 expected",
        "0 kernels post_attention_o; 1 expected",
    ]


def test_a_sampler_that_fell_back_to_xla_is_found() -> None:
    draw = checks.kernel_calls(_compiled(("mosaic_gpu_v2", "gumbel_argmax")))
    nothing = checks.kernel_calls("")
    both = checks.kernel_calls(_compiled(("mosaic_gpu_v2", "gumbel_argmax"), ("mosaic_gpu_v2", "truncation_threshold")))
    assert not checks.check_sampler(_case("h100"), draw, truncates=False)
    assert not checks.check_sampler(_case("h100"), both, truncates=True)
    assert not checks.check_sampler(_case("v5e"), nothing, truncates=True)
    assert checks.check_sampler(_case("h100"), nothing, truncates=False)
    assert checks.check_sampler(_case("h100"), draw, truncates=True)
    assert checks.check_sampler(_case("h100"), both, truncates=False)


def test_a_pool_that_is_copied_and_a_large_temporary_are_found() -> None:
    """Compiled for CPU: with and without donation, and a product whose operand has to be made first."""
    pool, small = jnp.zeros((1024, 1024)), jnp.zeros((1024,))

    def memory(function: Any, *donate: int) -> Any:
        return jax.jit(function, donate_argnums=donate).lower(pool, small).compile().memory_analysis()

    def write(pool: jax.Array, row: jax.Array) -> jax.Array:
        return pool.at[3].set(row)

    def square(pool: jax.Array, row: jax.Array) -> jax.Array:
        return jnp.sin(pool) @ row

    assert not checks.check_memory(memory(write, 0), donated_bytes=pool.nbytes, temp_mib=1)
    assert checks.check_memory(memory(write), donated_bytes=pool.nbytes, temp_mib=1) == [
        "0 of 4194304 donated bytes are aliased"
    ]
    assert not checks.check_memory(memory(square), donated_bytes=0, temp_mib=4)
    (failure,) = checks.check_memory(memory(square), donated_bytes=0, temp_mib=3)
    assert failure.endswith("MiB of temporary memory, the bound is 3")


def test_a_case_is_judged_by_its_memory() -> None:
    aot_case = _load("aot_case")
    pool, row = jnp.zeros((1024, 1024)), jnp.zeros((1024,))

    def failures(*donate: int) -> list[str]:
        stage = jax.jit(lambda pool, row: pool.at[3].set(row), donate_argnums=donate).lower(pool, row)
        return aot_case.compile_and_check(_case("v5e"), {"op": aot_case.Lowered(stage, pool.nbytes, 1)})["failures"]

    assert failures(0) == []
    assert failures() == ["op: 0 of 4194304 donated bytes are aliased"]


def test_vmem_that_is_not_what_was_derived_is_found() -> None:
    size = '"{}scoped_memory_configs":[{{"memory_space":"1","offset":"16384","size":"{}"}}]'
    program = "\n".join(
        f'custom-call(), metadata={{op_name="jit(f)/{name}/pallas_call"}}, '
        f'backend_config={{{size.format("", 30 << 20)},"body":"x",{size.format("used_", used << 20)}}}'
        for name, used in (("kv_write", 1), ("ragged_paged_attention_8", 7), ("ragged_paged_attention_128", 13))
    )
    vmem = checks.attention_vmem(program)
    assert vmem == {"ragged_paged_attention_8": (30, 7), "ragged_paged_attention_128": (30, 13)}
    kernels = Counter(["kv_write", "ragged_paged_attention_1", *vmem])
    assert checks.check_vmem(kernels, vmem, spare_mib=24) == [
        "no report of the VMEM of ragged_paged_attention_1",
        "ragged_paged_attention_128 uses 13.0 MiB of VMEM, 6.0 were derived",
    ]


def test_a_kernel_that_each_layer_lowers_is_found() -> None:
    module = "stablehlo.custom_call @tpu_custom_call(%0)\n" * 3 + "stablehlo.custom_call @Sharding(%0)\n"
    assert checks.num_lowered(module) == 3
    assert not checks.check_lowering(3, 3)
    assert checks.check_lowering(6, 3)


def test_a_weight_that_is_widened_to_a_copy_is_found() -> None:
    weight = "%w.1 = s8[1024,3072]{1,0} parameter(1), sharding={}\n"
    fused = "ROOT %dot = bf16[256,3072]{1,0} fusion(%x.1, %w.1, %s.1), kind=kCustom, calls=%gemm\n"
    copied = "%wide = bf16[1024,3072]{1,0} fusion(%w.1), kind=kLoop, calls=%wrapped_convert\n"
    cut = "%cut = s8[4,256,3072]{2,1,0} bitcast(%w.1)\n%wide = f32[4,256,3072]{2,1,0} fusion(%x.1, %cut), kind=kLoop\n"
    inside = "%fused { %p = s8[1024,3072]{1,0} parameter(0)\n ROOT %c = bf16[1024,3072]{1,0} convert(%p) }\n"
    assert not checks.check_weights(f"{inside}ENTRY %main () -> bf16[] {{\n{weight}{fused}}}")
    assert checks.check_weights(f"ENTRY %main () -> bf16[] {{\n{weight}{copied}}}") == [
        "wide widens 3145728 narrow values to bf16[1024,3072]"
    ]
    assert len(checks.check_weights(f"ENTRY %main () -> bf16[] {{\n{weight}{cut}{fused}}}")) == 1


def _run(programs: dict[str, str], **options: Any) -> dict[str, list[str]]:
    """Failures of one case a program, which gets the name of the file for its figures as its argument."""
    chosen = [gate.Case("v5e", "op", label, 1) for label in programs]

    def command(case: Any, result: Path) -> list[str]:
        return [sys.executable, "-c", programs[case.label], str(result)]

    results = gate.run(chosen, command=command, **options)
    return {case.label: result["failures"] for case, result in results}


def test_what_becomes_of_a_case_is_reported() -> None:
    figures = json.dumps({"failures": ["too large"]})
    failures = _run(
        {
            "fits": f"import sys; open(sys.argv[1], 'w').write({json.dumps({'failures': []})!r})",
            "too_large": f"import sys; print('noise'); open(sys.argv[1], 'w').write({figures!r})",
            "raises": "raise ValueError('no such thing')",
            "killed": "import os; os.kill(os.getpid(), 9)",
            "silent": "pass",
        }
    )
    assert failures == {
        "fits": [],
        "too_large": ["too large"],
        "raises": ["exit status 1: ValueError: no such thing"],
        "killed": ["killed by SIGKILL"],
        "silent": ["exit status 0: no output"],
    }


def test_a_case_that_hangs_ends_with_what_it_started_and_three_end_the_run() -> None:
    """Each has a child of its own that holds the output open; a fourth case isn't started any more."""
    hang = "import subprocess; subprocess.run(['sleep', '600'])"
    failures = _run({f"hangs{i}": hang for i in range(4)}, jobs=1, timeout=0.2)  # of several, one may end before others
    hung = ["not compiled after 0 s"]
    assert [failures[f"hangs{i}"] for i in range(3)] == [hung] * 3
    assert failures["hangs3"] == ["not compiled: 3 cases ran into their timeout"]


def test_a_case_that_does_not_compile_fails() -> None:
    """No TPU, no H100 and no compiler for either in this environment."""
    ((_, result),) = gate.run([gate.Case("v5e", "op", "no_such_case", 256, 96)])
    assert result["failures"]
