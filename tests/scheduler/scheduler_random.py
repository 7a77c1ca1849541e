"""Random worlds and moves, for the state machine and the soak."""

from __future__ import annotations

import random

from scheduler_world import VOCAB_SIZE, HashModel, Pick, World

from jaxserve.sampling_params import RepetitionDetection, SamplingParams
from jaxserve.scheduler import AdaptiveDrafts, SchedulerConfig

FAMILIES = ([1, 2, 3, 4, 5, 0] * 6, [1, 2, 3, 4, 0, 5, 1, 1] * 4, [5] * 32)  # prompts share prefixes


def random_config(rng: random.Random) -> SchedulerConfig:
    """A small scheduler, often with the smallest pool that its limits allow."""
    max_num_seqs = rng.randint(1, 4)
    max_drafts = rng.randint(0, 4)
    block_size = rng.choice([1, 2, 3, 4, 8])
    max_model_len = rng.randint(4, 32)
    longest = -(-(max_model_len - 1) // block_size)
    rule = AdaptiveDrafts(
        token_cost=0.3,
        step_costs=((1, 1.0), (4, 1.2), (16, 3.0)) if max_drafts % 2 else (),
        compute_bound_tokens=8,
        window=3,
        probe_window=2,
        first_pause=1,
        max_pause=4,
    )
    max_num_batched_tokens = max_num_seqs + rng.choice([0, 1, 3, 8, 64])
    sizes = [max_num_batched_tokens >> shift for shift in range(8)]
    return SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        step_sizes=rng.choice([(), tuple(size for size in reversed(sizes) if size > 1)]),
        fixed_step_cost=rng.choice([0, 2]),
        block_size=block_size,
        num_blocks=longest + rng.choice([0, 0, 1, 2, longest, 4 * longest]),
        max_sample_rows=rng.choice([None, max_num_seqs, max_num_seqs + 2]),
        max_prefill_chunk_len=rng.choice([None, None, 1, 3]),
        max_drafts=max_drafts,
        drafting=rng.choice(["device", "device", "host"]),
        adaptive_drafts=rng.choice([None, rule]),
        enable_prefix_caching=rng.random() < 0.75,
        policy=rng.choice(["fcfs", "priority"]),
        run_ahead=rng.randint(0, 3),
        admission_headroom_len=rng.choice([0, 1, 16]),
        admission_retry_steps=rng.choice([1, 16]),
        max_seconds=rng.choice([None, None, 30.0]),
        repetition=rng.choice(["off", "warn", "stop"]),
        repetition_detection=RepetitionDetection(max_pattern_size=4, min_count=3),
        vocab_size=VOCAB_SIZE,
    )


def random_request(world: World, rng: random.Random) -> None:
    """One request that fits, its lengths around multiples of the block size and the context limit."""
    config = world.config
    limit = config.max_model_len - 1
    near = [1, config.block_size, config.block_size + 1, limit - config.max_drafts, limit, rng.randint(1, limit)]
    prompt_len = min(max(rng.choice(near), 1), limit)
    room = config.max_model_len - prompt_len
    max_tokens = rng.choice([None, room, rng.randint(1, room)])
    params = SamplingParams(
        n=rng.choice([1, 1, 1, 2, 3]),
        max_tokens=max_tokens,
        min_tokens=rng.randint(0, max_tokens or room),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=rng.choice([None, (3,)]),
        priority=rng.randint(0, 2),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        max_seconds=rng.choice([None, None, 20.0]),
        num_speculative_tokens=rng.choice([None, None, rng.randint(0, config.max_drafts)]),
        repetition_detection=rng.choice([None, None, RepetitionDetection(max_pattern_size=3, min_count=4)]),
    )
    prompt = rng.choice(FAMILIES)[:prompt_len]
    salt = rng.choice([None, None, None, "a"])
    world.add(prompt, params, seed=rng.randint(0, 2), salt=salt, host_synchronous=rng.random() < 0.1)


def random_pick(rng: random.Random) -> Pick:
    """Any number of drafts found, any number of them right; often none or all."""

    def pick(most: int) -> tuple[int, int]:
        drafted = rng.choice([0, most, rng.randint(0, most)])
        return drafted, rng.choice([0, drafted, rng.randint(0, drafted)])

    return pick


def random_move(world: World, rng: random.Random, kinds: tuple[str, ...]) -> None:
    """One move of one of these kinds, if the world allows it."""
    kind = rng.choice(kinds)
    if kind == "dispatch":
        world.dispatch(random_pick(rng))
    elif kind == "commit" and world.steps:
        world.commit()
    elif kind == "add" and len(world.choices) < 12:
        random_request(world, rng)
    elif kind == "abort" and world.choices:
        world.abort(rng.choice(world.choices))
    elif kind == "preempt" and (running := [choice for choice in world.choices if choice.slot >= 0]):
        world.preempt(rng.choice(running))
    elif kind == "evict":
        world.evict()
    elif kind == "expire":
        world.expire(rng.uniform(0.0, 60.0))


def random_schedule(seed: int, length: int = 60) -> World:
    """A whole life: random moves, then everything runs to its end."""
    rng = random.Random(seed)
    world = World(random_config(rng), HashModel(loop=rng.choice([0, 0, 0, 2, 3])))
    kinds = ("add",) * 4 + ("dispatch",) * 12 + ("commit",) * 9 + ("abort", "preempt", "evict", "expire")
    for _ in range(length):
        random_move(world, rng, kinds)
    world.drain(random_pick(rng))
    return world
