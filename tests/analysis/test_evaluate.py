"""Benchmarks: what each asks and counts, with models whose score is known beforehand; and a whole evaluation."""

import dataclasses
import json
import os
import tempfile
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HOME", tempfile.mkdtemp(prefix="hf-"))

import numpy as np
import pyarrow as pa
import pytest

import models
import run as command
from analysis import results
from analysis.code import CodeOptions
from analysis.evaluate import Benchmark, Evaluate, _local, paired, task_manager
from analysis.heldout import HeldOut
from analysis.subject import Target
from analysis.suites import MMLU_GROUPS, MMLU_SUBJECTS, SUITES, TASKS, Asked, Part, documents, resolve
from crystal_jax.recipes import crystal_tiny
from errors import RunError, UserError
from inference.score import TokenScores
from training.datasets import open_data

BENCHMARKS = Path(__file__).resolve().parents[2].parent / "shared" / "benchmarks"
needs_benchmarks = pytest.mark.skipif(not BENCHMARKS.exists(), reason=f"reads the benchmarks' files in {BENCHMARKS}")

#: Rows for tasks whose files are not at hand.
MADE_UP = {
    "race/race.jsonl": [
        {"query": "A text. Who?", "choices": ["he", "she", "we", "I"], "gold": n % 4} for n in range(8)
    ],
    "swag/swag.jsonl": [{"query": f"She {n}", "choices": ["runs", "sits"], "gold": n % 2} for n in range(8)],
    "triviaqa/triviaqa.jsonl": [{"question": f"What is {n}", "aliases": ["one", f"The {n}"]} for n in range(8)],
    "drop/drop.jsonl": [{"passage": f"{n} men.", "question": "How many?", "answers": [[str(n)]]} for n in range(8)],
}


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    import lm_eval
    from lm_eval.api.model import LM

    class Known(LM):
        """Scores of a rule of (row, number of the choice); what it writes, of the row."""

        def __init__(self, rule, write=lambda row: ""):
            super().__init__()
            self.rule, self.write = rule, write

        def loglikelihood(self, requests):
            return [(float(self.rule(r.doc, r)), True) for r in requests]

        def loglikelihood_rolling(self, requests):
            raise AssertionError("no task asks for it")

        def generate_until(self, requests):
            return [self.write(r.doc) for r in requests]

    def evaluate(task, part, rule, write=lambda row: "", shots=None, errors=0):
        made = _local(TASKS[task], "", part, TASKS[task].shots if shots is None else shots)
        out = lm_eval.evaluate(Known(rule, write), {made.config.task: made}, bootstrap_iters=errors)
        return {name.replace(",none", ""): v for name, v in out["results"][made.config.task].items()}

    return evaluate


def read(name, tmp_path, rows=32):
    """The first rows of a task."""
    task = TASKS[name]
    folder = BENCHMARKS
    if task.files[0] in MADE_UP:
        folder = tmp_path
        (folder / task.files[0]).parent.mkdir()
        (folder / task.files[0]).write_text("\n".join(map(json.dumps, MADE_UP[task.files[0]])))
    elif not folder.exists():
        pytest.skip(f"reads the benchmarks' files in {BENCHMARKS}")
    part = next(iter(task.read(folder).values()))
    return dataclasses.replace(part, rows=part.rows[:rows], shots=part.shots and part.shots[:rows])


def oracle(row, request):
    if "labels" in row:
        return 0.0 if row["labels"][request.idx] else -50.0
    return -50.0 * (request.idx != row.get("gold", 0))


@pytest.mark.parametrize("name", TASKS)
def test_an_oracle_scores_one(harness, tmp_path, name):
    task, part = TASKS[name], read(name, tmp_path)
    found = harness(name, part, oracle, lambda row: f" {row['target']}", shots=min(task.shots, 4))
    headline = {"gsm8k": "exact_match,strict-match", "triviaqa": "exact_match,remove_whitespace"}
    assert found[headline.get(name, task.metrics[0])] == 1.0
    assert {n.split(",")[0] for n in found} >= set(task.metrics)


@needs_benchmarks
@pytest.mark.parametrize("name", ["arc_challenge", "hellaswag", "winogrande", "truthfulqa_mc1", "crows_pairs"])
def test_a_model_that_guesses_is_near_chance(harness, tmp_path, name):
    part = read(name, tmp_path, 300)
    found = harness(name, part, lambda row, r: -(zlib.crc32(str(r.args).encode()) % 9973) / 100, shots=0, errors=1)
    metric = TASKS[name].metrics[0] if name != "hellaswag" else "acc"
    chance = np.mean([1 / len(row["choices"]) for row in part.rows])
    assert abs(found[metric] - chance) < 3.5 * found[f"{metric}_stderr"]


