"""Compiles the attention kernels and whole steps for TPU and H100 on a machine without either, and checks what came
out.

    make gates                     # every case; .ci/run does the same
    make gates GATES=v5e.step      # the cases whose name starts so
    .venv-aot/bin/python scripts/aot_gate.py --list

Each case compiles in a process of its own with a timeout (aot_case.py): a kernel that doesn't fit can take minutes to
be refused. A case passes if

- it compiles, with the options that an engine gives XLA: the compilers refuse a kernel that overflows VMEM, SMEM or
  shared memory;
- the donated KV pool is aliased to the output in whole, so that it is written in place;
- temporary memory is under the case's bound, far below the pool's size: a copy of the pool is found;
- every layer's attention is our kernels, all of them, by name: nothing fell back to XLA; on H100 so are the draw and
  the threshold of top-k and top-p, and layers of few tokens from attention to attention; on TPU the compiler reports
  of an op the VMEM that it derives;
- each kernel is lowered once, however many layers call it;
- no weight in 8 bits is widened to a copy: the matrix products read it as it is.

The last line is JSON: name -> figures and failures. The exit status is 1 if any case failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
MODELS = ("llama-3.1-8b", "qwen3-0.6b")  # of configs/models
MAX_SEQS = 256
MAX_MODEL_LEN = 32768
CUBLAS_WORKSPACE = 32  # MiB, of a step whose products are all cuBLAS's
JOBS = 2
CPU_LIMIT = 240  # seconds of one core a case; the slowest takes about 40
TIMEOUT = 900.0  # seconds on the clock: for a case that waits, however loaded the machine is
GIVE_UP_AFTER = 3  # cases that ran into a timeout: something is wrong with all of them
NO_HARDWARE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several cases run at once
    "PYTHONPATH": str(ROOT),
}


@dataclass(frozen=True)
class Case:
    """One thing to compile.

    ``op``: write + attention of one layer. ``step``: the runner's executables of one step, with two layers. ``burst``:
    several decode steps in one call. ``sample``: the sampler with every processor. ``layers``: the forward of the whole
    model, lowered and not compiled.
    """

    target: str  # one of TPUS, or "h100"
    kind: str  # "op" | "step" | "burst" | "sample" | "layers"
    label: str
    num_tokens: int
    temp_mib: int = 0  # bound on temporary memory of the op or the forward
    model: str = ""  # but for an op: one of MODELS
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # op: of the Llama-3.1-8B attention layer
    quantization: Any = None  # step: of the weights
    kv_dtype: str = "bfloat16"  # step

    @property
    def name(self) -> str:
        return f"{self.target}.{self.kind}.{self.label}"

    @property
    def implementation(self) -> str:
        return "pallas_gpu" if self.target == "h100" else "pallas_tpu"

    @property
    def attention_kernels(self) -> int:
        """Of a layer. TPU: short rows and long rows. GPU: short rows, and long rows if T > R."""
        return 1 if self.target == "h100" and self.num_tokens <= MAX_SEQS else 2

    @property
    def launches(self) -> dict[str, int]:
        """Of our kernels between two layers' attention: few tokens take one for all, or one a product."""
        fuses = self.target == "h100" and self.num_tokens <= 64
        whole = fuses and self.model != "llama-3.1-8b" and self.num_tokens <= 32
        products = {f"post_attention_{name}": int(fuses and not whole) for name in ("o", "gate_up", "down", "qkv")}
        return {"post_attention": int(whole), **products}

    @property
    def sampler_kernels(self) -> int:
        """That draw, and that find thresholds, in a sampler."""
        return int(self.target == "h100")

    @property
    def block_size(self) -> int:
        return self.changes.get("block_size", 64 if self.target == "h100" else 128)


