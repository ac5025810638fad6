"""Text to token ids and back, and training a small SentencePiece model in LLaMA's manner (fact sheet 1.5, 1.9).

    tokenizer = load("runs/x")  # or a .model, a tokenizer.json, a Hugging Face folder
    tokenizer.encode("a</s>"), tokenizer.encode("a</s>", special=True)

Text never becomes a special token by spelling it: only `special=True` reads `</s>` or `<|fim_prefix|>` as one.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import final

import numpy as np
import numpy.typing as npt
import sentencepiece

from data.pieces import JsonPieces, Pieces, SentencePieces
from errors import UserError

MODEL, JSON = "tokenizer.model", "tokenizer.json"
_SPARE_ROWS = 127  # a model's vocabulary may be padded so far beyond its tokenizer's, as Crystal's is by 10
_PIECE_CHARACTERS = 4000  # training text is cut to about this: nothing is then too long for the trainer


@final
class Tokenizer:
    """Made by `load`. One file, `name` with `content`, is all of it: load gives the same tokenizer from a copy."""

    def __init__(self, path: Path, name: str, content: bytes, pieces: Pieces):
        self.path, self.name, self.content, self.pieces = path, name, content, pieces
        self._spelling = {i: token for token, i in pieces.special.items()}

    @property
    def vocab_size(self) -> int:
        """Number of ids. A model may have more: Crystal's last 10 are reserved."""
        return self.pieces.size

    @property
    def eos_id(self) -> int:
        """The id that ends a document (LLaMA: 2)."""
        return self.pieces.eos_id

    @property
    def bos_id(self) -> int:
        """The id that may begin a document (LLaMA: 1; LLM360's data never uses it); -1 if there is none."""
        return self.pieces.bos_id

    @property
    def unk_id(self) -> int:
        """The id of what is in no vocabulary (LLaMA: 0; no text has it, as bytes spell everything); -1 if none."""
        return self.pieces.unk_id

    @property
    def byte_of(self) -> dict[int, int]:
        """The byte that an id stands for, of the 256 ids that spell characters without a piece of their own."""
        return self.pieces.byte_of

    @property
    def special(self) -> dict[str, int]:
        """The ids that no text has unless asked, by their spelling: `<unk>`, `<s>`, `</s>`, Crystal's 22."""
        return dict(self.pieces.special)

    def check_fits(self, vocab_size: int) -> None:
        """Refuse a model of another vocabulary (UserError); padding rows that no token has are allowed."""
        if not 0 <= vocab_size - self.vocab_size <= _SPARE_ROWS:
            raise UserError(
                f"{self.path}: this tokenizer has {self.vocab_size} ids, and the model a vocabulary of {vocab_size}; "
                "give the tokenizer that belongs to the model"
            )

    def files(self) -> dict[str, bytes]:
        """Name and content of what must be kept to have this tokenizer elsewhere."""
        return {self.name: self.content}

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content, hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text, as it stands.

        With `special`, spelled tokens become their ids and the text between two of them is encoded as a text of its
        own, with its word-start piece, as the published Hugging Face tokenizers and Crystal's FIM data have it.
        """
        return self.encode_many([text], special=special)[0]

    def encode_many(self, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
        """Return encode(text) of each text."""
        if not special:
            return self.pieces.encode(texts)
        cut = [self._spelled.split(text) for text in texts]  # text, token, text, token, …, text
        encoded = iter(self.pieces.encode([part for parts in cut for part in parts[::2]]))
        return [
            [i for k, part in enumerate(parts) for i in ([self.pieces.special[part]] if k % 2 else next(encoded))]
            for parts in cut
        ]

    def encode_to(self, texts: Sequence[str], dtype: npt.DTypeLike) -> list[np.ndarray]:
        """Return encode(text) of each text as an array [tokens], several times faster than encode_many.

        What was read is remembered, for each dtype by itself: give it one dtype, and many texts one call after the
        other. ValueError when the dtype is no integer type with room for every id.
        """
        dtype = np.dtype(dtype)
        if dtype.kind not in "iu" or np.iinfo(dtype).max < self.vocab_size - 1:
            raise ValueError(f"{dtype} cannot hold the ids of a vocabulary of {self.vocab_size}")
        return self.pieces.encode_to(texts, dtype)

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Return the text of ids, special tokens as they are spelled or left out: encode's inverse.

        An id of the model that no token has (see `vocab_size`) is U+FFFD, as bytes that are no UTF-8 are.
        """
        text = []
        for is_text, run in groupby(map(int, ids), lambda i: i < self.vocab_size and i not in self._spelling):
            if is_text:
                text.append(self.pieces.decode(list(run)))
            elif not skip_special:
                text += [self._spelling.get(i, "\ufffd") for i in run]
        return "".join(text)

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        longest_first = sorted(self.pieces.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def files_in(folder: Path) -> list[Path]:
    """The tokenizer files of a folder, the one that `load` takes first; empty if it has none."""
    return [folder / name for name in (MODEL, JSON) if (folder / name).is_file()]


def load(path: str | Path) -> Tokenizer:
    """Return the tokenizer of a `.model`, a `tokenizer.json`, or a folder (a run, prepared data, Hugging Face's).

    In a folder `tokenizer.model` goes before `tokenizer.json`, and is completed by the tokens of `added_tokens.json`
    and `tokenizer_config.json`: the result is one model again. Raises UserError for what is not there or of no use.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = files_in(path)
        if not found:
            raise UserError(f"{path}: has no tokenizer: neither {MODEL} nor {JSON}; name the file or another folder")
        file = found[0]
    try:
        content = file.read_bytes()
        pieces: Pieces
        if file.suffix == ".json":
            name, pieces = JSON, JsonPieces(content)
        else:
            name, pieces = MODEL, SentencePieces(content)
            if path.is_dir() and (added := _added_tokens(path)):
                content = pieces.with_added(added)
                pieces = SentencePieces(content)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        kind = "tokenizer.json" if file.suffix == ".json" else "SentencePiece model"
        raise UserError(f"{file}: not a {kind} that can be loaded ({error})") from error
    if pieces.eos_id < 0:
        raise UserError(f"{file}: has no end-of-document token; it must have `</s>` as a control piece or added token")
    return Tokenizer(path, name, content, pieces)


def _added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that a Hugging Face folder adds to its `tokenizer.model`."""
    added: dict[str, int] = {}
    for name in ("added_tokens.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        try:
            listed = json.loads((folder / name).read_bytes())
            if name == "tokenizer_config.json":
                listed = {t["content"]: int(i) for i, t in listed.get("added_tokens_decoder", {}).items()}
            if not all(token and isinstance(i, int) for token, i in listed.items()):
                raise ValueError("a token without spelling, or an id that is no number")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{folder / name}: not a list of added tokens ({error!r}); fetch it again") from error
        for token, i in listed.items():
            if added.setdefault(token, i) != i:
                raise UserError(f"{folder / name}: token {token!r} has id {i}, and {added[token]} in added_tokens.json")
    return added


def hf_files(tokenizer: Tokenizer, context_length: int) -> dict[str, str | bytes]:
    """Return name and content of each file; UserError when the tokenizer cannot be written as a `tokenizer.json`.

    Hugging Face's ids are then those of `encode(text, special=True)`; its option `split_special_tokens` is ours by
    default. The class is not LlamaTokenizer: that of transformers 5 ignores the normaliser in `tokenizer.json`, so
    that it loses a leading space, and from `tokenizer.model` it makes other pieces of several spaces.
    """
    try:
        content = tokenizer.pieces.to_json()
    except ValueError as error:
        raise UserError(f"{tokenizer.path}: cannot be exported: {error}") from error
    names = {i: token for token, i in tokenizer.special.items()}
    added = {t["id"]: t for t in content["added_tokens"]}
    roles = {
        "unk_token": content["model"].get("unk_token"),
        "bos_token": names.get(tokenizer.bos_id),
        "eos_token": names[tokenizer.eos_id],
    }
    more = [token for token in tokenizer.special if token not in roles.values()]
    tokens = {k: v for k, v in roles.items() if v is not None} | ({"additional_special_tokens": more} if more else {})
    config = tokens | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {str(i): {k: v for k, v in t.items() if k != "id"} for i, t in sorted(added.items())},
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,  # for the LlamaTokenizer of transformers 4, whose ids are ours too
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_length,
        "padding_side": "left",
    }
    return {
        tokenizer.name: tokenizer.content,
        JSON: json.dumps(content, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        "special_tokens_map.json": json.dumps(tokens, indent=2) + "\n",
    }


def train_tokenizer(texts: Iterable[str], vocab_size: int, out_path: str | Path, max_bytes: int = 10_000_000) -> None:
    """Train a BPE model on the first max_bytes UTF-8 bytes of texts; the same texts give the same file.

    LLaMA's settings: unk 0, bos 1, eos 2, no pad, byte fallback, digits split, identity normaliser, dummy prefix,
    spaces kept. Unlike LLaMA's, a piece may hold newlines, since the training text keeps them: half of code is layout.
    Raises UserError when the texts do not support vocab_size pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_pieces(texts, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=0.9995,  # the other characters are bytes: a small vocabulary has better uses
            max_sentence_length=8 * _PIECE_CHARACTERS,  # in bytes; a longer one would be dropped without an error
            input_sentence_size=0,  # 0: use everything, draw nothing
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot train a tokenizer of {vocab_size} pieces on this text ({_reason(error)}); give more text or "
            "another vocab_size (at least 259 for the bytes and special tokens, plus the characters in use)"
        ) from error
    Path(out_path).write_bytes(model.getvalue())


def _training_pieces(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    # Cut before a newline where there is one: the trainer strips newlines from a piece's end, not from its start.
    left = max_bytes
    for text in texts:
        start = 0
        while start < len(text):
            stop = start + _PIECE_CHARACTERS
            if stop < len(text):
                cut = text.rfind("\n", start + 1, stop)
                stop = cut if cut > 0 else stop
            piece = text[start:stop]
            left -= len(piece.encode())
            if left < 0:
                return
            yield piece
            start = stop


def _reason(error: RuntimeError) -> str:
    # "INTERNAL: src/trainer_interface.cc(744) [condition] Vocabulary size too high (32000). ..." -> the last part
    return str(error).rsplit("] ", 1)[-1].strip() or "no text"
