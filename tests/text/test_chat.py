"""Chat templates: rendered in the sandbox, BOS exactly once, malformed input refused by name."""

import pytest
from fakes import BOS, fast_byte_tokenizer

from jaxserve.errors import InvalidRequestError
from jaxserve.text.chat import render_chat, split_conversations
from jaxserve.text.codec import Codec

CHATML = (
    "{% for m in messages %}{{ '<start>' + m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>assistant:' }}{% endif %}"
)
USER = {"role": "user", "content": "hi"}
MESSAGES = [USER, {"role": "assistant", "content": "yes, "}]


def codec(template=CHATML, **kwargs):
    return Codec(fast_byte_tokenizer(chat_template=template, **kwargs))


def test_a_conversation_becomes_text_and_the_ids_of_that_text():
    c = codec()
    text, ids = render_chat(c, [USER])
    assert text == "<start>user:hi<end><start>assistant:"
    assert ids == c.encode(text, add_special_tokens=False)


def test_the_last_message_can_be_continued():
    text, _ = render_chat(codec(), MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("assistant:yes, ") or text.endswith("assistant:yes,")


def test_a_template_can_be_given_with_variables():
    text, _ = render_chat(
        codec(None), [USER], "{{ mood }}{{ messages[0].content }}", chat_template_kwargs={"mood": ":)"}
    )
    assert text == ":)hi"


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("template", ["<bos>x{{ messages[0].content }}", "x{{ messages[0].content }}"])
def test_bos_comes_exactly_once(template, add_bos):
    _, ids = render_chat(codec(template, add_bos=add_bos), [USER])
    expected = 1 if add_bos or template.startswith("<bos>") else 0
    assert ids.count(BOS) == expected
    assert expected == 0 or ids[0] == BOS


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    text, _ = render_chat(codec(), [{"role": "user", "content": parts}])
    assert "user:one\ntwo<end>" in text


@pytest.mark.parametrize(
    ("messages", "kwargs", "named"),
    [
        ([], {}, "conversation"),
        ("hi", {}, "conversation"),
        (["hi"], {}, "message"),
        ([{"content": "hi"}], {}, "role"),
        ([{"role": "user"}], {}, "content"),
        ([{"role": "user", "content": 3}], {}, "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], {}, "image_url"),
        ([USER], {"continue_final_message": True}, "add_generation_prompt=False"),
        ([USER], {"add_generation_prompt": "no"}, "add_generation_prompt is 'no'; allowed: True, False"),
        ([USER], {"continue_final_message": 1}, "continue_final_message is 1; allowed: True, False"),
        ([USER], {"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
        ([USER], {"chat_template": "{{ raise_exception('roles must alternate') }}"}, "roles must alternate"),
        ([USER], {"chat_template": "{% if %}"}, "chat template"),
        ([USER], {"chat_template": "{{ ''.__class__.__mro__ }}"}, "chat template"),
        ([USER], {"chat_template": "{{ 1 + 'x' }}"}, "chat template"),
        ([USER], {"chat_template": "{{ '' }}"}, "empty"),
        ([USER], {"chat_template": "{{ 1 // 0 }}"}, "the chat template refuses the messages"),
        ([USER], {"chat_template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, "the chat template refuses"),
        ([USER], {"chat_template": "{{ 10.0 ** 400 }}"}, "the chat template refuses the messages"),
        ([USER], {"chat_template": "{{ [][1] + 1 }}"}, "the chat template refuses the messages"),
        ([USER], {"chat_template_kwargs": [1]}, r"chat_template_kwargs is \[1\]; allowed: a dict"),
        ([{"role": "user", "content": "a\ud800"}], {}, "surrogate pair; allowed: Unicode text"),
    ],
)
def test_bad_input_is_refused_by_name(messages, kwargs, named):
    with pytest.raises(InvalidRequestError, match=named):
        render_chat(codec(), messages, **kwargs)


def test_a_model_without_a_template_says_so():
    with pytest.raises(InvalidRequestError, match="no chat template"):
        render_chat(codec(None), [USER])


def test_one_conversation_or_many():
    assert split_conversations([USER]) == [[USER]]
    assert split_conversations([[USER], MESSAGES]) == [[USER], MESSAGES]
    with pytest.raises(InvalidRequestError, match="messages"):
        split_conversations([])
