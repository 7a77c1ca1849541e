"""Slots: an admission leaves nothing of what was there; staging touches what the plan names and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_packet import CONFIGS, LIMITS

from jaxserve.runner.config import NgramConfig
from jaxserve.runner.packet import admission_fields, pack_admissions, pack_plan
from jaxserve.runner.state import init_slots
from jaxserve.runner.step import admit, stage
from jaxserve.sampling.host import host_row, row_spec
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduler.plan import Admission, StepPlan
from jaxserve.scheduler.request import Choice

CONFIG = CONFIGS[3]
FIELDS = admission_fields(CONFIG, row_spec(CONFIG.vocab_size, LIMITS))
ADMIT = jax.jit(functools.partial(admit, fields=FIELDS))
PARAMS = SamplingParams(temperature=0.7, min_p=0.1, stop_token_ids=[5], logit_bias={3: 1.0}, min_tokens=2)


def poisoned(seed=0):
    """A state of random bits: NaNs, huge indices, negative lengths."""
    rng = np.random.default_rng(seed)

    def poison(leaf):
        if leaf.dtype == bool:
            return jnp.asarray(rng.random(leaf.shape) < 0.5)
        return jnp.asarray(rng.integers(-(2**31), 2**31, leaf.shape).astype(np.int32).view(leaf.dtype))

    return jax.tree.map(poison, init_slots(CONFIG))


def admissions(*slots):
    """Words that admit a choice of its own to each of the slots."""
    made, rows = [], []
    for slot in slots:
        tokens = np.arange(3 + slot, 9 + 2 * slot, dtype=np.int32)
        choice = Choice(choice_id=slot, prompt_token_ids=tokens[:4].tolist(), params=PARAMS)
        made.append(Admission(slot, choice, tokens, 4 * (slot % 2), np.arange(slot, slot + 3, dtype=np.int32)))
        rows.append(
            host_row(
                PARAMS, seed=slot, choice_index=0, eos_token_ids=[2], prompt_len=4, bad_words_ids=[[slot]],
                vocab_size=37, limits=LIMITS,
            )
        )  # fmt: skip
    return pack_admissions(made, rows, FIELDS, CONFIG, 4)


def slot_leaves(state):
    """Name -> array with the slots in front; the staged plan isn't a slot's."""
    fields = dataclasses.replace(state, plan=None, block_table=state.block_table[0])
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).view(np.int32) for path, leaf in jax.tree.leaves_with_path(fields)
    }


def test_an_admission_leaves_nothing_of_a_poisoned_slot():
    clean = slot_leaves(ADMIT(init_slots(CONFIG), admissions(1, 4, 2)))
    for seed in range(3):
        dirty = slot_leaves(ADMIT(poisoned(seed), admissions(1, 4, 2)))
        assert len(clean) == len(dirty) > 15
        for name, want in clean.items():
            np.testing.assert_array_equal(dirty[name][[1, 4, 2]], want[[1, 4, 2]], err_msg=name)


def test_an_admission_touches_its_slots_only():
    before = poisoned()
    after = slot_leaves(ADMIT(before, admissions(3)))
    for name, was in slot_leaves(before).items():
        np.testing.assert_array_equal(after[name][[0, 1, 2, 4]], was[[0, 1, 2, 4]], err_msg=name)
    nobody = slot_leaves(ADMIT(before, pack_admissions([], [], FIELDS, CONFIG, 4)))
    for name, was in slot_leaves(before).items():
        np.testing.assert_array_equal(nobody[name], was, err_msg=name)


def make_plan(**changes):
    plan = {
        "step_id": 0,
        "choices": (),
        "slots": np.array([2, 0], np.int32),
        "widths": np.array([4, 1], np.int32),
        "num_drafts": np.array([3, 0], np.int32),
        "samples": np.array([True, True]),
        "epochs": np.zeros(2, np.int64),
        "table_updates": np.array([[2, 1, 7], [0, 4, 8]], np.int32),
    }
    return StepPlan(**{**plan, **changes})


def test_staging_writes_the_plan_and_the_table_and_nothing_else():
    before = poisoned()
    plan = make_plan(draft_ids=np.array([[5, 6, 7], [0, 0, 0]], np.int32))
    after = jax.jit(functools.partial(stage, config=CONFIG))(before, pack_plan(plan, CONFIG))
    was, now = slot_leaves(before), slot_leaves(after)
    was[".block_table"] = was[".block_table"].copy()
    was[".block_table"][2, 1], was[".block_table"][0, 4] = 7, 8
    for name in was:
        np.testing.assert_array_equal(now[name], was[name], err_msg=name)
    np.testing.assert_array_equal(after.plan.slots, [2, 0, 5, 5, 5])
    np.testing.assert_array_equal(after.plan.widths, [4, 1, 0, 0, 0])
    np.testing.assert_array_equal(after.plan.num_drafts, [3, 0, 0, 0, 0])
    np.testing.assert_array_equal(after.plan.samples, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(after.plan.drafts[:2], plan.draft_ids)


@pytest.mark.parametrize("cap", [0, 1, 3])
def test_drafts_looked_up_on_the_device_shorten_the_width(cap):
    """Slot 2 repeats 7 8 9: after 8 comes 9 7 8. Slot 0 repeats nothing. The plan's counts are caps."""
    config = dataclasses.replace(CONFIG, ngram=NgramConfig(min_len=1, max_len=2))
    state = init_slots(CONFIG)
    tokens = np.zeros((5, 20), np.int32)
    tokens[2, :6] = [1, 7, 8, 9, 7, 8]
    tokens[0, :4] = [1, 2, 3, 4]
    state = dataclasses.replace(state, tokens=jnp.asarray(tokens), tokens_len=jnp.array([4, 0, 6, 0, 0]))
    plan = make_plan(widths=np.array([1 + cap, 1 + cap], np.int32), num_drafts=np.array([cap, cap], np.int32))
    after = jax.jit(functools.partial(stage, config=config))(state, pack_plan(plan, CONFIG))
    np.testing.assert_array_equal(after.plan.num_drafts, [cap, 0, 0, 0, 0])
    np.testing.assert_array_equal(after.plan.widths, [1 + cap, 1, 0, 0, 0])
    np.testing.assert_array_equal(after.plan.drafts[0, :cap], [9, 7, 8][:cap])
