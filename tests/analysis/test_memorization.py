"""Memorization: equal to greedy generation sequence by sequence, on run's chunks and on published rows; its history."""

import dataclasses
import json
import random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pytest
from flax import nnx

import run as cli
from analysis import results
from analysis.history import History, correlations, story, story_lines
from analysis.memorization import Memorization, match, matches_of
from analysis.results import Scored
from analysis.subject import Subject, Target
from analysis.sweep import sweep
from checkpoint.series import Series
from crystal_jax.recipes import crystal_tiny
from data.tokenizer import files_in
from errors import RunError, UserError
from inference.forward import forward
from layers import params
from models import families
from parallel import axes
from training.datasets import open_data
from training.metrics import read_lines

K = L = 8
ASKED = Memorization(prompt=K, continuation=L, sequences=12)
EOS = 2


def target(trained, selector="all", run="run", **where):
    return Target(f"{trained / run}@{selector}", families(), open_data, **where)


@pytest.fixture(scope="module")
def swept(trained):
    """With results of both chunks."""
    outcome = sweep(target(trained), ASKED.open(target(trained), print), print)
    assert len(outcome.made) == 3
    return trained


def literal(target, weights, prompt, count):
    """Greedy generation of one sequence, a whole forward pass for every token."""
    row = np.zeros((1, K + L), np.int32)
    row[0, : len(prompt)] = prompt
    for n in range(len(prompt), len(prompt) + count):
        row[0, n] = forward(target.model, weights, row, target.mesh, target.region)["logits"][0, n - 1].argmax()
    return row[0, len(prompt) :].tolist()


def copied(target, tokens):
    """Weights that were trained on these rows until they are known by heart."""
    graphdef, region = target.model.graphdef(), dataclasses.replace(target.region, sequence_sharded=False)
    weights = _random(target)
    specs, rows = (
        params.specs(params.shardings(target.model.abstract, target.mesh)),
        axes.spec(target.mesh, "batch", "position"),
    )

    def body(weights, tokens, targets):
        net = region.prepare(nnx.merge(graphdef, weights))
        x, _ = net.hidden(tokens, region, reach=region.reach(tokens))
        return net.scores(x, targets, region)

    mapped = jax.shard_map(body, mesh=target.mesh, in_specs=(specs, rows, rows), out_specs=(rows, rows), check_vma=True)
    inputs, targets = (
        jax.device_put(t, axes.sharding(target.mesh, "batch", "position")) for t in (tokens[:, :-1], tokens[:, 1:])
    )
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(weights, state):
        def loss(w):
            logprobs, said = mapped(w, inputs, targets)
            return -jnp.mean(logprobs), jnp.all((said == targets)[:, K - 1 :])

        gradients, known = jax.grad(loss, has_aux=True)(weights)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(weights, updates), state, known

    state = jax.jit(optimizer.init)(weights)
    for n in range(2000):
        before, (weights, state, known) = weights, step(weights, state)
        if n >= 250 and known:
            return before
    raise AssertionError("not known by heart after 2000 steps")


def _random(target):
    values = nnx.to_pure_dict(nnx.split(target.model.build(jax.random.key(0)))[1])
    return jax.device_put(values, params.shardings(target.model.abstract, target.mesh))


def _ending(target, weights):
    """The weights with the token that the model says most often renamed to `</s>`."""
    said = literal(target, weights, range(5, 5 + K), L)
    often = max(set(said), key=said.count)
    order = np.arange(target.model.vocab_size)
    order[[EOS, often]] = often, EOS
    size = target.model.vocab_size
    return jax.tree.map(lambda w: jnp.take(w, order, axis=w.shape.index(size)) if size in w.shape else w, weights)


def crystal(tmp_path):
    model = dataclasses.replace(
        crystal_tiny().model, vocab_size=64, context_length=32, num_layers=2, embed=32, num_heads=4, head_dim=8,
        rotary_dims=4, mlp=48,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"model": {"family": "crystal", **dataclasses.asdict(model)}}))
    return tmp_path


