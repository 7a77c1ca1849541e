"""The device has whole buckets of slots, whatever number of choices may run at once; and where layers are fused."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny_engines import GOLDEN, SMALL, generate, ids

from jaxserve import LLM, SamplingParams
from jaxserve.config import EngineConfig
from jaxserve.engine.describe import _layers
from jaxserve.engine.design import _gpu
from jaxserve.models.fused import GPU
from jaxserve.runner import buckets


def test_more_slots_than_choices(monkeypatch, reference):
    """As on a GPU, where the smallest bucket is 8: three choices at most, which get the first slots of eight.

    A step may have fewer tokens than there are slots.
    """
    monkeypatch.setitem(buckets._SIZES, "cpu", (8, 2, 8))
    settings = {**SMALL, "max_num_seqs": 3, "max_num_batched_tokens": 5}
    prompts = [list(range(5, 5 + n)) for n in (3, 17, 30, 8, 1, 12, 40)]
    params = [
        SamplingParams(temperature=0.7 if n % 2 else 0, seed=n, max_tokens=9, ignore_eos=True, detokenize=False)
        for n in range(len(prompts))
    ]
    with LLM(str(GOLDEN / "tiny" / "llama"), skip_tokenizer_init=True, **settings) as llm:
        core = llm.engine.core
        assert core.runner.config.row_buckets == (8,)
        assert core.scheduler.config.max_num_seqs == llm.engine.info["max_num_seqs"] == 3
        assert core.scheduler.config.max_num_batched_tokens == 5
        got = ids(generate(llm, prompts, params))
        used = np.flatnonzero(np.asarray(core.runner._slots.tokens_len))
    assert got == [reference("llama").follow(p, s)[0] for p, s in zip(prompts, params, strict=True)]
    assert used.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("platform", "most", "slots"), [("cpu", 3, 3), ("gpu", 1, 8), ("gpu", 12, 16), ("gpu", 256, 256)]
)
def test_slots_are_whole_smallest_buckets(platform, most, slots):
    assert buckets.num_slots(most, platform) == slots
    assert all(size % 8 == 0 for size in buckets.row_buckets(slots, platform)) or platform == "cpu"


def test_what_an_engine_says_of_its_layers():
    def says(fused, *sizes):
        executables = SimpleNamespace(forward={(size, 8): None for size in sizes})
        model = SimpleNamespace(fused=fused, launches=lambda size: 1 if size <= 16 else 4 * (size <= 64))
        return _layers(model, executables)

    assert says("the device is a CPU", 8, 64) == "XLA's products: the device is a CPU"
    assert says(None, 128, 256) == "XLA's products: no step is small enough"
    one, four = "in one launch each in steps of 8 or 16 tokens", "in four launches each in steps of 64 tokens"
    assert says(None, 16, 8) == f"all but the last {one}, padding included"
    assert says(None, 64, 128) == f"all but the last {four}, padding included"
    assert says(None, 64, 16, 8, 256) == f"all but the last {one}, {four}, padding included"


HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0", core_count=132)


@pytest.mark.parametrize(
    ("changes", "implementation", "device", "shards", "drafts", "expected"),
    [
        ({}, "pallas_gpu", HOPPER, 1, False, GPU("9.0", 132)),
        ({}, "xla", HOPPER, 1, False, "attention is xla"),
        ({}, "pallas_gpu", HOPPER, 2, False, "2 devices share a layer"),
        ({"quantization": "int8"}, "pallas_gpu", HOPPER, 1, False, "weights are int8"),
        ({}, "pallas_gpu", HOPPER, 1, True, "two models' launches could wait for each other"),
        ({}, "xla", SimpleNamespace(platform="cpu"), 1, False, "the device is a CPU"),
    ],
)
def test_which_models_have_a_gpu_to_themselves(changes, implementation, device, shards, drafts, expected):
    config = EngineConfig(model="m", **changes)
    assert _gpu(config, implementation, device, shards, drafts=drafts) == expected
