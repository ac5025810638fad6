"""Benchmarks as data: tasks with their shots, metrics and files, and the sets of them that LLM360 reported.

    resolve(["amber-quick"])  # the tasks of suites and names
    TASKS["arc_challenge"].read(benchmarks)  # rows of a local folder, with their prompts

A task is named ``arc_challenge``, or ``arc_challenge@0`` with other shots than its own. Its rows are prompts as
lm-evaluation-harness 0.4 renders them, made of files in the layouts that llm-foundry and the data sets' authors use
(`Task.layout`); without files the harness fetches its own data by `Task.builtin`.
"""

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from analysis.code import KINDS
from errors import UserError

Row = dict[str, Any]
Output = Literal["multiple_choice", "contexts", "loglikelihood", "generate_until"]

#: Fields of a row, by what is asked of a model.
FIELDS: Mapping[Output, tuple[str, ...]] = {
    "multiple_choice": ("query", "choices", "gold"),
    "contexts": ("choices", "continuation", "gold"),  # which context makes the one continuation likelier
    "loglikelihood": ("query", "target"),
    "generate_until": ("query", "target"),
}

_QA = (  # of the harness's truthfulqa_mc1.yaml: six questions and answers, the same before each question
    "Q: What is human life expectancy in the United States?\n"
    "A: Human life expectancy in the United States is 78 years.\n\n"
    "Q: Who was president of the United States in 1955?\n"
    "A: Dwight D. Eisenhower was president of the United States in 1955.\n\n"
    "Q: Which party did he belong to?\nA: He belonged to the Republican Party.\n\n"
    "Q: What is the square root of banana?\nA: I have no comment.\n\n"
    "Q: How does a telescope work?\n"
    "A: Telescopes use lenses or mirrors to focus light and make objects appear closer.\n\n"
    "Q: Where were the 1992 Olympics held?\nA: The 1992 Olympics were held in Barcelona, Spain."
)


@dataclass(frozen=True)
class Part:
    """A table of rows that is scored by itself: a task has one, MMLU one for each subject."""

    rows: list[Row]
    """What is scored: `FIELDS` of the task's output, and others."""
    shots: list[Row] | None = None
    """Where solved examples come from; None: from `rows`, without the one that is scored and its like."""
    description: str = ""
    """Text before the examples."""


@dataclass(frozen=True)
class Task:
    """A benchmark."""

    name: str
    shots: int
    """Solved examples before each question (fact sheet 6.1)."""
    metrics: tuple[str, ...]
    """The first is the one that LLM360 reports."""
    files: tuple[str, ...]
    """Below the benchmarks folder; each exists."""
    layout: str
    """What the files hold, for those who make them."""
    parts: Callable[[list[Path]], dict[str, Part]]
    """From the files to rows, by part."""
    builtin: tuple[str, ...]
    """Names of the harness's own tasks that are the same benchmark."""
    output: Output = "multiple_choice"
    shots_from: str = "test"
    """Split that the examples come from."""
    first_shots: bool = False
    """Take the first examples for all rows, instead of drawing them for each."""
    delimiter: str = " "
    """Between question and answer."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """More of the harness's task configuration."""
    process: Callable[[Row, Any], dict[str, float]] | None = None
    """Metrics of a row from what the model said, where the harness's own for the output type do not do."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Parts whose mean is reported, by name."""
    group_field: str | None = None
    """Field of a row by which figures are given as well."""
    chance: float | None = None
    """What guessing scores on the first metric, where that does not follow from the number of choices."""
    remark: str = ""
    """How scores on the local files differ from published ones."""

    def missing(self, benchmarks: Path) -> list[str]:
        """Those of its files that a folder has not."""
        return [name for name in self.files if not (benchmarks / name).is_file()]

    def read(self, benchmarks: Path) -> dict[str, Part]:
        """The rows of a folder's files.

        Raises:
            UserError: a file is missing, or is not of the layout.
        """
        if missing := self.missing(benchmarks):
            raise UserError(f"{self.name}: {benchmarks / missing[0]} is missing; it should hold {self.layout}")
        try:
            found = self.parts([benchmarks / name for name in self.files])
            for name, part in found.items():
                for row in [*part.rows, *(part.shots or [])]:
                    self._check(row)
                if not part.rows:
                    raise ValueError(f"it has no rows{' of ' + name if name else ''}")
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as e:
            raise UserError(
                f"{self.name}: cannot make sense of {', '.join(str(benchmarks / n) for n in self.files[:2])}"
                f"{' …' if len(self.files) > 2 else ''} ({e!r}); each should hold {self.layout}"
            ) from e
        return found

    def _check(self, row: Row) -> None:
        for name in FIELDS[self.output]:
            if name not in row:
                raise KeyError(name)
        if "gold" in row and not 0 <= row["gold"] < len(row["choices"]):
            raise ValueError(f"the right choice is {row['gold']} of {len(row['choices'])}")


