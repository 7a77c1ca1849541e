"""Tensor parallelism on virtual CPU devices gives the tokens of one device."""

import jax
import numpy as np
import pytest
from speculation_cases import SMALL as FEW_EXECUTABLES
from tiny_engines import GREEDY, Tiny, generate, ids, preemptions

from jaxserve import SamplingParams

CASES = [
    GREEDY,
    SamplingParams(seed=5, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=6, max_tokens=16, ignore_eos=True),
    SamplingParams(
        temperature=0.9, seed=7, max_tokens=16, repetition_penalty=1.3, presence_penalty=0.3, frequency_penalty=0.2,
        logit_bias={5: 2.0}, min_tokens=3, bad_words=["a"], logprobs=3,
    ),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=2, logprobs=0, ignore_eos=True),
    SamplingParams(seed=8, n=2, max_tokens=9, allowed_token_ids=[*range(40, 131)]),
]  # fmt: skip


def prompts():
    rng = np.random.default_rng(2)
    return [rng.integers(3, 131, n).tolist() for n in (40, 3, 17, 8, 26, 11)]


def logprob_values(outputs):
    """All log-probabilities of all outputs, in order."""
    rows = [row for o in outputs for c in o.outputs for row in c.logprobs or ()]
    rows += [row for o in outputs for row in (o.prompt_logprobs or ())[1:]]
    return [sorted((token, entry.logprob, entry.rank) for token, entry in row.items()) for row in rows]


@pytest.fixture(scope="module")
def alone(tiny):
    """What one device says, by model."""

    def run(name):
        with tiny(name, **FEW_EXECUTABLES).llm() as llm:
            return generate(llm, prompts(), CASES)

    return run


# llama: untied, two KV heads for two devices. dummy: tied tables, 261 ids, and two KV heads for four devices.
# Two devices are also those of test_kv_dtype.py and test_quantization.py (llama) and of test_speculation.py (dummy).
@pytest.mark.parametrize(
    "name, size", [*(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("llama", "dummy")), ("dummy", 4)]
)
def test_the_same_tokens_on_any_number_of_devices(alone, byte_tokenizer_path, name, size):
    want = alone(name)
    engine = Tiny(name, byte_tokenizer_path, **FEW_EXECUTABLES, tensor_parallel_size=size)
    pool = jax.tree.leaves(engine.engine.core.runner._kv)[0]  # [N, 2, Hk, B, D]
    assert [shard.data.shape[2] for shard in pool.addressable_shards] == [1] * size
    with engine.llm() as llm:
        got, again = (generate(llm, prompts(), CASES) for _ in range(2))
    with engine.llm(num_blocks=24, admission_headroom_len=0, max_prefill_chunk_len=7, run_ahead=3) as llm:
        crowded = generate(llm, prompts(), CASES)
        assert preemptions(llm)
    engine.close()
    for outputs in (got, again, crowded):
        assert ids(outputs) == ids(want)
        for mine, its in zip(logprob_values(outputs), logprob_values(want), strict=True):
            assert [(token, rank) for token, _, rank in mine] == [(token, rank) for token, _, rank in its]
            np.testing.assert_allclose([x for _, x, _ in mine], [x for _, x, _ in its], atol=1e-4)
