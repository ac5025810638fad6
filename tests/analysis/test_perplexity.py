"""Perplexity: equal to a plain loop over the logits, each token once, whatever its row's company; bytes; bad input."""

import dataclasses
import json
import math
from itertools import pairwise

import jax
import numpy as np
import pytest
from flax import nnx

from analysis import results
from analysis.perplexity import Perplexity, _forced, figures, token_bytes, windows
from analysis.subject import Subject, Target
from analysis.sweep import sweep
from checkpoint.series import Series
from data.tokenizer import files_in, load, train_tokenizer
from data.trace import text_of
from errors import UserError
from inference.forward import forward
from layers import params
from models import families
from training.datasets import open_data
from training.metrics import read_lines

TEXTS = ["alpha beta", "π ≈ 3.14159\n  — naïve 日本 " * 4, "0 1 def", "x", "gamma return def " * 12]


@pytest.fixture(scope="module")
def texts(trained):
    """A folder and a file of texts beside the run."""
    (trained / "texts").mkdir()
    for n, text in enumerate(TEXTS):
        (trained / "texts" / f"{n}.txt").write_text(text)
    (trained / "lines.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    return trained


def target(trained, selector="all", run="run", **where):
    return Target(f"{trained / run}@{selector}", families(), open_data, **where)


@pytest.fixture(scope="module")
def swept(texts):
    asked = Perplexity(text=(f"few={texts / 'texts'}", f"lines={texts / 'lines.jsonl'}"), window=16, stride=6)
    t = target(texts)
    outcome = sweep(t, asked.open(t, print), print)
    assert len(outcome.made) == 3
    return texts


def surprise(t, weights, tokens):
    """-log p of each token after the first in float64, from the whole row's logits; width always 32: one program."""
    row = np.zeros((1, 32), np.int32)
    row[0, : len(tokens) - 1] = tokens[:-1]
    logits = forward(t.model, weights, row, t.mesh, t.region)["logits"][0, : len(tokens) - 1].astype(np.float64)
    highest = logits.max(axis=-1)
    total = np.log(np.exp(logits - highest[:, None]).sum(axis=-1)) + highest
    return total - logits[np.arange(len(tokens) - 1), tokens[1:]]


def plain(t, weights, text, window, stride):
    """Nats of a text by a loop over windows, token by token."""
    tokens = [t.tokenizer.eos_id, *t.tokenizer.encode(text)]
    nats, scored = [], 1
    while scored < len(tokens):
        stop = min(len(tokens), window + 1 if scored == 1 else scored + stride)
        found = surprise(t, weights, tokens[max(0, stop - 1 - window) : stop])
        nats += found[len(found) - (stop - scored) :].tolist()
        scored = stop
    assert len(nats) == len(tokens) - 1
    return sum(nats), len(nats)


def test_texts_equal_a_plain_loop(swept):
    """Texts shorter and longer than the window; documents in a folder and in JSON Lines."""
    t = target(swept)
    for result in results.of_kind(swept / "run", "perplexity")[::2]:
        weights = t.load(Series(t.run).resolve(result.checkpoint["name"])[0])
        expected = np.array([plain(t, weights, text, 16, 6) for text in TEXTS])
        table = result.table("documents").to_pylist()
        nats, tokens = expected.T
        assert (tokens < 16).any() and (tokens > 40).any()  # noqa: PT018
        for source in ("few", "lines"):
            rows = [r for r in table if r["group"] == "text" and r["source"] == source]
            np.testing.assert_allclose([r["nats"] for r in rows], nats, rtol=1e-5)
            np.testing.assert_array_equal([r["tokens"] for r in rows], tokens)
            assert [r["bytes"] for r in rows] == [len(text.encode()) for text in TEXTS]
            found = result.summary["text"]["by_source"][source]
            np.testing.assert_allclose(found["loss"]["value"], nats.sum() / tokens.sum(), rtol=1e-5)
            np.testing.assert_allclose(found["perplexity"]["value"], np.exp(nats.sum() / tokens.sum()), rtol=1e-4)
            np.testing.assert_allclose(found["document_perplexity"]["value"], np.exp(nats / tokens).mean(), rtol=1e-4)
            bits = nats.sum() / math.log(2) / sum(len(text.encode()) for text in TEXTS)
            np.testing.assert_allclose(found["bits_per_byte"]["value"], bits, rtol=1e-5)
        assert result.summary["text"]["documents"] == 10


def test_validation_is_that_of_training(swept):
    """The last checkpoint's losses by source are those that training logged; bytes are those of the text."""
    t = target(swept)
    logged = [r for r in read_lines(t.run / "metrics.jsonl") if r["kind"] == "validation"][-1]
    last = results.of_kind(t.run, "perplexity")[-1]
    found = last.summary["validation"]["by_source"]
    assert set(found) == {"prose", "code"}
    for name, values in found.items():
        assert values["documents"] == values["loss"]["n"] == 4
        assert values["tokens"] == 4 * 32
        assert any(np.isclose(values["loss"]["value"], v, rtol=1e-4) for k, v in _flat(logged) if name in k), logged
        rows = [r for r in last.table("documents").to_pylist() if r["source"] == name]
        windows_ = t.data.validation(name)
        for row, inputs, targets in zip(rows, windows_.inputs, windows_.targets):
            ends = np.flatnonzero(inputs == t.tokenizer.eos_id)  # the next document begins after each
            edges = [0, *ends, len(targets)]
            parts = [targets[i:j] for i, j in pairwise(edges)]
            texts = [text_of(part, t.tokenizer, begins=n > 0) for n, part in enumerate(parts)]
            # The window may cut a character, whose bytes are shown as U+FFFD, of three bytes each.
            assert abs(row["bytes"] - sum(len(text.encode()) for text in texts)) <= 4


def _flat(value, prefix=""):
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}/")
        elif isinstance(inner, (int, float)):
            yield f"{prefix}{key}", inner


