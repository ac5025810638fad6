"""Figures of the report: matplotlib draws them, CSS variables colour them, and each is there wide and narrow.

A figure becomes two pieces of SVG, one for a screen or paper and one for a phone, of which the page shows one. Their
text is text, their colours are names that the page gives a value in light and in dark; equal data makes equal bytes.
"""

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from errors import UserError

#: Colours that stand for CSS variables in what matplotlib writes.
_LINES = [f"#0a00{n:02x}" for n in range(1, 9)]
_INK, _FAINT, _ALARM, _SHADE = "#0b0001", "#0b0002", "#0b0003", "#0b0004"
_NAMES = {c: f"c{n}" for n, c in enumerate(_LINES)} | {
    _INK: "ink",
    _FAINT: "faint",
    _ALARM: "alarm",
    _SHADE: "shade",
}
_DASHES = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "<"]
_WIDE, _NARROW = 9.0, 4.2  # inches
_MOST_POINTS = 400
_NAMED_CELLS = 240  # of a heat map, with a number in each


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    """Half the length of the bar at each point."""
    style: str = "line"
    """"line"; "points" (with a line between them); "band": thinned to its mean, lowest and highest; "faint"."""
    color: int | None = None
    """Of the palette; by place where it is None."""


@dataclass(frozen=True)
class Mark:
    """A vertical line, or a stretch, with a name."""

    at: float
    label: str = ""
    until: float | None = None
    """End of a stretch."""
    alarm: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes."""

    title: str
    lines: Sequence[Line]
    y_label: str = ""
    marks: Sequence[Mark] = ()
    rug: Sequence[float] = ()
    """Places of small ticks below: the ends of chunks."""
    level: float | None = None
    """A horizontal dotted line: chance."""
    log: bool = False


@dataclass(frozen=True)
class Drawn:
    """A figure ready for a page."""

    wide: str
    narrow: str


def curves(name: str, panels: Sequence[Panel], x_label: str, columns: int = 1, height: float = 3.0) -> Drawn:
    """Panels of curves over one kind of abscissa.

    Args:
        name: of the figure, unique in the page.
        panels: axes, from the left and the top.
        x_label: of all of them.
        columns: of panels on a wide page; on a phone there is one.
        height: of a panel, in inches.

    Raises:
        UserError: matplotlib is not installed.
    """
    columns = min(columns, len(panels))

    def draw(wide: bool) -> str:
        across = columns if wide else 1
        down = math.ceil(len(panels) / across)
        # Lines that every panel has are named once, below; others in each panel.
        labels = list(dict.fromkeys(line.label for p in panels for line in p.lines if line.label))
        order = {label: n for n, label in enumerate(labels)}
        rows = math.ceil(len(labels) / (4 if wide else 2)) if len(labels) > 1 else 0
        size = (_WIDE if wide else _NARROW, height * down + 0.24 * rows + 0.2)
        figure = _figure(size)
        grid = figure.subplots(down, across, squeeze=False).ravel()
        for axes, panel in zip(grid, panels):
            _panel(axes, panel, order, wide, _MOST_POINTS // (across if wide else 2))
            axes.set_xlabel(x_label)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        if rows:
            handles: dict[str, Any] = {}
            for axes in grid[: len(panels)]:
                for handle, label in zip(*axes.get_legend_handles_labels()):
                    handles.setdefault(label, handle)
            figure.legend(
                handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(labels), 4 if wide else 2),
                frameon=False, handlelength=2.6, columnspacing=1.4,
            )  # fmt: skip
        return _svg(figure, f"{name}-{'w' if wide else 'n'}")

    return _both(draw)


def heat(
    name: str,
    values: Any,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    row_label: str,
    column_label: str,
    low: float | None = None,
    high: float | None = None,
    marked: Sequence[int | None] = (),
    form: str = ".2f",
) -> Drawn:
    """A matrix as colours.

    Args:
        name: of the figure, unique in the page.
        values: float[rows, columns]; not-a-number is left blank.
        rows: names, from the top.
        columns: names.
        title: what a colour means.
        row_label: what the rows are.
        column_label: what the columns are.
        low: value of the darkest colour; the least there is if None.
        high: value of the brightest.
        marked: the column to frame in each row.
        form: of the numbers that are written in the cells where they have room.

    Raises:
        UserError: matplotlib is not installed.
    """
    matrix = np.asarray(values, float)
    good = matrix[np.isfinite(matrix)]
    low = float(good.min()) if low is None and good.size else low or 0.0
    high = float(good.max()) if high is None and good.size else high or 1.0
    high = high if high > low else low + 1.0

    def draw(wide: bool) -> str:
        width = _WIDE if wide else _NARROW
        down, across = matrix.shape
        per = min(0.42 if wide else 0.36, (width - 1.6) / across)
        figure = _figure((width, max(1.9, min(7.0, per * down * (0.8 if wide else 1) + 1.3))))
        axes = figure.subplots()
        shown = axes.imshow(matrix, cmap=_cividis(), vmin=low, vmax=high, aspect="auto", interpolation="none")
        names = matrix.size <= (_NAMED_CELLS if wide else _NAMED_CELLS // 3) and across <= (18 if wide else 8)
        for (r, c), value in np.ndenumerate(matrix):
            if names and math.isfinite(value):
                light = (value - low) / (high - low) > 0.55
                axes.text(
                    c, r, _cell(value, form), ha="center", va="center", color="#111111" if light else "#ffffff",
                    fontsize=8 if wide else 9,
                )  # fmt: skip
        found = [(c, r) for r, c in enumerate(marked) if c is not None]
        if found and down <= 60:
            for c, r in found:  # white in black: seen on every colour of the map
                axes.add_patch(_frame(c, r, "#000000", 4.4))
                axes.add_patch(_frame(c, r, "#ffffff", 2.0))
        elif found:
            axes.plot(*zip(*found), color="#ffffff", lw=1.6, drawstyle="steps-mid")
        axes.set_xticks(*_ticks(columns, 14 if wide else 6))
        axes.set_yticks(*_ticks(rows, 18))
        axes.set(xlabel=column_label, ylabel=row_label)
        axes.grid(False)
        axes.tick_params(length=0)
        bar = figure.colorbar(shown, ax=axes, label=title, pad=0.02, aspect=24)
        bar.outline.set_visible(False)
        return _svg(figure, f"{name}-{'w' if wide else 'n'}")

    return _both(draw)


def bars(name: str, labels: Sequence[str], heights: Sequence[float], x_label: str, y_label: str) -> Drawn:
    """A histogram whose bins have names. Raises UserError: matplotlib is not installed."""

    def draw(wide: bool) -> str:
        figure = _figure((_WIDE if wide else _NARROW, 2.7))
        axes = figure.subplots()
        axes.bar(range(len(heights)), heights, width=0.85, color=_LINES[0])
        axes.set_xticks(*_ticks(labels, 20 if wide else 9))
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(False, axis="x")
        return _svg(figure, f"{name}-{'w' if wide else 'n'}")

    return _both(draw)


def thin(x: Sequence[float], y: Sequence[float], most: int = _MOST_POINTS) -> list[tuple[float, float, float, float]]:
    """(x, mean, lowest, highest) of at most so many stretches of equal numbers of points.

    Integer ``x`` stay integers: each as it is, or the mean of a stretch rounded.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    whole = all(isinstance(a, int) for a in x)
    if len(xs) <= most:
        return [(a if whole else float(a), float(b), float(b), float(b)) for a, b in zip(x, ys, strict=True)]
    edges = np.linspace(0, len(xs), most + 1).astype(int)
    spans = [slice(a, b) for a, b in pairwise(edges)]
    middle = [round(float(xs[s].mean())) if whole else float(xs[s].mean()) for s in spans]
    return [(a, float(ys[s].mean()), float(ys[s].min()), float(ys[s].max())) for a, s in zip(middle, spans)]


