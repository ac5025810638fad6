"""Planted benchmark items are found at exactly the steps that read them; what was not planted is not found."""

import hashlib
import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pytest

import run as cli
from analysis import ngrams, results
from analysis.contamination import Contamination
from analysis.ngrams import Finder, Grams, normalised, token_pieces, words
from analysis.results import Scored, estimate
from analysis.subject import Subject, Target
from analysis.sweep import sweep
from data.dataset import ChunkedData
from data.sample import Schedule
from data.tokenizer import load
from errors import RunError, UserError
from models import families
from training.datasets import open_data

SMALL = [
    "--model.vocab-size=320", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--data.sequence-length=64", "--data.chunks=2", "--data.global-batch=8",
    "--data.validation-per-source=2",
]  # fmt: skip
VOCABULARY = [a + b for a in ("ka", "lo", "mi", "nu", "pe") for b in ("ra", "st", "ti", "von", "x")]


def sentence(seed, n):
    """Words that stand nowhere else: the next one is no function of those before."""
    return " ".join(np.random.default_rng(seed).choice(VOCABULARY, size=n))


PLANTED = {name: sentence(seed, 16) for name, seed in (("one", 1), ("two", 2), ("three", 3))}
NEAR = sentence(4, 20)
"""Of which the data has 12 words in a row, and no more."""
SHORT = sentence(5, 9)
"""Is looked for as a whole."""
TORN = sentence(6, 20)
"""Its first half ends a document of the data, its second half begins the next one."""
ITEMS = [*PLANTED.values(), NEAR, SHORT, TORN, sentence(7, 30), sentence(8, 9), "three short words"]


