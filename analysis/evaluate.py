"""Benchmarks over a series: tasks are read, rendered and tokenized once, and asked of every checkpoint.

    python run.py evaluate RUN@all --tasks demo
    python run.py evaluate RUN@all --tasks amber-quick --benchmarks DIR

lm-evaluation-harness brings the tasks, metrics and filters; what it asks is answered by `analysis.harness`, from a
checkpoint. Each task is a study of its own, kind ``evaluate/TASK`` (``evaluate/TASK@N`` with other shots than its own),
with a row for each item beside the summary, so that checkpoints can be compared item by item (`paired`).
"""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa

from analysis import suites
from analysis.code import KINDS, CodeOptions, CodeTask
from analysis.drawing import SEED, chosen, seed, sha256
from analysis.harness import MAX_NEW_TOKENS, check_ties, harness, open_lm
from analysis.heldout import HeldOut
from analysis.results import Scored, estimate
from analysis.subject import AddBos, Subject, Target
from analysis.suites import FOLDERS, HELDOUT, TASKS, Asked, Part, Row, Task, doc_hash
from analysis.sweep import Study
from errors import RunError, UserError

Note = Callable[[str], None]

FORMAT = 1  # of what a result means: prompts, drawing of rows and examples, scoring


@dataclass(frozen=True)
class Evaluate:
    """Benchmarks by lm-evaluation-harness: amber-quick, amber-wandb, crystal, crystal-code, demo, or single tasks."""

    tasks: tuple[str, ...] = ("demo",)
    """Tasks and suites; arc_challenge@0 is the task with no examples before the question."""
    benchmarks: Path | None = None
    """Folder with the benchmarks' files; without one, the harness fetches its own data by the network."""
    limit: int | None = None
    """Only so many rows of each task (of each subject of MMLU, and of all together in heldout), drawn at random, the
    same ones each time."""
    shots: int | None = None
    """Solved examples before each question, instead of each task's own number; not where --tasks has TASK@N."""
    skip_missing: bool = False
    """Leave out tasks whose files are not there, instead of stopping."""
    add_bos: AddBos = "auto"
    """Put <s> before each text: auto does as the published evaluations did (Amber yes, Crystal no)."""
    max_new_tokens: int | None = None
    """Most tokens of generated answers, instead of each task's own number (256)."""
    code: CodeOptions = field(default_factory=CodeOptions)
    """Of humaneval, mbpp and humaneval-fim."""

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"evaluate: {name}={value} must be at least 1")
        if self.shots is not None and self.shots < 0:
            raise UserError(f"evaluate: shots={self.shots} must be 0 or more")
        suites.resolve(self.tasks)

    def open(self, target: Target, note: Note) -> list[Study]:
        """A study of each task.

        Raises:
            UserError: unknown tasks, missing files or ones of another layout, no tokenizer or one that does not fit,
                the harness is not installed or cannot fetch its data.
        """
        asked = self._present(suites.resolve(self.tasks, self.shots), note)
        if code := [one.name for one in asked if one.name in KINDS]:
            given = [f for f, on in (("--shots", self.shots is not None), ("--add-bos", self.add_bos != "auto")) if on]
            if given:
                note(f"{' and '.join(given)}: not for {', '.join(code)} (--code.* are their flags)")
        online = {} if self.benchmarks else _fetched([a for a in asked if a.name in TASKS])
        studies: list[Study] = []
        for one in asked:
            if one.name == HELDOUT:
                studies.append(HeldOut.open(target, self.limit, note))
            elif one.name in KINDS:
                assert self.benchmarks is not None  # `_present` saw to it
                studies.append(CodeTask.open(one.name, self.benchmarks, self._code(), target, note))
            else:
                studies.append(Benchmark(one, self, target, online.get(one), note))
        return studies

    def _code(self) -> CodeOptions:
        """Those of code, with what is said for all tasks where they say nothing."""
        code = dataclasses.replace(self.code, limit=self.code.limit or self.limit)
        if code.max_length is None and code.max_new_tokens is None:
            code = dataclasses.replace(code, max_new_tokens=self.max_new_tokens)
        return code

    def _present(self, asked: list[Asked], note: Note) -> list[Asked]:
        lost: dict[Asked, str] = {}
        for one in asked:
            if one.name in KINDS and self.benchmarks is None:
                raise UserError(f"{one.name}: needs its file: give --benchmarks DIR")
            if self.benchmarks is None:
                continue
            if one.name in KINDS and not any(self.benchmarks.glob(f"{_CODE_FILES[one.name]}*")):
                lost[one] = _CODE_FILES[one.name]
            if one.name in TASKS and (missing := TASKS[one.name].missing(self.benchmarks)):
                task = TASKS[one.name]
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                lost[one] = f"{missing[0]}{more}, {task.layout}"
        if lost:
            if not self.skip_missing:
                listed = "".join(f"\n  {one.name}: {what}" for one, what in lost.items())
                raise UserError(
                    f"{self.benchmarks}: files are missing:{listed}\nadd them, or leave these tasks out with "
                    "--skip-missing"
                )
            note(f"left out, since their files are missing: {', '.join(dict.fromkeys(o.name for o in lost))}")
        if not (left := [one for one in asked if one not in lost]):
            raise UserError(f"{self.benchmarks}: has the files of none of these tasks")
        return left


