"""Everything that `series --check` can find in a run is found, and a sound run has none of it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import run as cli
from checkpoint import files
from checkpoint.manifest import FILE
from checkpoint.series import Series
from data.dataset import ChunkedData
from data.prepare import PrepareConfig, prepare
from data.sources import SourceSpec
from models import families
from tests.checkpoint.tampered import change_one_weight
from training import loop
from training.audit import audit
from training.datasets import open_data
from training.metrics import read_lines

WQ = "layers.attention.wq"
LAST = "early/00000002"  # one that no other names as its parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("audit")


@pytest.fixture
def whole(tiny, made):
    """Do not change it: init, 000 to 002, early 1 and 2, and a rolling one a step after 002, on real data.

    With few optimizer states, so that a check has few files to read.
    """
    run = made / "run"
    if run.exists():
        return run
    (made / "text").mkdir()
    rng = np.random.default_rng(0)
    for n in range(30):
        (made / "text" / f"{n}.txt").write_text(" ".join(rng.choice(["ba", "be", "bi", "bo", "bu"], size=110)))
    spec = SourceSpec.parse(f"syllables={made / 'text'}")
    sizes = {"sequence_length": 32, "vocab_size": 270, "chunks": 4, "validation_per_source": 5, "seed": 1}
    prepare(PrepareConfig(recipe="amber_tiny", out=made / "data", sources=(spec,), **sizes), log=lambda _: None)
    data = ChunkedData(made / "data")
    config = dataclasses.replace(
        tiny,
        model=dataclasses.replace(tiny.model, vocab_size=270),
        series=dataclasses.replace(tiny.series, early_base=2, optimizer_every=10, rolling_every_steps=1000),
    )
    steps = data.phases[0].samples_per_chunk // 8
    assert 2 < steps <= 4, "so that early ones are after 1 and 2 steps"
    loop.train(config, run, data, families(), stop_at=3 * steps + 1)
    return run


@pytest.fixture
def copy(whole, tmp_path):
    """To be changed; without the rolling checkpoint, which takes as long to check as all others."""
    return shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("rolling"))


def found(run, **options):
    return audit(run, families(), open_data, **options)


def problem(run):
    """The only problem."""
    (text,) = found(run).problems
    return text


def failed(result):
    return [r["name"] for rows in result.rows.values() for r in rows if r["check"] == "FAILED"]


def entry_of(run, name):
    entries = [*Series(run).entries(), *Series(run).early(), Series(run).rolling()]  # of rolling ones, the newest
    return next(e for e in entries if e and f"{e.manifest.kind}/{e.manifest.name}" == name)


def edit_ledger(run, edit):
    """``edit`` changes the list of events."""
    events = read_lines(run / "ledger.jsonl")
    edit(events)
    (run / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def rewrite(run, name, **fields):
    """A manifest that is valid by itself, and the ledger and the list agree with it."""
    entry = entry_of(run, name)
    (entry.path / FILE).write_text(dataclasses.replace(entry.manifest, **fields).to_json())
    sha256 = files.hashes(entry.path, [FILE])[FILE]["sha256"]

    def edit(events):
        for e in events:
            if e.get("manifest_sha256") == entry.sha256:
                e["manifest_sha256"] = sha256

    edit_ledger(run, edit)
    relist(run)


def relist(run):
    assert cli.main(["series", str(run), "--rebuild", "--json"]) == 0


def test_a_sound_run_has_no_problems_and_no_notes(whole):
    said = []
    result = found(whole, log=said.append)
    assert (result.problems, result.notes) == ((), ()), "early 1 holds the weights of init: its learning rate was 0"
    names = {kind: [r["name"] for r in rows] for kind, rows in result.rows.items()}
    assert names["series"] == ["init", "000", "001", "002"]
    assert names["early"] == ["00000001", "00000002"]
    assert len(names["rolling"]) == 1
    assert all(r["check"] == "ok" for rows in result.rows.values() for r in rows)
    assert len(said) == 8, "each of seven checkpoints, and the data"


def test_a_flipped_byte_is_of_one_checkpoint(copy):
    files_of = sorted((copy / "series" / "init" / "optimizer").glob(f"*.mu.{WQ}/c/**/*"))
    chunk = next(p for p in files_of if p.is_file())
    raw = bytearray(chunk.read_bytes())
    raw[1] ^= 8
    chunk.write_bytes(raw)
    result = found(copy)
    assert len(result.problems) == 1
    assert "series/init: damaged: optimizer/" in result.problems[0]
    assert failed(result) == ["init"]


@pytest.mark.parametrize("with_digests", [False, True])
def test_other_weights_in_the_middle_of_the_series(copy, with_digests):
    """Files, digests and manifest fit one another, and even the list: the next checkpoint and the ledger know."""
    change_one_weight(entry_of(copy, "series/001"), WQ, 1e-3, with_digests)
    relist(copy)
    result = found(copy)
    texts = "\n".join(result.problems)
    assert ("series/001: does not hold the numbers that were saved" in texts) is not with_digests
    assert f"series/002: its parent is not {copy}/series/001 as it is now" in texts
    assert "series/001: is not what was saved: the ledger says" in texts
    assert failed(result) == ["001", "002"]


def test_other_weights_at_the_end_are_known_to_the_ledger(copy):
    change_one_weight(entry_of(copy, "series/002"), WQ, 1e-3)
    relist(copy)
    assert "series/002: is not what was saved: the ledger says that its manifest has the SHA-256" in problem(copy)


def test_the_last_save_of_a_name_counts(copy):
    def edit(events):
        (last,) = (e for e in events if e.get("name") == "002")
        events.insert(0, {**last, "manifest_sha256": "0" * 64})

    edit_ledger(copy, edit)
    assert found(copy).problems == ()
    edit_ledger(copy, lambda events: events.append(events[0]))
    assert "series/002: is not what was saved" in problem(copy)


def same_weights(run):
    """001 gets the parameters of 000, with a manifest to match and children and list adapted."""
    a, b = entry_of(run, "series/000"), entry_of(run, "series/001")
    shutil.rmtree(b.path / "params")
    shutil.copytree(a.path / "params", b.path / "params")
    hashes = files.hashes(b.path, [n for n in files.listing(b.path) if n != FILE])
    rewrite(run, "series/001", tensors=a.manifest.tensors, digests=a.manifest.digests, files=hashes)
    rewrite(run, "series/002", parent_sha256=entry_of(run, "series/001").sha256)
    return a.manifest.step, b.manifest.step


def test_two_indices_with_the_same_weights(copy):
    start, stop = same_weights(copy)
    result = found(copy)
    assert result.problems == (f"{copy}/series/001: holds the same parameters as {copy}/series/000, of another step",)
    assert failed(result) == ["000", "001"]
    skip = {"event": "skip", "step": start, "until": stop - 1}
    edit_ledger(copy, lambda events: events.append(skip))
    assert "holds the same parameters" in problem(copy), "one step between them was not skipped"
    edit_ledger(copy, lambda events: events.append({**skip, "step": stop - 1, "until": stop}))
    assert found(copy).problems == ()


def test_other_parameters_of_the_same_step(copy):
    """As where a rolling and an early checkpoint are of one step."""
    folder, entry = copy / "rolling" / "00000001", entry_of(copy, "early/00000001")
    shutil.copytree(entry.path, folder)
    (folder / FILE).write_text(dataclasses.replace(entry.manifest, kind="rolling").to_json())
    edit_ledger(copy, lambda events: [e.update(name="?") for e in events if e.get("kind") == "rolling"])  # of another
    assert found(copy).problems == ()
    change_one_weight(entry_of(copy, "rolling/00000001"), WQ, 1.0)
    assert "early/00000001 of the same step" in problem(copy)


def test_a_missing_index(copy):
    shutil.rmtree(copy / "series" / "001")
    relist(copy)
    result = found(copy)
    chain, missing = result.problems
    step = entry_of(copy, "series/000").manifest.step * 2
    assert f"{copy}/series: missing, up to step" in missing
    assert f": 001 (step {step}); put them back" in missing
    assert "series/002: its parent is 001, which is missing" in chain
    assert failed(result) == ["002"]


def test_the_newest_is_missing(copy):
    shutil.rmtree(copy / "series" / "002")
    shutil.rmtree(copy / "early" / "00000002")
    relist(copy)
    for name, text in zip(("early/00000002", "series/002"), sorted(found(copy).problems), strict=True):
        assert text.startswith(f"{copy}/{name}: is gone, and the ledger says that it was saved")


def test_what_does_not_belong_there(copy):
    (copy / "series" / "thesis.tex").write_text("do not touch")
    (copy / "early" / "notes").write_text("x")
    texts = found(copy).problems
    assert {t.split(": ")[0] for t in texts} == {f"{copy}/series/thesis.tex", f"{copy}/early/notes"}
    assert all("belongs to no checkpoint" in t for t in texts)


def test_a_copied_checkpoint(copy):
    shutil.copytree(copy / "series" / "000", copy / "series" / "007")
    assert "series/007: holds the manifest of series/000; remove this copied folder" in problem(copy)


def test_a_damaged_manifest_does_not_hide_the_rest(copy):
    file = entry_of(copy, LAST).path / FILE
    file.write_text(file.read_text().replace('"phase":0', '"phase":1'))
    result = found(copy)
    assert len(result.problems) == 1
    assert "damaged (its text does not match its own SHA-256)" in result.problems[0]
    assert [len(rows) for rows in result.rows.values()] == [4, 1, 0]


def test_a_torn_checkpoint_is_noted(copy):
    (copy / "series" / "003.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (copy / "rolling" / "00000009").mkdir(parents=True)
    result = found(copy)
    assert result.problems == ()
    assert [n.split(": ")[1] for n in result.notes] == ["not a finished checkpoint"] * 2
    assert "the next train removes it" in result.notes[0]


def test_the_list_is_not_what_the_manifests_say(copy):
    file = copy / "series.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    older = [{k: v for k, v in json.loads(line).items() if k != "digest"} for line in reversed(lines)]
    for content, wrong in (
        ("".join(lines[:-1]).replace('"step": 0', '"step": 1'), "002, init"),
        ("".join([*lines, lines[0]]), "init, 000"),
        ("".join(json.dumps(line) + "\n" for line in older), None),
    ):
        file.write_text(content)
        if wrong is None:
            assert found(copy).problems == ()
        else:
            text = problem(copy)
            assert f"{file}: is not what the manifests say of {wrong}" in text
            assert "series --rebuild repairs it" in text
    file.write_text("[]\n")
    assert f"{file}: cannot be read" in problem(copy)


def test_a_ledger_that_is_gone_or_damaged(copy):
    file = copy / "ledger.jsonl"
    text = file.read_text()
    file.write_text(text.replace('{"event"', "x", 1))
    assert f"{file}:1: not JSON" in problem(copy)
    file.write_bytes(b"\xff\xfe" + text.encode())
    assert f"{file}: cannot be read" in problem(copy)
    file.write_text("7\n" + text)
    assert "holds lines that are no events" in problem(copy)
    file.unlink()
    assert f"{file}: is missing" in problem(copy)


def test_a_save_that_the_ledger_missed_is_noted(copy):
    edit_ledger(copy, lambda events: events.remove(next(e for e in events if e.get("name") == "002")))
    result = found(copy)
    assert result.problems == ()
    assert len(result.notes) == 1
    assert "series/002: the ledger has no save of it" in result.notes[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 7}, "its tokens is 7, expected"),
        ({"samples": (0, 8)}, r"its samples is (0, 8), expected"),
        ({"parent_index": 1}, "its parent_index is 1, expected -1 after init"),
        ({"parent": "001"}, "its parent is 001, expected init after init"),
        ({"config_sha256": "0" * 64}, "was made by another config than config.json"),
        ({"data_sha256": "0" * 64}, "is not of the data that early/"),
    ],
)
def test_a_manifest_that_does_not_fit_the_run(copy, fields, message):
    rewrite(copy, LAST, **fields)
    result = found(copy)
    assert len(result.problems) == 1
    assert message in result.problems[0]
    assert len(failed(result)) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"phase": 1},
            "is phase 1, step {step}; config.json says that index 2 is phase 0, step {step}, with the name 002",
        ),
        ({"name": "last"}, "config.json says that index 2 is phase 0, step {step}, with the name 002"),
        ({"index": 3, "name": "003"}, "its index is 3, expected 2 after 001"),
        ({"index": 70, "name": "070"}, "the run of config.json has no checkpoint of index 70"),
    ],
)
def test_a_checkpoint_that_is_not_in_its_place(copy, fields, message):
    step = entry_of(copy, "series/002").manifest.step
    rewrite_name = fields.get("name", "002")
    if rewrite_name != "002":
        path = entry_of(copy, "series/002").path
        manifest = entry_of(copy, "series/002").manifest
        path.rename(path.with_name(rewrite_name))
        (path.with_name(rewrite_name) / FILE).write_text(dataclasses.replace(manifest, **fields).to_json())
        relist(copy)
    else:
        rewrite(copy, "series/002", **fields)
    assert message.format(step=step) in "\n".join(found(copy).problems)


def test_a_clock_that_was_moved_back_is_noted(copy):
    rewrite(copy, LAST, wall_time=1.0)
    result = found(copy)
    assert result.problems == ()
    (text,) = result.notes
    assert "is older than its parent init (the clock was moved back)" in text


def test_another_config(copy):
    file = copy / "config.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"seed": 99}))
    texts = found(copy).problems
    assert len(texts) == 6
    assert all("was made by another config than config.json" in t for t in texts)
    file.write_text(json.dumps(value | {"seed": "x"}))
    assert "config.seed is 'x'" in problem(copy)
    file.write_text("{")
    assert f"{file}: cannot be read" in problem(copy)


def test_manifests_without_digests(copy):
    manifest = entry_of(copy, LAST).manifest
    plain = {n: {k: v for k, v in t.items() if k != "digest"} for n, t in manifest.tensors.items()}
    rewrite(copy, LAST, tensors=plain, digests={})
    assert "has no digests, which the code that wrote it always saves" in problem(copy)
    rewrite(copy, LAST, tensors=plain, digests={}, version=2)
    result = found(copy)
    assert result.problems == ()
    (text,) = result.notes
    assert "no digests (written by older code)" in text


def as_older_code(run):
    """What the run would be if code before digests, names in the ledger and early checkpoints had written it."""
    shutil.rmtree(run / "early")
    for parent, name in ((None, "init"), ("init", "000"), ("000", "001"), ("001", "002")):
        entry = entry_of(run, f"series/{name}")
        tensors = {n: {"shape": t["shape"], "dtype": t["dtype"]} for n, t in entry.manifest.tensors.items()}
        fields = {"parent_index": None, "digests": {}, "tensors": tensors, "version": 2}
        fields["parent_sha256"] = parent and entry_of(run, f"series/{parent}").sha256
        (entry.path / FILE).write_text(dataclasses.replace(entry.manifest, **fields).to_json())
    edit_ledger(run, lambda events: [e.pop(k, None) for e in events for k in ("name", "manifest_sha256")])
    relist(run)
    lines = [{k: v for k, v in r.items() if k != "digest"} for r in read_lines(run / "series.jsonl")]
    (run / "series.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    config = json.loads((run / "config.json").read_text())
    del config["guard"]
    config["series"] = {"rolling_every_steps": 1000}
    (run / "config.json").write_text(json.dumps(config))


def test_a_run_of_older_code_is_sound(copy):
    as_older_code(copy)
    result = found(copy)
    assert result.problems == ()
    assert len([n for n in result.notes if "no digests (written by older code)" in n]) == 4
    assert any("config.json: by older code" in n for n in result.notes)
    change_one_weight(entry_of(copy, "series/001"), WQ, 1e-3, with_digests=False)
    assert any("series/002: its parent is not" in p for p in found(copy).problems)


# ---- the data ------------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(copy, made, tmp_path):
    """A copy of the data that the copy of the run names."""
    data = shutil.copytree(made / "data", tmp_path / "data")
    edit_ledger(copy, lambda events: [e.update(data=str(data)) for e in events if "data" in e])
    return data


def test_a_changed_data_chunk_is_named(copy, elsewhere):
    assert found(copy).problems == ()
    for file in (elsewhere / "chunks" / "001.arrayrecord", elsewhere / "chunks" / "003.arrayrecord"):
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    texts = found(copy).problems
    assert [t.split(": ")[0] for t in texts] == [f"{elsewhere}/chunks/{n}.arrayrecord" for n in ("001", "003")]
    assert all("SHA-256 differs from the manifest" in t for t in texts)
    (elsewhere / "chunks" / "002.arrayrecord").unlink()
    assert len(found(copy).problems) == 3
    unread = audit(copy, families(), lambda path, _: ChunkedData(path), content=False)
    assert unread.problems == ()
    assert unread.notes[-1:] == (f"{elsewhere}: only its manifest was compared, as was asked for",)


def test_other_data(copy, elsewhere):
    manifest = elsewhere / "manifest.json"
    value = json.loads(manifest.read_text())
    value.pop("sha256")  # as in data of older code
    manifest.write_text(json.dumps(value | {"recipe": "another"}))
    assert f"{elsewhere}: its manifest is not of the data that series/init, series/000" in problem(copy)
    manifest.write_text("{")
    assert f"{manifest}: not a data manifest" in problem(copy)


def test_the_same_data_in_other_shares(copy):
    edit_ledger(copy, lambda events: [e.update(mixture=[["syllables", 1.0]]) for e in events if "data" in e])
    assert "its manifest is not of the data" in problem(copy)


def test_data_that_cannot_be_looked_at_is_noted(copy, elsewhere):
    elsewhere.rename(elsewhere.with_name("moved"))
    result = found(copy)
    assert result.problems == ()
    assert result.notes == (f"{elsewhere}: the data of the run is not there any more, and was not looked at",)
    edit_ledger(copy, lambda events: [e.update(data="synthetic") for e in events if "data" in e])
    (text,) = found(copy).notes
    assert "was trained on synthetic data" in text
    edit_ledger(copy, lambda events: [e.pop("data", None) for e in events])
    (text,) = found(copy).notes
    assert "its ledger names no data" in text


# ---- the verb ------------------------------------------------------------------------------------------------------


def call(capsys, *words):
    code = cli.main([str(w) for w in words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_the_verb_lists_all_kinds(whole, capsys):
    code, out, _ = call(capsys, "series", whole)
    lines = out.splitlines()
    assert code == 0
    named = [line.split()[0] for line in lines[1:-1]]
    assert named[:8] == ["init", "000", "001", "002", "early:", "00000001", "00000002", "rolling:"]
    assert lines[-1].startswith(f"4 checkpoints in {whole}, ")
    newest = entry_of(whole, "series/002").manifest
    assert newest.digests["params"][:8] in lines[4]
    assert f"{newest.tokens:,}" in lines[4]
    assert lines[6].split()[-3] == "-", "an early one has no optimizer state"
    code, out, _ = call(capsys, "series", whole, "--json")
    result = json.loads(out)
    assert [len(result[k]) for k in ("checkpoints", "early", "rolling", "problems")] == [4, 2, 1, 0]
    assert result["checkpoints"][3]["params_digest"] == newest.digests["params"]
    assert "check" not in result["checkpoints"][0]


def test_the_verb_checks(copy, capsys):
    code, out, err = call(capsys, "series", copy, "--check")
    assert code == 0
    assert "ok" in out.splitlines()[1]
    assert "series/init: " in err
    (copy / "series" / "thesis.tex").write_text("x")
    rewrite(copy, LAST, wall_time=1.0)
    capsys.readouterr()
    code, out, err = call(capsys, "series", copy, "--check", "--json")
    assert code == 1
    assert [len(json.loads(out)[k]) for k in ("problems", "notes")] == [1, 1]
    assert "error: " in err
    assert "note: " in err


def test_the_verb_compares(whole, capsys):
    code, out, _ = call(capsys, "series", whole, "--diff", "init", "002")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["total", "002"]
    code, out, _ = call(capsys, "series", whole, "--diff", "init", "step=1", "--json")
    result = json.loads(out)
    assert (result["a"], result["b"]) == ("init", "00000001")
    assert result["total"]["differing"] == 0, "the learning rate of the first step is 0"
    assert {t["name"] for t in result["tensors"]} >= {WQ, "norm.scale"}


def test_the_verb_refuses(whole, copy, capsys):
    for words, message in (
        (["--check", "--rebuild"], "ask one thing"),
        (["--diff", "0", "1", "--check"], "ask one thing"),
        (["--diff", "0", "all"], "all names 4 checkpoints, expected one"),
        (["--diff", "0", "9"], "no such checkpoint"),
    ):
        code, _, err = call(capsys, "series", whole, *words)
        assert code == 2
        assert message in err
    (copy / "config.json").unlink()
    code, _, err = call(capsys, "series", copy, "--check")
    assert code == 2
    assert "not a run directory (no config.json in it)" in err


def test_what_a_kill_leaves_is_noted(copy):
    """Between a manifest and its line in the list; a line without its end; a run that has only begun."""
    index = copy / "series.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    for text in ("".join(lines[:-1]), "".join(lines)[:-5]):
        index.write_text(text)
        result = found(copy)
        assert result.problems == ()
        assert "series.jsonl: does not name 002 (a crash just after it was saved)" in result.notes[0]
    for name in ("series", "early", "ledger.jsonl", "series.jsonl"):
        (shutil.rmtree if (copy / name).is_dir() else (lambda path: path.unlink()))(copy / name)
    assert found(copy).problems == ()


def test_an_imported_checkpoint_does_not_hide_the_rest(copy):
    """Put among those that were trained, it would make all of them imported ones."""
    rewrite(copy, "early/00000002", origin={"folder": "elsewhere", "format": "huggingface"})
    change_one_weight(entry_of(copy, "series/002"), WQ, 0.5)
    relist(copy)
    texts = found(copy).problems
    assert any("early/00000002: was imported, among checkpoints that were trained" in t for t in texts)
    assert any("series/002: is not what was saved" in t for t in texts)


def test_the_newest_state_without_its_manifest_is_no_torn_one(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    (rolling,) = (run / "rolling").iterdir()
    (rolling / FILE).unlink()
    assert f"{rolling}: has lost its manifest, and is the newest state to go on from" in problem(run)


def test_another_tokenizer(copy, elsewhere):
    with open(copy / "tokenizer.model", "ab") as file:
        file.write(b"x")
    assert "tokenizer.model: is not the tokenizer of" in problem(copy)
    with open(elsewhere / "tokenizer.model", "ab") as file:
        file.write(b"x")
    assert any(f"{elsewhere}/tokenizer.model: SHA-256 differs from the manifest" in t for t in found(copy).problems)
