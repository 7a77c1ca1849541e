"""What aot_case.py looks for in the text of a lowered or compiled program: our kernels, and copies of weights."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from aot_gate import Case

MIB = 1 << 20
VMEM_SLACK = 6  # MiB: what it keeps between instructions (4.2 of widened int8 on 7x), less buffers that share a place


def kernel_calls(program: str) -> Counter[str]:
    """Calls of each of our kernels in a compiled program, by the name that the kernel gave itself."""
    calls = re.findall(r'custom_call_target="(?:tpu_custom_call|mosaic_gpu[^"]*)".*?op_name="([^"]*)"', program)
    return Counter(path.split("/")[-2] for path in calls)


def check_kernels(case: Case, kernels: Counter[str], num_layers: int) -> list[str]:
    """All attention of all layers: so many kernels of that name, each called once a layer."""
    attention = {name: calls for name, calls in kernels.items() if name.startswith("ragged_paged_attention")}
    if len(attention) == case.attention_kernels and set(attention.values()) == {num_layers}:
        return []
    return [f"{attention} of our kernels; {case.attention_kernels} in each of {num_layers} layers expected"]


def check_fused(case: Case, kernels: Counter[str], num_layers: int) -> list[str]:
    """Where layers are fused, all but the last one are."""
    return _check_calls(kernels, {name: (num_layers - 1) * launches for name, launches in case.launches.items()})


def check_sampler(case: Case, kernels: Counter[str], *, truncates: bool) -> list[str]:
    """A sampler draws once and, if it truncates, finds one threshold a row: by our kernels, where they are."""
    expected = {"gumbel_argmax": case.sampler_kernels, "truncation_threshold": case.sampler_kernels * truncates}
    return _check_calls(kernels, expected)


def _check_calls(kernels: Counter[str], expected: dict[str, int]) -> list[str]:
    return [
        f"{kernels[name]} kernels {name}; {calls} expected"
        for name, calls in expected.items()
        if kernels[name] != calls
    ]


def check_memory(memory: Any, donated_bytes: int, temp_mib: int) -> list[str]:
    """What is donated is aliased, and the temporary memory within its bound.

    ``memory``: of ``jax.stages.Compiled.memory_analysis()``.
    """
    failures = []
    if memory.alias_size_in_bytes < donated_bytes:
        failures.append(f"{memory.alias_size_in_bytes} of {donated_bytes} donated bytes are aliased")
    if memory.temp_size_in_bytes > temp_mib * MIB:
        found = memory.temp_size_in_bytes / MIB
        failures.append(f"{found:.1f} MiB of temporary memory, the bound is {temp_mib}")
    return failures


def attention_vmem(program: str) -> dict[str, tuple[float, float]]:
    """For each of our attention kernels in a program for TPU: MiB of VMEM that it may use, and that it does use."""
    size = r'scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
    found = re.findall(rf'/(ragged_paged_attention_\d+)/.*?"{size}.*?"used_{size}', program)
    return {name: (int(limit) / MIB, int(used) / MIB) for name, limit, used in found}


def check_vmem(kernels: Counter[str], vmem: dict[str, tuple[float, float]], spare_mib: int) -> list[str]:
    """Each attention kernel's own derivation, ``spare_mib`` below its limit, is what the compiler reports."""
    attention = [name for name in kernels if name.startswith("ragged_paged_attention")]
    return [f"no report of the VMEM of {name}" for name in attention if name not in vmem] + [
        f"{name} uses {used:.1f} MiB of VMEM, {limit - spare_mib:.1f} were derived"
        for name, (limit, used) in vmem.items()
        if abs(used - (limit - spare_mib)) > VMEM_SLACK
    ]


def num_lowered(module: str) -> int:
    """Our kernels in a StableHLO module, where a function that several layers call stands once."""
    return len(re.findall(r"custom_call @(?:tpu_custom_call|mosaic_gpu)", module))


def check_lowering(lowered: int, different: int) -> list[str]:
    return [] if lowered == different else [f"{lowered} kernels were lowered, {different} of them are different"]


SMALLEST_WEIGHT = 1 << 16  # values


def check_weights(program: str) -> list[str]:
    """No parameter in 8 or 4 bits is widened to a copy: what reads it whole multiplies it. Looks at the entry alone.

    A wide array of as many values is a copy, unless a matrix product made it (kind ``kCustom``, or a library's call).
    """
    entry = program[program.index("ENTRY ") :]
    sizes: dict[str, int] = {}  # of the narrow parameters and other views of them
    failures = []
    line = r"%(\S+) = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(([^)]*)\)(.*)"
    for name, dtype, shape, instruction, operands, rest in re.findall(line, entry):
        size = math.prod(int(length) for length in shape.split(",") if length)
        read = [sizes[operand] for operand in re.findall(r"%([^\s,]+)", operands) if operand in sizes]
        if dtype in ("u4", "s8", "f8e4m3fn"):
            if instruction == "parameter" or (instruction == "bitcast" and read):
                sizes[name] = size
            continue
        wide = dtype in ("bf16", "f16", "f32") and size in read and size >= SMALLEST_WEIGHT
        if wide and instruction != "custom-call" and "kind=kCustom" not in rest:
            failures.append(f"{name} widens {size} narrow values to {dtype}[{shape}]")
    return failures
