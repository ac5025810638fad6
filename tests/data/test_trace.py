"""From samples to documents and back: every token of every sample, in both layouts."""

import json
import random

import numpy as np
import pytest

from data.chunks import DataManifest
from data.dataset import ChunkedData
from data.index import DocumentIndex
from data.mixture import Part
from data.prepare import PhasePlan, PrepareConfig, prepare
from data.sample import PhaseSamples, Schedule
from data.sources import SourceSpec
from data.tokenizer import load
from data.trace import Tracer, _inner_words
from errors import UserError
from tests.data.made_up import code


@pytest.fixture(scope="module", params=["prepared", "crystal"])
def tracer(request) -> Tracer:
    return Tracer(ChunkedData(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def texts(corpus) -> dict[str, str]:
    """Text of every document by source/id."""
    code = {f"code/{p.name}": p.read_text() for p in (corpus / "code").iterdir()}
    lines = (corpus / "prose.jsonl").read_text().splitlines()
    return code | {f"prose/prose.jsonl:{n}": json.loads(line)["text"] for n, line in enumerate(lines, start=1)}


def positions(tracer: Tracer, n: int) -> list[tuple[int, int]]:
    rng, found = random.Random(0), []
    for _ in range(n):
        chunk = rng.randrange(len(tracer.manifest.chunk_files))
        found.append((chunk, rng.randrange(tracer.manifest.chunk_files[chunk].samples)))
    return found


def test_samples_lead_to_documents_and_back(tracer, texts):
    """1000 samples: their documents, the text of those as it was prepared, and among their places the sample."""
    known = {}
    for chunk, position in positions(tracer, 1000):
        pieces = tracer.pieces(chunk, position)
        origin = tracer.origin(chunk, position)
        assert [p.tokens[0] for p in pieces] == [0, *(p.tokens[1] for p in pieces[:-1])]
        assert pieces[-1].tokens[1] == tracer.manifest.sequence_length + 1
        for piece in pieces:
            name = f"{piece.source}/{piece.document}"
            if name not in known:
                ((source, number),) = tracer.find(name)
                assert tracer.document_id(source, number) == piece.document
                known[name] = (tracer.places(source, number), tracer.text(source, number))
            places, text = known[name]
            assert (origin.window, chunk, position) in [(p.window, p.chunk, p.position) for p in places]
            if text is not None:
                assert text == texts[name]
            if not tracer._rearranged(origin):  # bytes of a character that a window cuts are not text
                assert piece.text.strip("\ufffd") in texts[name]
    assert len(known) > 100
    assert sum(text is not None for _, text in known.values()) > 20


def test_origins_of_many_samples_are_those_of_each(tracer):
    chunk = len(tracer.manifest.chunk_files) - 1
    asked = list(range(tracer.manifest.chunk_files[chunk].samples))[::-7]
    assert tracer.origins(chunk, asked) == [tracer.origin(chunk, p) for p in asked]


def test_pieces_are_the_documents_own_tokens(tracer, texts):
    tokenizer = load(tracer.data.tokenizer_file)
    for chunk, position in positions(tracer, 200):
        if tracer._rearranged(tracer.origin(chunk, position)):
            continue
        tokens = tracer.data.sample(chunk, position).tokens.tolist()
        for piece in tracer.pieces(chunk, position):
            begin = [1] if piece.source == "code" and tracer.manifest.layout == "mixture" else []
            own = [*begin, *tokenizer.encode(texts[f"{piece.source}/{piece.document}"]), 2]
            assert tokens[slice(*piece.tokens)] == own[piece.skip :][: piece.tokens[1] - piece.tokens[0]]


def test_every_window_of_every_document_has_its_places(tracer):
    """Places and origins are inverse: counted over all documents, every sample is reached as often as it has some."""
    reached = {}
    for source in tracer.manifest.sources:
        for number in range(source.documents):
            for place in tracer.places(source.name, number):
                if place.chunk is None:
                    assert place.why.split(":")[0] in ("validation", "unused", "tail")
                else:
                    reached[place.chunk, place.position] = reached.get((place.chunk, place.position), 0) + 1
    for chunk, file in enumerate(tracer.manifest.chunk_files):
        for position in range(file.samples):
            origin = tracer.origin(chunk, position)
            index = DocumentIndex(tracer.data.directory, origin.source)
            start = origin.window * (tracer.manifest.sequence_length + 1 - tracer.manifest.overlap)
            assert reached.pop((chunk, position)) == len(
                index.spans(start, start + tracer.manifest.sequence_length + 1)
            )
    assert not reached


def test_unknown_documents_are_refused(tracer):
    with pytest.raises(UserError, match=r"no document 'prose/x'; ids look like 'code/00\.py'"):
        tracer.find("prose/x")


def test_texts_are_found_where_they_stand(prepared, texts):
    """Every text of a few documents that training reads, within a window or across a border, and no other."""
    tracer = Tracer(ChunkedData(prepared))
    rng = random.Random(1)
    across = 0
    for name in rng.sample(sorted(texts), 20):
        words = texts[name].split(" ")
        if len(words) < 8:
            continue
        start = rng.randrange(len(words) - 7)
        text = " ".join(words[start : start + 6])
        if not any(words[start + i] and words[start + i - 1] for i in range(1, 5)):
            continue
        ((source, number),) = tracer.find(name)
        in_training = {(p.chunk, p.position) for p in tracer.places(source, number) if p.chunk is not None}
        hits = list(tracer.search(text))
        assert all(any(text in texts[f"{p.source}/{p.document}"] for p in pieces) for _, _, pieces in hits)
        mine = [(c, p) for c, p, pieces in hits if any(f"{x.source}/{x.document}" == name for x in pieces)]
        assert set(mine) <= in_training
        places = tracer.places(source, number)
        if all(p.chunk is not None for p in places):
            assert mine, (name, text)
            across += any(all(text not in x.text for x in pieces) for _, _, pieces in hits)
    assert across


def test_words_whose_tokens_do_not_depend_on_their_surroundings():
    assert _inner_words("a b c") == ("a", "b", " c")
    assert _inner_words("a  b c d e") == ("a  b", "c d", " e")  # b's space may be part of a longer piece
    assert _inner_words("a b\n  c d") == ("a", "b\n  c", " d")
    for text in ("", "a", "a b", "a  b c"):
        with pytest.raises(UserError, match="give at least three words"):
            _inner_words(text)


def test_rearranged_samples_show_their_text_in_order(crystal, texts):
    tracer, seen = Tracer(ChunkedData(crystal)), 0
    for chunk, position in positions(tracer, 1500):
        if tracer._rearranged(tracer.origin(chunk, position)):
            whole = [p for p in tracer.pieces(chunk, position) if p.text][:-1]  # the last may be cut
            for piece in whole:
                seen += 1
                # In one of the two orders a space stands where the middle begins (`fim.reassemble`).
                shown, text = (
                    "".join(t.strip("\ufffd").split()) for t in (piece.text, texts[f"{piece.source}/{piece.document}"])
                )
                assert shown in text
    assert seen > 15


@pytest.mark.parametrize("original", [False, True])
def test_rearranged_samples_name_the_document_they_show(tmp_path, original):
    """Of short documents, some of whose windows begin with a lone `</s>`: neither texts nor hits are another's."""
    (tmp_path / "code").mkdir()
    texts = {f"{i:03}.py": code(i, 1 + i % 6) for i in range(200)}
    for name, text in texts.items():
        (tmp_path / "code" / name).write_text(text)
    part = Part("code", 1.0, epochs=3, fim_rate=0.9, shuffle=True)
    config = PrepareConfig(
        recipe="r", out=tmp_path / "set", sources=(SourceSpec("code", str(tmp_path / "code"), bos=True),), overlap=1,
        sequence_length=32, vocab_size=400, validation_per_source=2, seed=1, layout="mixture", original=original,
        phases=(PhasePlan((part,), chunks=2),),
    )  # fmt: skip
    prepare(config, log=lambda line: None)
    tracer, shown, alone, hits = Tracer(ChunkedData(config.out)), 0, 0, 0
    for chunk, position in positions(tracer, 250):
        pieces = tracer.pieces(chunk, position)
        alone += pieces[0].tokens == (0, 1)
        for piece in [p for p in pieces if p.text][:-1]:  # the last may be cut
            text = "".join(piece.text.replace("\ufffd", "").split())
            if "<" not in text:  # the originals cut `<s>` like text
                assert text in "".join(texts[piece.document].split())
                shown += 1
    queries = {" ".join(t.split(" ")[-4:-1]) for t in texts.values() if len(t.split(" ")) > 8}
    for query in sorted(q for q in queries if all(q.split(" ")))[:4]:
        for _, _, pieces in tracer.search(query):
            assert [query in texts[p.document] for p in pieces] == [True]
            hits += 1
    assert shown > 50
    assert alone > 2
    assert hits > 3


def test_schedules_and_samples_are_inverse():
    amber = (PhaseSamples(0, 4 * 23, 23, carry=False),)
    crystal = (PhaseSamples(0, 23, 10, carry=True), PhaseSamples(3, 37, 10, carry=True))
    for phases, steps, unread in [(amber, (10, 6), 4 * 3), (amber, (15,), 4 * 3 + 5), (crystal, (4, 7), 5)]:
        schedule = Schedule(phases, steps, 5)
        read = {}
        for step in range(schedule.steps):
            for row in range(5):
                at = schedule.place(step, row)
                assert schedule.reader(*at) == (step, row)
                read[at] = (step, row)
        everything = [
            (c, p)
            for f in phases
            for c in range(f.first_chunk, f.first_chunk + f.chunks)
            for p in range(f.chunk_samples(c))
        ]
        assert len(read) == 5 * schedule.steps
        missing = [at for at in everything if schedule.reader(*at) is None]
        assert set(missing) == set(everything) - set(read)
        assert len(missing) == unread
    with pytest.raises(UserError, match="phase 1 has 7 steps of 5 samples, and the run's 8"):
        Schedule(crystal, (4, 8), 5)
    with pytest.raises(UserError, match="prepared for 2 phases, and the run has 3"):
        Schedule(crystal, (4, 3, 3), 5)


def test_a_tokenizer_of_real_pieces_and_long_documents(tmp_path):
    """Long documents span many windows: offsets, borders and characters of several bytes hold there too."""
    (tmp_path / "texts").mkdir()
    for i in range(3):
        (tmp_path / "texts" / f"{i}.txt").write_text("".join(f"zeile {i} {n} äöü ☃ 漢字 " for n in range(400)) + "🜚")
    config = PrepareConfig(
        recipe="r", out=tmp_path / "set", sources=(SourceSpec("t", str(tmp_path / "texts")),), sequence_length=31,
        vocab_size=300, validation_per_source=3, seed=1, chunks=3,
    )  # fmt: skip
    prepare(config, log=lambda line: None)
    tracer = Tracer(ChunkedData(config.out))
    texts = [tracer.text("t", n) for n in range(3)]
    assert texts[:2] == [(tmp_path / "texts" / f"{i}.txt").read_text() for i in range(2)]
    assert texts[2] is None  # its end is in the tail of the stream, which is in no sample
    pieces = [p for c, s in positions(tracer, 50) for p in tracer.pieces(c, s)]
    assert all(np.diff(p.tokens) == 32 for p in pieces if p.skip > 40 and p.document != "2.txt" and len(p.text) > 60)
    assert DataManifest.load(config.out).sources[0].unknown > 0