_CODE_FILES = {name: kind.file for name, kind in KINDS.items()}


def paired(a: pa.Table, b: pa.Table, metric: str) -> tuple[float, float | None, int]:
    """How much better the same items went in another checkpoint: far less noise than two scores have.

    Args:
        a: table ``items`` of a result.
        b: that of another one of the same task.
        metric: a column of both, ``acc``.

    Returns:
        Mean of b - a over the items of both, its standard error (None of one item), and their number. Items of which
        one has no figure are left out: of a task with several filters, each has its own rows.

    Raises:
        UserError: no such column, no common items, or items that were asked in another way.
    """
    for table in (a, b):
        if metric not in table.column_names:
            raise UserError(f"no per-item {metric!r}; there are {', '.join(table.column_names)}")
    names = ["part", "doc_id", "doc_hash", "filter"]
    first, second = (
        {tuple(row[n] for n in names): row for row in t.select([*names, "prompt_hash", metric]).to_pylist()}
        for t in (a, b)
    )
    common = [k for k in first if k in second and first[k][metric] is not None and second[k][metric] is not None]
    if not common:
        raise UserError("the two results have no item in common")
    if any(first[key]["prompt_hash"] != second[key]["prompt_hash"] for key in common):
        raise UserError("the items were asked with other prompts (shots?), and cannot be compared")
    found = estimate([second[key][metric] - first[key][metric] for key in common])
    return found["value"], found["stderr"], found["n"]


# ---- tasks of the harness ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """A row and what is asked about it."""

    row: Row
    facts: dict[str, Any]
    """Columns of the item's table that no checkpoint changes."""
    requests: list[Any]


@dataclass(frozen=True)
class _Built:
    """A part, rendered."""

    name: str
    task: Any
    """The harness's."""
    items: list[_Item]

    @property
    def requests(self) -> list[Any]:
        """Of all items."""
        return [r for item in self.items for r in item.requests]


