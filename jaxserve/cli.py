"""``jaxserve generate | chat | bench | info``: the engine from a terminal.

Answers go to stdout, everything else (progress, figures, errors) to stderr. An error that says what was wrong is one
line and exit status 2.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import tyro

from jaxserve.cli_flags import Settings, parse
from jaxserve.engine.prompts import split_prompts
from jaxserve.errors import ConfigError, InvalidRequestError, JaxserveError
from jaxserve.llm import LLM, Stream
from jaxserve.outputs import RequestOutput
from jaxserve.sampling_params import SamplingParams

USAGE = """usage: jaxserve COMMAND --model MODEL [flags]

commands:
  generate PROMPT   continue a text, or answer it with --chat
  chat              talk with the model
  bench             measure throughput; the last line is JSON
  info              devices, implementations and the memory plan

jaxserve COMMAND --help lists the flags."""

CHAT_HELP = "/clear forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    commands: dict[str, Callable[[list[str]], int]] = {
        "generate": generate,
        "chat": chat,
        "bench": bench,
        "info": info,
    }
    if not args or args[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if args else 2
    if args[0] == "--version":
        from jaxserve import __version__

        print(__version__)
        return 0
    if args[0] not in commands:
        return _fail(f"unknown command {args[0]!r}; known: {', '.join(commands)}")
    try:
        with warnings_on_stderr():
            return commands[args[0]](args[1:])
    except JaxserveError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader left (`| head`): nothing more can be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextlib.contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Shows what the package logs as a warning; a program that uses it sets up handlers of its own."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("jaxserve: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("jaxserve")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def generate(args: list[str]) -> int:
    """Streams the answer to one prompt."""
    settings = parse(
        "jaxserve generate",
        "Continues a text and streams what it generates.",
        args,
        [
            ("prompt", Annotated[str, tyro.conf.Positional, tyro.conf.arg(help="the text; - reads it from stdin")]),
            ("chat", Annotated[bool, tyro.conf.arg(help="take the prompt as a user's message")], False),
        ],
    )
    _need_tokenizer(settings, "generate")
    prompt = settings.command["prompt"]
    if prompt == "-":
        prompt = sys.stdin.read()
    split_prompts(prompt)  # an empty one is refused before a model is loaded for it
    with open_llm(settings) as llm:
        params = settings.sampling_params(llm.engine.sampling_defaults)
        if settings.command["chat"]:
            stream = llm.chat_stream([{"role": "user", "content": prompt}], params)
        else:
            stream = llm.stream(prompt, params)
        show(stream)
        print(figures(stream.output(), llm.engine.info), file=sys.stderr)
    return 0


def chat(args: list[str]) -> int:
    """An interactive conversation."""
    settings = parse(
        "jaxserve chat",
        f"Talks with the model. {CHAT_HELP}.",
        args,
        [("system", Annotated[str | None, tyro.conf.arg(help="a system message")], None)],
    )
    _need_tokenizer(settings, "chat")
    system = settings.command["system"]
    start = [{"role": "system", "content": system}] if system else []
    with open_llm(settings) as llm:
        params = settings.sampling_params(llm.engine.sampling_defaults)
        if sys.stdin.isatty():
            import readline  # noqa: F401  # gives input() line editing and history
        print(CHAT_HELP, file=sys.stderr)
        messages = list(start)
        while (text := _ask()) not in (None, "/exit", "/quit"):
            if text == "/clear":
                messages = list(start)
            elif text and text.startswith("/"):
                print(CHAT_HELP, file=sys.stderr)
            elif text:
                messages.append({"role": "user", "content": text})
                messages = _answer(llm, messages, params)
    return 0


def bench(args: list[str]) -> int:
    """Throughput of random prompts that are all there at once."""
    settings = parse(
        "jaxserve bench",
        "Measures offline throughput with random prompts. The last line of stdout is one JSON document.",
        args,
        [
            ("num_prompts", Annotated[int, tyro.conf.arg(help="prompts, all submitted at once")], 8),
            ("input_len", Annotated[int, tyro.conf.arg(help="tokens a prompt")], 128),
            ("output_len", Annotated[int, tyro.conf.arg(help="tokens generated a prompt, EOS ignored")], 64),
        ],
        replaced={"max_tokens": "--output-len", "ignore_eos": "--output-len"},
    )
    num_prompts, input_len, output_len = (settings.command[k] for k in ("num_prompts", "input_len", "output_len"))
    for name in ("num_prompts", "input_len", "output_len"):
        if settings.command[name] < 1:
            raise ConfigError(f"{name} is {settings.command[name]}; allowed: at least 1")
    with open_llm(settings) as llm:
        params = settings.sampling_params(llm.engine.sampling_defaults)
        params = params.with_changes(max_tokens=output_len, ignore_eos=True, detokenize=bool(params.stop))
        draw = random.Random(settings.engine.seed)
        vocab_size = llm.engine.model_config.vocab_size
        prompts = [[draw.randrange(vocab_size) for _ in range(input_len)] for _ in range(num_prompts)]
        llm.generate([[1]], params.with_changes(max_tokens=1, min_tokens=0), use_tqdm=False)  # the first call is slower
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - begin
        print(json.dumps(_bench_report(settings, outputs, seconds, llm.engine.info)))
    return 0


def info(args: list[str]) -> int:
    """What the engine decided about model, machine and memory."""
    settings = parse(
        "jaxserve info",
        "Builds the engine and prints devices, chosen implementations, memory plan and generation defaults.",
        args,
        [("json", Annotated[bool, tyro.conf.arg(help="print one JSON document")], False)],
        sampling=False,
    )
    with open_llm(settings) as llm:
        facts = llm.engine.info
        if settings.command["json"]:
            print(json.dumps(facts, default=str))
        else:
            print("\n".join(_lines(facts)))
    return 0


def open_llm(settings: Settings) -> LLM:
    """The engine of a command."""
    return LLM(**{name: value for name, value in vars(settings.engine).items()})


def _need_tokenizer(settings: Settings, command: str) -> None:
    """Refuses before loading what could only fail after it."""
    if settings.engine.skip_tokenizer_init:
        raise ConfigError(f"skip_tokenizer_init is True; allowed: False, because {command} takes and prints text")


def show(stream: Stream) -> None:
    """Prints deltas as they come; Ctrl-C stops the answer."""
    with stream:
        for delta in stream:
            for choice in delta.outputs:
                print(choice.text, end="", flush=True)
    print(flush=True)


def figures(output: RequestOutput, info: Mapping[str, Any]) -> str:
    """The closing line: time to first token, decode rate, attention implementation, device."""
    metrics = output.metrics
    num_tokens = metrics.num_generation_tokens
    first, last = metrics.first_token_time, metrics.last_token_time
    parts = [f"{num_tokens} tokens"]
    if metrics.time_to_first_token is not None:
        parts.append(f"{metrics.time_to_first_token:.3f} s to first token")
    if first is not None and last is not None and last > first:
        parts.append(f"{(num_tokens - 1) / (last - first):.1f} tokens/s")
    parts += [f"attention {info['attention']}", f"device {info['device']}"]
    reasons = {choice.finish_reason for choice in output.outputs}
    return f"[{' | '.join(parts)} | finished: {', '.join(sorted(str(reason) for reason in reasons))}]"


def _ask() -> str | None:
    """A line from the user; None at the end of the input or on Ctrl-C."""
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            return input("\nyou> ").strip()  # line editing must know the prompt
        print("\nyou> ", end="", file=sys.stderr, flush=True)
        return input().strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None


def _answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> list[dict[str, str]]:
    """Streams an answer; the conversation with it. One that can't be asked leaves the conversation as it was."""
    try:
        stream = llm.chat_stream(messages, params)
    except InvalidRequestError as error:
        print(f"{error} (/clear forgets the conversation)", file=sys.stderr)
        return messages[:-1]
    try:
        show(stream)
    except KeyboardInterrupt:
        print(" [stopped]", file=sys.stderr)
        print(flush=True)
    output = stream.output()
    print(figures(output, llm.engine.info), file=sys.stderr)
    return [*messages, {"role": "assistant", "content": output.outputs[0].text}]


def _bench_report(
    settings: Settings, outputs: Sequence[RequestOutput], seconds: float, info: Mapping[str, Any]
) -> dict[str, Any]:
    num_input = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(output.metrics.num_generation_tokens for output in outputs)
    return {
        "model": settings.engine.model,
        "num_prompts": len(outputs),
        "input_tokens": num_input,
        "output_tokens": num_output,
        "seconds": round(seconds, 4),
        "output_tokens_per_s": round(num_output / seconds, 2),
        "total_tokens_per_s": round((num_input + num_output) / seconds, 2),
        "attention": info["attention"],
        "device": info["device"],
    }


def _lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    """A nested mapping as readable lines."""
    lines = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {value}")
    return lines


def _fail(message: str) -> int:
    print(f"jaxserve: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
