"""Random schedules (P1 to P14 of the invariants): whatever happens, every choice gets its own answer.

``World`` checks after each move the scheduler's invariants, every position that the fake device reads, and that every
output is a prefix of what the oracle generates for that choice alone.
"""

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_random import random_config, random_move, random_pick, random_request
from scheduler_world import HashModel, World

SEEDS = st.integers(0, 2**32 - 1)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(seed=SEEDS, loop=st.sampled_from([0, 0, 0, 2, 3]))
    def start(self, seed, loop):
        self.world = World(random_config(random.Random(seed)), HashModel(loop=loop))

    @precondition(lambda self: len(self.world.choices) < 10)
    @rule(seed=SEEDS)
    def add(self, seed):
        random_request(self.world, random.Random(seed))

    @rule(seed=SEEDS)
    def dispatch(self, seed):
        self.world.dispatch(random_pick(random.Random(seed)))

    @precondition(lambda self: self.world.steps)
    @rule()
    def commit(self):
        self.world.commit()

    @rule(seed=SEEDS, times=st.integers(1, 8))
    def steps(self, seed, times):
        rng = random.Random(seed)
        for _ in range(times):
            random_move(self.world, rng, ("dispatch", "commit"))

    @precondition(lambda self: self.world.choices)
    @rule(which=st.integers(0, 9))
    def abort(self, which):
        self.world.abort(self.world.choices[which % len(self.world.choices)])

    @rule(seed=SEEDS)
    def preempt(self, seed):
        random_move(self.world, random.Random(seed), ("preempt",))

    @rule()
    def evict(self):
        self.world.evict()

    @rule(now=st.floats(0.0, 60.0))
    def expire(self, now):
        self.world.expire(now)

    def teardown(self):
        if hasattr(self, "world"):
            self.world.drain(random_pick(random.Random(1)))


SchedulerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase
