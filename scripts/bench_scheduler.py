"""Times the scheduler alone: schedule + commit at a steady decode, prefix matching, and loop detection.

The last line on stdout is one JSON document. Times are of one core; a fake device accepts drafts at random.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import time
from array import array
from collections.abc import Callable

import numpy as np

from jaxserve.sampling_params import RepetitionDetection, SamplingParams
from jaxserve.scheduler import AdaptiveDrafts, Choice, Scheduler, SchedulerConfig, StepPlan, StepResult
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.repetition import LoopFinder

MAX_MODEL_LEN = 8192
VOCAB_SIZE = 150_000
RULE = AdaptiveDrafts(compute_bound_tokens=8192)  # wide steps are free, so all draft: the rule has the most to reckon


def fake_result(plan: StepPlan, num_drafts: int, rng: np.random.Generator) -> StepResult:
    """Random tokens, and a uniformly random number of accepted drafts in each row."""
    num_rows = len(plan.choices)
    emitted = np.where(plan.samples, 1 + rng.integers(0, plan.num_drafts + 1), 0).astype(np.int32)
    token_ids = rng.integers(0, VOCAB_SIZE, (num_rows, num_drafts + 1), dtype=np.int32)
    return StepResult(plan.step_id, token_ids, emitted, plan.num_drafts)


class Bench:
    """A scheduler in steady decode with ``num_choices`` choices and one step of run-ahead."""

    def __init__(self, num_choices: int, args: argparse.Namespace) -> None:
        self.num_choices = num_choices
        self.num_drafts = args.num_drafts
        self.least_drafts = 0 if args.adaptive else args.num_drafts
        self.rng = np.random.default_rng(args.seed)
        self.plans: list[StepPlan] = []
        self.times: list[float] = []
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=num_choices,
                max_model_len=MAX_MODEL_LEN,
                max_num_batched_tokens=8192,
                block_size=args.block_size,
                num_blocks=num_choices * -(-MAX_MODEL_LEN // args.block_size),
                max_drafts=args.num_drafts,
                adaptive_drafts=RULE if args.adaptive else None,
                run_ahead=1,
            )
        )
        for choice_id in range(num_choices):
            prompt = self.rng.integers(0, VOCAB_SIZE, args.prompt_len).tolist()
            params = SamplingParams(max_tokens=MAX_MODEL_LEN - args.prompt_len, stop_token_ids=(VOCAB_SIZE,))
            self.scheduler.add(
                Choice(
                    choice_id=choice_id,
                    prompt_token_ids=prompt,
                    params=params,
                    eos_token_ids=(VOCAB_SIZE + 1,),
                )
            )

    def step(self) -> None:
        """One schedule and one commit; timed where all choices decode, with full drafts unless they adapt."""
        start = time.perf_counter()
        plan = self.scheduler.schedule()
        scheduled = time.perf_counter()
        if plan is None:
            raise RuntimeError("the bench ran out of work; use fewer steps")
        self.plans.append(plan)
        if len(self.plans) < 2:
            return
        oldest = self.plans.pop(0)
        result = fake_result(oldest, self.num_drafts, self.rng)
        committing = time.perf_counter()
        self.scheduler.commit(oldest, result)
        elapsed = scheduled - start + time.perf_counter() - committing
        if len(oldest.choices) == self.num_choices and int(oldest.num_drafts.min()) >= self.least_drafts:
            self.times.append(elapsed)


def step_times(args: argparse.Namespace) -> dict[int, list[float]]:
    """Sorted seconds of schedule + commit for each number of choices; the benches take turns of 20 steps."""
    benches = [Bench(num_choices, args) for num_choices in args.choices]
    gc.collect()
    gc.freeze()  # as a server does after its start
    while any(len(bench.times) < args.steps for bench in benches):
        for bench in benches:
            for _ in range(20):
                bench.step()
    gc.unfreeze()
    return {bench.num_choices: sorted(bench.times) for bench in benches}


def best_of(repeats: int, action: Callable[[], object]) -> float:
    """Seconds of the fastest of ``repeats`` runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return min(times)


def match_seconds(args: argparse.Namespace) -> float:
    """Seconds to match a fully cached prompt of ``match_len`` tokens."""
    prompt = np.random.default_rng(args.seed).integers(0, VOCAB_SIZE, args.match_len).tolist()
    num_blocks = -(-args.match_len // args.block_size)
    cache = PrefixCache(num_blocks, args.block_size)
    parent: object = ("salt", None)
    for block in range(args.match_len // args.block_size):
        parent = cache.publish(block, parent, prompt[block * args.block_size : (block + 1) * args.block_size])
    hits, _ = cache.match(("salt", None), prompt)
    if len(hits) != (args.match_len - 1) // args.block_size:
        raise RuntimeError(f"{len(hits)} blocks hit")
    return best_of(args.repeats, lambda: cache.match(("salt", None), prompt))


def detection_seconds(args: argparse.Namespace) -> float:
    """Mean seconds of one look at a text-like tail: few distinct tokens, no loop."""
    rng = random.Random(args.seed)
    tails = [array("i", [min(int(rng.expovariate(0.02)), 400) for _ in range(512)]) for _ in range(256)]
    finder = LoopFinder(RepetitionDetection())
    return best_of(args.repeats, lambda: [finder.pattern_len(tail, len(tail)) for tail in tails]) / len(tails)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--choices", type=int, nargs="+", default=[64, 256], help="running choices, one bench each")
    parser.add_argument("--num-drafts", type=int, default=4, help="K")
    parser.add_argument("--adaptive", action="store_true", help="let the adaptive rule decide on drafts")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=400, help="timed steps of each bench")
    parser.add_argument("--match-len", type=int, default=32_768, help="prompt length for prefix matching")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    steps, medians = {}, []
    for num_choices, times in step_times(args).items():
        medians.append(statistics.median(times))
        steps[str(num_choices)] = {
            "median_ms": round(1e3 * medians[-1], 4),
            "p99_ms": round(1e3 * times[int(0.99 * (len(times) - 1))], 4),
        }
        print(f"{num_choices:5d} choices, K={args.num_drafts}: {steps[str(num_choices)]}")
    document = {
        "schedule_commit": steps,
        "last_over_first": round(medians[-1] / medians[0], 2),
        "match_ms": round(1e3 * match_seconds(args), 3),
        "match_len": args.match_len,
        "repetition_us_per_look": round(1e6 * detection_seconds(args), 3),
        "num_drafts": args.num_drafts,
        "adaptive": args.adaptive,
        "block_size": args.block_size,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
