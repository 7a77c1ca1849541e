"""A core without jax: a device that computes tokens in plain Python and logs what it is asked, and sinks that count."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from fakes import Clock

from jaxserve.engine.core import EngineCore
from jaxserve.engine.events import ChoiceEvent
from jaxserve.engine.submission import Submission
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.config import SchedulerConfig
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.request import Choice
from jaxserve.scheduler.scheduler import Scheduler

VOCAB = 97
_ids = itertools.count()


def next_token(tokens: Sequence[int]) -> int:
    """The model: a function of the whole prefix."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCAB


def expected(choice: Choice) -> list[int]:
    """What the choice must emit: one token at a time, alone."""
    tokens = list(choice.prompt_token_ids)
    for _ in range(choice.params.max_tokens or 0):
        tokens.append(next_token(tokens))
    return tokens[choice.prompt_len :]


def make_choice(prompt_len: int = 5, max_tokens: int = 6, **settings) -> Choice:
    number = next(_ids)
    prompt = [(7 * number + 3 * i) % VOCAB for i in range(prompt_len)]
    params = SamplingParams(max_tokens=max_tokens, **settings)
    return Choice(choice_id=number, prompt_token_ids=prompt, params=params)


@dataclass
class Slot:
    tokens: list[int]
    computed_len: int


class FakeRunner:
    """A StepRunner. Steps take effect when they are dispatched, in order, as on a device.

    Attributes:
        log: ("dispatch" | "fetch", step_id), in order.
        plans: every dispatched plan.
        calls: how many plans each dispatch brought.
        hook: called with every entry of the log before it happens; it may raise, block or call the core.
    """

    def __init__(self, hook: Callable[[str, int], None] | None = None, burst_len: int = 1) -> None:
        self.burst_len = burst_len
        self.calls: list[int] = []
        self.log: list[tuple[str, int]] = []
        self.plans: list[StepPlan] = []
        self.hook = hook or (lambda what, step_id: None)
        self._slots: dict[int, Slot] = {}

    def takes_another(self, plans: Sequence[StepPlan]) -> bool:
        return len(plans) < self.burst_len

    def dispatch(self, plans: Sequence[StepPlan]) -> list[StepResult]:
        self.calls.append(len(plans))
        return [self._run(plan) for plan in plans]

    def _run(self, plan: StepPlan) -> StepResult:
        self.hook("dispatch", plan.step_id)
        self.log.append(("dispatch", plan.step_id))
        self.plans.append(plan)
        for admission in plan.admissions:
            self._slots[admission.slot] = Slot(admission.token_ids.tolist(), admission.computed_len)
        tokens = np.zeros((len(plan.slots), 1 + int(plan.num_drafts.max(initial=0))), np.int32)
        emitted = np.zeros(len(plan.slots), np.int32)
        for row, (number, width, samples) in enumerate(zip(plan.slots, plan.widths, plan.samples, strict=True)):
            slot = self._slots[int(number)]
            drafts = [] if plan.draft_ids is None else plan.draft_ids[row, : plan.num_drafts[row]].tolist()
            slot.computed_len += int(width) - len(drafts)
            assert slot.computed_len <= len(slot.tokens), "a token was computed before it was known"
            if samples:
                assert slot.computed_len == len(slot.tokens), "sampled somewhere else than at the newest token"
                true = [next_token(slot.tokens)]
                while len(true) <= len(drafts) and drafts[len(true) - 1] == true[-1]:
                    true.append(next_token(slot.tokens + true))
                tokens[row, : len(true)], emitted[row] = true, len(true)
                slot.tokens += true
                slot.computed_len += len(true) - 1
        return StepResult(plan.step_id, tokens, emitted, plan.num_drafts.astype(np.int32))

    def fetch(self, step: StepResult) -> StepResult:
        self.hook("fetch", step.step_id)
        self.log.append(("fetch", step.step_id))
        return step


class Sink:
    """Collects events by choice."""

    def __init__(self) -> None:
        self.events: dict[int, list[ChoiceEvent]] = {}
        self._changed = threading.Condition()

    def __call__(self, event: ChoiceEvent) -> None:
        with self._changed:
            self.events.setdefault(event.choice_id, []).append(event)
            self._changed.notify_all()

    def wait(self, choices: Sequence[Choice], seconds: float = 20.0) -> None:
        """Until each of the choices has a terminal event."""
        with self._changed:
            done = self._changed.wait_for(lambda: all(self.terminal(c) is not None for c in choices), seconds)
        assert done, {c.choice_id: self.events.get(c.choice_id) for c in choices if self.terminal(c) is None}

    def terminal(self, choice: Choice) -> ChoiceEvent | None:
        """The one terminal event, which is also the last one."""
        events = self.events.get(choice.choice_id, [])
        ends = [event for event in events if event.finish_reason is not None]
        assert len(ends) <= 1, ends
        assert not ends or events[-1] is ends[0], "news after the end"
        return ends[0] if ends else None

    def reason(self, choice: Choice) -> str | None:
        end = self.terminal(choice)
        return None if end is None else end.finish_reason

    def tokens(self, choice: Choice) -> list[int]:
        return [token for event in self.events.get(choice.choice_id, []) for token in event.token_ids]


def make_core(runner: FakeRunner | None = None, *, watchdog_seconds: float = 60.0, **settings) -> EngineCore:
    """A core over a small pool; it isn't started."""
    config = SchedulerConfig(
        **{
            "max_num_seqs": 4,
            "max_model_len": 64,
            "max_num_batched_tokens": 16,
            "block_size": 4,
            "num_blocks": 64,
            "run_ahead": 2,
            **settings,
        }
    )
    return EngineCore(
        Scheduler(config), runner or FakeRunner(), watchdog_seconds=watchdog_seconds, check_invariants=True
    )


def run(core: EngineCore, choices: Sequence[Choice]) -> Sink:
    """Submits, waits for the ends, and shuts the core down."""
    sink = Sink()
    core.submit(choices, sink)
    core.start()
    sink.wait(choices)
    core.shutdown()
    return sink


class Watchdog:
    """The watchdog of a core that isn't started, which looks whenever the clock has moved; a look takes no time.

    Attributes:
        clock: the core's.
    """

    def __init__(self, core: EngineCore, clock: Clock) -> None:
        self.clock = clock
        self._looked = threading.Semaphore(0)
        self._look, core._trouble = core._trouble, self._counted

    def _counted(self) -> str | None:
        trouble = self._look()
        self._looked.release()
        return trouble

    def after(self, seconds: float) -> None:
        """Lets ``seconds`` pass and the watchdog look."""
        self.clock.now += seconds
        while self._looked.acquire(blocking=False):
            pass
        for _ in range(2):  # the first may have looked before
            assert self._looked.acquire(timeout=20)


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it didn't happen in time"
        time.sleep(0.001)


def when_waiting(action: Callable[[], object], ready: Callable[[], bool] = lambda: True) -> threading.Thread:
    """Calls ``action`` on the thread that it returns, once ``ready`` and this one waits in a front for its core."""
    waiter = threading.get_ident()

    def run() -> None:
        until(ready)
        until(lambda: sys._current_frames()[waiter].f_code is Submission._wait.__code__)
        action()

    thread = threading.Thread(target=run)
    thread.start()
    return thread
