"""What a tokenizer file holds: pieces of text with their ids, and special tokens, which no text spells.

There are two kinds of file: a SentencePiece `.model`, and a Hugging Face `tokenizer.json` of the kind that LLaMA's
conversion gives. What is wrong with one is a ValueError here; `data.tokenizer` says in which file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt
import sentencepiece

from data.fast_pieces import Cuts, FastPieces, find_cuts
from errors import UserError

# sentencepiece_model.proto, by hand: its Python module cannot share a process with transformers' copy of it.
_PIECE, _TRAINER, _NORMALIZER = 0x0A, 0x12, 0x1A  # tags in a model
_PIECE_TYPE, _MODEL_TYPE, _CHARACTERS_MAP, _DUMMY_PREFIX = 0x18, 0x18, 0x12, 0x18  # tags in those
_CONTROL, _USER_DEFINED, _BPE = 3, 4, 2

_SPACES_AND_LETTERS = "  a  b ﬁ Ａ e\u0301\t\r\n "  # a normaliser that changes anything changes some of this


class Pieces(Protocol):
    """A vocabulary, and its two directions for text in which nothing is special."""

    size: int
    special: dict[str, int]
    bos_id: int  # -1 if there is none
    eos_id: int  # -1 if there is none
    unk_id: int  # -1 if there is none
    byte_of: dict[int, int]  # the byte of each piece that stands for one

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, none of them special."""
        ...

    def encode_to(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[np.ndarray]:
        """Return encode(texts) as arrays, as fast as can be."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, none of them special."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the content of a `tokenizer.json` with the same ids, and no template that adds some."""
        ...


@final
class SentencePieces:
    """A `.model`. Special are its unknown, control and user-defined pieces."""

    def __init__(self, model: bytes):
        if not model:
            raise ValueError("it is empty")
        sentencepiece.SentencePieceProcessor(model_proto=model)  # a strict reader, before ours
        self._model = model
        p = self._processor = sentencepiece.SentencePieceProcessor(model_proto=_without_user_defined(model))
        self.size, self.bos_id, self.eos_id, self.unk_id = p.vocab_size(), p.bos_id(), p.eos_id(), p.unk_id()
        self.special = {p.id_to_piece(i): i for i in range(self.size) if p.is_control(i) or p.is_unknown(i)}
        self.byte_of = _byte_of({p.id_to_piece(i): i for i in range(self.size) if p.is_byte(i)})
        self._fast: dict[np.dtype, FastPieces] = {}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, none of them special."""
        return self._processor.encode(list(texts))

    def encode_to(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[np.ndarray]:
        """Return encode(texts) as arrays; several times faster than encode where the vocabulary is like LLaMA's."""
        dtype = np.dtype(dtype)
        if self._cuts is None:
            return [np.array(ids, dtype) for ids in self.encode(texts)]
        if dtype not in self._fast:
            self._fast[dtype] = FastPieces(self._cuts, self._encode_part, dtype)
        return [self._fast[dtype].encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, none of them special."""
        return self._processor.decode(list(ids))

    def with_added(self, tokens: Mapping[str, int]) -> bytes:
        """Return the model with more special tokens after its own; those that it has may be among them."""
        model, size = self._model, self.size
        for token, i in sorted(tokens.items(), key=lambda item: item[1]):
            if self.special.get(token) == i:
                continue
            if i < size or token in self.special or self._processor.piece_to_id(token) != self._processor.unk_id():
                raise ValueError(f"added token {token!r} has id {i}, and this id or this spelling is taken")
            if i > size:
                raise ValueError(f"added token {token!r} has id {i}, and nothing has id {size}")
            piece = _field(0x0A, token.encode()) + bytes([_PIECE_TYPE, _USER_DEFINED])
            model += _field(_PIECE, piece)  # one more element of a repeated field
            size += 1
        return model

    def to_json(self) -> dict[str, Any]:
        """Return the content of a `tokenizer.json` with the same ids; ValueError where there cannot be one."""
        p, pieces = self._processor, [self._processor.id_to_piece(i) for i in range(self.size)]
        if not self._is_plain_bpe:
            raise ValueError("only a BPE model that leaves text as it is, as LLaMA's, can be a tokenizer.json")
        parts = {s: i for s, i in self._parts.items() if not p.is_unused(i)}
        # All ways to make a piece of two others, the best piece first: what SentencePiece tries, in its order.
        merges = sorted(
            (-p.get_score(i), parts[s[:k]], parts[s[k:]])
            for s, i in parts.items()
            for k in range(1, len(s))
            if s[:k] in parts and s[k:] in parts
        )
        model = {
            "type": "BPE",
            "unk_token": pieces[p.unk_id()],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {s: i for i, s in enumerate(pieces)},
            "merges": [(pieces[left], pieces[right]) for _, left, right in merges],
        }
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        prefix = {"type": "Prepend", "prepend": "▁"}, _replace(" ", "▁")
        no_prefix = {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        return {
            "version": "1.0",
            "added_tokens": [{"id": i, "content": token, **plain} for token, i in self.special.items()],
            "normalizer": {"type": "Sequence", "normalizers": prefix},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [_replace("▁", " "), {"type": "ByteFallback"}, *no_prefix]},
            "model": model,
        }

    @cached_property
    def _is_plain_bpe(self) -> bool:
        """Whether it is BPE on a `▁` and the text, in which nothing is changed but a space to `▁`."""
        bpe = any(self._model[at] == _BPE for at, _ in _inside(self._model, _TRAINER, _MODEL_TYPE))
        mapped = any(start < stop for start, stop in _inside(self._model, _NORMALIZER, _CHARACTERS_MAP))
        kept = self._processor.normalize(_SPACES_AND_LETTERS) == "▁" + _SPACES_AND_LETTERS.replace(" ", "▁")
        return bpe and kept and not mapped

    @cached_property
    def _parts(self) -> dict[str, int]:
        """The ids of the pieces that BPE makes of text: all but special ones and bytes."""
        apart = {*self.special.values(), *self.byte_of}
        return {self._processor.id_to_piece(i): i for i in range(self.size) if i not in apart}

    @cached_property
    def _cuts(self) -> Cuts | None:
        return find_cuts(self._parts) if self._is_plain_bpe else None

    @cached_property
    def _part_processor(self) -> sentencepiece.SentencePieceProcessor:
        return sentencepiece.SentencePieceProcessor(model_proto=_without_word_start(_without_user_defined(self._model)))

    def _encode_part(self, part: str) -> list[int]:
        """Return the ids of a part of a text, without a `▁` before it."""
        return self._part_processor.encode(part)


@final
class JsonPieces:
    """A `tokenizer.json`: BPE with byte fallback. Special are its added tokens."""

    def __init__(self, content: bytes):
        try:
            import tokenizers
        except ImportError as error:
            raise UserError("reading a tokenizer.json needs the package tokenizers: pip install tokenizers") from error
        self._json = json.loads(content)
        try:
            model, added = self._json["model"], self._json["added_tokens"]
            if model["type"] != "BPE" or not model["byte_fallback"]:
                raise ValueError(f"its model is {model['type']}, and only BPE with byte fallback, as LLaMA's, is read")
            vocab: dict[str, int] = model["vocab"]
            self.special = {token["content"]: token["id"] for token in added}
            self.byte_of = _byte_of(vocab)
            _check_ids(vocab, self.special)
            merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
            # Left to itself the library finds special tokens wherever text spells them, and adds some by a template.
            typed = [m for m in merges if "".join(m) not in self.special]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{error!r} where a tokenizer.json has a BPE model and added_tokens") from error
        plain = self.to_json() | {"added_tokens": [], "model": model | {"merges": typed}}
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(str(error)) from error
        self.size = len(vocab | self.special)
        self.bos_id, self.eos_id = self.special.get("<s>", -1), self.special.get("</s>", -1)
        self.unk_id = (vocab | self.special).get(model.get("unk_token"), -1)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, none of them special."""
        return [e.ids for e in self._tokenizer.encode_batch(list(texts))]

    def encode_to(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[np.ndarray]:
        """Return encode(texts) as arrays."""
        return [np.array(ids, dtype) for ids in self.encode(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, none of them special."""
        return self._tokenizer.decode(list(ids))

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file without truncation, padding and template."""
        return self._json | {"truncation": None, "padding": None, "post_processor": None}


def _byte_of(ids: Mapping[str, int]) -> dict[int, int]:
    spelled = {f"<0x{b:02X}>": b for b in range(256)}
    if lost := spelled.keys() - ids.keys():
        raise ValueError(f"it has no piece {min(lost)}; only a vocabulary with all 256 bytes can write every text")
    return {ids[piece]: b for piece, b in spelled.items()}


def _check_ids(vocab: Mapping[str, int], special: Mapping[str, int]) -> None:
    names: dict[int, str] = {}
    for token, i in [*vocab.items(), *special.items()]:
        if names.setdefault(i, token) != token or vocab.get(token, i) != i:
            raise ValueError(f"token {token!r} has id {i}, and this id or this spelling is taken")
    gap = next((i for i in range(len(names)) if i not in names), None)
    if gap is not None:
        raise ValueError(f"nothing has id {gap}, and token {names[max(names)]!r} has id {max(names)}")


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _without_user_defined(model: bytes) -> bytes:
    """Return the model with control pieces for the user-defined ones: the same ids, found in no text."""
    out = bytearray(model)
    for at, _ in _inside(model, _PIECE, _PIECE_TYPE):
        if model[at] == _USER_DEFINED:
            out[at] = _CONTROL
    return bytes(out)


def _without_word_start(model: bytes) -> bytes:
    """Return the model without the `▁` that it puts before a text."""
    return model + _field(_NORMALIZER, bytes([_DUMMY_PREFIX, 0]))  # a message given twice is merged


def _inside(message: bytes, outer: int, inner: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of every value with tag `inner` in a message with tag `outer` in this one."""
    for tag, *value in _fields(message):
        if tag == outer:
            yield from ((start, stop) for tag, start, stop in _fields(message, *value) if tag == inner)


def _fields(message: bytes, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Yield (tag, start, stop) of every value in a protobuf message."""
    stop = len(message) if stop is None else stop
    while start < stop:
        tag, start = _varint(message, start)
        if tag & 7 == 2:
            size, start = _varint(message, start)
        else:
            size = {0: _varint(message, start)[1] - start, 1: 8, 5: 4}[tag & 7]
        yield tag, start, start + size
        start += size


def _varint(message: bytes, start: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[start]
        start, value, shift = start + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, start


def _field(tag: int, value: bytes) -> bytes:
    size, head = len(value), bytearray([tag])
    while size >= 128:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + value