class Benchmark:
    """A study: one task of the harness.

    Args:
        asked: which task, with how many examples.
        options: limit, folder and so on.
        target: gives tokenizer and context.
        fetched: the harness's own tasks, if there is no folder; of this study alone.
        note: called with what a user should know about the task when it is rendered.

    Raises:
        UserError: the files are not of the layout, there are too few examples, new tokens do not fit.
    """

    needs_weights = True

    def __init__(self, asked: Asked, options: Evaluate, target: Target, fetched: list[Any] | None, note: Note):
        self.task: Task = TASKS[asked.name]
        self.shots = self.task.shots if asked.shots is None else asked.shots
        self._options, self._fetched, self._note = options, fetched, note
        self._dtype = target.region.compute_dtype
        self._version = harness()
        self._parts: dict[str, Part] = {}
        self._data: dict[str, str] = {}
        if fetched is None:
            assert options.benchmarks is not None
            self._parts = self.task.read(options.benchmarks)
            self._data = {n: sha256((options.benchmarks / n).read_bytes()) for n in self.task.files}
            for name, part in self._parts.items():
                if (pool := len(part.shots if part.shots is not None else part.rows[1:])) < self.shots:
                    raise UserError(
                        f"{self.task.name} {name}: {self.shots} examples are asked for, and {pool} are there"
                    )
        else:
            rows = {t.config.task: t.eval_docs for t in fetched}
            if self.shots:
                rows |= {f"{t.config.task}: examples": t.fewshot_docs() for t in fetched}
            self._data = {name: sha256("".join(map(doc_hash, docs)).encode()) for name, docs in rows.items()}
        tokenizer = target.tokenizer
        self._tokenizer_sha256 = tokenizer.sha256
        self._lm = open_lm(
            tokenizer, target.model.context_length, target.begins_with_bos(options.add_bos), options.max_new_tokens
        )
        if self.task.output == "generate_until":
            self._lm.prompt("", options.max_new_tokens or MAX_NEW_TOKENS)
        self._built: list[_Built] = []
        self._cut = 0

    @property
    def kind(self) -> str:
        """Where its results are."""
        own = self.shots == self.task.shots
        return f"evaluate/{self.task.name}" if own else f"evaluate/{self.task.name}@{self.shots}"

    def settings(self) -> dict[str, Any]:
        """All on which scores depend besides the checkpoint."""
        return {
            "format": FORMAT,
            "task": self.task.name,
            "lm_eval": self._version,
            "shots": self.shots,
            "shots_from": self._shots_from,
            "limit": self._options.limit,
            "rows": "all" if self._options.limit is None else "a random sample, the same for every checkpoint",
            "seed": SEED,
            "add_bos": self._lm.add_bos,
            "max_new_tokens": self._options.max_new_tokens if self.task.output == "generate_until" else None,
            "from": "files" if self._fetched is None else "the harness's own data",
            "sha256": self._data if len(self._data) < 5 else sha256("".join(self._data.values()).encode()),
            "tokenizer": self._tokenizer_sha256,
            "compute_dtype": self._dtype,
        }

    def score(self, subject: Subject) -> Scored:
        """Ask everything of a checkpoint.

        Raises:
            RunError: something that is asked does not fit in the context, the model's numbers are not finite, or it
                cannot tell choices apart.
        """
        try:
            built = self._build()
            self._ask(subject, built)
        except UserError as e:  # prompts are made at the first checkpoint; other tasks may go on
            raise RunError(f"{self.task.name} cannot be asked: {e}") from e
        rows: list[dict[str, Any]] = []
        figures: dict[str, dict[str, Any]] = {}
        for part in built:
            of_part, figures[part.name] = _processed(part)
            rows += of_part
        return Scored(self._summary(rows, figures, self._ties(built)), {"items": _table(rows)})

    # ---- once ------------------------------------------------------------------------------------------------------

    @property
    def _shots_from(self) -> str | None:
        if not self.shots:
            return None
        return self.task.shots_from if self._fetched is None else "the harness's own split"

    def _build(self) -> list[_Built]:
        if not self._built:
            tasks = self._fetched
            if tasks is None:
                tasks = [_local(self.task, name, part, self.shots) for name, part in self._parts.items()]
            names = list(self._parts) or ([""] if len(tasks) == 1 else list(suites.MMLU_SUBJECTS))
            built = [self._rendered(name, task) for name, task in zip(names, tasks, strict=True)]
            requests = [r for part in built for r in part.requests]
            self._cut = self._lm.cut(requests)
            self._built = built  # not before all is known to fit
            if self._cut:
                self._note(
                    f"{self.task.name}: {self._cut} of {len(requests)} prompts are longer than the model's context of "
                    f"{self._lm.context_length}, and begin later than they should"
                )
        return self._built

    def _rendered(self, part: str, task: Any) -> _Built:
        task.set_config(key="num_fewshot", value=self.shots)
        docs = list(task.eval_docs)
        items = []
        for number in chosen(len(docs), self._options.limit, self.task.name, part):
            doc, digest = docs[number], doc_hash(docs[number])
            # Examples depend on the row alone, so that a limit changes none of them.
            task.sampler.set_rnd(seed(SEED, digest))
            context = task.fewshot_context(doc, num_fewshot=self.shots, gen_prefix=task.doc_to_prefix(doc))
            made = task.construct_requests(
                doc=doc, ctx=context, metadata=(task.config.task, number, task.config.repeats)
            )
            requests = made if isinstance(made, list) else [made]
            asked = "\0".join(str(argument) for r in requests for argument in r.args)
            target = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            facts = {
                "part": part,
                "doc_id": number,
                "doc_hash": digest,
                "prompt_hash": sha256(asked.encode()),
                "target": target if type(target) is int else str(target),
            }
            if self.task.group_field:
                facts["group"] = str(doc.get(self.task.group_field))
            items.append(_Item(doc, facts, requests))
        return _Built(part, task, items)

    # ---- for each checkpoint ---------------------------------------------------------------------------------------

    def _ask(self, subject: Subject, built: list[_Built]) -> None:
        by_type: dict[str, list[Any]] = defaultdict(list)
        for part in built:
            for request in part.requests:
                request.resps, request.filtered_resps = [], {}
                by_type[request.request_type] += [request] * request.repeats
        self._lm.subject = subject
        try:
            for request_type, requests in by_type.items():
                answers = getattr(self._lm, request_type)(requests)
                for request, answer in zip(requests, answers, strict=True):
                    request.resps.append(answer)
        finally:
            self._lm.subject = None  # it holds weights
        assert all(len(r.resps) == r.repeats for part in built for r in part.requests), "one request, one study"

    def _ties(self, built: list[_Built]) -> int | None:
        if self.task.output not in ("multiple_choice", "contexts"):
            return None
        # Choices of the same text tie in any model; ARC's file repeats one where there are three.
        items = [i for part in built for i in part.items if len({r.args for r in i.requests}) == len(i.requests)]
        scores = [[r.resps[0][0] for r in item.requests] for item in items]
        return check_ties(scores, [[self._lm.scored_tokens(r.args) for r in item.requests] for item in items])

    def _summary(
        self, rows: list[dict[str, Any]], figures: dict[str, dict[str, Any]], ties: int | None
    ) -> dict[str, Any]:
        parts = list(figures)
        headline = next(n for n in figures[parts[0]] if n.split(".")[0] == self.task.metrics[0])
        summary: dict[str, Any] = {"headline": headline}
        if len(parts) == 1:
            summary |= figures[parts[0]]
        else:
            for name in figures[parts[0]]:
                summary[name] = _mean_of([figures[part][name] for part in parts])
                summary[f"{name}_pooled"] = estimate(row[name] for row in rows)
            whole = {n: members for n, members in self.task.groups.items() if set(members) <= set(parts)}
            summary["groups"] = {n: _mean_of([figures[p][headline] for p in members]) for n, members in whole.items()}
            summary["subjects"] = {part: figures[part][headline] for part in parts}
        if self.task.group_field and self._fetched is None:
            values: dict[str, list[float]] = defaultdict(list)
            for row in rows:
                values[row["group"]].append(row[headline])
            summary[f"by_{self.task.group_field}"] = {name: estimate(v) for name, v in sorted(values.items())}
        requests = sum(len(item.requests) for part in self._built for item in part.items)
        return summary | {
            "chance": self._chance(),
            "shots": self.shots,
            "shots_from": self._shots_from,
            "filter": sorted({row["filter"] for row in rows}),
            "cut": {"requests": self._cut, "of": requests},
            "ties": ties,
            "remark": self.task.remark if self._fetched is None else "",
        }

    def _chance(self) -> float | None:
        if self.task.process or self.task.output not in ("multiple_choice", "contexts"):
            return self.task.chance
        return float(np.mean([1 / len(item.requests) for part in self._built for item in part.items]))


