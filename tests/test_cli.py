"""The command line on a fake engine: flags, files, streams, figures, errors."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import EOS, FakeCore, fake_engine

from jaxserve import LLM, SamplingParams, cli, cli_flags
from jaxserve.config import EngineConfig
from jaxserve.errors import CheckpointError, ConfigError
from jaxserve.weights.generation import _SAMPLING_RANGES

CONFIGS = Path(__file__).parent.parent / "configs" / "serving"


@pytest.fixture
def engine(monkeypatch):
    """Commands get a fake engine; returns what they asked for."""
    asked = {}

    def open_llm(settings):
        asked["settings"] = settings
        asked["core"] = FakeCore(lambda choice: [*"Paris, é.".encode(), EOS])
        return LLM.from_engine(fake_engine(asked["core"], max_model_len=512, sampling_defaults={"temperature": 0.6}))

    monkeypatch.setattr(cli, "open_llm", open_llm)
    return asked


def test_generate_streams_to_stdout_and_closes_with_one_line_of_figures(engine, capsys):
    assert cli.main(["generate", "--model", "m", "--temperature", "0", "The capital is"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris, é.\n"
    (line,) = err.splitlines()
    for part in ("11 tokens", "s to first token", "tokens/s", "attention fake", "device none", "finished: stop"):
        assert part in line


def test_generate_can_read_stdin_and_take_the_chat_template(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert cli.main(["generate", "--model", "m", "--chat", "-"]) == 0
    choice = engine["core"].submitted[0]
    assert bytes(choice.prompt_token_ids) == b"user: hello\nassistant: "


def test_flags_win_over_the_file_and_the_file_over_the_models_defaults(engine, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('model = "m"\nmax_num_seqs = 3\nmax_model_len = 99\n[sampling]\ntop_k = 5\ntop_p = 0.5\n')
    assert cli.main(["generate", "--config", str(file), "--max-num-seqs", "4", "--top-k", "7", "x"]) == 0
    config, params = engine["settings"].engine, engine["core"].submitted[0].params
    assert (config.model, config.max_num_seqs, config.max_model_len) == ("m", 4, 99)
    assert (params.temperature, params.top_k, params.top_p) == (0.6, 7, 0.5)
    assert params.max_tokens == 511


def test_a_flag_at_its_usual_default_still_wins_over_the_models_default(engine):
    assert cli.main(["generate", "--model", "m", "--temperature", "1.0", "x"]) == 0
    assert engine["core"].submitted[0].params.temperature == 1.0


def test_lists_are_given_by_repeating_a_flag(engine):
    args = ["--model", "m", "--stop", "a", "--stop", "b c", "--stop-token-ids", "5", "--logit-bias", "6", "-1.5", "x"]
    assert cli.main(["generate", *args]) == 0
    params = engine["core"].submitted[0].params
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a", "b c"), (5,), {6: -1.5})


def test_seeds_of_engine_and_request_are_two_flags(engine):
    assert cli.main(["generate", "--model", "m", "--seed", "5", "--engine-seed", "6", "x"]) == 0
    assert engine["settings"].engine.seed == 6
    assert engine["core"].submitted[0].seed == 5


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


def test_limits_are_flags():
    settings = cli_flags.parse("p", "", ["--model", "m", "--limits.max-logprobs", "5"], [])
    assert settings.engine.limits.max_logprobs == 5


def test_chat_keeps_the_conversation(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n\nand then\n/clear\nanew\n/nonsense\n/exit\nnever\n"))
    assert cli.main(["chat", "--model", "m", "--system", "be brief"]) == 0
    prompts = [bytes(choice.prompt_token_ids).decode() for choice in engine["core"].submitted]
    system, answer = "system: be brief\n", "assistant: Paris, é.\n"
    assert prompts == [
        f"{system}user: hi\nassistant: ",
        f"{system}user: hi\n{answer}user: and then\nassistant: ",
        f"{system}user: anew\nassistant: ",
    ]
    out, err = capsys.readouterr()
    assert out.count("Paris, é.") == 3
    assert err.count("first token") == 3
    assert "/exit" in err


def test_chat_says_of_an_interrupted_answer_that_it_was_aborted(engine, capsys, monkeypatch):
    def interrupt(stream):
        with stream:
            next(stream)
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    monkeypatch.setattr(cli, "show", interrupt)
    assert cli.main(["chat", "--model", "m"]) == 0
    assert "| finished: abort]" in capsys.readouterr().err


def test_chat_goes_on_after_a_message_that_is_too_long(engine, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 600 + "\nhi\n"))
    assert cli.main(["chat", "--model", "m"]) == 0
    assert "allowed: 1..511" in capsys.readouterr().err
    assert len(engine["core"].submitted) == 1


def test_bench_ends_with_a_json_line(engine, capsys):
    args = ["--num-prompts", "3", "--input-len", "10", "--output-len", "5"]
    assert cli.main(["bench", "--model", "m", *args]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (report["num_prompts"], report["input_tokens"], report["output_tokens"]) == (3, 30, 15)
    assert report["output_tokens_per_s"] > 0


def test_info_prints_what_the_engine_decided(engine, capsys):
    assert cli.main(["info", "--model", "m"]) == 0
    out = capsys.readouterr().out
    assert "attention: fake" in out and "memory:\n  blocks: 3" in out
    assert cli.main(["info", "--model", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["attention"] == "fake"


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["generate", "--model", "m", "--temperature", "nan", "x"], "temperature is nan"),
        (["generate", "--model", "m", "--max-tokens", "0", "x"], "max_tokens is 0"),
        (["generate", "--model", "m", ""], "prompt is empty"),
        (["generate", "--model", "m", "--max-num-seqs", "0", "x"], "max_num_seqs is 0"),
        (["generate", "--model", "m", "--config", "nowhere.toml", "x"], "nowhere.toml"),
        (["bench", "--model", "m", "--num-prompts", "0"], "num_prompts is 0"),
        (["nonsense"], "unknown command 'nonsense'"),
    ],
)
def test_errors_are_one_clear_line_and_status_2(engine, capsys, args, named):
    assert cli.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxserve: ") and named in line


def test_an_engine_that_cant_be_built_is_one_clear_line(monkeypatch, capsys):
    def refuse(settings):
        raise CheckpointError("no model at 'm'")

    monkeypatch.setattr(cli, "open_llm", refuse)
    assert cli.main(["info", "--model", "m"]) == 2
    assert capsys.readouterr().err == "jaxserve: no model at 'm'\n"


@pytest.mark.parametrize("args", [["generate", "x"], ["generate", "--model", "m", "--nonsense", "x"]])
def test_wrong_flags_end_with_status_2(capsys, args):
    with pytest.raises(SystemExit) as exit_info:
        cli.main(args)
    assert exit_info.value.code == 2


@pytest.mark.parametrize("module", ["jaxserve", "jaxserve.cli"])
def test_the_modules_run_as_programs(module):
    ran = subprocess.run([sys.executable, "-m", module, "nonsense"], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.splitlines()[-1:]) == (
        2,
        ["jaxserve: unknown command 'nonsense'; known: generate, chat, bench, info"],
    )


def test_help_and_usage(capsys):
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "generate PROMPT" in capsys.readouterr().out


def help_of(capsys, *args):
    """Flag -> what the help says of it, on one line."""
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["generate", *args, "--help"])
    assert exit_info.value.code == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    helps, name = {}, ""
    for line in lines:
        if line.startswith(("--", "-h")):
            name = line.split()[0].rstrip(",")
            helps[name] = ""
        else:
            helps[name] = f"{helps.get(name, '')} {line}".strip()
    return helps


def test_help_says_where_defaults_come_from(capsys):
    helps = help_of(capsys)
    from_model = {name for name, text in helps.items() if "generation_config" in text}
    assert from_model == {f"--{name.replace('_', '-')}" for name in _SAMPLING_RANGES}
    assert helps["--top-k"] == "if not given: what the model's generation_config says, or 0"
    assert helps["--max-tokens"] == "if not given: default_max_tokens, or else what the context leaves"
    assert helps["--stop"].startswith("if not given: none")
    assert cli_flags.SPECULATIVE_EXAMPLE in helps["--speculative-config"]


def test_help_says_what_the_file_sets(capsys, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[sampling]\ntop_k = 5\n")
    assert help_of(capsys, "--config", str(file))["--top-k"] == "if not given: 5"


def test_every_engine_setting_has_a_help_text():
    helps = cli_flags._helps(EngineConfig)
    assert [f.name for f in dataclasses.fields(EngineConfig) if not helps.get(f.name)] == []


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"]])
def test_a_command_that_needs_the_tokenizer_refuses_before_loading(engine, capsys, command):
    assert cli.main([*command, "--model", "m", "--skip-tokenizer-init"]) == 2
    assert "skip_tokenizer_init is True; allowed: False" in capsys.readouterr().err
    assert engine == {}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 1", "'colour'"),
        ("[sampling]\ncolour = 1", "'colour'"),
        ("[sampling]\nn = 2", "sampling.n"),
        ("[limits]\ncolour = 1", "limits.colour"),
        ("[repetition_detection]\ncolour = 1", "repetition_detection.colour"),
        ("model = ", "isn't valid TOML"),
    ],
)
def test_a_file_with_unknown_settings_is_refused(tmp_path, text, named):
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises((ConfigError, ValueError), match=named):
        cli_flags.parse("p", "", ["--model", "m", "--config", str(file)], [])


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_profile_is_valid(file):
    settings = cli_flags.parse("p", "", ["--model", "m", f"--config={file}"], [])
    assert settings.engine != EngineConfig(model="m")
    settings.sampling_params({})
