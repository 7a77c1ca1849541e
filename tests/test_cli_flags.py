"""Flags and files of settings: defaults, help, and what is refused."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from jaxserve import SamplingParams, cli, cli_flags
from jaxserve.config import EngineConfig
from jaxserve.errors import ConfigError
from jaxserve.sampling_params import CHECKPOINT_SETTINGS

CONFIGS = Path(__file__).parent.parent / "configs" / "serving"
PROMPT = [("prompt", Annotated[str, tyro.conf.Positional])]


def test_every_engine_setting_is_a_flag_with_the_dataclass_default():
    settings = cli_flags.parse("p", "", ["--model", "m"], [])
    assert settings.engine == EngineConfig(model="m")
    assert settings.sampling_params({}) == SamplingParams(max_tokens=None)


def test_speculation_is_json_on_the_command_line_and_a_table_in_a_file(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[speculative_config]\nnum_speculative_tokens = 3\n")
    args = ["--model", "m", "--config", str(file)]
    assert cli_flags.parse("p", "", args, []).engine.speculative_config.num_speculative_tokens == 3
    args += ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 5}']
    assert cli_flags.parse("p", "", args, []).engine.speculative_config.num_speculative_tokens == 5


@pytest.mark.parametrize("none", ["None", "null"])
def test_none_is_a_flags_value_that_wins_over_the_file(tmp_path, none):
    file = tmp_path / "c.toml"
    settings = "max_seconds = 3\n[speculative_config]\n[sampling]\nseed = 3\nmax_seconds = 3\ntop_k = 3\n"
    file.write_text(settings)
    args = ["--model", "m", "--config", str(file), "--speculative-config", none]
    for flag in ("--engine-max-seconds", "--seed", "--max_seconds", "--top-k"):
        args += [flag, "None"]
    parsed = cli_flags.parse("p", "", args, [])
    assert parsed.engine == EngineConfig(model="m")
    assert parsed.sampling == {}


def test_a_prompt_that_is_a_flags_name_is_no_flag(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[sampling]\nseed = 3\n")
    args = ["--model", "m", "--config", str(file)]
    assert cli_flags.parse("p", "", [*args, "seed"], PROMPT).sampling == {"seed": 3}
    assert cli_flags.parse("p", "", [*args, "--", "--seed=4"], PROMPT).sampling == {"seed": 3}


def test_a_text_that_looks_like_the_flag_of_a_file_is_a_text():
    settings = cli_flags.parse("p", "", ["--model", "m", "--", "--config=nowhere"], PROMPT)
    assert settings.command["prompt"] == "--config=nowhere"


@pytest.mark.parametrize("second", [["--config", "b.toml"], ["--config=b.toml"]])
def test_two_files_are_refused(second):
    with pytest.raises(ConfigError, match="--config is given 2 times; allowed: once"):
        cli_flags.parse("p", "", ["--config", "a.toml", "--model", "m", *second], [])


@pytest.mark.parametrize("text", ["{", "3", '{"method": "magic"}', '{"colour": 1}'])
def test_wrong_speculation_is_refused(text):
    with pytest.raises(ConfigError, match="speculative_config|SpeculativeConfig"):
        cli_flags.parse("p", "", ["--model", "m", "--speculative-config", text], [])


def test_repetition_is_flags_and_a_table_of_a_file(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('repetition = "stop"\n[repetition_detection]\nmin_count = 5\n')
    args = ["--model", "m", "--config", str(file), "--repetition-detection.max-pattern-size", "9"]
    engine = cli_flags.parse("p", "", args, []).engine
    rule = engine.repetition_detection
    assert (engine.repetition, rule.min_count, rule.max_pattern_size, rule.min_pattern_size) == ("stop", 5, 9, 1)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max-tokns", "3"], "unknown flag '--max-tokns'; did you mean '--max-tokens'?"),
        (["--max_tokns=3"], "unknown flag '--max_tokns'; did you mean '--max-tokens'?"),
        (["--limits.max-logprob", "3"], "did you mean '--limits.max-logprobs'?"),
        (["--no-ignore-eoss"], "did you mean '--no-ignore-eos'?"),
        (["--prompt", "x"], "unknown flag '--prompt'"),
        (["-x"], "unknown flag '-x'; p --help lists"),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_an_unknown_flag_is_refused_with_the_nearest_known_one(flags, named, before):
    args = [*flags, "hi"] if before else ["hi", *flags]
    with pytest.raises(ConfigError) as error_info:
        cli_flags.parse("p", "", ["--model", "m", *args], PROMPT)
    assert named in str(error_info.value)


def test_what_looks_like_a_flag_may_be_a_value():
    args = ["--model", "m", "--stop=--x", "--logit_bias", "6", "-1.5", "--no-ignore-eos", "--", "--hi"]
    settings = cli_flags.parse("p", "", args, PROMPT)
    assert settings.command["prompt"] == "--hi"
    assert settings.sampling["stop"] == ("--x",) and settings.sampling["logit_bias"] == {6: -1.5}


def test_the_known_flags_are_those_that_help_shows(capsys, monkeypatch):
    known = []
    monkeypatch.setattr(cli_flags, "_refuse_unknown", lambda prog, args, names, replaced: known.extend(names))
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    shown = re.findall(r"^[ │|]*(--?[a-z].*)", capsys.readouterr().out, re.MULTILINE)
    assert {part.split()[0] for line in shown for part in line.split(", ")} == set(known)


def test_limits_are_flags():
    settings = cli_flags.parse("p", "", ["--model", "m", "--limits.max-logprobs", "5"], [])
    assert settings.engine.limits.max_logprobs == 5


def help_of(capsys, *args):
    """Flag -> what the help says of it, on one line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate", *args, "--help"])
    assert exit_info.value.code == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    helps, name = {}, ""
    for line in lines:
        if re.match("--?[a-z]", line):
            name = line.split()[0].rstrip(",")
            helps[name] = ""
        else:
            helps[name] = f"{helps.get(name, '')} {line}".strip()
    return helps