@needs_benchmarks
@pytest.mark.parametrize("name", ["truthfulqa_mc1", "truthfulqa_mc2", "hellaswag", "crows_pairs"])
def test_prompts_and_scores_are_those_of_the_harness_s_own_task(harness, tmp_path, name):
    """Its task file, over the original layout, asks the same and counts the same."""
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    task = TASKS[name]
    folder = {"hellaswag": "hellaswag", "crows_pairs": "crows_pairs"}.get(name, "truthfulqa")
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / folder / f"{task.builtin[0]}.yaml")
    path = BENCHMARKS / task.files[0]
    if name == "hellaswag":
        original = [json.loads(line) for line in path.open()][:20]
    elif name == "crows_pairs":
        original = [{"sent_more": r["choices"][0], "sent_less": r["choices"][1]} for r in read(name, tmp_path).rows]
    else:
        rows, fields = json.loads(path.read_text())[:20], ("mc1_targets", "mc2_targets")
        split = lambda t: {"choices": list(t), "labels": list(t.values())}  # noqa: E731
        original = [{"question": r["question"], **{f: split(r[f]) for f in fields}} for r in rows]
    config = {k: v for k, v in config.items() if k not in ("dataset_path", "dataset_name", "tag")}
    theirs = ConfigurableTask(
        config={
            **config,
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
            "num_fewshot": 0,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(original)},
        }
    )
    ours = _local(task, "", Part(read(name, tmp_path).rows[: len(original)]), 0)
    for made in (theirs, ours):
        made.build_all_requests()
    assert [r.args for r in ours.instances] == [r.args for r in theirs.instances]
    answers = [(-float(n), False) for n in np.random.default_rng(0).random(len(theirs.eval_docs[0]) + 20)]
    for a, b in zip(list(ours.eval_docs), list(theirs.eval_docs), strict=True):
        said = answers[: len(ours.doc_to_choice(a))]
        assert ours.process_results(a, said) == pytest.approx(theirs.process_results(b, said))


def test_mmlu_groups_are_those_of_the_fact_sheet():
    sizes = {name: len(members) for name, members in MMLU_GROUPS.items()}
    assert list(sizes.values()) == [6, 4, 10, 5, 2, 7, 6, 3, 2, 7, 4]
    assert len(MMLU_SUBJECTS) == len(set(MMLU_SUBJECTS)) == 57
    assert sum(sizes.values()) == 56
    if BENCHMARKS.exists():
        assert {p.name for p in (BENCHMARKS / "mmlu" / "test").iterdir()} == {f"{s}_test.csv" for s in MMLU_SUBJECTS}


def test_suites_have_the_shots_of_the_fact_sheet():
    assert [(a.name, a.shots or TASKS[a.name].shots) for a in resolve(["amber-quick"])] == [
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
    ]
    assert len(resolve(["amber-wandb"])) == 11
    assert len(resolve(["crystal"])) == 19
    assert Asked("arc_challenge", 0) in resolve(["crystal"])
    assert resolve(["arc_challenge@25", "arc_challenge"]) == [Asked("arc_challenge", None)]
    for name in SUITES:
        assert resolve([name])
    # --shots stands for what is not written out, and what then is the same is asked once
    assert resolve(["arc_challenge", "arc_challenge@0"], 0) == [Asked("arc_challenge", 0)]
    assert resolve(["piqa", "arc_challenge@25"], 3) == [Asked("piqa", 3), Asked("arc_challenge", None)]
    assert len(resolve(["crystal"], 2)) == len({a.name for a in resolve(["crystal"])}) == 15
    assert resolve(["heldout", "mbpp"], 2) == [Asked("heldout", None), Asked("mbpp", None)]


@pytest.mark.parametrize(
    ("tasks", "why"),
    [
        (("arc_chalenge",), "unknown task 'arc_chalenge' .did you mean arc_challenge"),
        (("amber-fast",), "did you mean amber-wandb or amber-quick"),
        (("arc_challenge@x",), "such as arc_challenge@0"),
        (("heldout@2",), "write a task of texts"),
        ((), "name a task"),
    ],
)
def test_names_that_are_none(tasks, why):
    with pytest.raises(UserError, match=why):
        Evaluate(tasks)


