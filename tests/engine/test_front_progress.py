"""``use_tqdm`` of generate and chat: a bar, none, or whatever the caller's callable makes."""

import functools
import re

import pytest
from fakes import FakeCore, fake_engine
from tqdm.auto import tqdm

from jaxserve import LLM, InvalidRequestError, SamplingParams

MESSAGES = [{"role": "user", "content": "hi"}]
PARAMS = SamplingParams(max_tokens=2)


@pytest.fixture
def core():
    return FakeCore()


@pytest.fixture
def llm(core):
    with LLM.from_engine(fake_engine(core)) as llm:
        yield llm


def generate(llm, use_tqdm):
    return llm.generate(["a", "b", "c"], PARAMS, use_tqdm=use_tqdm)


def chat(llm, use_tqdm):
    return llm.chat([MESSAGES] * 3, PARAMS, use_tqdm)  # vLLM's third


class Bar:
    """The least that a bar may be."""

    def __init__(self, total, desc):
        self.total, self.desc, self.done, self.closed = total, desc, 0, 0

    def update(self, n):
        assert not self.closed
        self.done += n

    def close(self):
        self.closed += 1


@pytest.mark.parametrize("call", [generate, chat])
class TestUseTqdm:
    def test_a_bool_says_whether_a_bar_is_shown(self, llm, capsys, call):
        assert len(call(llm, True)) == 3
        assert re.search("Processed prompts: 100%.* 3/3", capsys.readouterr().err)
        assert len(call(llm, False)) == 3
        assert capsys.readouterr().err == ""

    def test_a_callable_makes_the_bar(self, llm, capsys, call):
        made = []
        assert len(call(llm, lambda **kwargs: made.append(Bar(**kwargs)) or made[-1])) == 3
        (bar,) = made
        assert (bar.total, bar.desc, bar.done, bar.closed) == (3, "Processed prompts", 3, 1)
        assert capsys.readouterr().err == ""

    def test_tqdm_itself_and_a_partial_of_it_are_callables(self, llm, capsys, call):
        call(llm, tqdm)
        assert "3/3" in capsys.readouterr().err
        call(llm, functools.partial(tqdm, unit="answer", ncols=70, bar_format="{n}/{total} {unit}"))
        assert "3/3 answer" in capsys.readouterr().err
        call(llm, lambda **kwargs: tqdm(disable=True, unit="answer", **kwargs))
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("value", [None, 0, 1, "no", {}])
    def test_anything_else_is_refused(self, llm, core, call, value):
        with pytest.raises(
            InvalidRequestError, match=f"use_tqdm is {re.escape(repr(value))}; allowed: True, False, or"
        ):
            call(llm, value)
        assert core.submitted == []

    def test_what_is_no_bar_is_refused(self, llm, core, call):
        with pytest.raises(InvalidRequestError, match=r"use_tqdm made \[\]; allowed: a bar with update\(\) and close"):
            call(llm, lambda **kwargs: [])
        assert core.submitted == []

    def test_where_the_bar_raises_it_is_closed_and_what_still_runs_is_aborted(self, llm, core, call):
        class Wrong(Bar):
            def update(self, n):
                raise ZeroDivisionError

        made = []
        core.pauses, core.reply = True, lambda choice: b"a" if choice.choice_id else b"ab"  # only the first is done
        with pytest.raises(ZeroDivisionError):
            call(llm, lambda **kwargs: made.append(Wrong(**kwargs)) or made[-1])
        assert made[0].closed == 1
        llm.generate("x", SamplingParams(max_tokens=1), use_tqdm=False)  # the engine goes on, and has heard by now
        assert [core.ended[choice_id][0] for choice_id in range(3)] == ["length", "abort", "abort"]


def test_a_bad_prompt_costs_no_bar(llm):
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["a", ""], PARAMS, use_tqdm=lambda **kwargs: pytest.fail("a bar was made"))
