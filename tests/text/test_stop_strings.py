"""Stop strings: found wherever they lie, whatever the pieces of the text are."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.text.stop import StopMatcher


def oracle(text, stops, include=False, free=0):
    """Character by character: the first prefix of the text, longer than ``free``, that ends in a stop string."""
    for end in range(free + 1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            stop = max(hits, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def run(pieces, stops, include=False, search=lambda i: True):
    matcher = StopMatcher(stops, include_stop=include)
    released = []
    for i, piece in enumerate(pieces):
        text, stop = matcher.push(piece, search=search(i))
        released.append(text)
        if stop is not None:
            return released, stop
    return [*released, matcher.flush()], None


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=5), max_size=8), stops=STOPS, include=st.booleans())
def test_the_result_equals_a_search_character_by_character(pieces, stops, include):
    released, stop = run(pieces, stops, include)
    assert ("".join(released), stop) == oracle("".join(pieces), stops, include)


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("abc", min_size=1, max_size=3), max_size=8), stops=STOPS, free=st.integers(0, 4))
def test_matches_that_end_before_min_tokens_dont_count(pieces, stops, free):
    released, stop = run(pieces, stops, search=lambda i: i >= free)
    assert ("".join(released), stop) == oracle("".join(pieces), stops, free=len("".join(pieces[:free])))


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text("abc", max_size=3), max_size=8), stops=STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(pieces, stops):
    matcher, text, out = StopMatcher(stops), "", ""
    for piece in pieces:
        text += piece
        released, stop = matcher.push(piece)
        out += released
        if stop is not None:
            return
        held = text[len(out) :]
        assert held == "" or any(s.startswith(held) and s != held for s in stops)


def test_a_stop_string_across_pieces_is_never_released():
    assert run(["Hello E", "N", "D and more"], ["END"]) == (["Hello ", "", ""], "END")


def test_a_false_alarm_is_released():
    assert run(["E", "N", "T"], ["END"]) == (["", "", "ENT", ""], None)


def test_the_match_that_is_complete_first_wins():
    assert run(["xabcd"], ["abcd", "bc"]) == (["xa"], "bc")
    assert run(["xabc"], ["bc", "abc"]) == (["x"], "abc")


def test_the_stop_string_can_be_kept():
    assert run(["ab", "cd"], ["bc"], include=True) == (["a", "bc"], "bc")
