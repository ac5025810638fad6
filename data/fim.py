"""Windows rearranged to be filled in (FIM), as CrystalCoder's code was (fact sheet 3.6): pure functions, no state.

    fim = Fim.of(tokenizer)
    sample = rearrange(window, 0.9, ("fim", seed, source, epoch, k), tokenizer, fim)

The ends of documents cut a row into segments. A drawn segment is cut at two characters into prefix, middle and suffix;
each is encoded as a text of its own, with its word-start piece, and the three are put in one of two orders:

    PSM  <|fim_prefix|> prefix <|fim_suffix|> suffix <|fim_middle|> middle
    SPM  <|fim_prefix|><|fim_suffix|> suffix <|fim_middle|> prefix middle

All draws are `draws(segments, rate, key)`. What the originals broke is mended unless `original` is asked for; see
`rearrange`.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.packing import sort_keys
from data.pieces import SentencePieces
from data.sample import Sample
from data.tokenizer import Tokenizer
from errors import UserError

FIM_TOKENS = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>")  # in the order of their ids
SPM_SHARE = 0.5  # of the rearranged segments; the rest is PSM (fact sheet 3.6: "SPM share 0.5 in both" stages)

# The tokens that the tokenizer of the originals' FIM step had beside LLaMA's, spelled `<fim_prefix>` there
# (fact sheet 1.9). It found them in any text.
_STAR_TOKENS = (
    *("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "filename", "gh_stars", "issue_start", "issue_comment"),
    *("issue_closed", "jupyter_start", "jupyter_text", "jupyter_code", "jupyter_output", "empty_output"),
    *("commit_before", "commit_msg", "commit_after", "reponame"),
)

# While a segment is text, an id that no text spells is one surrogate, which no text holds: D800 + n for the n-th
# special token, DC00 + b for a byte b of no whole character, as Python's "surrogateescape" has it.
_SPECIAL, _SPECIALS, _BYTE = 0xD800, 0x400, 0xDC00
_BYTES = re.compile("[\udc00-\udcff]+")
_STANDS_ALONE = re.compile("([\ud800-\udfff])")
_WORD_START = re.compile("(^|[\ud800-\udbff]) ")  # the space that encoding put before a text

_NO_TEXT = "\uffff"  # a noncharacter: in no text, and so in no piece


@dataclass(frozen=True)
class Fim:
    """The ids that mark the parts of a rearranged segment, and what ends and begins documents."""

    prefix_id: int
    middle_id: int
    suffix_id: int
    pad_id: int
    eos_id: int
    bos_id: int  # -1 if there is none

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Fim":
        """Return the ids of a tokenizer; UserError when it lacks one of FIM_TOKENS."""
        special = tokenizer.special
        if missing := [token for token in FIM_TOKENS if token not in special]:
            raise UserError(
                f"{tokenizer.path}: this tokenizer has no {', '.join(missing)}, and fill-in-the-middle needs them; "
                "give one that has them (CrystalCoder's), let prepare train one, or set fim_rate to 0"
            )
        prefix, middle, suffix, pad = (special[token] for token in FIM_TOKENS)
        return cls(prefix, middle, suffix, pad, tokenizer.eos_id, tokenizer.bos_id)


def with_fim(model: bytes) -> bytes:
    """Return a SentencePiece model with FIM_TOKENS as its last ids, in that order; those that it has stay.

    For a vocabulary of V ids train V - 4 pieces. Raises ValueError for a model in which one is a piece of text.
    """
    pieces = SentencePieces(model)
    missing = [token for token in FIM_TOKENS if token not in pieces.special]
    return pieces.with_added({token: pieces.size + k for k, token in enumerate(missing)})


class Draw(NamedTuple):
    """What is drawn for one segment; the cuts as 32-bit numbers, since the length is not known yet."""

    fim: bool
    cuts: tuple[int, int]
    spm: bool

    def cut(self, length: int) -> tuple[int, int]:
        """Return where the middle begins and ends: two numbers uniform over 0..length, sorted."""
        a, b = sorted(number * (length + 1) >> 32 for number in self.cuts)
        return a, b


def draws(segments: int, rate: float, key: tuple[int | str, ...]) -> list[Draw]:
    """Return what is drawn for each segment of a window.

    Segment i, counted from 0 with empty ones, has the numbers u0, u1, u2, u3 = sort_keys(4 * segments, *key)[4*i:4*i+4]
    >> 32, each below 2**32. It is rearranged if u0 < rate * 2**32; the cuts of a text of n characters are u1 * (n+1)
    >> 32 and u2 * (n+1) >> 32; it is SPM if u3 < SPM_SHARE * 2**32.
    """
    numbers = (sort_keys(4 * segments, *key) >> np.uint64(32)).reshape(segments, 4).tolist()
    return [Draw(u0 < rate * 2**32, (u1, u2), u3 < SPM_SHARE * 2**32) for u0, u1, u2, u3 in numbers]


def rearrange(
    window: np.ndarray,
    rate: float,
    key: tuple[int | str, ...],
    tokenizer: Tokenizer,
    fim: Fim,
    original: bool = False,
) -> Sample:
    """Return the sample of a window (int [S+1]) of which each segment is rearranged with probability `rate`.

    The row is window[:S], its segments what stands between the ids of `</s>`, the last one (the tail) after them all.
    A sample of another length than S is cut or padded with `<|fim_pad|>`. ValueError for a rate that is none.

    - An empty segment keeps its `</s>`, and one without text is never rearranged. `<s>` at a segment's begin stays at
      the begin of the prefix, before the text that is cut.
    - Special tokens and bytes of no whole character (a window can begin or end inside one) are never made text, so
      nothing is lost, and text that spells a token stays text. Each counts as one character where cuts are drawn.
    - The true successor of the row is window[S], if the tail is as it was. Where a target's true successor is not
      known, the target is `<|fim_pad|>` with weight 0. With no segment rearranged the result is the plain window's.

    With `original`, as the originals did it (fact sheet 3.6 and 1.9): the `</s>` of an empty segment is lost; an empty
    tail may become the three sentinels alone; `<s>` is cut like text; a run of byte pieces that is not all whole
    characters becomes U+FFFD, one for each byte; tokens that a rearranged segment's text spells become tokens as far
    as the originals' tokenizer found them: `<filename>` and its like always, `<s>` and `</s>` after a space or at the
    begin of a part. The last target is `</s>` with weight 1 unless the sample was cut, and each pad has weight 0. A row
    of nothing but `</s>`, at which the originals gave up the whole file, is all pads.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"FIM rate {rate} is not between 0 and 1")
    *row, following = np.asarray(window).tolist()
    letters = _letters(tokenizer)
    segments = _split(row, fim.eos_id)
    drawn = draws(len(segments), rate, key)
    length = len(row)
    if original:
        ids = _encoded(_originally(segments, drawn, letters, fim), tokenizer, letters)
        return _fit(ids[:length], [*ids[1:], fim.eos_id][: len(ids)][:length], length, fim.pad_id)
    ids = _encoded(_mended(segments, drawn, following, letters, fim), tokenizer, letters)
    return _fit(ids[:length], ids[1 : length + 1], length, fim.pad_id)


