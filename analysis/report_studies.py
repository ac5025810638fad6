"""What the report says of the studies of a run: their results over its checkpoints."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.figures import Line, Panel, bars, curves, heat
from analysis.history import correlations
from analysis.page import Section, number, slug
from analysis.published import Curve, curve, sources
from analysis.report_run import Found
from analysis.results import Result
from analysis.weights import GROUPS
from errors import RunError, UserError

_KNOWN = ("evaluate", "perplexity", "memorization", "contamination", "bold", "toxicity", "toxigen", "weights")
_PANELS = 24  # of a figure with one for each task
_LINES = 8  # of a panel
_STRUCTURE = ("by_source", "domains", "groups", "sets", "prompts")  # in a path, says nothing of a curve
_SHOWN = 9  # panels of a study that has no form of its own
_NAMED = 6  # checkpoints or kinds in a sentence
#: Metrics of which the greatest value is not the best one.
_NOT_HIGHER = {
    "pct_stereotype", "likelihood_diff", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte",
    "brier_score", "wer", "ter", "ppl", "loss",
}  # fmt: skip


# ---- results over checkpoints ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A figure at a checkpoint."""

    at: int
    name: str
    value: float
    stderr: float | None = None
    n: int | None = None


Curves = dict[tuple[str, ...], list[Point]]


def flatten(summary: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], float, float | None, int | None]]:
    """Path, value, standard error and count of each figure of a summary; lists and texts are none."""
    for key, value in summary.items():
        if isinstance(value, Mapping):
            if "value" in value:
                if (v := _finite(value["value"])) is not None:
                    count = value.get("n")
                    yield (key,), v, _finite(value.get("stderr")), count if isinstance(count, int) else None
            else:
                yield from (((key, *path), *rest) for path, *rest in flatten(value))  # type: ignore[misc]
        elif (v := _finite(value)) is not None:
            yield (key,), v, None, None


