"""Text to ids and back, control pieces that nobody can type, and training that repeats itself."""

import io
from pathlib import Path

import pytest
import sentencepiece

from data.tokenizer import Tokenizer, train_tokenizer
from errors import UserError
from tests.data.made_up import code, prose

LLAMA = Path(__file__).resolve().parents[3] / "shared" / "tokenizers" / "llama.model"
AWKWARD = [
    "",
    " ",
    "</s>",
    "<s> a </s>b<unk><0x0A>",
    "a\n\n    b\t\tc  \r\n",
    "naïve 漢字 🦙 \x00 12345",
    "▁x",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer([prose(i, 300) + code(i, 100) for i in range(20)], 420, path)
    return Tokenizer(path)


def model(**settings) -> bytes:
    """Return a small SentencePiece model with other settings than ours."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([prose(0, 500)]),
        model_writer=out,
        model_type="bpe",
        minloglevel=2,
        **({"vocab_size": 60} | settings),
    )
    return out.getvalue()


@pytest.mark.skipif(not LLAMA.exists(), reason=f"{LLAMA.name} is not beside the repository")
def test_llama():
    llama = Tokenizer(LLAMA)
    assert (llama.vocab_size, llama.bos_id, llama.eos_id) == (32000, 1, 2)
    assert llama.encode("") == []
    assert llama.encode("Hello world") == [15043, 3186]
    assert llama.encode("a\n") == [263, 13]
    for text in AWKWARD[:-1]:
        assert llama.decode(llama.encode(text)) == text


def test_every_text_comes_back(small):
    assert (small.vocab_size, small.bos_id, small.eos_id) == (420, 1, 2)
    for text in [*AWKWARD[:-1], prose(99, 50), code(99, 50)]:
        assert small.decode(small.encode(text)) == text
    assert small.encode_many(AWKWARD) == [small.encode(text) for text in AWKWARD]


def test_no_text_types_a_control_piece(small):
    for text in AWKWARD:
        assert not {0, 1, 2} & set(small.encode(text))


def test_layout_has_pieces_of_its_own(small):
    # Newlines and indentation are worth pieces: fewer ids than bytes for a deep, empty layout.
    assert len(small.encode(code(3, 50))) < 0.6 * len(code(3, 50))
    assert len(small.encode(" " * 12 + "x")) <= 4


def test_training_repeats_itself(tmp_path):
    for name in ("a", "b"):
        train_tokenizer((prose(i, 300) for i in range(10)), 330, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert Tokenizer(tmp_path / "a").sha256 == Tokenizer(tmp_path / "b").sha256


def test_long_lines_are_learnt_from(tmp_path):
    # SentencePiece drops a sentence of more than 4192 bytes by default, and says so only in its log.
    train_tokenizer(["zyzzyva" * 5000], 290, tmp_path / "long")
    assert len(Tokenizer(tmp_path / "long").encode("zyzzyva" * 8)) < 20


def test_only_max_bytes_are_learnt_from(tmp_path):
    train_tokenizer([prose(1, 2000)], 330, tmp_path / "a", max_bytes=20_000)
    train_tokenizer([prose(1, 2000), "never seen " * 1000], 330, tmp_path / "b", max_bytes=len(prose(1, 2000)))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "reason"),
    [([prose(0, 50)], 32000, "too high"), ([prose(0, 50)], 200, "smaller than required_chars"), ([], 300, "no text")],
)
def test_a_vocabulary_the_text_cannot_fill_is_refused(tmp_path, texts, vocab_size, reason):
    with pytest.raises(
        UserError, match=f"{vocab_size} pieces on this text .*{reason}.*; give more text or another vocab"
    ):
        train_tokenizer(texts, vocab_size, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"not a model")
    for name in ("bad.model", "absent.model"):
        with pytest.raises(UserError, match=f"{name}: not a SentencePiece model that can be loaded"):
            Tokenizer(tmp_path / name)


def test_a_model_without_an_end_of_document_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(model(eos_id=-1))
    with pytest.raises(UserError, match=r"x\.model: has no end-of-document token"):
        Tokenizer(tmp_path / "x.model")


def test_a_model_whose_end_of_document_can_be_typed_is_refused(tmp_path):
    (tmp_path / "x.model").write_bytes(model(user_defined_symbols="</s>"))
    with pytest.raises(UserError, match=r"x\.model: has no end-of-document token; train it with `</s>` as a control"):
        Tokenizer(tmp_path / "x.model")
