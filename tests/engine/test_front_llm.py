"""LLM as its users see it, on a fake core: order, text, stops, streams, aborts, deaths."""

import pickle
import threading
import time

import pytest
from core_world import until, when_waiting
from fakes import EOS, ByteTokenizer, FakeCore, fake_engine, few_letters, letters

from jaxserve import LLM, EngineDeadError, InvalidRequestError, SamplingParams


@pytest.fixture
def make():
    """Builds LLMs on fake engines and closes them."""
    made = []

    def make(core=None, **kwargs):
        made.append(LLM.from_engine(fake_engine(core, **kwargs)))
        return made[-1]

    yield make
    for llm in made:
        llm.close()


def says(text):
    """A model that says ``text`` and then EOS."""
    return lambda choice: [*text.encode(), EOS]


def generate(llm, prompts, params=None, **kwargs):
    return llm.generate(prompts, params, use_tqdm=False, **kwargs)


def test_outputs_come_in_the_order_of_the_prompts(make):
    llm = make()
    prompts = [f"prompt {i}" for i in range(20)]
    params = [SamplingParams(max_tokens=1 + (7 * i) % 20) for i in range(20)]
    outputs = generate(llm, prompts, params)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert all(bytes(o.outputs[0].token_ids).decode() == o.outputs[0].text for o in outputs)


