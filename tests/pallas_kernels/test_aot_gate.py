"""The compile gate's own logic. The gate itself needs its own environment: see scripts/aot_gate.py."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "aot_gate.py"


@pytest.fixture(scope="module")
def gate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aot_gate", _SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_every_target_has_whole_steps_of_both_models(gate: ModuleType) -> None:
    names = [case.name for case in gate.cases()]
    assert len(set(names)) == len(names)
    for target in ("v5e", "v5p", "v6e", "tpu7x", "h100"):
        for model in ("llama-3.1-8b", "qwen3-0.6b"):
            assert {f"{target}.step.{model}_decode", f"{target}.step.{model}_mixed"} <= set(names)


def test_kernels_are_counted_by_their_call_target(gate: ModuleType) -> None:
    program = """
      %a = custom-call(%q), custom_call_target="tpu_custom_call"
      %b = custom-call(%q), custom_call_target="mosaic_gpu_v2"
      %c = custom-call(%q), custom_call_target="__cublas$gemm"
    """
    assert gate.count_kernels(program) == 2


def test_a_case_that_does_not_compile_fails(gate: ModuleType) -> None:
    """A head dim that the kernel refuses, on whatever machine."""
    case = gate.Case("v5e", "op", "no_such_case", 256, 96)
    assert gate.run_apart(case)["failures"]