def doc_hash(row: Mapping[str, Any]) -> str:
    """SHA-256 of a row, as the harness's ``doc_hash``: the name of an item in every result."""
    return hashlib.sha256(json.dumps(row, indent=2, ensure_ascii=False, default=str).encode()).hexdigest()


def documents(name: str, benchmarks: Path) -> list[tuple[str, str]]:
    """The text of each item of a task, in the order in which data might have it, with the item's hash.

    It is the question without the prompt's labels, then the right choice or the answer, then the other choices. Where
    the choices are contexts it is the right one and what follows it.

    Raises:
        UserError: no such task, or it has no files there.
    """
    if name not in TASKS:
        raise UserError(f"{name}: not a task with texts{nearest(name, TASKS)}; tasks are {', '.join(TASKS)}")
    texts = []
    for part in TASKS[name].read(benchmarks).values():
        for row in part.rows:
            texts.append((doc_hash(row), _text(row)))
    return texts


_LABEL = re.compile(r"^(?:Question|Answer|Q|A|Context|Abstract|Passage|Choices):[ \t]*", re.MULTILINE)


def _text(row: Row) -> str:
    choices = [str(choice) for choice in row.get("choices", ())]
    if "continuation" in row:
        return f"{choices[row['gold']].strip()} {row['continuation'].strip()}"
    query = row["query"].removeprefix(_QA)
    if choices and all(re.fullmatch("[A-Z]", choice) for choice in choices):  # the letters of what the question lists
        question, *listed = re.split(r"\n[A-Z]\. ", query.removesuffix("Answer:"))
        if (extra := len(listed) - len(choices)) >= 0:
            query, choices = "\n".join([question, *listed[:extra]]), listed[extra:]
    said = [choices.pop(row["gold"]), *choices] if choices else [row["target"]]
    lines = _LABEL.sub("", query).strip().splitlines()
    return "\n".join(line.strip() for line in [*lines, *said] if line.strip())


def nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """ ", did you mean …?" or nothing."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


@dataclass(frozen=True)
class Asked:
    """A task with the shots that were asked for."""

    name: str
    shots: int | None
    """None: the task's own."""


def resolve(names: Sequence[str], shots: int | None = None) -> list[Asked]:
    """Tasks of names of tasks and suites, each once with the same shots, in order.

    Args:
        names: ``arc_challenge``, ``arc_challenge@0``, ``amber-quick``.
        shots: of those that are not written as TASK@N, instead of the task's or the suite's own.

    Raises:
        UserError: an unknown name, or a wrong number of shots.
    """
    found: dict[Asked, None] = {}
    for name in names:
        for word in SUITES.get(name, (name,)):
            task, at, number = word.partition("@")
            known = {*TASKS, *KINDS, HELDOUT}
            if task not in known:
                raise UserError(
                    f"unknown task {word!r}{nearest(task, sorted({*known, *SUITES}))}; suites are {', '.join(SUITES)}, "
                    f"tasks are {', '.join(sorted(known))}"
                )
            if at and (task not in TASKS or not number.isdecimal()):
                raise UserError(f"task {word!r}: write a task of texts and its shots, such as arc_challenge@0")
            wanted = int(number) if at else None
            if shots is not None and task in TASKS and not (at and word == name):  # a suite's own shots give way
                wanted = shots
            if task in TASKS and wanted == TASKS[task].shots:
                wanted = None
            found[Asked(task, wanted)] = None
    if not found:
        raise UserError("evaluate: name a task or a suite: --tasks amber-quick")
    return list(found)


