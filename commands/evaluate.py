"""Benchmarks by lm-evaluation-harness, of the checkpoints that REF names: what is missing of DIR/results."""

from typing import Any

from analysis.evaluate import Evaluate
from commands import analyze

Args: Any = analyze.Args[Evaluate]
run = analyze.run
