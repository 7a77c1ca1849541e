"""Where a step's time goes: wall time, host time by phase, device busy time, graph updates, kernels by time. Of decode
steps at several batch sizes, of the way to the first token of one prompt, and of requests that come at once with
prompts and answers of many lengths (workload (a) of bench_throughput.py).

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
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxserve.config import EngineConfig
from jaxserve.engine.build import build_engine
from jaxserve.engine.core import EngineCore, next_plans, num_due
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.request import Choice

PHASES = ("schedule", "dispatch", "wait", "commit")


class Loop:
    """The core's turn, phase by phase, with a clock around each."""

    def __init__(self, core: EngineCore, run_ahead: int):
        self.scheduler, self.runner, self.run_ahead = core.scheduler, core.runner, run_ahead
        self.num_steps = 0
        self.in_flight: deque[tuple[Any, Any]] = deque()
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self.committed: StepPlan | None = None  # the newest

    def run(self, num_steps: int) -> None:
        """At least so many steps; a turn may make several."""
        until = self.num_steps + num_steps
        while self.num_steps < until:
            self.step()

    def step(self) -> None:
        clock = time.perf_counter
        times = [clock()]
        plans = next_plans(self.scheduler, self.runner)
        times.append(clock())
        self.in_flight.extend(zip(plans, self.runner.dispatch(plans), strict=True))
        times.append(clock())
        self.seconds["schedule"].append(times[1] - times[0])
        self.seconds["dispatch"].append(times[2] - times[1])
        self.num_steps += len(plans)
        for _ in range(num_due(len(self.in_flight), len(plans), self.run_ahead)):
            self.commit_oldest()

    def commit_oldest(self) -> None:
        clock = time.perf_counter
        plan, step = self.in_flight.popleft()
        before = clock()
        result = self.runner.fetch(step)
        fetched = clock()
        self.scheduler.commit(plan, result)
        self.seconds["wait"].append(fetched - before)
        self.seconds["commit"].append(clock() - fetched)
        self.committed = plan

    def fill(self, batch: int, prompt_len: int, max_tokens: int, rng: random.Random, params: dict[str, Any]) -> None:
        """Admits a batch and runs until all of it decodes."""
        settings = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **params)
        first = max(self.scheduler.choices, default=0) + 1 + rng.randrange(1 << 40)
        for number in range(batch):
            ids = [rng.randrange(10_000) for _ in range(prompt_len)]
            self.scheduler.add(Choice(choice_id=first + number, prompt_token_ids=ids, params=settings))
        while any(not choice.output_token_ids for choice in self.scheduler.choices.values()):
            self.step()

    def drain(self) -> None:
        for choice in list(self.scheduler.choices.values()):
            self.scheduler.finish(choice, "abort")
        while self.in_flight:
            self.step()
        self.scheduler.clear_prefix_cache()