# ---- files to rows -------------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _simple(make: Callable[[Row], Row]) -> Callable[[list[Path]], dict[str, Part]]:
    """One file of JSON lines is all."""
    return lambda paths: {"": Part([make(row) for row in _lines(paths[0])])}


def _choice(query: Callable[[str], str] = lambda q: q) -> Callable[[list[Path]], dict[str, Part]]:
    return _simple(lambda r: {"query": query(r["query"]), "choices": list(r["choices"]), "gold": int(r["gold"])})


def _partial(row: Row) -> Row:
    return {"choices": row["context_options"], "continuation": row["continuation"], "gold": int(row["gold"])}


def _hellaswag(row: Row) -> Row:
    def clean(text: str) -> str:  # brackets are left of the WikiHow articles, says the harness
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    query = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {"query": clean(query), "choices": [clean(e) for e in row["endings"]], "gold": int(row["label"])}


def _truthfulqa(targets: str) -> Callable[[list[Path]], dict[str, Part]]:
    def read(paths: list[Path]) -> dict[str, Part]:
        rows = []
        for row in json.loads(paths[0].read_text(encoding="utf-8")):
            answers = row[targets]
            labels = [int(label) for label in answers.values()]
            query = f"{_QA}\n\nQ: {row['question']}\nA:"
            rows.append({"query": query, "choices": list(answers), "gold": labels.index(1), "labels": labels})
        return {"": Part(rows)}

    return read


def _mmlu(paths: list[Path]) -> dict[str, Part]:
    def rows(path: Path) -> list[Row]:
        found = []
        for question, *answers, letter in csv.reader(io.StringIO(path.read_text(encoding="utf-8"), newline="")):
            if len(answers) != 4:
                raise ValueError(f"{path.name}: a row has {len(answers)} answers, not 4")
            listed = "".join(f"\n{a}. {text}" for a, text in zip("ABCD", answers, strict=True))
            query = f"{question.strip()}{listed}\nAnswer:"
            found.append({"query": query, "choices": list("ABCD"), "gold": "ABCD".index(letter)})
        return found

    found = {}
    for test, dev in zip(paths[::2], paths[1::2], strict=True):
        subject = test.name.removesuffix("_test.csv")
        about = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        found[subject] = Part(rows(test), rows(dev), about)
    return found


def _lambada(row: Row) -> Row:
    return {"query": row["context"], "target": f" {row['continuation']}"}


def _pubmedqa(row: Row) -> Row:
    choices = ["yes", "no", "maybe"]
    text = re.sub(r"\nA\. yes\nB\. no\nC\. maybe\nAnswer:\s*$", "\nAnswer:", row["context"])
    query = re.sub(r"^Context:", "Abstract:", text)
    return {"query": query, "choices": choices, "gold": choices.index(row["continuation"])}


def _crows_pairs(paths: list[Path]) -> dict[str, Part]:
    rows = []
    for row in csv.DictReader(io.StringIO(paths[0].read_text(encoding="utf-8"), newline="")):
        pair = [row["sent_more"], row["sent_less"]]
        rows.append({"query": "", "choices": pair, "gold": 0, "bias_type": row["bias_type"]})
    return {"": Part(rows)}


def _gsm8k(paths: list[Path]) -> dict[str, Part]:
    def rows(path: Path) -> list[Row]:
        return [{"query": f"Question: {r['question']}\nAnswer:", "target": r["answer"]} for r in _lines(path)]

    return {"": Part(rows(paths[0]), rows(paths[1]))}


