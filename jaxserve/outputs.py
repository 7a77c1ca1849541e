"""What a caller gets back: plain, picklable dataclasses with vLLM's names. Imports no jax.

A stream yields the same types; ``text``, ``token_ids`` and ``logprobs`` of a delta hold only what is new.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Logprob:
    """One candidate of one position, under the model's raw distribution (before any sampling setting)."""

    logprob: float
    rank: int | None = None  # 1 is the most likely token of the vocabulary
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]  # token id -> Logprob: the chosen token, and the most likely ones


@dataclass(slots=True)
class CompletionOutput:
    """One choice of a request.

    Attributes:
        index: which of the request's ``n`` choices this is.
        text: what was generated, without the stop string and the stop token unless ``include_stop_str_in_output``.
        token_ids: every generated token, the stop token included.
        cumulative_logprob: sum of the tokens' log-probabilities; None unless ``logprobs`` was asked for.
        logprobs: one dict a token; None unless ``logprobs`` was asked for.
        finish_reason: "stop", "length", "repetition", "timeout", "abort" or "error"; None while it runs.
        stop_reason: the stop string or stop token id that matched; None for an EOS token and for all other endings.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether nothing more will come. A method, as in vLLM, where a request's is an attribute."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times are seconds of ``time.monotonic()``; counts cover all choices of the request."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens that the prefix cache held
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0  # of the drafts, also those behind a token that ended the output

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """One request with its choices.

    ``prompt`` is None where the caller gave token ids. ``prompt_logprobs`` has one entry a prompt token; the first is
    None. ``finished`` says whether all choices are.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[TokenLogprobs | None] | None = field(default=None)

    @property
    def num_cached_tokens(self) -> int:
        return self.metrics.num_cached_tokens