@pytest.mark.parametrize("flags", [{"limit": 0}, {"shots": -1}, {"max_new_tokens": 0}])
def test_numbers_that_are_none(flags):
    with pytest.raises(UserError, match=f"{next(iter(flags))}="):
        Evaluate(("demo",), **flags)


@needs_benchmarks
def test_documents_have_the_hashes_of_results(tmp_path):
    found = documents("arc_challenge", BENCHMARKS)
    assert len(found) == 1172
    assert found[0][1].startswith("An astronomer observes")
    assert "Planetary gravity will become stronger." in found[0][1]
    assert all(text for name in TASKS if not TASKS[name].missing(BENCHMARKS) for _, text in documents(name, BENCHMARKS))
    assert not documents("truthfulqa_mc1", BENCHMARKS)[0][1].startswith("Q: What is human life"), "not of the item"
    with pytest.raises(UserError, match="not a task with texts"):
        documents("heldout", BENCHMARKS)


def test_documents_are_texts_that_data_might_have(tmp_path):
    files = {
        "winogrande/winogrande.jsonl": {"context_options": ["A cup", "A lid"], "continuation": "fell.", "gold": 1},
        "siqa/siqa.jsonl": {
            "query": "Context: Al left.\nQuestion: Why?\nChoices:\nA. in haste\nB. Being late\nAnswer:",
            "choices": ["A", "B"],
            "gold": 1,
        },
        "piqa/piqa.jsonl": {"query": "Question: Dry a cup\n", "choices": ["with salt", "with a towel"], "gold": 1},
        "gsm8k/test.jsonl": {"question": "One and one?", "answer": "Two.\n#### 2"},
        "gsm8k/train.jsonl": {"question": "?", "answer": "!"},
        "race/race.jsonl": {"query": "A text. Which?", "choices": ["A", "B"], "gold": 1},
    }
    for name, row in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(row))
    found = {name: documents(name, tmp_path)[0][1] for name in ("winogrande", "siqa", "piqa", "gsm8k", "race")}
    assert found == {
        "winogrande": "A lid fell.",
        "siqa": "Al left.\nWhy?\nBeing late\nin haste",
        "piqa": "Dry a cup\nwith a towel\nwith salt",
        "gsm8k": "One and one?\nTwo.\n#### 2",
        "race": "A text. Which?\nB\nA",
    }


# ---- a run ---------------------------------------------------------------------------------------------------------

