"""The command line as a user meets it: what it prints, how it exits, what it says about mistakes."""

import configparser
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import run
from checkpoint.series import Series
from commands.analyze import STUDIES
from training.metrics import read_lines

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "--model.vocab-size=300", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--data.sequence-length=32", "--data.chunks=2", "--data.global-batch=8",
    "--data.validation-per-source=4",
]  # fmt: skip
MESH = ["--mesh=data=4,fsdp=2"]


def call(capsys, *words):
    """Exit code, stdout and stderr of a command in this process (which has eight devices)."""
    try:
        code = run.main([str(w) for w in words])
    except SystemExit as e:
        code = e.code
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A prepared data directory and a finished run of two chunks, made through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "text"
    text.mkdir()
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "(", ")", "def", "return", "\n", "0", "1"]
    for n in range(40):
        (text / f"{n}.txt").write_text(" ".join(rng.choice(words, size=400)))
    prepare = ["prepare", "amber_tiny", "--out", folder / "data", "--source", f"words={text}", "--workers", 1, *SMALL]
    assert run.main([str(w) for w in prepare]) == 0
    train = ["train", "amber_tiny", "--data", folder / "data", "--run", folder / "run", *MESH, *SMALL]
    assert run.main([str(w) for w in train]) == 0
    return folder


def test_prepare_and_train_say_what_they_made(work, capsys):
    code, out, err = call(
        capsys, "prepare", "amber_tiny", "--out", work / "data", "--source", f"words={work / 'text'}", "--json", *SMALL
    )
    assert code == 0
    assert json.loads(out)["chunks"] == 2
    assert "already prepared" in err
    code, out, _ = call(
        capsys, "train", "amber_tiny", "--data", work / "data", "--run", work / "run", "--json", *MESH, *SMALL
    )
    assert code == 0
    outcome = json.loads(out)
    assert outcome["reason"] == "finished"
    assert outcome["validation_loss"] is None, "nothing was left to do"


def test_series_lists_and_checks(work, capsys):
    code, out, _ = call(capsys, "series", work / "run")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"3 checkpoints in {work / 'run'}, ")
    assert [line.split()[0] for line in out.splitlines()[1:-1]] == ["init", "000", "001"]
    code, out, _ = call(capsys, "series", work / "run", "--check", "--json")
    assert code == 0
    assert [c["check"] for c in json.loads(out)["checkpoints"]] == ["ok"] * 3