def reassemble(ids: Sequence[int] | np.ndarray, tokenizer: Tokenizer, fim: Fim) -> list[str]:
    """Return the text of each segment of a row, in its original order; the last, the tail, may be empty.

    Rearranged and plain segments alike; special tokens as they are spelled, bytes of no whole character as U+FFFD, pads
    at the end left out. In SPM nothing stands between prefix and middle: if neither is empty, the middle's word-start
    piece reads as a space there that the text did not have.
    """
    row = [int(i) for i in ids]
    while row and row[-1] == fim.pad_id:
        row.pop()
    letters = _letters(tokenizer)
    return [_in_order(segment, letters, fim) for segment in _split(row, fim.eos_id)]


def _in_order(segment: list[int], letters: "_Letters", fim: Fim) -> str:
    if segment[:1] != [fim.prefix_id]:
        return letters.shown(segment)
    prefix, rest = _partition(segment[1:], fim.suffix_id)  # in SPM this prefix is empty, and the true one in `middle`
    suffix, middle = _partition(rest, fim.middle_id)
    return letters.shown(prefix) + letters.shown(middle) + letters.shown(suffix)


def _split(ids: list[int], end: int) -> list[list[int]]:
    """Return what stands before, between and after the ids `end`."""
    segments, start = [], 0
    for at in [k for k, i in enumerate(ids) if i == end]:
        segments.append(ids[start:at])
        start = at + 1
    return [*segments, ids[start:]]


