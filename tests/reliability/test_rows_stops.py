"""Rows 11 to 14: where an answer ends when a step brings several tokens, and what is counted."""

import pytest
from serving import GREEDY, OUTPUT_LEN, generate, idle, ids, knows, serve
from test_planted_bugs import row11_length_is_checked_before_stop, row14_stop_is_looked_for_in_the_last_token_only

from jaxserve.engine.collector import _ChoiceCollector
from jaxserve.scheduler.scheduler import Scheduler


def first_times(answer):
    """(index, token) wherever a token occurs for the first time: there a stop id must end the answer."""
    return [(at, token) for at, token in enumerate(answer) if token not in answer[:at]]


def check_stop_ids(llm, cases, extra=0):
    """Each new token of each answer as a stop id, with ``max_tokens`` that end there or ``extra`` later."""
    work = [(case, at, token) for case in cases for at, token in first_times(case.answer) if at + extra < OUTPUT_LEN]
    params = [GREEDY.with_changes(stop_token_ids=[token], max_tokens=at + 1 + extra) for _, at, token in work]
    outputs = generate(llm, [case.prompt for case, *_ in work], params)
    for (case, at, token), output in zip(work, outputs, strict=True):
        choice = output.outputs[0]
        assert choice.token_ids == case.answer[: at + 1]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", token)


@pytest.mark.parametrize("extra", [0, 1, 3])
def test_row_11_14_a_stop_id_inside_an_accepted_run(engine, cases, extra):
    """Stop beats length at the same token and before it, and nothing of the run's rest gets out."""
    with serve(engine, run_ahead=0) as llm:
        llm.engine.core.runner.draft = knows(cases)  # a looked-up draft holds no token that is new to the answer
        check_stop_ids(llm, cases, extra)
        stats = idle(llm)
        assert stats["num_accepted_tokens"] == stats["num_drafted_tokens"] > 0


def test_row_14_eos_inside_an_accepted_run(engine, cases, monkeypatch):
    """The same for the model's EOS: the engine is told that a token of each answer is its EOS."""
    for case in cases[3:]:
        at, token = first_times(case.answer)[-1]
        with serve(engine, run_ahead=0) as llm:
            llm.engine.core.runner.draft = knows(cases)
            monkeypatch.setattr(llm._builder, "_eos_token_ids", (token,))
            (output,) = generate(llm, [case.prompt], GREEDY.with_changes(ignore_eos=False))
            choice = output.outputs[0]
            assert choice.token_ids == case.answer[: at + 1]
            assert (choice.finish_reason, choice.stop_reason) == ("stop", None)


@pytest.mark.parametrize(
    ("plant", "extra"), [(row11_length_is_checked_before_stop, 1), (row14_stop_is_looked_for_in_the_last_token_only, 3)]
)
def test_row_11_14_are_seen_when_planted(engine, cases, monkeypatch, plant, extra):
    plant(monkeypatch)
    with serve(engine, run_ahead=0) as llm, pytest.raises(AssertionError):
        llm.engine.core.runner.draft = knows(cases)
        check_stop_ids(llm, cases, extra)


def stop_strings(text):
    """Every piece of one to three characters, where it occurs first."""
    pieces = {text[at : at + size] for size in (1, 2, 3) for at in range(len(text) - size + 1)}
    return sorted(piece for piece in pieces if piece.isprintable())


def check_stop_strings(llm, cases, streaming=False):
    for case in cases:
        text = generate(llm, [case.prompt])[0].outputs[0].text
        stops = stop_strings(text)[::3]
        params = [GREEDY.with_changes(stop=stop) for stop in stops]
        if streaming:
            outputs = []
            for settings in params[::2]:
                with llm.stream({"prompt_token_ids": case.prompt}, settings) as stream:
                    pieces = [delta.outputs[0].text for delta in stream]
                    outputs.append(stream.output())
                    assert "".join(pieces) == outputs[-1].outputs[0].text
            stops = stops[::2]
        else:
            outputs = generate(llm, [case.prompt] * len(stops), params)
        for stop, output in zip(stops, outputs, strict=True):
            choice = output.outputs[0]
            assert choice.text == text[: text.index(stop)]
            assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
            assert choice.token_ids == case.answer[: len(choice.token_ids)]
            metrics = output.metrics
            assert metrics.num_generation_tokens == len(choice.token_ids)
            assert metrics.num_accepted_tokens <= metrics.num_drafted_tokens


