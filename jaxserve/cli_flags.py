"""Command-line flags, made from the config dataclasses so that there is one place for names, types and defaults.

Three sources, the later ones win: the dataclass defaults (and, for sampling, the model's generation_config), the file
given by ``--config`` (``cli_file.py``), the flags.
"""

from __future__ import annotations

import difflib
import itertools
import json
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from types import MappingProxyType
from typing import Annotated, Any

import tyro

from jaxserve.cli_file import read_settings
from jaxserve.config import EngineConfig, SpeculativeConfig
from jaxserve.errors import ConfigError
from jaxserve.sampling_params import CHECKPOINT_SETTINGS, SamplingParams

# Both dataclasses have these; the plain flag is the request's.
RENAMED = {"seed": "engine_seed", "max_seconds": "engine_max_seconds"}
# A command line shows one text: what asks for more belongs to the Python API. repetition_detection is for files only.
NOT_FLAGS = ("n", "logprobs", "prompt_logprobs", "detokenize", "priority", "repetition_detection")
NOT_IN_FILES = NOT_FLAGS[:-1]
# Flags know no "one or many": --stop may be repeated instead.
FLAG_TYPES: dict[str, Any] = {
    "stop": tuple[str, ...],
    "bad_words": tuple[str, ...],
    "stop_token_ids": tuple[int, ...],
    "allowed_token_ids": tuple[int, ...],
    "logit_bias": dict[int, float],
    "speculative_config": str | None,  # JSON, as in vLLM
}
SPECULATIVE_EXAMPLE = '{"method": "ngram", "num_speculative_tokens": 4}'
# Help of engine settings that flags take in another form than EngineConfig.
FLAG_HELPS = {
    "speculative_config": f"a JSON object, such as '{SPECULATIVE_EXAMPLE}'; fields: "
    f"{', '.join(f.name for f in fields(SpeculativeConfig))}. None: no speculation."
}
# What an absent sampling setting is, where its default of None doesn't say it.
IF_ABSENT = {
    "seed": "drawn from the engine's seed",
    "max_tokens": "default_max_tokens, or else what the context leaves",
    "max_seconds": "the engine's limit",
    "allowed_token_ids": "all",
    "num_speculative_tokens": "the engine's",
}
SWITCH_HELPS = {
    "include_stop_str_in_output": "the text keeps the stop string that ended it",
    "ignore_eos": "go on where the model ends its answer",
    "skip_special_tokens": "leave special tokens out of the text",
}


@dataclass(frozen=True)
class Settings:
    """What flags and file ask for. ``sampling`` holds only what was asked for; ``command`` a command's own flags."""

    engine: EngineConfig
    sampling: dict[str, Any]
    command: dict[str, Any]

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Sampling settings over the model's defaults; without a max_tokens the engine's default counts."""
        return SamplingParams.from_dict({"max_tokens": None, **defaults, **self.sampling})


def parse(
    prog: str,
    description: str,
    args: Sequence[str],
    command_fields: Sequence[tuple[Any, ...]],
    *,
    sampling: bool = True,
    replaced: Mapping[str, str] = MappingProxyType({}),
) -> Settings:
    """Parses a command's arguments; a flag's wrong or missing value ends the process with status 2, ``--help`` with 0.

    Args:
        command_fields: the command's own flags, as ``dataclasses.make_dataclass`` takes them.
        sampling: whether the command has sampling flags.
        replaced: the sampling settings that the command has no flag for -> its own flag that decides them.

    Raises:
        ConfigError, InvalidRequestError: a flag or a setting is unknown, or a value out of range.
    """
    before = list(itertools.takewhile(lambda arg: arg != "--", args))
    path = _config_path(before)
    file_engine, file_sampling = ({}, {}) if path is None else read_settings(path, NOT_IN_FILES)
    spec: list[tuple[Any, ...]] = list(command_fields)
    spec.append(("config", Annotated[str | None, tyro.conf.arg(help="a file of settings; flags win over it")], None))
    spec += _engine_fields(file_engine)
    if sampling:
        spec += [f for f in _sampling_fields(file_sampling) if f[0] not in replaced]
    flags = make_dataclass("Flags", [f for f in spec if len(f) == 2] + [f for f in spec if len(f) == 3], kw_only=True)
    _refuse_unknown(prog, before, ["-h", "--help", *_names(flags)], replaced)
    parsed = vars(tyro.cli(flags, args=list(args), prog=prog, description=description, config=(_append,)))
    engine = {f.name: parsed[RENAMED.get(f.name, f.name)] for f in fields(EngineConfig)}
    given = {_setting(arg) for arg in before}
    if "speculative_config" in given:
        engine["speculative_config"] = _speculative(engine["speculative_config"])
    else:
        engine["speculative_config"] = file_engine.get("speculative_config")
    asked = {}
    if sampling:
        asked = file_sampling | {f.name: parsed[f.name] for f in fields(SamplingParams) if f.name in given}
        asked = {name: value for name, value in asked.items() if value is not None}  # None: what no file had set
    settings = Settings(EngineConfig(**engine), asked, {name: parsed[name] for name, *_ in command_fields})
    settings.sampling_params({})  # refuses now what would be refused when the model is loaded
    return settings


_append = tyro.conf.UseAppendAction


def _config_path(args: Sequence[str]) -> str | None:
    """The value of ``--config``, which is needed before the flags' defaults are known."""
    paths = [arg.removeprefix("--config=") for arg in args if arg.startswith("--config=")]
    paths += [value for flag, value in itertools.pairwise(args) if flag == "--config"]
    if len(paths) > 1:
        raise ConfigError(f"--config is given {len(paths)} times; allowed: once")
    return paths[0] if paths else None


