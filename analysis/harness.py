"""A checkpoint as lm-evaluation-harness wants a model: three kinds of requests, all text in and numbers or text out.

    lm = open_lm(target.tokenizer, target.model.context_length, add_bos=True)
    lm.subject = subject  # for each checkpoint; what was tokenized is kept
    lm.loglikelihood(requests), lm.loglikelihood_rolling(requests), lm.generate_until(requests)

Texts become tokens as in the harness's own Hugging Face model (0.4.13 `models/huggingface.py`, `TemplateLM`), so that
the same weights score the same: context and continuation are encoded together and split after the context's tokens, and
what does not fit is cut from the left. One thing differs: a rolling score never counts ``<s>`` after ``<s>``, as that
model does when its tokenizer prepends one.
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from data.tokenizer import Tokenizer
from errors import RunError, UserError
from inference.sampling import Sampling

if TYPE_CHECKING:
    from inference.score import TokenScores

#: New tokens of a request that does not say how many, as in the harness's own model.
MAX_NEW_TOKENS = 256
_SPELLINGS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts


class Scorer(Protocol):
    """What is asked of a checkpoint: `analysis.subject.Subject` has it."""

    def score(self, rows: Any) -> "list[TokenScores]":
        """Teacher-forced scores of rows of tokens."""

    def generate(self, prompts: Any, sampling: Sampling, seeds: Any = None) -> list[list[int]]:
        """Continuations of prompts."""


class Encoded(NamedTuple):
    """A request in tokens."""

    row: np.ndarray
    """int32 [n]: context and continuation, n at most one more than the model's context."""
    scored: int
    """Its last so many tokens are the continuation, at least one and not all."""
    cut: int
    """Tokens of the context that did not fit."""


