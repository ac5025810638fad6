"""Perplexity: per token, per document and per byte, of the run's validation data and of any text, source by source.

Rows of different lengths are scored without any padding counting: a row's figures are sums over its own tokens. A text
longer than the context is read in windows that move on by ``stride``: each token is scored once, in the first window
that reaches it, after at least ``window - stride`` tokens of context, or all that there are before it.

What is counted (fact sheet 6.1, 7.2):

    loss                 nats per token: all tokens of the source together
    perplexity           its exponential
    document_perplexity  each document's own perplexity, averaged over documents, as LLM360's Pile figures are
    bits_per_byte        bits per byte of UTF-8 text: the only one that compares models of different tokenizers

A text begins after ``</s>``, as a document does in training, so that its first token is scored too; none is scored
that stands for no text. Of validation data the documents are the windows of training, with the weights of its loss.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from analysis.results import Scored
from analysis.subject import Subject, Target
from analysis.sweep import Study
from data.sources import SourceSpec, read
from data.tokenizer import Tokenizer, load
from errors import UserError

_VERSION = 1  # of what a result holds
_ROWS = 1024  # scored in one call
_TABLE = pa.schema(
    {
        "group": pa.string(),
        "source": pa.string(),
        "document": pa.string(),
        "tokens": pa.float64(),
        "bytes": pa.int64(),
        "nats": pa.float64(),
    }
)


@dataclass(frozen=True)
class Perplexity:
    """How surprised checkpoints are by held-out data and by texts."""

    text: tuple[str, ...] = ()
    """Texts as NAME=PATH: a folder of text files, .jsonl or .parquet, or one such file."""
    validation: bool = True
    """Also the run's validation data, source by source."""
    documents: int = 1000
    """Most documents of a text, and most validation windows of a source; 0 = all."""
    window: int = 0
    """Tokens that a text's window reads; 0 = the model's context."""
    stride: int = 0
    """Tokens by which the window moves on in longer texts; 0 = half the window."""

    def __post_init__(self) -> None:
        for name in ("documents", "window", "stride"):
            if getattr(self, name) < 0:
                raise UserError(f"perplexity: {name}={getattr(self, name)} must be at least 0")
        if not self.text and not self.validation:
            raise UserError("perplexity: nothing to read; give --text NAME=PATH, or leave --no-validation out")
        names = [SourceSpec.parse(t).name for t in self.text]
        if twice := {n for n in names if names.count(n) > 1}:
            raise UserError(f"perplexity: --text has the name {min(twice)} twice; names tell results apart")

    def open(self, target: Target, note: Callable[[str], None]) -> list[Study]:
        """The study, with everything that it scores.

        Raises:
            UserError: a window longer than the context, no text, no validation data, a tokenizer of another vocabulary
                or not that of the data.
        """
        context = target.model.context_length
        window = self.window or context
        stride = self.stride or max(1, window // 2)
        if window > context:
            raise UserError(f"perplexity: --window {window} exceeds the model's context of {context}")
        if stride > window:
            raise UserError(f"perplexity: --stride {stride} exceeds the window of {window}: tokens would be left out")
        groups: dict[str, list[_Document]] = {}
        if self.validation:
            groups["validation"] = list(_validation(target, self.documents))
        if self.text:
            specs = [SourceSpec.parse(t) for t in self.text]
            groups["text"] = [d for s in specs for d in _texts(s, target.tokenizer, window, stride, self.documents)]
        for name, found in groups.items():
            tokens = sum(int(np.count_nonzero(r.weights)) for d in found for r in d.rows)
            note(f"{name}: {len(found):,} documents, {tokens:,} tokens")
        settings = {
            "version": _VERSION,
            "documents": self.documents,
            "window": window,
            "stride": stride,
            "compute_dtype": target.region.compute_dtype,
            "tokens": {name: _sha256(found) for name, found in groups.items()},
        }
        return [PerplexityStudy(groups, settings)]


class _Row(NamedTuple):
    """Tokens for one pass: of ``tokens`` [n], ``weights`` float32 [n-1] say which of the last n-1 count."""

    tokens: np.ndarray
    weights: np.ndarray


class _Document(NamedTuple):
    source: str
    name: str
    rows: list[_Row]
    bytes: int | None
    """Of the text of the tokens that count; None if nobody knows."""


@dataclass(frozen=True, eq=False)
class PerplexityStudy:
    """The study that `Perplexity` opens."""

    groups: dict[str, list[_Document]]
    """"validation" and "text", as far as they were asked for."""
    asked: dict[str, Any]
    kind: str = "perplexity"
    needs_weights: bool = True

    def settings(self) -> dict[str, Any]:
        """Lengths, dtype, and the SHA-256 of all tokens."""
        return self.asked

    def score(self, subject: Subject) -> Scored:
        """One checkpoint.

        Returns:
            ``validation`` and ``text``, as far as asked for: the figures of all documents together (`figures`), and
            ``by_source``. The table ``documents`` has ``group``, ``source``, ``document``, ``tokens``, ``bytes`` and
            ``nats`` (the sum over the tokens).

        Raises:
            RunError: the model gives numbers that are not finite.
        """
        summary: dict[str, Any] = {}
        columns: dict[str, list[Any]] = {name: [] for name in _TABLE.names}
        for group, documents in self.groups.items():
            nats = _nats(subject, documents)
            tokens = np.array([sum(float(r.weights.sum()) for r in d.rows) for d in documents])
            sizes = np.array([np.nan if d.bytes is None else d.bytes for d in documents], np.float64)
            source = np.array([d.source for d in documents], object)
            of = lambda where: figures(nats[where], tokens[where], sizes[where])  # noqa: B023, E731
            summary[group] = of(slice(None)) | {"by_source": {n: of(source == n) for n in dict.fromkeys(source)}}
            columns["group"] += [group] * len(documents)
            columns["source"] += source.tolist()
            columns["document"] += [d.name for d in documents]
            columns["tokens"] += tokens.tolist()
            columns["bytes"] += [d.bytes for d in documents]
            columns["nats"] += nats.tolist()
        table = pa.table(
            columns,
            schema=_TABLE,
        )
        return Scored(summary, {"documents": table})


def figures(nats: np.ndarray, tokens: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """What is said of a group of documents.

    Args:
        nats: float64 [n], of all tokens of a document together.
        tokens: float64 [n], how many (of weighted ones: the sum of their weights), none 0.
        sizes: float64 [n], bytes of their text; NaN where nobody knows.

    Returns:
        ``documents``, ``tokens``, ``bytes``, and ``loss``, ``perplexity``, ``document_perplexity``, ``bits_per_byte``,
        each as value, stderr (over documents, as they are what was drawn; None of a single one) and n; values that are
        not known, or beyond float64, are None.
    """
    known = bool(np.isfinite(sizes).all() and sizes.sum() > 0)
    loss, loss_error = _ratio(nats, tokens)
    with np.errstate(over="ignore"):
        own = np.exp(nats / tokens)
        perplexity = float(np.exp(loss))
    bits, bits_error = _ratio(nats / math.log(2), sizes) if known else (None, None)
    n = len(nats)
    own_error = float(np.std(own, ddof=1) / math.sqrt(n)) if n > 1 and np.isfinite(own).all() else None
    return {
        "documents": n,
        "tokens": float(tokens.sum()),
        "bytes": int(sizes.sum()) if known else None,
        "loss": _estimate(loss, loss_error, n),
        "perplexity": _estimate(perplexity, None if loss_error is None else perplexity * loss_error, n),
        "document_perplexity": _estimate(float(np.mean(own)), own_error, n),
        "bits_per_byte": _estimate(bits, bits_error, n),
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> tuple[float, float | None]:
    """Sum over sum, and its standard error with the n pairs as a sample (the ratio estimator's)."""
    n, ratio = len(above), float(above.sum() / below.sum())
    if n == 1:
        return ratio, None
    return ratio, float(math.sqrt(n / (n - 1) * np.sum((above - ratio * below) ** 2)) / below.sum())


def _estimate(value: float | None, stderr: float | None, n: int) -> dict[str, Any]:
    finite = lambda v: None if v is None or not math.isfinite(v) else v  # noqa: E731
    return {"value": finite(value), "stderr": finite(stderr), "n": n}


def _nats(subject: Subject, documents: Sequence[_Document]) -> np.ndarray:
    """float64 [documents]: minus the sum of the log-probabilities that count."""
    nats = np.zeros(len(documents))
    rows = ((number, row) for number, d in enumerate(documents) for row in d.rows)
    while part := list(islice(rows, _ROWS)):
        for (number, row), found in zip(part, subject.score([row.tokens for _, row in part])):
            nats[number] -= float(np.sum(found.logprobs * row.weights, dtype=np.float64))
    return nats


# ---- what is scored --------------------------------------------------------------------------------------------------


def windows(tokens: Sequence[int], before: int, window: int, stride: int) -> Iterator[_Row]:
    """Cut a document into rows, so that each token counts in one of them.

    Args:
        tokens: of the document, at least one.
        before: the token that stands before it, and is only read.
        window: tokens that a row reads; a row has one more.
        stride: tokens by which rows move on.
    """
    whole = np.array([before, *tokens], np.int32)
    done = 0  # the last token that counts in a row before
    for end in _ends(len(tokens), window, stride):
        row = whole[max(0, end - window) : end + 1]
        weights = np.zeros(len(row) - 1, np.float32)
        weights[len(weights) - (end - done) :] = 1
        yield _Row(row, weights)
        done = end


def _ends(count: int, window: int, stride: int) -> Iterator[int]:
    """The last token of each row."""
    end = min(window, count)
    yield end
    while end < count:
        end = min(end + stride, count)
        yield end


def _texts(spec: SourceSpec, tokenizer: Tokenizer, window: int, stride: int, most: int) -> Iterator[_Document]:
    """The documents of a text. UserError: there are none, or one cannot be read."""
    for document in islice(read(spec), most or None):
        tokens = tokenizer.encode(document.text)
        rows = list(windows(tokens, tokenizer.eos_id, window, stride))
        yield _Document(spec.name, document.id, rows, len(document.text.encode()))


def _validation(target: Target, most: int) -> Iterator[_Document]:
    """The validation windows of the run's data."""
    advice = "; give --no-validation and --text NAME=PATH to score other text"
    try:
        data = target.data
    except UserError as error:
        raise UserError(f"{error}{advice}") from error
    if not data.sources:
        raise UserError(f"{data.directory}: has no validation data{advice}")
    if data.sequence_length > target.model.context_length or data.vocab_size > target.model.vocab_size:
        raise UserError(
            f"{data.directory}: its windows of {data.sequence_length} tokens of a vocabulary of {data.vocab_size} are "
            f"not for a model with a context of {target.model.context_length} and a vocabulary of "
            f"{target.model.vocab_size}"
        )
    tokenizer = None
    if data.tokenizer_file:
        tokenizer = target.tokenizer
        if load(data.tokenizer_file).sha256 != tokenizer.sha256:
            raise UserError(
                f"{tokenizer.path}: is not the tokenizer that made {data.directory}, so that its tokens would be "
                "counted as other text; give the right one with --tokenizer"
            )
    sizes = None if tokenizer is None else token_bytes(tokenizer, target.model.vocab_size)
    specials = np.array([] if tokenizer is None else list(tokenizer.special.values()))
    empty = True
    for source in data.sources:
        for number, (inputs, targets, weights) in enumerate(zip(*data.validation(source, 0, most or None))):
            if not weights.any():
                continue
            empty, size = False, None
            if sizes is not None:
                begins = np.isin(inputs, specials).astype(int)
                size = int(sizes[begins, targets][weights > 0].sum())
            yield _Document(source, f"{source}/{number}", _forced(inputs, targets, weights), size)
    if empty:
        raise UserError(f"{data.directory}: its validation files are empty{advice}")


def _forced(inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> list[_Row]:
    """A sample as rows: where a target is not the next input (Crystal's rearranged data), it ends a row of its own."""
    follows = np.append(targets[:-1] == inputs[1:], True)
    rows = [_Row(np.append(inputs, targets[-1]), np.where(follows, weights, 0).astype(np.float32))]
    for i in np.flatnonzero(~follows & (weights > 0)):
        alone = np.zeros(i + 1, np.float32)
        alone[-1] = weights[i]
        rows.append(_Row(np.append(inputs[: i + 1], targets[i]), alone))
    return rows


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of text that a token stands for.

    Returns:
        int64 [2, V]: inside a text, and as its first token, whose word-start space is no text; 0 for special tokens.
    """
    sizes = np.zeros((2, vocab_size), np.int64)
    anchor = tokenizer.encode("a")
    start, special = len(tokenizer.decode(anchor)), set(tokenizer.special.values())
    for token in range(tokenizer.vocab_size):
        if token in tokenizer.byte_of:
            sizes[:, token] = 1
        elif token not in special:
            sizes[0, token] = len(tokenizer.decode([*anchor, token])[start:].encode())
            sizes[1, token] = len(tokenizer.decode([token]).encode())
    return sizes


def _sha256(documents: Iterable[_Document]) -> str:
    """Of all tokens that are scored, and how."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(json.dumps([d.source, d.name, d.bytes, len(d.rows)]).encode())
        for row in d.rows:
            digest.update(row.tokens.astype("<i4").tobytes() + row.weights.astype("<f4").tobytes())
    return digest.hexdigest()