@pytest.mark.parametrize("kind", ["amber", "crystal", "trained", "ends"])
def test_equals_greedy_generation_of_each_sequence(trained, tmp_path, kind):
    """Continuations are the model's own, spoilt nowhere, at one place, or everywhere."""
    t = target(crystal(tmp_path), run=".") if kind == "crystal" else target(trained)
    weights = t.load(Series(t.run).resolve("001")[0]) if kind == "trained" else _random(t)
    weights = _ending(t, weights) if kind == "ends" else weights
    rng = np.random.default_rng(1)
    tokens, own = rng.integers(3, t.model.vocab_size, (12, K + L), dtype=np.int32), []
    if kind == "ends":
        tokens[0, :K] = range(5, 5 + K)
    for n, row in enumerate(tokens):
        new = literal(t, weights, row[:K], L)
        own.append(new)
        if n != 11:
            row[K:] = new
        if 3 <= n < 11:
            row[K + n - 3] = (row[K + n - 3] + 1) % t.model.vocab_size
    expected = np.array(own) == tokens[:, K:]
    assert expected[:3].all()
    assert not expected[3:].all(axis=1).any()
    assert kind != "ends" or (np.array(own) == EOS).any()
    matches, logprobs, ties = match(Subject(t, None, weights), tokens, K)
    np.testing.assert_array_equal(matches, expected)
    assert ties == 0
    forced = Subject(t, None, weights).score(tokens)
    np.testing.assert_allclose(logprobs, [f.logprobs[K - 1 :].sum() for f in forced], rtol=1e-5)


def test_is_the_same_on_a_mesh_and_in_other_batches(trained):
    entry = Series(trained / "run").resolve("001")[0]
    tokens = np.concatenate([ASKED.open(target(trained), print)[0].grid.read(c).tokens for c in (0, 1)])
    found = []
    for mesh, part in (("data=2,tensor=2", 24), ("data=1", 5)):
        t = target(trained, mesh=mesh)
        subject = Subject(t, entry, t.load(entry))
        found.append(np.concatenate([match(subject, tokens[i : i + part], K)[0] for i in range(0, 24, part)]))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_model_that_copied_a_chunk_scores_one_there(trained):
    t = target(trained)
    study = dataclasses.replace(ASKED, chunks="0").open(t, print)[0]
    weights = copied(t, study.grid.read(0).tokens)
    entry = Series(t.run).resolve("000")[0]
    summary = study.score(Subject(t, entry, weights)).summary
    assert (summary["score"]["value"], summary["extractable"]["value"]) == (1.0, 1.0)
    assert summary["histogram"] == [0] * L + [12]
    assert summary["by_chunk"]["chunk"] == [0]
    other = dataclasses.replace(ASKED, chunks="1").open(t, print)[0].score(Subject(t, entry, weights)).summary
    assert other["extractable"]["value"] < 1
    assert other["unseen"]["score"] == other["score"]
    assert other["seen"]["score"] == {"value": None, "stderr": None, "n": 0}


def test_results_hold_every_sequence(swept):
    found = results.of_kind(swept / "run", "memorization")
    assert [r.summary["latest_chunk"] for r in found] == [None, 0, 1]
    assert [r.summary["seen"]["score"]["n"] for r in found] == [0, 12, 24]
    data = target(swept).data
    first = found[0].table("sequences")
    for r in found:
        table, s = r.table("sequences"), r.summary
        assert table.select(["chunk", "position", "source"]).equals(first.select(["chunk", "position", "source"]))
        matched, matches = table["matched"].to_numpy(), matches_of(table, L)
        np.testing.assert_array_equal(matches.sum(axis=1), matched)
        np.testing.assert_array_equal(matches.all(axis=1), table["extractable"].to_numpy())
        for row, at in zip(matches, table["first_mismatch"].to_pylist()):
            assert row[:at].all()
            assert at == L or not row[at]
        assert s["histogram"] == np.bincount(matched, minlength=L + 1).tolist()
        np.testing.assert_allclose(s["score"]["value"], matched.mean() / L)
        np.testing.assert_allclose(s["score"]["stderr"], (matched / L).std(ddof=1) / np.sqrt(24))
        np.testing.assert_allclose(s["by_chunk"]["score"], [matched[:12].mean() / L, matched[12:].mean() / L])
        assert sum(v["score"]["n"] for v in s["by_source"].values()) == s["score"]["n"] == 24
    tracer = target(swept).tracer.tracer
    for chunk, position, source in zip(*(first[c].to_pylist() for c in ("chunk", "position", "source"))):
        assert tracer.origin(chunk, position).source == source
        assert position < data.phases[0].samples_per_chunk