class Requests:
    """Answers the harness's requests. Made by `open_lm`, which adds the harness's base class.

    Args:
        tokenizer: of the model.
        context_length: of the model, in tokens.
        add_bos: whether ``<s>`` is put before a text, as Hugging Face's LLaMA tokenizer does.
        max_new_tokens: of generated text, if not as many as the task asks for.

    Attributes:
        subject: the checkpoint that is asked; set it before asking.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, add_bos: bool, max_new_tokens: int | None = None):
        super().__init__()  # the harness's base class
        self.tokenizer, self.context_length, self.add_bos = tokenizer, context_length, add_bos
        self.max_new_tokens = max_new_tokens
        self.subject: Scorer | None = None
        self._first = [tokenizer.bos_id] if add_bos and tokenizer.bos_id >= 0 else []
        self._pairs: dict[tuple[str, str], Encoded] = {}
        self._texts: dict[str, list[Encoded]] = {}
        self._prompts: dict[tuple[str, int], tuple[list[int], int]] = {}

    # ---- what the harness calls ------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding says it) of the continuation of each ``(context, continuation)``.

        Raises:
            UserError: a continuation does not fit in the context.
            RunError: the model gives numbers that are not finite.
        """
        asked = [r.args for r in requests]
        self.encode(asked)
        unique = list(dict.fromkeys(asked))
        found = self._score([self._pairs[pair] for pair in unique])
        answers = dict(zip(unique, found, strict=True))
        return [answers[pair] for pair in asked]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each ``(text,)`` from its beginning on; every token is scored once."""
        texts = [r.args[0] for r in requests]
        unique = list(dict.fromkeys(texts))
        windows = [self.windows(text) for text in unique]
        scores = iter(self._score([window for of_text in windows for window in of_text]))
        sums = {t: float(sum(next(scores)[0] for _ in of_text)) for t, of_text in zip(unique, windows, strict=True)}
        return [sums[text] for text in texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuation of each ``(context, settings)``, cut before the first of the settings' ``until``.

        Greedy unless the settings ask for sampling. Then a text depends on the prompt, and on how often the same was
        asked before it, but not on the requests beside it.

        Raises:
            UserError: there is no room for the new tokens.
        """
        texts = [""] * len(requests)
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._settings(request.args[1]), []).append(number)
        for (sampling, until), numbers in groups.items():
            prompts = [self.prompt(requests[n].args[0], sampling.max_new_tokens)[0] for n in numbers]
            new = self._subject.generate(prompts, sampling, seeds=_seeds(prompts))
            for number, ids in zip(numbers, new, strict=True):
                text = self.tokenizer.decode(ids, skip_special=True)
                texts[number] = text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]
        return texts

    # ---- text to tokens --------------------------------------------------------------------------------------------

    def encode(self, pairs: Iterable[tuple[str, str]]) -> list[Encoded]:
        """Tokens of (context, continuation) pairs; each is encoded once in this object's life.

        Raises:
            UserError: a continuation is empty or does not fit in the context.
        """
        pairs = list(pairs)
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._pairs]
        moved = []
        for context, continuation in new:
            kept = context.rstrip()  # spaces at the end belong to the next piece
            moved.append((kept, context[len(kept) :] + continuation))
        wholes = self._ids(context + continuation for context, continuation in moved)
        contexts = dict.fromkeys(context for context, _ in moved)
        lengths = {c: len(ids) for c, ids in zip(contexts, self._ids(contexts), strict=True)}
        for pair, (context, _), whole in zip(new, moved, wholes, strict=True):
            if context == "":  # the model needs a token to begin with
                row = np.append(np.int32(self._prefix), whole) if whole[:1].tolist() != [self._prefix] else whole
                start = 1
            else:
                row, start = np.append(np.array(self._first, np.int32), whole), len(self._first) + lengths[context]
            self._pairs[pair] = self._fitted(row.astype(np.int32), len(row) - start, pair[1])
        return [self._pairs[pair] for pair in pairs]

    def windows(self, text: str) -> list[Encoded]:
        """What scores each token of a text once, with as much context as the harness's own model gives it."""
        from lm_eval.utils import get_rolling_token_windows

        if text not in self._texts:
            (ids,) = self._ids([text])
            pairs = get_rolling_token_windows(
                token_list=ids.tolist(), prefix_token=self._prefix, max_seq_len=self.context_length, context_len=1
            )
            self._texts[text] = [Encoded(np.array([*i, o[-1]], np.int32), len(o), 0) for i, o in pairs]
        return self._texts[text]

    def prompt(self, text: str, new_tokens: int) -> tuple[list[int], int]:
        """Tokens of a prompt with room for new ones after it, and how many were cut from its left.

        Raises:
            UserError: there is no room.
        """
        room = self.context_length - new_tokens
        if room < 1:
            raise UserError(
                f"{new_tokens} new tokens are asked for, and the model's context is {self.context_length}; lower them "
                "with --max-new-tokens, or leave the task out"
            )
        if (text, room) not in self._prompts:
            ids = [*self._first, *self._ids([text])[0].tolist()] or [self._prefix]
            self._prompts[text, room] = ids[-room:], max(0, len(ids) - room)
        return self._prompts[text, room]

    def cut(self, requests: Sequence[Any]) -> int:
        """Requests of which a part does not fit in the context; encodes all."""
        pairs = [r.args for r in requests if r.request_type == "loglikelihood"]
        long = sum(e.cut > 0 for e in self.encode(pairs))
        for request in requests:
            if request.request_type == "generate_until":
                sampling, _ = self._settings(request.args[1])
                long += self.prompt(request.args[0], sampling.max_new_tokens)[1] > 0
        return long

    def scored_tokens(self, pair: tuple[str, str]) -> int:
        """Tokens of a continuation."""
        return self.encode([pair])[0].scored

    # ---- inside ----------------------------------------------------------------------------------------------------

    @property
    def _prefix(self) -> int:
        return self.tokenizer.bos_id if self.tokenizer.bos_id >= 0 else self.tokenizer.eos_id

    @property
    def _subject(self) -> Scorer:
        if self.subject is None:
            raise RuntimeError("no checkpoint to ask: set `subject`")
        return self.subject

    def _ids(self, texts: Iterable[str]) -> list[np.ndarray]:
        return self.tokenizer.encode_to(list(texts), np.int32)

    def _fitted(self, row: np.ndarray, scored: int, continuation: str) -> Encoded:
        if not 0 < scored <= self.context_length:
            what = "is empty" if scored <= 0 else f"has {scored} tokens, and the model's context {self.context_length}"
            raise UserError(
                f"the continuation {continuation[:40]!r} {what}; leave the task out, or study a model with a longer "
                "context"
            )
        cut = max(0, len(row) - self.context_length - 1)
        return Encoded(row[cut:], scored, cut)

    def _score(self, encoded: Sequence[Encoded]) -> list[tuple[float, bool]]:
        found = self._subject.score([e.row for e in encoded])
        answers = []
        for e, scores in zip(encoded, found, strict=True):
            total = float(scores.logprobs[-e.scored :].sum(dtype=np.float64))
            if not np.isfinite(total):
                raise RunError("the model gives log-probabilities that are not finite; its weights are no use")
            answers.append((total, bool((scores.likeliest[-e.scored :] == e.row[-e.scored :]).all())))
        return answers

    def _settings(self, asked: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else until
        new = self.max_new_tokens or next((int(asked[s]) for s in _SPELLINGS if asked.get(s)), MAX_NEW_TOKENS)
        temperature = float(asked.get("temperature") or 0)
        if asked.get("do_sample") is False:
            temperature = 0.0
        top_k, top_p = int(asked.get("top_k") or 0), float(asked.get("top_p") or 1)
        return Sampling(new, temperature, top_k, top_p), tuple(s for s in stops if s)


def open_lm(tokenizer: Tokenizer, context_length: int, add_bos: bool, max_new_tokens: int | None = None) -> Any:
    """A `Requests` that is an ``lm_eval.api.model.LM``; for ``simple_evaluate`` too.

    Raises:
        UserError: the harness is not installed.
    """
    harness()
    from lm_eval.api.model import LM

    return type("CheckpointLM", (Requests, LM), {})(tokenizer, context_length, add_bos, max_new_tokens)


def harness() -> str:
    """Version of lm-evaluation-harness.

    Raises:
        UserError: it is not installed, or what it needs is not.
    """
    try:
        import lm_eval.api.task  # noqa: F401
    except ImportError as e:
        raise UserError(f"this needs lm-evaluation-harness ({e}): pip install '.[analysis]'") from e
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # advice to authors of tasks
    return metadata.version("lm_eval")


def check_ties(scores: Sequence[Sequence[float]], tokens: Sequence[Sequence[int]]) -> int:
    """How many rows have choices that all score the same, as a whole or by the token.

    Ties go to the first choice, and TruthfulQA lists the true answer first: a model that gives one constant would score
    1.0. One to which all tokens are equally likely takes the choice with the fewest. Choices of one token each may tie
    by chance in bfloat16, others hardly ever.

    Args:
        scores: log-probability of each choice, for each row.
        tokens: number of tokens of each.

    Raises:
        RunError: too many for chance, or all of several.
    """

    def ties(row: Sequence[float], lengths: Sequence[int]) -> bool:
        each = [score / length for score, length in zip(row, lengths, strict=True)]
        return len(set(row)) == 1 or max(each) - min(each) <= 1e-6 * max(map(abs, each))

    chosen = [n for n, row in enumerate(scores) if len(row) > 1]
    tied = [n for n in chosen if ties(scores[n], tokens[n])]
    several = [n for n in tied if set(tokens[n]) != {1}]
    if (
        1 < len(tied) == len(chosen)
        or len(tied) > max(3, len(scores) // 10)
        or len(several) > max(3, len(scores) // 100)
    ):
        raise RunError(
            f"all choices score the same in {len(tied)} of {len(scores)} rows, so that whichever is listed first would "
            "count as the model's answer; the weights are no use, or not trained"
        )
    return len(tied)


def _seeds(prompts: Sequence[Sequence[int]]) -> list[int]:
    seen: dict[bytes, int] = {}
    seeds = []
    for prompt in prompts:
        key = np.array(prompt, np.int32).tobytes()
        seen[key] = seen.get(key, -1) + 1
        digest = hashlib.sha256(key + seen[key].to_bytes(4, "little")).digest()
        seeds.append(int.from_bytes(digest[:4], "little"))
    return seeds