@pytest.mark.parametrize("tokens_per_step", [1, 3, 50])
def test_eos_ends_the_text_and_is_in_the_token_ids(make, tokens_per_step):
    llm = make(FakeCore(says("héllo"), tokens_per_step=tokens_per_step))
    (output,) = generate(llm, "x", SamplingParams(max_tokens=30, skip_special_tokens=False))
    choice = output.outputs[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("héllo", "stop", None)
    assert choice.token_ids == [*"héllo".encode(), EOS]


@pytest.mark.parametrize("tokens_per_step", [1, 2, 7, 50])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_stop_string_ends_at_the_same_token_whatever_a_step_emits(make, tokens_per_step, streaming):
    llm = make(FakeCore(says("one two three four"), tokens_per_step=tokens_per_step))
    params = SamplingParams(max_tokens=30, stop=["three", "four"], logprobs=1)
    if streaming:
        deltas = list(llm.stream("x", params))
        text = "".join(d.outputs[0].text for d in deltas)
        ids = [i for d in deltas for i in d.outputs[0].token_ids]
        rows = sum(len(d.outputs[0].logprobs) for d in deltas)
        end, metrics = deltas[-1].outputs[0], deltas[-1].metrics
    else:
        (output,) = generate(llm, "x", params)
        end, metrics = output.outputs[0], output.metrics
        text, ids, rows = end.text, end.token_ids, len(end.logprobs)
    assert (text, end.finish_reason, end.stop_reason) == ("one two ", "stop", "three")
    assert bytes(ids) == b"one two three"  # nothing of what the step emitted after it
    assert rows == len(ids) == metrics.num_generation_tokens
    until(lambda: llm.engine.core.num_running == 0)


def test_the_core_learns_of_a_stop_string(make):
    core = FakeCore(lambda choice: list(b"abcdef"), step_seconds=0.001, pauses=True)
    generate(make(core), "x", SamplingParams(max_tokens=40, stop="cd"))
    until(lambda: core.ended)
    assert list(core.ended.values())[0][:2] == ("stop", "cd")


def test_stop_strings_wait_for_min_tokens(make):
    llm = make(FakeCore(says("a.b.c.d")))
    (output,) = generate(llm, "x", SamplingParams(max_tokens=30, stop=".", min_tokens=3))
    assert output.outputs[0].text == "a.b"
    (output,) = generate(llm, "x", SamplingParams(max_tokens=30, stop="."))
    assert output.outputs[0].text == "a"


def test_a_stop_string_can_be_kept(make):
    llm = make(FakeCore(says("one two three")))
    (output,) = generate(llm, "x", SamplingParams(max_tokens=30, stop="two", include_stop_str_in_output=True))
    assert output.outputs[0].text == "one two"


def test_a_stop_token_id_is_the_reason_and_not_in_the_text(make):
    llm = make(FakeCore(says("ab!cd")))
    (output,) = generate(llm, "x", SamplingParams(max_tokens=30, stop_token_ids=[ord("!")]))
    choice = output.outputs[0]
    assert (choice.text, choice.token_ids, choice.stop_reason) == ("ab", [*b"ab!"], ord("!"))
    (output,) = generate(
        llm, "x", SamplingParams(max_tokens=30, stop_token_ids=[ord("!")], include_stop_str_in_output=True)
    )
    assert output.outputs[0].text == "ab!"


def test_without_detokenize_there_is_no_text(make):
    (output,) = generate(make(), "x", SamplingParams(max_tokens=5, detokenize=False))
    assert output.outputs[0].text == ""
    assert len(output.outputs[0].token_ids) == 5


def test_without_a_tokenizer_ids_come_and_go():
    engine = fake_engine()
    engine.tokenizer = None
    with LLM.from_engine(engine) as llm:
        params = SamplingParams(max_tokens=3, detokenize=False, logprobs=1)
        (output,) = generate(llm, [1, 2], params)
        assert len(output.outputs[0].token_ids) == 3 and output.outputs[0].text == ""
        assert {entry.decoded_token for row in output.outputs[0].logprobs for entry in row.values()} == {None}
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            generate(llm, "hello", params)
        with pytest.raises(InvalidRequestError, match="detokenize is True"):
            generate(llm, [1, 2], SamplingParams())
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            generate(llm, [1, 2], params.with_changes(bad_words=["x"]))
        with pytest.raises(InvalidRequestError, match="no tokenizer"):
            llm.chat([{"role": "user", "content": "hi"}])


def test_n_choices_differ_and_come_by_index(make):
    (output,) = generate(make(), "x", SamplingParams(n=4, max_tokens=8))
    assert [c.index for c in output.outputs] == [0, 1, 2, 3]
    assert len({c.text for c in output.outputs}) == 4


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(make):
    llm, params = make(), SamplingParams(seed=7, max_tokens=8)
    alone = generate(llm, "x", params)[0].outputs[0].text
    assert generate(llm, ["y", "x", "z"], params)[1].outputs[0].text == alone


def test_logprobs_hold_the_chosen_token_and_the_most_likely(make):
    llm = make(FakeCore(says("ab")))
    (output,) = generate(llm, "xyz", SamplingParams(max_tokens=2, logprobs=2, prompt_logprobs=1))
    choice = output.outputs[0]
    first = choice.logprobs[0]
    assert list(first) == [ord("a"), 0, 1]
    assert (first[ord("a")].rank, first[ord("a")].decoded_token, first[1].rank) == (98, "a", 2)
    assert choice.cumulative_logprob == pytest.approx(-(97 + 98) / 100)
    assert output.prompt_logprobs[0] is None
    assert [next(iter(row)) for row in output.prompt_logprobs[1:]] == [ord("y"), ord("z")]


def test_the_chosen_token_is_not_listed_twice(make):
    llm = make(FakeCore(lambda choice: [1, 0]))
    (output,) = generate(llm, "x", SamplingParams(max_tokens=2, logprobs=2))
    assert [list(row) for row in output.outputs[0].logprobs] == [[1, 0], [0, 1]]
    (output,) = generate(llm, "x", SamplingParams(max_tokens=2, logprobs=0))
    assert [list(row) for row in output.outputs[0].logprobs] == [[1], [0]]


def test_nothing_is_admitted_where_one_prompt_is_bad(make):
    core = FakeCore()
    llm = make(core)
    with pytest.raises(InvalidRequestError, match="empty"):
        generate(llm, ["good", "", "good"])
    with pytest.raises(InvalidRequestError, match="sampling_params has 1 entries for 2 prompts"):
        generate(llm, ["a", "b"], [SamplingParams()])
    with pytest.raises(InvalidRequestError, match="priority has 3 entries"):
        generate(llm, ["a", "b"], priority=[0, 0, 0])
    with pytest.raises(InvalidRequestError, match="sampling_params is a dict"):
        generate(llm, ["a", "b"], {"temperature": 0})
    assert core.submitted == []
    assert generate(llm, "fine")[0].finished


def test_no_prompts_no_outputs(make):
    assert generate(make(), []) == []


def test_defaults_of_the_model_apply_where_no_params_are_given(make):
    core = FakeCore()
    llm = make(core, sampling_defaults={"temperature": 0.6, "top_p": 0.9})
    generate(llm, "x")
    assert (core.submitted[0].params.temperature, core.submitted[0].params.top_p) == (0.6, 0.9)
    assert llm.get_default_sampling_params().temperature == 0.6


def test_chat_renders_the_conversation(make):
    llm = make()
    message = {"role": "user", "content": "hi"}
    (output,) = llm.chat([message], SamplingParams(max_tokens=3), use_tqdm=False)
    assert output.prompt == "user: hi\nassistant: "
    outputs = llm.chat([[message], [message, message]], SamplingParams(max_tokens=3), use_tqdm=False)
    assert [o.prompt.count("hi") for o in outputs] == [1, 2]


def test_deltas_join_to_the_output(make):
    text = "naïve café 😀 done"
    llm = make(FakeCore(says(text)))
    stream = llm.stream("x", SamplingParams(max_tokens=40))
    deltas = list(stream)
    assert "".join(d.outputs[0].text for d in deltas) == text == stream.output().outputs[0].text
    assert not any("\ufffd" in d.outputs[0].text for d in deltas)
    assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert [i for d in deltas for i in d.outputs[0].token_ids] == [*text.encode(), EOS]


def test_a_choice_has_a_method_and_a_request_an_attribute_that_says_whether_it_is_finished(make):
    stream = make(FakeCore(lambda choice: [97, EOS][: choice.index + 1], pauses=True)).stream("x", SamplingParams(n=2))
    while not any(choice.finished() for choice in stream.output().outputs):
        next(stream)
    output = stream.output()
    assert (output.finished, [choice.finished() for choice in output.outputs]) == (False, [False, True])
    stream.close()
    output = stream.output()
    assert (output.finished, [choice.finished() for choice in output.outputs]) == (True, [True, True])


def test_deltas_of_n_choices_join_to_each_output(make):
    llm = make()
    params = SamplingParams(n=3, seed=1, max_tokens=9)
    texts = ["", "", ""]
    for delta in llm.stream("x", params):
        for choice in delta.outputs:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in generate(llm, "x", params)[0].outputs]