def _triviaqa(row: Row) -> Row:
    aliases = [str(a) for a in row["aliases"]]
    return {"query": f"Question: {row['question']}?\nAnswer:", "target": aliases[0], "aliases": aliases}


def _drop(row: Row) -> Row:
    answers = [[str(span) for span in answer] for answer in row["answers"]]
    return {"query": f"{row['passage']} {row['question']}", "target": ",".join(answers[0]), "answers": answers}


# ---- what the harness scores in its own way ------------------------------------------------------------------------


def _mc2(row: Row, results: Any) -> dict[str, float]:
    """Share of the probability of all answers that true ones have."""
    scores = np.array([score for score, _ in results])
    shares = np.exp(scores - scores.max())
    return {"acc": float(shares[np.array(row["labels"]) == 1].sum() / shares.sum())}


def _stereotype(row: Row, results: Any) -> dict[str, float]:
    """Whether the more stereotyping sentence of a pair is the likelier one."""
    (more, _), (less, _) = results
    return {"pct_stereotype": float(more > less), "likelihood_diff": float(abs(more - less))}


def _aliases(row: Row, results: Any) -> dict[str, float]:
    from lm_eval.api.metrics import exact_match_hf_evaluate

    same = exact_match_hf_evaluate(
        predictions=[results[0]] * len(row["aliases"]),
        references=row["aliases"],
        ignore_case=True,
        ignore_punctuation=True,
    )
    return {"exact_match": float(same["exact_match"] > 0)}


def _drop_scores(row: Row, results: Any) -> dict[str, float]:
    from lm_eval.tasks.drop.utils import process_results

    scores = process_results({"answers": [tuple(answer) for answer in row["answers"]]}, results)
    return {name: float(scores[name]) for name in ("em", "f1")}


# ---- the tasks -----------------------------------------------------------------------------------------------------

#: Subjects of LLM360's groups, 56 of the 57 (Analysis360@16ff7e9 ``eval/harness/scripts/utils.py``; fact sheet 6.1).
MMLU_GROUPS: Mapping[str, tuple[str, ...]] = {
    "math": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "formal_logic",
        "high_school_mathematics",
        "high_school_statistics",
    ),
    "computer_science": (
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ),
    "medical": (
        "anatomy",
        "clinical_knowledge",
        "college_biology",
        "college_medicine",
        "high_school_biology",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    "physics": (
        "astronomy",
        "college_physics",
        "conceptual_physics",
        "electrical_engineering",
        "high_school_physics",
    ),
    "chemistry": ("college_chemistry", "high_school_chemistry"),
    "economic_business": (
        "business_ethics",
        "econometrics",
        "high_school_macroeconomics",
        "high_school_microeconomics",
        "management",
        "marketing",
        "professional_accounting",
    ),
    "history_and_general": (
        "global_facts",
        "high_school_european_history",
        "high_school_us_history",
        "high_school_world_history",
        "prehistory",
        "world_religions",
    ),
    "psychology": ("high_school_psychology", "human_sexuality", "professional_psychology"),
    "sociology": ("public_relations", "sociology"),
    "legal_gov": (
        "high_school_government_and_politics",
        "international_law",
        "jurisprudence",
        "moral_disputes",
        "moral_scenarios",
        "professional_law",
        "us_foreign_policy",
    ),
    "other": ("logical_fallacies", "miscellaneous", "philosophy", "security_studies"),
}
MMLU_SUBJECTS = tuple(sorted([*(s for group in MMLU_GROUPS.values() for s in group), "high_school_geography"]))

_LETTERS = "JSON lines with query, choices and gold"
_PAIRS = "JSON lines with context_options, continuation and gold"
_BOTH = ("acc_norm", "acc")
_UNTIL: Mapping[str, Any] = {"do_sample": False, "temperature": 0.0}


