"""Who decides how much of a GPU XLA takes, and who hears of it."""

import os

import pytest

from jaxserve.config import EngineConfig
from jaxserve.engine.memory_share import ask_for_memory, tell_share

NAME, OLDER_NAME = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
CONFIG = EngineConfig(model="m", gpu_memory_utilization=0.9)


@pytest.mark.parametrize("said, share", [({}, "0.900"), ({NAME: ".5"}, ".5"), ({OLDER_NAME: "0.4"}, "0.4")])
def test_the_users_own_word_stays(monkeypatch, caplog, said, share):
    """XLA refuses both names at once, so the second must not be set beside the first."""
    for name in (NAME, OLDER_NAME):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert ask_for_memory(CONFIG) == share
    assert {name: os.environ[name] for name in (NAME, OLDER_NAME) if name in os.environ} == (said or {NAME: share})
    tell_share(CONFIG, share)
    assert bool(said) == ("gpu_memory_utilization is 0.9, but this process takes a share" in caplog.text)


def test_a_second_engine_hears_that_it_cannot_change_the_first_ones_share(monkeypatch, caplog):
    monkeypatch.delenv(OLDER_NAME, raising=False)
    monkeypatch.setenv(NAME, "to be restored")
    monkeypatch.delenv(NAME)
    for share, told in ((0.5, False), (0.5, False), (0.3, True)):
        config = EngineConfig(model="m", gpu_memory_utilization=share)
        tell_share(config, ask_for_memory(config))
        assert bool(caplog.records) == told
