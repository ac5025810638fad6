"""Rearranged windows: the originals' rules written again, nothing lost where they are mended, and the draws."""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.fim import FIM_TOKENS, Draw, Fim, draws, rearrange, reassemble, with_fim
from data.sample import Sample
from data.tokenizer import Tokenizer, load, train_tokenizer
from errors import UserError
from tests.data.made_up import code, prose

KEPT = Path(__file__).resolve().parents[3] / "shared" / "tokenizers"
kept = pytest.mark.skipif(not KEPT.exists(), reason="shared/tokenizers is not beside the repository")
VOCAB = 420
BOS, EOS = 1, 2
PREFIX, MIDDLE, SUFFIX, PAD = range(VOCAB - 4, VOCAB)
SNIPPETS = [
    "</s>",
    " <s>",
    "a </s> b",
    "<fim_prefix>",
    "<|fim_middle|> x",
    " <unk>y",
    "漢字 ",
    "é",
    "the window",
    "  \n",
]
many = settings(derandomize=True, deadline=None, max_examples=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fim") / "small.model"
    train_tokenizer([prose(i, 300) + code(i, 100) for i in range(20)], VOCAB - 4, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model) -> Tokenizer:
    path = model.with_name("fim.model")
    path.write_bytes(with_fim(model.read_bytes()))
    return load(path)


@pytest.fixture(scope="module")
def fim(tokenizer) -> Fim:
    return Fim.of(tokenizer)


@pytest.fixture(scope="module")
def theirs(model) -> Any:
    """The tokenizer of the originals' FIM step, from the same pieces: Hugging Face's, with tokens added by name."""
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    content = load(model).pieces.to_json()
    for token in content["added_tokens"]:
        token["normalized"] = True  # as in the published tokenizer.json (fact sheet 1.9)
    made = tokenizers.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens(["<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"])
    return made


@st.composite
def windows(draw) -> Callable[[Tokenizer], np.ndarray]:
    """Windows of 2 to about 60 ids of everything: text, single ids of all kinds, halves of characters, `</s>`."""
    text = st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=6), st.text("ab 漢", max_size=20))
    ids = st.integers(0, VOCAB - 5).map(lambda i: [i])
    part = st.one_of(text, text, ids, st.sampled_from([[EOS], [BOS], [EOS, EOS], [EOS, BOS], [3 + 0xE6, 3 + 0xBC]]))
    parts = draw(st.lists(part, max_size=8))
    start, stop = draw(st.integers(0, 3)), draw(st.integers(0, 3))

    def window(tokenizer: Tokenizer) -> np.ndarray:
        found = [i for p in parts for i in (tokenizer.encode(p) if isinstance(p, str) else p)]
        found = found[start : len(found) - stop]  # cuts characters too
        return np.array([*found, EOS, 50][: max(2, len(found))])

    return window


def of(*ids: int) -> Callable[[Tokenizer], np.ndarray]:
    return lambda tokenizer: np.array(ids)


def number(i: int, key: Sequence[int | str]) -> int:
    """The i-th 32-bit number of a key, as the documentation of sort_keys and draws defines it."""
    mask = (1 << 64) - 1
    state = int.from_bytes(blake2b(json.dumps(key, separators=(",", ":")).encode(), digest_size=8).digest(), "little")
    z = state + (i + 1) * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return (z ^ z >> 31) >> 32


def restated(row: list[int], rate: float, key: Sequence[int | str], theirs: Any) -> tuple[list[int], ...]:
    """Ids, labels and loss mask by fact sheet 3.6, points 1 to 5, with our draws in the place of numpy's."""

    def transform(segment: list[int], i: int) -> list[int]:
        if number(4 * i, key) >= rate * 2**32:
            return segment
        text = theirs.decode(segment, skip_special_tokens=False)
        a, b = sorted(number(4 * i + k, key) * (len(text) + 1) >> 32 for k in (1, 2))
        prefix, middle, suffix = (
            theirs.encode(t, add_special_tokens=False).ids for t in (text[:a], text[a:b], text[b:])
        )
        if number(4 * i + 3, key) < 2**31:
            return [PREFIX, SUFFIX, *suffix, MIDDLE, *prefix, *middle]
        return [PREFIX, *prefix, SUFFIX, *suffix, MIDDLE, *middle]

    ids: list[int] = []
    segment: list[int] = []
    documents = 0
    for i in row:
        if i != EOS:
            segment.append(i)
            continue
        if segment:
            ids += [*transform(segment, documents), EOS]
        segment, documents = [], documents + 1
    ids += transform(segment, documents)
    labels, mask = [*ids[1:], EOS], [1] * len(row)
    if len(ids) > len(row):
        ids, labels = ids[: len(row)], labels[: len(row)]
    elif len(ids) < len(row):
        short = len(row) - len(ids)
        ids, labels = ids + [PAD] * short, labels[: len(ids)] + [PAD] * short
        mask[-short:] = [0] * short
    return ids, labels, mask


