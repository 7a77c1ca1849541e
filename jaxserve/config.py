"""Engine settings, as a user gives them and as the engine uses them. Imports no jax.

``EngineConfig`` is the one place where defaults live: ``LLM(...)``, the command line and ``configs/serving/*.toml`` all
fill it. ``None`` means "decided from the model and the machine"; ``jaxserve.engine.build`` resolves it.
"""

from __future__ import annotations

import numbers
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from jaxserve.errors import ConfigError, inside
from jaxserve.sampling_params import MAX_SEED, RepetitionDetection, is_integer

DType = Literal["auto", "float32", "bfloat16"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "fp8", "fp8_e4m3", "int8"]
Quantization = Literal["int8", "int4", "fp8", "fp8_weight_only"]
LoadFormat = Literal["auto", "safetensors", "gguf", "orbax", "dummy"]
Implementation = Literal["auto", "xla", "pallas_gpu", "pallas_tpu"]
Policy = Literal["fcfs", "priority"]
MAX_SECONDS = 1e9  # threads can't wait for as long as they like


def _check_known(cls: type[Any], settings: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"unknown setting {unknown[0]!r} of {cls.__name__}; known: {', '.join(sorted(known))}")


def _check_quantization(value: Any) -> None:
    if value is not None and value not in get_args(Quantization):
        raise ConfigError(f"quantization is {value!r}; allowed: {', '.join(get_args(Quantization))}, or None")


def _integer(owner: Any, name: str, low: int, high: int | None = None) -> None:
    value = getattr(owner, name)
    if not is_integer(value) or value < low or (high is not None and value > high):
        span = f"of at least {low}" if high is None else f"in {low}..{high}"
        raise ConfigError(f"{name} is {value!r}; allowed: an integer {span}")
    object.__setattr__(owner, name, int(value))


def _boolean(owner: Any, name: str) -> None:
    if not isinstance(value := getattr(owner, name), bool):
        raise ConfigError(f"{name} is {value!r}; allowed: True, False")


def _path(owner: Any, name: str, *, optional: bool = False) -> None:
    """A path, or what else a string may name; ``os.PathLike`` becomes a string."""
    value = getattr(owner, name)
    if value is None and optional:
        return
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise ConfigError(
            f"{name} is {value!r}; allowed: a path, as a string or a Path{', or None' if optional else ''}"
        )
    object.__setattr__(owner, name, text)


def _nested(owner: Any, name: str, cls: type[Any], *, optional: bool = False) -> None:
    """A config inside another; a mapping of its fields becomes one."""
    value = getattr(owner, name)
    if isinstance(value, Mapping):
        _check_known(cls, value)
        with inside(name):
            object.__setattr__(owner, name, cls(**value))
    elif not isinstance(value, cls) and not (value is None and optional):
        raise ConfigError(
            f"{name} is {value!r}; allowed: a {cls.__name__}, a dict of its fields{', or None' if optional else ''}"
        )


