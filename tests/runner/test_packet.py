"""What the host packs is what the device unpacks, bit for bit."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.config import Limits
from jaxserve.runner.config import RunnerConfig
from jaxserve.runner.packet import (
    Fields,
    admission_fields,
    pack_admissions,
    pack_plan,
    packet_len,
    unpack_plan,
)
from jaxserve.sampling.host import host_row, row_spec
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import Admission, StepPlan
from jaxserve.scheduler.request import Choice

LIMITS = Limits(max_stop_token_ids=3, max_logit_bias=2, max_bad_words=2, max_bad_word_len=3, max_logprobs=2)


def make_config(K):
    return RunnerConfig(
        max_num_seqs=5,
        max_model_len=20,
        max_num_batched_tokens=16,
        block_size=4,
        num_blocks=9,
        vocab_size=37,
        max_drafts=K,
        limits=LIMITS,
        token_buckets=((5, 5), (16, 5)),
        row_buckets=(5,),
    )


CONFIGS = {K: make_config(K) for K in (0, 3)}
UNPACK = {K: jax.jit(functools.partial(unpack_plan, config=config)) for K, config in CONFIGS.items()}


@st.composite
def plans(draw, K):
    config = CONFIGS[K]
    num_rows = draw(st.integers(1, config.max_num_seqs))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_updates = draw(st.integers(0, config.max_table_updates))
    return StepPlan(
        step_id=1,
        choices=(),
        slots=rng.permutation(config.max_num_seqs)[:num_rows].astype(np.int32),
        widths=rng.integers(1, 9, num_rows).astype(np.int32),
        num_drafts=rng.integers(0, K + 1, num_rows).astype(np.int32),
        samples=rng.random(num_rows) < 0.5,
        epochs=np.zeros(num_rows, np.int64),
        table_updates=rng.integers(0, 5, (num_updates, 3)).astype(np.int32),
        draft_ids=rng.integers(0, 37, (num_rows, K)).astype(np.int32) if draw(st.booleans()) else None,
    )


@pytest.mark.parametrize("K", [0, 3])
@given(data=st.data())
@settings(deadline=None, max_examples=50)
def test_plans_round_trip(K, data):
    plan, config = data.draw(plans(K)), CONFIGS[K]
    packet = pack_plan(plan, config)
    assert packet.shape == (packet_len(config),) and packet.dtype == np.int32
    rows, drafts, updates = (np.asarray(x) for x in UNPACK[K](packet))
    num_rows, num_updates = len(plan.slots), len(plan.table_updates)
    np.testing.assert_array_equal(
        rows[:, :num_rows], np.stack([plan.slots, plan.widths, plan.num_drafts, plan.samples])
    )
    assert (rows[0, num_rows:] == config.max_num_seqs).all(), "padding rows belong to no slot"
    assert (rows[1:, num_rows:] == 0).all()
    want = np.zeros((num_rows, K)) if plan.draft_ids is None else plan.draft_ids
    np.testing.assert_array_equal(drafts[:num_rows], want)
    np.testing.assert_array_equal(updates[:num_updates], plan.table_updates)
    assert (updates[num_updates:, 0] == config.max_num_seqs).all(), "padding updates belong to no slot"


def test_more_updates_than_a_packet_holds_are_an_error():
    config = CONFIGS[0]
    plan = StepPlan(1, (), *(np.ones(1, np.int32) for _ in range(5)), table_updates=np.zeros((99, 3), np.int32))
    with pytest.raises(ValueError, match="99 block-table updates"):
        pack_plan(plan, config)


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_fields_keep_their_bits(seed):
    """NaN, -0.0 and the largest words included."""
    spec = {"a": ((), np.float32), "b": ((3,), np.uint32), "c": ((2, 2), np.int32), "d": ((4,), np.float32)}
    fields = Fields.of({name: (shape, np.dtype(dtype)) for name, (shape, dtype) in spec.items()})
    assert fields.num_words == 12
    rng = np.random.default_rng(seed)
    rows = [
        {n: rng.integers(-(2**31), 2**31, s, np.int64).astype(np.int32).view(t) for n, (s, t) in spec.items()}
        for _ in range(3)
    ]
    rows[0]["d"] = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    words = np.zeros((3, 12), np.int32)
    for row, out in zip(rows, words, strict=True):
        fields.pack(row, out)
    unpacked = {name: np.asarray(value) for name, value in fields.unpack(jax.numpy.asarray(words)).items()}
    for name, (_, dtype) in spec.items():
        assert unpacked[name].dtype == dtype
        np.testing.assert_array_equal(
            unpacked[name].view(np.int32), np.stack([row[name] for row in rows]).view(np.int32)
        )


def test_admissions_round_trip():
    config = CONFIGS[3]
    fields = admission_fields(config, row_spec(config.vocab_size, LIMITS))
    params = SamplingParams(
        temperature=0.5, top_k=3, logit_bias={7: -2.5}, stop_token_ids=[9], allowed_token_ids=[1, 36]
    )
    choice = Choice(choice_id=1, prompt_token_ids=[4, 5, 6], params=params, seed=2**50 + 3)
    row = host_row(
        params, seed=choice.seed, choice_index=2, eos_token_ids=[2], prompt_len=3, bad_words_ids=[[8, 9]],
        vocab_size=37, limits=LIMITS,
    )  # fmt: skip
    admission = Admission(4, choice, np.array([4, 5, 6, 7, 8], np.int32), 4, np.array([3, 8], np.int32))
    words = pack_admissions([admission], [row], fields, config, 3)
    got = {name: np.asarray(value) for name, value in fields.unpack(jax.numpy.asarray(words)).items()}
    np.testing.assert_array_equal(got["slot"], [4, 5, 5])  # 5 is no slot
    assert (got["tokens_len"][0], got["computed_len"][0]) == (5, 4)
    np.testing.assert_array_equal(got["tokens"][0], [4, 5, 6, 7, 8] + [0] * 15)
    np.testing.assert_array_equal(got["blocks"][0], [3, 8, 0, 0, 0])
    for name, value in row.items():
        np.testing.assert_array_equal(got[name][0], value, err_msg=name)
