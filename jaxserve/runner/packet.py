"""One host array a step: a plan as int32 words, and back on the device.

Shape letters: S slots, K draft length, U block-table updates at most, A admissions in one upload, Lmax context, P table
columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.runner.config import RunnerConfig
from jaxserve.scheduler.plan import Admission, StepPlan

ROW_FIELDS = 4  # slot, width, drafts, samples


@dataclass(frozen=True)
class Fields:
    """Names, shapes and 32-bit dtypes of arrays that travel as one row of int32 words."""

    items: tuple[tuple[str, tuple[int, ...], str], ...]

    @classmethod
    def of(cls, spec: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Fields:
        return cls(tuple((name, shape, np.dtype(dtype).name) for name, (shape, dtype) in spec.items()))

    @property
    def num_words(self) -> int:
        return sum(math.prod(shape) for _, shape, _ in self.items)

    def pack(self, values: Mapping[str, np.ndarray], out: np.ndarray) -> None:  # int32[num_words]
        """Writes all fields into ``out``."""
        at = 0
        for name, shape, dtype in self.items:
            size = math.prod(shape)
            out[at : at + size] = np.asarray(values[name], dtype).reshape(size).view(np.int32)
            at += size

    def unpack(self, words: jax.Array) -> dict[str, jax.Array]:  # int32[A, num_words] -> each [A, *shape]
        """The inverse, on the device."""
        fields, at = {}, 0
        for name, shape, dtype in self.items:
            size = math.prod(shape)
            part = words[:, at : at + size].reshape(words.shape[0], *shape)
            fields[name] = jax.lax.bitcast_convert_type(part, jnp.dtype(dtype))
            at += size
        return fields


def packet_len(config: RunnerConfig) -> int:
    """Words in a step's packet."""
    return config.max_num_seqs * (ROW_FIELDS + config.max_drafts) + 3 * config.max_table_updates


def pack_plan(plan: StepPlan, config: RunnerConfig) -> np.ndarray:
    """int32[packet_len]: S slots, S widths, S draft counts, S sample flags, [S, K] drafts, [U, 3] table updates."""
    S, K, U = config.max_num_seqs, config.max_drafts, config.max_table_updates
    num_rows, num_updates = len(plan.slots), len(plan.table_updates)
    if num_updates > U:
        raise ValueError(f"the plan has {num_updates} block-table updates; a packet holds {U}")
    packet = np.zeros(packet_len(config), np.int32)
    rows = packet[: ROW_FIELDS * S].reshape(ROW_FIELDS, S)
    rows[0] = S
    rows[0, :num_rows] = plan.slots
    rows[1, :num_rows] = plan.widths
    rows[2, :num_rows] = plan.num_drafts
    rows[3, :num_rows] = plan.samples
    if plan.draft_ids is not None:
        drafts = packet[ROW_FIELDS * S : (ROW_FIELDS + K) * S].reshape(S, K)
        drafts[:num_rows] = plan.draft_ids
    updates = packet[(ROW_FIELDS + K) * S :].reshape(U, 3)
    updates[:, 0] = S  # dropped
    updates[:num_updates] = plan.table_updates
    return packet


def unpack_plan(
    packet: jax.Array,  # int32[packet_len]
    config: RunnerConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows int32[ROW_FIELDS, S], drafts int32[S, K], updates int32[U, 3]."""
    S, K, U = config.max_num_seqs, config.max_drafts, config.max_table_updates
    at = ROW_FIELDS * S
    return packet[:at].reshape(ROW_FIELDS, S), packet[at : at + K * S].reshape(S, K), packet[at + K * S :].reshape(U, 3)


def admission_fields(config: RunnerConfig, sampling: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Fields:
    """What an admission uploads: where the choice stands, its tokens, its blocks, its sampling settings."""
    i32 = np.dtype(np.int32)
    return Fields.of(
        {
            "slot": ((), i32),
            "tokens_len": ((), i32),
            "computed_len": ((), i32),
            "tokens": ((config.max_model_len,), i32),
            "blocks": ((config.table_width,), i32),
            **sampling,
        }
    )


def pack_admissions(
    admissions: Sequence[Admission],
    rows: Sequence[Mapping[str, np.ndarray]],  # one a choice, of sampling.host.host_row
    fields: Fields,
    config: RunnerConfig,
    size: int,
) -> np.ndarray:
    """int32[size, fields.num_words]; rows past the admissions have slot S, which the device drops."""
    words = np.zeros((size, fields.num_words), np.int32)
    words[:, 0] = config.max_num_seqs
    for out, admission, row in zip(words, admissions, rows, strict=False):
        tokens = np.zeros(config.max_model_len, np.int32)
        tokens[: len(admission.token_ids)] = admission.token_ids
        blocks = np.zeros(config.table_width, np.int32)
        blocks[: len(admission.block_ids)] = admission.block_ids
        where: dict[str, np.ndarray] = {
            "slot": np.array(admission.slot),
            "tokens_len": np.array(len(admission.token_ids)),
            "computed_len": np.array(admission.computed_len),
            "tokens": tokens,
            "blocks": blocks,
        }
        fields.pack({**where, **row}, out)
    return words
