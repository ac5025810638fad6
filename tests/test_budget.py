"""The tiers: every line of the budget names a test, and `make test` holds every row of README's table of laws."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGET = tomllib.loads((ROOT / "tests" / "budget.toml").read_text())


@functools.cache
def functions(path):
    """Tests and fixtures in a file."""
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_line_of_the_budget_names_what_there_is():
    unknown = []
    for name in [*BUDGET["tests"], *BUDGET["thorough"]]:
        file, _, function = name.removesuffix(" (fixture)").partition("::")
        path = ROOT / file if file.endswith(".py") else ROOT / file / "conftest.py"
        if not path.exists() or function.split("[")[0] not in functions(path):
            unknown.append(name)
    assert not unknown


def laws():
    table = (ROOT / "README.md").read_text().split("| law | where |\n|---|---|\n")[1].split("\n\n")[0]
    return [row.rsplit("|", 2)[1] for row in table.splitlines()]


@pytest.mark.parametrize("where", laws(), ids=lambda where: where.strip())
def test_make_test_has_a_test_of_every_law(where):
    """At least one test in one of the files that the row names; what is marked slow stands in a row with others."""
    found = []
    for name in re.findall(r"`((?:tests/)?[\w/]*)(test_\w+\.py)?`", where):
        folder, file = ROOT / name[0], name[1]
        paths = list(folder.glob(file or "test_*.py")) if name[0] else list((ROOT / "tests").rglob(file))
        assert paths, f"{name}: README names no such file"
        for path in paths:
            id_ = str(path.relative_to(ROOT))
            found += [f for f in functions(path) if f.startswith("test_") and f"{id_}::{f}" not in BUDGET["thorough"]]
    assert found