def _partition(ids: list[int], mark: int) -> tuple[list[int], list[int]]:
    at = ids.index(mark) if mark in ids else len(ids)
    return ids[:at], ids[at + 1 :]


class _Text(NamedTuple):
    """Text to be encoded; without `word_start`, as if other text stood before it."""

    text: str
    word_start: bool


_Item = int | _Text  # an id, or text that will be ids


def _mended(segments: list[list[int]], drawn: list[Draw], following: int, letters: "_Letters", fim: Fim) -> list[_Item]:
    """Return the row, and its successor where that is known."""
    out: list[_Item] = []
    known = True
    for segment, draw in zip(segments, drawn):
        bos: list[_Item] = [fim.bos_id] if segment[:1] == [fim.bos_id] else []
        known = not draw.fim or len(segment) == len(bos)
        if known:
            out += segment
        else:
            text = _WORD_START.sub(r"\1", letters.read(segment[len(bos) :]))
            a, b = draw.cut(len(text))
            prefix, middle, suffix = (_items(part, letters) for part in (text[:a], text[a:b], text[b:]))
            out += _arranged(bos + prefix, middle, suffix, draw.spm, fim)
        out.append(fim.eos_id)
    return [*out[:-1], following] if known else out[:-1]  # the tail has no `</s>`


def _originally(segments: list[list[int]], drawn: list[Draw], letters: "_Letters", fim: Fim) -> list[_Item]:
    """Return the row as the originals made it of the same draws."""
    out: list[_Item] = []
    for k, (segment, draw) in enumerate(zip(segments, drawn)):
        tail = k == len(segments) - 1
        if not segment and not tail:
            continue
        if draw.fim:
            text = letters.originally(segment)
            a, b = draw.cut(len(text))
            prefix, middle, suffix = (_original_items(part, letters) for part in (text[:a], text[a:b], text[b:]))
            out += _arranged(prefix, middle, suffix, draw.spm, fim)
        else:
            out += segment
        if not tail:
            out.append(fim.eos_id)
    return out


def _arranged(prefix: list[_Item], middle: list[_Item], suffix: list[_Item], spm: bool, fim: Fim) -> list[_Item]:
    if spm:
        return [fim.prefix_id, fim.suffix_id, *suffix, fim.middle_id, *prefix, *middle]
    return [fim.prefix_id, *prefix, fim.suffix_id, *suffix, fim.middle_id, *middle]


def _items(part: str, letters: "_Letters") -> list[_Item]:
    items: list[_Item] = []
    word_start = True
    for k, piece in enumerate(_STANDS_ALONE.split(part)):
        if k % 2:
            items.append(letters.ids[piece])
            word_start = ord(piece) < _BYTE  # text after a special token is a text of its own
        elif piece:
            items.append(_Text(piece, word_start))
    return items


def _original_items(part: str, letters: "_Letters") -> list[_Item]:
    """Return a part as the originals' tokenizer read it: first its own tokens, then, in each text left, LLaMA's."""
    items: list[_Item] = []
    for k, piece in enumerate(letters.star_pattern.split(part)):
        if k % 2:
            items.append(letters.star_ids[piece])
            continue
        # It looked for LLaMA's with the word-start piece in front (`normalized` in its file), which is then lost.
        for j, text in enumerate(letters.base_pattern.split(f" {piece}" if piece else "")):
            if j % 2:
                items.append(letters.base_ids[text])
            elif text:
                items.append(_Text(text, word_start=False))
    return items


