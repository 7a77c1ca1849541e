"""What aot_case.py looks for in the text of a lowered or compiled program: our kernels, and copies of weights."""

from __future__ import annotations

import math
import re
from collections import Counter

from aot_gate import Case


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


def check_draw(case: Case, kernels: Counter[str]) -> list[str]:
    """A sampler draws once."""
    calls = kernels["gumbel_argmax"]
    return [] if calls == case.draw_kernels else [f"{calls} kernels draw; {case.draw_kernels} expected"]


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
