"""What is built can be installed and used, beside a user's own package called ``models``."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "golden" / "tiny" / "llama_tied"
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
SCRIPT = """
import json, sys
import models
assert models.WHOSE == "the user's", models
import jaxserve, jaxserve.models.registry
from jaxserve import LLM, SamplingParams

assert jaxserve.__file__.startswith(sys.prefix), jaxserve.__file__
if __name__ == "__main__":
    with LLM("tiny", max_model_len=32, max_num_seqs=1, max_num_batched_tokens=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
        output = llm.generate([[3, 1, 4, 1, 5]], params, use_tqdm=False)[0].outputs[0]
        print(json.dumps([output.token_ids, output.finish_reason]))
"""


def run(*command: object, cwd: Path) -> str:
    """Runs a command without what the surroundings could smuggle in; returns its stdout."""
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A directory with an sdist, and the wheel that was built from it."""
    place = tmp_path_factory.mktemp("dist")
    tree = place / "tree"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_SOURCE)  # building writes into the tree
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", place, tree, cwd=place)
    return place


@pytest.fixture(scope="module")
def wheel(dist):
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def user(tmp_path_factory, wheel):
    """A user's directory with a package of their own called models, and an environment that has the wheel.

    The dependencies are those of the environment that runs the tests, so nothing is fetched.
    """
    place = tmp_path_factory.mktemp("user")
    (place / "models").mkdir()
    (place / "models" / "__init__.py").write_text('WHOSE = "the user\'s"\n')
    (place / "script.py").write_text(SCRIPT)
    shutil.copytree(TINY, place / "tiny")
    write_tokenizer(place / "tiny")
    venv.create(place / "env", with_pip=False, symlinks=True)
    site = next((place / "env").glob("lib/python3*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = place / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=place)
    return place


def write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models

    size = json.loads((directory / "config.json").read_text())["vocab_size"]
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    tokenizer.save(str(directory / "tokenizer.json"))


def source_of(*folders: str) -> set[str]:
    """Everything that a package folder holds, through the link jaxserve/models."""
    files = {
        Path(at, name)
        for folder in folders
        for at, _, names in os.walk(ROOT / folder, followlinks=True)
        for name in names
    }
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_the_packages_whole_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == source_of("jaxserve", "pallas_kernels")
        assert {"jaxserve/models/registry.py", "jaxserve/py.typed", "pallas_kernels/py.typed"} <= names
        assert archive.read("jaxserve/models/registry.py") == (ROOT / "models" / "registry.py").read_bytes()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_sdist_holds_real_files(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert {"pyproject.toml", "README.md", "LICENSE", "jaxserve/models/registry.py"} <= set(members)
    assert not [name for name, member in members.items() if member.issym()]


def test_installed_beside_a_package_called_models(user):
    token_ids, finish_reason = json.loads(run(user / "env" / "bin" / "python", "script.py", cwd=user))
    assert len(token_ids) == 4 and finish_reason == "length"


def test_the_command_is_installed(user):
    assert run(user / "env" / "bin" / "jaxserve", "--version", cwd=user).strip() == version_of_pyproject()


def version_of_pyproject() -> str:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_an_older_python_is_one_clear_line_and_leaves_no_environment(tmp_path):
    old, environment = tmp_path / "old", tmp_path / "environment"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = ["make", f"PYTHON={old}", f"VENV={environment}", str(environment / "bin" / "python")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said, *_ = result.stderr.splitlines()
    assert said == f"jaxserve needs Python 3.12 or newer, and {old} isn't: name another by make PYTHON=path"
    assert result.returncode and not environment.exists()
