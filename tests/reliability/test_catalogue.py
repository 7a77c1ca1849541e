"""docs/reliability.md names a test for every row of the catalogue, or what is missing; and those tests exist."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text()
NAMED = r"`([\w/]+\.py)::(\w+)`"
MISSING = {20, 21, 22, 23, 28, 36, 42}  # structured output, LoRA, pipeline parallelism, connectors, remote KV


def table(heading):
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return rows[2:]


ROWS = {int(row[0]): row for row in table("The catalogue")}


@functools.cache
def defined(path):
    tree = ast.parse((TESTS / path).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def rows_in(name):
    """test_row_33_34_35_a_storm -> 33, 34, 35"""
    found = re.match(r"test_row((?:_\d\d)+)_", name)
    return [int(number) for number in found.group(1).split("_")[1:]] if found else []


def plants(name):
    """Whether a test puts a bug into the code to be found; these aren't listed one by one."""
    return "_seen" in name or "_kills_an_engine_" in name


def our_tests():
    return [
        (path.name, name) for path in sorted(Path(__file__).parent.glob("test_*.py")) for name in sorted(defined(path))
    ]


def test_every_row_has_a_test_or_says_what_is_missing():
    assert sorted(ROWS) == list(range(1, 52))
    assert {number for number, row in ROWS.items() if row[3].startswith("left out: ")} == MISSING
    for number, row in ROWS.items():
        assert number in MISSING or re.search(NAMED, row[3]), row


def test_every_test_that_is_named_exists():
    names = re.findall(NAMED, PAGE)
    assert len(names) > 100
    assert [f"{path}::{name}" for path, name in names if name not in defined(path)] == []


def test_every_property_has_a_test():
    rows = table("Properties")
    assert [row[0] for row in rows] == [f"P{number}" for number in range(1, 18)]
    assert all(re.search(NAMED, row[2]) for row in rows)


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, n in our_tests() if rows_in(n) and not plants(n)])
def test_a_test_named_after_a_row_is_in_its_row(file, name):
    """In one of its rows at least."""
    assert any(f"{file}::{name}`" in ROWS[number][3] for number in rows_in(name))


def test_what_is_called_planted_is():
    """A row that says so has a test here that plants it, or one in the scheduler's."""
    planted = {number for _, name in our_tests() if plants(name) for number in rows_in(name)}
    source = (TESTS / "scheduler" / "test_planted_bugs.py").read_text()
    scheduler = {int(number) for number in re.findall(r"^def row(\d\d)_", source, re.MULTILINE)}
    assert {number for number, row in ROWS.items() if row[4] == "yes"} <= planted | scheduler
    assert len(planted) >= 11
