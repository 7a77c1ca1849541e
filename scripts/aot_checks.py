"""What aot_case.py looks for in the text of a lowered or compiled program: our kernels."""

from __future__ import annotations

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


def num_lowered(module: str) -> int:
    """Our kernels in a StableHLO module, where a function that several layers call stands once."""
    return len(re.findall(r"custom_call @(?:tpu_custom_call|mosaic_gpu)", module))


def check_lowering(lowered: int, different: int) -> list[str]:
    return [] if lowered == different else [f"{lowered} kernels were lowered, {different} of them are different"]