def cases() -> list[Case]:
    """Everything that is gated."""
    found = []
    for target in (*TPUS, "h100"):
        for model in MODELS:  # the longest first: they run beside the short ones
            found.append(Case(target, "step", f"{model}_mixed", 2048, 320, model))
            found.append(Case(target, "step", f"{model}_decode", MAX_SEQS, 64, model))
        # On 7x the loop reads the tied embedding in two layouts, so there is a second copy of it: 297 MiB.
        found.append(Case(target, "burst", "qwen3-0.6b", 8, 384 if target == "tpu7x" else 64, "qwen3-0.6b"))
        # On GPU the partial results of split-KV are temporary memory; on TPU int8's touched blocks of scales are.
        ops: list[tuple[str, int, int, dict[str, Any]]] = [
            ("decode", MAX_SEQS, 48, {}),
            ("mixed", 8192, 48, {}),
            ("decode_fp8", MAX_SEQS, 48, {"kv_dtype": "float8_e4m3fn"}),
            ("verify_g2", 5 * MAX_SEQS, 48, {"num_heads": 16}),
            ("mixed_d64", 512, 48, {"head_dim": 64}),
            ("mixed_d256_window", 512, 48, {"head_dim": 256, "num_heads": 4, "num_kv_heads": 1, "sliding_window": 512}),
        ]
        if target == "h100":
            ops.append(("mixed_block128", 512, 48, {"block_size": 128}))
        else:
            ops += [
                ("mixed_int8", 512, 96, {"kv_dtype": "int8"}),
                *((f"mixed_block{size}", 512, 48, {"block_size": size}) for size in (32, 64, 256)),
                ("mixed_float32", 512, 48, {"dtype": "float32", "kv_dtype": "float32"}),
                ("mixed_soft_cap_sinks_g16", 512, 48, {"soft_cap": 30.0, "has_sinks": True, "num_kv_heads": 2}),
            ]
        found += [Case(target, "op", label, tokens, temp, "", changes) for label, tokens, temp, changes in ops]
    # The most tokens of layers in one launch, of a model whose sizes are no multiples of 128; and layers in four.
    found.append(Case("h100", "burst", "smollm2-135m", 32, 64, "smollm2-135m"))
    found.append(Case("h100", "burst", "llama-3.1-8b", 8, 64, "llama-3.1-8b"))
    found.append(Case("h100", "burst", "qwen3-0.6b_64", 64, 64 + CUBLAS_WORKSPACE, "qwen3-0.6b"))
    for quantization, label, num_tokens, temp, kv_dtype in (
        ("int8", "decode", MAX_SEQS, 64, "bfloat16"),
        ("fp8_weight_only", "decode", MAX_SEQS, 64, "bfloat16"),
        ("fp8", "decode", MAX_SEQS, 64, "bfloat16"),
        ("fp8", "mixed_kv_fp8", 2048, 320, "float8_e4m3fn"),
    ):
        name = f"qwen3-0.6b_{quantization}_{label}"
        found.append(Case("h100", "step", name, num_tokens, temp, "qwen3-0.6b", {}, quantization, kv_dtype))
    for target in ("v5e", "h100"):  # the same on every TPU
        found.append(Case(target, "layers", "llama-3.1-8b_mixed", 2048, model="llama-3.1-8b"))
        found.append(Case(target, "sample", "qwen3-0.6b_full", MAX_SEQS, model="qwen3-0.6b"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="*", help="run the cases whose name starts with one of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"cases that run at once ({JOBS})")
    arguments = parser.parse_args()
    chosen = [case for case in cases() if case.name.startswith(tuple(arguments.prefixes or [""]))]
    if not chosen:
        print(f"no case starts with {' or '.join(arguments.prefixes)}", file=sys.stderr)
        return 2
    if arguments.list:
        print("\n".join(case.name for case in chosen))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cases end with this process
    results, started = {}, time.monotonic()
    for case, result in run(chosen, jobs=arguments.jobs):
        results[case.name] = result
        verdict = "; ".join(result["failures"]) or "ok"
        print(
            f"{case.name:36s} {result.get('cpu_seconds', 0):5.1f} CPU s  temp {result.get('temp_mib', 0):7.1f} MiB"
            f"  {verdict}",
            flush=True,
        )
    failed = [name for name, result in results.items() if result["failures"]]
    print(f"{len(results)} cases in {time.monotonic() - started:.0f} s; failed: {', '.join(failed) or 'none'}")
    print(json.dumps(results))
    return int(bool(failed))


# -- one process a case -------------------------------------------------------------------


def compile_command(case: Case, result: Path) -> list[str]:
    """Compiles the case and leaves its figures in the file ``result``."""
    return [sys.executable, str(ROOT / "scripts" / "aot_case.py"), case.name, str(result)]


def run(
    chosen: list[Case],
    *,
    jobs: int = JOBS,
    timeout: float = TIMEOUT,
    command: Callable[[Case, Path], list[str]] = compile_command,
) -> Iterator[tuple[Case, dict[str, Any]]]:
    """Runs the cases, ``jobs`` at a time: (case, its figures and ``failures``, what doesn't hold) as they end."""
    waiting, timeouts = list(chosen), 0
    running: list[Child] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    case = waiting.pop(0)
                    running.append(Child(case, Path(folder) / case.name, timeout, command))
                time.sleep(0.05)
                for child in [child for child in running if child.ended()]:
                    running.remove(child)
                    timeouts += child.timed_out
                    yield child.case, child.result()
                if timeouts >= GIVE_UP_AFTER:
                    for case in waiting:
                        yield case, {"failures": [f"not compiled: {timeouts} cases ran into their timeout"]}
                    waiting.clear()
        finally:
            for child in running:
                child.kill()


class Child:
    """A case that compiles in a process of its own. Its output goes to a file: no pipe can fill up or stay open."""

    def __init__(self, case: Case, folder: Path, timeout: float, command: Callable[[Case, Path], list[str]]) -> None:
        folder.mkdir()
        self.case = case
        self.timed_out = False
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._result, self._log = folder / "result.json", folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command(case, self._result),
                env={**os.environ, **NO_HARDWARE},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a group of its own: the assembler that it starts ends with it
            )

    def ended(self) -> bool:
        """Whether it is over, by itself or because its time was."""
        if self._process.poll() is None and time.monotonic() > self._deadline:
            self.timed_out = True
            self.kill()
        return self._process.poll() is not None

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def result(self) -> dict[str, Any]:
        """The figures that it left, or why there are none."""
        status = self._process.returncode
        if self.timed_out:
            return {"failures": [f"not compiled after {self._timeout:.0f} s"]}
        if status == -signal.SIGXCPU:
            return {"failures": [f"not compiled after {CPU_LIMIT} s of CPU time"]}
        if status < 0:
            return {"failures": [f"killed by {signal.Signals(-status).name}"]}
        if status or not self._result.exists():
            lines = self._log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if re.match(r"\S*(Error|Exception)\b.*", line)]
            return {"failures": [f"exit status {status}: " + (errors or lines or ["no output"])[-1][:500]]}
        return json.loads(self._result.read_text())


if __name__ == "__main__":
    sys.exit(main())
