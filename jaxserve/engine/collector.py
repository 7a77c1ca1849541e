"""Events of one request become its output, on the caller's thread. Imports no jax.

Text is decoded token by token only where that is needed (a stream, or stop strings); otherwise once, at the end.
Tokens are looked at one at a time in either case, so a stop string ends the output at the same token however many
tokens a step emits.
"""

from __future__ import annotations

import threading
import time

from jaxserve.engine.events import ChoiceEvent
from jaxserve.engine.requests import Request
from jaxserve.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from jaxserve.scheduler.plan import Logprobs
from jaxserve.text.codec import Codec
from jaxserve.text.detokenizer import Detokenizer, decode_output
from jaxserve.text.stop import StopMatcher


class RequestCollector:
    """Gathers the events of all choices of a request. One thread may read while another one ends it.

    Args:
        request: whose events these are.
        codec: decodes.
        streaming: text must be known before the end.
    """

    def __init__(self, request: Request, codec: Codec, *, streaming: bool = False):
        self.request, self.streaming = request, streaming
        self._codec = codec
        self._choices = [_ChoiceCollector(request, index, codec, streaming) for index in range(request.params.n)]
        self._num_unfinished = len(self._choices)  # kept, because each event asks
        self._lock = threading.RLock()  # a signal handler may end what the interrupted thread was just adding to
        self._metrics = RequestMetrics(arrival_time=request.arrival_time)
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]

    @property
    def finished(self) -> bool:
        return not self._num_unfinished

    @property
    def unfinished_ids(self) -> list[int]:
        """``choice_id`` of every choice that still runs."""
        pairs = zip(self.request.choices, self._choices, strict=True)
        return [choice.choice_id for choice, state in pairs if state.finish_reason is None]

    def add(self, event: ChoiceEvent) -> str | None:
        """Takes one event. Returns a stop string where one was found: the caller then ends that choice in the core."""
        with self._lock:
            return self._add(event)

    def end(self, reason: str) -> None:
        """Ends every choice that still runs, with what it has. Later events change nothing."""
        with self._lock:
            for choice in self._choices:
                if choice.finish_reason is None:
                    choice.end(reason)
                    self._num_unfinished -= 1
                    self._metrics.finished_time = time.monotonic()

    def output(self) -> RequestOutput:
        """Everything so far. Nothing in it changes later."""
        with self._lock:
            return self._wrap([choice.output() for choice in self._choices])

    def delta(self) -> RequestOutput | None:
        """What is new since the last call, in the choices that have something new; None where no choice has."""
        with self._lock:
            outputs = [choice.delta() for choice in self._choices if choice.has_news]
            return self._wrap(outputs) if outputs else None

    def _add(self, event: ChoiceEvent) -> str | None:
        choice = self._choices[event.index]
        if choice.finish_reason is not None:  # ended here, by a stop string or end(); the core learns of it later
            return None
        if event.prompt_logprobs is not None and event.index == 0:
            self._add_prompt_logprobs(*event.prompt_logprobs)
        before = len(choice.token_ids)
        stop = choice.add(event)
        metrics = self._metrics
        if num_tokens := len(choice.token_ids) - before:
            metrics.num_generation_tokens += num_tokens
            metrics.last_token_time = event.time
            if metrics.first_token_time is None:
                metrics.first_token_time = event.time
        if event.index == 0:
            metrics.num_cached_tokens = max(metrics.num_cached_tokens, event.num_cached_tokens)
        metrics.num_drafted_tokens += event.num_drafted
        metrics.num_accepted_tokens += event.num_accepted
        if choice.finish_reason is not None:
            self._num_unfinished -= 1
            metrics.finished_time = event.time
        return stop

    def _wrap(self, outputs: list[CompletionOutput]) -> RequestOutput:
        request, m = self.request, self._metrics
        metrics = RequestMetrics(
            m.arrival_time,
            m.first_token_time,
            m.last_token_time,
            m.finished_time,
            m.num_generation_tokens,
            m.num_cached_tokens,
            m.num_drafted_tokens,
            m.num_accepted_tokens,
        )
        prompt_logprobs = None if self._prompt_logprobs is None else list(self._prompt_logprobs)
        ids = list(request.prompt_token_ids)
        return RequestOutput(request.request_id, request.prompt, ids, outputs, self.finished, metrics, prompt_logprobs)

    def _add_prompt_logprobs(self, start: int, rows: Logprobs) -> None:
        if self._prompt_logprobs is None:
            return
        ids = self.request.prompt_token_ids[start : start + len(rows.token_logprob)]
        del self._prompt_logprobs[start:]  # a preempted prefill computes a chunk again
        k = self.request.params.prompt_logprobs or 0
        self._prompt_logprobs += [_row(rows, row, token_id, k, self._codec) for row, token_id in enumerate(ids)]