def shown(text):
    """The text as it may be spelled elsewhere."""
    first, *rest = text.split(" ")
    return f"“{first.upper()},”\n" + "  ".join(rest) + "!"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prepared data with items in it, a run on it, and the items as a file."""
    folder = tmp_path_factory.mktemp("contamination")
    (folder / "text").mkdir()
    inside = {
        5: shown(PLANTED["one"]),
        11: PLANTED["two"],
        23: shown(PLANTED["three"]),
        37: shown(PLANTED["three"]),
        17: " ".join(NEAR.split()[3:15]),
        29: SHORT,
    }
    for n in range(60):
        middle = inside.get(n, "")
        text = f"{sentence(100 + n, 30)} before {middle} after {sentence(200 + n, 30)}"
        # Files are sorted by name: documents 40 and 41 stand one after the other.
        text += f" {' '.join(TORN.split()[:10])}" if n == 40 else ""
        text = f"{' '.join(TORN.split()[10:])} {text}" if n == 41 else text
        (folder / "text" / f"{n:03}.txt").write_text(text)
    (folder / "more").mkdir()
    for n in range(20):
        (folder / "more" / f"{n}.txt").write_text(sentence(300 + n, 60))
    call("prepare", "amber_tiny", "--out", folder / "data", *sources(folder), *SMALL)
    call("train", "amber_tiny", "--data", folder / "data", "--run", folder / "run", "--mesh=data=4,fsdp=2", *SMALL)
    with open(folder / "items.jsonl", "w") as file:
        for text in ITEMS:
            file.write(json.dumps({"text": text}) + "\n")
    return folder


def sources(folder):
    return ["--source", f"words={folder / 'text'}", "--source", f"more={folder / 'more'}", "--workers", 1]


def call(*arguments):
    assert cli.main([str(a) for a in arguments]) == 0


def target(folder, **more):
    return Target(f"{folder}/run@all", families(), open_data, **more)


def asked(folder, **more):
    return Contamination(items=(f"planted={folder / 'items.jsonl'}",), **more)


def another_run(folder, at, **named):
    """The run without its checkpoints and results, whose ledger names other data."""
    shutil.copytree(folder / "run", at / "run", ignore=shutil.ignore_patterns("results", "series"))
    events = [json.loads(line) for line in (at / "run" / "ledger.jsonl").read_text().splitlines()]
    events = [{**e, **named} if e.get("data") else e for e in events]
    (at / "run" / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def silent(_):
    pass


def rows_of(study, entry, t):
    scored = study.score(Subject(t, entry, None))
    return scored.summary["tasks"]["planted"], {r["doc_hash"]: r for r in scored.tables["items"].to_pylist()}


def sha(text):
    return hashlib.sha256(text.encode()).hexdigest()


def truth(t, text, n=13):
    """Steps that read an n-gram of a text, found by decoding every row of every step and comparing words."""
    found, tokenizer = set(), t.tokenizer
    grams = {tuple(text.split()[i : i + n]) for i in range(len(text.split()) - n + 1)}
    for step in range(t.tracer.schedule.steps):
        for row in range(t.tracer.schedule.global_batch):
            tokens = t.tracer.data.sample(*t.tracer.schedule.place(step, row)).tokens.tolist()
            for document in tokenizer.decode(tokens).split("</s>"):
                w = "".join(c if c.isalnum() else " " if c.isspace() else "" for c in document.lower()).split()
                if grams & {tuple(w[i : i + n]) for i in range(len(w) - n + 1)}:
                    found.add(step)
    return sorted(found)


def test_planted_items_are_found_with_exactly_their_steps(folder):
    t = target(folder)
    lines = []
    (study,) = asked(folder).open(t, lines.append)
    assert any("MB/s" in line for line in lines)
    entries = t.series.entries()
    summary, rows = rows_of(study, entries[-1], t)
    expected = {text: truth(t, text) for text in PLANTED.values()} | {SHORT: truth(t, SHORT, 9)}
    expected = {text: steps for text, steps in expected.items() if steps}
    assert len(expected) >= 3, "windows cut too many of the planted texts: plant others"
    read = {h: r for h, r in rows.items() if r["first_step"] is not None}
    assert set(read) == {sha(text) for text in expected}
    for text, steps in expected.items():
        row = rows[sha(text)]
        assert (row["first_step"], row["steps"]) == (steps[0], len(steps))
        after = [e.manifest.name for e in entries if e.manifest.step > steps[0]]
        assert row["first_checkpoint"] == after[0]
        # The example is a sample of the first step, and the document there is the one with the text.
        samples = t.tracer.sample(row["chunk"], row["position"])
        assert steps[0] in {s["step"] for s in samples}
        assert row["document"] in {d["document"] for d in samples[0]["documents"]}
        spelled = (folder / "text" / row["document"].partition("/")[2]).read_text()
        assert text in normalised(spelled)
    assert sha(NEAR) not in rows
    assert sha(TORN) not in rows
    assert {k: summary[k] for k in ("items", "testable", "too_short", "contaminated", "seen")} == {
        "items": 9, "testable": 8, "too_short": 1, "contaminated": len(expected), "seen": len(expected),
    }  # fmt: skip
    assert sum(summary["shares"]) == len(expected)
    assert math.isclose(summary["seen_share"], len(expected) / 8)
    # A checkpoint has seen what steps before its own read, and no other.
    for entry in entries:
        summary, rows = rows_of(study, entry, t)
        seen = {sha(text) for text, steps in expected.items() if steps[0] < entry.manifest.step}
        assert {h for h, r in rows.items() if r["seen"]} == seen
        assert summary["seen"] == len(seen)
        for text, steps in expected.items():
            assert rows[sha(text)]["steps"] == sum(s < entry.manifest.step for s in steps)
    assert rows_of(study, entries[0], t)[0]["seen"] == 0


def test_twelve_equal_words_are_found_by_shorter_ngrams(folder):
    t = target(folder)
    (study,) = asked(folder, n=12).open(t, silent)
    _, rows = rows_of(study, t.series.entries()[-1], t)
    assert sha(NEAR) in rows
    assert rows[sha(NEAR)]["found_in_run"] <= 1
    assert rows[sha(NEAR)]["ngrams"] == 9
    # The share that makes an item contaminated.
    (study,) = asked(folder, n=12, share=0.5).open(t, silent)
    _, rows = rows_of(study, t.series.entries()[-1], t)
    assert not rows[sha(NEAR)]["seen"]
    assert any(r["seen"] for r in rows.values())


def scan_files(run):
    return {p.name: p.read_bytes() for p in (run / "results" / "contamination").glob("scan-*/*.parquet")}


def test_a_killed_scan_goes_on_and_workers_make_no_difference(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    t = target(tmp_path)
    (study,) = asked(folder, workers=2).open(t, silent)
    before, files = study.score(Subject(t, t.series.entries()[-1], None)), scan_files(tmp_path / "run")
    assert set(files) == {"chunk-000.parquet", "chunk-001.parquet"}
    (scan,) = (tmp_path / "run" / "results" / "contamination").glob("scan-*")
    (scan / "chunk-001.done").unlink()  # what a kill in the second chunk leaves
    (scan / "chunk-001.parquet").unlink()
    kept = (scan / "chunk-000.parquet").stat().st_mtime_ns
    lines = []
    (study,) = asked(folder).open(t, lines.append)
    assert "(1 of them before)" in lines[-1]
    assert (scan / "chunk-000.parquet").stat().st_mtime_ns == kept
    assert scan_files(tmp_path / "run") == files
    after = study.score(Subject(t, t.series.entries()[-1], None))
    assert after.summary == before.summary
    assert after.tables["items"].equals(before.tables["items"])
    assert results.kinds(tmp_path / "run") == []
    (scan / "chunk-000.parquet").write_bytes(b"torn")
    with pytest.raises(RunError, match=r"chunk-000\.parquet: cannot be read"):
        asked(folder).open(t, silent)
    (scan / "chunk-000.parquet").unlink()
    asked(folder).open(t, silent)
    assert scan_files(tmp_path / "run") == files


def test_scores_with_and_without_what_was_seen(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    t = target(tmp_path)
    entry = t.series.entries()[-1]
    (study,) = asked(folder).open(t, silent)
    assert len(sweep(t, [study], silent).made) == len(t.series.entries())
    summary = rows_of(study, entry, t)[0]
    assert (summary["scores"], summary["evaluation"]) == ({}, None)
    assert summary["scores_missing"] == "the checkpoint has no results of the task"
    _, rows = rows_of(study, entry, t)
    seen = {h for h, r in rows.items() if r["seen"]}
    right = [sha(text) in seen or text == NEAR for text in ITEMS]
    table = pa.table(
        {
            "doc_id": list(range(len(ITEMS))),
            "doc_hash": [sha(text) for text in ITEMS],
            "acc": right,
            "acc_norm": pa.array([float(r) for r in right[:-1]] + [None]),
            "perplexity": [-1.0] * len(ITEMS),
            "target": [1] * len(ITEMS),
        }
    )
    values = {"acc": np.mean(right), "acc_norm": np.mean(right[:-1]), "perplexity": math.e}
    summary = {"shots": 0} | {name: {"value": float(v), "stderr": None, "n": 1} for name, v in values.items()}
    results.write(
        tmp_path / "run", "evaluate/planted", entry, {"shots": 0}, Scored(summary, {"items": table}), "data=1", 1
    )
    lines = []
    (again,) = asked(folder).open(t, lines.append)
    assert again.settings() == study.settings()
    assert [line for line in lines if "made anew" in line] == [
        f"{tmp_path / 'run'}/results/contamination/{entry.manifest.name}.json: planted has been evaluated since; "
        "made anew"
    ]
    summary = rows_of(again, entry, t)[0]
    scores = summary["scores"]
    assert summary["scores_missing"] is None
    assert summary["evaluation"] == results.sha256_of({"shots": 0})
    assert set(scores) == {"acc", "acc_norm"}, "a perplexity is no mean, and a target no score"
    n, k = len(ITEMS), len(seen)
    assert scores["acc"]["all"] == pytest.approx(
        {"value": (k + 1) / n, "stderr": float(np.std(right, ddof=1) / np.sqrt(n)), "n": n}
    )
    assert scores["acc"]["only_seen"] == {"value": 1.0, "stderr": 0.0, "n": k}
    assert scores["acc"]["without_seen"]["value"] == pytest.approx(1 / (n - k))
    assert scores["acc_norm"]["all"]["n"] == n - 1
    assert rows_of(again, t.series.entries()[0], t)[0]["scores"] == {}, "another checkpoint was not evaluated"
    # What a sweep writes is JSON, and is made once.
    outcome = sweep(t, [again], silent)
    assert [path.stem for path in outcome.made] == [entry.manifest.name]
    assert len(sweep(t, asked(folder).open(t, silent), silent).kept) == len(t.series.entries())
    # Evaluated otherwise, and not evaluated any more: made anew, of the one checkpoint.
    evaluation = results.folder(tmp_path / "run", "evaluate/planted") / f"{entry.manifest.name}.json"
    kept = evaluation.read_text()
    for content in (kept.replace('"shots": 0', '"shots": 5'), None):
        evaluation.unlink() if content is None else evaluation.write_text(content)
        assert len(sweep(t, asked(folder).open(t, silent), silent).made) == 1
    assert results.of_kind(tmp_path / "run", "contamination")[-1].summary["tasks"]["planted"]["scores"] == {}
    table = results.of_kind(tmp_path / "run", "contamination")[-1].table("items")
    assert set(table["doc_hash"].to_pylist()) == set(rows)


def evaluated(run, entry, hashes, name="items"):
    """A result of the task, of these items."""
    table = pa.table({"doc_hash": hashes, "acc": [True] * len(hashes)})
    summary = {"acc": {"value": 1.0, "stderr": None, "n": len(hashes)}}
    results.write(run, "evaluate/planted", entry, {}, Scored(summary, {name: table}), "data=1", 1)


def test_scores_of_other_items_are_not_given(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    t = target(tmp_path)
    entry = t.series.entries()[-1]
    evaluated(t.run, entry, [sha(ITEMS[0]), sha("of a changed file"), sha("and another")])
    (study,) = asked(folder).open(t, silent)
    summary = rows_of(study, entry, t)[0]
    assert summary["scores"] == {}
    assert summary["scores_missing"] == "2 of the 3 items that were evaluated are not those that were looked for"
    evaluated(t.run, entry, [sha(text) for text in ITEMS[:3]])  # of some of them, with a limit
    summary = rows_of(study, entry, t)[0]
    assert (summary["scores"]["acc"]["all"]["n"], summary["scores_missing"]) == (3, None)


def test_an_evaluation_without_items_leaves_no_checkpoint_out(folder, tmp_path):
    """That of HumanEval has samples, of which an item has several."""
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    t, lines = target(tmp_path), []
    evaluated(t.run, t.series.entries()[-1], [sha(ITEMS[0])], name="samples")
    outcome = sweep(t, asked(folder).open(t, lines.append), silent)
    assert outcome.failed == {}
    assert sum("planted: its results have no table of items" in line for line in lines) == 1
    summary = results.of_kind(t.run, "contamination")[-1].summary["tasks"]["planted"]
    assert (summary["scores"], summary["scores_missing"]) == ({}, "its results have no table of items")


def test_a_series_that_grew_has_other_first_checkpoints(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    entries = target(tmp_path).series.entries()
    last = entries[-1].path
    last.rename(tmp_path / "kept")
    sweep(t := target(tmp_path), asked(folder).open(t, silent), silent)

    def firsts():
        table = results.of_kind(tmp_path / "run", "contamination")[0].table("items")
        return [name for step, name in zip(*(table[c].to_pylist() for c in ("first_step", "first_checkpoint"))) if step]

    assert None in firsts()
    (tmp_path / "kept").rename(last)
    lines = []
    outcome = sweep(t := target(tmp_path), asked(folder).open(t, lines.append), silent)
    assert sum("the series has other checkpoints now; made anew" in line for line in lines) == len(entries) - 1
    assert len(outcome.made) == len(entries)
    assert None not in firsts()
    assert len(sweep(t, asked(folder).open(t, silent), silent).kept) == len(entries)
    # A table that cannot be read is made anew; results of other settings are left alone.
    results.table_path(outcome.made[-1], "items").write_bytes(b"torn")
    asked(folder, n=12).open(t, silent)
    assert outcome.made[-1].exists()
    assert len(sweep(t, asked(folder).open(t, silent), silent).made) == 1


def test_batches_whose_update_was_skipped_were_not_read(folder, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("results"))
    t = target(tmp_path)
    text = next(text for text in PLANTED.values() if len(truth(t, text)) == 1)
    (step,) = truth(t, text)
    with open(tmp_path / "run" / "ledger.jsonl", "a") as file:
        file.write(json.dumps({"event": "skip", "step": step, "until": step + 1}) + "\n")
    t = target(tmp_path)
    (study,) = asked(folder).open(t, silent)
    assert study.settings()["skipped"] == [[step, step + 1]]
    summary, rows = rows_of(study, t.series.entries()[-1], t)
    assert rows[sha(text)]["first_step"] is None
    assert not rows[sha(text)]["seen"]
    assert summary["unread"] >= 1


def test_a_mixture_reads_items_at_its_own_steps(folder, tmp_path):
    another_run(folder, tmp_path, mixture=[["words", 0.95], ["more", 0.05]])
    t = target(tmp_path)
    assert t.tracer.mixed
    (study,) = asked(folder).open(t, silent)
    _, rows = rows_of(study, target(folder).series.entries()[-1], t)
    # The tracer's own search finds what is spelled as the item is.
    hits = [h["step"] for h in t.tracer.text(PLANTED["two"], 1000) if h["step"] is not None]
    assert hits
    row = rows[sha(PLANTED["two"])]
    assert (row["first_step"], row["steps"]) == (min(hits), len(set(hits)))
    once = Schedule(t.tracer.schedule.phases, t.tracer.schedule.phase_steps, 8)
    assert hits != [once.reader(row["chunk"], row["position"])[0]], "the mixture reads it where the data set has it"


def test_ngrams_stay_inside_rows_and_documents(folder):
    data = ChunkedData(folder / "data")
    tokenizer = load(data.tokenizer_file)
    pieces = token_pieces(tokenizer, 320)
    text = " ".join(f"{a}{b}" for a in "abcd" for b in "vwxyz")  # 20 words
    grams = Grams.of([text], 13, 8)
    finder = Finder(grams, pieces)
    ids = tokenizer.encode(text)
    half = tokenizer.encode(" ".join(text.split()[:10])), tokenizer.encode(" ".join(text.split()[10:]))
    room = 2 * len(ids)

    def row(*tokens):
        return [*tokens, *[tokenizer.eos_id] * (room - len(tokens))]

    def hits(*rows):
        return finder.find(np.array(rows, np.int32))[0].tolist()

    assert hits(row(*ids)) == [[0, g] for g in range(8)]
    assert hits(row(5, tokenizer.eos_id), row(*half[0], *half[1])) == [[1, g] for g in range(8)]
    assert hits(row(*half[0], tokenizer.eos_id, *half[1])) == []
    full = [tokenizer.eos_id] * (room - len(half[0]))
    assert hits([*full, *half[0]], row(*half[1])) == []
    size = finder.find(np.array([row(*ids)], np.int32))[1]
    assert size == len(text.encode()) + 1  # and the space of its first piece


def test_words_are_those_of_the_harness():
    """lm-eval's decontamination: lower case, punctuation deleted, cut at white space."""
    janitor = pytest.importorskip("lm_eval.decontamination.janitor")
    text = "It's   a\tstate-of-the-art (very!) “Test”:\n x + y = 3.14 … SIX e\u0301 zero\u200bwidth\u00a0end"
    theirs = janitor.Janitor(delete_chars=janitor.string.punctuation + "“”…\u200b").normalize_string(text).split()
    assert normalised(text).split() == theirs
    assert normalised(text) == "its a stateoftheart very test x y 314 six e\u0301 zerowidth end"
    random = np.random.default_rng(0)
    texts = [sentence(int(s), int(n)) for s, n in zip(range(40), random.integers(1, 40, 40))]
    texts += texts[:5]
    grams = Grams.of(texts, 13, 8)
    expected = []
    for text in texts:
        n = len(text.split())
        of_text = set(janitor.word_ngrams(text, 13 if n >= 13 else n)) if n >= 8 else set()
        expected.append({" ".join(gram) if not isinstance(gram, str) else gram for gram in of_text})
    found = [{grams.text(g) for g in grams.gram[grams.item == i].tolist()} for i in range(len(texts))]
    assert found == expected
    assert grams.counts.tolist() == [len(e) for e in expected]