def test_seen_and_slices_choose_chunks(trained):
    t = target(trained)
    study = dataclasses.replace(ASKED, chunks="seen", sequences=3).open(t, print)[0]
    for name, chunks in (("init", []), ("000", [0]), ("001", [0, 1])):
        entry = Series(t.run).resolve(name)[0]
        scored = study.score(Subject(t, entry, t.load(entry)))
        assert scored.summary["by_chunk"]["chunk"] == chunks
        assert scored.tables["sequences"].num_rows == 3 * len(chunks)
        json.dumps(scored.summary, allow_nan=False)
    for text, chunks in (("1", [1]), ("::-1", [0, 1]), ("0:1", [0]), ("-1:", [1]), ("all", [0, 1])):
        assert dataclasses.replace(ASKED, chunks=text).open(t, print)[0].grid.chunks == chunks
    imported = dataclasses.replace(entry.manifest, origin={"format": "huggingface"}, chunk=None)
    with pytest.raises(RunError, match="without its place in the training data"):
        study.score(Subject(t, dataclasses.replace(entry, manifest=imported), None))


def remixed(trained, folder, step):
    """The run without its checkpoints, whose ledger says that it read other shares, and that a step was skipped."""
    (folder / "run").mkdir()
    for name in ("config.json", *(p.name for p in files_in(trained / "run"))):
        (folder / "run" / name).write_bytes((trained / "run" / name).read_bytes())
    mixture = [["prose", 0.9], ["code", 0.1]]
    events = [e | {"mixture": mixture} if e.get("data") else e for e in read_lines(trained / "run" / "ledger.jsonl")]
    events.append({"event": "skip", "step": step, "until": step + 1})
    (folder / "run" / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))


def test_seen_is_what_a_step_read_wherever_the_run_has_it(trained, tmp_path):
    remixed(trained, tmp_path, 1)
    t = target(tmp_path)
    mixed, schedule = t.tracer.mixed, t.tracer.schedule
    steps: dict[tuple[int, int], list[int]] = {}  # by the sample of the data set, found place by place
    for step in range(schedule.steps):
        for row in range(8):
            steps.setdefault(mixed.origin(*schedule.place(step, row)), []).append(step)
    grid = dataclasses.replace(ASKED, sequences=1000).open(t, print)[0].grid
    entries = Series(trained / "run").entries()
    other = again = 0
    for entry in entries:
        for chunk in grid.chunks:
            positions = grid.read(chunk).positions
            read = [[s for s in steps.get(mixed.origin(chunk, int(p)), ()) if s != 1] for p in positions]
            expected = [bool(s) and s[0] < entry.manifest.step for s in read]
            assert grid.seen(chunk, entry.manifest).tolist() == expected
            other += sum(e != (entry.manifest.chunk is not None and chunk <= entry.manifest.chunk) for e in expected)
            again += sum(len(set(s)) > 1 for s in read)
    assert other, "by the chunk's number it would be the same: nothing is tested"
    assert again
    # Scored are those sequences, and no others; a story has all steps.
    entry = entries[1]
    subject = Subject(t, entry, target(trained).load(entry))
    study = dataclasses.replace(ASKED, chunks="seen", sequences=1000).open(t, print)[0]
    scored = study.score(subject)
    table = scored.tables["sequences"]
    assert table["seen"].to_pylist() == [True] * table.num_rows
    count = sum(int(grid.seen(c, entry.manifest).sum()) for c in grid.chunks)
    assert scored.summary["seen"]["score"]["n"] == table.num_rows == count > 0
    assert scored.summary["unseen"]["score"]["n"] == 0
    results.write(t.run, "memorization", entry, study.settings(), scored, "", 0)
    chunk, position, read = next(
        (c, p, s)
        for c, p in zip(table["chunk"].to_pylist(), table["position"].to_pylist())
        if len(s := sorted({s for s in steps[mixed.origin(c, p)] if s != 1})) > 1
    )
    told = story(t, chunk, position)
    assert (told["step"], told["steps"]) == (read[0], read)
    assert f"step {read[0]} row {told['row']}, again at {read[1]}" in story_lines(told)[0]


