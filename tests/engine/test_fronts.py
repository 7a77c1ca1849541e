"""Two fronts on one engine: what one of them serves is nothing to the other."""

import contextlib

import pytest

from jaxserve import LLM, SamplingParams

PROMPT = list(range(3, 60))
TWO = SamplingParams(n=2, max_tokens=30, temperature=1.0, ignore_eos=True, detokenize=False)


@pytest.fixture
def fronts(tiny):
    """Without prefix caching: blocks are shared by the choices of one request only."""
    with tiny("dummy").llm(enable_prefix_caching=False, run_ahead=1) as one, contextlib.ExitStack() as stack:
        other = LLM.from_engine(one.engine)
        stack.callback(other._finalizer.detach)  # the engine is the first one's
        yield one, other


def test_requests_of_one_id_share_nothing(fronts):
    """Each front counts its own requests, so both of these have the same id."""
    one, other = fronts
    with one.stream({"prompt_token_ids": PROMPT, "cache_salt": "alice"}, TWO) as stream:
        next(stream)
        (theirs,) = other.generate(
            [{"prompt_token_ids": PROMPT, "cache_salt": "bob"}], TWO.with_changes(max_tokens=2), use_tqdm=False
        )
        ours = stream.output()
        assert ours.request_id == theirs.request_id and not ours.finished
        assert theirs.metrics.num_cached_tokens == 0


def test_requests_without_a_seed_differ(fronts):
    said = [front.generate([PROMPT], TWO, use_tqdm=False)[0].outputs[0].token_ids for front in fronts]
    assert said[0] != said[1]