@many
@given(windows(), st.sampled_from([0.3, 0.9, 1.0]), st.integers(0, 10**6))
@example(of(EOS, EOS, EOS), 1.0, 0)
@example(of(EOS, 50), 0.3, 2)
@example(of(60, PAD, 61, MIDDLE, 62), 1.0, 3)
@example(of(BOS, EOS, BOS, BOS), 1.0, 0)
@example(of(3 + 0xBC, 3 + 0xA2, 50, 3 + 0xE6, 3 + 0xBC), 1.0, 1)
def test_the_originals_rules_give_the_same_sample(tokenizer, fim, theirs, window, rate, seed):
    ids, key = window(tokenizer), ("fim", seed, "code", 1, 2)
    expected = restated(ids[:-1].tolist(), rate, key, theirs)
    sample = rearrange(ids, rate, key, tokenizer, fim, original=True)
    assert [sample.inputs.tolist(), sample.targets.tolist(), sample.weights.tolist()] == list(expected)
    assert [a.dtype for a in sample] == [np.int32, np.int32, np.float32]


def test_the_originals_give_up_a_row_of_which_nothing_is_left(tokenizer, fim):
    """There an assertion failed and the file was left out; here the row is pads without weight."""
    sample = rearrange(np.array([EOS] * 4), 0.0, ("k",), tokenizer, fim, original=True)
    assert [a.tolist() for a in sample] == [[PAD] * 3, [PAD] * 3, [0.0] * 3]


def seam(text: str, draw: Draw, begin: str) -> str:
    """A rearranged segment's text as `reassemble` gives it: in SPM with the middle's word-start space."""
    a, b = draw.cut(len(text))
    joined = draw.spm and a < b and text[a] != "\ufffd" and (a > 0)
    return begin + (text[:a] + " " + text[a:] if joined else text)


def segments_of(row: Sequence[int] | np.ndarray) -> list[list[int]]:
    out: list[list[int]] = [[]]
    for i in row:
        if i == EOS:
            out.append([])
        else:
            out[-1].append(int(i))
    return out


@many
@given(windows(), st.sampled_from([0.5, 1.0]), st.integers(0, 10**6))
@example(of(EOS, EOS, 50), 1.0, 0)
@example(of(BOS, EOS, BOS, BOS), 1.0, 0)
@example(of(3 + 0xBC, 3 + 0xA2, 50, 60, 3 + 0xE6, 3 + 0xBC, 70), 1.0, 1)
def test_a_sample_is_one_sequence_whose_unknown_targets_do_not_count(tokenizer, fim, window, rate, seed):
    ids, key = window(tokenizer), ("fim", seed, "code", 1, 2)
    sample = rearrange(ids, rate, key, tokenizer, fim)
    assert (sample.inputs[1:] == sample.targets[:-1]).all()
    counted = int(sample.weights.sum())
    assert (sample.weights[:counted] == 1).all()
    assert (sample.targets[counted:] == PAD).all()
    assert PAD not in sample.targets[:counted]
    drawn = draws(len(segments_of(ids[:-1])), rate, key)
    tail = segments_of(ids[:-1])[-1]
    if not any(d.fim for d in drawn):
        assert all((a == b).all() for a, b in zip(sample, Sample.of_tokens(ids)))
    if counted < len(sample.weights) and (not drawn[-1].fim or tail in ([], [BOS])):
        assert sample.tokens[counted] == ids[-1]  # the window's last id is the known successor of its tail


def wide(ids: np.ndarray) -> np.ndarray:
    """The window behind so many `</s>` that the sample is not cut: each rearranged id may become several."""
    return np.concatenate([ids[:-1], [EOS], [EOS] * 400, ids[-1:]])