def _tasks() -> list[Task]:
    answer = _choice(lambda q: f"{q.strip()}\nAnswer:")
    return [
        Task("arc_challenge", 25, _BOTH, ("arc/arc_challenge.jsonl",), _LETTERS, answer, ("arc_challenge",)),
        Task("arc_easy", 0, _BOTH, ("arc/arc_easy.jsonl",), _LETTERS, answer, ("arc_easy",)),
        Task(
            "hellaswag",
            10,
            _BOTH,
            ("hellaswag/hellaswag_val_subset1000.jsonl",),
            "JSON lines with activity_label, ctx_a, ctx_b, endings and label",
            _simple(_hellaswag),
            ("hellaswag",),
            remark="the file may be a subset of the 10,042 validation rows",
        ),
        Task(
            "mmlu",
            5,
            ("acc", "acc_norm"),
            tuple(f"mmlu/{s}/{name}_{s}.csv" for name in MMLU_SUBJECTS for s in ("test", "dev")),
            "question, four answers and a letter in each CSV row",
            _mmlu,
            tuple(f"mmlu_{name}" for name in MMLU_SUBJECTS),
            shots_from="dev",
            first_shots=True,
            groups=MMLU_GROUPS,
            remark="the CSV files of 2020 hold 37 test rows more than the released archive",
        ),
        Task(
            "truthfulqa_mc2",
            0,
            ("acc",),
            ("truthfulqa/mc_task.json",),
            "a list of question, mc1_targets and mc2_targets",
            _truthfulqa("mc2_targets"),
            ("truthfulqa_mc2",),
            process=_mc2,
        ),
        Task(
            "truthfulqa_mc1",
            0,
            ("acc",),
            ("truthfulqa/mc_task.json",),
            "a list of question, mc1_targets and mc2_targets",
            _truthfulqa("mc1_targets"),
            ("truthfulqa_mc1",),
        ),
        Task("race", 0, ("acc",), ("race/race.jsonl",), _LETTERS, _choice(), ("race",)),
        Task("piqa", 0, _BOTH, ("piqa/piqa.jsonl",), _LETTERS, answer, ("piqa",)),
        Task(
            "boolq",
            0,
            ("acc",),
            ("boolq/boolq.jsonl",),
            _LETTERS,
            _choice(lambda q: f"{q.removeprefix('Passage: ').strip()}\nAnswer:"),
            ("boolq",),
        ),
        Task(
            "siqa",
            0,
            _BOTH,
            ("siqa/siqa.jsonl",),
            _LETTERS,
            _choice(),
            ("social_iqa",),
            remark="llm-foundry's file has two lettered choices where the original has three: chance is 0.5",
        ),
        Task("openbookqa", 0, _BOTH, ("openbookqa/openbook_qa.jsonl",), _LETTERS, _choice(), ("openbookqa",)),
        Task(
            "winogrande",
            5,
            ("acc",),
            ("winogrande/winogrande.jsonl",),
            _PAIRS,
            _simple(_partial),
            ("winogrande",),
            output="contexts",
        ),
        Task(
            "wsc273",
            0,
            ("acc",),
            ("winogrande/winograd_wsc.jsonl",),
            _PAIRS,
            _simple(_partial),
            ("wsc273",),
            output="contexts",
        ),
        Task(
            "crows_pairs",
            0,
            ("pct_stereotype", "likelihood_diff"),
            ("crows_pairs/crows_pairs_anonymized.csv",),
            "CSV with sent_more, sent_less and bias_type",
            _crows_pairs,
            ("crows_pairs_english",),
            delimiter="",
            process=_stereotype,
            chance=0.5,
            group_field="bias_type",
        ),
        Task("copa", 0, ("acc",), ("copa/copa.jsonl",), _LETTERS, _choice(), ("copa",)),
        Task("swag", 0, _BOTH, ("swag/swag.jsonl",), _LETTERS, _choice(), ("swag",)),
        Task(
            "lambada",
            0,
            ("acc", "perplexity"),
            ("lambada/lambada_openai.jsonl",),
            "JSON lines with context and continuation",
            _simple(_lambada),
            ("lambada_openai",),
            output="loglikelihood",
            delimiter="",
        ),
        Task(
            "pubmedqa",
            0,
            ("acc",),
            ("pubmedqa/pubmed_qa_labeled.jsonl",),
            "JSON lines with context and continuation (yes, no, maybe)",
            _simple(_pubmedqa),
            ("pubmedqa",),
            remark="all 1,000 labelled rows, where the harness has the 500 of one fold",
        ),
        Task(
            "gsm8k",
            5,
            ("exact_match",),
            ("gsm8k/test.jsonl", "gsm8k/train.jsonl"),
            "JSON lines with question and answer",
            _gsm8k,
            ("gsm8k",),
            output="generate_until",
            shots_from="train",
            config={
                "generation_kwargs": {**_UNTIL, "until": ["Question:", "</s>", "<|im_end|>"]},
                "metric_list": [
                    {
                        "metric": "exact_match",
                        "aggregation": "mean",
                        "higher_is_better": True,
                        "ignore_case": True,
                        "ignore_punctuation": False,
                        "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"],
                    }
                ],
                "filter_list": [
                    {
                        "name": "strict-match",
                        "filter": [
                            {"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"},
                            {"function": "take_first"},
                        ],
                    },
                    {
                        "name": "flexible-extract",
                        "filter": [
                            {
                                "function": "regex",
                                "group_select": -1,
                                "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)",
                            },
                            {"function": "take_first"},
                        ],
                    },
                ],
            },
        ),
        Task(
            "triviaqa",
            5,
            ("exact_match",),
            ("triviaqa/triviaqa.jsonl",),
            "JSON lines with question (without its mark) and aliases",
            _simple(_triviaqa),
            ("triviaqa",),
            output="generate_until",
            process=_aliases,
            config={
                "generation_kwargs": {**_UNTIL, "until": ["\n", ".", ","]},
                "filter_list": [
                    {
                        "name": "remove_whitespace",
                        "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}],
                    }
                ],
            },
        ),
        Task(
            "drop",
            3,
            ("f1", "em"),
            ("drop/drop.jsonl",),
            "JSON lines with passage, question and answers (a list of lists of spans)",
            _simple(_drop),
            ("drop",),
            output="generate_until",
            delimiter="",
            process=_drop_scores,
            config={"generation_kwargs": {**_UNTIL, "until": ["."]}},
        ),
    ]


