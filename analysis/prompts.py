"""Prompts of the studies of bias and toxicity: read from files, drawn, and continued with seeds of their own.

What is generated depends on the checkpoint, the prompt and its own seed alone, and not on the texts beside it. A prompt
that is too long for the model, or for the cap, loses its beginning; how many did is in the summary.
"""

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.subject import AddBos, Subject, Target
from errors import UserError
from inference.sampling import Sampling

VERSION = 1  # of what results of these studies hold
_AT_ONCE = 256  # prompts: each has a key of its own, and as many make one program


class Writer:
    """Continues prompts with seeds of their own.

    Args:
        target: model and tokenizer.
        sampling: of each token.
        cap: most tokens of a prompt; the model's context may allow fewer.
        seed: with a prompt's name it makes the prompt's own.
        add_bos: as `Bold.add_bos`.

    Raises:
        UserError: what is written does not fit into the context, or <s> is asked for and there is none.
    """

    def __init__(self, target: Target, sampling: Sampling, cap: int, seed: int, add_bos: AddBos):
        self._sampling, self._seed, self._tokenizer = sampling, seed, target.tokenizer
        if cap < 1:
            raise UserError(f"--cap {cap}: at least 1 is needed")
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed {seed}: must be at least 0 and below 2**32")
        self._bos = target.begins_with_bos(add_bos)
        self.room = min(cap, target.model.context_length - sampling.max_new_tokens) - self._bos
        if self.room < 1:
            raise UserError(
                f"a continuation of {sampling.max_new_tokens} tokens leaves no room for a prompt in a context of "
                f"{target.model.context_length}, or --cap {cap} does"
            )
        self._dtype = target.region.compute_dtype

    def settings(self) -> dict[str, Any]:
        """All on which a continuation depends besides checkpoint and prompt."""
        s = self._sampling
        return {
            "new_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "seed": self._seed,
            "add_bos": self._bos,
            "prompt_tokens": self.room,
            "tokenizer": self._tokenizer.sha256,
            "compute_dtype": self._dtype,
        }

    def write(self, subject: Subject, prompts: Sequence[str], names: Sequence[str]) -> tuple[list[str], np.ndarray]:
        """Continue prompts.

        Args:
            subject: the checkpoint.
            prompts: texts, of at least one token.
            names: of each: its seed follows from it.

        Returns:
            The continuations, and of each prompt whether it lost its beginning, bool [n].
        """
        ids = self._tokenizer.encode_many(prompts)
        cut = np.array([len(i) > self.room for i in ids])
        kept = [i[-self.room :] for i in ids]
        head = [self._tokenizer.bos_id] if self._bos else []
        seeds = [int.from_bytes(hashlib.blake2b(f"{self._seed}/{n}".encode()).digest()[:4]) for n in names]
        new: list[list[int]] = []
        for start in range(0, len(kept), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(kept))
            # Always as many, so that the keys of the rest compile nothing new.
            part = [*range(start, stop), *[start] * (_AT_ONCE - stop + start if start else 0)]
            rows = subject.generate([[*head, *kept[i]] for i in part], self._sampling, seeds=[seeds[i] for i in part])
            new += rows[: stop - start]
        decode = self._tokenizer.decode
        # The text after a prompt: a first piece by itself would lose its space.
        return [decode(k + n, skip_special=True)[len(decode(k, skip_special=True)) :] for k, n in zip(kept, new)], cut


def chosen(rows: Sequence[Any], limit: int | None, name: str) -> list[Any]:
    """At most so many of the rows, in their order: which ones follows from their number and the name alone."""
    if limit is None or limit >= len(rows):
        return list(rows)
    rank = sorted(range(len(rows)), key=lambda i: hashlib.blake2b(f"{name}/{i}".encode()).digest())
    return [rows[i] for i in sorted(rank[:limit])]


def named(words: Iterable[str], flag: str) -> Iterator[tuple[str, Path]]:
    """Yield (name, file) of NAME=FILE; UserError where one is not of this form, or a name is given twice."""
    seen = set()
    for word in words:
        name, equals, file = word.partition("=")
        if not name or not equals or not file:
            raise UserError(f"{flag} {word}: write NAME=FILE")
        if name in seen:
            raise UserError(f"{flag} {word}: {name} is named twice")
        seen.add(name)
        yield name, Path(file)


def check_limit(limit: int | None) -> None:
    """UserError: a limit that leaves nothing."""
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: at least 1 is needed")


def read_text(file: Path) -> str:
    """A file as text. UserError: it cannot be read."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error


def json_lines(file: Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of JSON Lines, each an object with text in these fields. UserError: one is not, or there is none."""
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict) or (lost := [f for f in fields if not isinstance(row.get(f), str)]):
            what = f"no text {lost[0]!r}" if isinstance(row, dict) else "not an object"
            raise UserError(f"{file}:{number}: {what}")
        rows.append(row)
    if not rows:
        raise UserError(f"{file}: is empty")
    return rows


def read_table(file: Path) -> list[dict[str, Any]]:
    """Rows of a .csv or .jsonl. UserError: it has none, or cannot be read."""
    if file.suffix == ".jsonl":
        return json_lines(file, ())
    csv.field_size_limit(sys.maxsize)
    rows = list(csv.DictReader(io.StringIO(read_text(file), newline="")))
    if not rows:
        raise UserError(f"{file}: is empty, or not a .csv with a line of column names")
    return rows