def _flag(arg: str) -> str:
    """The name of the flag that an argument gives."""
    return arg.partition("=")[0].replace("_", "-")


def _setting(arg: str) -> str:
    """The setting whose flag an argument is; empty where it is a value."""
    return _flag(arg)[2:].removeprefix("no-").replace("-", "_") if arg.startswith("--") else ""


def _names(flags: type, prefix: str = "--") -> Iterator[str]:
    """The flags that tyro makes of a dataclass."""
    hints = typing.get_type_hints(flags, include_extras=True)
    for f in fields(flags):
        annotated = typing.get_origin(hints[f.name]) is Annotated
        kind, *marks = typing.get_args(hints[f.name]) if annotated else (hints[f.name],)
        name = f.name.replace("_", "-")
        if is_dataclass(kind):
            yield from _names(typing.cast(type, kind), f"{prefix}{name}.")
        elif tyro.conf.Positional not in marks:
            yield f"{prefix}{name}"
            if kind is bool:
                yield f"{prefix}no-{name}"


def _refuse_unknown(prog: str, args: Sequence[str], known: Sequence[str], replaced: Mapping[str, str]) -> None:
    """tyro takes what follows an unknown flag as its values, and then misses the prompt."""
    for arg in args:
        name = arg.partition("=")[0]
        is_flag = name.startswith("--") or (name.startswith("-") and name[1:2].isalpha())
        if is_flag and _flag(arg) not in known and not name.startswith("--tyro-"):
            if (instead := replaced.get(_setting(arg))) is not None:
                raise ConfigError(f"{prog} has no flag {name!r}: {instead} decides it")
            near = difflib.get_close_matches(_flag(arg), known, n=1)
            raise ConfigError(
                f"unknown flag {name!r}; "
                + (f"did you mean {near[0]!r}? " if near else "")
                + f"{prog} --help lists the known ones; a text that begins with - goes after --"
            )


def _engine_fields(file: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A flag for every engine setting; ``model`` is required unless the file has it."""
    hints, helps = typing.get_type_hints(EngineConfig), _helps(EngineConfig)
    spec: list[tuple[Any, ...]] = []
    for f in fields(EngineConfig):
        about = FLAG_HELPS.get(f.name, helps.get(f.name, "").replace("``", ""))
        kind = _described(FLAG_TYPES.get(f.name, hints[f.name]), about)
        name = RENAMED.get(f.name, f.name)
        default = f.default if f.name == "speculative_config" else file.get(f.name, f.default)
        spec.append((name, kind) if default is MISSING else (name, kind, field(default=default)))
    return spec


def _sampling_fields(file: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A flag for every sampling setting. Its default is never asked for, but a switch shows it."""
    hints = typing.get_type_hints(SamplingParams)
    spec: list[tuple[Any, ...]] = []
    for f in fields(SamplingParams):
        if f.name in NOT_FLAGS:
            continue
        if hints[f.name] is bool:
            kind = _described(bool, SWITCH_HELPS[f.name])
            spec.append((f.name, kind, field(default=file.get(f.name, f.default))))
            continue
        about = f"if not given: {_if_absent(f.name, file.get(f.name), f.default)}"
        if f.name in FLAG_TYPES:
            kind = FLAG_TYPES[f.name]
            spec.append((f.name, _described(kind, about), field(default_factory=typing.get_origin(kind))))
        else:
            spec.append((f.name, _described(hints[f.name] | None, about, hint=""), None))
    return spec


def _if_absent(name: str, in_file: Any, default: Any) -> str:
    """What counts where a sampling flag isn't given."""
    if in_file is not None:
        return repr(in_file)
    if name in CHECKPOINT_SETTINGS:
        return f"what the model's generation_config says, or {default!r}"
    return IF_ABSENT.get(name, "none" if default is None else repr(default))


def _speculative(flag: str | None) -> Any:
    """The fields of a SpeculativeConfig in the flag's JSON; None and null: no speculation."""
    try:
        settings = None if flag is None else json.loads(flag)
    except json.JSONDecodeError as error:
        raise ConfigError(f"speculative_config is {flag!r}, which isn't JSON: {error}") from error
    if settings is not None and not isinstance(settings, dict):
        raise ConfigError(f"speculative_config is {flag!r}; allowed: a JSON object, such as {SPECULATIVE_EXAMPLE}")
    return settings


def _described(kind: Any, text: str, hint: str | None = None) -> Any:
    """A flag's type with its help; ``hint`` replaces tyro's "(default: ...)"."""
    return Annotated[kind, tyro.conf.arg(help=text, help_behavior_hint=hint)]


def _helps(cls: type) -> dict[str, str]:
    """The "Attributes" section of a docstring: name -> text."""
    helps: dict[str, str] = {}
    name = ""
    for line in (cls.__doc__ or "").partition("Attributes:")[2].splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if indent == 8 and ": " in text:
            name, _, text = text.partition(": ")
            helps[name] = text
        elif name and text:
            helps[name] += f" {text}"
    return helps
