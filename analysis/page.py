"""The report as HTML: text, tables, and figures with their data. Everything that comes from outside is escaped here."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from analysis.figures import Drawn

STYLE = Path(__file__).with_name("report.css")
_ROWS, _CELLS = 60, 1200  # of a figure's table, at most; the download has all

Rows = Sequence[Sequence[Any]]


@dataclass
class Section:
    """A heading with what is below it, as HTML."""

    id: str
    title: str
    parts: list[str] = field(default_factory=list)

    def text(self, text: str) -> None:
        """A paragraph."""
        self.parts.append(f"<p>{escape(text)}</p>")

    def heading(self, text: str) -> None:
        """A heading below that of the section."""
        self.parts.append(f"<h3>{escape(text)}</h3>")

    def table(self, label: str, columns: Sequence[str], rows: Rows) -> None:
        """A table that scrolls in its own frame, and the same as a download."""
        self.parts.append(table(label, columns, rows))
        self.parts.append(f'<div class="data">{download(f"{self.id}-{slug(label)}", columns, rows)}</div>')

    def figure(
        self, name: str, title: str, caption: str, says: str, drawn: Drawn, columns: Sequence[str], rows: Rows
    ) -> None:
        """A figure with its data.

        Args:
            name: unique in the page; the download's name.
            title: of the figure.
            caption: how to read it.
            says: what it shows, for who cannot see it.
            drawn: both forms.
            columns: of its data.
            rows: its data.
        """
        shown, text = list(rows[: min(_ROWS, max(6, _CELLS // len(columns)))]), escape(f"{title}. {says}")
        more = f" ({len(shown)} of {len(rows)} rows)" if len(shown) < len(rows) else ""
        self.parts.append(
            f'<figure id="{escape(name)}"><figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption>'
            f'<div role="img" aria-label="{text}"><div class="wide">{drawn.wide}</div>'
            f'<div class="narrow">{drawn.narrow}</div></div>'
            f'<div class="data"><details><summary>Table{more}</summary>{table(title, columns, shown)}</details>'
            f"{download(name, columns, rows)}</div></figure>"
        )


@dataclass(frozen=True)
class Mono:
    """Text for a typewriter's face, shortened to so many characters; downloads have all of it."""

    text: str
    most: int = 64


@dataclass(frozen=True)
class Verdict:
    """A word that is good or bad."""

    text: str
    good: bool | None


@dataclass(frozen=True)
class Long:
    """Text that may be broken into lines."""

    text: str


def table(label: str, columns: Sequence[str], rows: Rows) -> str:
    """Rows under their columns; columns of numbers to the right."""
    right = [
        any(isinstance(r[n], int | float) for r in rows)
        and all(r[n] is None or isinstance(r[n], int | float) for r in rows)
        for n in range(len(columns))
    ]
    head = "".join(f'<th scope="col"{_class(r)}>{escape(c)}</th>' for c, r in zip(columns, right, strict=True))
    body = "".join(f"<tr>{''.join(_cell(v, r) for v, r in zip(row, right, strict=True))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def download(name: str, columns: Sequence[str], rows: Rows) -> str:
    """A link to the rows as CSV, which is in the link itself."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")  # so that cells with either of the two are quoted
    writer.writerow([plain(c) for c in columns])
    writer.writerows([plain(v) for v in row] for row in rows)
    data = quote(out.getvalue(), safe=",.:;-+_/=()")
    file = escape(f"{slug(name)}.csv")
    return f'<a download="{file}" href="data:text/csv;charset=utf-8,{data}">Download {file}</a>'


def plain(value: Any) -> Any:
    """A cell of a CSV file: floats to nine digits, whole numbers exactly, nothing for what is not known."""
    if isinstance(value, Mono | Verdict | Long):
        value = value.text
    if isinstance(value, str):  # a spreadsheet would run what looks like a formula
        return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n") else value
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.9g}")
    return "" if value is None else value


def number(value: Any) -> str:
    """A figure as a person reads it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e7):
        return f"{value:.3e}"
    return f"{value:,.1f}" if size >= 1000 else f"{value:.4g}"


def slug(text: str) -> str:
    """For names of files and places in the page: letters, digits and dashes."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()) or "x"


def notice(title: str, lines: Sequence[str]) -> str:
    """What a reader must know before all else."""
    return f'<div class="notice" role="note"><b>{escape(title)}</b><ul>{_items(lines)}</ul></div>'


def page(
    title: str,
    lead: str,
    facts: Sequence[tuple[str, str]],
    notices: str,
    sections: Sequence[Section],
    absent: Sequence[tuple[str, str]],
    foot: Sequence[str],
) -> str:
    """The whole page.

    Args:
        title: of the page.
        lead: a line below it.
        facts: names and values of the run's most important figures.
        notices: HTML before the sections.
        sections: in order.
        absent: what the page could show, and the command that makes it.
        foot: lines at the end.
    """
    links = [*((s.id, s.title) for s in sections), *([("absent", "Not here yet")] if absent else [])]
    menu = "".join(f'<li><a href="#{escape(i)}">{escape(t)}</a></li>' for i, t in links)
    cards = "".join(
        f"<div{' class=long' if len(v) > 16 else ''}><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts
    )
    heads = [f'aria-labelledby="{escape(s.id)}"><h2 id="{escape(s.id)}">{escape(s.title)}</h2>' for s in sections]
    body = "".join(f"<section {h}{''.join(s.parts)}</section>" for h, s in zip(heads, sections, strict=True))
    if absent:
        lines = "".join(f"<li>{escape(what)}: <code>{escape(how)}</code></li>" for what, how in absent)
        body += f'<section aria-labelledby="absent"><h2 id="absent">Not here yet</h2><ul>{lines}</ul></section>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE.read_text()}</style></head>'
        f'<body><a class="skip" href="#main">Skip to the content</a><header><h1>{escape(title)}</h1>'
        f'<p class="lead">{escape(lead)}</p><dl class="facts">{cards}</dl></header>'
        f'<nav aria-label="Sections"><ul>{menu}</ul></nav><main id="main" tabindex="-1">{notices}{body}</main>'
        f"<footer>{''.join(f'<p>{escape(line)}</p>' for line in foot)}</footer></body></html>\n"
    )


def _items(lines: Sequence[str]) -> str:
    return "".join(f"<li>{escape(line)}</li>" for line in lines)


def _class(right: bool) -> str:
    return ' class="n"' if right else ""


def _cell(value: Any, right: bool) -> str:
    if isinstance(value, Mono):
        cut = value.text if len(value.text) <= value.most else f"{value.text[: value.most]}…"
        return f'<td class="mono" title="{escape(value.text)}">{escape(cut)}</td>'
    if isinstance(value, Verdict):
        kind = {True: "good", False: "bad", None: ""}[value.good]
        return f'<td class="{kind}">{escape(value.text)}</td>'
    if isinstance(value, Long):
        return f'<td class="w">{escape(value.text)}</td>'
    text = value if isinstance(value, str) else number(value)
    return f"<td{_class(right)}>{escape(text)}</td>"
