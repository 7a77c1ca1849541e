"""How long a draft a choice may get: the adaptive K. The rule is pure functions; ``DraftLen`` is a choice under it.

A step with k drafts costs ``1 + k * token_cost`` one-token steps, and emits ``1 + p + p^2 + ... + p^k`` tokens in the
mean, where p is the chance that a draft token is accepted, given that those before it were. ``choose_draft_len``
takes the k with the most tokens per cost. p is measured over windows of ``window`` verify steps; a draft that wasn't
found counts as a failure, because the step was as wide as if it had been. A choice whose best k is 0 pauses for
``first_pause`` steps, then probes with a short window; each failed probe doubles the pause up to ``max_pause``, a
successful one resets it. Apart from that, ``compute_bound_cap`` cuts all drafts of a step whose GEMMs would become
compute-bound, where a wasted draft isn't free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from jaxserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdaptiveDrafts:
    """Constants of the rule.

    Attributes:
        token_cost: what one more token in a row costs, as a share of a one-token step; of the machine and the drafter.
        compute_bound_tokens: decode and verify tokens of a step from which more tokens cost as much as they bring.
        window: verify steps over which acceptance is measured.
        probe_window: the same after a pause.
        first_pause: steps without drafts after the first window that didn't pay.
        max_pause: longest pause.
    """

    token_cost: float = 0.03
    compute_bound_tokens: int = 512
    window: int = 8
    probe_window: int = 2
    first_pause: int = 16
    max_pause: int = 256

    def __post_init__(self) -> None:
        if not self.token_cost >= 0.0:
            raise ConfigError(f"token_cost is {self.token_cost!r}; allowed: a number of at least 0")
        if not 1 <= self.probe_window <= self.window:
            raise ConfigError(f"probe_window is {self.probe_window!r}; allowed: 1..window ({self.window})")
        if not 1 <= self.first_pause <= self.max_pause:
            raise ConfigError(f"first_pause is {self.first_pause!r}; allowed: 1..max_pause ({self.max_pause})")
        if self.compute_bound_tokens < 1:
            raise ConfigError(f"compute_bound_tokens is {self.compute_bound_tokens!r}; allowed: at least 1")


class Verdict(NamedTuple):
    """What follows from a window: draft ``draft_len`` tokens from now on; at 0, pause for ``pause`` steps first."""

    draft_len: int
    pause: int


def choose_draft_len(accept_rate: float, max_drafts: int, token_cost: float) -> int:
    """The k in ``0..max_drafts`` with the most expected tokens per cost; the smallest of equals."""
    best_len, best_gain = 0, 1.0
    tokens, power = 1.0, 1.0
    for k in range(1, max_drafts + 1):
        power *= accept_rate
        tokens += power
        gain = tokens / (1.0 + k * token_cost)
        if gain > best_gain:
            best_len, best_gain = k, gain
    return best_len


def judge(accepted: int, failures: int, pause: int, max_drafts: int, rule: AdaptiveDrafts) -> Verdict:
    """The verdict on a window in which ``accepted`` drafts were accepted and ``failures`` steps ended in a rejection.

    ``pause`` is the length of the last pause, 0 if there was none since drafts last paid.
    """
    trials = accepted + failures
    draft_len = choose_draft_len(accepted / trials, max_drafts, rule.token_cost) if trials else max_drafts
    if draft_len:
        return Verdict(draft_len, 0)
    return Verdict(0, rule.first_pause if pause == 0 else min(2 * pause, rule.max_pause))


class DraftLen:
    """How many drafts one choice wants. Without a rule it's always ``most``.

    Attributes:
        most: what it may want.
        now: drafts of the next step; 0 in a pause.
        rest_len: steps without drafts that are left of a pause.
    """

    __slots__ = ("_accepted", "_failures", "_pause", "_rule", "_steps", "most", "now", "rest_len")

    def __init__(self, most: int, rule: AdaptiveDrafts | None) -> None:
        self._rule = rule
        self.most = self.now = most
        self.rest_len = 0
        self._pause = 0  # length of the last one, 0 if there was none since drafts last paid
        self._steps = self._accepted = self._failures = 0  # of the window

    def rest(self) -> None:
        """A step without drafts in a pause. After the last one comes a probe, which is a short window."""
        self.rest_len -= 1
        if not self.rest_len and self._rule is not None:
            self.now = self.most
            self._steps = self._rule.window - self._rule.probe_window

    def record(self, drafts_len: int, accepted: int) -> None:
        """A step with drafts: how many were planned, and how many accepted. Judges them at the end of a window."""
        rule = self._rule
        if rule is None or not self.now:  # planned before the pause
            return
        self._accepted += accepted
        if accepted < drafts_len:
            self._failures += 1
        self._steps += 1
        if self._steps >= rule.window:
            self.now, self._pause = judge(self._accepted, self._failures, self._pause, self.most, rule)
            self.rest_len = self._pause
            self._steps = self._accepted = self._failures = 0


def compute_bound_cap(num_decodes: int, num_drafting: int, rule: AdaptiveDrafts) -> int:
    """The most drafts for each of ``num_drafting`` rows that keep a step of ``num_decodes`` rows below that width."""
    return max(0, rule.compute_bound_tokens - num_decodes) // num_drafting