def short(value: float, digits: int = 3) -> str:
    """1250000 as "1.25M"."""
    factor, unit = _unit(value)
    return f"{value / factor:.{digits}g}{unit}"


def _unit(value: float) -> tuple[float, str]:
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
    return next(((factor, unit) for factor, unit in units if abs(value) >= factor * 0.9995), (1.0, ""))


def ticks(values: Sequence[float]) -> list[str]:
    """Numbers beside an axis as `short` has them, with as many digits as the distance between them asks for."""
    step = min((b - a for a, b in pairwise(sorted({float(v) for v in values}))), default=math.inf)
    clean = [0.0 if abs(v) < 1e-9 * step < math.inf else float(v) for v in values]
    scaled = [(v, _unit(v)[0]) for v in clean]

    def fits(digits: int) -> bool:
        return all(abs(float(f"{v / factor:.{digits}g}") * factor - v) <= 0.01 * step for v, factor in scaled)

    digits = next((n for n in range(3, 16) if fits(n)), 15)
    return [short(v, digits) for v in clean]


# ---- how ------------------------------------------------------------------------------------------------------------


def _both(draw: Callable[[bool], str]) -> Drawn:
    matplotlib = _matplotlib()
    settings = {
        "svg.fonttype": "none", "font.size": 9.5, "axes.titlesize": 10, "axes.titleweight": "bold",
        "axes.titlelocation": "left", "axes.edgecolor": _FAINT, "axes.labelcolor": _INK, "text.color": _INK,
        "axes.titlecolor": _INK, "xtick.color": _FAINT, "ytick.color": _FAINT, "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK, "axes.grid": True, "grid.color": _SHADE, "grid.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.facecolor": "none",
        "figure.facecolor": "none", "legend.labelcolor": _INK, "path.simplify": True, "axes.formatter.useoffset": False,
        "font.family": ["DejaVu Sans"],
        "text.parse_math": False,  # names of a run's sources and tasks are no formulas
    }  # fmt: skip
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **settings}):
        return Drawn(draw(True), draw(False))


