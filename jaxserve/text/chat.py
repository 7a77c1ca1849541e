"""Conversations to prompts, by the chat template that came with the tokenizer.

The template is Jinja source from a checkpoint or a caller, so it is run by transformers' immutable sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2

from jaxserve.errors import InvalidRequestError
from jaxserve.text.codec import Codec

Message = Mapping[str, Any]
Conversation = Sequence[Message]
# What template code may raise; deep recursion is its own too.
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
RESERVED = (
    "conversation",
    "tools",
    "chat_template",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "return_tensors",
)


def split_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or many, made into many.

    Raises:
        InvalidRequestError: ``messages`` is neither.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError(f"messages is {messages!r}; allowed: a list of messages, or a list of such lists")
    if isinstance(messages[0], Mapping):
        return [cast(Conversation, messages)]
    return list(cast(Sequence[Conversation], messages))


def render_chat(
    codec: Codec,
    messages: Conversation,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: list[dict[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[str, list[int]]:
    """The prompt of a conversation, as text and as token ids.

    Most templates write the BOS token themselves, some leave it to the tokenizer: the ids have it once in either case.

    Raises:
        InvalidRequestError: the messages are malformed, there is no template, or the template refuses them.
    """
    for name, value in (
        ("add_generation_prompt", add_generation_prompt),
        ("continue_final_message", continue_final_message),
    ):
        if not isinstance(value, bool):
            raise InvalidRequestError(f"{name} is {value!r}; allowed: True, False")
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message are both True; "
            "to continue the last message, pass add_generation_prompt=False"
        )
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise InvalidRequestError(
            f"chat_template_kwargs is {chat_template_kwargs!r}; allowed: a dict of the template's variables, or None"
        )
    extra = dict(chat_template_kwargs or {})
    if taken := [name for name in RESERVED if name in extra]:
        raise InvalidRequestError(f"chat_template_kwargs holds {taken[0]!r}; allowed: other variables of the template")
    tokenizer = codec.tokenizer
    if tokenizer is None:
        raise InvalidRequestError("the engine has no tokenizer (skip_tokenizer_init); use generate with token ids")
    if chat_template is None and not getattr(tokenizer, "chat_template", None):
        raise InvalidRequestError("the model has no chat template; pass chat_template, or use generate with a prompt")
    try:
        text = tokenizer.apply_chat_template(
            [_message(message) for message in _list(messages)],
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **extra,
        )
    except _TEMPLATE_ERRORS as error:
        if isinstance(error, InvalidRequestError):
            raise
        raise InvalidRequestError(f"the chat template refuses the messages: {error}") from error
    token_ids = codec.encode(text, add_special_tokens=False)
    leading = codec.leading_token_ids
    if leading and token_ids[:1] != leading:
        token_ids = leading + token_ids
    if not token_ids:
        raise InvalidRequestError("the chat template makes an empty prompt of the messages")
    return text, token_ids


def _list(messages: Any) -> Conversation:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InvalidRequestError(f"a conversation is {messages!r}; allowed: a list with at least one message")
    return messages


def _message(message: Any) -> dict[str, Any]:
    """A checked copy with its content as one string."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequestError(f"a message is {message!r}; allowed: a dict with 'role' (a string) and 'content'")
    content = message.get("content")
    if content is None and "tool_calls" not in message:
        raise InvalidRequestError(f"the message {message!r} has no 'content'; allowed: a string, or a list of texts")
    if isinstance(content, (str, type(None))):
        return dict(message)
    if not isinstance(content, Sequence):
        raise InvalidRequestError(f"content is {content!r}; allowed: a string, or a list of texts")
    return {**message, "content": "\n".join(map(_part, content))}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequestError(f"content holds {part!r}; allowed: strings, or {{'type': 'text', 'text': ...}}")
    return part["text"]