def test_a_step_that_was_skipped_read_nothing(trained, tmp_path):
    remixed(trained, tmp_path, 0)
    events = [e | {"mixture": None} for e in read_lines(tmp_path / "run" / "ledger.jsonl")]
    (tmp_path / "run" / "ledger.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    run, t = planned(trained, [[1, 8, 2, None]] * 3), target(tmp_path)
    told = story(t, 0, 0, history=History(run, "memorization-planned"))
    assert (told["step"], told["steps"], told["first_checkpoint"]) == (None, [], None)
    assert told["documents"]
    assert target(trained).readers(0, 0) == [(0, 0)]


@pytest.fixture(scope="module")
def imported(trained):
    """A series of one checkpoint that came from a Hugging Face folder, of no known recipe and place."""
    folder = trained / "hf"
    assert cli.main(["export", f"{trained / 'run'}@001", "--out", str(folder), "--no-transformers"]) == 0
    assert cli.main(["import", str(folder), "--run", str(trained / "imported"), "--no-transformers"]) == 0
    assert (trained / "imported" / "ledger.jsonl").exists()
    return trained


def test_an_imported_series_with_data(imported):
    with pytest.raises(UserError, match="imported: was not trained here, so that its data is not known; give --data"):
        ASKED.open(target(imported, run="imported"), print)
    t = target(imported, run="imported", data=imported / "data")
    (entry,) = t.series.entries()
    subject = Subject(t, entry, t.load(entry))
    study = ASKED.open(t, print)[0]
    scored = study.score(subject)
    nothing = {"value": None, "stderr": None, "n": 0}
    assert scored.summary["score"]["n"] == 24
    assert scored.summary["seen"] == scored.summary["unseen"] == {"score": nothing, "extractable": nothing}
    assert scored.tables["sequences"]["seen"].null_count == 24
    with pytest.raises(RunError, match="without its place in the training data"):
        dataclasses.replace(ASKED, chunks="seen").open(t, print)[0].score(subject)
    # With its place, by chunk; the beginning of training has seen nothing.
    placed = dataclasses.replace(entry, manifest=dataclasses.replace(entry.manifest, chunk=0))
    assert study.score(Subject(t, placed, subject.weights)).summary["seen"]["score"]["n"] == 12
    init = dataclasses.replace(entry, manifest=dataclasses.replace(entry.manifest, index=-1, name="init"))
    assert study.score(Subject(t, init, subject.weights)).summary["unseen"]["score"]["n"] == 24
    results.write(t.run, "memorization", entry, study.settings(), scored, "", 0)
    told = story(t, *History(t.run).keys[0].tolist())
    assert (told["step"], told["documents"]) == (None, [])
    with pytest.raises(UserError, match="imported: was not trained here, so that which step read what is not known"):
        _ = t.tracer


def test_published_files_need_a_recipe(imported, tmp_path):
    (tmp_path / "run").mkdir()
    rows = [json.dumps({"token_ids": row, "source": "a"}) for row in rows_of(imported, 0)]
    (tmp_path / "train_000.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(UserError, match="published files are read as a recipe says"):
        ASKED.open(target(imported, run="imported", data=tmp_path), print)
    for name in ("config.json", "ledger.jsonl"):  # of a known recipe
        source = imported / ("run" if name == "config.json" else "imported") / name
        (tmp_path / "run" / name).write_bytes(source.read_bytes())
    grid = ASKED.open(target(tmp_path, data=tmp_path), print)[0].grid
    assert grid.read(0).sources == ["a"] * 12


def rows_of(trained, chunk):
    data = target(trained).data
    return [data.sample(chunk, p).tokens.tolist() for p in range(data.phases[0].samples_per_chunk)]


def test_published_rows_of_both_forms(trained, tmp_path):
    """The sequences are those that LLM360's paper drew of raw rows; reduced ones give the same."""
    for folder in ("raw/train", "reduced"):
        (tmp_path / folder).mkdir(parents=True)
    for chunk in (0, 1):
        name, rows = f"train_{chunk:03}.jsonl", rows_of(trained, chunk)
        raw = [json.dumps({"token_ids": row, "source": f"s{n % 2}"}) for n, row in enumerate(rows)]
        (tmp_path / "raw/train" / name).write_text("\n".join(raw) + "\n")
        lines = list(range(len(rows)))
        random.seed(f"memorization score sample {chunk}")
        random.shuffle(lines)
        kept = [
            {"source": f"s{n % 2}", "prompt": rows[n][:K], "continuation": rows[n][K : K + L]}
            for n in sorted(lines[:12])
        ]
        (tmp_path / "reduced" / name).write_text("\n".join(map(json.dumps, kept)) + "\n")
    t = target(trained)
    entry = Series(t.run).resolve("001")[0]
    subject = Subject(t, entry, t.load(entry))
    scored = []
    for folder in ("raw", "reduced"):
        study = dataclasses.replace(ASKED, rows=tmp_path / folder).open(t, print)[0]
        assert study.grid.chunks == [0, 1]
        scored.append(study.score(subject))
    assert scored[0].summary == scored[1].summary
    assert scored[0].summary["score"]["n"] == 24
    assert set(scored[0].summary["by_source"]) == {"s0", "s1"}
    one = dataclasses.replace(ASKED, rows=tmp_path / "reduced/train_001.jsonl").open(t, print)[0]
    assert one.grid.chunks == [1]
    assert one.settings() != study.settings()


def test_rows_of_no_known_chunk_are_neither_seen_nor_unseen(trained, tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"prompt": [5] * K, "continuation": [6] * L}
    file.write_text(json.dumps(row) + "\n\n\n" + json.dumps(row) + "\n")
    t = target(trained)
    study = dataclasses.replace(ASKED, rows=file).open(t, print)[0]
    entry = Series(t.run).resolve("001")[0]
    scored = study.score(Subject(t, entry, t.load(entry)))
    assert [scored.summary[name]["score"]["n"] for name in ("seen", "unseen")] == [0, 0]
    assert scored.summary["score"]["n"] == 2
    assert scored.tables["sequences"]["position"].to_pylist() == [0, 3]
    assert Memorization(story="-1:3").story
    with pytest.raises(UserError, match=r"rows\.jsonl: --chunks seen needs the chunk's number in the file's name"):
        dataclasses.replace(ASKED, rows=file, chunks="seen").open(t, print)


GOOD = {"prompt": [5] * K, "continuation": [6] * L}


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ('{"text": "a"}', UserError, "its first line has 'text'; rows have 'token_ids'"),
        ("{}", UserError, "its first line has no fields"),
        ("", RunError, "train_000.jsonl:1: not JSON"),
        ("[1]", RunError, ":1: not a JSON object"),
        ('{"token_ids": 3}', RunError, ":1: field 'token_ids' is not a list"),
        ('{"token_ids": [1, 2], "source": "a"}', UserError, ":1: has 2 tokens, and 8 \\+ 8 are asked for"),
        (json.dumps({"token_ids": [300] * 33, "source": "a"}), RunError, "id 300 is outside the vocabulary of 300"),
        (json.dumps(GOOD | {"prompt": [1]}), UserError, ":1: has 9 tokens"),
        (json.dumps(GOOD) + "\n" + json.dumps(GOOD | {"prompt": [True] * K}), RunError, ":2: field 'prompt' is not"),
        (json.dumps(GOOD) + "\n\n \n" + json.dumps(GOOD | {"prompt": 1}), RunError, ":4: field 'prompt' is not"),
        (json.dumps(GOOD | {"continuation": [-1] * L}), RunError, "id -1 is outside the vocabulary of 300"),
    ],
)
def test_rows_that_are_none_are_named(trained, tmp_path, content, error, message):
    (tmp_path / "train_000.jsonl").write_text(content)
    with pytest.raises(error, match=message):
        dataclasses.replace(ASKED, rows=tmp_path).open(target(trained), print)