def _encoded(items: list[_Item], tokenizer: Tokenizer, letters: "_Letters") -> list[int]:
    texts = [item for item in items if isinstance(item, _Text)]
    encoded = iter(tokenizer.encode_many([t.text if t.word_start else _NO_TEXT + t.text for t in texts]))
    ids: list[int] = []
    for item in items:
        if isinstance(item, int):
            ids.append(item)
        else:
            ids += next(encoded)[0 if item.word_start else letters.no_text :]
    return ids


def _fit(inputs: list[int], targets: list[int], length: int, pad: int) -> Sample:
    pads = [pad] * length
    weights = (np.arange(length) < len(targets)).astype(np.float32)
    return Sample(
        np.array([*inputs, *pads][:length], np.int32), np.array([*targets, *pads][:length], np.int32), weights
    )


@dataclass(frozen=True)
class _Letters:
    """A tokenizer's ids as characters."""

    text: list[str]  # of each id: its text, or its surrogate
    ids: dict[str, int]  # of each surrogate
    names: dict[str, str]  # of each special token's surrogate, as the originals spelled it
    spelled: dict[str, str]  # and as the tokenizer spells it
    base_ids: dict[str, int]
    base_pattern: re.Pattern[str]
    star_ids: dict[str, int]
    star_pattern: re.Pattern[str]
    no_text: int  # ids of _NO_TEXT

    def read(self, ids: Iterable[int]) -> str:
        """Return the text of ids with surrogates for what is no text, and the space of each word-start piece."""
        return _BYTES.sub(lambda m: _raw(m).decode(errors="surrogateescape"), self._pieces(ids))

    def originally(self, ids: Iterable[int]) -> str:
        """Return the text of ids as the originals' decoder gave it; bytes are one run or all of them lost."""
        text = _BYTES.sub(_all_or_none, self._pieces(ids))
        return _STANDS_ALONE.sub(lambda m: self.names[m[0]], text).removeprefix(" ")

    def shown(self, ids: Iterable[int]) -> str:
        """Return the text of ids for a reader."""
        text = _WORD_START.sub(r"\1", self.read(ids))
        return _STANDS_ALONE.sub(lambda m: self.spelled.get(m[0], "\ufffd"), text)

    def _pieces(self, ids: Iterable[int]) -> str:
        return "".join([self.text[i] for i in ids])


def _raw(run: re.Match[str]) -> bytes:
    return bytes(ord(c) - _BYTE for c in run[0])


def _all_or_none(run: re.Match[str]) -> str:
    try:
        return _raw(run).decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(run[0])


@lru_cache(maxsize=4)
def _letters(tokenizer: Tokenizer) -> _Letters:
    special = tokenizer.special
    if len(special) > _SPECIALS:
        raise UserError(
            f"{tokenizer.path}: {len(special)} special tokens, and fill-in-the-middle can tell {_SPECIALS} apart; "
            "give a tokenizer with fewer"
        )
    spelled = {chr(_SPECIAL + n): token for n, token in enumerate(special)}
    alone = {special[token]: letter for letter, token in spelled.items()}
    alone |= {i: chr(_BYTE + byte) for i, byte in tokenizer.byte_of.items()}
    # A decoder drops the space of a text's first piece: so each piece is decoded behind a byte.
    first = next(i for i, byte in tokenizer.byte_of.items() if byte == ord("A"))
    star = {f"<|{name}|>": f"<{name}>" for name in _STAR_TOKENS}
    base_ids: dict[str, int] = {token: special[token] for token in ("<unk>", "<s>", "</s>") if token in special}
    star_ids = {short: special[token] for token, short in star.items() if token in special}
    return _Letters(
        text=[alone[i] if i in alone else tokenizer.decode([first, i])[1:] for i in range(tokenizer.vocab_size)],
        ids={letter: i for i, letter in alone.items()},
        names={letter: star.get(token, token) for letter, token in spelled.items()},
        spelled=spelled,
        base_ids=base_ids,
        base_pattern=re.compile(f" ({'|'.join(base_ids) or '(?!)'})"),
        star_ids=star_ids,
        star_pattern=re.compile(f"({'|'.join(star_ids) or '(?!)'})"),
        no_text=len(tokenizer.encode(_NO_TEXT)),
    )