class _Examples:
    """The harness's sampler of solved examples, where we say what they are drawn from."""

    def __init__(self, task: Task, part: Part):
        self._task, self._rows = task, part.rows if part.shots is None else part.shots
        self._apart = part.shots is None
        self._random = Random(SEED)

    def set_rnd(self, rnd: int | None) -> "_Examples":
        """Begin to draw anew."""
        self._random = Random(rnd)
        return self

    def sample(self, n: int, eval_doc: Row | None = None, **_: Any) -> list[Row]:
        """Rows other than the scored one and its like: WinoGrande has each sentence twice, with two right answers."""
        if self._task.first_shots:
            return self._rows[:n]
        order = self._random.sample(range(len(self._rows)), min(len(self._rows), n + 8))
        rest = [] if len(order) == len(self._rows) else sorted(set(range(len(self._rows))) - set(order))
        found: list[Row] = []
        for number in [*order, *rest]:
            if len(found) == n:
                break
            if not self._apart or eval_doc is None or self._like(self._rows[number]) != self._like(eval_doc):
                found.append(self._rows[number])
        if len(found) < n:
            raise UserError(f"{self._task.name}: {n} examples are asked for, and {len(found)} are there")
        return found

    def _like(self, row: Row) -> tuple[Any, ...]:
        return tuple(row["choices"]) if self._task.output == "contexts" else (row["query"], str(row.get("choices")))


