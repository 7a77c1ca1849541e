"""The engine's loop, on its own thread: schedule, dispatch, fetch, commit. The fronts talk to it through ``submit``,
``finish`` and events.

An exception anywhere in the loop ends the engine for good: every unfinished choice gets an event with the error,
and later calls raise ``EngineDeadError``. A step that outlasts the watchdog does the same, and so does a loop whose
thread is gone.
"""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.engine.callers import Callers, Sink
from jaxserve.engine.events import ShutDown, dead_error
from jaxserve.engine.patience import Patience
from jaxserve.errors import CompileAfterWarmupError, EngineDeadError
from jaxserve.runner.compile_guard import CompileGuard
from jaxserve.scheduler.commit import Commit
from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.request import Choice, FinishReason
from jaxserve.scheduler.scheduler import Scheduler

logger = logging.getLogger("jaxserve")

_IDLE_CHECK_SECONDS = 1.0


class StepRunner(Protocol):
    """What the core needs of a runner."""

    def takes_another(self, plans: Sequence[StepPlan]) -> bool:
        """Whether one more plan could go to the device in the same call as these."""
        ...

    def dispatch(self, plans: Sequence[StepPlan]) -> Sequence[Any]:
        """Sends consecutive plans to the device; something to ``fetch`` for each."""
        ...

    def fetch(self, step: Any) -> StepResult: ...


def next_plans(scheduler: Scheduler, runner: StepRunner) -> list[StepPlan]:
    """The next plans, as many as the runner can send in one call; none before a result is committed, or at all."""
    plans: list[StepPlan] = []
    while (not plans or runner.takes_another(plans)) and (plan := scheduler.schedule()) is not None:
        plans.append(plan)
    return plans


def num_due(num_in_flight: int, num_new: int, run_ahead: int) -> int:
    """How many of the oldest steps in flight to commit after a turn that sent ``num_new``, which are among them."""
    if not num_new:  # nothing can be planned before a result
        return min(1, num_in_flight)
    # A burst stays in flight while the next is planned; nothing of it could be read earlier anyway.
    return max(0, num_in_flight - max(run_ahead, num_new))


@dataclass(frozen=True, slots=True)
class _Finish:
    choice_id: int
    reason: FinishReason
    stop_reason: int | str | None


