"""The rows of a plan while it is being built."""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler.plan import Admission, StepPlan
from jaxserve.scheduler.request import Choice


class Rows:
    """Collects decode rows, then prefill chunks."""

    __slots__ = (
        "admissions",
        "choices",
        "drafts",
        "num_decodes",
        "num_tokens",
        "samples",
        "step_id",
        "updates",
        "verify_costs",
        "widths",
    )

    def __init__(self, step_id: int) -> None:
        self.step_id = step_id
        self.choices: list[Choice] = []
        self.widths: list[int] = []
        self.samples: list[bool] = []  # of the prefill chunks; a decode row always samples
        self.drafts: list[list[int]] = []  # of the decode rows, where the host proposes
        self.updates: list[tuple[int, int, int]] = []  # slot, index, block
        self.admissions: list[Admission] = []
        self.num_decodes = 0
        self.num_tokens = 0
        self.verify_costs: tuple[float, ...] = ()

    def build(self, host_drafts: int | None) -> StepPlan:
        """The immutable plan; ``host_drafts`` is K where drafts come from the host."""
        num_rows, num_decodes = len(self.choices), self.num_decodes
        widths = np.array(self.widths, np.int32)
        num_drafts = np.zeros(num_rows, np.int32)
        num_drafts[:num_decodes] = widths[:num_decodes] - 1
        samples = np.ones(num_rows, np.bool_)
        samples[num_decodes:] = self.samples
        draft_ids = None
        if host_drafts is not None:
            draft_ids = np.zeros((num_rows, host_drafts), np.int32)
            for row, drafts in enumerate(self.drafts):
                draft_ids[row, : len(drafts)] = drafts
        return StepPlan(
            step_id=self.step_id,
            choices=tuple(self.choices),
            slots=np.array([choice.slot for choice in self.choices], np.int32),
            widths=widths,
            num_drafts=num_drafts,
            samples=samples,
            epochs=np.array([choice.epoch for choice in self.choices], np.int64),
            admissions=tuple(self.admissions),
            table_updates=np.array(self.updates, np.int32).reshape(-1, 3),
            draft_ids=draft_ids,
            verify_costs=self.verify_costs,
        )