def _local(task: Task, name: str, part: Part, shots: int) -> Any:
    """The harness's task over our rows."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    contexts = task.output == "contexts"
    config: dict[str, Any] = {
        "task": f"{task.name}_{name}" if name else task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(part.rows)},
        "output_type": "multiple_choice" if contexts else task.output,
        "test_split": "test",
        "fewshot_split": "test",
        "description": part.description,
        "target_delimiter": task.delimiter,
        "num_fewshot": shots,
        "doc_to_text": "gold" if contexts else "query",
        "doc_to_target": "continuation" if contexts else "gold" if task.output == "multiple_choice" else "target",
        "metric_list": [
            {"metric": m, "aggregation": "perplexity" if m == "perplexity" else "mean", "higher_is_better": True}
            for m in task.metrics
        ],
        "metadata": {"version": FORMAT},
        **copy.deepcopy(dict(task.config)),
    }
    if contexts or task.output == "multiple_choice":
        config["doc_to_choice"] = "choices"
    if task.process:
        config["process_results"] = task.process
    made = ConfigurableTask(config=config)
    made.sampler = _Examples(task, part)
    return made


def _fetched(asked: list[Asked]) -> dict[Asked, list[Any]]:
    """The harness's own tasks: objects of its own for each study, since they keep its prompts and answers."""
    if not asked:
        return {}
    manager, found = task_manager([one.name for one in asked]), {}
    for one in asked:
        names = list(TASKS[one.name].builtin)
        try:
            found[one] = list(manager.load(names)["tasks"].values())
        except Exception as e:  # it raises what its many libraries do
            raise UserError(
                f"{one.name}: the harness cannot fetch its data by the network ({type(e).__name__}: {e}); give files "
                "with --benchmarks DIR"
            ) from e
        for task in found[one]:
            _with_metrics(task, TASKS[one.name])
    return found