def _panel(axes: Any, panel: Panel, order: dict[str, int], wide: bool, most: int) -> None:
    marks = sorted(panel.marks, key=lambda m: m.at)
    for n, mark in enumerate(m for m in marks if m.until is not None):
        axes.axvspan(mark.at, mark.until, color=_SHADE, alpha=0.55 if n % 2 == 0 else 0.0, lw=0)
    for line in panel.lines:
        _line(axes, line, order.get(line.label, 0) if line.color is None else line.color, most)
    if panel.level is not None:
        axes.axhline(panel.level, color=_FAINT, lw=1.2, ls=(0, (1.5, 2)))
        axes.annotate(
            "chance", (1, panel.level), xycoords=("axes fraction", "data"), xytext=(-2, 2), textcoords="offset points",
            ha="right", va="bottom", fontsize=8,
        )  # fmt: skip
    for mark in marks:
        if mark.until is None:
            axes.axvline(mark.at, color=_ALARM if mark.alarm else _INK, lw=1.1, ls=(0, (4, 2)))
    if panel.log:
        axes.set_yscale("log")
    axes.margins(x=0.02, y=0.12 if any(m.label for m in marks) else 0.07)
    if not any(v for line in panel.lines for v in line.y):
        axes.set_ylim(0, 1)  # nothing but zeros, which would else be in the middle of nothing
    low, high = axes.get_xlim()
    named = [m for m in marks if m.label]
    if len(named) <= (8 if wide else 4):
        for mark in named:
            left = mark.until is not None or (mark.at - low) / (high - low or 1) < 0.6
            axes.annotate(
                mark.label, (mark.at, 1), xycoords=("data", "axes fraction"), xytext=(4 if left else -4, -3),
                textcoords="offset points", ha="left" if left else "right", va="top", fontsize=8.5,
                color=_ALARM if mark.alarm else _INK,
            )  # fmt: skip
    if panel.rug:
        segments = [v for x in panel.rug for v in (x, x, np.nan)]
        heights = [v for _ in panel.rug for v in (0, 0.02, np.nan)]
        axes.plot(segments, heights, color=_FAINT, lw=0.8, transform=axes.get_xaxis_transform())
    axes.set(title=panel.title, ylabel=panel.y_label)
    linear, log = _formatters()
    axes.xaxis.set_major_formatter(linear())
    axes.xaxis.get_major_locator().set_params(nbins=7 if wide else 5)
    if max(map(len, ticks(axes.get_xticks())), default=0) > 5:
        axes.xaxis.get_major_locator().set_params(nbins=4)  # long ones need room
    axes.yaxis.set_major_formatter(log() if panel.log else linear())
    if panel.log:
        axes.yaxis.set_minor_formatter(log())