def test_series_compares_two_and_rebuilds_its_list(work, capsys):
    code, out, _ = call(capsys, "series", work / "run", "--diff", "init", "1", "--json")
    assert code == 0
    assert json.loads(out)["total"]["relative"] > 0.01
    index = work / "run" / "series.jsonl"
    whole = index.read_text()
    index.write_text(whole[: len(whole) // 2])
    assert call(capsys, "series", work / "run", "--check")[0] == 1
    assert call(capsys, "series", work / "run", "--rebuild")[0] == 0
    assert index.read_text() == whole
    code, _, err = call(capsys, "series", work / "run", "--check", "--rebuild")
    assert (code, "ask one thing" in err) == (2, True)


def test_verify_replays_the_run(work, capsys):
    code, out, _ = call(capsys, "verify", work / "run", "--simulate", 8, "--json")
    (replay,) = json.loads(out)["replays"]
    assert (code, replay["verdict"], len(replay["checkpoints"])) == (0, "bitwise", 2)
    assert read_lines(work / "run" / "ledger.jsonl")[-1]["verdict"] == "bitwise"
    code, out, _ = call(capsys, "verify", work / "run", "--sample", 9, "--mesh", "tensor=2", "--simulate", 8)
    assert code == 0
    assert out.splitlines()[-1] == "2 links: 2 within tolerance"
    for words, message in (
        (["--from", "all"], "--from all: names 3 checkpoints, expected one"),
        (["--from", "1", "--to", "0"], "verify: 001 is not before 000"),
        (["--sample", "0"], "--sample 0: must be at least 1"),
        (["--data", str(work / "text")], "not found; prepare the data first"),
    ):
        code, _, err = call(capsys, "verify", work / "run", "--simulate", 8, *words)
        assert (code, message in err) == (2, True), err


def test_series_check_names_a_flipped_byte_and_a_broken_chain(work, capsys, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", work / "run", copy], check=True)
    file = copy / "series" / "000" / "params" / "head.kernel" / "zarr.json"
    file.write_bytes(file.read_bytes().replace(b"float32", b"float23"))
    code, out, err = call(capsys, "series", copy, "--check", "--json")
    assert code == 1
    assert [c["check"] for c in json.loads(out)["checkpoints"]] == ["ok", "FAILED", "ok"]
    assert "series/000: damaged: params/head.kernel/zarr.json" in err
    manifest = Series(work / "run").resolve("init")[0].manifest
    (copy / "series" / "init" / "manifest.json").write_text(dataclasses.replace(manifest, wall_time=1.0).to_json())
    code, _, err = call(capsys, "series", copy, "--check")
    assert code == 1
    assert "its parent is not" in err


def test_logits_and_generate(work, capsys, tmp_path):
    tokens, out_file = tmp_path / "tokens.npy", tmp_path / "logits.npz"
    np.save(tokens, np.arange(14).reshape(2, 7))
    code, out, _ = call(capsys, "logits", f"{work / 'run'}@1", "--tokens", tokens, "--out", out_file, "--json")
    assert code == 0
    assert json.loads(out)["shape"] == [2, 7, 300]
    logits = np.load(out_file)["logits"]
    assert (logits.dtype, logits.shape) == (np.float32, (2, 7, 300))
    other = tmp_path / "other.npz"
    mesh = ["--mesh", "fsdp=2,tensor=2"]
    assert call(capsys, "logits", f"{work / 'run'}@latest", "--tokens", tokens, "--out", other, *mesh)[0] == 0
    np.testing.assert_allclose(np.load(other)["logits"], logits, atol=1e-5)

    ask = ["generate", f"{work / 'run'}@latest", "--prompt", "def ", "--prompt", "alpha beta", "--max-new-tokens", 9]
    code, out, _ = call(capsys, *ask)
    assert code == 0
    assert out.startswith("def ")
    code, cached, _ = call(capsys, *ask, "--json")
    code, plain, _ = call(capsys, *ask, "--json", "--no-cache", *mesh)
    assert code == 0
    assert json.loads(cached) == json.loads(plain)
    assert len(json.loads(cached)["continuations"]) == 2


def test_times_synthetic_steps(capsys):
    code, out, _ = call(capsys, "train", "amber_tiny", "--data", "synthetic", "--steps", 3, "--json", *MESH, *SMALL)
    assert code == 0
    timing = json.loads(out)
    assert timing["steps"] == 3
    for field in ("compile_s", "median_step_time_s", "tokens_per_s", "peak_bytes_per_device_planned"):
        assert timing[field] > 0, field
    assert {timing[field] for field in ("mfu_full", "mfu_causal", "peak_flops")} == {None}, "a CPU has no peak"
    assert timing["first_loss"] == pytest.approx(np.log(300), abs=0.1)


def test_times_more_steps_than_synthetic_data_holds_by_default(capsys):
    code, out, _ = call(capsys, "train", "amber_tiny", "--data", "synthetic", "--steps", 205, "--json", *MESH, *SMALL)
    assert code == 0
    assert json.loads(out)["steps"] == 205


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (["train"], "the recipe is missing; write run.py train RECIPE"),
        (["train", "amber_tinny", "--data", "x"], "unknown recipe 'amber_tinny'; did you mean 'amber_tiny'?"),
        (["train", "amber_tiny", "--data", "nowhere", "--run", "r"], "nowhere"),
        (["train", "amber_tiny", "--data", "synthetic", "--steps", "0"], "--steps 0: must be at least 1"),
        (["train", "amber_tiny", "--data", "synthetic", "--mesh", "data=3"], "= 3 but 8 cpu devices are visible"),
        (["train", "amber_tiny", "--data", "synthetic", "--simulate", "2"], "already runs on 8 cpu device"),
        (["prepare", "amber_tiny", "--out", "x"], "no source; give --source NAME=PATH"),
        (["prepare", "amber_tiny", "--out", "x", "--source", "words"], "words"),
        (["prepare", "amber_tiny", "--out", "x", "--source", "a=nowhere/at/all"], "nowhere/at/all"),
        (["series", "nowhere"], "nowhere"),
        (["generate", "nowhere@latest", "--prompt", "a"], "there is no directory nowhere"),
        (["generate", "nowhere"], "no prompt"),
        (["series", "."], "not a run directory (no config.json in it)"),
        (["logits", "nowhere", "--tokens", "t.npy", "--out", "o.npz"], "t.npy: cannot read it as .npy"),
        (["logits", "nowhere", "--tokens", "empty.npy", "--out", "o.npz"], "empty.npy: cannot read it as .npy"),
        (["logits", "nowhere", "--tokens", "one.npy", "--out", "o"], "give a name that ends in .npz"),
        (["generate", "nowhere@1", "--prompt", "\udcff"], "not UTF-8"),
        (["train", "amber_tiny", "--data", "synthetic", "--run", "one.npy", "--mesh", "data=8"], "one.npy: is a file"),
        (["train", "amber_tiny", "--data", "synthetic", "--seed", "-1"], "seed=-1 must be at least 0 and below 2**32"),
        (["train", "amber_tiny", "--data", "synthetic", "--optimizer.clip-norm", "nan"], "clip_norm=nan must be"),
        (["prepare", "amber_tiny", "--out", "x", "--source", "a=b", "--max-mb-per-source", "inf"], "positive number"),
        (["demo", "--dir", "."], "give the name of a directory to make"),
        (["demo", "--chunks", "1"], "needs at least 2 chunks"),
    ],
)
def test_a_mistake_gets_one_message_and_exit_code_two(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.npy").touch()
    np.save(tmp_path / "one.npy", np.ones((1, 1), np.int32))
    code, out, err = call(capsys, *words, "--json")
    assert code == 2, err
    if "flag is wrong" not in json.loads(out)["error"]:
        assert message in json.loads(out)["error"]
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.peak-learning-rat", "3"], "--optimizer.peak-learning-rate"),
        (["--model.head-dim", "3"], "head_dim=3 must be even"),
        (["--mesh", "datta=2"], "did you mean 'data'?"),
        (["--steps", "many"], "many"),
    ],
)
def test_a_wrong_flag_names_the_nearest_one(capsys, words, message):
    code, out, err = call(capsys, "train", "amber_tiny", "--data", "synthetic", *words, "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


def test_checkpoints_that_do_not_fit_are_refused(work, capsys, tmp_path):
    code, _, err = call(capsys, "generate", f"{work / 'run'}@7", "--prompt", "a")
    assert code == 2
    assert "no such checkpoint; there are init (step 0), 0" in err
    code, _, err = call(capsys, "generate", f"{work / 'run'}@all", "--prompt", "a")
    assert code == 2
    assert "names 3 checkpoints, and this verb takes one" in err
    long = ["generate", f"{work / 'run'}@1", "--prompt", "a", "--max-new-tokens", "400"]
    code, _, err = call(capsys, *long)
    assert code == 2
    assert "exceed the context of 256" in err
    code, _, err = call(capsys, "generate", f"{work / 'run'}@1", "--prompt", "a", "--mesh", "tensor=4")
    assert code == 2
    assert "tensor = 4 does not divide the 'heads' dimension (2)" in err


def test_every_verb_has_help(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for verb in run.VERBS:
        assert verb in out
        code, text, _ = call(capsys, verb, "--help")
        assert code == 0
        assert "--json" in text
    for kind in STUDIES:
        assert f"\n  {kind} " in call(capsys, "analyze", "--help")[1]
        code, text, _ = call(capsys, "analyze", kind, "--help")
        assert code == 0
        assert "--overwrite" in text


def test_a_study_must_be_named(capsys):
    code, _, err = call(capsys, "analyze", "memorisation", "runs/x@all")
    assert code == 2
    assert "no study 'memorisation'; did you mean 'memorization'?" in err
    code, _, err = call(capsys, "analyze")
    assert code == 2
    assert "write run.py analyze KIND REF; there are perplexity," in err


def test_several_studies_in_one_go(work, capsys):
    """Each is what it is alone: made together, there is nothing left for one of them to make."""
    settings = ["--evaluate.limit", 4, "--perplexity.window", 16]
    code, out, _ = call(capsys, "analyze", "evaluate,perplexity,weights", f"{work / 'run'}@all", *settings, "--json")
    assert code == 0
    kinds = {r["kind"] for r in json.loads(out)["results"]}
    assert {"evaluate/heldout", "perplexity", "weights"} <= kinds
    code, out, _ = call(capsys, "analyze", "perplexity", f"{work / 'run'}@all", "--window", 16, "--json")
    assert (code, json.loads(out)["made"], json.loads(out)["kept"]) == (0, 0, 3)
    code, _, err = call(capsys, "analyze", "perplexity,weights,perplexity", f"{work / 'run'}@all")
    assert code == 2
    assert "perplexity,weights,perplexity names a study twice" in err
    code, _, err = call(capsys, "analyze", "perplexity,weight", f"{work / 'run'}@all")
    assert code == 2
    assert "no study 'weight'; did you mean 'weights'?" in err


def test_sigterm_saves_and_exits_with_75(tmp_path):
    """A process of its own is told to stop in the middle of training; the same command then finishes the run."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, str(ROOT / "run.py"), "train", "amber_tiny", "--data", "synthetic", "--run", "run"]
    command += ["--simulate", "1", "--data.samples-per-chunk", "4000", "--json", *SMALL]
    options = {"cwd": tmp_path, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options)
    metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while len(read_lines(metrics)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    stopped = json.loads(out)
    assert stopped["reason"] == "interrupted"
    assert 3 <= stopped["step"] < 1000
    again = subprocess.run([*command, "--steps", str(stopped["step"] + 2)], **options, check=True)
    assert json.loads(again.stdout)["resumed_from"] == stopped["step"]


def test_the_installed_command_is_this_one():
    entry = configparser.ConfigParser()
    entry.read(ROOT / "setup.cfg")
    assert entry["options.entry_points"]["console_scripts"].split() == ["llm360", "=", "run:main"]


def test_series_check_misses_the_first(work, capsys, tmp_path):
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", work / "run", copy], check=True)
    subprocess.run(["rm", "-r", copy / "series" / "init"], check=True)
    code, _, err = call(capsys, "series", copy, "--check")
    assert code == 1
    assert "its parent is init, which is missing" in err


def test_the_script_starts_from_anywhere(tmp_path):
    """As a process of its own, without the test's environment: stdout holds one JSON object and nothing else."""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, str(ROOT / "run.py"), "train", "amber_tiny", "--data", "synthetic", "--steps", "2"]
    command += ["--simulate", "2", "--mesh", "tensor=2", "--json", *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["mesh"] == {"pipeline": 1, "data": 1, "fsdp": 1, "tensor": 2}
    assert list(tmp_path.iterdir()) == []