def test_a_stream_is_checked_at_once(make):
    llm = make()
    with pytest.raises(InvalidRequestError, match="logprobs"):
        llm.stream("x", SamplingParams(logprobs=99))
    with pytest.raises(InvalidRequestError, match="2 prompts"):
        llm.stream(["a", "b"])


def test_priorities_are_checked_before_anything_is_admitted(make):
    core = FakeCore()
    llm = make(core, scheduling_policy="priority")
    for priority in ("high", 1.5, float("nan"), [0, 1.5], [0, "high"], [True, 0]):
        with pytest.raises(InvalidRequestError, match="priority is "):
            generate(llm, ["a", "b"], priority=priority)
    with pytest.raises(InvalidRequestError, match="priority is 1.5"):
        llm.stream("x", priority=1.5)
    with pytest.raises(InvalidRequestError, match="priority is 'high'"):
        llm.chat_stream([{"role": "user", "content": "x"}], priority="high")
    assert core.submitted == []


def test_a_stream_keeps_the_priority_of_its_params(make):
    core = FakeCore()
    llm = make(core, scheduling_policy="priority")
    params = SamplingParams(priority=-3, max_tokens=2)
    list(llm.stream("x", params))
    list(llm.chat_stream([{"role": "user", "content": "x"}], params))
    list(llm.stream("x", params, priority=0))
    assert [choice.priority for choice in core.submitted] == [-3, -3, 0]


def test_closing_a_stream_aborts_its_request_and_no_other(make):
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)
    llm = make(core, max_model_len=4096)
    with llm.stream("x", SamplingParams(max_tokens=4000)) as stream:
        next(stream)
    until(lambda: core.num_running == 0)
    assert core.ended[core.submitted[0].choice_id][0] == "abort"
    assert list(stream) == []
    assert generate(llm, "y", SamplingParams(max_tokens=3))[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("by_another_thread", [False, True])
def test_a_closed_streams_output_says_that_it_was_aborted(make, by_another_thread):
    core = FakeCore(lambda choice: b"one tw", step_seconds=0.001, pauses=True)
    stream = make(core).stream("x", SamplingParams(max_tokens=40, stop="two", n=2))
    assert not next(stream).finished
    if by_another_thread:  # while this one waits for a token that doesn't come
        finish = core.finish
        core.finish = lambda *args: (finish(*args), time.sleep(0.05))  # of one choice is heard before the other's ends
        while any(choice.text != "one " for choice in stream.output().outputs):
            next(stream)
        closer = when_waiting(stream.close, lambda: all(len(c.token_ids) == 6 for c in stream.output().outputs))
        deltas = list(stream)
        assert deltas[-1].finished and {choice.finish_reason for choice in deltas[-1].outputs} == {"abort"}
        closer.join()
    stream.close()
    output = stream.output()
    assert output.finished and output.metrics.finished_time >= output.metrics.arrival_time
    for choice in output.outputs:
        assert choice.finish_reason == "abort" and choice.finished()
        assert choice.text == bytes(choice.token_ids).decode()  # what might have become a stop string included
    stream.close()
    assert stream.output() == output


def test_a_finished_streams_output_keeps_its_reason_when_it_is_closed(make):
    stream = make().stream("x", SamplingParams(max_tokens=3))
    list(stream)
    stream.close()
    assert stream.output().outputs[0].finish_reason == "length"


def test_the_output_of_a_stream_says_that_the_engine_died(make):
    core = FakeCore(lambda choice: b"one", pauses=True)
    stream = make(core).stream("x", SamplingParams(max_tokens=40))
    next(stream)
    core.fail(ValueError("device lost"))
    with pytest.raises(EngineDeadError):
        list(stream)
    assert stream.output().outputs[0].finish_reason == "error"


def test_dropping_a_stream_aborts_its_request(make):
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)
    stream = make(core, max_model_len=4096).stream("x", SamplingParams(max_tokens=4000))
    next(stream)
    del stream
    until(lambda: core.num_running == 0)