class EngineCore:
    """Runs choices to their ends.

    Args:
        scheduler: decides.
        runner: computes.
        run_ahead: steps in flight before the oldest result is read, or a burst if that is longer; None is the
            scheduler's, which is the most that it allows.
        watchdog_seconds: longest time between heartbeats while there is work.
        strict_compile: a compilation while serving kills the engine instead of being counted.
        check_invariants: check the scheduler after every step (tests); otherwise only while it's idle.

    Attributes:
        scheduler, runner: as given; only the core's thread may use them once it is started.
        callers: who waits for which choice.
        heartbeat: ``time.monotonic()`` of the loop's last turn.
        choice_ids: numbers for new choices. All fronts of an engine draw from here, so that no two choices share one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        *,
        run_ahead: int | None = None,
        watchdog_seconds: float = 300.0,
        strict_compile: bool = False,
        check_invariants: bool = False,
    ) -> None:
        self.heartbeat = time.monotonic()
        self.choice_ids: Iterator[int] = itertools.count()
        self.scheduler = scheduler
        self.runner = runner
        self._run_ahead = scheduler.config.run_ahead if run_ahead is None else run_ahead
        self._patience = Patience(watchdog_seconds)
        self._strict_compile = strict_compile
        self._check_invariants = check_invariants
        self._inbox: deque[Choice | _Finish | Callable[[], None]] = deque()
        self.callers = Callers()
        self._calls: set[Future[Any]] = set()
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
        # `with` takes a plain lock whole, whenever Ctrl-C comes; a Condition's methods can be left with it locked.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._error: BaseException | None = None
        self._stopping = False
        self._busy = False
        self._hung = False
        self._guard = CompileGuard()
        self._thread: threading.Thread | None = None
        self._watchdog: threading.Thread | None = None

    # -- any thread

    def start(self) -> None:
        """Starts the loop; does nothing the second time.

        Until ``shutdown``, Python's garbage collector leaves out what exists now, in all of the process
        (``gc.freeze``): tracing leaves 10^5 objects and more, and a full collection of them holds up all steps for
        0.1 to 0.3 s.
        """
        with self._lock:
            if self._thread is not None:
                return
            gc.freeze()
            self._thread = threading.Thread(target=self._run, name="jaxserve-core", daemon=True)
            self._thread.start()
            self._watchdog = threading.Thread(target=self._watch, name="jaxserve-watchdog", daemon=True)
            self._watchdog.start()

    def shutdown(self) -> None:
        """Stops the loop; unfinished choices get an error event. Idempotent.

        Waits for both threads: one that outlived the caller would free the device's arrays while Python shuts down,
        and abort the process.
        """
        with self._lock:
            self._stopping = True
            self._changed.notify_all()
            # A hung step may return never; the watchdog has waited for it long enough.
            threads = (None if self._hung else self._thread, self._watchdog)
        for thread in threads:
            if thread is not None and thread is not threading.current_thread():
                thread.join(timeout=self._patience.seconds)
        self._die(ShutDown())
        gc.unfreeze()  # also what other engines froze, which costs them no more than time

    def submit(self, choices: Sequence[Choice], sink: Sink, *, streaming: bool = True) -> None:
        """Queues choices. ``sink`` is called on the core's thread for each of their events; it must be quick.

        Args:
            streaming: the caller wants tokens as they come. If not, choices of which it needn't see every step (those
                without stop strings and log-probabilities) have two events: with the first token, and with the rest at
                the end. A waiting caller that looks at every token of 256 choices would keep Python's lock from this
                thread for longer than the device needs for a step.

        Raises:
            EngineDeadError: the engine failed or was shut down.
            InvalidRequestError: one of them could never run to its end here, or was submitted before; none was queued.
        """
        for choice in choices:  # here, because what fails on the core's thread kills the engine
            self.scheduler.validate(choice)
        with self._lock:
            self._raise_if_dead()
            self.callers.add(choices, sink, streaming=streaming)
            self._inbox.extend(choices)
            self._changed.notify_all()

    def finish(self, choice_id: int, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Ends a choice at any moment (abort, stop string). Unknown and finished choices are left alone."""
        with self._lock:
            if self._error is None:
                self._inbox.append(_Finish(choice_id, reason, stop_reason))
                self._changed.notify_all()

    def call[T](self, function: Callable[[Scheduler], T]) -> T:
        """Runs ``function`` on the core's thread, between two steps; waits for it and returns what it returns.

        Raises:
            EngineDeadError: the engine failed, was shut down, or dies while this waits; also of what ``function``
                raises, which may have left the scheduler half changed.
        """
        answer: Future[T] = Future()
        with self._lock:
            self._raise_if_dead()
            self._calls.add(answer)
            self._inbox.append(lambda: self._answer(answer, function(self.scheduler)))
            self._changed.notify_all()
        return answer.result()

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine failed or was shut down."""
        with self._lock:
            self._raise_if_dead()

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and what runs and waits now."""
        return {
            **self.scheduler.stats.as_dict(),
            "num_running": self.scheduler.num_running,
            "num_waiting": self.scheduler.num_waiting,
            "num_compiles_while_serving": self._guard.num_compiles,
        }

    def _raise_if_dead(self) -> None:
        if self._error is not None:
            raise dead_error(self._error)

    # -- the core's thread

    def _run(self) -> None:
        try:
            with self._guard:
                while self._take_inbox():
                    self.step()
                # Python may shut down next, and takes the backend from under what it still computes.
                for _, step in self._in_flight:
                    self.runner.fetch(step)
        except BaseException as error:  # whatever it is, the callers must hear of it
            logger.exception("the engine failed")
            self._die(error)

    def step(self) -> None:
        """One turn: plan and dispatch what can be planned; then, or else, commit the oldest steps."""
        self.heartbeat = time.monotonic()
        self._expire()
        plans = next_plans(self.scheduler, self.runner)
        if plans:
            self._in_flight.extend(zip(plans, self.runner.dispatch(plans), strict=True))
        for _ in range(num_due(len(self._in_flight), len(plans), self._run_ahead)):
            self._commit_oldest()
        if self._check_invariants:
            self.scheduler.check_invariants()
        if self._strict_compile and self._guard.num_compiles:
            raise CompileAfterWarmupError("an executable was compiled while serving; strict_compile forbids it")

    def _commit_oldest(self) -> None:
        plan, step = self._in_flight.popleft()
        result = self.runner.fetch(step)
        self.heartbeat = time.monotonic()
        for commit in self.scheduler.commit(plan, result):
            self.callers.tell(commit, result, self.heartbeat)

    def _expire(self) -> None:
        for commit in self.scheduler.expire(self.heartbeat):
            self.callers.tell(commit, None, self.heartbeat)

    def _take_inbox(self) -> bool:
        """Applies what other threads asked for; waits while there is nothing to do. False: stop."""
        self._busy = self.scheduler.has_work or bool(self._in_flight)
        if not self._busy:
            self._rest()
        with self._lock:
            num_items = len(self._inbox)
            self._busy = True
            stopping = self._stopping
        for _ in range(num_items):
            item = self._inbox.popleft()
            if isinstance(item, Choice):
                self.scheduler.add(item)
            elif isinstance(item, _Finish):
                self._finish(item)
            else:
                item()
        return not stopping

    def _rest(self) -> None:
        """Waits for the inbox to fill. Looks for leaks at once; at everything only when nobody comes for a while."""
        self.scheduler.check_idle()
        checked = False
        while not self._inbox and not self._stopping:
            with self._lock:
                if self._inbox or self._stopping:
                    return
                called = self._changed.wait(_IDLE_CHECK_SECONDS)
            self.heartbeat = time.monotonic()
            if not called and not checked:
                self.scheduler.check_invariants()  # tens of milliseconds for a large pool
                checked = True

    def _finish(self, item: _Finish) -> None:
        choice = self.scheduler.choices.get(item.choice_id)
        if choice is not None and self.scheduler.finish(choice, item.reason, item.stop_reason):
            self.callers.tell(Commit(choice, -1, [], item.reason, item.stop_reason), None, self.heartbeat)

    def _answer(self, call: Future[Any], result: Any) -> None:
        with self._lock:  # the watchdog may have given up on this call meanwhile
            if call in self._calls:
                self._calls.remove(call)
                call.set_result(result)

    # -- the end

    def _die(self, error: BaseException) -> None:
        """Tells every waiting caller, once."""
        with self._lock:
            if self._error is not None:
                error = self._error  # the first counts
            self._error = error
            calls, self._calls = self._calls, set()
            self._stopping = True
            self._changed.notify_all()
        for call in calls:
            call.set_exception(dead_error(error))
        self.callers.tell_all(error)

    def _watch(self) -> None:
        while (trouble := self._trouble()) is None:
            with self._lock:
                if self._error is not None or self._stopping:
                    return
                self._changed.wait(self._patience.period)
        logger.error("%s; the engine gives up", trouble)
        self._die(EngineDeadError(trouble))

    def _trouble(self) -> str | None:
        """What is wrong with the loop from outside, if anything is."""
        with self._lock:
            if self._error is not None or self._stopping or self._thread is None:
                return None
            if not self._thread.is_alive():
                return "the core's thread is gone"
            heartbeat, now = self.heartbeat, time.monotonic()
            if not self._busy or not self._patience.is_over(heartbeat, now):
                return None
            self._hung = True
            return f"no step has returned for {now - heartbeat:.0f} s (watchdog_seconds)"