SMALL = [
    "--model.vocab-size=320", "--model.num-layers=1", "--model.embed=32", "--model.num-heads=2", "--model.head-dim=16",
    "--model.mlp=32", "--data.sequence-length=64", "--data.chunks=2", "--data.global-batch=8",
    "--data.validation-per-source=24",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on two sources, by the command line."""
    folder = tmp_path_factory.mktemp("evaluate")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "delta", "(", ")", "def", "return", "\n", "0", "1", "What is", "the answer?"]
    for name in ("prose", "code"):
        (folder / name).mkdir()
        for n in range(16):
            (folder / name / f"{n}.txt").write_text(f"{name} " + " ".join(rng.choice(words, size=400)))
    sources = [f"--source={name}={folder / name}" for name in ("prose", "code")]
    assert command.main(["prepare", "amber_tiny", f"--out={folder}/data", *sources, *SMALL]) == 0
    mesh = "--mesh=data=4,fsdp=2"
    assert command.main(["train", "amber_tiny", f"--data={folder}/data", f"--run={folder}/run", mesh, *SMALL]) == 0
    return folder


@pytest.fixture
def target(trained):
    return Target(f"{trained}/run@all", models.families(), open_data)


@dataclasses.dataclass
class Rule:
    """A model that gives all tokens of a row one log-probability."""

    of: object

    def score(self, rows):
        return [TokenScores(np.full(len(r) - 1, self.of(r), np.float32), np.zeros(len(r) - 1, int)) for r in rows]


def test_heldout_knows_its_own_endings(target):
    (study,) = Evaluate().open(target, print)
    assert isinstance(study, HeldOut)
    windows = [row.tobytes() for s in target.data.sources for row in target.data.validation(s).inputs]
    true = study.rows[np.arange(len(study.answers)), study.answers]
    assert all(any(row.tobytes() in w for w in windows) for row in true), "the right one stands in the data"
    assert len(study.rows) > 30
    assert (study.rows[:, :, : -study.continuation] == study.rows[:, :1, : -study.continuation]).all()
    known = {row.tobytes() for row in true}
    assert study.score(Rule(lambda r: 0.0 if r.tobytes() in known else -1.0)).summary["acc"]["value"] == 1.0
    guessed = study.score(Rule(lambda r: -(zlib.crc32(r.tobytes()) % 9973) / 100)).summary
    assert abs(guessed["acc"]["value"] - 0.25) < 4 * guessed["acc"]["stderr"]
    assert set(guessed["by_source"]) == {"prose", "code"}
    counts = np.bincount(study.answers, minlength=4)
    assert (counts > 0).all(), "the right one is not always at one place"
    with pytest.raises(RunError, match="all choices score the same"):
        study.score(Rule(lambda r: -1.0))
    again = HeldOut.open(target, None, print)
    assert (again.rows == study.rows).all()
    few = HeldOut.open(target, 5, print)
    more = HeldOut.open(target, 20, print)
    assert {r.tobytes() for r in few.rows} < {r.tobytes() for r in more.rows}


def test_a_constant_model_is_refused(target, tmp_path):
    """It would score 1.0 in TruthfulQA, whose true answer is the first."""
    (tmp_path / "truthfulqa").mkdir()
    answers = {f"answer{' of it' * n}": int(n == 0) for n in range(3)}
    rows = [{"question": f"What {n}?", "mc1_targets": answers, "mc2_targets": answers} for n in range(2)]
    (tmp_path / "truthfulqa" / "mc_task.json").write_text(json.dumps(rows))
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    for study in Evaluate(("truthfulqa_mc1", "truthfulqa_mc2"), tmp_path).open(target, print):
        with pytest.raises(RunError, match="all choices score the same in 2 of 2 rows"):
            study.score(Rule(lambda r: -1.0))


@pytest.fixture
def made_up(tmp_path):
    """A small benchmark: the answer is what follows in training text, or not."""
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    (tmp_path / "arc").mkdir()
    choices = ["alpha", "the answer? What is", "( ) beta", "gamma"]
    rows = [{"query": f"What is {n} {n * n}", "choices": choices, "gold": n % 4} for n in range(24)]
    (tmp_path / "arc" / "arc_challenge.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "winogrande").mkdir()
    pairs = [
        {"context_options": [f"alpha {n // 2} (", f"beta {n // 2} ("], "continuation": "gamma )", "gold": n % 2}
        for n in range(12)
    ]
    (tmp_path / "winogrande" / "winogrande.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return tmp_path


def test_examples_are_others_and_stay_the_same(target, made_up):
    (study,) = Evaluate(("winogrande@3",), made_up).open(target, print)
    items = study._build()[0].items
    assert study.settings()["shots_from"] == "test"
    for item in items:
        context = item.requests[0].args[0]
        assert context.count("gamma )") == 3
        number = item.row["choices"][0].split()[1]
        assert f" {number} (" not in context[: context.rindex("\n\n")], "nor its twin, which has the other answer"
    (limited,) = Evaluate(("winogrande@3",), made_up, limit=4).open(target, print)
    by_hash = {i.facts["doc_hash"]: i.facts["prompt_hash"] for i in items}
    chosen = limited._build()[0].items
    assert len(chosen) == 4
    assert all(by_hash[i.facts["doc_hash"]] == i.facts["prompt_hash"] for i in chosen)
    assert [i.facts["doc_id"] for i in chosen] != [0, 1, 2, 3]
    with pytest.raises(UserError, match="30 examples are asked for, and 11 are there"):
        Evaluate(("winogrande@30",), made_up).open(target, print)


def test_an_evaluation_of_a_series(trained, target, made_up, capsys):
    words = ["evaluate", f"{trained}/run@all", "--tasks", "demo", "arc_challenge@2", "--benchmarks", str(made_up)]
    assert command.main([*words, "--json"]) == 0
    capsys.readouterr()
    found = results.of_kind(trained / "run", "evaluate/arc_challenge@2")
    assert [r.checkpoint["name"] for r in found] == ["init", "000", "001"]
    assert len(results.of_kind(trained / "run", "evaluate/heldout")) == 3
    summary = found[-1].summary
    assert summary["headline"] == "acc_norm"
    assert summary["acc"]["n"] == 24
    assert (summary["chance"], summary["shots"], summary["shots_from"]) == (0.25, 2, "test")
    assert summary["cut"]["of"] == 96
    a, b = found[0].table("items"), found[-1].table("items")
    assert {h for h, _ in documents("arc_challenge", made_up)} == set(a["doc_hash"].to_pylist())
    difference, stderr, n = paired(a, b, "acc")
    assert n == 24
    assert difference == pytest.approx(summary["acc"]["value"] - found[0].summary["acc"]["value"])
    assert stderr is not None
    best = [int(np.argmax(row["logprobs"])) for row in b.to_pylist()]
    assert b["prediction"].to_pylist() == best
    assert b["acc"].to_pylist() == [float(p == t) for p, t in zip(best, b["target"].to_pylist(), strict=True)]
    time = found[0].path.stat().st_mtime_ns
    assert command.main(words) == 0
    assert found[0].path.stat().st_mtime_ns == time, "nothing is made twice"
    assert command.main([*words, "--limit", "3"]) == 2
    assert "was made with other settings (limit)" in capsys.readouterr().err
    assert command.main([*words, "--limit", "3", "--name", "few"]) == 0
    assert results.of_kind(trained / "run", "evaluate/arc_challenge@2-few")[0].summary["acc"]["n"] == 3


def test_pairs_must_be_of_one_kind():
    facts = {"part": "", "doc_id": 0, "doc_hash": "a", "filter": "none"}
    one = pa.table({k: [v] for k, v in {**facts, "prompt_hash": "p", "acc": 1.0}.items()})
    assert paired(one, one, "acc") == (0.0, None, 1)
    for other, why in (({"doc_hash": "b"}, "no item in common"), ({"prompt_hash": "q"}, "other prompts")):
        table = pa.table({k: [v] for k, v in {**facts, "prompt_hash": "p", "acc": 1.0, **other}.items()})
        with pytest.raises(UserError, match=why):
            paired(one, table, "acc")
    with pytest.raises(UserError, match="no per-item 'f1'"):
        paired(one, one, "f1")
    columns = {"filter": ["strict", "loose"], "em.strict": [0.0, None], "em.loose": [None, 1.0]}
    two = pa.table({**{k: [v, v] for k, v in {**facts, "prompt_hash": "p"}.items()}, **columns})
    assert paired(two, two, "em.strict") == (0.0, None, 1), "each filter has its own rows"


def test_missing_files_are_named_and_can_be_left_out(target, made_up, capsys):
    notes = []
    with pytest.raises(UserError, match=r"hellaswag: hellaswag/hellaswag_val_subset1000.jsonl(.|\n)*mmlu: mmlu/test/"):
        Evaluate(("amber-quick",), made_up).open(target, notes.append)
    (study,) = Evaluate(("amber-quick",), made_up, shots=1, skip_missing=True).open(target, notes.append)
    assert isinstance(study, Benchmark)
    assert study.kind == "evaluate/arc_challenge@1"
    assert notes == ["left out, since their files are missing: hellaswag, mmlu, truthfulqa_mc2"]
    with pytest.raises(UserError, match="the files of none"):
        Evaluate(("piqa",), made_up, skip_missing=True).open(target, notes.append)
    with pytest.raises(UserError, match="humaneval: needs its file"):
        Evaluate(("humaneval",)).open(target, notes.append)
    (made_up / "arc" / "arc_challenge.jsonl").write_text('{"query": "What?", "choices": ["a"], "gold": 1}')
    with pytest.raises(UserError, match=r"the right choice is 1 of 1.*JSON lines with query, choices and gold"):
        Evaluate(("arc_challenge",), made_up).open(target, notes.append)


def test_the_harness_has_the_tasks_that_are_named():
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    known = task_manager(list(TASKS)).all_tasks
    assert {name for task in TASKS.values() for name in task.builtin} <= set(known)


@pytest.fixture
def online(monkeypatch):
    """What the harness would fetch; the list is the Social IQa examples."""
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    import datasets

    def arc(n):
        answers = {"text": ["alpha", "the answer? What is", "( ) beta", "gamma"], "label": list("ABCD")}
        return {"question": f"What is {n} {n * n}", "choices": answers, "answerKey": "ABCD"[n % 4]}

    def siqa(n, answer="( ) beta"):
        answers = {"answerA": "alpha", "answerB": answer, "answerC": "the answer? What is gamma"}
        return {"context": f"What {n}", "question": "is", **answers, "label": str(n % 3 + 1)}

    train = [siqa(n) for n in range(50, 56)]

    def load(path, name=None, **_):
        rows = [(siqa if "siqa" in path else arc)(n) for n in range(12)]
        first = train if "siqa" in path else [arc(n) for n in range(50, 56)]
        parts = {"train": first, "validation": rows, "test": rows}
        return datasets.DatasetDict({part: datasets.Dataset.from_list(r) for part, r in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return train


def by_words(salt):
    """A checkpoint: its score depends on the whole row."""
    return Rule(lambda r: -(zlib.crc32(r.tobytes() + salt) % 9973) / 100)


def test_a_task_with_two_numbers_of_shots_is_two_studies(target, online):
    """Neither reads the other's answers, nor those of the checkpoint before."""
    tasks = ("arc_challenge@2", "arc_challenge@0")
    together = Evaluate(tasks).open(target, print)
    alone = [Evaluate((task,)).open(target, print)[0] for task in tasks]
    for salt in (b"a", b"b", b"c"):
        for one, other in zip(together, alone, strict=True):
            assert one.score(by_words(salt)).tables["items"].equals(other.score(by_words(salt)).tables["items"])


def test_the_harness_s_own_task_has_our_metrics_and_names_its_examples(target, online):
    (study,) = Evaluate(("siqa@1",)).open(target, print)
    summary = study.score(by_words(b"a")).summary
    assert summary["headline"] == "acc_norm"
    assert summary["acc_norm"]["n"] == summary["acc"]["n"] == 12
    (none,) = Evaluate(("siqa@0",)).open(target, print)
    online[0]["context"] = "Another"
    (other,) = Evaluate(("siqa@1",)).open(target, print)
    assert other.settings()["sha256"] != study.settings()["sha256"]
    assert Evaluate(("siqa@0",)).open(target, print)[0].settings() == none.settings()


def test_flags_of_all_tasks_reach_code_or_are_said_not_to(target, tmp_path):
    (tmp_path / "humaneval").mkdir()
    row = {"prompt": "a", "entry_point": "f", "canonical_solution": "b", "test": "c"}
    lines = [json.dumps({"task_id": f"HumanEval/{n}", **row}) for n in range(4)]
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text("\n".join(lines))

    def settings(code=None, **flags):
        code = code or CodeOptions(unsafe=True)
        (study,) = Evaluate(("humaneval",), tmp_path, code=code, **flags).open(target, notes.append)
        return [study.settings()[name] for name in ("problems", "limit", "max_new_tokens", "max_length")]

    notes = []
    assert settings() == [4, None, None, 512]
    assert not any("--shots" in note for note in notes)
    assert settings(limit=2, max_new_tokens=9) == [2, 2, 9, None]
    assert settings(CodeOptions(limit=3, max_length=40, unsafe=True), limit=2, max_new_tokens=9) == [3, 3, None, 40]
    settings(shots=1, add_bos="no")
    assert "--shots and --add-bos: not for humaneval (--code.* are their flags)" in notes


def test_what_does_not_fit_leaves_out_the_task_alone(target, made_up):
    """Prompts are made at the first checkpoint, where only a RunError lets the sweep go on."""
    row = {"query": "What?", "choices": ["alpha", "( def return ) " * 100], "gold": 0}
    (made_up / "arc" / "arc_challenge.jsonl").write_text(json.dumps(row))
    (study,) = Evaluate(("arc_challenge@0",), made_up).open(target, print)
    for _ in range(2):
        with pytest.raises(RunError, match=r"arc_challenge cannot be asked: the continuation .* has .* tokens"):
            study.score(by_words(b"a"))


def test_without_files_the_network_is_named(target):
    pytest.importorskip("lm_eval.api.task", reason="asks the harness; pip install -e '.[analysis]'")
    with pytest.raises(UserError, match=r"piqa: the harness cannot fetch its data .*--benchmarks DIR"):
        Evaluate(("piqa",)).open(target, print)


def test_a_tokenizer_of_another_model_is_refused(trained, made_up, tmp_path):
    from data.tokenizer import train_tokenizer

    train_tokenizer(["alpha beta gamma " * 50], 275, tmp_path / "other.model")
    other = Target(f"{trained}/run@0", models.families(), open_data, tokenizer=tmp_path / "other.model")
    small = dataclasses.replace(other.model, vocab_size=500)
    other.model = small
    with pytest.raises(UserError, match="this tokenizer has 275 ids"):
        Evaluate(("arc_challenge@0",), made_up).open(other, print)


def test_bos_is_that_of_the_published_evaluation(target):
    assert target.begins_with_bos("auto") is True
    assert target.begins_with_bos("no") is False
    target.model = crystal_tiny().model
    assert target.begins_with_bos("auto") is False
    assert target.begins_with_bos("yes") is True