def test_folders_of_rows_that_are_none(trained, tmp_path):
    t = target(trained)
    with pytest.raises(UserError, match=r"no such file, or a folder without train_000\.jsonl"):
        dataclasses.replace(ASKED, rows=tmp_path / "none").open(t, print)
    (tmp_path / "folder" / "train_000.jsonl").mkdir(parents=True)
    with pytest.raises(RunError, match=r"train_000\.jsonl: cannot be read"):
        dataclasses.replace(ASKED, rows=tmp_path / "folder").open(t, print)
    for name in ("train_1.jsonl", "train_001.jsonl"):
        (tmp_path / name).write_text(json.dumps(GOOD))
    with pytest.raises(UserError, match="has the number of"):
        dataclasses.replace(ASKED, rows=tmp_path).open(t, print)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 0}, "prompt=0 must be at least 1"),
        ({"continuation": -1}, "continuation=-1"),
        ({"sequences": 0}, "sequences=0"),
        ({"follow": -1}, "follow=-1 must be at least 0"),
        ({"story": "3"}, "--story '3': write CHUNK:POSITION"),
        ({"chunks": "some"}, "--chunks 'some': write all, seen, a number, or a slice"),
        ({"chunks": "0:2:0"}, "a step of 0 chooses nothing"),
        ({"chunks": "7"}, "'7' chooses none; there are 0, 1"),
        ({"prompt": 30}, "30 \\+ 8 tokens exceed the model's context of 32"),
    ],
)
def test_settings_that_cannot_be(trained, settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ASKED, **settings).open(target(trained), print)


