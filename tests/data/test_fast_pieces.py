"""The fast way to ids gives SentencePiece's own: for every text, and for vocabularies where nothing can be cut."""

import json
import string
import struct
import sysconfig
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import fast_pieces
from data.fast_pieces import find_cuts
from data.pieces import SentencePieces
from data.tokenizer import Tokenizer, load, train_tokenizer
from tests.data.made_up import code, prose
from tests.data.test_tokenizer import AWKWARD, KEPT, kept, model, texts

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
NORMAL, UNUSED = 1, 5  # types of pieces in sentencepiece_model.proto
MORE = [
    "▁",
    "▁a ▁b▁ c",
    "a\u2581\nb \n\n\n \n▁\n\t\t\n1\n22\n333\n4444 55555",
    " " * 1000,
    "\n" * 1000,
    "x" * 5000 + " " + "y" * 100 + "1" * 100,
    "QUJD" * 3000 + "==",
    "漢字かな交じり文、" * 30 + "한국어 문장 " * 30 + "Русский текст, ещё — «слово». " * 30,
    "".join(map(chr, range(0x250))),
    "e\u0301\u0302\u0303 \u200b\u2060\ufeff\u00a0x\u3000y \ufffd\U0010ffff \x00\x01\x7f",
    "👩‍👩‍👧🏽\u2028 \u2029\r\n\x85",
]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("fast") / "small.model"
    train_tokenizer([prose(i, 300) + code(i, 100) for i in range(20)], 420, path)
    return load(path)


@pytest.fixture(scope="module", params=["small", "llama", "crystal"])
def tokenizer(request, small) -> Tokenizer:
    if request.param == "small":
        return small
    if not KEPT.exists():
        pytest.skip("shared/tokenizers is not beside the repository")
    return load(KEPT / f"{request.param}.model")


def check(pieces, many: list[str], dtype=np.uint16) -> None:
    arrays = pieces.encode_to(many, dtype)
    assert all(ids.dtype == dtype and ids.ndim == 1 for ids in arrays)
    assert [ids.tolist() for ids in arrays] == pieces.encode(many)


def field(tag: int, value: bytes) -> bytes:
    """Return a field of a protobuf message, of less than 128 bytes."""
    return bytes([tag, len(value)]) + value


