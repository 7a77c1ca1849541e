"""The command line on a fake engine: flags, files, streams, figures, errors."""

import io
import json
import logging
import subprocess
import sys

import pytest
from fakes import EOS, FakeCore, fake_engine

from jaxserve import LLM, cli
from jaxserve.errors import CheckpointError


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
    assert out == "Paris, é.\n" * 3  # what a pipe gets: answers, no prompt
    assert err.count("you> ") == 7
    assert err.count("first token") == 3
    assert "/exit" in err


def test_chat_says_of_an_interrupted_answer_that_it_was_aborted(capsys, monkeypatch):
    def interrupt(stream):
        with stream:
            next(stream)
            raise KeyboardInterrupt

    core = FakeCore(lambda choice: b"Par", step_seconds=0.001, pauses=True)  # not done before
    monkeypatch.setattr(cli, "open_llm", lambda settings: LLM.from_engine(fake_engine(core)))
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    monkeypatch.setattr(cli, "show", interrupt)
    assert cli.main(["chat", "--model", "m"]) == 0
    out, err = capsys.readouterr()
    assert out == "\n"  # ends the line of the answer, which show() printed
    assert " [stopped]" in err and "| finished: abort]" in err


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
        (["bench", "--model", "m", "--max-tokens", "5"], "bench has no flag '--max-tokens': --output-len decides it"),
        (["bench", "--model", "m", "--no-ignore-eos"], "bench has no flag '--no-ignore-eos': --output-len decides it"),
        (["nonsense"], "unknown command 'nonsense'"),
    ],
)
def test_errors_are_one_clear_line_and_status_2(engine, capsys, args, named):
    assert cli.main(args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxserve: ") and named in line


def test_sampling_settings_are_checked_before_the_model_is_loaded(engine):
    assert cli.main(["generate", "--model", "m", "--temperature", "-1", "x"]) == 2
    assert engine == {}


def test_an_engine_that_cant_be_built_is_one_clear_line(monkeypatch, capsys):
    def refuse(settings):
        raise CheckpointError("no model at 'm'")

    monkeypatch.setattr(cli, "open_llm", refuse)
    assert cli.main(["info", "--model", "m"]) == 2
    assert capsys.readouterr().err == "jaxserve: no model at 'm'\n"


@pytest.mark.parametrize("args", [["generate", "x"], ["generate", "--model", "m", "--top-k", "many", "x"]])
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


@pytest.mark.parametrize("command", [["generate", "x"], ["chat"]])
def test_a_command_that_needs_the_tokenizer_refuses_before_loading(engine, capsys, command):
    assert cli.main([*command, "--model", "m", "--skip-tokenizer-init"]) == 2
    assert "skip_tokenizer_init is True; allowed: False" in capsys.readouterr().err
    assert engine == {}


def test_an_empty_prompt_is_refused_before_loading(engine, capsys):
    assert cli.main(["generate", "--model", "m", ""]) == 2
    assert "empty" in capsys.readouterr().err and "settings" not in engine


def test_warnings_of_the_package_are_shown_while_a_command_runs(monkeypatch, capsys):
    def warns(settings):
        logging.getLogger("jaxserve").warning("something is slow")
        raise CheckpointError("no such model")

    monkeypatch.setattr(cli, "open_llm", warns)
    assert cli.main(["info", "--model", "m"]) == 2
    assert capsys.readouterr().err == "jaxserve: something is slow\njaxserve: no such model\n"
    logging.getLogger("jaxserve").warning("nobody listens")
    assert capsys.readouterr().err == ""