def test_data_that_does_not_fit_the_model(trained, tmp_path):
    t = target(crystal(tmp_path), run=".", data=trained / "data")
    with pytest.raises(UserError, match="vocabulary of 300, and the model one of 64"):
        ASKED.open(t, print)
    t = target(trained)
    t.model = dataclasses.replace(t.model, context_length=64)
    with pytest.raises(UserError, match="30 \\+ 8 tokens, and sequences have 33"):
        dataclasses.replace(ASKED, prompt=30).open(t, print)


def planned(trained, matched):
    """Results of the three checkpoints with these matched tokens of four sequences; None: not asked."""
    run = trained / "run"
    keys = [(0, 0), (0, 3), (1, 1), (1, 2)]
    for entry, row in zip(Series(run).entries(), matched):
        there = [(k, m) for k, m in zip(keys, row) if m is not None]
        columns = {
            "chunk": pa.array([k[0] for k, _ in there], pa.int32()),
            "position": pa.array([k[1] for k, _ in there], pa.int64()),
            "matched": pa.array([m for _, m in there], pa.int32()),
        }
        settings = {"prompt": K, "continuation": L, "data": "x"}
        results.write(run, "memorization-planned", entry, settings, Scored({}, {"sequences": pa.table(columns)}), "", 0)
    return run