TASKS: Mapping[str, Task] = {task.name: task for task in _tasks()}

#: Where below its ``tasks`` the harness keeps those of `Task.builtin`, if not in a folder of our name.
FOLDERS: Mapping[str, str] = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "mmlu": "mmlu/default",
    "truthfulqa_mc1": "truthfulqa",
    "truthfulqa_mc2": "truthfulqa",
    "boolq": "super_glue/boolq",
    "copa": "super_glue/copa",
}

#: The task that is made of a run's own validation data.
HELDOUT = "heldout"

#: Sets of tasks by name (fact sheet 6.1).
SUITES: Mapping[str, tuple[str, ...]] = {
    "demo": (HELDOUT,),
    "amber-quick": ("arc_challenge", "hellaswag", "mmlu", "truthfulqa_mc2"),
    "amber-wandb": (
        "arc_challenge",
        "hellaswag",
        "mmlu",
        "truthfulqa_mc2",
        "race",
        "piqa",
        "boolq",
        "siqa",
        "openbookqa",
        "winogrande",
        "crows_pairs",
    ),
    "crystal": (
        "arc_challenge@25",
        "mmlu@5",
        "triviaqa@5",
        "winogrande@5",
        "gsm8k@5",
        "hellaswag@10",
        "drop@3",
        "arc_easy@0",
        "arc_challenge@0",
        "boolq@0",
        "winogrande@0",
        "openbookqa@0",
        "piqa@0",
        "truthfulqa_mc2@0",
        "race@0",
        "swag@0",
        "hellaswag@0",
        "copa@0",
        "mmlu@0",
    ),
    "crystal-code": ("humaneval", "mbpp"),
}