def _finite(value: Any) -> float | None:
    """The number, integers as they are, to be exact in downloads."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def over_time(f: Found, found: Sequence[Result]) -> Curves:
    """Each figure of the results of a kind, over the checkpoints."""
    lines: Curves = defaultdict(list)
    for r in found:
        for path, value, stderr, n in flatten(r.summary):
            lines[path].append(Point(f.at(r), r.checkpoint["name"], value, stderr, n))
    return dict(lines)


def _line(label: str, points: Sequence[Point], color: int | None = None) -> Line:
    bars = [p.stderr or 0.0 for p in points] if any(p.stderr for p in points) else None
    return Line(label, [p.at for p in points], [p.value for p in points], bars, "points", color)


def _rows(label: str, points: Sequence[Point]) -> list[tuple[Any, ...]]:
    return [(label, p.name, p.at, p.value, p.stderr, p.n) for p in points]


def _columns(f: Found) -> tuple[str, ...]:
    return "figure", "checkpoint", *(("tokens",) if f.by_tokens else ("index",)), "value", "standard error", "n"


def _trend(points: Sequence[Point]) -> str:
    if len(points) == 1:
        return f"{number(points[0].value)} at {points[0].name}"
    return f"from {number(points[0].value)} at {points[0].name} to {number(points[-1].value)} at {points[-1].name}"


def _unfinished(f: Found, section: Section, kinds: Iterable[str]) -> None:
    """Say which kinds do not have all checkpoints of the series; those that lack the same ones together."""
    names = [e.manifest.name for e in f.series]
    lacking: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for kind in kinds:
        there = {r.checkpoint["name"] for r in f.results[kind]}
        if missing := tuple(name for name in names if name not in there):
            lacking[missing].append(kind)
    for missing, of in lacking.items():
        has = f"results of {len(names) - len(missing)} of {len(names)} checkpoints"
        section.text(f"{_some(of)}: {has}; none of {_some(missing)}.")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _is_amber(f: Found) -> bool:
    """Whether the tokens of this run are those of the published one."""
    return f.model.family == "amber" and f.config.get("recipe") == "amber_7b"


def evaluation(f: Found) -> Iterator[Section]:
    """Scores of tasks."""
    section = Section("evaluation", "Evaluation")
    panels, rows, says, compared, last = [], [], [], [], []
    for kind, found in f.family("evaluate").items():
        task = kind.partition("/")[2] or kind
        lines = over_time(f, found)
        chance = _finite(found[-1].summary.get("chance"))
        published = curve(re.split("[@-]", task)[0]) if f.model.family == "amber" else None
        if published and found[-1].summary.get("shots", published.shots) != published.shots:
            published = None
        main = [p for p in lines if p != ("chance",) and any(q.stderr is not None or q.n for q in lines[p])]
        if not main:
            continue
        shown = _metrics([p for p in main if len(p) == 1] or main, found[-1].summary.get("headline"))
        panel_lines = [_line(".".join(p), lines[p], n) for n, p in enumerate(shown)]
        if published and _is_amber(f):
            panel_lines.append(Line("published Amber", published.tokens, published.values, style="faint"))
        elif published:
            compared.append((task, published))
        panels.append(Panel(task, panel_lines, "", level=chance))
        for path in main:
            rows += _rows(f"{task} {'.'.join(path)}", lines[path])
        best, point = lines[shown[0]], lines[shown[0]][-1]
        over = f", chance is {chance:.3g}" if chance is not None else ""
        says.append(f"{task} {'.'.join(shown[0])} {_trend(best)}{over}")
        top = max(best, key=lambda p: p.value) if _NOT_HIGHER.isdisjoint(shown[0]) else None
        last.append(
            (
                task, point.name, ".".join(shown[0]), point.value, point.stderr, point.n, chance,
                top.value if top else None, top.name if top else None, len(best),
            )
        )  # fmt: skip
    if panels:
        says_all = "; ".join(says[:12]) + ("; …" if len(says) > 12 else "")
        for n in range(0, len(panels), _PANELS):
            name = "evaluation-curves" + (f"-{n // _PANELS + 1}" if n else "")
            section.figure(
                name, "Scores of tasks over training", "Bars are standard errors; the dotted line is chance."
                + (" Grey: the published Amber." if _is_amber(f) else ""), f"{says_all}.",
                curves(name, panels[n : n + _PANELS], f.axis, columns=3, height=2.3), _columns(f), rows,
            )  # fmt: skip
        section.heading("Each task at its last checkpoint")
        columns = ("task", "checkpoint", "metric", "score", "standard error", "items", "chance", "best", "at",
                   "checkpoints")  # fmt: skip
        section.table("Scores of the last checkpoint", columns, last)
    if compared:
        _published(section, compared)
    elif panels and _is_amber(f):
        section.text(f"Published curves: {sources()['source']}. {sources()['index']} {sources()['doubts']}")
    _unfinished(f, section, f.family("evaluate"))
    yield section


def _metrics(paths: Sequence[tuple[str, ...]], headline: str | None) -> list[tuple[str, ...]]:
    """The two to draw: the one that the task is known by, or the usual one of such tasks, first."""
    order = [headline, "acc_norm", "mc2", "exact_match", "pass@1", "acc"]
    rank = {p: order.index(p[0]) if p[0] in order else len(order) for p in paths if not p[0].endswith("_pooled")}
    return sorted(rank, key=rank.__getitem__)[:2]


def _published(section: Section, compared: Sequence[tuple[str, Curve]]) -> None:
    """The curves of the published Amber by themselves, for a run whose tokens are not comparable."""
    panels = [
        Panel(f"{c.title}, {c.shots}-shot {c.metric}", [Line("", c.tokens, c.values, color=7)]) for _, c in compared
    ]
    rows = [(t, n, a, v) for t, c in compared for n, a, v in zip(c.checkpoints, c.tokens, c.values, strict=True)]
    ends = "; ".join(f"{c.title} from {c.values[0]:.3f} to {c.values[-1]:.3f}" for _, c in compared)
    section.figure(
        "published", "For comparison: the published Amber, 7B parameters, 1.26T tokens",
        "Its tokens and its size are not this run's, so it is drawn by itself.", f"{ends}.",
        curves("published", panels, "tokens", columns=3, height=2.1), ("task", "checkpoint", "tokens", "score"), rows,
    )  # fmt: skip
    section.text(f"Source: {sources()['source']}. {sources()['index']} {sources()['doubts']}")


def grouped(
    f: Found, section: Section, kind: str, found: Sequence[Result], title: str, below: Sequence[tuple[str, ...]] = ((),)
) -> None:
    """A figure with a panel for each name that figures end in, and a curve for what they are of.

    Args:
        f: the run.
        section: where it goes.
        kind: of the results.
        found: the results.
        title: of the figure.
        below: only figures whose path begins so.
    """
    lines = {p: v for p, v in over_time(f, found).items() if any(p[: len(b)] == b for b in below)}
    panels: dict[str, dict[str, list[Point]]] = defaultdict(dict)
    for path, points in lines.items():
        label = " ".join(part for part in path[_common(lines) : -1] if part not in _STRUCTURE)
        panels[path[-1]][label or "all"] = points
    estimated = [k for k, v in panels.items() if any(p.stderr is not None for ps in v.values() for p in ps)]
    names = (estimated or list(panels))[:_SHOWN]  # counts beside estimates are in the data alone
    drawn = []
    for name in names:
        many = len(panels[name]) > 1
        some = list(panels[name].items())[:_LINES]
        drawn.append(Panel(name.replace("_", " "), [_line(label if many else "", points) for label, points in some]))
    if not drawn:
        return
    says = "; ".join(f"{' '.join(p)} {_trend(points)}" for p, points in list(lines.items())[:10])
    rows = [row for p, points in lines.items() for row in _rows(".".join(p), points)]
    name = f"{slug(kind)}-curves"
    left = max(len(panels[n]) for n in names) - _LINES
    caption = f"{left} more curves are in the data." if left > 0 else ""
    section.figure(
        name, title, caption, f"{says}.", curves(name, drawn, f.axis, columns=3, height=2.4), _columns(f), rows
    )


def _common(paths: Iterable[tuple[str, ...]]) -> int:
    """How many parts all paths of more than one begin with."""
    deep = [p[:-1] for p in paths if len(p) > 1]
    same = [len(set(parts)) == 1 for parts in zip(*deep)]
    return ([*same, False].index(False)) if len(deep) > 1 else 0


def others(f: Found) -> Iterator[Section]:
    """Kinds that this report does not know: all figures as tables."""
    section = Section("others", "Other results")
    known = {kind for name in _KNOWN for kind in f.family(name)}
    for kind, found in f.results.items():
        if kind in known or not found:
            continue
        lines = over_time(f, found)
        names = [".".join(p) for p in lines]
        at = {p.name: p.at for points in lines.values() for p in points}
        by = [{p.name: p.value for p in points} for points in lines.values()]
        section.heading(kind)
        rows = [(name, tokens, *(b.get(name) for b in by)) for name, tokens in at.items()]
        section.table(f"Figures of {kind}", ("checkpoint", f.axis, *names), rows)
        _unfinished(f, section, [kind])
    yield section


# ---- studies --------------------------------------------------------------------------------------------------------


def memorization(f: Found) -> Iterator[Section]:
    """Checkpoint by chunk, the histogram, and how checkpoints are alike."""
    section = Section("memorization", "Memorization")
    for kind, found in f.family("memorization").items():
        last = found[-1].summary
        section.text(
            f"{kind}: {last['prompt']} tokens of each sequence are given, the next {last['continuation']} are "
            "continued greedily. The score is the share of these that match; extractable is a sequence of which all "
            "do. Framed: the newest chunk that a checkpoint has read."
        )
        _grid(f, section, kind, found, "score", "Memorization score by checkpoint and chunk")
        _grid(f, section, kind, found, "extractable", "Extractable sequences by checkpoint and chunk")
        grouped(f, section, kind, found, "Chunks seen and not yet seen", [(p,) for p in ("seen", "unseen")])
        grouped(f, section, f"{kind}-source", found, "Memorization by source", [("by_source",)])
        counts = last["histogram"]
        total, whole = sum(counts), counts[-1]
        name = found[-1].checkpoint["name"]
        section.figure(
            f"{slug(kind)}-histogram", f"Tokens that match, of {last['continuation']}, at {name}",
            "Number of sequences; at the right end those that are extractable.",
            f"{whole:,} of {total:,} sequences are continued whole, {counts[0]:,} not by one token.",
            bars(f"{slug(kind)}-histogram", [*map(str, range(len(counts)))], counts, "tokens that match", "sequences"),
            ("tokens", "sequences"), list(enumerate(counts)),
        )  # fmt: skip
        if len(found) > 2:
            _correlations(f, section, kind, found)
    _unfinished(f, section, f.family("memorization"))
    yield section


def _grid(f: Found, section: Section, kind: str, found: Sequence[Result], what: str, title: str) -> None:
    chunks = sorted({c for r in found for c in r.summary["by_chunk"]["chunk"]})
    column = {c: n for n, c in enumerate(chunks)}
    values = np.full((len(found), len(chunks)), np.nan)
    for row, r in enumerate(found):
        by = r.summary["by_chunk"]
        for c, value in zip(by["chunk"], by[what], strict=True):
            values[row, column[c]] = math.nan if value is None else value
    if not np.isfinite(values).any():
        return
    names = [r.checkpoint["name"] for r in found]
    newest = [column.get(r.summary["latest_chunk"]) for r in found]
    top, mean = int(np.nanargmax(values)), np.nanmean(values)
    row, at = divmod(top, len(chunks))
    diagonal = [values[n, c] for n, c in enumerate(newest) if c is not None and math.isfinite(values[n, c])]
    says = f"The mean is {mean:.3f}, the greatest {values[row, at]:.3f}, of chunk {chunks[at]} at {names[row]}"
    says += f"; the newest chunk of each checkpoint has {np.mean(diagonal):.3f} on average." if diagonal else "."
    name = f"{slug(kind)}-{what}"
    section.figure(
        name, title, "", says,
        heat(name, values, names, [str(c) for c in chunks], title=what, row_label="checkpoint",
             column_label="chunk of data", marked=newest, low=0.0, form=".2f"),
        ("checkpoint", *(f"chunk {c}" for c in chunks)),
        [(n, *map(_finite, v.tolist())) for n, v in zip(names, values, strict=True)],
    )  # fmt: skip


def _correlations(f: Found, section: Section, kind: str, of: Sequence[Result]) -> None:
    try:
        found = correlations(f.run, kind, of)
    except (RunError, UserError) as e:
        f.notices.append(str(e))
        return
    names = found["names"]
    for what, title in (("scores", "memorization scores"), ("extractable", "extractability")):
        values = np.array([[math.nan if v is None else v for v in row] for row in found[what]], float)
        beside = [v for v in np.diagonal(values, 1) if math.isfinite(v)]
        if not beside:
            continue
        name = f"{slug(kind)}-correlation-{what}"
        ends = values[0, -1]
        says = f"Neighbours correlate by {np.mean(beside):.3f} on average"
        says += f", the first and the last checkpoint by {ends:.3f}." if math.isfinite(ends) else "."
        section.figure(
            name, f"Correlation between checkpoints of {title}", "Pearson's, over the same sequences.", says,
            heat(name, values, names, names, title="correlation", row_label="checkpoint", column_label="checkpoint"),
            ("checkpoint", *names), [(n, *map(_finite, v.tolist())) for n, v in zip(names, values, strict=True)],
        )  # fmt: skip


def contamination(f: Found) -> Iterator[Section]:
    """What was seen, and scores with and without it."""
    section = Section("contamination", "Contamination")
    for kind, found in f.family("contamination").items():
        last, name = found[-1].summary, found[-1].checkpoint["name"]
        tasks = last["tasks"]
        section.text(
            f"{kind}: items of benchmarks of which {last['n']}-grams are in the training data that was read up to "
            f"{name}."
        )
        rows = [
            (task, t["items"], t["testable"], t["contaminated"], t["seen"], t.get("seen_share"), t.get("unread"))
            for task, t in tasks.items()
        ]
        columns = ("task", "items", "long enough", "contaminated in the run", f"seen at {name}", "share", "in no batch")
        section.table(f"Contaminated items at {name}", columns, rows)
        scores = []
        for task, t in tasks.items():
            for metric, of in t["scores"].items():
                groups = [of.get(group, {}) for group in ("all", "without_seen", "only_seen")]
                scores.append((task, metric, *(g.get(k) for g in groups for k in ("value", "stderr", "n"))))
        if scores:
            section.heading(f"Scores with and without the items seen at {name}")
            parts = [f"{a}, {b}" for a in ("all", "without seen", "only seen") for b in ("score", "error", "n")]
            section.table(f"Scores with and without items seen, {kind}", ("task", "metric", *parts), scores)
        missing = [f"{task}, {t['scores_missing']}" for task, t in tasks.items() if t.get("scores_missing")]
        if missing:
            section.text("No scores with and without the items seen: " + "; ".join(missing) + ".")
        if len(found) > 1 and any(t["seen"] for t in tasks.values()):
            at = [f.at(r) for r in found]
            counts = {t: [r.summary["tasks"].get(t, {}).get("seen", 0) for r in found] for t in tasks}
            lines = [Line(task, at, count, style="points") for task, count in counts.items() if any(count)]
            seen = "; ".join(f"{line.label} {line.y[-1]:,}" for line in lines)
            figure = f"{slug(kind)}-seen"
            section.figure(
                figure, "Items that a checkpoint had seen", "", f"At {name}: {seen}.",
                curves(figure, [Panel("", lines, "items")], f.axis, height=2.6), ("task", f.axis, "items"),
                [(line.label, a, b) for line in lines for a, b in zip(line.x, line.y, strict=True)],
            )  # fmt: skip
    _unfinished(f, section, f.family("contamination"))
    yield section


def weights(f: Found) -> Iterator[Section]:
    """Sizes and movement, by part of the model and by tensor."""
    section = Section("weights", "Weights over time")
    moved, drawn = f.family("weights"), []
    for kind, own in moved.items():
        if "/" in kind:
            continue
        named = kind.removeprefix("weights")  # of a study with --name, its results against one checkpoint have it too
        order = [f"weights-to/{e.manifest.name}{named}" for e in f.series]
        to = [k for k in order if k in moved]  # the newest of those that most are compared with
        best = max(to, key=lambda k: (len(moved[k]), order.index(k)), default=None)
        drawn += [kind, *([best] if best else [])]
        name = best.partition("/")[2].removesuffix(named) if best else ""
        _movement(f, section, kind, own, over_time(f, moved[best]) if best else {}, name)
        _tensors(f, section, kind, own)
    _unfinished(f, section, drawn)
    yield section


def _movement(f: Found, section: Section, kind: str, own: Sequence[Result], last: Curves, name: str) -> None:
    """Curves of each part of the model; ``last`` are those of the comparison with the checkpoint ``name``, if any."""
    lines = over_time(f, own)
    groups = [g for g in GROUPS if ("groups", g, "norm") in lines]
    panels = [
        Panel("Root mean square", _of_groups(lines, groups, "rms"), log=True),
        Panel("Norm", _of_groups(lines, groups, "norm"), log=True),
        Panel("Relative change", _of_groups(lines, groups, "update"), log=True),
        Panel("Cosine to the previous one", _of_groups(lines, groups, "cosine_previous")),
    ]
    rows = [r for p, ps in lines.items() if p[-1] != "numbers" for r in _rows(".".join(p), ps)]
    if last:
        panels += [
            Panel(f"Relative distance from {name}", _of_groups(last, groups, "distance")),
            Panel(f"Cosine to {name}", _of_groups(last, groups, "cosine")),
        ]
        both = [p for p in last if p[-1] in ("distance", "cosine")]
        rows += [r for p in both for r in _rows(f"{'.'.join(p)} to {name}", last[p])]
    panels = [p for p in panels if p.lines]
    if not panels:
        return
    update = lines.get(("update",), [])
    says = f"The norm of all weights goes {_trend(lines['norm',])}" if ("norm",) in lines else "Weights"
    says += f"; the relative change between neighbours {_trend(update)}." if update else "."
    figure, of = f"{slug(kind)}-curves", "" if kind == "weights" else f" ({kind})"
    section.figure(
        figure, f"Size and movement of the weights, by part of the model{of}",
        "Relative change: since the checkpoint before, the norm of the difference over the norm of what is "
        "compared with; distance: the same, from the last.", says,
        curves(figure, panels, f.axis, columns=3, height=2.4), _columns(f), rows,
    )  # fmt: skip


def _of_groups(lines: Curves, groups: Sequence[str], what: str) -> list[Line]:
    there = [(n, lines["groups", g, what]) for n, g in enumerate(groups) if ("groups", g, what) in lines]
    return [_line(groups[n], points, n) for n, points in there]


def _tensors(f: Found, section: Section, kind: str, own: Sequence[Result]) -> None:
    """How much each tensor moved between neighbours, as a heat map of layers."""
    try:
        tables = [(r.checkpoint["name"], r.table("tensors").to_pylist()) for r in own if "update" in r.summary]
    except RunError as e:
        f.notices.append(str(e))
        return
    if len(tables) < 2:
        return
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for name, rows in tables:
        for row in rows:
            if row.get("update") is not None:
                values[row["tensor"]][name] = row["update"]
    if not values:  # of nothing is there a finite one
        return
    names = [name for name, _ in tables]
    tensors = sorted(values, key=_layer_order)
    matrix = [[_log(values[t].get(n)) for n in names] for t in tensors]
    least = min(((t, n, v) for t, by in values.items() for n, v in by.items()), key=lambda x: x[2])
    most = max(((t, n, v) for t, by in values.items() for n, v in by.items()), key=lambda x: x[2])
    named = kind.removeprefix("weights")
    figure = f"{slug(kind)}-tensors" if named else "tensors"
    section.figure(
        figure, f"Relative change of each tensor since the checkpoint before{f' ({kind})' if named else ''}",
        "As a power of ten.",
        f"The most is {most[2]:.3g}, of {most[0]} at {most[1]}; the least {least[2]:.3g}, of {least[0]} at {least[1]}.",
        heat(figure, matrix, tensors, names, title="log10 of the relative change", row_label="",
             column_label="checkpoint", form=".1f"),
        ("tensor", *names), [(t, *(values[t].get(n) for n in names)) for t in tensors],
    )  # fmt: skip


def _layer_order(name: str) -> tuple[int, int, str]:
    layer = re.search(r"layers\.(\d+)\.", name)
    place = 0 if name.startswith("embedding") else 1 if layer else 2
    return place, int(layer[1]) if layer else 0, name


def _log(value: float | None) -> float:
    return math.log10(value) if value else math.nan


def perplexity(f: Found) -> Iterator[Section]:
    """Perplexity of texts."""
    section = Section("perplexity", "Perplexity")
    for kind, found in f.family("perplexity").items():
        for text in dict.fromkeys(key for r in found for key in r.summary):
            title = {"validation": "Validation data", "text": "Folder of texts"}.get(text, text.replace("_", " "))
            grouped(f, section, f"{kind}-{text}", found, f"{kind}: {title}", [(text,)])
    _unfinished(f, section, f.family("perplexity"))
    yield section


def safety(f: Found) -> Iterator[Section]:
    """Bias and toxicity."""
    section = Section("safety", "Bias and toxicity")
    titles = {"bold": "Sentiment of continuations of BOLD prompts", "toxicity": "Detection of toxic text"}
    titles["toxigen"] = "Toxicity of what is generated"
    for name, title in titles.items():
        for kind, found in f.family(name).items():
            grouped(f, section, kind, found, title)
    _unfinished(f, section, [kind for name in titles for kind in f.family(name)])
    yield section
