"""Exhaustive exploration: every move from every distinct state of a small world, breadth first."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product

from scheduler_world import HashModel, World

from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler import Scheduler, SchedulerConfig

PROMPT = [1, 2, 3, 4, 5, 1, 3, 5, 2, 4, 0, 1, 2, 0, 3, 4, 5, 0, 1, 1]


@dataclass
class Tally:
    """What was explored.

    ``num_schedules`` counts calls of ``schedule`` whose plan was run and checked, ``num_truncated`` the settings that
    have more states than were looked at.
    """

    num_states: int = 0
    num_schedules: int = 0
    num_moves: int = 0
    num_preemptions: int = 0
    num_truncated: int = 0

    def add(self, other: Tally) -> None:
        self.num_states += other.num_states
        self.num_schedules += other.num_schedules
        self.num_moves += other.num_moves
        self.num_preemptions += other.num_preemptions
        self.num_truncated += other.num_truncated


@dataclass(frozen=True)
class Setting:
    """A world to explore: one choice for each prompt length, with equal prompts as far as they go."""

    block_size: int
    num_drafts: int
    max_model_len: int
    run_ahead: int
    prompt_lens: tuple[int, ...]
    spare_blocks: int = 0  # beyond what the longest choice needs alone
    max_num_batched_tokens: int = 64
    drafting: str = "device"
    interrupts: tuple[str, ...] = ("abort", "preempt")
    make_scheduler: Callable[[SchedulerConfig], Scheduler] = field(default=Scheduler, compare=False)

    def world(self) -> World:
        config = SchedulerConfig(
            max_num_seqs=len(self.prompt_lens),
            max_model_len=self.max_model_len,
            max_num_batched_tokens=self.max_num_batched_tokens,
            block_size=self.block_size,
            num_blocks=-(-(self.max_model_len - 1) // self.block_size) + self.spare_blocks,
            max_drafts=self.num_drafts,
            drafting=self.drafting,
            adaptive_drafts=None,
            run_ahead=self.run_ahead,
            admission_headroom_len=0,
            repetition="off",
        )
        # One choice walks into the context limit, the next one meets its EOS on the way.
        world = World(config, HashModel(eos_every=5), self.make_scheduler)
        for number, prompt_len in enumerate(self.prompt_lens):
            params = SamplingParams(max_tokens=self.max_model_len - prompt_len, ignore_eos=number % 2 == 0)
            world.add(PROMPT[:prompt_len], params, seed=number)
        return world


def state_key(world: World) -> object:
    """All that decides the future, with blocks renamed in order of appearance: free blocks are all alike."""
    state = world.scheduler.state
    names: dict[int, int] = {}

    def name(block: int) -> int:
        return names.setdefault(block, len(names))

    free, idle = state.pool.free_and_idle()
    choices = tuple(
        (
            choice.status,
            choice.slot,
            choice.computed_len,
            choice.in_flight_len,
            choice.prefill_len,
            len(choice.output_token_ids),
            choice.num_published,
            choice.num_preemptions,
            tuple(name(block) for block in choice.block_ids),
            choice.refusal is not None,
        )
        for choice in world.choices
    )
    idle_names = tuple(name(block) for block in idle)
    cached = tuple(sorted((name(block), world.device.kv[block][-1]) for block in state.cache.entries()))
    steps = tuple(
        tuple(
            (choice.choice_id, choice.epoch == epoch, width, emitted, drafted)
            for choice, epoch, width, emitted, drafted in zip(
                plan.choices,
                plan.epochs.tolist(),
                plan.widths.tolist(),
                result.num_emitted.tolist(),
                result.num_drafted.tolist(),
                strict=True,
            )
        )
        for plan, result in world.steps
    )
    return choices, idle_names, cached, steps, len(free)


def outcomes(world: World) -> Iterator[tuple[int, ...]]:
    """Every accept pattern of the next step: the number of right drafts of each row that may draft."""
    limits: list[int] = []
    probe: World = pickle.loads(pickle.dumps(world))

    def note(most: int) -> tuple[int, int]:
        limits.append(most)
        return most, most

    probe.dispatch(note)
    return product(*[range(most + 1) for most in limits])


def moves(world: World, interrupts: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for pattern in outcomes(world):
        yield "dispatch", pattern
    if world.steps:
        yield "commit", ()
    for choice in world.choices:
        if choice.finished:
            continue
        if "abort" in interrupts:
            yield "abort", (choice.choice_id,)
        if "preempt" in interrupts and choice.slot >= 0 and choice.num_preemptions < 1:
            yield "preempt", (choice.choice_id,)


def play(world: World, move: str, argument: tuple[int, ...]) -> None:
    if move == "dispatch":
        pattern = iter(argument)

        def pick(most: int) -> tuple[int, int]:
            return most, next(pattern)

        world.dispatch(pick)
    elif move == "commit":
        world.commit()
    elif move == "abort":
        world.abort(world.choices[argument[0]])
    else:
        world.preempt(world.choices[argument[0]])


def explore(setting: Setting, max_states: int = 10**9, drain_every: int = 40) -> Tally:
    """Plays every move from every distinct state; each ``drain_every``-th state is also run to its end."""
    tally = Tally()
    world = setting.world()
    seen = {state_key(world)}
    frontier = [pickle.dumps(world)]
    while frontier:
        following: list[bytes] = []
        for frozen in frontier:
            tally.num_states += 1
            base: World = pickle.loads(frozen)
            if tally.num_states % drain_every == 1:
                turn = tally.num_states
                base.drain(lambda most, turn=turn: (most, turn % (most + 1)))
                base = pickle.loads(frozen)
            for move, argument in list(moves(base, setting.interrupts)):
                world = pickle.loads(frozen)
                before, planned = world.scheduler.stats.num_preemptions, world.num_schedules
                play(world, move, argument)
                tally.num_moves += 1
                tally.num_schedules += world.num_schedules - planned
                tally.num_preemptions += world.scheduler.stats.num_preemptions - before
                key = state_key(world)
                if key not in seen:
                    if len(seen) >= max_states:
                        tally.num_truncated = 1
                        continue
                    seen.add(key)
                    following.append(pickle.dumps(world))
        frontier = following
    return tally


def boundary_settings(
    max_model_lens: range, drafts: range, block_sizes: tuple[int, ...], run_aheads: tuple[int, ...]
) -> list[Setting]:
    """One choice whose prompt and limit meet block boundaries in every way, for every size."""
    settings = []
    for max_model_len, num_drafts, block_size, run_ahead in product(max_model_lens, drafts, block_sizes, run_aheads):
        for prompt_len in sorted({1, max(1, max_model_len - 2 - num_drafts), max_model_len - 2, max_model_len - 1}):
            settings.append(Setting(block_size, num_drafts, max_model_len, run_ahead, (prompt_len,)))
    return settings
