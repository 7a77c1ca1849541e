"""Settings as a user gives them reach the parts that they are for."""

import re
import subprocess
import sys

import numpy as np
import pytest
from tiny_engines import GREEDY, Tiny, generate, ids, preemptions

from jaxserve import LLM, InvalidRequestError, SamplingParams
from jaxserve.engine import build


def test_a_small_pool_and_every_other_setting(byte_tokenizer_path, reference):
    """The one engine whose scheduler is the one that ``build_engine`` made: 24 blocks, two slots, no cache."""
    engine = Tiny(
        "llama", byte_tokenizer_path, num_gpu_blocks_override=24, kv_cache_memory_bytes=None, max_num_seqs=2,
        max_num_batched_tokens=17, enable_prefix_caching=False, scheduling_policy="priority", run_ahead=1,
        default_max_tokens=7, max_output_tokens=60, max_seconds=1000.0, watchdog_seconds=77.0,
    )  # fmt: skip
    core = engine.engine.core
    scheduler = core.scheduler.config
    assert (core.runner.config.num_blocks, scheduler.num_blocks, scheduler.block_size) == (24, 24, 4)
    assert (scheduler.max_num_seqs, scheduler.max_num_batched_tokens, scheduler.max_model_len) == (2, 17, 96)
    assert (scheduler.enable_prefix_caching, scheduler.policy, scheduler.run_ahead) == (False, "priority", 1)
    assert (scheduler.max_seconds, core._patience.seconds) == (1000.0, 77.0)
    oracle = reference("llama")
    prompts = [np.random.default_rng(n).integers(3, 131, n).tolist() for n in (36, 30, 20)]
    params = GREEDY.with_changes(max_tokens=55)
    with LLM.from_engine(engine.engine) as llm:
        outputs = generate(llm, prompts, params, priority=[1, 0, 2])
        assert preemptions(llm)
        for prompt, tokens in zip(prompts, ids(outputs), strict=True):
            want, lead = oracle.follow(prompt, params)
            assert lead > 2e-4 and tokens == want
        open_end = SamplingParams(max_tokens=None, ignore_eos=True)
        assert [len(tokens) for tokens in ids(generate(llm, prompts, open_end))] == [7, 7, 7]
        for wrong, allowed in ((61, r"1\.\.60"), (77, r"1\.\.76")):
            with pytest.raises(InvalidRequestError, match=allowed):
                generate(llm, [prompts[2]], GREEDY.with_changes(max_tokens=wrong))
        assert [o.metrics.num_cached_tokens for o in outputs] == [0, 0, 0]


def test_a_gpu_that_jax_cannot_use_is_said(monkeypatch, caplog):
    monkeypatch.setattr(build.shutil, "which", lambda name: f"/bin/{name}")
    assert build._platform() == "cpu"
    assert re.search(r"an NVIDIA GPU is here, but JAX is CPU-only; pip install .*cuda13", caplog.text)


def test_warnings_are_seen_where_the_program_configures_no_logging():
    """Python shows them on stderr by itself, unless a library's handler takes them."""
    warn = "import logging, jaxserve; logging.getLogger('jaxserve').warning('no speculation')"
    shown = subprocess.run([sys.executable, "-c", warn], capture_output=True, text=True, timeout=60)
    assert (shown.returncode, shown.stderr) == (0, "no speculation\n")
