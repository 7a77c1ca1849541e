"""200 requests in flight on a core without jax, from every kind of caller, each of which writes down how it ended."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from core_world import FakeRunner, make_core, until
from fakes import fake_engine

from jaxserve import LLM, AsyncEngine, SamplingParams
from jaxserve.engine.core import EngineCore

LONG = SamplingParams(max_tokens=40, ignore_eos=True)
KINDS = ("generate", "stream", "asyncio", "call")
NUM_CHOICES = 200


class Gate:
    """Holds the core's thread inside one of its stages until told to go on."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.go.wait(30)


def hold(core: EngineCore) -> Gate:
    """Keeps a core that isn't started from its first step: who asks meanwhile is in that step or waits."""
    gate = Gate()
    threading.Thread(target=core.call, args=(lambda scheduler: gate.wait(),), daemon=True).start()
    until(lambda: bool(core._calls))
    return gate


def crowded_core(runner: FakeRunner | None = None, **settings: Any) -> EngineCore:
    """16 slots for 200 choices: most of them wait."""
    return make_core(runner, **{"max_num_seqs": 16, "max_num_batched_tokens": 64, "num_blocks": 200, **settings})


class Callers:
    """3 threads in ``generate`` (40 prompts each), 10 in ``stream``, 70 tasks on an asyncio loop, one in ``call``.

    Attributes:
        llm: the front that the threads share; the asyncio tasks have another, of the same engine.
        ended: kind -> the outcome of each caller, an exception or what it got.
    """

    def __init__(self, core: EngineCore, **engine: Any) -> None:
        self.engine = fake_engine(core, **engine)
        self.llm = LLM.from_engine(self.engine)
        self.ended: dict[str, list[Any]] = {kind: [] for kind in KINDS}
        self._core = core
        self._threads: list[threading.Thread] = []

    def start(self, params: SamplingParams = LONG) -> None:
        for _ in range(3):
            self._spawn("generate", lambda: self.llm.generate([[1, 2, 3]] * 40, params, use_tqdm=False))
        for _ in range(10):
            self._spawn("stream", lambda: list(self.llm.stream([4, 5, 6], params)))
        self._spawn_thread(lambda: asyncio.run(self._tasks(params)))

    def start_call(self) -> None:
        """A caller that waits for the core's thread to run a function."""
        self._spawn("call", lambda: self._core.call(lambda scheduler: scheduler.num_running))

    def join(self, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "somebody still waits"

    def outcomes(self, *kinds: str) -> list[Any]:
        return [outcome for kind in kinds or KINDS for outcome in self.ended[kind]]

    async def _tasks(self, params: SamplingParams) -> None:
        engine = AsyncEngine.from_engine(self.engine)
        engine._finalizer.detach()  # the engine is the LLM's to close

        async def one() -> None:
            try:
                outcome: Any = [output async for output in engine.generate([7, 8, 9], params)][-1]
            except Exception as error:
                outcome = error
            self.ended["asyncio"].append(outcome)

        await asyncio.gather(*(one() for _ in range(70)))

    def _spawn(self, kind: str, action: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                outcome = action()
            except Exception as error:
                outcome = error
            self.ended[kind].append(outcome)

        self._spawn_thread(run)

    def _spawn_thread(self, run: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()
