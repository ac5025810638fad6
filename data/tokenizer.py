"""One SentencePiece model: text to token ids and back, and training a small one in LLaMA's manner (fact sheet 1.5)."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece

from errors import UserError

_PIECE_CHARACTERS = 4000  # training text is cut to about this: nothing is then too long for the trainer


class Tokenizer:
    """A SentencePiece `.model` file. Raises UserError when it cannot be loaded or cannot mark a document's end."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._model = self.path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self._model)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: not a SentencePiece model that can be loaded ({error})") from error
        if self.eos_id < 0:
            # Also where `</s>` is a user-defined piece: SentencePiece has an eos id only if text cannot spell it.
            raise UserError(f"{path}: has no end-of-document token; train it with `</s>` as a control piece")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.vocab_size()

    @property
    def eos_id(self) -> int:
        """The id that ends a document (LLaMA: 2)."""
        return self._processor.eos_id()

    @property
    def bos_id(self) -> int:
        """The id that may begin a document (LLaMA: 1; Amber's data never uses it); -1 if there is none."""
        return self._processor.bos_id()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file, hexadecimal."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text without special tokens; control pieces typed in the text stay text."""
        return self._processor.encode(text)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Return encode(text) of each text."""
        return self._processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; encode's inverse."""
        return self._processor.decode([int(i) for i in ids])


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
