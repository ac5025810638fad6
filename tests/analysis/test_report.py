"""The report as a page: its sections and figures, its data, what it says of damage, and how it looks in a browser."""

import csv
import io
import json
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest

from analysis import figures, published, results
from analysis.page import number, plain, slug
from analysis.report import write
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
        put("contamination", {"n": 13, "step": n, "scanned": {}, "tasks": {"piqa": {**task, "scores": scores}}})


def _target(run):
    from run import families, open_data

    return Target(f"{run}@all", families(), open_data)


def _write(run, out):
    from run import families

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
    assert [plain(v) for v in ("=1+1", None, 1 / 3, 7)] == ["'=1+1", "", 0.3333333, 7]
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
