"""How fast a command starts: what it imports, and that what was compiled once is not compiled again."""

import json
import os
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import models
import run
from errors import UserError
from parallel import compile_cache

ROOT = Path(__file__).resolve().parent.parent

#: What takes long to import, or starts something.
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "grain", "lm_eval", "datasets", "torch"}

_CODE = """
import sys
import run
code = run.main(sys.argv[1:])
modules = {name.partition(".")[0] for name in sys.modules}
print("modules:", *sorted(modules), file=sys.stderr)
sys.exit(code)
"""


def imports_of(*words):
    """What a command has imported at its end, top-level modules, in an interpreter of its own; and its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", _CODE, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    names = done.stderr.splitlines()[-1].removeprefix("modules: ").split()
    return set(names), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_imports_nothing_but_names():
    found, seconds = imports_of("--help")
    assert not found & (HEAVY | {"numpy", "tyro", "training", "commands", "data"})
    assert seconds < 2 * 0.5  # the budget is half a second; `.ci/run` prints what it was


@pytest.mark.parametrize("verb", run.VERBS)
def test_help_of_a_verb_imports_no_jax(verb):
    found, seconds = imports_of(verb, "--help")
    assert not found & HEAVY
    assert seconds < 2 * 1.0


@pytest.mark.parametrize(
    "words",
    [
        ("series", "{run}"),
        ("trace", "{run}", "--step", 3),
        ("report", "{run}", "--out", "{out}"),
        ("prepare", "amber_7b", "--dry-run"),
        ("prepare", "amber_tiny", "--dry-run", "--source", "code={source}"),
    ],
    ids=lambda words: words[0],
)
def test_looking_at_a_run_imports_no_jax(two_sources, tmp_path, words):
    names = {"run": two_sources / "run", "out": tmp_path / "page.html", "source": two_sources / "prose"}
    found, _ = imports_of(*(str(word).format(**names) for word in words))
    assert not found & HEAVY


def test_every_recipe_is_where_its_name_says():
    for name, make in models.recipes().items():
        assert make().recipe == name
        assert make.__module__ == models.RECIPES[name]


# ---- compiled programs on the disk ---------------------------------------------------------------------------------


@pytest.fixture
def notes():
    return []


@pytest.fixture
def cache(tmp_path, notes):
    """A cache of this test's own; afterwards that of all tests again."""
    yield compile_cache.enable(str(tmp_path / "cache"), notes.append)
    compile_cache.enable(os.environ[compile_cache.VARIABLE], print)


def compiled(number):
    """Hits that compiling a program of this test's own takes, and its result for 1.0."""
    jax.clear_caches()
    before = compile_cache.hits()
    value = float(jax.jit(lambda x: jnp.sin(x) * number)(1.0))
    return compile_cache.hits() - before, value


def entries(cache):
    return sorted(cache.glob("*.program"))


def test_a_program_is_compiled_once(cache, notes):
    missed, first = compiled(2.5)
    assert (missed, bool(entries(cache))) == (0, True)
    found, second = compiled(2.5)
    assert found >= 1
    assert first == second
    assert not notes


@pytest.mark.parametrize("how", ["flipped", "cut", "empty"])
def test_a_damaged_entry_is_compiled_anew_and_replaced(cache, notes, how):
    _, first = compiled(3.5)
    for file in entries(cache):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes({"flipped": bytes(raw), "cut": bytes(raw[:-1]), "empty": b""}[how])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        missed, second = compiled(3.5)
        found, third = compiled(3.5)
    assert missed == 0, "nothing was taken from damaged entries"
    assert found >= 1, "and good ones stand in their place"
    assert first == second == third
    assert not notes


def test_a_full_disk_costs_one_line(cache, notes, monkeypatch):
    def full(path, needed):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compile_cache, "_make_room", full)
    assert [compiled(n)[1] for n in (4.5, 5.5, 6.5)]
    assert notes == [f"{cache}: compiled programs are kept no longer: No space left on device"]
    assert not list(cache.iterdir())


def test_a_folder_that_cannot_be_written_costs_one_line(tmp_path, notes):
    (tmp_path / "file").touch()
    assert compile_cache.enable(str(tmp_path / "file" / "below"), notes.append) is None
    assert len(notes) == 1
    assert "compiled programs are not kept" in notes[0]


def test_a_file_is_no_folder(tmp_path, notes):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--compile-cache .*: is a file; give a folder, or off"):
        compile_cache.enable(str(tmp_path / "file"), notes.append)


def test_the_flag_comes_before_the_variable_and_that_before_the_users_cache(tmp_path, monkeypatch, notes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = os.environ[compile_cache.VARIABLE]
    try:
        monkeypatch.delenv(compile_cache.VARIABLE)
        own = compile_cache.processor()
        assert compile_cache.enable(None, notes.append) == tmp_path / "home/llm360/compiled" / own
        monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "variable"))
        assert compile_cache.enable(None, notes.append) == tmp_path / "variable" / own
        assert compile_cache.enable(str(tmp_path / "flag"), notes.append) == tmp_path / "flag" / own
        assert compile_cache.enable("off", notes.append) is None
        monkeypatch.setenv(compile_cache.VARIABLE, "off")
        assert compile_cache.enable(None, notes.append) is None
        monkeypatch.delenv(compile_cache.VARIABLE)
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "jax"))
        assert compile_cache.enable(None, notes.append) is None, "JAX's own setting is left as it is"
    finally:
        compile_cache.enable(before, print)


def test_processors_with_other_features_have_folders_of_their_own(monkeypatch):
    texts = iter(["model name : a\nflags : sse avx\n", "model name : b\nflags : avx sse\n", "flags : avx avx512 sse\n"])
    monkeypatch.setattr(Path, "read_text", lambda path: next(texts))
    one, same, other = (compile_cache.processor() for _ in range(3))
    assert one == same
    assert one != other


def test_the_folder_has_a_bound_and_what_was_not_used_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 100)
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"x" * 30)
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    compile_cache._make_room(tmp_path, 40)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_a_second_start_finds_its_program_and_gives_the_same_bits(tmp_path, capsys):
    """With a cold cache and with a warm one the same losses; and replays of them, with the cache and without, too."""
    small = ["--model.num-layers=1", "--data.global-batch=8", "--mesh=data=8"]

    def call(*words):
        jax.clear_caches()  # as a process of its own would begin
        assert run.main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def train(name):
        folder = tmp_path / name
        words = [
            "amber_360",
            "--data=synthetic",
            f"--run={folder}",
            "--steps=4",
            f"--compile-cache={tmp_path / 'cache'}",
        ]
        found = call("train", *words, *small, f"--compile-cache={tmp_path / 'cache'}")
        return found, [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]

    try:
        cold, first = train("cold")
        warm, second = train("warm")
        assert first == second
        assert [cold["compile_cached"], warm["compile_cached"]] == [False, True]
        assert warm["compile_s"] < cold["compile_s"]
        for cache in (tmp_path / "cache", "off"):
            replays = call("verify", tmp_path / "cold", "--simulate=8", f"--compile-cache={cache}")["replays"]
            assert [r["verdict"] for r in replays] == ["bitwise"]
    finally:
        compile_cache.enable(None, print)