def test_a_stream_keeps_its_llm_alive():
    stream = LLM.from_engine(fake_engine(FakeCore(step_seconds=0.001))).stream("x", SamplingParams(max_tokens=30))
    assert list(stream)[-1].outputs[0].finish_reason == "length"
    core = stream._owner.engine.core
    del stream
    with pytest.raises(EngineDeadError):
        core.check_health()


def test_two_threads_get_their_own_outputs(make):
    llm = make()
    expected = {p: generate(llm, p, SamplingParams(seed=3, max_tokens=20))[0].outputs[0].text for p in "abcd"}
    got = {}

    def work(prompt):
        for _ in range(10):
            got.setdefault(prompt, set()).add(
                generate(llm, prompt, SamplingParams(seed=3, max_tokens=20))[0].outputs[0].text
            )

    threads = [threading.Thread(target=work, args=(p,)) for p in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {p: {text} for p, text in expected.items()}


@pytest.mark.parametrize("silently", [False, True])
def test_a_dead_engine_tells_every_waiting_caller_and_every_later_one(make, silently):
    core = FakeCore(few_letters, step_seconds=0.001, pauses=True)
    llm = make(core, max_model_len=4096)
    raised = []

    def work():
        try:
            generate(llm, "x", SamplingParams(max_tokens=4000))
        except EngineDeadError as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: core.num_running == 3)
    core.fail(ValueError("device lost"), silently=silently)
    for thread in threads:
        thread.join(10)
    assert len(raised) == 3 and len(set(map(id, raised))) == 3
    assert all("device lost" in str(error) and isinstance(error.__cause__, ValueError) for error in raised)
    with pytest.raises(EngineDeadError):
        generate(llm, "x")
    with pytest.raises(EngineDeadError):
        llm.stream("x")


def test_a_closed_llm_refuses(make):
    with make() as llm:
        pass
    for call in (generate, LLM.stream):
        with pytest.raises(EngineDeadError, match="^the engine was shut down; build another LLM or AsyncEngine"):
            call(llm, "x")


def test_params_and_outputs_pickle(make):
    params = SamplingParams(stop="x", logit_bias={3: 1.0}, logprobs=2, seed=1)
    assert pickle.loads(pickle.dumps(params)) == params
    outputs = generate(make(), ["a", "b"], params)
    assert pickle.loads(pickle.dumps(outputs)) == outputs


def test_text_is_decoded_once_where_nobody_needs_it_earlier(make):
    class Counting(ByteTokenizer):
        num_decodes = 0

        def decode(self, token_ids, skip_special_tokens=False):
            self.num_decodes += 1
            return super().decode(token_ids, skip_special_tokens)

    tokenizer = Counting()
    llm = make(tokenizer=tokenizer)
    (output,) = generate(llm, "hello", SamplingParams(max_tokens=50))
    assert tokenizer.num_decodes == 2  # the prompt's tail, and all of it
    assert len(output.outputs[0].text) == 50


def test_metrics_tell_when_things_happened(make):
    before = time.monotonic()
    (output,) = generate(make(FakeCore(step_seconds=0.001)), "x", SamplingParams(max_tokens=5))
    m = output.metrics
    assert before <= m.arrival_time <= m.first_token_time < m.finished_time <= time.monotonic()
    assert (m.num_generation_tokens, m.num_cached_tokens, output.num_cached_tokens) == (5, 0, 0)
    assert m.time_to_first_token == m.first_token_time - m.arrival_time


def test_the_fake_model_depends_on_prompt_seed_and_index_only(make):
    core = FakeCore()
    generate(make(core), ["a", "a"], SamplingParams(seed=1, max_tokens=8))
    assert letters(core.submitted[0]) == letters(core.submitted[1])
