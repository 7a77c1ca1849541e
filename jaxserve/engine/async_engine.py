"""``AsyncEngine``: many concurrent callers on one asyncio loop, one engine. Imports no jax until an engine is built.

engine = AsyncEngine(EngineConfig(model="path/to/model"))
async for output in engine.generate("The capital of France is", SamplingParams(max_tokens=8)):
    print(output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from jaxserve.config import EngineConfig
from jaxserve.engine.collector import RequestCollector
from jaxserve.engine.events import ChoiceEvent
from jaxserve.engine.prompts import Prompt, parse_prompt
from jaxserve.engine.requests import Request, RequestBuilder
from jaxserve.engine.submission import HEALTH_SECONDS, raise_dead
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.codec import Codec

if TYPE_CHECKING:
    from jaxserve.engine.build import Engine

OutputKind = Literal["cumulative", "delta", "final"]


class AsyncEngine:
    """A front for asyncio. Each request fails, is aborted and is cancelled on its own; the engine goes on.

    Args:
        config: of the engine, which is built here; it takes as long as ``LLM`` takes.

    Raises:
        ConfigError, CheckpointError: as ``LLM`` does.
    """

    def __init__(self, config: EngineConfig):
        if not isinstance(config, EngineConfig):
            raise ConfigError(f"config is {config!r}; allowed: an EngineConfig, such as EngineConfig(model=...)")
        from jaxserve.engine.build import build_engine  # imports jax

        self._use(build_engine(config))

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """A front of an engine that exists already. Closing it shuts the engine down."""
        front = cls.__new__(cls)
        front._use(engine)
        return front

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self.codec = Codec(engine.tokenizer)
        self._builder = RequestBuilder(engine, self.codec)
        self._requests: dict[str, RequestCollector] = {}
        self._mailboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mailbox] = weakref.WeakKeyDictionary()
        engine.core.start()
        self._finalizer = weakref.finalize(self, engine.core.shutdown)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncIterator[RequestOutput]:
        """Yields outputs of one request until it is finished.

        Leaving the iteration, or cancelling the task, aborts the request.

        Args:
            prompt: a string, token ids, or a dict with ``prompt`` or ``prompt_token_ids`` (and ``cache_salt``).
            sampling_params: None takes the model's generation_config.
            request_id: not in use by a running request; None makes one up.
            output_kind: "cumulative" outputs hold everything so far, "delta" what is new; "final" is only the last.

        Raises:
            InvalidRequestError: the prompt or a setting is wrong; nothing was admitted.
            EngineDeadError: the engine failed or was shut down.
        """
        if output_kind not in ("cumulative", "delta", "final"):
            raise InvalidRequestError(f"output_kind is {output_kind!r}; allowed: cumulative, delta, final")
        if request_id is not None and (not isinstance(request_id, str) or not request_id):
            raise InvalidRequestError(f"request_id is {request_id!r}; allowed: a string that isn't empty, or None")
        self.engine.core.check_health()
        # a long prompt takes milliseconds to tokenise: not on the loop that serves the others
        checked = await asyncio.to_thread(self._builder.check, parse_prompt(prompt), sampling_params, priority)
        if request_id in self._requests:
            raise InvalidRequestError(f"request_id {request_id!r} is in use by a running request")
        if request_id is None:  # ours are numbers, and so may be a caller's
            request_id = next(name for name in self._builder.request_ids if name not in self._requests)
        request = self._builder.admit(checked, request_id)
        collector = RequestCollector(request, self.codec, streaming=output_kind != "final")
        self._requests[request.request_id] = collector
        try:
            async for _ in self._updates(request, collector):
                if output_kind == "delta":
                    if (delta := collector.delta()) is not None:
                        yield delta
                elif collector.finished or output_kind == "cumulative":
                    yield collector.output()
        finally:
            del self._requests[request.request_id]
            self._abort(collector)

    async def abort(self, request_id: str) -> None:
        """Ends a running request; its iteration ends with ``finish_reason="abort"``. Unknown ids are ignored."""
        if (collector := self._requests.get(request_id)) is not None:
            self._abort(collector)

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine can't serve."""
        self.engine.core.check_health()

    def get_tokenizer(self) -> Any:
        return self.engine.tokenizer

    def close(self) -> None:
        """Shuts the engine down; running requests get EngineDeadError."""
        self._finalizer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _abort(self, collector: RequestCollector) -> None:
        for choice_id in collector.unfinished_ids:
            self.engine.core.finish(choice_id, "abort")

    async def _updates(self, request: Request, collector: RequestCollector) -> AsyncIterator[None]:
        """Submits, and returns to the caller after every batch of events until the request is finished."""
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.setdefault(loop, _Mailbox(loop))
        events: asyncio.Queue[ChoiceEvent] = asyncio.Queue()
        self.engine.core.submit(
            request.choices, lambda event: mailbox.post(events.put_nowait, event), streaming=collector.streaming
        )
        while not collector.finished:
            event: ChoiceEvent | None = await self._next(events)
            while event is not None:
                raise_dead(event)
                if (stop := collector.add(event)) is not None:
                    self.engine.core.finish(event.choice_id, "stop", stop)
                event = None if events.empty() else events.get_nowait()
            yield

    async def _next(self, events: asyncio.Queue[ChoiceEvent]) -> ChoiceEvent:
        while True:
            try:
                async with asyncio.timeout(HEALTH_SECONDS):
                    return await events.get()
            except TimeoutError:
                self.engine.core.check_health()


class _Mailbox:
    """Carries events from the core's thread to a loop, waking it once for many events instead of once for each."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = weakref.ref(loop)  # the mailbox hangs on its loop, not the other way round
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Callable[[ChoiceEvent], None], ChoiceEvent]] = deque()
        self._woken = False

    def post(self, put: Callable[[ChoiceEvent], None], event: ChoiceEvent) -> None:
        """Called on the core's thread; never blocks or raises."""
        with self._lock:
            self._waiting.append((put, event))
            wake, self._woken = not self._woken, True
        loop = self._loop()
        if wake and loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, deque()
            self._woken = False
        for put, event in waiting:
            put(event)
