"""The report as a page: its sections and figures, its data, what it says of damage, and how it looks in a browser."""

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pyarrow as pa
import pytest

import models
from analysis import figures, published, report, report_run, report_studies, results
from analysis.figures import Line, Mark, Panel
from analysis.page import download, number, plain, slug
from analysis.report import write
from analysis.report_run import Found
from analysis.report_studies import flatten
from analysis.results import Scored
from analysis.subject import Target
from analysis.sweep import sweep
from analysis.weights import Weights
from checkpoint.series import Series
from errors import UserError

from .browser import Browser, find

pytest.importorskip("matplotlib", reason="the report's figures need the extra 'analysis'")

SMALL = [
    "--model.vocab-size=320", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--data.sequence-length=32", "--data.global-batch=8", "--data.validation-per-source=4",
    "--data.chunks=3",
]  # fmt: skip
EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
    """What a test asks of a page; it fails where tags do not fit."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.loads, self.files, self.tags, self.labels, self.said = [], [], [], {}, [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.loads += [values[k] for k in ("src", "href", "xlink:href") if k in values]
        self.ids += [values["id"]] if "id" in values else []
        self.labels += [values["aria-label"]] if values.get("role") == "img" else []
        if "download" in values:
            self.files[values["download"]] = unquote(values["href"].partition(",")[2])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said += data

    def rows(self, name):
        return list(csv.DictReader(io.StringIO(self.files[name])))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny run on two meshes with results of every kind, some with names that are no good."""
    import run

    work = tmp_path_factory.mktemp("report")
    for name in ("prose", "code"):
        (work / name).mkdir()
        for n in range(12):
            (work / name / f"{n}.txt").write_text(" ".join(f"{name} {k * n} alpha beta" for k in range(30)))
    sources = ["--source", f"words={work / 'prose'}", "--source", f"code={work / 'code'}"]
    train = ["train", "amber_tiny", "--data", work / "data", "--run", work / "run", *SMALL]
    assert run.main([*map(str, ["prepare", "amber_tiny", "--out", work / "data", *sources, *SMALL])]) == 0
    assert run.main([*map(str, [*train, "--mesh=data=8", "--steps", 4])]) in (0, 3)
    assert run.main([*map(str, [*train, "--mesh=data=4,fsdp=2"])]) == 0
    _studies(work / "run")
    return work / "run"


def share(value):
    return {"value": value, "stderr": 0.01, "n": 100}


def both(value):
    return {"score": share(value), "extractable": share(value / 2)}


def _studies(run):
    target = _target(run)
    assert sweep(target, Weights().open(target, print), print).code == 0
    entries = Series(run).entries()
    for n, entry in enumerate(entries):
        put = lambda kind, summary: results.write(run, kind, entry, {"version": 1}, Scored(summary), "data=1", 1.0)  # noqa: B023, E731
        put("evaluate/arc_challenge", {"acc_norm": share(0.25 + n / 100), "acc": share(0.2), "chance": 0.25})
        put("evaluate/piqa", {"acc": share(0.5 + n / 100)})
        put("perplexity", {"sources": {EVIL: {"token": share(9.0 - n)}, "code": {"token": share(8.0 - n)}}})
        put("bold", {"gender": {"sentiment": share(0.1)}, "race": {"sentiment": share(0.2)}})
        put("unheard-of", {EVIL: 1.5 + n, "deep": {"er": share(3.0)}, "text": "no figure"})
        by = {"chunk": [0, 1], "n": [4, 4], "score": [n / 10, None], "score_stderr": [0.1, None]}
        by |= {"extractable": [n / 20, None], "extractable_stderr": [0.1, None]}
        told = {"prompt": 8, "continuation": 2, "latest_chunk": entry.manifest.chunk, "histogram": [5, 2, 1], "ties": 0}
        told |= {
            **both(0.1 * n),
            "seen": both(0.2),
            "unseen": both(0.1),
            "by_chunk": by,
            "by_source": {"code": both(0.3)},
        }
        put("memorization", told)
        scores = {
            "acc": {"all": share(0.5), "without_seen": share(0.4), "only_seen": {"value": None, "stderr": None, "n": 0}}
        }
        task = {
            "items": 9,
            "testable": 8,
            "too_short": 1,
            "contaminated": 3,
            "unread": 0,
            "seen": n,
            "seen_share": n / 8,
        }
        tasks = {
            "piqa": {**task, "scores": scores, "scores_missing": None},
            "mbpp": {**task, "scores": {}, "scores_missing": "its results have no table of items"},
        }
        put("contamination", {"n": 13, "step": n, "scanned": {}, "tasks": tasks})