def test_items_in_several_blocks_are_those_of_one(monkeypatch):
    texts = [sentence(s, 20) for s in range(50)]
    whole = Grams.of(texts, 13, 8)
    monkeypatch.setattr(ngrams, "_AT_ONCE", 300)
    pieces = Grams.of(texts, 13, 8)
    for name in ("at", "length", "gram", "item", "counts", "starts", "ends", "chars"):
        assert (getattr(whole, name) == getattr(pieces, name)).all()
    assert Grams.of(["too short"], 13, 8).counts.tolist() == [0]


def test_a_hash_alone_is_no_hit(folder, monkeypatch):
    """With hashes that are all equal, every n words are looked at, and only equal ones count."""
    tokenizer = load(folder / "data")
    text, other = sentence(9, 13), sentence(10, 13)
    grams = Grams.of([text], 13, 8)
    finder = Finder(grams, token_pieces(tokenizer, 320))
    rows = [tokenizer.encode(text), tokenizer.encode(other)]
    width = max(map(len, rows))
    rows = np.array([[*r, *[tokenizer.eos_id] * (width - len(r))] for r in rows], np.int32)
    assert finder.find(rows)[0].tolist() == [[0, 0]]
    same = grams.keys[13][0]
    monkeypatch.setattr(ngrams.Words, "hashes_of", lambda w, n: np.full(max(len(w.hashes) - n + 1, 0), same))
    assert finder.find(rows)[0].tolist() == [[0, 0]]


