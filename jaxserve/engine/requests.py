"""A prompt and its SamplingParams become a request with its choices, or an error that says what is wrong.

Two phases: ``check`` validates and allocates nothing, so that a call with many prompts is refused as a whole; ``admit``
draws what must be drawn once (the ids, and the seed of a request that has none). Imports no jax.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxserve.engine.prompts import ParsedPrompt
from jaxserve.errors import InvalidRequestError
from jaxserve.sampling_params import PRIORITIES, SamplingParams, checked_integer
from jaxserve.scheduler.request import Choice
from jaxserve.text.codec import Codec

if TYPE_CHECKING:
    from jaxserve.engine.build import Engine

SEED_BITS = 63


@dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A valid request that was not admitted yet. ``params`` has its max_tokens and max_seconds resolved."""

    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    bad_words_ids: tuple[tuple[int, ...], ...]
    cache_salt: str | None
    priority: int


@dataclass(frozen=True, slots=True)
class Request:
    """An admitted request: what the fronts need to gather its output."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    choices: tuple[Choice, ...]
    arrival_time: float  # time.monotonic()


class RequestBuilder:
    """Checks and admits requests for one engine. Safe from several threads."""

    def __init__(self, engine: Engine, codec: Codec):
        self._codec = codec
        self._config = engine.config
        self._limits = engine.limits
        self._vocab_size = engine.model_config.vocab_size
        self._max_model_len = engine.max_model_len
        self._eos_token_ids = tuple(engine.eos_token_ids)
        self._defaults = dict(engine.sampling_defaults)
        self._seeds = engine.seeds
        self.request_ids = map(str, itertools.count())
        self._choice_ids = engine.core.choice_ids

    def check(self, prompt: ParsedPrompt, params: SamplingParams | None, priority: int | None = None) -> CheckedRequest:
        """Validates everything that can be wrong with one request; changes nothing.

        ``params=None`` means the defaults of the model's generation_config.

        Raises:
            InvalidRequestError: names the field, its value and what is allowed.
        """
        token_ids = self._check_prompt(prompt)
        room = self._max_model_len - len(token_ids)
        if params is None:
            params = SamplingParams(**self._defaults)
            params = params.with_changes(max_tokens=min(params.max_tokens or room, self._default_max_tokens(room)))
        elif not isinstance(params, SamplingParams):
            raise InvalidRequestError(f"sampling_params is a {type(params).__name__}; allowed: SamplingParams")
        params = self._check_lengths(params, len(token_ids), room)
        if params.detokenize and self._codec.tokenizer is None:
            raise InvalidRequestError("detokenize is True; allowed: False, as the engine has no tokenizer")
        self._check_ids(params)
        self._check_caps(params)
        bad_words_ids = self._check_bad_words(params.bad_words or ())
        self._check_something_is_left(params, bad_words_ids)
        priority = params.priority if priority is None else checked_integer("priority", priority, *PRIORITIES)
        if priority != 0 and self._config.scheduling_policy != "priority":
            raise InvalidRequestError(
                f"priority is {priority!r}; allowed: 0, unless the engine has scheduling_policy='priority'"
            )
        return CheckedRequest(
            prompt=prompt.text,
            prompt_token_ids=token_ids,
            params=params,
            bad_words_ids=bad_words_ids,
            cache_salt=prompt.cache_salt,
            priority=priority,
        )

    def admit(self, checked: CheckedRequest, request_id: str | None = None) -> Request:
        """Gives the request its id and seed and makes its ``n`` choices. The caller submits them."""
        params = checked.params
        seed = params.seed
        if seed is None:
            seed = self._seeds.getrandbits(SEED_BITS)  # one call in C, so any thread may
        request_id = next(self.request_ids) if request_id is None else request_id
        arrival_time = time.monotonic()
        choice_ids = [next(self._choice_ids) for _ in range(params.n)]
        choices = tuple(
            Choice(
                choice_id=choice_id,
                group_id=choice_ids[0],
                index=index,
                prompt_token_ids=checked.prompt_token_ids,
                params=params,
                seed=seed,
                eos_token_ids=self._eos_token_ids,
                bad_words_ids=checked.bad_words_ids,
                cache_salt=checked.cache_salt,
                priority=checked.priority,
                arrival_time=arrival_time,
            )
            for index, choice_id in enumerate(choice_ids)
        )
        return Request(request_id, checked.prompt, checked.prompt_token_ids, params, choices, arrival_time)

    def _check_prompt(self, prompt: ParsedPrompt) -> tuple[int, ...]:
        ids = prompt.token_ids
        if ids is None:
            ids = tuple(self._codec.encode(prompt.text or ""))
            if not ids:
                raise InvalidRequestError(f"the prompt {prompt.text!r} has no tokens; it needs at least one")
        if min(ids) < 0 or max(ids) >= self._vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise InvalidRequestError(f"the prompt holds token id {wrong}; allowed: 0..{self._vocab_size - 1}")
        if len(ids) > self._max_model_len - 1:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens; allowed: 1..{self._max_model_len - 1} "
                f"(max_model_len is {self._max_model_len} and one token must be generated)"
            )
        return ids

    def _default_max_tokens(self, room: int) -> int:
        limits = (room, self._config.default_max_tokens, self._config.max_output_tokens)
        return min(limit for limit in limits if limit is not None)

    def _check_lengths(self, params: SamplingParams, prompt_len: int, room: int) -> SamplingParams:
        """Resolves max_tokens and max_seconds. An explicit max_tokens is honoured or refused, never cut."""
        max_tokens = params.max_tokens
        if max_tokens is None:
            max_tokens = self._default_max_tokens(room)
            if params.min_tokens > max_tokens:
                raise InvalidRequestError(
                    f"min_tokens is {params.min_tokens}; allowed: 0..{max_tokens} (the default of max_tokens here)"
                )
        ceiling = self._config.max_output_tokens
        if max_tokens > room:
            raise InvalidRequestError(
                f"max_tokens is {max_tokens}; allowed: 1..{room} "
                f"(max_model_len {self._max_model_len} - {prompt_len} prompt tokens), or None"
            )
        if ceiling is not None and max_tokens > ceiling:
            raise InvalidRequestError(
                f"max_tokens is {max_tokens}; allowed: 1..{ceiling} (the engine's max_output_tokens), or None"
            )
        seconds = [limit for limit in (params.max_seconds, self._config.max_seconds) if limit is not None]
        max_seconds = min(seconds, default=None)
        if (max_tokens, max_seconds) == (params.max_tokens, params.max_seconds):
            return params
        return params.with_changes(max_tokens=max_tokens, max_seconds=max_seconds)

    def _check_ids(self, params: SamplingParams) -> None:
        lists: tuple[tuple[str, Iterable[int]], ...] = (
            ("stop_token_ids", params.stop_token_ids or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        )
        for name, ids in lists:
            for token_id in ids:
                if token_id >= self._vocab_size:
                    raise InvalidRequestError(
                        f"{name} holds token id {token_id}; allowed: 0..{self._vocab_size - 1} (the vocabulary)"
                    )

    def _check_caps(self, params: SamplingParams) -> None:
        limits = self._limits
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > limits.max_logprobs:
                raise InvalidRequestError(
                    f"{name} is {value}; allowed: 0..{limits.max_logprobs} (the engine's limits.max_logprobs), or None"
                )
        stop_ids = set(params.stop_token_ids or ()) | set(self._eos_token_ids)
        if len(stop_ids) > limits.max_stop_token_ids:
            raise InvalidRequestError(
                f"stop_token_ids and the model's EOS ids are {len(stop_ids)} ids; allowed: at most "
                f"{limits.max_stop_token_ids} (the engine's limits.max_stop_token_ids)"
            )
        if len(params.logit_bias or ()) > limits.max_logit_bias:
            raise InvalidRequestError(
                f"logit_bias has {len(params.logit_bias or ())} entries; allowed: at most {limits.max_logit_bias} "
                "(the engine's limits.max_logit_bias)"
            )
        loop = params.repetition_detection
        if loop is not None and loop.max_pattern_size > limits.max_repetition_pattern:
            raise InvalidRequestError(
                f"repetition_detection.max_pattern_size is {loop.max_pattern_size}; allowed: at most "
                f"{limits.max_repetition_pattern} (the engine's limits.max_repetition_pattern)"
            )
        drafts = self._config.speculative_config
        most = drafts.num_speculative_tokens if drafts else 0
        if (params.num_speculative_tokens or 0) > most:
            raise InvalidRequestError(
                f"num_speculative_tokens is {params.num_speculative_tokens}; allowed: 0..{most}, or None (the engine "
                f"{'speculates as its speculative_config says' if drafts else 'runs without speculation'})"
            )

    def _check_something_is_left(self, params: SamplingParams, bad_words_ids: tuple[tuple[int, ...], ...]) -> None:
        """``allowed_token_ids`` must hold an id that neither bad words of one token nor ``min_tokens`` forbid."""
        if params.allowed_token_ids is None:
            return
        forbidden = {ids[0] for ids in bad_words_ids if len(ids) == 1}
        if params.min_tokens > 0:
            forbidden |= {*(params.stop_token_ids or ()), *self._eos_token_ids}  # EOS although it is ignored
        if forbidden.issuperset(params.allowed_token_ids):
            raise InvalidRequestError(
                f"allowed_token_ids is {list(params.allowed_token_ids)}, and bad_words or min_tokens forbid all of it; "
                "allowed: at least one id that they leave"
            )

    def _check_bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Token sequences to avoid: each word as the text's beginning and after a space, where these differ."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip()
            for text in (bare, f" {bare}"):
                ids = tuple(self._codec.encode(text, add_special_tokens=False)) if bare else ()
                if not ids:
                    raise InvalidRequestError(f"bad_words holds {word!r}; allowed: words with at least one token")
                if (largest := max(ids)) >= self._vocab_size:
                    raise InvalidRequestError(
                        f"bad_words holds {word!r}, which has token id {largest}; allowed: 0..{self._vocab_size - 1} "
                        "(the vocabulary)"
                    )
                if len(ids) > self._limits.max_bad_word_len:
                    raise InvalidRequestError(
                        f"bad_words holds {word!r}, which is {len(ids)} tokens; allowed: at most "
                        f"{self._limits.max_bad_word_len} (the engine's limits.max_bad_word_len)"
                    )
                sequences[ids] = None
        if len(sequences) > self._limits.max_bad_words:
            raise InvalidRequestError(
                f"bad_words are {len(sequences)} token sequences (a word counts with and without a leading space); "
                f"allowed: at most {self._limits.max_bad_words} (the engine's limits.max_bad_words)"
            )
        return tuple(sequences)
