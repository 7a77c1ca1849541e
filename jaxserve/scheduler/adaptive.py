"""Which drafts a step gets: the adaptive K. The rule is pure functions; ``DraftLen`` is a choice under it.

A row with k drafts emits ``1 + p + p^2 + ... + p^k`` tokens in the mean, p being the chance that a draft token is
accepted, given that those before it were. In return the whole step takes longer, for the rows that don't draft as well.
``choose_draft_len`` is the rule: of all k, the one that makes the product of the running choices' expected speeds
largest (proportional fairness). So a choice can't slow the others down for a gain of its own that is smaller than their
loss, where both are taken as ratios; and for one choice alone it's the k with the most tokens per time.

What a step takes comes from ``AdaptiveDrafts``: constants of the machine and the drafter, no clock, so that the same
requests get the same plans. p is measured over windows of ``window`` verify steps; a draft that wasn't found counts as
a failure, because the step was as wide as if it had been. Until it is measured, p is 1. A choice whose drafts aren't
worth the steps that they were verified in pauses for ``first_pause`` steps, then probes with a short window, whose end
it waits for without drafts; each failed probe doubles the pause up to ``max_pause``, a successful one resets it. Half a
window in which nothing was accepted says enough, and a choice that was outvoted for a pause's time is measured anew.
Apart from that, ``compute_bound_cap`` cuts all drafts of a step whose GEMMs would become compute-bound, where a wasted
draft isn't free.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from jaxserve.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AdaptiveDrafts:
    """Constants of the rule.

    Attributes:
        token_cost: what one more draft in the longest row adds to a step beside the step's width, as a share of the
            step without drafts: sampling at one more position, a pass of the draft model.
        step_costs: (tokens, cost) of every step size that the engine has, by tokens; in any unit. A smaller size may
            cost more than a larger one, whose layers are fused. Empty: a step's width costs nothing.
        compute_bound_tokens: decode and verify tokens of a step from which more tokens cost as much as they bring.
        window: verify steps over which acceptance is measured.
        probe_window: the same after a pause.
        first_pause: steps without drafts after the first window that didn't pay.
        max_pause: longest pause.
    """

    token_cost: float = 0.03
    step_costs: tuple[tuple[int, float], ...] = ()
    compute_bound_tokens: int = 512
    window: int = 8
    probe_window: int = 2
    first_pause: int = 16
    max_pause: int = 256

    def __post_init__(self) -> None:
        if not self.token_cost >= 0.0:
            raise ConfigError(f"token_cost is {self.token_cost!r}; allowed: a number of at least 0")
        sizes = (0, *(tokens for tokens, _ in self.step_costs))
        if not all(a < b for a, b in pairwise(sizes)) or not all(cost > 0.0 for _, cost in self.step_costs):
            raise ConfigError(
                f"step_costs is {self.step_costs!r}; allowed: (tokens, cost) pairs above 0, ascending in tokens"
            )
        if not 1 <= self.probe_window <= self.window:
            raise ConfigError(f"probe_window is {self.probe_window!r}; allowed: 1..window ({self.window})")
        if not 1 <= self.first_pause <= self.max_pause:
            raise ConfigError(f"first_pause is {self.first_pause!r}; allowed: 1..max_pause ({self.max_pause})")
        if self.compute_bound_tokens < 1:
            raise ConfigError(f"compute_bound_tokens is {self.compute_bound_tokens!r}; allowed: at least 1")

    def step_cost(self, num_tokens: int) -> float:
        """Of the smallest step that holds so many tokens; the largest step's above that."""
        for tokens, cost in self.step_costs:
            if num_tokens <= tokens:
                return cost
        return self.step_costs[-1][1] if self.step_costs else 1.0


class Wish(NamedTuple):
    """What a choice brings into the vote on a step: its p, 1.0 until that is measured, and the drafts that it wants."""

    accept_rate: float
    most: int


@lru_cache(maxsize=4096)
def expected_tokens_logs(wish: Wish) -> tuple[float, ...]:  # [most + 1]
    """log(1 + p + ... + p^k) for each k up to as many drafts as the choice wants."""
    return tuple(math.log(sum(wish.accept_rate**i for i in range(k + 1))) for k in range(wish.most + 1))


def verify_costs(
    wishes: Mapping[Wish, int],  # how many choices have that wish
    num_tokens: int,
    max_drafts: int,
    rule: AdaptiveDrafts,
) -> tuple[float, ...]:  # [max_drafts + 1]
    """What a step of ``num_tokens`` costs if drafts of up to k tokens are added, for each k; 1.0 is without drafts."""
    plain = rule.step_cost(num_tokens)
    num_wanting = [0] * (max_drafts + 1)  # by how many drafts
    for wish, count in wishes.items():
        num_wanting[min(wish.most, max_drafts)] += count
    costs, wide, wanting = [1.0], num_tokens, sum(num_wanting)
    for k in range(1, max_drafts + 1):
        wanting -= num_wanting[k - 1]
        wide += wanting
        costs.append(rule.step_cost(wide) / plain + k * rule.token_cost)
    return tuple(costs)


