"""How the next token of a text is chosen."""

import dataclasses
import math

from errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    """Longest continuation."""
    temperature: float = 0.0
    """0 = greedy: always the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0 = all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability."""
    seed: int = 0
    """Same seed, same text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"generate: max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"generate: temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise UserError(f"generate: top_k={self.top_k} must be 0 (all) or positive")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"generate: seed={self.seed} must be at least 0 and below 2**32")
        if not 0 < self.top_p <= 1:
            raise UserError(f"generate: top_p={self.top_p} must be in (0, 1]")
