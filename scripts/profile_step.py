"""Where a decode step's time goes: wall time, host time by phase, device busy time, graph updates, kernels by time.

Runs the engine's own scheduler and runner on this thread, first untraced (that is what the times are), then under the
profiler with graphs left on (that is where device times and the number of graph updates come from).

    python scripts/profile_step.py --model configs/models/qwen3-0.6b.toml --batches 8 64 256 --out trace/
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import random
import statistics
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.build import build_engine
from jaxserve.engine.core import EngineCore
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.request import Choice

PHASES = ("schedule", "dispatch", "wait", "commit")


class Loop:
    """The core's turn, phase by phase, with a clock around each."""

    def __init__(self, core: EngineCore):
        self.scheduler, self.runner = core.scheduler, core.runner
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def step(self) -> None:
        clock = time.perf_counter
        times = [clock()]
        plan = self.scheduler.schedule()
        times.append(clock())
        if plan is not None:
            self.in_flight.append((plan, self.runner.dispatch(plan)))
        times.append(clock())
        if self.in_flight and (plan is None or len(self.in_flight) > self.scheduler.config.run_ahead):
            plan, step = self.in_flight.popleft()
            result = self.runner.fetch(step)
            times.append(clock())
            self.scheduler.commit(plan, result)
            times.append(clock())
        for phase, before, after in zip(PHASES, times, times[1:], strict=False):
            self.seconds[phase].append(after - before)

    def fill(self, batch: int, prompt_len: int, max_tokens: int, rng: random.Random, params: dict[str, Any]) -> None:
        """Admits a batch and runs until all of it decodes."""
        settings = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **params)
        first = max(self.scheduler.choices, default=0) + 1 + rng.randrange(1 << 40)
        for number in range(batch):
            ids = [rng.randrange(10_000) for _ in range(prompt_len)]
            self.scheduler.add(
                Choice(choice_id=first + number, request_id=str(first + number), prompt_token_ids=ids, params=settings)
            )
        while any(not choice.output_token_ids for choice in self.scheduler.choices.values()):
            self.step()

    def drain(self) -> None:
        for choice in list(self.scheduler.choices.values()):
            self.scheduler.finish(choice, "abort")
        while self.in_flight:
            self.step()
        self.scheduler.clear_prefix_cache()


def trace(loop: Loop, steps: int, directory: Path) -> list[dict[str, Any]]:
    """The complete events of ``steps`` traced steps."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 2
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        for _ in range(steps):
            loop.step()
        while loop.in_flight:
            plan, step = loop.in_flight.popleft()
            loop.scheduler.commit(plan, loop.runner.fetch(step))
    newest = max(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    return [{**e, "process": processes.get(e["pid"], "")} for e in events if e.get("ph") == "X"]


def report(events: list[dict[str, Any]], steps: int, kernels: int) -> dict[str, Any]:
    """Busy time, gaps, graph updates and the kernels that take longest; microseconds a step."""
    on_device = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if "GPU" in e["process"] or "TPU" in e["process"]
    )
    busy, end = 0.0, 0.0
    by_name: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for start, stop, name in on_device:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
        by_name[name] += stop - start
        count[name] += 1
    span = end - on_device[0][0] if on_device else 0.0
    host: collections.Counter[str] = collections.Counter()
    host_count: collections.Counter[str] = collections.Counter()
    for e in events:
        if "GPU" not in e["process"] and "TPU" not in e["process"]:
            host[e["name"]] += e["dur"]
            host_count[e["name"]] += 1
    print(f"  device busy {busy / steps:.0f} us a step, span {span / steps:.0f}, kernels {len(on_device) / steps:.0f}")
    for name, total in by_name.most_common(kernels):
        print(f"    {name[:70]:70s} x{count[name] / steps:6.1f} {total / steps:9.1f} us")
    for name, total in host.most_common():
        if "command_buffer::" in name or "raphLaunch" in name or "Execute (jit" in name:
            print(f"    host: {name[:64]:64s} x{host_count[name] / steps:6.1f} {total / steps:9.1f} us")
    graphs = [e for e in events if e["name"].startswith("command_buffer::update")]
    sizes = collections.Counter(e.get("args", {}).get("num_commands", "?") for e in graphs)
    print("  graph updates a step, by commands in the graph:", {k: v / steps for k, v in sizes.items()})
    return {"device busy us": busy / steps, "span us": span / steps, "graph updates": len(graphs) / steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/models/qwen3-0.6b.toml")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trace-steps", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=14)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--run-ahead", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--attention-implementation", default="auto")
    parser.add_argument("--out", type=Path, default=Path("trace"))
    args = parser.parse_args()
    # XLA runs kernel by kernel while a profiler listens, unless it is told not to.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_enable_command_buffers_during_profiling".strip()
    config = EngineConfig(
        model=args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        run_ahead=args.run_ahead,
        attention_implementation=args.attention_implementation,
    )
    engine = build_engine(config, progress=False)
    print(json.dumps(engine.info, default=str))
    loop = Loop(engine.core)
    rng = random.Random(0)
    results = {}
    for batch in args.batches:
        loop.fill(batch, args.prompt_len, 4 * args.steps, rng, {"temperature": args.temperature})
        for _ in range(10):
            loop.step()
        walls = []
        loop.seconds = {phase: [] for phase in PHASES}
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(args.steps // 3):
                loop.step()
            walls.append(1e3 * (time.perf_counter() - start) / (args.steps // 3))
        phases = {phase: 1e3 * statistics.median(seconds) for phase, seconds in loop.seconds.items()}
        print(
            f"batch {batch}: {statistics.median(walls):.3f} ms a step ({min(walls):.3f}..{max(walls):.3f}); host: "
            + ", ".join(f"{phase} {ms:.3f}" for phase, ms in phases.items())
        )
        events = trace(loop, args.trace_steps, args.out / f"batch_{batch}")
        results[batch] = {"ms a step": walls, "host ms": phases, **report(events, args.trace_steps, args.kernels)}
        loop.drain()
    print(json.dumps(results))


if __name__ == "__main__":
    sys.exit(main())