def _target(run):
    from models import families
    from training.datasets import open_data

    return Target(f"{run}@all", families(), open_data)


def _write(run, out):
    from models import families

    said = []
    made = write(run, families(), out, said.append)
    return made, Page(out.read_text()), said


@pytest.fixture(scope="module")
def made(run_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    return (*_write(run_dir, out), out)


def test_all_sections_are_there(made):
    result, page, _, out = made
    assert result["sections"] == [
        "training", "evaluation", "perplexity", "memorization", "contamination", "safety", "weights", "data", "series",
        "ledger", "others",
    ]  # fmt: skip
    assert result["bytes"] == out.stat().st_size < 3e6
    assert set(result["sections"]) <= set(page.ids)
    assert "data=8 → data=4,fsdp=2" in page.said
    assert "restart on data=4,fsdp=2" in page.said  # inside the figure, as text
    assert "published Amber" in page.said
    assert "No scores with and without the items seen: mbpp, its results have no table of items." in page.said


def test_the_page_stands_alone_and_is_sound(made):
    _, page, _, out = made
    assert len(page.ids) == len(set(page.ids))
    for link in page.loads:
        assert link.startswith(("#", "data:")), link
        assert not link.startswith("#") or link[1:] in page.ids
    assert "script" not in page.tags  # the evil source's name is text
    assert EVIL in page.said
    assert page.tags.count("svg") == 2 * len(page.labels)
    assert all(len(label) > 30 for label in page.labels)
    assert "http" not in out.read_text().replace("http://www.w3.org", "")


def test_downloads_hold_the_numbers(made, run_dir):
    page = made[1]
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [float(r["loss"]) for r in page.rows("loss.csv") if r["curve"] == "training"]
    assert losses == pytest.approx([r["loss"] for r in logged if r["kind"] == "train"], rel=1e-6)
    scores = [r for r in page.rows("evaluation-curves.csv") if r["figure"] == "arc_challenge acc_norm"]
    wanted = results.of_kind(run_dir, "evaluate/arc_challenge")
    assert [float(r["value"]) for r in scores] == pytest.approx([r.summary["acc_norm"]["value"] for r in wanted])
    assert [int(r["tokens"]) for r in scores] == [r.checkpoint["tokens"] for r in wanted]
    grid = page.rows("memorization-score.csv")
    assert [(r["chunk 0"], r["chunk 1"]) for r in grid][:2] == [("0.0", ""), ("0.1", "")]
    listed = page.rows("series-checkpoints.csv")
    entries = Series(run_dir).entries()
    assert [r["digest of the weights"] for r in listed if r["kind"] == "series"] == [
        e.manifest.digests["params"] for e in entries
    ]
    assert {r["parent"] for r in listed if r["kind"] == "series"} == {"follows"}


def test_damage_is_named_and_left_out(run_dir, tmp_path):
    run = shutil.copytree(run_dir, tmp_path / "run")
    for kind in ("perplexity", "bold", "memorization", "contamination", "unheard-of", "evaluate"):
        shutil.rmtree(run / "results" / kind)
    (run / "results/weights/001.json").write_text("{")
    (run / "results/weights/000.tensors.parquet").write_bytes(b"no")
    manifest = run / "series/002/manifest.json"
    manifest.write_text(manifest.read_text().replace('"step"', '"stop"'))
    other = json.loads((run / "results/weights-to/002/000.json").read_text())
    other["checkpoint"]["digest"] = "of others"
    (run / "results/weights-to/002/000.json").write_text(json.dumps(other))
    result, page, said = _write(run, tmp_path / "out.html")
    assert "weights" in result["sections"]
    for text in (
        "weights/001.json: not a result",
        "000.tensors.parquet: cannot be read",
        "series/002",
        "of other weights",
    ):
        assert any(text in line for line in said), text
        assert text in page.said


def _bare(run_dir, tmp_path):
    """The run without results."""
    return shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("results"))


def _put(run, kind, summary, tables=None, settings=None, entries=slice(None)):
    """The same result of each of these checkpoints; a summary or tables may be functions of their number."""
    for n, entry in enumerate(Series(run).entries()[entries]):
        scored = Scored(summary(n) if callable(summary) else summary, (tables or (lambda _: {}))(n))
        results.write(run, kind, entry, settings or {"version": 1}, scored, "data=1", 1.0)


def _section(build, run):
    """A section, the text of it, and the run as the report found it."""
    from models import families

    found = Found(run, families())
    (section,) = build(found)
    return section, Page("".join(section.parts)), found


