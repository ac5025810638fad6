"""Imports run one way (design section 4), importing does nothing, and setup.cfg lists what there is."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Lowest first. A package may import those of earlier rows, and never its neighbours in its own row.
ROWS = [
    {"errors"},
    {"parallel", "data", "checkpoint"},
    {"layers"},
    {"training", "inference"},
    {"huggingface"},
    {"amber_jax", "crystal_jax"},
    {"analysis"},
    {"models"},
    {"commands"},
    {"run"},
]
OURS = set().union(*ROWS)


def sources(name):
    return [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else sorted((ROOT / name).rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module


@pytest.mark.parametrize("name", sorted(OURS))
def test_imports_run_one_way(name):
    row = next(n for n, names in enumerate(ROWS) if name in names)
    below = set().union(*ROWS[:row]) | {name}
    files = sources(name)
    assert files, f"{name} is gone; take it out of ROWS"
    for path in files:
        for module in imported(path):
            top = module.split(".")[0]
            assert top not in OURS or top in below, f"{path.relative_to(ROOT)} imports {module}, which is not below it"


def test_every_package_has_a_place_in_the_order():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")}
    modules = {p.stem for p in ROOT.glob("*.py")}
    assert packages | modules == OURS


def test_setup_cfg_lists_every_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split()) | set(config["options"]["py_modules"].split())
    assert listed == OURS


def test_importing_everything_starts_no_backend():
    """Importing does nothing: no device is asked for, so that --simulate and jax.distributed still can be."""
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for name in OURS for p in sources(name)]
    code = "\n".join(f"import {m.removesuffix('.__init__')}" for m in sorted(modules)) + (
        "\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends, xla_bridge._backends"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