def trace(loop: Loop, work: Callable[[], None], directory: Path) -> list[dict[str, Any]]:
    """The complete events of what ``work`` makes the device do."""
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = 2
    options.python_tracer_level = 0
    with jax.profiler.trace(str(directory), profiler_options=options):
        work()
        while loop.in_flight:
            loop.commit_oldest()
    newest = max(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    events = json.loads(gzip.decompress(newest.read_bytes()))["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    return [{**e, "process": processes.get(e["pid"], "")} for e in events if e.get("ph") == "X"]


def report(events: list[dict[str, Any]], steps: int, kernels: int) -> dict[str, Any]:
    """Busy time, gaps, graph updates and the kernels that take longest; microseconds a step."""
    on_device = sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"]) for e in events if "GPU" in e["process"] or "TPU" in e["process"]
    )
    busy, end, last = 0.0, 0.0, ""
    gaps: collections.Counter[str] = collections.Counter()
    by_name: collections.Counter[str] = collections.Counter()
    count: collections.Counter[str] = collections.Counter()
    for start, stop, name in on_device:
        busy += max(0.0, stop - max(start, end))
        if last and start > end:
            gaps[f"{last[:32]} .. {name[:32]}"] += start - end
        if stop > end:
            end, last = stop, name
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
    for name, total in gaps.most_common(6):
        print(f"    idle: {name[:70]:72s} {total / steps:9.1f} us")
    for name, total in host.most_common():
        if "command_buffer::" in name or "raphLaunch" in name or "Execute (jit" in name:
            print(f"    host: {name[:64]:64s} x{host_count[name] / steps:6.1f} {total / steps:9.1f} us")
    graphs = [e for e in events if e["name"].startswith("command_buffer::update")]
    sizes = collections.Counter(e.get("args", {}).get("num_commands", "?") for e in graphs)
    print("  graph updates a step, by commands in the graph:", {k: v / steps for k, v in sizes.items()})
    return {"device busy us": busy / steps, "span us": span / steps, "graph updates": len(graphs) / steps}


def profile_decode(loop: Loop, batch: int, rng: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    """Steady decode of ``batch`` requests."""
    loop.fill(batch, args.prompt_len, 4 * args.steps + 100, rng, {"temperature": args.temperature})
    loop.run(10)
    walls = []
    loop.seconds = {phase: [] for phase in PHASES}
    before_all = loop.num_steps
    for _ in range(3):
        start, before = time.perf_counter(), loop.num_steps
        loop.run(args.steps // 3)
        walls.append(1e3 * (time.perf_counter() - start) / (loop.num_steps - before))
    num_steps = loop.num_steps - before_all
    phases = {phase: 1e3 * sum(seconds) / num_steps for phase, seconds in loop.seconds.items()}
    print(
        f"batch {batch}: {statistics.median(walls):.3f} ms a step ({min(walls):.3f}..{max(walls):.3f}); host: "
        + ", ".join(f"{phase} {ms:.3f}" for phase, ms in phases.items())
    )
    before = loop.num_steps
    events = trace(loop, lambda: loop.run(args.trace_steps), args.out / f"batch_{batch}")
    figures = report(events, loop.num_steps - before, args.kernels)
    loop.drain()
    return {"ms a step": walls, "host ms": phases, **figures}


def profile_prefill(loop: Loop, prompt_len: int, rng: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    """From the arrival of one prompt to its first token on the host, nothing else running; without the fronts."""
    settings = {"temperature": args.temperature}
    walls = []
    for _ in range(7):
        start = time.perf_counter()
        loop.fill(1, prompt_len, 2, rng, settings)
        walls.append(1e3 * (time.perf_counter() - start))
        loop.drain()
    print(f"first token of {prompt_len}: {statistics.median(walls):.2f} ms ({min(walls):.2f}..{max(walls):.2f})")
    events = trace(loop, lambda: loop.fill(1, prompt_len, 2, rng, settings), args.out / f"prefill_{prompt_len}")
    figures = report(events, 1, args.kernels)
    loop.drain()
    return {"ms": walls, **figures}


def kind_of(plan: StepPlan | None) -> str:
    """What a step computes, for grouping."""
    if plan is None:
        return "nothing"
    num_rows = len(plan.slots)
    if plan.num_tokens > num_rows:
        return f"mixed, {plan.num_tokens // 1024}k tokens"
    return f"decode, up to {1 << (num_rows - 1).bit_length():3d} rows"


def profile_mixed(loop: Loop, num_requests: int, rng: random.Random, args: argparse.Namespace) -> dict[str, Any]:
    """Requests that come at once, 100..1024 tokens in and out. Wall time by the kind of step that was waited for."""

    def submit() -> None:
        lengths = random.Random(0)
        first = 1 + rng.randrange(1 << 40)
        for number in range(num_requests):
            ids = [rng.randrange(10_000) for _ in range(lengths.randint(100, 1024))]
            settings = SamplingParams(
                max_tokens=lengths.randint(100, 1024), temperature=args.temperature, ignore_eos=True, detokenize=False
            )
            loop.scheduler.add(Choice(choice_id=first + number, prompt_token_ids=ids, params=settings))

    loop.seconds = {phase: [] for phase in PHASES}
    walls: dict[str, list[float]] = collections.defaultdict(list)
    steps: collections.Counter[str] = collections.Counter()
    submit()
    begin = last = time.perf_counter()
    while loop.scheduler.has_work or loop.in_flight:
        num_waiting = len(loop.in_flight)
        before = loop.num_steps
        loop.step()
        now = time.perf_counter()
        kind = kind_of(loop.committed)
        walls[kind].append(1e3 * (now - last))
        steps[kind] += num_waiting + loop.num_steps - before - len(loop.in_flight)
        last = now
    total = last - begin
    phases = {phase: sum(seconds) for phase, seconds in loop.seconds.items()}
    print(
        f"{num_requests} requests: {total:.3f} s; host: "
        + ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in phases.items())
    )
    for kind, times in sorted(walls.items()):
        each = sum(times) / max(steps[kind], 1)
        print(f"  {kind}: {steps[kind]} steps in {len(times)} turns, {sum(times):.0f} ms, {each:.3f} a step")
    loop.drain()
    figures = {}
    submit()
    first = loop.num_steps
    for num_done in (2, *args.mixed_windows):
        loop.run(num_done - (loop.num_steps - first))
        print(f"{num_requests} requests, {loop.scheduler.num_running} of them running after {num_done} steps")
        before = loop.num_steps
        events = trace(loop, lambda: loop.run(args.trace_steps), args.out / f"mixed_{num_done}")
        figures[f"after {num_done} steps"] = report(events, loop.num_steps - before, args.kernels)
    loop.drain()
    return {"seconds": total, "host s": phases, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/models/qwen3-0.6b.toml")
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 64, 256])
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--prefills", type=int, nargs="*", default=[1024], help="prompt lengths")
    parser.add_argument("--mixed", type=int, default=0, help="requests that come at once, of many lengths; 0: not run")
    parser.add_argument("--mixed-windows", type=int, nargs="*", default=[150, 500, 800], help="steps before each trace")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--trace-steps", type=int, default=10)
    parser.add_argument("--kernels", type=int, default=14)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--run-ahead", type=int, default=2)
    parser.add_argument("--steps-per-dispatch", type=int)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--attention-implementation", default="auto")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--compilation-cache-dir")
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
        steps_per_dispatch=args.steps_per_dispatch,
        attention_implementation=args.attention_implementation,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        compilation_cache_dir=args.compilation_cache_dir,
    )
    engine = build_engine(config, progress=False)
    print(json.dumps(engine.info, default=str))
    loop = Loop(engine.core, args.run_ahead)
    rng = random.Random(0)
    results: dict[str, Any] = {}
    for prompt_len in args.prefills:
        results[f"prefill {prompt_len}"] = profile_prefill(loop, prompt_len, rng, args)
    for batch in args.batches:
        results[f"decode {batch}"] = profile_decode(loop, batch, rng, args)
    if args.mixed:
        results["mixed"] = profile_mixed(loop, args.mixed, rng, args)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