def test_when_it_was_learned_and_forgotten_and_by_which_step(trained):
    run = planned(trained, [[1, 8, 2, None], [8, 8, 2, 3], [7, 8, 2, 8]])
    t = target(trained)
    told = story(t, 0, 0, "memorization-planned")
    names = [e.manifest.name for e in Series(run).entries()]
    assert names == ["init", "000", "001"]
    assert (told["learned"], told["forgotten"], told["extractable"]) == ("000", "001", ["000"])
    assert [c["matched"] for c in told["checkpoints"]] == [1, 8, 7]
    (read,) = t.tracer.sample(0, 0)
    assert (told["step"], told["row"], told["first_checkpoint"]) == (read["step"], read["row"], "000") == (0, 0, "000")
    assert told["documents"] == [d for d in read["documents"] if d["tokens"][0] < K + L] != []
    lines = story_lines(told)
    assert (
        lines[0]
        == "chunk 0 position 0: step 0 row 0, first checkpoint after it 000; extractable first at 000, no longer at 001"
    )
    assert lines[1].startswith(f"  {told['documents'][0]['document']}  ")
    assert lines[-1] == "  init 1/8  000 8/8*  001 7/8"
    always, last = story(t, 0, 3, "memorization-planned"), story(t, 1, 2, "memorization-planned")
    assert (always["learned"], always["forgotten"]) == ("init", None)
    assert (last["learned"], [c["name"] for c in last["checkpoints"]]) == ("001", ["000", "001"])
    assert "never extractable" in story_lines(story(t, 1, 1, "memorization-planned"))[0]
    assert History(run, "memorization-planned").changed(9) == [(0, 0), (1, 2)]
    with pytest.raises(UserError, match="no result has position 9 of chunk 1; of chunk 1 there are 1, 2"):
        story(t, 1, 9, "memorization-planned")
    with pytest.raises(UserError, match="position 0 of chunk 5; chunks: 0, 1"):
        story(t, 5, 0, "memorization-planned")
    with pytest.raises(UserError, match="has no results of memorization-none"):
        story(t, 0, 0, "memorization-none")


def test_a_sample_that_no_step_reads_has_documents(trained):
    """Chunks do not divide into batches: the rest is read by nobody."""
    t, run = target(trained), planned(trained, [[1, 8, 2, None]] * 3)
    samples = t.data.phases[0].samples_per_chunk
    history = History(run, "memorization-planned")
    history.keys[0] = (0, samples - 1)
    told = story(t, 0, samples - 1, history=history)
    unread = t.tracer.schedule.reader(0, samples - 1) is None
    assert unread == (samples % 8 != 0)
    assert (told["step"] is None) == unread
    assert told["documents"]


def test_correlations_are_pearsons_over_what_both_have(trained):
    matched = [[1, 8, 2, None], [8, 8, 2, 3], [7, 8, 2, 8]]
    found = correlations(planned(trained, matched), "memorization-planned")
    assert found["names"] == ["init", "000", "001"]
    assert found["sequences"] == [[3, 3, 3], [3, 4, 4], [3, 4, 4]]
    for i in range(3):
        for j in range(3):
            both = [(a, b) for a, b in zip(matched[i], matched[j]) if a is not None and b is not None]
            a, b = np.array(both).T
            np.testing.assert_allclose(found["scores"][i][j], np.corrcoef(a, b)[0, 1], atol=1e-9)
            if (a == 8).std() and (b == 8).std():
                np.testing.assert_allclose(found["extractable"][i][j], np.corrcoef(a == 8, b == 8)[0, 1], atol=1e-9)
    same = correlations(planned(trained, [[8, 8, 8, 8], [1, 2, 3, 4], [2, 4, 6, 8]]), "memorization-planned")
    assert same["scores"][0] == [None, None, None]
    np.testing.assert_allclose(same["scores"][1][1:], [1, 1])
    assert same["extractable"][1] == [None, None, None]


def test_stories_are_told_on_the_command_line(swept):
    said = []
    key = History(swept / "run").keys[0].tolist()
    assert Memorization(story="{}:{}".format(*key)).open(target(swept), said.append) == []
    assert any(line.split("memorization: ")[-1].startswith(f"chunk {key[0]} position {key[1]}: step ") for line in said)
    with pytest.raises(UserError, match="no result has position 77 of chunk 9; chunks: 0, 1"):
        Memorization(story="9:77").open(target(swept), print)
    said.clear()
    assert Memorization(follow=2).open(target(swept), said.append) == []
    assert said
    with pytest.raises(UserError, match="has no results of memorization to tell of"):
        Memorization(follow=1).open(Target(f"{swept / 'none'}@all", *_other(swept)), print)


def _other(swept):
    (swept / "none").mkdir(exist_ok=True)
    (swept / "none" / "config.json").write_text((swept / "run" / "config.json").read_text())
    return families(), open_data