def choose_draft_len(
    wishes: Mapping[Wish, int],  # how many choices have that wish
    num_running: int,
    costs: Sequence[float],  # [at least limit + 1], relative to costs[0]
    limit: int,
) -> int:
    """The most drafts of a row in this step: the k in ``0..limit`` with the largest product of expected speeds.

    A choice's speed is its expected tokens over the step's cost; those of the ``num_running`` choices that have no wish
    get one token. Drafts are cut to the k that makes ``sum of log(tokens) - num_running * log(cost)`` largest, the
    smallest of equals; that is 0 for k = 0.
    """
    gains = [-num_running * math.log(costs[k] / costs[0]) for k in range(limit + 1)]
    for wish, count in wishes.items():
        logs = expected_tokens_logs(wish)
        for k in range(1, limit + 1):
            gains[k] += count * logs[k if k < wish.most else wish.most]
    return max(range(limit + 1), key=gains.__getitem__)  # the first of equals


@lru_cache(maxsize=4096)
def choose_alone(wish: Wish, costs: tuple[float, ...]) -> int:
    """``choose_draft_len`` if nobody else ran."""
    return choose_draft_len({wish: 1}, 1, costs, wish.most)


class Verdict(NamedTuple):
    """What follows from a window: want ``draft_len`` drafts from now on; at 0, pause for ``pause`` steps first."""

    draft_len: int
    pause: int


def judge(accept_rate: float, pause: int, max_drafts: int, costs: tuple[float, ...], rule: AdaptiveDrafts) -> Verdict:
    """The verdict on a window whose last step had those ``verify_costs``: would drafts pay if all did as this one?

    ``pause`` is the length of the last pause, 0 if there was none since drafts last paid.
    """
    draft_len = choose_alone(Wish(accept_rate, max_drafts), costs)
    if draft_len:
        return Verdict(draft_len, 0)
    return Verdict(0, rule.first_pause if pause == 0 else min(2 * pause, rule.max_pause))


class DraftLen:
    """How many drafts one choice wants. Without a rule it's always ``most``.

    Attributes:
        most: what it may want.
        now: drafts that it wants in the next step; 0 in a pause.
        wish: the same for ``choose_draft_len``.
        rest_len: steps without drafts that are left of a pause.
        probe_len: steps with drafts that are left to plan of a probe; 0 outside of one.
    """

    __slots__ = (
        "_accepted", "_failures", "_outvoted", "_patience", "_pause", "_rule", "_steps",
        "most", "now", "probe_len", "rest_len", "wish",
    )  # fmt: skip

    def __init__(self, most: int, rule: AdaptiveDrafts | None) -> None:
        self._rule = rule
        self.most = self.now = most
        self.wish = Wish(1.0, most)
        self.rest_len = self.probe_len = 0
        self._pause = 0  # length of the last one, 0 if there was none since drafts last paid
        self._outvoted = 0  # steps since the last measurement that it wanted drafts in and got none
        self._patience = 0 if rule is None else rule.first_pause  # how many of them make it measure again
        self._steps = self._accepted = self._failures = 0  # of the window

    def rest(self) -> None:
        """A step without drafts in a pause. After the last one comes a probe, which is a short window."""
        self.rest_len -= 1
        if not self.rest_len and self._rule is not None:
            self._probe(self._rule)

    def outvoted(self) -> None:
        """A step without drafts that it wanted: what it once measured says little after many of them."""
        rule = self._rule
        if rule is None or self.wish.accept_rate == 1.0:
            return
        self._outvoted += 1
        if self._outvoted >= self._patience:
            self._patience = min(2 * self._patience, rule.max_pause)
            self._probe(rule)

    def probed(self) -> None:
        """A step of a probe was planned. After the last one it waits for what they say."""
        self.probe_len -= 1
        if not self.probe_len:
            self._want(0, 1.0)

    def interrupted(self) -> None:
        """Results of planned steps won't come: a probe that waits for some, or will, starts again."""
        waits = self.probe_len or (not self.now and not self.rest_len)
        if self._rule is not None and self.most and waits:
            self._probe(self._rule)

    def record(self, drafts_len: int, accepted: int, costs: tuple[float, ...]) -> None:
        """A step with drafts: how many were planned and accepted, and its costs. Judges at a window's end."""
        rule = self._rule
        if rule is None or self.rest_len:  # planned before the pause
            return
        self._accepted += accepted
        if accepted < drafts_len:
            self._failures += 1
        self._steps += 1
        if self._steps < rule.window and (self._accepted or 2 * self._failures < rule.window):
            return
        trials = self._accepted + self._failures
        accept_rate = self._accepted / trials if trials else 1.0
        draft_len, self._pause = judge(accept_rate, self._pause, self.most, costs, rule)
        self._want(draft_len, accept_rate)
        self.rest_len = self._pause
        self.probe_len = self._outvoted = self._steps = self._accepted = self._failures = 0

    def _want(self, draft_len: int, accept_rate: float) -> None:
        self.now = draft_len
        self.wish = Wish(accept_rate, draft_len)

    def _probe(self, rule: AdaptiveDrafts) -> None:
        self._want(self.most, 1.0)
        self.probe_len = rule.probe_window
        self._steps = rule.window - rule.probe_window
        self._outvoted = self._accepted = self._failures = 0


def compute_bound_cap(num_decodes: int, num_drafting: int, rule: AdaptiveDrafts) -> int:
    """The most drafts for each of ``num_drafting`` rows that keep a step of ``num_decodes`` rows below that width."""
    return max(0, rule.compute_bound_tokens - num_decodes) // num_drafting
