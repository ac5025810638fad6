"""CrystalCoder's own tokenisation, written again, and what it does to a document."""

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.compat import encode, ftfy_fixer, split_text
from data.tokenizer import Tokenizer, load, train_tokenizer
from errors import UserError
from tests.data.made_up import code, prose

KEPT = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
kept = pytest.mark.skipif(not KEPT.exists(), reason="shared/tokenizers is not beside the repository")
many = settings(derandomize=True, deadline=None, max_examples=200)


def restated(text: str) -> list[str]:
    """Fact sheet 3.5: pieces of at least 2000 characters, cut at the next space; character by character."""
    pieces, piece = [], ""
    for character in text:
        if character == " " and len(piece) >= 2000:
            pieces.append(piece)
            piece = ""
        piece += character
    return [*pieces, piece] if piece else pieces


@st.composite
def long_texts(draw) -> str:
    """Words without spaces, of lengths around 2000 and others, and runs of spaces between them."""
    words = draw(
        st.lists(st.tuples(st.sampled_from([0, 1, 7, 1998, 1999, 2000, 2001, 5000]), st.text("a\n漢", max_size=2)))
    )
    spaces = draw(st.lists(st.sampled_from([1, 1, 2, 2000]), min_size=len(words), max_size=len(words)))
    return "".join("x" * n + more + " " * gap for (n, more), gap in zip(words, spaces))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer([prose(i, 300) + code(i, 100) for i in range(20)], 420, path)
    return load(path)


@many
@given(long_texts())
@example("")
@example(" " * 4001)
@example("x" * 1999 + " " + "y" * 1999 + "  z")
@example("x" * 2000 + " y")
def test_pieces_are_those_of_the_fact_sheet(text):
    pieces = split_text(text)
    assert pieces == restated(text)
    assert "".join(pieces) == text


def test_a_piece_ends_at_the_first_space_from_its_2000th_character_on():
    assert split_text("x" * 2000 + " y") == ["x" * 2000, " y"]
    assert split_text("x" * 1999 + " y") == ["x" * 1999 + " y"]
    assert split_text("x" * 5000) == ["x" * 5000]
    assert split_text("x\n" * 5000) == ["x\n" * 5000]  # only a space is a place to cut


def test_pieces_are_encoded_separately(tokenizer):
    text = prose(1, 900)
    pieces = restated(text)
    assert len(pieces) > 2
    ids = encode([text, "the"], tokenizer, fix=str)
    assert ids == [[i for piece in pieces for i in tokenizer.encode(piece)], tokenizer.encode("the")]
    joined = tokenizer.decode(ids[0])
    assert joined.replace("  ", " ") == text
    assert joined.count("  ") == len(pieces) - 1  # the extra space that fact sheet 3.5 tells of
    assert tokenizer.encode(text) != ids[0]


@kept
def test_crystals_extra_space_is_one_piece_of_two_marks():
    crystal = load(KEPT / "crystal.model")
    text = "word " * 500
    ids = encode([text], crystal, fix=str)[0]
    assert ids is not None
    whole = crystal.encode(text)
    assert (len(ids), len(whole), ids.count(29871) - whole.count(29871)) == (len(whole) + 1, len(whole), 1)


def test_short_documents_are_left_out_only_if_asked(tokenizer):
    texts = ["the window", "", "the window of the token stream order seed step batch and a"]
    assert [ids is None for ids in encode(texts, tokenizer, fix=str)] == [False, True, False]
    lengths = [len(tokenizer.encode(t)) for t in texts]
    assert lengths[0] < 10 <= lengths[2]
    assert [ids is None for ids in encode(texts, tokenizer, fix=str, min_tokens=10)] == [True, True, False]
    assert encode(texts[:1], tokenizer, fix=str, min_tokens=lengths[0]) == [tokenizer.encode(texts[0])]


def test_text_is_repaired_to_nfc_before_it_is_split(tokenizer):
    pytest.importorskip("ftfy", reason="the package ftfy is not installed")
    broken = "schÃ¶n e\u0301 “the”"
    fixed = 'schön é "the"'
    assert unicodedata.is_normalized("NFC", fixed)
    assert encode([broken], tokenizer) == encode([fixed], tokenizer, fix=str)
    text = "e\u0301" * 1000 + " the window" + " the" * 600  # 2000 characters before it is repaired, 1000 after
    assert encode([text], tokenizer) == encode(["é" * 1000 + " the window" + " the" * 600], tokenizer, fix=str)


def test_ftfy_is_asked_for(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match="pip install ftfy"):
        ftfy_fixer()
    with pytest.raises(UserError, match="pip install ftfy"):
        encode(["the"], tokenizer)
    assert encode(["the"], tokenizer, fix=str) == [tokenizer.encode("the")]