@many
@given(windows(), st.integers(0, 10**6))
@example(of(3 + 0xBC, 3 + 0xA2, 50, 60, 3 + 0xE6, 3 + 0xBC, 70), 1)
def test_the_parts_in_their_order_are_the_text(tokenizer, fim, window, seed):
    ids, key = window(tokenizer), ("fim", seed, "code", 1, 2)
    ids = ids[~np.isin(ids, [0, BOS])]  # `<s>` has a test of its own
    ids = wide(np.concatenate([ids, [50, 51]]))
    segments = segments_of(ids[:-1])
    drawn = draws(len(segments), 0.8, key)
    row = rearrange(ids, 0.8, key, tokenizer, fim).inputs
    assert (row != PAD).all()
    for segment, draw, text in zip(segments, drawn, reassemble(row, tokenizer, fim)):
        original = tokenizer.decode(segment)
        assert text == (seam(original, draw, "") if draw.fim else original)
        assert text.replace(" ", "") == original.replace(" ", "")


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("text", ["the window </s> of <s> <|fim_prefix|>a", "漢字 é", "x = 1\n"])
def test_the_begin_of_a_document_stays_in_front_of_the_prefix(tokenizer, fim, text, seed):
    body = tokenizer.encode(text)
    ids = wide(np.array([BOS, *body, EOS, 50]))
    sample = rearrange(ids, 1.0, ("fim", seed), tokenizer, fim)
    row, draw = sample.inputs.tolist(), draws(2, 1.0, ("fim", seed))[0]
    segment = segments_of(row)[0]
    at = segment.index(MIDDLE) if draw.spm else 0
    assert segment[at + 1] == BOS
    assert [segment.count(i) for i in (PREFIX, MIDDLE, SUFFIX, BOS, PAD)] == [1, 1, 1, 1, 0]  # none is typed
    assert reassemble(row, tokenizer, fim)[0] == seam(text, draw, "<s>")


@pytest.mark.parametrize("text", [" the", "the", "  x = 1"])
def test_text_after_a_special_token_is_a_text_of_its_own(tokenizer, fim, text):
    segment = [*tokenizer.encode("window of"), BOS, *tokenizer.encode(text), 0, *tokenizer.encode(text)]
    seeds = [s for s in range(40) if not draws(2, 1.0, ("k", s))[0].spm]
    assert len(seeds) > 10
    for seed in seeds:
        row = rearrange(wide(np.array([*segment, EOS, 50])), 1.0, ("k", seed), tokenizer, fim).inputs
        assert reassemble(row, tokenizer, fim)[0] == f"window of<s>{text}<unk>{text}" == tokenizer.decode(segment)


def test_an_empty_segment_keeps_its_end_and_one_without_text_is_not_rearranged(tokenizer, fim):
    window = np.array([EOS, EOS, BOS, EOS, EOS, 50])
    mended = rearrange(window, 1.0, ("k",), tokenizer, fim)
    assert mended.is_window
    assert (mended.tokens == window).all()
    theirs = rearrange(window, 1.0, ("k",), tokenizer, fim, original=True)
    assert theirs.inputs.tolist()[-1] != EOS


def bytewise(text: str) -> list[int]:
    """A document spelled wastefully, so that it gets shorter when it is encoded again."""
    return [3 + b for b in text.encode()]


def test_longer_samples_are_cut_and_end_with_the_true_next_id(tokenizer, fim):
    body = tokenizer.encode("the window of the token")
    whole = rearrange(
        wide(np.array([*body, 50])), 1.0, ("k",), tokenizer, fim
    )  # the same draws: the same first segment
    for original in (False, True):
        sample = rearrange(np.array([*body, 50]), 1.0, ("k",), tokenizer, fim, original)
        assert sample.weights.tolist() == [1.0] * len(body)
        assert sample.inputs[0] == PREFIX
        assert (sample.tokens == whole.tokens[: len(body) + 1]).all()
        assert sample.targets[-1] not in (EOS, PAD)


def test_shorter_samples_are_padded(tokenizer, fim):
    text = "the window of the token stream"
    row = bytewise(text)
    sample = rearrange(np.array([*row, 50]), 1.0, ("k",), tokenizer, fim)
    real = sample.inputs.tolist().index(PAD)
    assert real < len(row)
    assert sample.weights.tolist() == [1.0] * (real - 1) + [0.0] * (len(row) - real + 1)  # the last is not known
    assert sample.targets.tolist() == [*sample.inputs.tolist()[1:], PAD]
    assert reassemble(sample.inputs, tokenizer, fim) == [seam(text, draws(1, 1.0, ("k",))[0], "")]
    theirs = rearrange(np.array([*row, 50]), 1.0, ("k",), tokenizer, fim, original=True)
    assert (theirs.inputs == sample.inputs).all()
    assert theirs.weights.tolist() == [1.0] * real + [0.0] * (len(row) - real)
    assert theirs.targets.tolist() == [*sample.inputs.tolist()[1:real], EOS] + [PAD] * (len(row) - real)


