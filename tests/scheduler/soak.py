"""Explores schedules for as long as it's told, and prints how many: ``python tests/scheduler/soak.py --seconds 600``.

It alternates random lives of random small schedulers with exhaustive sweeps of two-choice settings. The last line on
stdout is one JSON document; a failure raises, after the seed or the setting that shows it was printed.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from scheduler_explore import Setting, Tally, explore
from scheduler_random import random_schedule


def random_setting(rng: random.Random) -> Setting:
    """A world of one or two choices, near its limits in every respect."""
    max_model_len = rng.randint(4, 20)
    num_choices = rng.choice([1, 1, 2])
    prompt_lens = tuple(rng.randint(max(1, max_model_len - 6), max_model_len - 1) for _ in range(num_choices))
    return Setting(
        block_size=rng.choice([1, 2, 4]),
        num_drafts=rng.randint(0, 4),
        max_model_len=max_model_len,
        run_ahead=rng.randint(0, 3),
        prompt_lens=prompt_lens,
        spare_blocks=rng.choice([0, 0, 1, 3]),
        max_num_batched_tokens=rng.choice([2, 3, 64]),
        drafting=rng.choice(["device", "host"]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on")
    parser.add_argument("--seed", type=int, default=0, help="of the first random life")
    parser.add_argument("--max-states", type=int, default=2000, help="most states of one sweep")
    args = parser.parse_args()
    tally, lives, sweeps, seed = Tally(), 0, 0, args.seed
    end = time.monotonic() + args.seconds
    next_line = time.monotonic() + 10.0
    while time.monotonic() < end:
        current: object = seed
        try:
            for _ in range(50):
                current = seed
                world = random_schedule(seed)
                tally.num_schedules += world.num_schedules
                tally.num_preemptions += world.scheduler.stats.num_preemptions
                lives += 1
                seed += 1
            current = random_setting(random.Random(seed))
            tally.add(explore(current, args.max_states))
            sweeps += 1
        except BaseException:
            print(f"failed at {current!r}", flush=True)
            raise
        if time.monotonic() >= next_line:
            next_line += 10.0
            print(f"{tally.num_schedules} schedules, {lives} lives, {sweeps} sweeps", flush=True)
    document = {
        "num_schedules": tally.num_schedules,
        "num_distinct_states": tally.num_states,
        "num_preemptions": tally.num_preemptions,
        "num_lives": lives,
        "num_sweeps": sweeps,
        "next_seed": seed,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
