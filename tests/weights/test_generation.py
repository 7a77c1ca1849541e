"""EOS ids and sampling defaults of generation_config.json."""

import pytest

from jaxserve.errors import CheckpointError
from jaxserve.weights.generation import check_eos_ids, eos_ids, sampling_defaults, union


def test_eos_ids():
    assert eos_ids({"eos_token_id": 2}, "x") == (2,)
    assert eos_ids({"eos_token_id": [1, 106]}, "x") == (1, 106)
    assert eos_ids({"eos_token_id": None}, "x") == eos_ids({}, "x") == ()
    assert union((3, 1), (1, 2), ()) == (3, 1, 2)


@pytest.mark.parametrize("value", ["</s>", -1, [1, None], True, 1.5])
def test_bad_eos_ids_are_named(value):
    with pytest.raises(CheckpointError, match="eos_token_id of 'generation_config.json' is"):
        eos_ids({"eos_token_id": value}, "generation_config.json")


def test_sampling_defaults_are_those_of_the_file():
    written = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "pad_token_id": 0, "min_p": None}
    assert sampling_defaults(written, "x") == {"temperature": 0.6, "top_k": 20, "top_p": 0.95}
    assert sampling_defaults({}, "x") == {}


def test_do_sample_false_is_greedy():
    written = {"do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    assert sampling_defaults(written, "x") == {"temperature": 0.0, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_k", "many"),
        ("top_k", 1.5),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
    ],
)
def test_defaults_that_no_request_may_have_are_named(name, value):
    with pytest.raises(CheckpointError, match=f"^'x' has a sampling default .*: {name} is {value!r}; allowed: "):
        sampling_defaults({name: value}, "x")


def test_eos_ids_are_in_the_vocabulary():
    check_eos_ids((0, 9), 10, "x")
    with pytest.raises(CheckpointError, match=r"eos_token_id 10 of 'x' is outside the vocabulary; expected 0\.\.9"):
        check_eos_ids((0, 10), 10, "x")