def test_utilisation_is_shown_against_a_data_sheet_alone(made, run_dir, tmp_path):
    """And beside the peak that the ledger names; a run on CPUs has none, nor has one of code that measured it."""
    assert "MFU" not in made[1].said
    run = shutil.copytree(run_dir, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(m | ({"mfu_causal": 2.92} if m["kind"] == "train" else {})) + "\n" for m in lines)
    (run / "metrics.jsonl").write_text(text)
    assert report_run.peak_of(Found(run, models.families())) is None
    events = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    peak = {"flops": 989.4e12, "source": "a data sheet"}
    told = [e | ({"peak": peak} if e["event"] in ("start", "resume") else {}) for e in events]
    (run / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in told))
    assert "MFU, % of 989.4 bfloat16 TFLOP/s (causal attention counted)" in _write(run, tmp_path / "named.html")[1].said


def test_results_of_several_settings_are_named_first(run_dir, tmp_path):
    run = _bare(run_dir, tmp_path)
    _put(run, "unheard-of", {"a": 1.0}, settings={"version": 1, "length": 8, "seed": 1})
    assert not _section(report_studies.others, run)[2].notices
    _put(run, "unheard-of", {"a": 1.0}, settings={"version": 1, "length": 9, "shots": 1}, entries=slice(2, None))
    _, page, said = _write(run, tmp_path / "out.html")
    (line,) = said[:-1]
    assert "unheard-of were made with 2 different settings (length, seed, shots)" in line
    assert page.said.index(line) < page.said.index("Loss over tokens")


def test_each_task_has_its_own_last_checkpoint_and_gaps_are_named(run_dir, tmp_path):
    run = _bare(run_dir, tmp_path)
    _put(run, "evaluate/arc_easy", {"acc": share(0.3)}, entries=slice(0, 2))
    _put(run, "evaluate/boolq", {"acc": share(0.3)}, entries=slice(0, 2))
    _put(run, "evaluate/piqa", lambda n: {"acc": share(0.5 - n / 100)})
    _put(run, "evaluate/crows_pairs", lambda n: {"pct_stereotype": share(0.6 + n / 100)})
    _, page, _ = _section(report_studies.evaluation, run)
    rows = {r["task"]: r for r in page.rows("evaluation-scores-of-the-last-checkpoint.csv")}
    assert {t: r["checkpoint"] for t, r in rows.items()} == {
        "arc_easy": "000", "boolq": "000", "piqa": "002", "crows_pairs": "002"
    }  # fmt: skip
    assert (rows["piqa"]["best"], rows["piqa"]["at"]) == ("0.5", "init")
    assert (rows["crows_pairs"]["best"], rows["crows_pairs"]["at"]) == ("", "")  # a half is best
    assert "Each task at its last checkpoint" in page.said
    assert "evaluate/arc_easy, evaluate/boolq: results of 2 of 4 checkpoints; none of 001, 002." in page.said
    assert "evaluate/piqa:" not in page.said


def test_weights_studied_under_a_name_are_there(run_dir, tmp_path):
    run = _bare(run_dir, tmp_path)
    for kind in ("weights", "weights-to/002"):
        shutil.copytree(run_dir / "results" / kind, run / "results" / f"{kind}-x")
    shutil.copytree(run_dir / "results/weights", run / "results/weights")
    _, page, _ = _section(report_studies.weights, run)
    assert [i for i in page.ids if not re.search("-[wn]-", i)] == [
        "weights-curves",
        "tensors",
        "weights-x-curves",
        "weights-x-tensors",
    ]
    assert "Cosine to 002" in page.said
    there = {row["figure"].endswith("to 002") for row in page.rows("weights-x-curves.csv")}
    assert there == {True, False}
    shutil.rmtree(run / "results/weights")
    result, page, _ = _write(run, tmp_path / "out.html")
    assert "weights" in result["sections"]
    assert "run.py analyze weights" not in page.said


def test_weights_without_a_finite_change_are_no_crash(run_dir, tmp_path):
    run = _bare(run_dir, tmp_path)
    lost = {"norm": None, "update": None, "groups": {"head": {"norm": None, "update": None}}}
    table = pa.Table.from_pylist([{"tensor": "head", "group": "head", "update": None}])
    _put(run, "weights", lost, lambda _: {"tensors": table})
    _, page, found = _section(report_studies.weights, run)
    assert (page.ids, found.notices) == ([], [])


