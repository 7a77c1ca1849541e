"""vLLM's arguments that jaxserve knows but doesn't act on: each is accepted at a value that asks for nothing.

``docs/vllm_compatibility.md`` shows the same in one table; a test holds the two together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

# name -> the values that ask for nothing
LLM_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "allowed_local_media_path": ("",),
    "allowed_media_domains": (None,),
    "async_scheduling": (None, True),
    "attention_config": (None,),
    "chat_template": (None,),
    "compilation_config": (None,),
    "config_format": ("auto",),
    "convert": ("auto",),
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": (False, True),
    "disable_log_stats": (True, False),
    "distributed_executor_backend": (None,),
    "download_dir": (None,),
    "enable_chunked_prefill": (None, True),
    "enable_expert_parallel": (False,),
    "enable_lora": (False,),
    "enable_return_routed_experts": (False,),
    "enforce_eager": (False,),
    "generation_config": ("auto",),
    "hf_overrides": (None, {}),
    "hf_token": (None, False),
    "kv_transfer_config": (None,),
    "limit_mm_per_prompt": (None, {}),
    "logits_processors": (None, []),
    "logprobs_mode": ("raw_logprobs",),
    "max_logprobs": (20,),
    "max_seq_len_to_capture": (8192,),
    "mm_processor_kwargs": (None,),
    "offload_group_size": (0,),
    "offload_num_in_group": (1,),
    "offload_params": (None,),
    "offload_prefetch_step": (1,),
    "override_generation_config": (None, {}),
    "pipeline_parallel_size": (1,),
    "pooler_config": (None,),
    "profiler_config": (None,),
    "revision": (None,),
    "runner": ("auto", "generate"),
    "served_model_name": (None,),
    "structured_outputs_config": (None,),
    "swap_space": (4, 0),
    "task": ("auto", "generate"),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": (False,),
}

SAMPLING_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "extra_args": (None, {}),
    "flat_logprobs": (False,),
    "guided_decoding": (None,),
    "logits_processors": (None, []),
    "logprob_token_ids": (None,),
    "output_kind": (None,),
    "output_text_buffer_length": (0,),
    "prompt_logprob_start": (None,),
    "prompt_logprob_token_ids": (None,),
    "routed_experts_prompt_start": (0,),
    "skip_clone": (False, True),
    "skip_reading_prefix_cache": (None, False),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (None, 1),
    "structured_outputs": (None,),
    "thinking_token_budget": (None, -1),
    "trace_decode_token_ids": (None,),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (False,),
}


GENERATE_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "lora_request": (None,),
    "mm_processor_kwargs": (None, {}),
    "tokenization_kwargs": (None, {}),
}

CHAT_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    **GENERATE_NEUTRAL,
    "chat_template_content_format": ("auto", "string"),
}


def check_neutral(settings: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], error: type[ValueError]) -> None:
    """Looks at those settings that are in ``neutral``.

    Raises:
        error: one of them has a value that jaxserve can't honour.
    """
    for name, value in settings.items():
        if name in neutral and not any(_same(value, one) for one in neutral[name]):
            allowed = " or ".join(repr(one) for one in neutral[name])
            raise error(f"{name} is {value!r}, which jaxserve doesn't support; allowed: {allowed}")


def drop_neutral(
    settings: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], error: type[ValueError]
) -> dict[str, Any]:
    """The settings without vLLM's neutral ones.

    Raises:
        error: one of them has a value that jaxserve can't honour.
    """
    check_neutral(settings, neutral, error)
    return {name: value for name, value in settings.items() if name not in neutral}


def accept_neutral[T](neutral: Mapping[str, tuple[Any, ...]], error: type[ValueError]) -> Callable[[type[T]], type[T]]:
    """Decorates a keyword-only dataclass: its constructor also takes ``neutral``, and names what it doesn't know."""

    def decorate(cls: type[T]) -> type[T]:
        fill: Any = cls.__init__
        known = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]

        @functools.wraps(fill)
        def __init__(self: T, **settings: Any) -> None:
            settings = drop_neutral(settings, neutral, error)
            if unknown := sorted(set(settings) - set(known)):
                raise error(f"{cls.__name__} doesn't know {unknown[0]!r}; known: {', '.join(known)}")
            fill(self, **settings)

        setattr(cls, "__init__", __init__)  # noqa: B010
        return cls

    return decorate


def _same(value: Any, neutral: Any) -> bool:
    """Equal, without taking True for 1 or [] for None. What compares element by element, as arrays do, isn't."""
    if value is neutral or isinstance(value, bool) != isinstance(neutral, bool):
        return value is neutral
    equal = value == neutral
    return isinstance(equal, (bool, np.bool_)) and bool(equal)