def test_help_says_where_defaults_come_from(capsys):
    helps = help_of(capsys)
    from_model = {name for name, text in helps.items() if "generation_config" in text}
    assert from_model == {f"--{name.replace('_', '-')}" for name in CHECKPOINT_SETTINGS}
    assert helps["--top-k"] == "if not given: what the model's generation_config says, or 0"
    assert helps["--max-tokens"] == "if not given: default_max_tokens, or else what the context leaves"
    assert helps["--stop"].startswith("if not given: none")
    assert cli_flags.SPECULATIVE_EXAMPLE in helps["--speculative-config"]


def test_help_says_what_the_file_sets(capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[sampling]\ntop_k = 5\n")
    assert help_of(capsys, "--config", str(file))["--top-k"] == "if not given: 5"


def test_every_flag_has_a_help_text(capsys):
    nested = ("--limits.", "--repetition-detection.")  # explained as a group
    helps = help_of(capsys)
    assert [name for name, text in helps.items() if re.match(r"(\(.*\))?$", text) and not name.startswith(nested)] == []
    documented = cli_flags._helps(EngineConfig)
    assert [f.name for f in dataclasses.fields(EngineConfig) if not documented.get(f.name)] == []


def test_a_file_that_isnt_text_is_refused(tmp_path):
    file = tmp_path / "c.toml"
    file.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match="c.toml' isn't valid TOML, which is UTF-8"):
        cli_flags.parse("p", "", ["--config", str(file)], [])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 1", "'colour'"),
        ("[sampling]\ncolour = 1", "unknown sampling setting 'colour'"),
        ("[sampling]\nn = 2", "sampling.n"),
        ("[limits]\ncolour = 1", "limits, 'colour'"),
        ("[repetition_detection]\ncolour = 1", "repetition_detection, 'colour'"),
        ("model = ", "isn't valid TOML"),
        ("sampling = 3", "sampling is 3; allowed: a table"),
        ("[[sampling]]\ntop_k = 1", "sampling is "),
        ("limits = 5", "limits is 5; allowed: a table"),
        ("repetition_detection = 5", "repetition_detection is 5; allowed: a table"),
        ('speculative_config = "x"', "speculative_config is 'x'; allowed: a table"),
        ('[speculative_config]\nnum_speculative_tokens = "x"', "speculative_config.num_speculative_tokens is 'x'"),
        ('[repetition_detection]\nmin_count = "x"', "': repetition_detection.min_count is 'x'"),
        ('dtype = "float16"', "dtype is 'float16'"),
        ("dtype = [1]", "dtype is [1]"),
        ('max_num_seqs = "x"', "max_num_seqs is 'x'"),
        ("model = 3", "model is 3"),
        ("tokenizer = 3", "tokenizer is 3"),
        ("seed = 1.5", "seed is 1.5"),
        ('strict_compile = "no"', "strict_compile is 'no'"),
        ('gpu_memory_utilization = "x"', "gpu_memory_utilization is 'x'"),
        ('[limits]\nmax_logprobs = "x"', "': limits.max_logprobs is 'x'"),
        ("[speculative_config]\nadaptive = 3", "': speculative_config.adaptive is 3"),
        ('[sampling]\ntop_k = "x"', "[sampling]: top_k is 'x'"),
        ("[sampling]\nstop = 3", "[sampling]: stop is 3"),
        ("[sampling]\nrepetition_detection = {min_count = 0}", "[sampling]: repetition_detection.min_count is 0"),
    ],
)
def test_a_file_with_unknown_or_wrong_settings_is_refused(tmp_path, text, named):
    """With no warning of tyro's, whose flags would have such defaults: warnings are errors here."""
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error_info:
        cli_flags.parse("p", "", ["--model", "m", "--config", str(file)], [])
    assert named in str(error_info.value) and repr(str(file)) in str(error_info.value)


def test_settings_of_a_file_may_fit_together_with_flags_only(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("run_ahead = 0\nsteps_per_dispatch = 2\n[sampling]\nmin_tokens = 20\n")
    args = ["--model", "m", "--config", str(file)]
    with pytest.raises(ConfigError, match="steps_per_dispatch is 2 with run_ahead 0"):
        cli_flags.parse("p", "", args, [])
    settings = cli_flags.parse("p", "", [*args, "--run-ahead", "1"], [])
    assert settings.sampling_params({}).min_tokens == 20


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_is_valid(file):
    settings = cli_flags.parse("p", "", ["--model", "m", f"--config={file}"], [])
    assert settings.engine != EngineConfig(model="m")
    settings.sampling_params({})