def test_correlations_leave_out_what_the_report_left_out(run_dir, tmp_path):
    run = _bare(run_dir, tmp_path)
    sequences = {"chunk": [0, 0, 1], "position": [0, 1, 0]}
    summary = json.loads((run_dir / "results/memorization/000.json").read_text())["summary"]
    tables = lambda n: {"sequences": pa.table({**sequences, "matched": [n % 3, (n + 1) % 3, 2 - n % 2]})}  # noqa: E731
    _put(run, "memorization", summary, tables, settings={"prompt": 8, "continuation": 2})
    _put(run, "memorization-x", summary, tables, settings={"prompt": 8, "continuation": 2})
    other = run / "results/memorization/001.json"
    other.write_text(other.read_text().replace('"digest": "', '"digest": "of others '))
    (run / "results/memorization-x/init.json").write_text("{")
    _, page, found = _section(report_studies.memorization, run)
    assert len(found.notices) == 2
    names = lambda kind: [r["checkpoint"] for r in page.rows(f"{kind}-correlation-scores.csv")]  # noqa: E731
    assert names("memorization") == ["init", "000", "002"]
    assert names("memorization-x") == ["000", "001", "002"]


@pytest.mark.parametrize(
    ("event", "said"),
    [("resume", "still training, or killed"), ("guard", "stopped by its guard"), ("stop", "stopped, and can go on")],
)
def test_the_last_event_says_the_state(run_dir, tmp_path, event, said):
    from models import families

    run = _bare(run_dir, tmp_path)
    assert report._lead(Found(run, families())).endswith("; finished.")
    events = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    again = next(e for e in events if e["event"] == "resume")
    with (run / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({**again, "event": event}) + "\n")
    assert report._lead(Found(run, families())).endswith(f"; {said}.")


def test_names_are_no_formulas_in_figures():
    bad = "x$_{$"
    line = Line(bad, [1, 2], [1.0, 2000.0])
    panels = [
        Panel(bad, [line, Line("b", [1, 2], [1.0, 2.0])], bad, [Mark(1.5, bad)], log=log) for log in (True, False)
    ]
    heat = figures.heat("h", [[1.0, 2.0]], [bad], [bad, "b"], title=bad, row_label=bad, column_label=bad)
    for drawn in (figures.curves("c", panels, bad), heat, figures.bars("b", [bad], [1.0], bad, bad)):
        for text in (drawn.wide, drawn.narrow):
            assert text.count(bad) >= 3
            assert "mathdefault" not in text


def test_ticks_have_the_digits_that_their_distance_asks_for():
    assert figures.ticks([0.9975, 1.0, 1.0025]) == ["0.9975", "1", "1.0025"]
    assert figures.ticks([1.25e12, 1.2502e12, 1.2504e12]) == ["1.25T", "1.2502T", "1.2504T"]
    assert figures.ticks([0, 5e8, 1e9]) == ["0", "500M", "1B"]
    assert figures.ticks([-1e-17, 0.1, 0.2, 0.1 + 0.2]) == ["0", "0.1", "0.2", "0.3"]
    assert figures.ticks([1e-5, 1e-3, 10.0]) == ["1e-05", "0.001", "10"]
    assert figures.ticks([7.0]) == ["7"]
    assert figures.ticks([]) == []
    x = [1_250_000_000_000 + n * 100_000_000 for n in range(5)]
    drawn = figures.curves("c", [Panel("", [Line("", x, [0.99991, 0.99992, 0.99993, 0.99994, 0.99995])])] * 3, "", 3)
    shown = [s for s in re.findall(r">([^<>]*)</text>", drawn.wide) if s]
    assert all(shown.count(s) == 3 for s in shown), shown  # in each of the three panels
    assert len(set(shown)) > 6


def test_downloads_are_exact_and_no_formulas():
    tokens = 1_258_448_486_401
    assert [plain(v) for v in (tokens, float(tokens), 1 / 3)] == [tokens, float(tokens), 0.333333333]
    rows = figures.thin([tokens + n for n in range(1001)], [0.5] * 1001, 100)
    assert all(isinstance(r[0], int) for r in rows)
    assert figures.thin([tokens], [0.5])[0][0] == tokens
    assert list(flatten({"tokens": tokens})) == [(("tokens",), tokens, None, None)]
    assert [str(plain(value)) for _, value, _, _ in flatten({"tokens": tokens})] == [str(tokens)]
    bad = ["=1", "+1", "-1", "@a", "\t=1", "\r=1", "\n=1", "a\r=1"]
    link = download("x", [*bad], [bad, [-1.5] * len(bad)])
    text = unquote(link.partition(",")[2].partition('"')[0])
    head, row, numbers = csv.reader(io.StringIO(text, newline=""))
    assert head == row == [f"'{v}" for v in bad[:-1]] + bad[-1:]
    assert numbers == ["-1.5"] * len(bad)
    assert '"a\r=1"' in text  # else a spreadsheet begins a row there