def test_other_characters():
    assert normalised("ÄRGER, Straße") == "ärger straße"
    assert words("").starts.tolist() == []
    assert normalised("Ⅷ 漢字 \U0001f600 \ud800x nul\0l") == "ⅷ 漢字 \ud800x nul l"
    assert estimate(np.array([])) == {"value": None, "stderr": None, "n": 0}
    assert estimate(np.array([2.0])) == {"value": 2.0, "stderr": None, "n": 1}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give what to look for"),
        ({"items": ("a=x",), "n": 5}, "1 <= shortest <= n <= 1000"),
        ({"items": ("a=x",), "share": 1.5}, "--share 1.5"),
        ({"items": ("a=x",), "workers": 0}, "--workers 0"),
        ({"tasks": ("piqa",)}, "--benchmarks"),
    ],
)
def test_settings_that_make_no_sense(fields, message):
    with pytest.raises(UserError, match=message):
        Contamination(**fields)


def test_items_that_are_not_there(folder, tmp_path):
    t = target(folder)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text("{}\n")
    for items, message in (
        (("x",), "write NAME=PATH"),
        ((f"x={tmp_path / 'none'}",), "does not exist"),
        ((f"x={tmp_path / 'empty.jsonl'}",), "no documents"),
        ((f"x={tmp_path / 'bad.jsonl'}",), "bad.jsonl:1"),
        ((f"x={folder / 'items.jsonl'}",) * 2, "named twice"),
    ):
        with pytest.raises(UserError, match=message):
            Contamination(items=items).open(t, silent)


def test_data_that_cannot_be_looked_through(folder, tmp_path):
    another_run(folder, tmp_path / "c", data=None)
    with pytest.raises(UserError, match="was not trained here, so that which step read what is not known"):
        asked(folder).open(target(tmp_path / "c", data=folder / "data"), silent)
    another_run(folder, tmp_path / "a", data="synthetic", mixture=None)
    with pytest.raises(UserError, match="synthetic"):
        asked(folder).open(target(tmp_path / "a"), silent)
    call("prepare", "amber_tiny", "--out", folder / "data", *sources(folder), "--to", "jsonl", *SMALL)
    published = next(folder.rglob("train_000.jsonl")).parent.parent
    another_run(folder, tmp_path / "b")
    with pytest.raises(UserError, match="published files"):
        asked(folder).open(target(tmp_path / "b", data=published), silent)
