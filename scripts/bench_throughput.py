"""Serving speed on one accelerator through the public LLM API, dummy weights; the workloads of docs/benchmarks.md.

    (a) 256 requests, prompt and output lengths uniform in 100..1024, temperature 0.6: output tokens/s, and the 99th
        percentile of the time between tokens of one request, over all and while other prompts are prefilled
    (b) one request, 1024 prompt tokens, 256 outputs, greedy: ms per output token, ms to the first token
    (c) batches of n, 512 prompt tokens, 128 outputs, greedy: step ms = (time for 128 outputs - time for 1) / 127
    (d) 32 prompts of 2048 tokens, one output each: prompt tokens/s
    (s) as (c) at 64 requests: top_p 0.9 with top_k 50; seeds, penalties and 5 logprobs; both against greedy

Prompts are random and distinct; the prefix cache is emptied between runs. A hit in it, or a compilation while serving,
makes the exit status 1. The device's copy rate is measured in the same run, before the engine, by another process. The
last stdout line is one JSON document.

    python scripts/bench_throughput.py --model configs/models/qwen3-0.6b.toml --workloads abcd
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import LLM, SamplingParams
from jaxserve.engine.events import ChoiceEvent

VOCAB_LIMIT = 10_000  # ids that every model has


def prompts(rng: random.Random, lengths: list[int]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": [rng.randrange(VOCAB_LIMIT) for _ in range(length)]} for length in lengths]


def settings(max_tokens: int, temperature: float = 0.0, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)


class Bench:
    """Runs workloads on one engine; every number is a list of runs."""

    def __init__(self, llm: LLM, runs: int, seed: int):
        self.llm, self.runs = llm, runs
        self.rng = random.Random(seed)

    def gaps(self, batch: list[dict[str, Any]], params: list[SamplingParams]) -> tuple[float, float]:
        """99th percentiles, in ms, of the time from one token of a request to its next: of all, and of those that came
        before the last first token. Tokens of one event came together, so that all but its first have a gap of 0."""
        events: list[ChoiceEvent] = []
        core = self.llm.engine.core
        submit = core.submit

        def listening(choices: Any, sink: Any, *, streaming: bool) -> None:
            submit(choices, lambda event: (events.append(event), sink(event)), streaming=True)

        core.submit = listening
        try:
            self.timed(batch, params)
        finally:
            core.submit = submit
        last: dict[int, float] = {}
        found: list[tuple[float, float]] = []  # when, how long
        prefilled = 0.0
        for event in events:
            if not event.token_ids:
                continue
            if event.choice_id in last:
                found.append((event.time, event.time - last[event.choice_id]))
            else:
                prefilled = event.time  # of the last request, in the end
            found += [(event.time, 0.0)] * (len(event.token_ids) - 1)
            last[event.choice_id] = event.time
        early = [gap for when, gap in found if when <= prefilled]
        return (
            1e3 * float(np.percentile([gap for _, gap in found], 99)),
            1e3 * float(np.percentile(early, 99)) if early else 0.0,
        )

    def timed(self, batch: list[dict[str, Any]], params: Any) -> tuple[float, list[Any]]:
        self.llm.reset_prefix_cache()
        start = time.perf_counter()
        outputs = self.llm.generate(batch, params, use_tqdm=False)
        return time.perf_counter() - start, outputs

    def mixed(self) -> dict[str, list[float]]:
        rates, totals = [], []
        for _ in range(self.runs):
            lengths = random.Random(0)
            sizes = [(lengths.randint(100, 1024), lengths.randint(100, 1024)) for _ in range(256)]
            batch = prompts(self.rng, [size for size, _ in sizes])
            seconds, outputs = self.timed(batch, [settings(size, 0.6) for _, size in sizes])
            rates.append(sum(len(o.outputs[0].token_ids) for o in outputs) / seconds)
            totals.append(1e3 * seconds)
        overall, early = self.gaps(prompts(self.rng, [size for size, _ in sizes]), [settings(n, 0.6) for _, n in sizes])
        return {
            "output tok/s": rates,
            "total ms": totals,
            "p99 ms between tokens": [overall],
            "p99 ms between tokens while prompts are prefilled": [early],
        }

    def single(self) -> dict[str, list[float]]:
        first, each = [], []
        for _ in range(self.runs):
            one, _ = self.timed(prompts(self.rng, [1024]), settings(1))
            many, _ = self.timed(prompts(self.rng, [1024]), settings(256))
            first.append(1e3 * one)
            each.append(1e3 * (many - one) / 255)
        return {"ms to first token": first, "ms per token": each}

    def batch(self, size: int, each: list[dict[str, Any]] | None = None) -> list[float]:
        """``each``: further settings of the requests."""
        steps = []
        more = each or [{}] * size
        for _ in range(self.runs):
            one, _ = self.timed(prompts(self.rng, [512] * size), [settings(1, **m) for m in more])
            many, _ = self.timed(prompts(self.rng, [512] * size), [settings(128, **m) for m in more])
            steps.append(1e3 * (many - one) / 127)
        return steps

    def samplers(self, size: int) -> dict[str, list[float]]:
        truncated = {"temperature": 0.6, "top_p": 0.9, "top_k": 50}
        full = {"temperature": 0.6, "presence_penalty": 0.2, "frequency_penalty": 0.1, "repetition_penalty": 1.1}
        return {
            "greedy": self.batch(size),
            "top_p 0.9, top_k 50": self.batch(size, [truncated] * size),
            "seeds, penalties, 5 logprobs": self.batch(size, [{**full, "seed": n, "logprobs": 5} for n in range(size)]),
        }

    def prefill(self) -> dict[str, list[float]]:
        rates = []
        for _ in range(self.runs):
            seconds, _ = self.timed(prompts(self.rng, [2048] * 32), settings(1))
            rates.append(32 * 2048 / seconds)
        return {"prompt tok/s": rates}


def copy_rate() -> float:
    """Bytes read and written per second by a large copy."""
    source = jnp.ones((1 << 30,), jnp.bfloat16)
    copy = jax.jit(lambda x: x * 2)
    copy(source).block_until_ready()
    start = time.perf_counter()
    for _ in range(10):
        result = copy(source)
    result.block_until_ready()
    return 10 * 2 * source.nbytes / (time.perf_counter() - start)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="configs/models/qwen3-0.6b.toml")
    parser.add_argument("--workloads", default="abcd")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 64, 128, 256])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-seqs", type=int)
    parser.add_argument("--max-num-batched-tokens", type=int)
    parser.add_argument("--run-ahead", type=int, default=2)
    parser.add_argument("--attention-implementation", default="auto")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--num-gpu-blocks-override", type=int)
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--steps-per-dispatch", type=int)
    parser.add_argument("--compilation-cache-dir")
    args = parser.parse_args()

    # In a process of its own: what the copy allocates isn't the engine's to have.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        rate = pool.submit(copy_rate).result()
    llm = LLM(
        args.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=args.max_model_len,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        run_ahead=args.run_ahead,
        attention_implementation=args.attention_implementation,
        gpu_memory_utilization=args.gpu_memory_utilization,
        num_gpu_blocks_override=args.num_gpu_blocks_override,
        kv_cache_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        steps_per_dispatch=args.steps_per_dispatch,
        compilation_cache_dir=args.compilation_cache_dir,
    )
    bench = Bench(llm, args.runs, seed=1)
    for _ in range(2):
        bench.timed(prompts(bench.rng, [300] * 4), settings(20))
    results: dict[str, list[float]] = {}
    if "a" in args.workloads:
        results |= {f"(a) {name}": runs for name, runs in bench.mixed().items()}
    if "b" in args.workloads:
        results |= {f"(b) {name}": runs for name, runs in bench.single().items()}
    if "c" in args.workloads:
        results |= {f"(c) step ms, {size} requests": bench.batch(size) for size in args.batches}
    if "d" in args.workloads:
        results |= {f"(d) {name}": runs for name, runs in bench.prefill().items()}
    if "s" in args.workloads:
        results |= {f"(s) step ms, 64 requests, {name}": runs for name, runs in bench.samplers(64).items()}
    stats = llm.engine.core.stats()
    for name, runs in results.items():
        print(f"{name:52s} median {statistics.median(runs):10.3f}   min {min(runs):10.3f}   max {max(runs):10.3f}")
    document = {
        "model": args.model,
        "device": llm.engine.info["device"],
        "jax": jax.__version__,
        "copy rate, TB/s": round(rate / 1e12, 3),
        "attention": llm.engine.info["attention"],
        "start-up seconds": llm.engine.info["start-up seconds"],
        "executables": llm.engine.info["executables"],
        "memory": llm.engine.info["memory"],
        "results": {
            name: {"median": statistics.median(runs), "min": min(runs), "max": max(runs)}
            for name, runs in results.items()
        },
        "prefix cache hits": stats["num_prefix_hits"],
        "compiles while serving": stats["num_compiles_while_serving"],
        "settings": vars(args),
    }
    llm.close()
    print(json.dumps(document))
    return 1 if stats["num_prefix_hits"] or stats["num_compiles_while_serving"] else 0


if __name__ == "__main__":
    sys.exit(main())
