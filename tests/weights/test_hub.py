"""Hub ids: from the local cache, else an error that shows how to download."""

import pytest

from jaxserve.errors import CheckpointError
from jaxserve.weights.hub import local_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_path_is_itself(tmp_path):
    assert local_path(str(tmp_path)) == tmp_path


def test_a_cached_id(cache):
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    (repo / "snapshots" / "abc123").mkdir(parents=True)
    assert local_path("org/name") == repo / "snapshots" / "abc123"


def test_an_id_that_is_not_cached(cache):
    with pytest.raises(CheckpointError, match="to download it: hf download org/name"):
        local_path("org/name")


@pytest.mark.parametrize("name", ["/no/such/dir", "missing.gguf", "./missing", "a/b/c", "org/model.gguf"])
def test_a_path_that_is_not_there(cache, name):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        local_path(name)