def _with_metrics(made: Any, task: Task) -> None:
    """Add those metrics of ours that the harness's own task leaves out: ``acc_norm`` of Social IQa and MMLU.

    Raises:
        UserError: it lacks the one that is reported.
    """
    from lm_eval.api.registry import get_metric, get_metric_aggregation, is_higher_better

    if task.output == "multiple_choice" and made.config.process_results is None:
        for name in task.metrics:
            if name not in made._metric_fn_list:
                made._metric_fn_list[name], made._metric_fn_kwargs[name] = get_metric(name), {}
                made._aggregation_list[name] = get_metric_aggregation(name)
                made._higher_is_better[name] = is_higher_better(name)
    if task.metrics[0] not in made.aggregation():
        raise UserError(
            f"{task.name}: the harness's own task has no {task.metrics[0]}; give files with --benchmarks DIR"
        )


def task_manager(names: Sequence[str]) -> Any:
    """The harness's manager of its own tasks, of these of ours alone: all 14,683 take it 10 s to find."""
    harness()
    from lm_eval import tasks

    root = Path(tasks.__file__).parent
    folders = dict.fromkeys(str(root / FOLDERS.get(name, name)) for name in names)
    return tasks.TaskManager(include_path=list(folders), include_defaults=False)


def _processed(part: _Built) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the items' table, and estimates of the metrics."""
    part.task._instances = part.requests
    part.task.apply_filters()
    aggregation = part.task.aggregation()
    filters = list(part.task.instances[0].filtered_resps)
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {}
    for kept in filters:
        values: dict[str, list[Any]] = defaultdict(list)
        for item in part.items:
            said = [r.filtered_resps[kept] for r in item.requests]
            metrics = part.task.process_results(item.row, said)
            row = item.facts | {"filter": kept} | _said(item, said)
            for name, value in metrics.items():
                values[name].append(value)
                if isinstance(value, int | float | np.number):
                    row[_label(name, kept, filters)] = float(value)
            rows.append(row)
        for name, of_items in values.items():
            figures[_label(name, kept, filters)] = _aggregated(of_items, aggregation.get(name))
    for row in rows:  # of several filters each has its column, in its own rows
        row |= {name: None for name in figures if name not in row}
    return rows, figures


def _label(metric: str, kept: str, filters: Sequence[str]) -> str:
    return metric if len(filters) == 1 else f"{metric}.{kept}"


def _said(item: _Item, said: list[Any]) -> dict[str, Any]:
    """Columns of what the model said."""
    if item.requests[0].request_type == "generate_until":
        return {"prediction": str(said[0])}
    scores = [float(answer[0]) if isinstance(answer, tuple) else float(answer) for answer in said]
    return {"logprobs": scores, "prediction": int(np.argmax(scores))} if len(scores) > 1 else {"logprobs": scores}


def _aggregated(values: list[Any], how: Any) -> dict[str, Any]:
    from lm_eval.api.metrics import mean, perplexity

    if how in (None, mean):
        return estimate(values)
    if how is perplexity:
        found = estimate(values)  # of log-probabilities; the error of their exponential to first order
        ppl = math.exp(min(700.0, -found["value"]))
        return {"value": ppl, "stderr": None if found["stderr"] is None else ppl * found["stderr"], "n": found["n"]}
    value = float(how(values))
    return {"value": value if math.isfinite(value) else None, "stderr": None, "n": len(values)}


def _mean_of(estimates: list[dict[str, Any]]) -> dict[str, Any]:
    """Plain mean of independent estimates, whatever their sizes."""
    errors = [e["stderr"] for e in estimates]
    stderr = None if None in errors else math.sqrt(sum(e**2 for e in errors)) / len(errors)
    return {
        "value": float(np.mean([e["value"] for e in estimates])),
        "stderr": stderr,
        "n": sum(e["n"] for e in estimates),
    }


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    if len({type(row["target"]) for row in rows}) > 1:
        rows = [row | {"target": str(row["target"])} for row in rows]
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})