def test_the_same_run_gives_the_same_bytes(run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, ignore=shutil.ignore_patterns("results"))
    pages = [_write(run, tmp_path / name)[1] and (tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


def test_a_run_without_results_and_what_is_no_run(run_dir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, ignore=shutil.ignore_patterns("results"))
    (run / "metrics.jsonl").unlink()
    result, page, _ = _write(run, tmp_path / "out.html")
    assert result["sections"] == ["training", "data", "series", "ledger"]
    assert f"run.py evaluate {run}@all" in page.said
    with pytest.raises(UserError, match="is it a run directory"):
        _write(tmp_path / "nothing", tmp_path / "out.html")


def test_published_figures_are_those_of_the_fact_sheet():
    arc, mmlu, piqa = published.curve("arc_challenge"), published.curve("mmlu"), published.curve("piqa")
    at = lambda c, n: dict(zip(c.checkpoints, c.values, strict=True))[n]  # noqa: E731
    assert [round(100 * at(arc, n), 2) for n in (0, 9, 107, 349, 359)] == [23.38, 26.96, 37.12, 41.72, 41.30]
    assert [round(100 * at(mmlu, n), 2) for n in (0, 353, 355)] == [23.01, 30.76, 28.53]
    assert [round(100 * at(piqa, n), 2) for n in (0, 2, 354)] == [52.50, 61.32, 79.43]
    assert arc.tokens[0] == 3_495_690_240
    assert arc.tokens[-1] == 1_258_448_486_400
    assert published.curve("humaneval") is None
    assert published.curve("amber-arc_challenge") is None  # of no other names than the listed ones
    assert "pile" not in published.FILE.read_text().lower()  # only what is drawn
    assert "W&B" in published.sources()["source"]


def test_curves_are_thinned_without_losing_extremes():
    x, y = list(range(10_000)), [1.0] * 10_000
    y[5000], y[7001] = 50.0, -7.0
    rows = figures.thin(x, y, 100)
    assert len(rows) == 100
    assert max(r[3] for r in rows) == 50.0
    assert min(r[2] for r in rows) == -7.0
    assert sum(r[1] for r in rows) / 100 == pytest.approx(sum(y) / 10_000)
    assert figures.thin([1, 2], [3, 4]) == [(1, 3, 3, 3), (2, 4, 4, 4)]


def test_figures_and_cells_as_text():
    summary = {
        "a": {"value": 1, "stderr": None, "n": 3},
        "b": {"c": {"d": 2.5}},
        "t": "x",
        "l": [1],
        "no": {"value": None},
    }
    assert list(flatten(summary)) == [(("a",), 1.0, None, 3), (("b", "c", "d"), 2.5, None, None)]
    assert [number(v) for v in (1234567, 0.00001, None, True, 0.25, float("nan"))] == [
        "1,234,567", "1.000e-05", "–", "yes", "0.25", "–"
    ]  # fmt: skip
    assert [plain(v) for v in ("=1+1", None, 1 / 3, 7)] == ["'=1+1", "", 0.333333333, 7]
    assert [figures.short(v) for v in (0, 3495690240, 1.25e12, 999_999, 0.0004)] == [
        "0",
        "3.5B",
        "1.25T",
        "1M",
        "0.0004",
    ]
    assert slug("A b/ç.1") == "a-b-1"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if (program := find()) is None:
        pytest.skip("no Chromium is installed")
    with Browser(program, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (390, False)])
def test_in_a_browser(browser, made, tmp_path, width, dark):
    browser.events.clear()
    browser.open(made[3], width, 844, dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 22, 26)" if dark else "rgb(251, 250, 247)"
    )
    shown = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().width > 200).length"
    assert browser.run(shown) == len(made[1].labels)  # one of the two forms of each
    heights = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height).filter(h => h)"
    assert min(browser.run(heights)) > 8
    assert len(browser.picture()) > 10_000
    if width > 600:
        seen = []
        for _ in range(8):
            browser.press("Tab", 9)
            seen.append(browser.run("document.activeElement.getAttribute('href') || document.activeElement.tagName"))
        assert seen[:3] == ["#main", "#training", "#evaluation"]
        browser.run("document.querySelector('summary').focus()")
        browser.press("Enter", 13)
        for _ in range(2):
            browser.press("Tab", 9)
        assert browser.paper()[:5] == b"%PDF-"
    methods = [e.get("method") for e in browser.events]
    assert "Runtime.exceptionThrown" not in methods
    assert "Log.entryAdded" not in methods
    asked = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:")) for url in asked)