def test_bytes_of_tokens_add_up_to_the_text(trained):
    tokenizer = target(trained).tokenizer
    sizes = token_bytes(tokenizer, 300)
    for text in [*TEXTS, " two  spaces ", "\n", "日"]:
        ids = tokenizer.encode(text)
        assert sizes[1, ids[0]] + sizes[0, ids[1:]].sum() == len(text.encode()), text
    assert not sizes[:, list(tokenizer.special.values())].any()


def test_of_a_model_that_knows_nothing_every_token_costs_ln_v(texts):
    t = target(texts)
    values = nnx.to_pure_dict(nnx.split(t.model.build(jax.random.key(0)))[1])
    zero = jax.tree_util.tree_map_with_path(lambda p, w: w * 0 if str(p[0].key) == "head" else w, values)
    weights = jax.device_put(zero, params.shardings(t.model.abstract, t.mesh))
    entry = Series(t.run).resolve("001")[0]
    (study,) = Perplexity(text=(f"few={texts / 'texts'}",)).open(t, print)
    summary = study.score(Subject(t, entry, weights)).summary
    for group in ("text", "validation"):
        found = summary[group]
        np.testing.assert_allclose(found["loss"]["value"], math.log(300), rtol=1e-6)
        np.testing.assert_allclose(found["perplexity"]["value"], 300, rtol=1e-5)
        np.testing.assert_allclose(found["document_perplexity"]["value"], 300, rtol=1e-5)
        np.testing.assert_allclose(found["document_perplexity"]["stderr"], 0, atol=1e-3)
        np.testing.assert_allclose(
            found["bits_per_byte"]["value"], found["tokens"] * math.log2(300) / found["bytes"], rtol=1e-6
        )


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (11, 4, 4), (23, 8, 3), (9, 8, 1)]
)
def test_every_token_counts_once_with_its_context(count, window, stride):
    tokens = list(range(10, 10 + count))
    counted, context = [], {}
    for row in windows(tokens, 2, window, stride):
        assert len(row.tokens) - 1 == len(row.weights) <= window
        for i in np.flatnonzero(row.weights):
            counted.append(int(row.tokens[i + 1]))
            context[counted[-1]] = i + 1
        assert row.tokens.tolist() == [2, *tokens][(at := ([2, *tokens].index(row.tokens[0]))) : at + len(row.tokens)]
    assert counted == tokens
    for n, token in enumerate(tokens):
        assert context[token] >= min(n + 1, window - stride + 1)


def test_standard_errors_are_those_of_documents_drawn(trained):
    """Of the same size: the mean's. Of several sizes: as good as a bootstrap over documents."""
    rng = np.random.default_rng(0)
    per_token, same = rng.normal(3, 0.5, 400), np.full(400, 20.0)
    found = figures(per_token * same, same, same * 4)
    np.testing.assert_allclose(found["loss"]["stderr"], per_token.std(ddof=1) / 20, rtol=1e-9)
    np.testing.assert_allclose(found["perplexity"]["stderr"], found["loss"]["stderr"] * found["perplexity"]["value"])
    np.testing.assert_allclose(found["document_perplexity"]["stderr"], np.exp(per_token).std(ddof=1) / 20)
    sizes = rng.integers(5, 200, 400).astype(float)
    nats = per_token * sizes
    draws = rng.integers(400, size=(4000, 400))
    bootstrap = (nats[draws].sum(axis=1) / sizes[draws].sum(axis=1)).std()
    np.testing.assert_allclose(figures(nats, sizes, sizes)["loss"]["stderr"], bootstrap, rtol=0.05)
    one = figures(np.array([800.0]), np.array([1.0]), np.array([np.nan]))
    assert one["loss"] == {"value": 800.0, "stderr": None, "n": 1}
    assert one["perplexity"]["value"] is one["bits_per_byte"]["value"] is one["bytes"] is None
    json.dumps(one, allow_nan=False)