def test_a_sample_of_the_same_length_does_not_teach_an_end_that_is_none(tokenizer, fim):
    text = "the window of the token stream order seed"
    bodies = [bytewise(text[:k]) + tokenizer.encode(text[k:]) for k in range(len(text))]
    made = [
        (row, key, rearrange(np.array([*row, 50]), 1.0, key, tokenizer, fim, True))
        for key in (("k", seed) for seed in range(10))
        for row in bodies
    ]
    row, key, theirs = next(m for m in made if PAD not in m[2].inputs and m[2].targets[-1] == EOS)
    assert theirs.weights.tolist() == [1.0] * len(row)
    mended = rearrange(np.array([*row, 50]), 1.0, key, tokenizer, fim)
    assert (mended.inputs == theirs.inputs).all()
    assert mended.weights.tolist() == [1.0] * (len(row) - 1) + [0.0]
    assert mended.targets[-1] == PAD


def test_a_plain_tail_is_followed_by_what_follows_it(tokenizer, fim):
    first, tail = bytewise("the window of the token stream"), tokenizer.encode("reader")
    seed = next(s for s in range(99) if [d.fim for d in draws(2, 0.5, ("k", s))] == [True, False])
    window = np.array([*first, EOS, *tail, 77])
    sample = rearrange(window, 0.5, ("k", seed), tokenizer, fim)
    counted = int(sample.weights.sum())
    assert counted < len(sample.weights)
    assert sample.tokens[: counted + 1].tolist()[-len(tail) - 2 :] == [EOS, *tail, 77]
    assert rearrange(window, 0.5, ("k", seed), tokenizer, fim, True).targets[counted - 1] == EOS


def test_a_key_is_a_sample(tokenizer, fim):
    window = np.array(tokenizer.encode(code(1, 40))[:129])
    made = [rearrange(window, 0.9, ("fim", 7, "code", epoch, 0), tokenizer, fim) for epoch in (0, 0, 1, 2, 3)]
    assert all((a == b).all() for a, b in zip(made[0], made[1]))
    assert len({m.inputs.tobytes() for m in made}) == 4
    assert draws(1, 0.9, ("fim", 7, "code", 0, 0)) == draws(1, 0.9, ("fim", 7, "code", 0, 0))


@pytest.mark.parametrize("rate", [0.9, 0.3])
def test_shares_of_100_000_draws(rate):
    drawn = [d for window in range(25_000) for d in draws(4, rate, ("fim", 11, "code", 0, window))]
    assert len(drawn) == 100_000

    def within(found: int, n: int, share: float) -> bool:
        return abs(found - n * share) <= 3 * (n * share * (1 - share)) ** 0.5

    rearranged = [d for d in drawn if d.fim]
    assert within(len(rearranged), len(drawn), rate)
    assert within(sum(d.spm for d in rearranged), len(rearranged), 0.5)
    cuts = np.array([d.cuts for d in rearranged])
    bins = 18 - 1  # lengths of a text, so that its cuts are 0..length
    counts = np.array([np.bincount(c * (bins + 1) >> 32, minlength=bins + 1) for c in cuts.T])
    expected = len(rearranged) / (bins + 1)
    assert (((counts - expected) ** 2 / expected).sum(axis=1) < 40.8).all()  # chi-square, 17 degrees: p = 0.001
    assert abs(np.corrcoef(cuts.T)[0, 1]) < 3 / len(rearranged) ** 0.5
    lows = [d.cut(1) for d in rearranged]
    assert all(within(lows.count(pair), len(lows), p) for pair, p in {(0, 0): 0.25, (0, 1): 0.5, (1, 1): 0.25}.items())


