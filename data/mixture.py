"""What a phase reads in which shares (fact sheet 3.4), as arithmetic: from a slot of the phase to a window, and back."""

import math
from dataclasses import dataclass
from typing import Literal

from errors import UserError


@dataclass(frozen=True)
class Part:
    """One data set of a phase's mixture: some windows of a source, in some order, and its share of the phase."""

    name: str
    """Of this part; LLM360's name where it has one."""
    weight: float
    """Share of the phase; weights need not add up to 1."""
    source: str = ""
    """The prepared source that it reads; empty = the part's own name."""
    half: Literal["all", "even", "odd"] = "all"
    """All files of the source's windows, or every second one (a file is `file_samples` windows: fact sheet 3.4, 3.5)."""
    epochs: int = 1
    """The windows that many times over, each time with other draws of FIM."""
    fim_rate: float = 0.0
    """Probability that a document's piece of a window is rearranged to be filled in (fact sheet 3.6)."""
    shuffle: bool = False
    """Whether all its rows, epochs together, are in seeded random order (fact sheet 3.7), else in stream order."""
    start: float = 0.0
    """Rows int(n*start) .. int(n*stop)-1 of the order above are the part (`data_subset`, fact sheet 3.4)."""
    stop: float = 1.0

    def __post_init__(self) -> None:
        where = f"mixture: part {self.name!r}"
        if not 0 < self.weight < math.inf:
            raise UserError(f"{where}: weight {self.weight} must be a positive number")
        if not 0 <= self.start < self.stop <= 1:
            raise UserError(f"{where}: rows from {self.start} to {self.stop}; give 0 <= start < stop <= 1")
        if self.half not in ("all", "even", "odd"):
            raise UserError(f"{where}: half {self.half!r} is not one of all, even, odd")
        if self.epochs < 1 or not 0 <= self.fim_rate <= 1:
            raise UserError(f"{where}: epochs {self.epochs} (at least 1), fim_rate {self.fim_rate} (0 to 1)")

    @property
    def reads(self) -> str:
        """Name of the source that it reads."""
        return self.source or self.name