class _ChoiceCollector:
    """One choice: its tokens, text, log-probabilities and end."""

    def __init__(self, request: Request, index: int, codec: Codec, streaming: bool):
        params = request.params
        self._index = index
        self._params = params
        self._prompt_token_ids = request.prompt_token_ids
        self._codec = codec
        self._detokenizer: Detokenizer | None = None
        if params.detokenize and (streaming or params.stop):
            self._detokenizer = Detokenizer(
                codec, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )
        self._matcher = StopMatcher(params.stop or (), include_stop=params.include_stop_str_in_output)
        self._text = ""
        self._num_text_tokens = 0  # leading tokens that belong to the text: a stop token may not
        self._logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self._cumulative = 0.0
        self._taken = (0, 0)  # characters, tokens that deltas have carried
        self._end_taken = False
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, event: ChoiceEvent) -> str | None:
        if self._detokenizer is None and self._logprobs is None and event.finish_reason is None:
            self.token_ids += event.token_ids
            self._num_text_tokens += len(event.token_ids)
            return None
        for row, token_id in enumerate(event.token_ids):
            self.token_ids.append(token_id)
            if self._logprobs is not None and event.logprobs is not None:
                self._cumulative += float(event.logprobs.token_logprob[row])
                self._logprobs.append(_row(event.logprobs, row, token_id, self._params.logprobs or 0, self._codec))
            ends_here = event.finish_reason == "stop" and row == len(event.token_ids) - 1
            if ends_here and not self._params.include_stop_str_in_output:
                break
            self._num_text_tokens += 1
            if (stop := self._add_text(token_id)) is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return stop
        if event.finish_reason is not None:
            self.end(event.finish_reason, event.stop_reason)
        return None

    def end(self, reason: str, stop_reason: int | str | None = None) -> None:
        self.finish_reason, self.stop_reason = reason, stop_reason
        self._end_text()

    def _add_text(self, token_id: int) -> str | None:
        if self._detokenizer is None:
            return None
        search = len(self.token_ids) > self._params.min_tokens
        text, stop = self._matcher.push(self._detokenizer.push(token_id), search=search)
        self._text += text
        return stop

    def _end_text(self) -> None:
        if self._detokenizer is not None:
            text, _ = self._matcher.push(self._detokenizer.flush(), search=False)
            self._text += text + self._matcher.flush()
        elif self._params.detokenize:
            self._text = decode_output(
                self._codec,
                self._prompt_token_ids,
                self.token_ids[: self._num_text_tokens],
                skip_special_tokens=self._params.skip_special_tokens,
            )

    @property
    def has_news(self) -> bool:
        """Something that a reader would want now: text (or tokens, where there is no text), or the end."""
        if self.finish_reason is not None:
            return not self._end_taken
        chars, tokens = self._taken
        return len(self._text) > chars or (not self._params.detokenize and len(self.token_ids) > tokens)

    def output(self) -> CompletionOutput:
        return self._since(0, 0)

    def delta(self) -> CompletionOutput:
        output = self._since(*self._taken)
        self._taken = (len(self._text), len(self.token_ids))
        self._end_taken = self.finish_reason is not None
        return output

    def _since(self, chars: int, tokens: int) -> CompletionOutput:
        return CompletionOutput(
            index=self._index,
            text=self._text[chars:],
            token_ids=self.token_ids[tokens:],
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
            logprobs=None if self._logprobs is None else self._logprobs[tokens:],
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


def _row(rows: Logprobs, row: int, token_id: int, k: int, codec: Codec) -> TokenLogprobs:
    """The k most likely tokens of a row, and the chosen one (first, as in vLLM)."""
    chosen = Logprob(float(rows.token_logprob[row]), int(rows.token_rank[row]), codec.token_text(token_id))
    result = {token_id: chosen}
    tops = zip(rows.top_ids[row, :k].tolist(), rows.top_logprobs[row, :k].tolist(), strict=True)
    for rank, (top_id, logprob) in enumerate(tops, start=1):
        if top_id != token_id:
            result[top_id] = Logprob(logprob, rank, codec.token_text(top_id))
    return result
