"""``LLM``: prompts in, text out, for scripts and notebooks. Imports no jax until an engine is built.

    llm = LLM("path/to/model")
    for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8)):
        print(output.outputs[0].text)

The engine runs on its own thread; this class is a front of it and may be used from several threads at once.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from jaxserve.config import EngineConfig
from jaxserve.engine.prompts import ParsedPrompt, Prompt, split_prompts
from jaxserve.engine.requests import CheckedRequest, Request, RequestBuilder
from jaxserve.engine.submission import Submission
from jaxserve.errors import ConfigError, InvalidRequestError
from jaxserve.outputs import RequestOutput
from jaxserve.progress import UseTqdm, check_use_tqdm, make_bar
from jaxserve.sampling_params import SamplingParams
from jaxserve.text.chat import Conversation, Message, render_chat, split_conversations
from jaxserve.text.codec import Codec
from jaxserve.vllm_arguments import CHAT_NEUTRAL, GENERATE_NEUTRAL, LLM_NEUTRAL, check_neutral, drop_neutral

if TYPE_CHECKING:
    from jaxserve.engine.build import Engine

Params = SamplingParams | Sequence[SamplingParams] | None


def engine_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    """The configuration that vLLM-style keyword arguments ask for. None means the default.

    Raises:
        ConfigError: an argument is unknown, out of range, or one of vLLM's that can't be honoured.
    """
    own = drop_neutral(settings, LLM_NEUTRAL, ConfigError)
    not_none = {f.name for f in fields(EngineConfig) if f.default is not None}
    config = EngineConfig.from_dict(
        {"model": model} | {k: v for k, v in own.items() if v is not None or k not in not_none}
    )
    cap = config.limits.max_logprobs
    if (most := settings.get("max_logprobs", cap)) != cap:
        raise ConfigError(f"max_logprobs is {most!r} with limits.max_logprobs {cap}; allowed: the limit alone")
    return config


class LLM:
    """A model that generates text.

    Args:
        model: a directory, a ``.gguf`` file, or a hub id that is in the local cache (see ``EngineConfig.model``).
        settings: the fields of ``EngineConfig``; vLLM's other arguments are accepted where they ask for nothing.

    Raises:
        ConfigError, CheckpointError: before anything is allocated, with what was wrong and what would be right.
    """

    def __init__(self, model: str, **settings: Any):
        config = engine_config(model, settings)
        from jaxserve.engine.build import build_engine  # imports jax

        self._use(build_engine(config))

    @classmethod
    def from_engine(cls, engine: Engine) -> Self:
        """A front of an engine that exists already. Closing it shuts the engine down."""
        llm = cls.__new__(cls)
        llm._use(engine)
        return llm

    def _use(self, engine: Engine) -> None:
        self.engine = engine
        self._codec = Codec(engine.tokenizer)
        self._builder = RequestBuilder(engine, self._codec)
        engine.core.start()
        self._finalizer = weakref.finalize(self, engine.core.shutdown)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generates for all prompts, batched as the engine sees fit; returns when the last is done.

        Args:
            prompts: one prompt or many: strings, lists of token ids, or dicts with ``prompt`` or ``prompt_token_ids``
                (and ``cache_salt``).
            sampling_params: for all prompts, or one for each; None takes the model's generation_config.
            use_tqdm: shows a progress bar on stderr; or a callable that makes the bar (see ``progress.make_bar``).
            priority: for all prompts, or one for each; lower runs first (``scheduling_policy="priority"``).
            lora_request, tokenization_kwargs, mm_processor_kwargs: vLLM's, accepted where they ask for nothing
                (``vllm_arguments.GENERATE_NEUTRAL``).

        Returns:
            One output a prompt, in the order of the prompts.

        Raises:
            InvalidRequestError: a prompt or a setting is wrong. No prompt was admitted then.
            EngineDeadError: the engine failed or was shut down.
        """
        check_use_tqdm(use_tqdm)
        given = {
            "lora_request": lora_request,
            "tokenization_kwargs": tokenization_kwargs,
            "mm_processor_kwargs": mm_processor_kwargs,
        }
        check_neutral(given, GENERATE_NEUTRAL, InvalidRequestError)
        return self._run(self._check(split_prompts(prompts), sampling_params, priority), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
        *,
        priority: int | Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Like ``generate``, for one conversation or a list of them, rendered by the model's chat template.

        The arguments, which are in vLLM's order, are those of ``generate`` and these:

        Args:
            messages: dicts with ``role`` and ``content``.
            chat_template: Jinja source used instead of the tokenizer's own; it runs in a sandbox.
            chat_template_content_format: "auto" or "string", the same here: a template gets each content as one string.
            add_generation_prompt: ends the prompt with the header of the assistant's answer.
            continue_final_message: leaves the last message open, to be continued (needs add_generation_prompt=False).
            tools: descriptions of functions, for templates that know them.
            chat_template_kwargs: further variables of the template.
        """
        check_use_tqdm(use_tqdm)
        given = {
            "lora_request": lora_request,
            "chat_template_content_format": chat_template_content_format,
            "tokenization_kwargs": tokenization_kwargs,
            "mm_processor_kwargs": mm_processor_kwargs,
        }
        check_neutral(given, CHAT_NEUTRAL, InvalidRequestError)
        prompts = [
            self._render(
                conversation, chat_template, add_generation_prompt, continue_final_message, tools, chat_template_kwargs
            )
            for conversation in split_conversations(messages)
        ]
        return self._run(self._check(prompts, sampling_params, priority), use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, priority: int | None = None
    ) -> Stream:
        """Generates for one prompt; iterating over the result yields deltas as they come.

        Raises:
            InvalidRequestError: at once, not at the first iteration.
        """
        prompts = split_prompts(prompt)
        if len(prompts) != 1:
            raise InvalidRequestError(f"prompt holds {len(prompts)} prompts; allowed: one for each stream")
        return self._stream(self._check(prompts, sampling_params, priority))

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: int | None = None,
    ) -> Stream:
        """``stream`` for one conversation; see ``chat`` for what the arguments mean."""
        prompt = self._render(
            messages, chat_template, add_generation_prompt, continue_final_message, tools, chat_template_kwargs
        )
        return self._stream(self._check([prompt], sampling_params, priority))

    def reset_prefix_cache(self) -> int:
        """Forgets the cached prefixes that no running choice holds; returns how many blocks they were."""
        return self.engine.core.call(lambda scheduler: scheduler.clear_prefix_cache())

    def get_tokenizer(self) -> Any:
        """The tokenizer, as transformers knows it."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``sampling_params=None`` means: the defaults of the model's generation_config."""
        return SamplingParams(**self.engine.sampling_defaults)

    def close(self) -> None:
        """Shuts the engine down. Further calls raise EngineDeadError."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _render(self, *args: Any) -> ParsedPrompt:
        text, token_ids = render_chat(self._codec, *args)
        return ParsedPrompt(text, tuple(token_ids))

    def _check(
        self, prompts: list[ParsedPrompt], params: Params, priority: int | Sequence[int] | None
    ) -> list[CheckedRequest]:
        params_list = _one_each("sampling_params", params, len(prompts))
        priorities = _one_each("priority", priority, len(prompts))
        self.engine.core.check_health()
        each = zip(prompts, params_list, priorities, strict=True)
        return [self._builder.check(prompt, p, rank) for prompt, p, rank in each]

    def _admit(self, checked: Sequence[CheckedRequest]) -> list[Request]:
        return [self._builder.admit(request) for request in checked]

    def _run(self, checked: list[CheckedRequest], use_tqdm: UseTqdm) -> list[RequestOutput]:
        bar = make_bar(use_tqdm, len(checked))
        with (
            contextlib.closing(bar),
            Submission(self.engine.core, self._codec, self._admit(checked)) as submission,
        ):
            submission.submit()
            for collector in submission.updates():
                if collector.finished:
                    bar.update(1)
            return [collector.output() for collector in submission.collectors]

    def _stream(self, checked: list[CheckedRequest]) -> Stream:
        submission = Submission(self.engine.core, self._codec, self._admit(checked), streaming=True)
        with contextlib.ExitStack() as stack:
            stack.callback(submission.abort)  # where Ctrl-C comes in between, nobody would have a stream to close
            submission.submit()
            stream = Stream(submission, self)
            stack.pop_all()
        return stream


class Stream:
    """Iterates over a running request; each item is a RequestOutput with what is new.

    Closing it (or leaving its ``with`` block, or dropping it) aborts the request.
    """

    def __init__(self, submission: Submission, owner: LLM):
        self._submission = submission
        self._owner = owner  # an LLM that nobody holds would shut its engine down
        self._updates = submission.updates()
        self._finalizer = weakref.finalize(self, submission.abort)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RequestOutput:
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)  # at the end, and where waiting is interrupted (Ctrl-C)
            while self._finalizer.alive:
                if (delta := next(self._updates).delta()) is not None:
                    stack.pop_all()
                    return delta
        raise StopIteration

    def output(self) -> RequestOutput:
        """Everything that was generated so far."""
        return self._submission.collectors[0].output()

    def close(self) -> None:
        """Aborts the request if it still runs; any thread may call it."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _one_each(name: str, value: Any, count: int) -> list[Any]:
    """``value`` for each of ``count`` prompts; a list must have one entry a prompt. The builder checks the entries."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * count
    if len(value) != count:
        raise InvalidRequestError(
            f"{name} has {len(value)} entries for {count} prompts; allowed: one for all, or one for each prompt"
        )
    return list(value)
