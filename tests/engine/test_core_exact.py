"""The step is right: an engine says what dense attention over the whole prefix says, token by token."""

import numpy as np
import pytest
from tiny_engines import FAMILIES, GREEDY, generate, ids

LEAD = 2e-4  # rounding moves these logits by 1e-5; a smaller lead may go either way


def prompts_for(reference, count=5, seed=0):
    """The golden prompt, and random ones of other lengths."""
    rng = np.random.default_rng(seed)
    lengths = [1, 50, 7, 30][: count - 1]
    return [reference.prompt, *(rng.integers(3, reference.vocab_size, n).tolist() for n in lengths)]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_are_those_of_dense_attention(tiny, reference, name):
    """Five prompts in four slots, in chunks (13 tokens a step), decodes and prefills mixed."""
    oracle = reference(name)
    prompts = prompts_for(oracle)
    with tiny(name).llm(max_num_batched_tokens=13) as llm:
        outputs = generate(llm, prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        want, lead = oracle.follow(prompt, GREEDY)
        assert lead > LEAD, "this prompt can't tell right from wrong; take another"
        assert output.outputs[0].token_ids == want


@pytest.mark.parametrize("name", FAMILIES)
def test_the_first_id_is_the_one_of_transformers(tiny, reference, name):
    oracle = reference(name)
    cuts = range(1, len(oracle.prompt) + 1, 4)
    with tiny(name).llm() as llm:
        outputs = generate(llm, [oracle.prompt[:n] for n in cuts], GREEDY.with_changes(max_tokens=1))
    assert ids(outputs) == [[int(oracle.hf_logits[n - 1].argmax())] for n in cuts]
