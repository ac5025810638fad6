"""Scores of the published Amber over its 360 checkpoints, from ``amber_published.json`` beside this file.

The file says where its figures come from, how they were numbered there, and what is in doubt (fact sheet 6.2, 6.3).
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("amber_published.json")

#: What the tasks of lm-evaluation-harness, and Analysis360's own names, are called in the file.
_NAMES = {
    "arc": ("arc", "arc_challenge", "arc_c"),
    "hellaswag": ("hellaswag",),
    "mmlu": ("mmlu", "hendrycks_test"),
    "truthfulqa": ("truthfulqa", "truthfulqa_mc2", "truthfulqa_mc"),
    "race": ("race",),
    "piqa": ("piqa",),
    "boolq": ("boolq",),
    "siqa": ("siqa", "social_iqa", "social_i_qa"),
    "openbookqa": ("openbookqa",),
    "winogrande": ("winogrande",),
    "crowspairs": ("crowspairs", "crows_pairs", "crows_pairs_english"),
}


@dataclass(frozen=True)
class Curve:
    """A score over the published checkpoints."""

    title: str
    shots: int
    metric: str
    checkpoints: tuple[int, ...]
    tokens: tuple[int, ...]
    """Seen by each checkpoint."""
    values: tuple[float, ...]
    """Fractions of 1, as our own results have them."""


def curve(task: str) -> Curve | None:
    """The published curve of a task by one of its names in `_NAMES`, in any case; None of every other name."""
    found = next((key for key, names in _NAMES.items() if task.lower() in names), None)
    return None if found is None else _curve(found)


def sources() -> dict[str, str]:
    """Where the figures come from: "source", "index", "doubts"."""
    return {key: _file()[key] for key in ("source", "index", "doubts")}


@cache
def _file() -> dict[str, Any]:
    return json.loads(FILE.read_text())


@cache
def _curve(key: str) -> Curve:
    score, each = _file()["scores"][key], _file()["tokens_per_checkpoint"]
    at = [n * score["every"] for n in range(len(score["values"]))]
    values = list(score["values"])
    if score["last"]:
        at.append(score["last"]["checkpoint"])
        values.append(score["last"]["value"])
    tokens = tuple((n + 1) * each for n in at)
    shares = tuple(round(v / 100, 6) for v in values)
    return Curve(score["title"], score["shots"], score["metric"], tuple(at), tokens, shares)
