"""Code benchmarks: the estimator, the prompts, the cuts, and that right code passes and a random model's does not."""

import dataclasses
import gzip
import itertools
import json
import math
import statistics
from pathlib import Path

import jax
import optax
import pytest

from amber_jax.config import AmberConfig
from amber_jax.recipes import amber_tiny
from analysis import code, results
from analysis.code import KINDS, TOO_LONG, CodeOptions, CodeTask, pass_at_k
from analysis.sandbox import Limits, Sandbox
from analysis.subject import Subject, Target
from analysis.sweep import sweep
from checkpoint.writer import SeriesWriter
from data.fim import Fim, reassemble, with_fim
from data.tokenizer import load, train_tokenizer
from errors import RunError, UserError
from parallel.mesh import MeshConfig
from tests.checkpoint.tiny_run import manifest
from training.config import Family, model_to_dict
from training.optimizer import AdamWConfig
from training.state import init_state

BENCHMARKS = Path(__file__).resolve().parents[2].parent / "shared" / "benchmarks"
FAMILIES = {"amber": Family(AmberConfig, AdamWConfig)}
VOCAB = 400
QUICK = {"samples": 3, "temperature": 0.8, "max_new_tokens": 12, "timeout_s": 20.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with a model as it was drawn; tokenizers with and without FIM tokens; made-up benchmarks."""
    folder = tmp_path_factory.mktemp("code")
    model = dataclasses.replace(
        amber_tiny().model,
        vocab_size=VOCAB,
        context_length=2048,
        num_layers=1,
        embed=32,
        num_heads=2,
        head_dim=16,
        mlp=32,
    )
    state = init_state(model, optax.identity(), MeshConfig().build(jax.devices()[:1]), 0)
    with SeriesWriter(folder / "run") as writer:
        writer.save(manifest("series", -1), params=state.params, optimizer=None)
    (folder / "run/config.json").write_text(json.dumps({"model": model_to_dict(model)}))
    train_tokenizer([Path(code.__file__).read_text()], VOCAB - 4, folder / "plain.model")
    (folder / "fim.model").write_bytes(with_fim((folder / "plain.model").read_bytes()))
    humaneval = [
        {
            "task_id": f"Made/{n}",
            "prompt": f'\ndef f{n}(x):\n    """Add {n}."""\n',
            "entry_point": f"f{n}",
            "canonical_solution": f"    # it is easy\n\n    y = x\n    return y + {n}\n",
            "test": f"def check(f):\n    assert [f(x) for x in range(9)] == [x + {n} for x in range(9)]\n",
        }
        for n in range(1, 4)
    ]
    mbpp = [
        {
            "task_id": n,
            "text": f"Add {n}.",
            "code": f"def add(x):\r\n  return x + {n}",
            "test_setup_code": "one = 1\r\ntwo = 2",
            "test_list": [f"assert add(one) == {n + 1}", f"assert add(two) == {n + 2}"],
            "challenge_test_list": [],
        }
        for n in (2, 3, 4, 10, 11, 12, 510, 511)
    ]
    for name, rows in (("humaneval/HumanEval.jsonl", humaneval), ("mbpp/mbpp.jsonl", mbpp)):
        (folder / name).parent.mkdir()
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def allowed():
    try:
        return Sandbox().isolation
    except RunError as e:
        pytest.skip(f"no namespaces here: {e}")


def target(place, tokenizer="fim.model"):
    return Target(f"{place / 'run'}@init", FAMILIES, lambda path, config: None, tokenizer=place / tokenizer)


def opened(place, name="humaneval", benchmarks=None, notes=None, tokenizer="fim.model", **options):
    """Of the made-up benchmarks unless told otherwise; without isolation, since it is not run."""
    options = CodeOptions(**{"unsafe": True, **options})
    note = [].append if notes is None else notes.append
    return CodeTask.open(name, benchmarks or place, options, target(place, tokenizer), note)


class Oracle:
    """A model that gives the reference, and then goes on, in the first `right(number)` samples of a problem."""

    def __init__(self, task, tokenizer, right):
        self.tokenizer, self.right, self.problems, self.calls = tokenizer, right, task.problems, []
        names = itertools.product(enumerate(task.problems), range(task.samples), range(40))
        self.seeds = {code._seed(0, p.task_id, sample, piece): (n, sample) for (n, p), sample, piece in names}
        assert len(self.seeds) == len(task.problems) * task.samples * 40

    def generate(self, prompts, sampling, seeds):
        self.calls.append((len(prompts), sampling.max_new_tokens))
        return [
            self._continue(p, *self.seeds[s])[: sampling.max_new_tokens] for p, s in zip(prompts, seeds, strict=True)
        ]

    def _continue(self, prompt, number, sample):
        problem = self.problems[number]
        assert prompt[: len(problem.ids)] == problem.ids
        good = problem.reference.rstrip() if sample < self.right(number) else "  raise KeyError"
        text = f"{good}{problem.stops[0]}\nassert False" + " and False" * 99
        no_text = "" if not problem.continues else "\uffff"  # in the middle of a text there is no word-start piece
        ids = self.tokenizer.encode(no_text + text)[len(self.tokenizer.encode(no_text)) :]
        return ids[len(prompt) - len(problem.ids) :]


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([i < c for i in range(n)], k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
            assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-12)
    for wrong in ((3, 4, 1), (3, 1, 4), (3, 1, 0), (3, -1, 1)):
        with pytest.raises(ValueError, match="pass@"):
            pass_at_k(*wrong)


@pytest.mark.parametrize("name", KINDS)
def test_planted_completions_are_cut_run_and_counted(place, allowed, name):
    """Figures equal the closed form for known passes, and the table holds every sample."""
    task = opened(place, name, unsafe=False, samples=4, k=(1, 3), max_new_tokens=200, timeout_s=20.0)
    assert (task.kind, len(task.problems)) == (f"evaluate/{name}", 3)
    scored = task.score(Oracle(task, load(place / "fim.model"), right=lambda number: number * 2))  # 0, 2, 4 of 4
    for k in (1, 3):
        values = [1 - math.comb(4 - c, k) / math.comb(4, k) for c in (0, 2, 4)]
        figure = scored.summary[f"pass@{k}"]
        assert figure["value"] == pytest.approx(statistics.fmean(values))
        assert figure["stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(3))
        assert figure["n"] == 3
    assert scored.summary["isolation"] == allowed
    assert scored.summary["reasons"]["passed"] == 6
    assert sum(scored.summary["reasons"].values()) == 12
    rows = scored.tables["samples"].to_pylist()
    assert [(r["task_id"], r["sample"]) for r in rows] == [(p.task_id, s) for p in task.problems for s in range(4)]
    assert [r["passed"] for r in rows] == [s < c for c in (0, 2, 4) for s in range(4)]
    assert {r["completion"].rstrip() for r in rows if r["passed"]} == {p.reference.rstrip() for p in task.problems[1:]}
    assert ("exact_match" in scored.summary) == (name == "humaneval-fim")
    if name == "humaneval-fim":
        assert scored.summary["exact_match"]["value"] == pytest.approx(0.5)
    json.dumps(dict(scored.summary), allow_nan=False)


def test_a_random_model_solves_nothing_in_a_sweep(place, allowed):
    task = opened(place, unsafe=False, **QUICK)
    outcome = sweep(target(place), [task], [].append)
    assert (len(outcome.made), outcome.failed) == (1, {})
    (result,) = results.of_kind(place / "run", "evaluate/humaneval")
    assert result.summary["pass@1"] == {"value": 0, "stderr": 0, "n": 3}
    assert "pass@10" not in result.summary  # of 3 samples
    assert result.settings == task.settings()
    table = result.table("samples").to_pylist()
    assert len(table) == 3 * 3
    assert len({row["completion"] for row in table}) > 3
    assert len(sweep(target(place), [opened(place, unsafe=False, **QUICK)], [].append).kept) == 1
    with pytest.raises(UserError, match=r"other settings \(temperature\)"):
        sweep(target(place), [opened(place, unsafe=False, **{**QUICK, "temperature": 0.9})], [].append)


def test_a_completion_depends_on_its_problem_sample_and_seed_alone(place, tmp_path):
    """Not on the other problems, or their order."""
    there = target(place)
    (entry,) = there.series.resolve("init")
    subject = Subject(there, entry, there.load(entry))

    def completions(**options):
        task = opened(place, **{**QUICK, **options})
        return {p.task_id: c for p, c in zip(task.problems, task.complete(subject), strict=True)}

    whole = completions()
    assert len(whole) == 3
    lines = (place / "humaneval/HumanEval.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl").write_text("".join(lines[::-1]))
    assert completions(benchmarks=tmp_path) == whole
    part = completions(limit=1)
    assert len(part) == 1
    assert part == {name: whole[name] for name in part}
    assert completions(seed=1) != whole


def test_fim_prompts_are_read_back_as_the_solution(place):
    """Each is laid out as training data are, and its hole is a line of the solution that is code."""
    tokenizer = load(place / "fim.model")
    fim = Fim.of(tokenizer)
    for order in ("psm", "spm"):
        for problem in opened(place, "humaneval-fim", fim_order=order).problems:
            suffix = problem.after[: problem.after.index("\ndef check")]
            assert reassemble([*problem.ids, *tokenizer.encode(problem.reference)], tokenizer, fim) == [
                problem.before + ("" if order == "psm" else " ") + problem.reference + suffix
            ]
            assert problem.reference.strip() in ("y = x", f"return y + {problem.task_id[-1]}")
            assert problem.before.endswith("\n")
            marks = [i for i in problem.ids if i in (fim.prefix_id, fim.suffix_id, fim.middle_id)]
            assert marks == [fim.prefix_id, fim.suffix_id, fim.middle_id]
            assert (problem.ids[-1] == fim.middle_id) == (order == "psm")
    assert opened(place, "humaneval-fim").problems == opened(place, "humaneval-fim").problems
    with pytest.raises(UserError, match=r"plain.model: lacks the tokens of fill-in-the-middle"):
        opened(place, "humaneval-fim", tokenizer="plain.model")


def test_mbpp_prompts(place):
    """Three solved problems go before, of the three that are never asked; or the docstring alone."""
    tokenizer = load(place / "fim.model")
    task = opened(place, "mbpp")
    assert [p.task_id for p in task.problems] == ["MBPP/11", "MBPP/12", "MBPP/510"]
    text = tokenizer.decode(task.problems[0].ids)
    assert text.count("[BEGIN]\n") == 4
    assert text.count("[DONE]\n\n") == 3
    assert "\r" not in text
    assert text.startswith(
        "You are an expert Python programmer, and here is your task: Add 2. Your code should pass these tests:\n\n"
        "assert add(one) == 3\nassert add(two) == 4\n[BEGIN]\ndef add(x):\n  return x + 2\n[DONE]\n\nYou are"
    )
    assert text.endswith("task: Add 11. Your code should pass these tests:\n\nassert add(one) == 12\n"
                         "assert add(two) == 13\n[BEGIN]\n")  # fmt: skip
    alone = opened(place, "mbpp", shots=0).problems[0]
    assert tokenizer.decode(alone.ids) == alone.before == '"""\nAdd 11.\nassert add(one) == 12\n"""\n'


def test_the_defaults_are_those_that_crystal_was_measured_with(place):
    for name, samples, temperature, length, new in (("humaneval", 20, 0.2, 512, None), ("mbpp", 16, 0.1, None, 256)):
        settings = opened(place, name).settings()
        assert (settings["samples"], settings["temperature"]) == (samples, temperature)
        assert (settings["max_length"], settings["max_new_tokens"]) == (length, new)
        assert (settings["k"], settings["top_p"], settings["isolated"]) == ([1, 10], 0.95, False)
    greedy = opened(place, greedy=True)
    assert (greedy.samples, greedy.temperature, greedy.ks) == (1, 0.0, (1,))


def test_settings_name_the_data_in_any_form(place, tmp_path):
    """The same rows, compressed, are the same benchmark; other rows are not."""
    settings = opened(place).settings()
    text = (place / "humaneval/HumanEval.jsonl").read_bytes()
    (tmp_path / "humaneval").mkdir()
    packed = tmp_path / "humaneval/HumanEval.jsonl.gz"
    packed.write_bytes(gzip.compress(text))
    assert opened(place, benchmarks=tmp_path).settings() == settings
    packed.write_bytes(gzip.compress(text.replace(b"Add", b"add")))
    assert opened(place, benchmarks=tmp_path).settings()["sha256"] != settings["sha256"]
    for other in ({"seed": 1}, {"top_p": 0.9}, {"limit": 2}, {"timeout_s": 9.0}, {"max_length": 99}, {"samples": 5}):
        assert opened(place, **other).settings() != settings
    assert opened(place, workers=7).settings() == settings


def test_prompts_that_do_not_fit_are_failures(place):
    lengths = [len(p.ids) for p in opened(place).problems]
    middle = sorted(lengths)[0] + 1
    (place / "long/humaneval").mkdir(parents=True)
    rows = [json.loads(line) for line in (place / "humaneval/HumanEval.jsonl").read_text().splitlines()]
    rows[1]["prompt"] += "    # " + "very " * 99 + "long\n"
    (place / "long/humaneval/HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    notes = []
    task = opened(place, benchmarks=place / "long", notes=notes, samples=2, max_length=max(lengths) + 60)
    assert any("1 of 3 prompts do not fit" in n for n in notes)
    assert any("WITHOUT isolation" in n for n in notes)
    scored = task.score(Oracle(task, load(place / "fim.model"), right=lambda number: 2))
    assert scored.summary["pass@1"]["value"] == pytest.approx(2 / 3)
    assert scored.summary["too_long"] == {"problems": 1, "task_ids": ["Made/2"]}
    assert scored.summary["reasons"] == {"passed": 4, TOO_LONG: 2}
    assert len(scored.tables["samples"]) == 6
    with pytest.raises(UserError, match=rf"shortest prompt has {min(lengths)} tokens, and no more than 5 fit"):
        opened(place, max_length=5)
    assert [len(opened(place, max_length=middle).problems)] == [3]


class Endless:
    """A model that never stops."""

    def __init__(self, context):
        self.context, self.shapes = context, set()

    def generate(self, prompts, sampling, seeds):
        assert max(map(len, prompts)) + sampling.max_new_tokens <= self.context
        self.shapes.add((len(prompts), sampling.max_new_tokens))
        return [[ord("x")] * sampling.max_new_tokens for _ in prompts]


@pytest.mark.parametrize(("most", "context"), [(300, 2048), (64, 2048), (1, 2048), (300, 120), (300, 51), (12, 60)])
def test_completions_are_made_in_pieces_up_to_what_is_allowed(place, most, context):
    """To the last token, in few shapes, and never past the context."""
    task = opened(place, samples=9, max_new_tokens=most)
    task.problems = [dataclasses.replace(p, ids=[5] * 50) for p in task.problems]
    task._context = context
    model = Endless(context)
    completions = task.complete(model)
    text = load(place / "fim.model").decode([5] * 50 + [ord("x")] * min(most, context - 50))
    assert {"".join(c) for cs in completions for c in cs} == {text[len(load(place / "fim.model").decode([5] * 50)) :]}
    assert {rows for rows, _ in model.shapes} == {64}
    assert {piece for _, piece in model.shapes} <= {64, 16, 4, 1}


def test_what_has_stopped_is_not_continued(place):
    task = opened(place, samples=2, max_new_tokens=999)
    oracle = Oracle(task, load(place / "fim.model"), right=lambda number: 2)
    task.complete(oracle)
    assert sum(piece for _, piece in oracle.calls) <= 2 * 64  # a prompt's width may differ
    assert all(c.endswith(p.reference.rstrip()) for p, cs in zip(task.problems, task.complete(oracle)) for c in cs)


def test_mistakes_are_refused(place, tmp_path):
    for wrong, what in (
        ({"samples": 0}, "samples=0"),
        ({"limit": 0}, "limit=0"),
        ({"workers": 0}, "workers=0"),
        ({"k": ()}, r"k=\(\)"),
        ({"k": (0,)}, r"k=\(0,\)"),
        ({"shots": 2}, "shots=2"),
        ({"max_length": 9, "max_new_tokens": 9}, "not both"),
        ({"greedy": True, "samples": 2}, "greedy"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"timeout_s": 0.0}, "seconds"),
        ({"memory_mib": 1}, "memory_mib"),
    ):
        with pytest.raises(UserError, match=what):
            CodeOptions(**wrong)
    with pytest.raises(UserError, match="pass@30 needs as many samples, and there are 20"):
        opened(place, k=(1, 30))
    with pytest.raises(UserError, match="all the same"):
        opened(place, temperature=0.0)
    with pytest.raises(UserError, match="no code task 'humanevil'; there are humaneval, mbpp"):
        opened(place, "humanevil")
    with pytest.raises(UserError, match=r"humaneval/HumanEval.jsonl: not there, nor HumanEval.jsonl.gz"):
        opened(place, benchmarks=tmp_path)
    (tmp_path / "mbpp").mkdir()
    file = tmp_path / "mbpp/mbpp.jsonl"
    rows = [json.loads(line) for line in (place / "mbpp/mbpp.jsonl").read_text().splitlines()]
    for content, what in (
        ("{}\n", r"line 1: .*no task_id, text"),
        ("nonsense\n", "line 1"),
        ("[1]\n", "line 1"),
        ("".join(json.dumps(row) + "\n" for row in rows[1:]), "no task 2,"),
        ("".join(json.dumps(row) + "\n" for row in rows[:4]), "has no problems of mbpp"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=what):
            opened(place, "mbpp", benchmarks=tmp_path)
    file.unlink()
    Path(f"{file}.gz").write_bytes(gzip.compress(b"{}")[:-9])
    with pytest.raises(UserError, match="cannot be read"):
        opened(place, "mbpp", benchmarks=tmp_path)


def references_pass(place, name, every):
    """The benchmark's own solutions, put in as completions."""
    if not BENCHMARKS.is_dir():
        pytest.skip(f"no benchmarks at {BENCHMARKS}")
    problems = opened(place, name, benchmarks=BENCHMARKS).problems[::every]
    verdicts = Sandbox(Limits(seconds=60)).run_many([p.program(p.reference) for p in problems], workers=2)
    assert {p.task_id: v.reason for p, v in zip(problems, verdicts, strict=True) if not v.passed} == {}
    wrong = [p.program("\n    raise KeyError\n") for p in problems[:3]]
    assert not any(v.passed for v in Sandbox(Limits(seconds=60)).run_many(wrong, workers=2))
    return len(problems)


@pytest.mark.parametrize(("name", "every", "count"), [("humaneval", 8, 21), ("humaneval-fim", 40, 5), ("mbpp", 25, 20)])
def test_some_reference_solutions_pass(place, allowed, name, every, count):
    assert references_pass(place, name, every) == count


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("humaneval-fim", 164), ("mbpp", 500)])
def test_all_reference_solutions_pass(place, allowed, name, count):
    assert references_pass(place, name, 1) == count