def by_hand(pieces: dict[str, tuple[float, int]]) -> SentencePieces:
    """Return a BPE model of `{piece: (score, type)}`, after the three special pieces and the bytes."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((f"<0x{b:02X}>", 0.0, 6) for b in range(256))]
    proto = b""
    for piece, score, kind in [*special, *((p, *rest) for p, rest in pieces.items())]:
        proto += field(0x0A, field(0x0A, piece.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, kind]))
    trainer = b"\x18\x02" + b"\x98\x02\x01"  # BPE, byte_fallback
    normalizer = b"\x0a\x08identity" + b"\x20\x00"  # remove_extra_whitespaces: no
    return SentencePieces(proto + field(0x12, trainer) + field(0x1A, normalizer))


def naive(pieces: SentencePieces, text: str) -> list[int]:
    """Ids when the text is cut before every space, whatever the vocabulary says."""
    return [i for word in text.split(" ") for i in pieces.encode([word])[0]]


def test_vocabularies_can_be_cut_where_they_should(tokenizer, small):
    """Otherwise the others would compare SentencePiece with itself."""
    cuts = tokenizer.pieces._cuts
    newlines = any("\n" in tokenizer.pieces._processor.id_to_piece(i)[1:] for i in range(tokenizer.vocab_size))
    assert newlines == (tokenizer is small)
    if newlines:
        assert cuts.parts.findall(" ab  cd 12\n\n  ef") == [" ab", "  cd", " 12", "\n\n", "  ef", ""]
    else:
        text = " ab  cd.ef(漢字, 2024\n\n  x Ж\n  "
        parts = [" ab", "  cd", ".", "ef", "(", "漢", "字", ",", " 202", "4\n\n", "  x", " Ж", "\n", "  ", ""]
        assert cuts.parts.findall(text) == parts


def test_awkward_texts(tokenizer):
    for dtype in (np.uint16, np.int32, np.dtype(">u4")):
        check(tokenizer.pieces, [*AWKWARD, *MORE, *texts(11, 100)], dtype)
    assert tokenizer.encode_to([], np.uint16) == []
    assert [ids.size for ids in tokenizer.encode_to(["", "a"], np.uint16)] == [0, 1]


def test_real_text(tokenizer):
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("[a-d]*.py"))[:20], *sorted(library.glob("encodings/*.py"))[:5]]
    check(tokenizer.pieces, [file.read_text() for file in files])


WORDS = st.one_of(
    st.sampled_from(
        [" ", "  ", "\n", "\t", "▁", "\r\n", "</s>", "<0x0A>", "é", "e\u0301", "漢", "Ж", "\x00", "\ufeff"]
    ),
    st.sampled_from(
        ["def", "self", "a", "B", "_", "(", ").", "://", "7", "2024", "the", "ing", "─├", "«", "€", "👩‍👧"]
    ),
)
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(WORDS, max_size=30).map("".join),
    st.text(string.printable),
)


@given(many=st.lists(TEXT, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text(tokenizer, many):
    check(tokenizer.pieces, many)


CHARACTERS = "ab1\n"
VOCABULARY = st.dictionaries(
    st.tuples(st.sampled_from(["", "▁", "▁▁"]), st.text(CHARACTERS, max_size=4)).map("".join).filter(bool),
    st.tuples(st.integers(-3, 0), st.sampled_from([NORMAL, NORMAL, UNUSED])),
    max_size=16,
)


@given(vocabulary=VOCABULARY, many=st.lists(st.text(CHARACTERS + " ", max_size=30), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_any_vocabulary_without_a_piece_over_a_space(vocabulary, many):
    pieces = by_hand(vocabulary)
    assert pieces._cuts is not None
    check(pieces, many)


@given(
    vocabulary=st.dictionaries(st.text(CHARACTERS + "▁", min_size=1, max_size=5), st.just((0.0, NORMAL)), max_size=16),
    many=st.lists(st.text(CHARACTERS + " ", max_size=30), min_size=1, max_size=6),
)
@settings(max_examples=100, deadline=None)
def test_any_vocabulary(vocabulary, many):
    check(by_hand(vocabulary), many)


def test_a_piece_over_a_space_is_respected():
    pieces = by_hand({"a": (-9, NORMAL), "b": (-9, NORMAL), "▁b": (-2, NORMAL), "a▁b": (-1, NORMAL)})
    assert pieces._cuts is None
    assert naive(pieces, "aa b") != pieces.encode(["aa b"])[0]
    check(pieces, ["aa b", "a b a b", *AWKWARD])


def test_a_piece_that_cannot_come_about_forbids_nothing():
    """`b▁c` has no way to be joined, as neither `b▁` nor `▁c` is there: two joinings cross no more than one."""
    assert find_cuts(["a", "b", "ab", "ab▁c"]) is not None
    assert find_cuts(["a", "b", "ab", "b▁", "b▁c"]) is None


def test_a_piece_with_a_space_left_as_it_is():
    """No text becomes it, as its spaces are `▁` before they are joined; the space before `x` belongs to `x`."""
    check(by_hand({"a ": (-1, NORMAL), "▁x": (-1, NORMAL)}), ["a x", "a  xa ", "a▁x"])


def test_many_alphabets():
    """More than the pattern tells apart, some of whose characters mean something in a pattern."""
    odd = "^-]\\[~&|#\n09"
    pairs = ["^-", "]\\", "[~", "&|", "#\n", *(chr(c) + chr(c + 1) for c in range(0x400, 0x440, 2))]
    pieces = by_hand({pair: (-k, NORMAL) for k, pair in enumerate(pairs)})
    assert pieces._cuts is not None
    assert pieces._cuts.parts.pattern.count("]++") == 8
    check(pieces, [odd * 3, odd[::-1], "".join(pairs) * 2, " ".join(pairs), "".join(reversed(pairs))])


@pytest.mark.parametrize(
    "changed",
    [
        {"split_by_whitespace": False, "vocab_size": 420, "remove_extra_whitespaces": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": False},
        {"treat_whitespace_as_suffix": True},
        {"remove_extra_whitespaces": True},
        {"model_type": "unigram", "vocab_size": 290},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_other_models_are_left_to_sentencepiece(changed):
    pieces = SentencePieces(model(**(PLAIN | changed)))
    assert pieces._cuts is None
    check(pieces, [*AWKWARD, *MORE[:5], prose(3, 100)])


def test_a_custom_normaliser_is_seen(tmp_path):
    """One that no probe can be sure to meet."""
    (tmp_path / "rules.tsv").write_text("71\t78\n")  # q to x
    pieces = SentencePieces(model(normalization_rule_tsv=str(tmp_path / "rules.tsv"), remove_extra_whitespaces=False))
    assert pieces.encode(["q"]) == pieces.encode(["x"])
    assert pieces._cuts is None


def test_user_defined_pieces_are_no_text():
    pieces = SentencePieces(model(user_defined_symbols=["ead", "<a>"], **PLAIN))
    assert pieces._cuts is not None
    check(pieces, ["the reader<a> ead", prose(0, 100)])


def test_text_in_slices(tokenizer, monkeypatch):
    """However small a slice may be, it ends where text may be cut."""
    for size in (1, 2, 7):
        monkeypatch.setattr(fast_pieces, "_SLICE", size)
        check(tokenizer.pieces, [*AWKWARD, *MORE, code(1, 30), prose(1, 30)])


def test_little_is_remembered(small, monkeypatch):
    monkeypatch.setattr(fast_pieces, "_ENTRIES", 40)
    monkeypatch.setattr(fast_pieces, "_LONGEST", 5)
    pieces = SentencePieces(small.content)
    many = [*texts(12, 30), *texts(12, 30), prose(5, 200), "a", prose(5, 200)]
    check(pieces, many)
    remembered = pieces._fast[np.dtype(np.uint16)]._ids
    assert 0 < len(remembered) <= 40 == len(remembered._older)
    assert max(map(len, [*remembered, *remembered._older])) <= 5


def test_a_large_text_needs_little_memory(small):
    text = "ab 1\n" * 600_000  # a list of its parts would need 80 MB
    small.encode_to([text[:100]], np.uint16)
    tracemalloc.start()
    (ids,) = small.encode_to([text], np.uint16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * ids.nbytes + 10_000_000
    assert ids[: len(ids) // 2].tolist() == small.encode(text[: len(text) // 2])


@kept
def test_a_tokenizer_json_has_it_too(tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    llama = load(KEPT / "llama.model")
    (tmp_path / "tokenizer.json").write_text(json.dumps(llama.pieces.to_json()))
    other = load(tmp_path)
    many = [*AWKWARD, *MORE]
    check(other.pieces, many, np.int64)
    for ours, theirs in zip(llama.encode_to(many, np.int64), other.encode_to(many, np.int64), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, "S2"])
def test_a_dtype_that_cannot_hold_the_ids_is_refused(small, dtype):
    with pytest.raises(ValueError, match="cannot hold the ids of a vocabulary of 420"):
        small.encode_to(["a"], dtype)


def test_half_a_character_is_no_text(small):
    """What JSON calls a lone surrogate: as encode_many, and nothing of it is remembered."""
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)):
            small.encode_to(["a \ud800b"], np.uint16)
    with pytest.raises((RuntimeError, TypeError)):
        small.encode_many(["a \ud800b"])
    check(small.pieces, ["a b"])
