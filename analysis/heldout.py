"""A task without files: which of four endings belongs to a text of the run's own validation data."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from analysis.drawing import SEED, chosen, seed, sha256
from analysis.harness import check_ties
from analysis.results import Scored, estimate
from analysis.subject import Subject, Target
from analysis.suites import HELDOUT
from errors import UserError

Note = Callable[[str], None]

FORMAT = 1  # of what a result means: items, drawing of rows, scoring
_PROMPT, _CONTINUATION, _CHOICES = 48, 16, 4  # tokens, tokens, number


@dataclass(frozen=True, eq=False)
class HeldOut:
    """A study: which of four endings belongs to a text of the run's own validation data.

    An item is the first three quarters of a piece of 64 tokens (less in shorter windows), and four last quarters: its
    own, and those of three pieces of other windows of the same source, in an order of their own. Pieces in which a
    document ends are left out. Tokens are scored as they are, since their text might become other tokens.
    """

    needs_weights = True

    rows: np.ndarray
    """int32 [items, choices, tokens]."""
    answers: np.ndarray
    """int32 [items]: which choice is the text's own."""
    sources: tuple[str, ...]
    """Of each item."""
    continuation: int
    """Tokens of an ending."""
    data: str
    """SHA-256 of the data."""
    limit: int | None
    dtype: str

    kind = f"evaluate/{HELDOUT}"

    @classmethod
    def open(cls, target: Target, limit: int | None, note: Note) -> "HeldOut":
        """Read validation data and make items of it.

        Raises:
            UserError: there is none, it is not the model's, or it is too little.
        """
        data, model = target.data, target.model
        if data.vocab_size > model.vocab_size:
            raise UserError(f"the data has {data.vocab_size} ids, and the model {model.vocab_size}; give its own data")
        length = min(_PROMPT + _CONTINUATION, data.sequence_length, model.context_length + 1) // _CHOICES * _CHOICES
        continuation = length // _CHOICES
        items: list[tuple[str, np.ndarray, int]] = []
        for source in data.sources:
            pieces = _pieces(data.validation(source), length, target.tokenizer.eos_id)
            made = list(_questions(source, pieces, continuation))
            if not made:
                note(f"{HELDOUT}: {source} has too little validation data, and is left out")
            items += [(source, rows, answer) for rows, answer in made]
        if not items:
            raise UserError(
                f"{HELDOUT}: the run's data has too little validation data; prepare it with a larger "
                "--data.validation-per-source"
            )
        items = [items[n] for n in chosen(len(items), limit, HELDOUT, "")]
        return cls(
            np.stack([rows for _, rows, _ in items]),
            np.array([answer for *_, answer in items], np.int32),
            tuple(source for source, *_ in items),
            continuation,
            data.sha256,
            limit,
            target.region.compute_dtype,
        )

    def settings(self) -> dict[str, Any]:
        """All on which scores depend besides the checkpoint."""
        return {
            "format": FORMAT,
            "task": HELDOUT,
            "data": self.data,
            "prompt_tokens": self.rows.shape[-1] - self.continuation,
            "continuation_tokens": self.continuation,
            "choices": _CHOICES,
            "limit": self.limit,
            "seed": SEED,
            "compute_dtype": self.dtype,
        }

    def score(self, subject: Subject) -> Scored:
        """Score all endings. RunError: numbers that are not finite, or that do not tell endings apart."""
        flat = subject.score(list(self.rows.reshape(-1, self.rows.shape[-1])))
        sums = np.array([s.logprobs[-self.continuation :].sum(dtype=np.float64) for s in flat])
        scores = sums.reshape(self.rows.shape[:2])
        ties = check_ties(scores.tolist(), np.full(scores.shape, self.continuation).tolist())
        chosen = scores.argmax(axis=1)
        right = (chosen == self.answers).astype(np.float64)
        of: dict[str, list[float]] = defaultdict(list)
        for source, value in zip(self.sources, right, strict=True):
            of[source].append(value)
        summary = {
            "headline": "acc",
            "acc": estimate(right),
            "by_source": {source: estimate(values) for source, values in of.items()},
            "chance": 1 / _CHOICES,
            "shots": 0,
            "ties": ties,
        }
        items = {
            "part": [""] * len(right),
            "doc_id": list(range(len(right))),
            "doc_hash": [sha256(rows.tobytes()) for rows in self.rows],
            "prompt_hash": [sha256(rows[0, : -self.continuation].tobytes()) for rows in self.rows],
            "group": list(self.sources),
            "target": self.answers.tolist(),
            "filter": ["none"] * len(right),
            "logprobs": scores.tolist(),
            "prediction": chosen.tolist(),
            "acc": right.tolist(),
        }
        return Scored(summary, {"items": pa.table(items)})


def _pieces(sample: Any, length: int, eos_id: int) -> list[tuple[int, np.ndarray]]:
    """(window, tokens [length]) of stretches of one document that were to be learned."""
    found = []
    for window, (tokens, weights) in enumerate(zip(sample.inputs, sample.weights, strict=True)):
        for start in range(0, len(tokens) - length + 1, length):
            piece = tokens[start : start + length]
            if eos_id not in piece and (weights[start : start + length - 1] > 0).all():
                found.append((window, np.asarray(piece, np.int32)))
    return found


def _questions(
    source: str, pieces: list[tuple[int, np.ndarray]], continuation: int
) -> Iterable[tuple[np.ndarray, int]]:
    """(int32 [choices, tokens], number of the right one) of each piece that finds three other endings."""
    for number, (window, piece) in enumerate(pieces):
        random = Random(seed(SEED, source, number, piece.tobytes().hex()))
        endings = {piece[-continuation:].tobytes(): piece[-continuation:]}
        for other, text in random.sample(pieces, len(pieces)):
            if len(endings) == _CHOICES:
                break
            if other != window:
                endings.setdefault(text[-continuation:].tobytes(), text[-continuation:])
        if len(endings) < _CHOICES:
            continue
        order = random.sample(range(_CHOICES), _CHOICES)
        ends = list(endings.values())
        yield np.stack([np.append(piece[:-continuation], ends[n]) for n in order]), order.index(0)