def _above_zero(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and bool(value > 0)  # type: ignore[operator]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps on variable-size request fields; a request above a cap is refused. Most size device arrays."""

    max_stop_token_ids: int = 32  # EOS ids included
    max_logit_bias: int = 64
    max_bad_words: int = 16
    max_bad_word_len: int = 8  # tokens
    max_logprobs: int = 20
    max_repetition_pattern: int = 512  # tokens; of repetition_detection: what one look for loops costs grows with it

    def __post_init__(self) -> None:
        for f in fields(self):
            _integer(self, f.name, 1)


@dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """Drafts that the target model verifies; the output is the same with and without (vLLM's names).

    Attributes:
        method: "ngram" looks drafts up in the choice's own prompt and output, on the device; "draft_model" asks a
            second model. None: "draft_model" where a model or a quantization is given, else "ngram".
        num_speculative_tokens: K, the longest draft.
        model: the draft model's checkpoint, of the target's tokenizer; None drafts with a copy of the target, which
            then needs a quantization.
        quantization: of the draft model's weights, as in EngineConfig.
        prompt_lookup_min: of "ngram" only, shortest suffix that must have occurred before, in tokens. None: equal to
            prompt_lookup_max, or 2 where that is None too.
        prompt_lookup_max: of "ngram" only, longest suffix that is tried, first. None: equal to prompt_lookup_min, or 3.
        adaptive: drafts get shorter, and stop, where they don't pay (``jaxserve.scheduler.adaptive``).
    """

    method: Literal["ngram", "draft_model"] | None = None
    num_speculative_tokens: int = 4
    model: str | None = None
    quantization: Quantization | None = None
    prompt_lookup_min: int | None = None
    prompt_lookup_max: int | None = None
    adaptive: bool = True

    def __post_init__(self) -> None:
        _check_quantization(self.quantization)
        drafter, lookup = ("model", "quantization"), ("prompt_lookup_min", "prompt_lookup_max")
        given = {name for name in drafter + lookup if getattr(self, name) is not None}
        if self.method is None:
            object.__setattr__(self, "method", "draft_model" if given.intersection(drafter) else "ngram")
        if self.method not in ("ngram", "draft_model"):
            raise ConfigError(f"method is {self.method!r}; allowed: 'ngram', 'draft_model', or None")
        for name in lookup if self.method == "draft_model" else drafter:
            if name in given:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r} with method {self.method!r}; allowed: None, or the other method"
                )
        if self.method == "draft_model" and not given:
            raise ConfigError(
                "model is None, and so is quantization, with method 'draft_model'; allowed: a model (a checkpoint), a "
                "quantization (such as 'int8': a copy of the target drafts), or both"
            )
        _path(self, "model", optional=True)
        _boolean(self, "adaptive")
        _integer(self, "num_speculative_tokens", 1)
        if self.method == "ngram":
            self._resolve_lookup()

    def _resolve_lookup(self) -> None:
        for name in ("prompt_lookup_min", "prompt_lookup_max"):
            if getattr(self, name) is not None:
                _integer(self, name, 1)
        low = self.prompt_lookup_min or self.prompt_lookup_max or 2
        high = self.prompt_lookup_max or self.prompt_lookup_min or 3
        object.__setattr__(self, "prompt_lookup_min", low)
        object.__setattr__(self, "prompt_lookup_max", high)
        _integer(self, "prompt_lookup_max", low)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that can be set on an engine.

    Attributes:
        model: a directory (HF layout or Orbax), a ``.gguf`` file, a hub id that is in the local HF cache, or a model
            config ``.toml`` (with ``load_format="dummy"``).
        tokenizer: where the tokenizer is, if not beside the model.
        skip_tokenizer_init: run without a tokenizer: prompts are token ids, and requests set detokenize=False.
        dtype: of weights and activations; "auto" is float32 on CPU, bfloat16 on GPU and TPU.
        max_model_len: longest prompt + output, in tokens; None is the model's own.
        max_num_seqs: choices that run at once; None is 256 on GPU and TPU, 8 on CPU.
        max_num_batched_tokens: tokens in one step; None is 8192 on GPU and TPU, 512 on CPU.
        block_size: tokens per KV block; None is 64 on GPU, 128 on TPU, 16 on CPU.
        num_gpu_blocks_override: number of KV blocks, instead of what fits.
        kv_cache_memory_bytes: bytes for KV blocks, instead of what fits; on CPU None is 1 GiB.
        gpu_memory_utilization: share of the device's memory that the engine may use.
        kv_cache_dtype: "auto" is ``dtype``; "fp8" and "fp8_e4m3" are the same, without scales; "int8" has a scale for
            each token and head.
        enable_prefix_caching: prompts that begin alike share the KV blocks of what they have in common.
        tensor_parallel_size: devices of this host that the model is split over.
        load_format: how the weights are stored; "auto" looks, "dummy" needs none and makes random ones.
        seed: of the seeds of requests that bring none, and of dummy weights.
        attention_implementation: "pallas_gpu" (Hopper), "pallas_tpu", or "xla" (anywhere); "auto" is the device's
            kernel where that runs the model, else "xla".
        scheduling_policy: who runs first: "fcfs", who came first; "priority", whose priority is the lowest number.
        quantization: of the weights, while they are loaded: "int8" (a scale an output channel), "int4" (a scale and an
            offset for 64 inputs; the LM head is int8), "fp8" (e4m3, and products in fp8 with a scale a token), or
            "fp8_weight_only"; None keeps ``dtype``.
        speculative_config: a SpeculativeConfig or a dict of its fields; None: no speculation.
        run_ahead: steps dispatched before the oldest result is read.
        steps_per_dispatch: decode steps of a small batch that go to the device in one call; None is 4 on GPU, where the
            host is slower than such a step, and 1 elsewhere and with run_ahead=0.
        default_max_tokens: for requests with ``max_tokens=None``; None is what the context leaves.
        max_output_tokens: ceiling that every request's max_tokens must respect; None is max_model_len - 1.
        max_seconds: wall-clock limit of every request, in seconds; a request may ask for a shorter one.
        repetition: what to do about a request whose output has become a verbatim loop: "off", "warn" (count it once a
            request, in the statistics), "stop" (with finish_reason "repetition"). A request that brings its own
            repetition_detection is stopped in any case.
        repetition_detection: what counts as a loop: a RepetitionDetection or a dict of its fields.
        watchdog_seconds: a step that takes longer than this kills the engine, loudly.
        strict_compile: an executable born after warm-up is an error instead of a counted warning.
        compilation_cache_dir: where compiled executables are kept for the next start, as is JAX's own cache; a
            directory to be trusted like the installation. It is made where there is none. None: nothing is kept.
        limits: caps on what requests ask for: a Limits or a dict of its fields.
    """

    model: str
    tokenizer: str | None = None
    skip_tokenizer_init: bool = False
    dtype: DType = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_gpu_blocks_override: int | None = None
    kv_cache_memory_bytes: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_dtype: KVCacheDType = "auto"
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    load_format: LoadFormat = "auto"
    seed: int = 0
    attention_implementation: Implementation = "auto"
    scheduling_policy: Policy = "fcfs"
    quantization: Quantization | None = None
    speculative_config: SpeculativeConfig | None = None
    run_ahead: int = 2
    steps_per_dispatch: int | None = None
    default_max_tokens: int | None = None
    max_output_tokens: int | None = None
    max_seconds: float | None = None
    repetition: Literal["off", "warn", "stop"] = "warn"
    repetition_detection: RepetitionDetection = RepetitionDetection()
    watchdog_seconds: float = 300.0
    strict_compile: bool = False
    compilation_cache_dir: str | None = None
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        _path(self, "model")
        for name in ("tokenizer", "compilation_cache_dir"):
            _path(self, name, optional=True)
        for name in ("skip_tokenizer_init", "enable_prefix_caching", "strict_compile"):
            _boolean(self, name)
        for name, allowed in (
            ("dtype", get_args(DType)),
            ("kv_cache_dtype", get_args(KVCacheDType)),
            ("load_format", get_args(LoadFormat)),
            ("attention_implementation", get_args(Implementation)),
            ("scheduling_policy", get_args(Policy)),
            ("repetition", ("off", "warn", "stop")),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        for name, low in (
            ("max_model_len", 2),
            ("max_num_seqs", 1),
            ("max_num_batched_tokens", 1),
            ("block_size", 1),
            ("num_gpu_blocks_override", 1),
            ("kv_cache_memory_bytes", 1),
            ("tensor_parallel_size", 1),
            ("default_max_tokens", 1),
            ("max_output_tokens", 1),
            ("run_ahead", 0),
            ("steps_per_dispatch", 1),
        ):
            if getattr(self, name) is not None:
                _integer(self, name, low)
        _integer(self, "seed", -MAX_SEED - 1, MAX_SEED)
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                f"num_gpu_blocks_override is {self.num_gpu_blocks_override} with kv_cache_memory_bytes "
                f"{self.kv_cache_memory_bytes}; allowed: one of them"
            )
        if self.max_output_tokens is not None and (self.default_max_tokens or 0) > self.max_output_tokens:
            raise ConfigError(
                f"default_max_tokens is {self.default_max_tokens}; allowed: 1..{self.max_output_tokens} "
                "(max_output_tokens), or None"
            )
        if not self.run_ahead and (self.steps_per_dispatch or 1) > 1:
            raise ConfigError(
                f"steps_per_dispatch is {self.steps_per_dispatch} with run_ahead 0; allowed: 1, or a run_ahead above 0"
            )
        _check_quantization(self.quantization)
        _nested(self, "speculative_config", SpeculativeConfig, optional=True)
        _nested(self, "limits", Limits)
        _nested(self, "repetition_detection", RepetitionDetection)
        with inside("repetition_detection"):
            _integer(self.repetition_detection, "min_pattern_size", 1)
            _integer(self.repetition_detection, "max_pattern_size", self.repetition_detection.min_pattern_size)
            _integer(self.repetition_detection, "min_count", 2)
        if (longest := self.repetition_detection.max_pattern_size) > self.limits.max_repetition_pattern:
            raise ConfigError(
                f"repetition_detection.max_pattern_size is {longest}; allowed: at most "
                f"{self.limits.max_repetition_pattern} (limits.max_repetition_pattern)"
            )
        for name in ("max_seconds", "watchdog_seconds"):
            seconds = getattr(self, name)
            if not (seconds is None and name == "max_seconds") and not (
                _above_zero(seconds) and seconds <= MAX_SECONDS
            ):
                raise ConfigError(
                    f"{name} is {seconds!r}; allowed: a number of seconds above 0, at most {MAX_SECONDS:g}"
                )
        if not _above_zero(self.gpu_memory_utilization) or self.gpu_memory_utilization > 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization!r}; allowed: a share in (0, 1]")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> EngineConfig:
        """Builds from a mapping; an unknown key is refused by name."""
        _check_known(cls, settings)
        return cls(**settings)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Settings from a TOML file.

    Raises:
        ConfigError: the file is missing or isn't TOML, which is UTF-8; names the file.
    """
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"can't read the settings file {str(path)!r}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{str(path)!r} isn't valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} isn't valid TOML, which is UTF-8: {error}") from error
