"""Requests of one synchronous call, from submission to the last event. Imports no jax."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from jaxserve.engine.collector import RequestCollector
from jaxserve.engine.events import ChoiceEvent, dead_error
from jaxserve.engine.requests import Request
from jaxserve.errors import EngineDeadError
from jaxserve.text.codec import Codec

if TYPE_CHECKING:
    from jaxserve.engine.core import EngineCore

HEALTH_SECONDS = 1.0  # how long to wait for an event before asking whether the core still lives


def raise_dead(event: ChoiceEvent) -> None:
    """Raises what the engine died of, if the event says that it did. Every caller gets an exception of its own."""
    if event.error is not None:
        raise dead_error(event.error)


class Submission:
    """A context manager: whatever is unfinished when it is left is aborted, and the engine goes on.

    Any thread may use its own; the events come through a queue, so the core never waits for a caller.
    """

    def __init__(self, core: EngineCore, codec: Codec, requests: Sequence[Request], *, streaming: bool = False):
        self.collectors = [RequestCollector(request, codec, streaming=streaming) for request in requests]
        self._core, self._streaming = core, streaming
        self._events: queue.SimpleQueue[ChoiceEvent] = queue.SimpleQueue()
        self._by_choice = {
            choice.choice_id: collector for collector in self.collectors for choice in collector.request.choices
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def submit(self) -> None:
        """Hands all choices to the core at once."""
        choices = [choice for collector in self.collectors for choice in collector.request.choices]
        self._core.submit(choices, self._events.put, streaming=self._streaming)

    def updates(self) -> Iterator[RequestCollector]:
        """Yields a collector whenever events changed it, until all requests are finished.

        Raises:
            EngineDeadError: the engine died.
        """
        unfinished = {id(collector) for collector in self.collectors}
        try:
            while unfinished:
                for collector in self._take(unfinished).values():
                    if collector.finished:
                        unfinished.discard(id(collector))
                    yield collector
        except EngineDeadError:
            self._end("error")
            raise

    def abort(self) -> None:
        """Ends every choice that still runs. Does nothing to finished ones. Any thread may call it."""
        running = [choice_id for collector in self.collectors for choice_id in collector.unfinished_ids]
        self._end("abort")  # first: whom the core's news of it wakes sees all of the end, not that of one choice
        for choice_id in running:
            self._core.finish(choice_id, "abort")

    def _end(self, reason: str) -> None:
        """Marks what still runs as ended: nobody may be there to take the core's last events."""
        if self._streaming:  # without a stream nobody sees the outputs either, whose texts would have to be decoded
            for collector in self.collectors:
                collector.end(reason)

    def _take(self, unfinished: set[int]) -> dict[int, RequestCollector]:
        """Waits for an event, takes all that are there; the ``unfinished`` collectors that changed or were ended."""
        changed: dict[int, RequestCollector] = {}
        event: ChoiceEvent | None = self._wait()
        while event is not None:
            raise_dead(event)
            collector = self._by_choice[event.choice_id]
            if (stop := collector.add(event)) is not None:
                self._core.finish(event.choice_id, "stop", stop)
            if id(collector) in unfinished:
                changed[id(collector)] = collector
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                event = None
        return changed

    def _wait(self) -> ChoiceEvent:
        while True:
            try:
                return self._events.get(timeout=HEALTH_SECONDS)
            except queue.Empty:
                self._core.check_health()
