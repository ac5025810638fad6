"""A recipe of one's own: FILE.py:FUNCTION wherever a recipe's name is taken, and one message where that is none."""

import json
import re
from pathlib import Path

import pytest

import run as cli

ROOT = Path(__file__).resolve().parent.parent
TINY = """
import dataclasses
from amber_jax.recipes import amber_tiny

def mine():
    base = amber_tiny()
    model = dataclasses.replace(
        base.model, vocab_size=64, context_length=16, num_layers=1, embed=16, num_heads=2, head_dim=8, mlp=24
    )
    data = dataclasses.replace(base.data, global_batch=8, sequence_length=16, chunks=2, samples_per_chunk=16)
    return dataclasses.replace(base, model=model, data=data)

def other():
    return 7

def broken():
    return 1 / 0

class Thing:
    pass
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TINY)
    Path("wrong.py").write_text("x = 1\ny = x +\n")
    Path("fails.py").write_text("import no_such_package_of_mine\n")
    Path("notes.txt").write_text("def mine(): pass\n")
    return tmp_path


def test_it_is_trained_under_its_own_name_and_resumed(file, capsys):
    words = ["train", "mine.py:mine", "--data", "synthetic", "--run", "run", "--mesh", "data=8", "--json"]
    assert cli.main([*words, "--steps", "2"]) == 0
    assert json.loads(Path("run/config.json").read_text())["recipe"] == "mine"
    assert cli.main(words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["resumed_from"], found["step"], found["reason"]) == (2, 4, "finished")


def test_flags_change_single_fields_of_it(file, capsys):
    assert cli.main(["plan", "mine.py:mine", "--topology", "cpu:2", "--model.num-layers", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("none.py:mine", "there is no file .*none.py"),
        ("mine.py:yours", r"mine.py has no function 'yours'; it has mine, other, broken, Thing"),
        ("mine.py:", r"mine.py has no function ''"),
        ("mine.py:other", r"returned int, and a recipe is a function that returns a RunConfig"),
        ("mine.py:Thing", r"returned Thing, and a recipe"),
        ("mine.py:broken", r"the function failed: ZeroDivisionError: division by zero \(line 17\)"),
        ("wrong.py:mine", r"wrong.py cannot be imported: SyntaxError: .* \(line 2\)"),
        (
            "fails.py:mine",
            r"fails.py cannot be imported: ModuleNotFoundError: No module named 'no_such_package_of_mine'",
        ),
    ],
)
def test_what_is_no_recipe_gets_one_message(file, capsys, word, message):
    assert cli.main(["plan", word, "--topology", "cpu:2"]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert re.search(message, err), err


def test_a_name_that_is_neither_says_that_a_file_would_do(capsys):
    assert cli.main(["plan", "notes.txt:mine", "--topology", "cpu:2"]) == 2
    assert "recipes are amber_7b, " in (err := capsys.readouterr().err)
    assert "FILE.py:FUNCTION" in err


def test_the_example_plans(capsys):
    words = ["plan", f"{ROOT}/examples/small_llama.py:small_llama", "--topology", "v5e:4x4", "--top", "1", "--json"]
    assert cli.main(words) == 0
    (best,) = json.loads(capsys.readouterr().out)["plans"]
    assert best["predicted_peak_bytes"] < 15.75 * 2**30