@cache
def _formatters() -> tuple[type, type]:
    """Of the numbers beside a linear and beside a logarithmic axis."""
    from matplotlib.ticker import Formatter, LogFormatter

    class Linear(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return short(x)

        def format_ticks(self, values: Sequence[float]) -> list[str]:
            return ticks(values)

    class Log(LogFormatter):
        def format_ticks(self, values: Sequence[float]) -> list[str]:
            shown = super().format_ticks(list(values))  # which of them have room
            return [text if name else "" for text, name in zip(ticks(values), shown, strict=True)]

    return Linear, Log


def _line(axes: Any, line: Line, n: int, most: int) -> None:
    color, dash, marker = _LINES[n % len(_LINES)], _DASHES[n % len(_DASHES)], _MARKERS[n % len(_MARKERS)]
    if line.style == "faint":
        color, dash, marker = _FAINT, "-", ""
    if line.style == "band" or not line.label:
        dash = "-"
    points = thin(line.x, line.y, most)
    x, y, low, high = zip(*points) if points else ((), (), (), ())
    errors = None if line.error is None else [e for _, e, _, _ in thin(line.x, line.error, most)]
    if len(points) < len(line.x) and errors is None:
        axes.fill_between(x, low, high, color=color, alpha=0.22, lw=0)
    if line.style == "points" and len(points) <= 80:
        axes.errorbar(
            x, y, yerr=errors, color=color, ls=dash, lw=1.5, marker=marker, ms=4.2, capsize=2, elinewidth=1,
            label=line.label or None,
        )  # fmt: skip
        return
    if errors is not None:
        axes.fill_between(
            x, np.subtract(y, errors), np.add(y, errors), color=color, alpha=0.2, lw=0
        )  # fmt: skip
    axes.plot(x, y, color=color, ls=dash, lw=1.0 if line.style == "band" else 1.5, label=line.label or None)


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _frame(column: int, row: int, color: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, row - 0.44), 0.92, 0.88, fill=False, ec=color, lw=width, zorder=3)


def _cividis() -> Any:
    from matplotlib import colormaps

    return colormaps["cividis"].with_extremes(bad=(0, 0, 0, 0))


def _cell(value: float, form: str) -> str:
    text = format(value, form)
    return text.removeprefix("-") if float(text) == 0 else text


def _ticks(names: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    every = max(1, math.ceil(len(names) / most))
    at = list(range(0, len(names), every))
    return at, [names[n] for n in at]


def _svg(figure: Any, salt: str) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _clean(out.getvalue(), salt)


def _clean(text: str, salt: str) -> str:
    """For a page: colours by name, the page's font, ids that no other figure has, and nothing superfluous."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    text = re.sub(r"font-family: [^;]*; | transform=\"rotate\(-0[^\"]*\"", "", text)
    text = re.sub(r"(?<=[A-Za-z0-9+/=,])\n(?=[A-Za-z0-9+/=]+[\n\"])", "", text)  # in what is base64
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{salt}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{salt}-", text)
    text = re.sub(r"#0[ab]00[0-9a-f]{2}", lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0], text)
    text = re.sub(r"<[^>]*>", lambda m: re.sub(r"(\d+\.\d{2})\d+", r"\1", m[0]), text)  # not in what is read
    head = re.match(r"<svg[^>]*>", text)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert head
    assert box
    body = re.sub(r"\s*\n\s*", " ", text[head.end() :])
    return f'<svg viewBox="0 0 {box[1]} {box[2]}" aria-hidden="true" focusable="false">{body}'.strip()


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as e:
        raise UserError("the report's figures need matplotlib: pip install '.[analysis]'") from e
    return matplotlib


def spans(edges: Iterable[tuple[float, str]], end: float) -> list[Mark]:
    """Stretches that begin at each of these places and end at the next; none if there is only one."""
    found = sorted(edges)
    if len(found) < 2:
        return []
    ends = [at for at, _ in found[1:]] + [end]
    return [Mark(at, label, until) for (at, label), until in zip(found, ends, strict=True)]