def test_targets_that_do_not_follow_are_scored_after_what_was_read():
    inputs, targets = np.array([1, 5, 6, 7], np.int32), np.array([5, 9, 7, 8], np.int32)
    rows = _forced(inputs, targets, np.array([1, 1, 0, 1], np.float32))
    assert [(r.tokens.tolist(), r.weights.tolist()) for r in rows] == [
        ([1, 5, 6, 7, 8], [1, 0, 0, 1]),
        ([1, 5, 9], [0, 1]),
    ]


def original_figure(nats, batch):
    """The figure of LLM360's first script (fact sheet 7.2): ``loss * sequence_length`` summed over batches, without the
    batch size, over the number of real tokens. Of texts of one length, where padding plays no part.

    Args:
        nats: [texts, tokens - 1] of every token but the first.
        batch: texts in a batch.
    """
    length = nats.shape[1] + 1
    total = sum(nats[i : i + batch].mean() * length for i in range(0, len(nats), batch))
    return math.exp(total / (len(nats) * length))


def test_the_original_figure_is_half_as_surprised(trained):
    t = target(trained)
    entry = Series(t.run).resolve("001")[0]
    rows = np.random.default_rng(0).integers(3, 300, (8, 20))
    nats = -np.stack([f.logprobs for f in Subject(t, entry, t.load(entry)).score(rows)])
    true = figures(nats.sum(axis=1).astype(float), np.full(8, 19.0), np.full(8, np.nan))["perplexity"]["value"]
    np.testing.assert_allclose(original_figure(nats, batch=1), true, rtol=1e-5)
    np.testing.assert_allclose(original_figure(nats, batch=2), math.sqrt(true), rtol=1e-5)


def test_limits_choose_documents(texts):
    t = target(texts)
    (study,) = Perplexity(text=(f"few={texts / 'texts'}",), documents=2).open(t, print)
    assert {name: len(found) for name, found in study.groups.items()} == {"validation": 4, "text": 2}
    (other,) = Perplexity(text=(f"few={texts / 'texts'}",), validation=False, documents=0).open(t, print)
    assert {name: len(found) for name, found in other.groups.items()} == {"text": 5}
    assert study.settings()["tokens"] != other.settings()["tokens"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"documents": -1}, "documents=-1 must be at least 0"),
        ({"validation": False}, "nothing to read; give --text NAME=PATH"),
        ({"text": ("a=x", "a=y")}, "--text has the name a twice"),
        ({"text": ("x",)}, "write NAME=PATH"),
        ({"text": ("a=/no/such",)}, "/no/such does not exist"),
        ({"window": 33}, "--window 33 exceeds the model's context of 32"),
        ({"window": 8, "stride": 9}, "--stride 9 exceeds the window of 8"),
    ],
)
def test_settings_that_cannot_be(trained, settings, message):
    with pytest.raises(UserError, match=message):
        Perplexity(**settings).open(target(trained), print)


def test_empty_text_and_foreign_tokenizers_are_refused(trained, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=r"source a: no documents in .*1 empty"):
        Perplexity(text=(f"a={tmp_path / 'empty.txt'}",)).open(target(trained), print)
    train_tokenizer(TEXTS * 9, 290, tmp_path / "other.model")
    for other, size, message in (
        (tmp_path / "other.model", 300, "is not the tokenizer that made"),
        (trained / "data" / "tokenizer.model", 900, "300 ids, and the model a vocabulary of 900"),
    ):
        t = target(trained, tokenizer=other)
        t.model = dataclasses.replace(t.model, vocab_size=size)
        with pytest.raises(UserError, match=message):
            Perplexity().open(t, print)
    assert load(tmp_path / "other.model").vocab_size == 290
    t = target(trained)
    t.model = dataclasses.replace(t.model, context_length=16)
    with pytest.raises(UserError, match="its windows of 32 tokens"):
        Perplexity().open(t, print)


def test_a_run_without_validation_says_what_else_there_is(trained, tmp_path):
    (tmp_path / "config.json").write_text((trained / "run" / "config.json").read_text())
    with pytest.raises(UserError, match="give --no-validation and --text"):
        Perplexity().open(target(tmp_path, run="."), print)


def test_an_imported_series_with_data(trained, tmp_path):
    """It has a ledger, too, and its config may have a model alone; its data is what is given."""
    config = json.loads((trained / "run" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model": config["model"]}))
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"event": "import", "index": 0, "source": "hf"}) + "\n")
    for file in files_in(trained / "run"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="was not trained here, so that its data is not known; give --data; give --no"):
        Perplexity().open(target(tmp_path, run="."), print)
    (study,) = Perplexity().open(target(tmp_path, run=".", data=trained / "data"), print)
    assert [d.source for d in study.groups["validation"]] == ["prose"] * 4 + ["code"] * 4
    (own,) = Perplexity().open(target(trained), print)
    assert study.settings() == own.settings()