@pytest.mark.parametrize("streaming", [False, True])
def test_row_12_13_a_stop_string_anywhere_in_a_run(engine, cases, streaming):
    """At its start, in its middle, over its edges: the text is cut there, and usage counts what is returned."""
    with serve(engine, run_ahead=0) as llm:
        llm.engine.core.runner.draft = knows(cases)
        check_stop_strings(llm, cases[4:], streaming)
        assert idle(llm)["num_accepted_tokens"] > 0


def test_row_12_is_seen_where_only_the_newest_text_is_searched(engine, cases, monkeypatch):
    """sglang #23802: the window is the last token of a step, so a match before it is missed."""
    correct = _ChoiceCollector.add

    def add(self, event):
        minimum, self._params = (
            self._params,
            self._params.with_changes(
                min_tokens=max(0, min(len(self.token_ids) + len(event.token_ids) - 1, self._params.max_tokens))
            ),
        )
        try:
            return correct(self, event)
        finally:
            self._params = minimum

    monkeypatch.setattr(_ChoiceCollector, "add", add)
    with serve(engine, run_ahead=0) as llm, pytest.raises((AssertionError, ValueError)):
        llm.engine.core.runner.draft = knows(cases)
        check_stop_strings(llm, cases[4:])


def test_row_13_the_engine_counts_what_it_emits(engine, cases):
    """Completion tokens are ids returned; drafted = accepted + rejected; padding counts nowhere."""
    with serve(engine, run_ahead=0) as llm:
        llm.engine.core.runner.draft = knows(cases)
        params = [GREEDY.with_changes(stop_token_ids=[case.answer[9]]) for case in cases]
        outputs = generate(llm, [case.prompt for case in cases], params)
        stats = idle(llm)
    assert stats["num_emitted_tokens"] == sum(len(o.outputs[0].token_ids) for o in outputs)
    assert stats["num_accepted_tokens"] <= stats["num_drafted_tokens"] <= stats["num_planned_tokens"]
    assert sum(o.metrics.num_drafted_tokens for o in outputs) == stats["num_drafted_tokens"]


def test_row_13_is_seen_where_the_rest_of_a_run_is_counted(engine, cases, monkeypatch):
    correct = Scheduler.commit

    def commit(self, plan, result):
        commits = correct(self, plan, result)
        self.stats.num_emitted_tokens += sum(
            int(result.num_emitted[c.row]) - len(c.new_token_ids) for c in commits if c.row >= 0
        )
        return commits

    monkeypatch.setattr(Scheduler, "commit", commit)
    with pytest.raises(AssertionError):
        test_row_13_the_engine_counts_what_it_emits(engine, cases)


def test_row_51_every_call_has_its_own_ends_and_ids(engine, cases):
    """transformers #42943, #45943: consumers that never finish, ids that are off from the second call on."""
    with serve(engine) as llm:
        seen = set()
        for _ in range(3):
            outputs = generate(llm, [case.prompt for case in cases])
            assert [o.prompt_token_ids for o in outputs] == [case.prompt for case in cases]
            assert [o.outputs[0].token_ids for o in outputs] == [case.answer for case in cases]
            assert seen.isdisjoint(o.request_id for o in outputs)
            seen |= {o.request_id for o in outputs}
            stream = llm.stream({"prompt_token_ids": cases[0].prompt}, GREEDY)
            streamed = [token for delta in stream for token in delta.outputs[0].token_ids]
            assert streamed == cases[0].answer and list(stream) == []
        assert ids(llm, []) == []