def test_windows_have_the_share_that_is_drawn(tokenizer, fim):
    text = [tokenizer.encode(prose(i, 12)) for i in range(300)]
    found = seen = spm = 0
    for k in range(300):
        window = np.array([i for body in (text * 2)[k : k + 4] for i in (*body, EOS)])
        row = rearrange(window, 0.3, ("fim", 5, "code", 0, k), tokenizer, fim).inputs
        drawn = draws(4, 0.3, ("fim", 5, "code", 0, k))
        for segment, draw in zip(segments_of(row), drawn):  # whether its first id is seen does not depend on its draw
            seen, found = seen + bool(segment), found + (segment[:1] == [PREFIX])
            assert not segment or (segment[0] == PREFIX) == draw.fim
            spm += draw.fim and draw.spm and segment[:2] == [PREFIX, SUFFIX]
    assert seen > 800
    assert abs(found - 0.3 * seen) <= 3 * (seen * 0.3 * 0.7) ** 0.5
    assert abs(spm - 0.5 * found) <= 3 * (found * 0.25) ** 0.5


def test_the_draws_are_what_the_documentation_says():
    key = ("fim", 3, "code", 1, 9)
    for i, draw in enumerate(draws(5, 0.3, key)):
        u = [number(4 * i + k, key) for k in range(4)]
        assert draw == Draw(u[0] / 2**32 < 0.3, (u[1], u[2]), u[3] / 2**32 < 0.5)
        assert draw.cut(10) == tuple(sorted((u[1] * 11 // 2**32, u[2] * 11 // 2**32)))
    assert not any(d.fim for d in draws(1000, 0.0, key))
    assert all(d.fim for d in draws(1000, 1.0, key))
    assert draws(1, 1.0, key)[0].cut(0) == (0, 0)
    assert Draw(True, (2**32 - 1, 0), False).cut(7) == (0, 7)


def test_the_originals_read_tokens_that_the_text_spells(tokenizer, fim):
    """Fact sheet 1.9: `<filename>` in a rearranged segment's text became a token; here it stays text."""
    window = np.array([*tokenizer.encode("a <fim_pad> b"), EOS, *[EOS] * 40, 50])
    rows = [rearrange(window, 1.0, ("k", s), tokenizer, fim, True).inputs.tolist() for s in range(20)]
    assert any(PAD in segments_of(row)[0] for row in rows)
    mended = [rearrange(window, 1.0, ("k", s), tokenizer, fim).inputs.tolist() for s in range(20)]
    assert not any(PAD in row for row in mended)


def test_rates_are_probabilities(tokenizer, fim):
    for rate in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="FIM rate"):
            rearrange(np.array([5, 6]), rate, ("k",), tokenizer, fim)


def test_a_small_tokenizer_gets_the_tokens(model, tokenizer, fim):
    assert tokenizer.vocab_size == VOCAB
    assert [tokenizer.special[t] for t in FIM_TOKENS] == [PREFIX, MIDDLE, SUFFIX, PAD]
    assert fim == Fim(PREFIX, MIDDLE, SUFFIX, PAD, EOS, BOS)
    assert with_fim(tokenizer.content) == tokenizer.content
    text = "the window <|fim_prefix|>"
    assert tokenizer.encode(text) == load(model).encode(text)


def test_a_tokenizer_without_the_tokens_is_refused(model):
    with pytest.raises(UserError, match=r"no <\|fim_prefix\|>, .*let prepare train one"):
        Fim.of(load(model))


def test_more_special_tokens_than_can_be_told_apart(tmp_path, tokenizer):
    added = {f"<|{n}|>": VOCAB + n for n in range(1020)}
    (tmp_path / "many.model").write_bytes(tokenizer.pieces.with_added(added))
    crowded = load(tmp_path / "many.model")
    with pytest.raises(UserError, match="1027 special tokens"):
        rearrange(np.array([5, 6]), 1.0, ("k",), crowded, Fim.of(crowded))


@kept
def test_crystals_tokens_and_its_texts_tokens():
    """Fact sheet 1.9 and 3.6: ids 32000 to 32004, and 32003 as the pad."""
    crystal = load(KEPT / "crystal.model")
    fim = Fim.of(crystal)
    assert (fim.prefix_id, fim.middle_id, fim.suffix_id, fim.pad_id) == (32000, 32001, 32002, 32003)
    body = crystal.encode("<filename>a.py\ndef f(x):\n    return x\n" * 3)
    window = np.array([BOS, *body, EOS, *[EOS] * 99, 5])
    rows = [rearrange(window, 1.0, ("k", s), crystal, fim, True).inputs.tolist() for s in range(5)]
    assert all(1 <= row.count(32004) <= 3 for row in rows)
    assert all(row.count(BOS) <= 1 and row[-1] == 32003 for row in rows)
    mended = [rearrange(window, 1.0, ("k", s), crystal, fim).inputs.tolist() for s in range(5)]
    assert not any(32004 in row for row in mended)
