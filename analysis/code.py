"""Does a model write code that works? HumanEval, MBPP and single lines filled in, by the unbiased pass@k.

    study = CodeTask.open("humaneval", benchmarks, CodeOptions(), target, note)

Completions are sampled, cut where a function ends, and run with the problem's tests in `analysis.sandbox`. Settings
are those with which CrystalCoder was measured in the BigCode harness (fact sheet 6.1): HumanEval at most 512 tokens
with the prompt, 20 samples at temperature 0.2; MBPP 16 samples at 0.1. That harness's default top-p, 0.95, is ours.
"""

import gzip
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from analysis.results import Scored, estimate
from analysis.sandbox import NONE, Limits, Sandbox
from analysis.subject import Subject, Target
from data.fim import Fim
from data.tokenizer import Tokenizer
from errors import UserError
from inference.batches import power
from inference.sampling import Sampling

FORMAT = 1  # of what a result means: prompts, cuts, scoring
TOO_LONG = "prompt too long"  # the reason of a sample that was never made
_NAMED = 20  # problems that a summary names at most
_DEFAULT_KS = (1, 10)
_PIECES = (64, 16, 4, 1)  # tokens that are generated at a time; the small ones where the context ends
_HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")
_DOCSTRING_STOPS = ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```")
_SHOTS_STOPS: tuple[str, ...] = ("[DONE]",)
_MBPP_SHOTS, _MBPP_TEST = (2, 3, 4), range(11, 511)  # task ids


@dataclass(frozen=True)
class CodeOptions:
    """How completions are sampled and run; None is the task's own default."""

    samples: int | None = None
    """Completions of each problem: 20 for HumanEval, 16 for MBPP."""
    temperature: float | None = None
    """0.2 for HumanEval, 0.1 for MBPP."""
    top_p: float = 0.95
    """Only the most likely tokens that together have this probability."""
    greedy: bool = False
    """One completion, always the most likely token."""
    k: tuple[int, ...] | None = None
    """Report pass@k for these; by default 1 and 10, as far as there are so many samples."""
    max_length: int | None = None
    """Most tokens of prompt and completion together: 512 for HumanEval."""
    max_new_tokens: int | None = None
    """Most tokens of a completion: 256 for MBPP, 64 for a line."""
    shots: int = 3
    """Solved problems before each of MBPP's: 3, or 0 for the docstring prompt of the BigCode harness."""
    fim_order: Literal["psm", "spm"] = "psm"
    """Lines: what the model sees first, prefix or suffix."""
    limit: int | None = None
    """Only so many problems, the same ones each time; those of a smaller number are among those of a larger one."""
    seed: int = 0
    """Same seed, same completions."""
    timeout_s: float | None = None
    """Seconds that a program may take: 3 for HumanEval, 10 for MBPP, of which one solution takes seconds."""
    memory_mib: int = 1024
    """Memory that a program may take."""
    workers: int = 2
    """Programs that run at a time."""
    unsafe: bool = False
    """Run programs without isolation: they can then read, change and send whatever you can."""

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_new_tokens is not None:
            raise UserError("code: give max_length or max_new_tokens, not both")
        for name in ("samples", "max_length", "max_new_tokens", "limit", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"code: {name}={value} must be at least 1")
        if self.k is not None and (not self.k or min(self.k) < 1):
            raise UserError(f"code: k={self.k} must be one or more numbers from 1 on")
        if self.shots not in (0, len(_MBPP_SHOTS)):
            raise UserError(f"code: shots={self.shots} must be {len(_MBPP_SHOTS)} or 0")
        if self.greedy and (self.samples not in (None, 1) or self.temperature not in (None, 0)):
            raise UserError("code: greedy means one sample at temperature 0; leave out samples and temperature")
        self.limits(1.0)
        Sampling(temperature=self.temperature or 0, top_p=self.top_p, seed=self.seed)

    def limits(self, seconds: float) -> Limits:
        """Of each program; `seconds` if none are given. UserError: they are none."""
        return Limits(seconds=seconds if self.timeout_s is None else self.timeout_s, memory_mib=self.memory_mib)


@dataclass(frozen=True)
class _Problem:
    """A program with a hole, and what the model sees of it."""

    task_id: str
    ids: list[int]  # the prompt's
    continues: bool  # whether a completion goes on in the middle of the prompt's text
    before: str
    after: str
    stops: tuple[str, ...]
    reference: str  # what was in the hole

    def text(self, tokenizer: Tokenizer, new: Sequence[int]) -> str:
        """The text of new ids."""
        if not self.continues:
            return tokenizer.decode(new)
        # The first new piece may begin with a space, which decoding drops at a text's begin.
        return tokenizer.decode([*self.ids, *new])[len(tokenizer.decode(self.ids)) :]

    def cut(self, text: str) -> str:
        """A text up to where it stops."""
        return text[: min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=len(text))]

    def program(self, completion: str) -> str:
        """The whole, with its tests."""
        return self.before + completion + self.after


@dataclass
class _Sample:
    """A completion while it is made."""

    problem: int
    number: int
    new: list[int] = field(default_factory=list)
    pieces: int = 0
    done: bool = False


@dataclass(frozen=True)
class _Kind:
    """What is known of a task by its name."""

    file: str
    fields: tuple[str, ...]
    samples: int
    temperature: float
    max_length: int | None
    max_new_tokens: int | None
    seconds: float  # that a program may take
    problems: Callable[[list[dict[str, Any]], CodeOptions, Tokenizer], list[_Problem]]


class CodeTask:
    """A study: one benchmark of code. Made by `open`.

    Attributes:
        name: ``humaneval``, ``mbpp`` or ``humaneval-fim``.
        problems: in the order of the file.
        samples: completions of each.
    """

    needs_weights = True

    def __init__(
        self,
        name: str,
        problems: list[_Problem],
        options: CodeOptions,
        sandbox: Sandbox,
        file: Mapping[str, str],
        target: Target,
    ):
        kind = KINDS[name]
        self.name, self.problems, self.options, self._sandbox, self._file = name, problems, options, sandbox, file
        self._tokenizer, self._context = target.tokenizer, target.model.context_length
        self._compute_dtype = target.region.compute_dtype
        self.samples = 1 if options.greedy else options.samples or kind.samples
        self.temperature = 0.0 if options.greedy else kind.temperature
        if options.temperature is not None:
            self.temperature = options.temperature
        self.ks = options.k or tuple(k for k in _DEFAULT_KS if k <= self.samples)
        if max(self.ks) > self.samples:
            raise UserError(f"{name}: pass@{max(self.ks)} needs as many samples, and there are {self.samples}")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(f"{name}: {self.samples} samples at temperature 0 are all the same; give --greedy")
        given = options.max_length or options.max_new_tokens
        self.max_length = options.max_length if given else kind.max_length
        self.max_new_tokens = options.max_new_tokens if given else kind.max_new_tokens
        if not any(map(self._allowed, problems)):
            shortest, room = min(len(p.ids) for p in problems), min(self._context, self.max_length or self._context)
            raise UserError(
                f"{name}: the shortest prompt has {shortest} tokens, and no more than {room} fit with a completion; "
                "study a model with a longer context, or give a larger max_length"
            )

    @classmethod
    def open(
        cls, name: str, benchmarks: Path, options: CodeOptions, target: Target, note: Callable[[str], None]
    ) -> "CodeTask":
        """Read a benchmark, and try out that programs can be isolated.

        Args:
            name: a key of `KINDS`.
            benchmarks: folder with ``humaneval/HumanEval.jsonl[.gz]`` and ``mbpp/mbpp.jsonl[.gz]``.
            options: how to sample.
            target: gives tokenizer and context.
            note: called with what a user should know before it begins.

        Raises:
            UserError: no such task or file, the tokenizer has no FIM tokens, settings that contradict each other, no
                prompt that fits.
            RunError: programs cannot be isolated here, and not `options.unsafe`.
        """
        if name not in KINDS:
            raise UserError(f"no code task {name!r}; there are {', '.join(KINDS)}")
        kind = KINDS[name]
        rows, file = _read(benchmarks, kind)
        problems = kind.problems(rows, options, target.tokenizer)
        if options.limit is not None:
            chosen = sorted(_hash(p.task_id) for p in problems)[: options.limit]
            problems = [p for p in problems if _hash(p.task_id) in chosen]
        if not problems:
            raise UserError(f"{file['file']}: has no problems of {name}; fetch it again")
        task = cls(name, problems, options, Sandbox(options.limits(kind.seconds), options.unsafe), file, target)
        if not task.settings()["isolated"]:
            note(f"{name}: programs are run WITHOUT isolation, as --unsafe says")
        if lost := [p.task_id for p in problems if not task._allowed(p)]:
            note(f"{name}: {len(lost)} of {len(problems)} prompts do not fit in the context, and count as failed")
        return task

    @property
    def kind(self) -> str:
        """Where its results are."""
        return f"evaluate/{self.name}"

    def settings(self) -> dict[str, Any]:
        """All on which completions and their scores depend besides the checkpoint. RunError: no isolation here."""
        chosen = ("top_p", "limit", "seed", "shots", "fim_order")
        return {
            "format": FORMAT,
            "task": self.name,
            **self._file,
            "problems": len(self.problems),
            "samples": self.samples,
            "temperature": self.temperature,
            "k": list(self.ks),
            "max_length": self.max_length,
            "max_new_tokens": self.max_new_tokens,
            **{name: getattr(self.options, name) for name in chosen},
            "limits": asdict(self._sandbox.limits),
            "isolated": self._sandbox.isolation != NONE,
            "tokenizer": self._tokenizer.sha256,
            "compute_dtype": self._compute_dtype,
        }

    def score(self, subject: Subject) -> Scored:
        """Sample, run, and count. RunError: a program could not be started."""
        completions = self.complete(subject)
        made = [(p, c) for p, cs in zip(self.problems, completions, strict=True) for c in cs if c is not None]
        verdicts = iter(self._sandbox.run_many([p.program(c) for p, c in made], self.options.workers))
        rows: list[dict[str, Any]] = []
        for problem, texts in zip(self.problems, completions, strict=True):
            for sample, text in enumerate(texts):
                row: dict[str, Any] = {"task_id": problem.task_id, "sample": sample, "completion": text or ""}
                if text is None:
                    rows.append(row | {"passed": False, "reason": TOO_LONG})
                else:
                    verdict = next(verdicts)
                    rows.append(row | {"passed": verdict.passed, "reason": verdict.reason})
        return Scored(self._summary(rows), {"samples": pa.Table.from_pylist(rows, _SAMPLES)})

    def complete(self, subject: Subject) -> list[list[str | None]]:
        """The completions of each problem, cut where they stop; None for each of one whose prompt does not fit.

        They are made in pieces, so that one that is through with its function is not continued. A piece's seed depends
        on the seed, the problem and the sample's and its own number alone: neither a batch nor `limit` changes it.
        """
        samples = [_Sample(n, s) for n, p in enumerate(self.problems) if self._allowed(p) for s in range(self.samples)]
        left = samples
        while left:
            groups: dict[tuple[int, int], list[_Sample]] = {}  # of few shapes, since each is compiled
            for sample in left:
                groups.setdefault(self._shape(sample), []).append(sample)
            for (piece, _), group in groups.items():
                self._continue(subject, piece, group)
            left = [sample for sample in left if not sample.done]
        found: list[list[str | None]] = [[None] * self.samples for _ in self.problems]
        for sample in samples:
            problem = self.problems[sample.problem]
            new = sample.new[: self._allowed(problem)]
            found[sample.problem][sample.number] = problem.cut(problem.text(self._tokenizer, new))
        return found

    def _continue(self, subject: Subject, piece: int, group: list[_Sample]) -> None:
        rows = group + [group[-1]] * (_rows(len(group)) - len(group))
        prompts = [[*self.problems[sample.problem].ids, *sample.new] for sample in rows]
        names = [(self.problems[sample.problem].task_id, sample.number, sample.pieces) for sample in rows]
        sampling = Sampling(piece, temperature=self.temperature, top_p=self.options.top_p)
        made = subject.generate(prompts, sampling, seeds=[_seed(self.options.seed, *name) for name in names])
        for sample, ids in zip(group, made):  # what is made beyond them only fills up the batch
            problem = self.problems[sample.problem]
            sample.new += ids
            sample.pieces += 1
            ended = len(ids) < piece or len(sample.new) >= self._allowed(problem)
            text = "" if ended else problem.text(self._tokenizer, sample.new)
            sample.done = ended or problem.cut(text) != text

    def _shape(self, sample: _Sample) -> tuple[int, int]:
        """Tokens to generate next, perhaps more than are still allowed, and the width of the prompt's batch."""
        problem = self.problems[sample.problem]
        length = len(problem.ids) + len(sample.new)
        wanted = self._allowed(problem) - len(sample.new)
        enough = [p for p in _PIECES if p >= wanted] or [_PIECES[0]]
        return next(p for p in _PIECES if p <= min(enough[-1], self._context - length)), power(length)

    def _allowed(self, problem: _Problem) -> int:
        """Most new tokens; 0 if the prompt does not fit."""
        room = min(self._context, self.max_length or self._context) - len(problem.ids)
        return max(0, room if self.max_new_tokens is None else min(room, self.max_new_tokens))

    def _summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        passed = Counter(row["task_id"] for row in rows if row["passed"])
        lost = [p.task_id for p in self.problems if not self._allowed(p)]
        summary: dict[str, Any] = {}
        for k in self.ks:
            of_problems = [pass_at_k(self.samples, passed[p.task_id], k) for p in self.problems]
            summary[f"pass@{k}"] = estimate(of_problems)
        if self.name == "humaneval-fim":
            same = Counter(
                row["task_id"]
                for row, problem in zip(rows, (p for p in self.problems for _ in range(self.samples)), strict=True)
                if row["completion"].rstrip() == problem.reference.rstrip() and row["reason"] != TOO_LONG
            )
            summary["exact_match"] = estimate([same[p.task_id] / self.samples for p in self.problems])
        return summary | {
            "problems": len(self.problems),
            "samples": self.samples,
            "temperature": self.temperature,
            "top_p": self.options.top_p,
            "isolation": self._sandbox.isolation,
            "reasons": dict(sorted(Counter(row["reason"] for row in rows).items())),
            "too_long": {"problems": len(lost), "task_ids": lost[:_NAMED]},
        }


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that one of k samples passes, estimated without bias from more of them (arXiv:2107.03374, 2.1).

    That is 1 - C(samples - passed, k) / C(samples, k): the share of subsets of k in which one passed.
    """
    if not 1 <= k <= samples or not 0 <= passed <= samples:
        raise ValueError(f"pass@{k} of {passed} passed of {samples}")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


def _rows(number: int) -> int:
    """As many rows or more: 1, 4, 16, or a multiple of 64."""
    return next((rows for rows in (1, 4, 16) if rows >= number), -(-number // 64) * 64)


def _seed(*parts: int | str) -> int:
    return int(_hash(json.dumps(parts))[:8], 16)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(benchmarks: Path, kind: _Kind) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The rows of a benchmark; its file and the SHA-256 of its text, which is not that of the gzip file."""
    plain = benchmarks / kind.file
    packed = plain.with_name(f"{plain.name}.gz")
    path = plain if plain.is_file() else packed
    try:
        content = path.read_bytes() if path == plain else gzip.decompress(path.read_bytes())
    except FileNotFoundError as e:
        raise UserError(f"{plain}: not there, nor {packed.name}; --benchmarks must name a folder that has it") from e
    except (OSError, EOFError) as e:
        raise UserError(f"{path}: cannot be read ({e}); fetch it again") from e
    rows = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            if missing := [field for field in kind.fields if field not in row]:
                raise ValueError(f"no {', '.join(missing)}")
        except (ValueError, TypeError) as e:
            raise UserError(f"{path}, line {number}: not a problem of this benchmark ({e}); fetch it again") from e
        rows.append(row)
    return rows, {"file": kind.file, "sha256": hashlib.sha256(content).hexdigest()}


def _humaneval(rows: list[dict[str, Any]], options: CodeOptions, tokenizer: Tokenizer) -> list[_Problem]:
    """The prompt without the white space around it, as the BigCode harness gives it."""
    prompts = [row["prompt"].strip() for row in rows]
    return [
        _Problem(
            task_id=row["task_id"],
            ids=ids,
            continues=True,
            before=prompt,
            after=_check(row),
            stops=_HUMANEVAL_STOPS,
            reference="\n" + row["canonical_solution"],
        )
        for row, prompt, ids in zip(rows, prompts, tokenizer.encode_many(prompts), strict=True)
    ]


def _humaneval_fim(rows: list[dict[str, Any]], options: CodeOptions, tokenizer: Tokenizer) -> list[_Problem]:
    """One line of each solution is to be filled in (arXiv:2207.14255, 4); a hash of the problem's name says which one.

    Each part is a text of its own, in the order of `data.fim`, and what is generated ends with ``</s>`` or the line.
    """
    try:
        fim = Fim.of(tokenizer)
    except UserError as e:
        raise UserError(f"{tokenizer.path}: lacks the tokens of fill-in-the-middle (CrystalCoder's has them)") from e
    problems = []
    for row in rows:
        lines = row["canonical_solution"].splitlines()
        some = [n for n, line in enumerate(lines) if line.strip() and not line.strip().startswith("#")]
        hole = some[int(_hash(row["task_id"]), 16) % len(some)]
        prefix = row["prompt"] + "".join(f"{line}\n" for line in lines[:hole])
        suffix = "".join(f"\n{line}" for line in lines[hole + 1 :]) + "\n"
        before, after = tokenizer.encode_many([prefix, suffix])
        if options.fim_order == "psm":
            ids = [fim.prefix_id, *before, fim.suffix_id, *after, fim.middle_id]
        else:
            ids = [fim.prefix_id, fim.suffix_id, *after, fim.middle_id, *before]
        problems.append(_Problem(row["task_id"], ids, False, prefix, suffix + _check(row), ("\n",), lines[hole]))
    return problems


def _check(row: dict[str, Any]) -> str:
    return f"\n{row['test']}\ncheck({row['entry_point']})\n"


def _mbpp(rows: list[dict[str, Any]], options: CodeOptions, tokenizer: Tokenizer) -> list[_Problem]:
    """The 500 test problems (task ids 11 to 510), after three solved ones as in lm-evaluation-harness, or alone."""
    by_id = {row["task_id"]: row for row in rows}
    if missing := [i for i in _MBPP_SHOTS if i not in by_id]:
        raise UserError(f"MBPP: has no task {', '.join(map(str, missing))}, which prompts begin with; fetch it again")
    shots = "".join(_asked(by_id[i]) + f"{_code(by_id[i])}\n[DONE]\n\n" for i in _MBPP_SHOTS)
    rows = [row for row in rows if row["task_id"] in _MBPP_TEST]
    prompts, stops = [shots + _asked(row) for row in rows], _SHOTS_STOPS
    if not options.shots:
        prompts, stops = [f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n' for row in rows], _DOCSTRING_STOPS
    return [
        _Problem(
            task_id=f"MBPP/{row['task_id']}",
            ids=ids,
            continues=True,
            before="" if options.shots else prompt,
            after="\n".join(["", row["test_setup_code"].replace("\r\n", "\n"), *row["test_list"], ""]),
            stops=stops,
            reference=_code(row),
        )
        for row, prompt, ids in zip(rows, prompts, tokenizer.encode_many(prompts), strict=True)
    ]


def _asked(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:"
        f"\n\n{tests}\n[BEGIN]\n"
    )


def _code(row: dict[str, Any]) -> str:
    return row["code"].replace("\r\n", "\n")


_SAMPLES = pa.schema(
    [
        ("task_id", pa.string()),
        ("sample", pa.int32()),
        ("completion", pa.string()),
        ("passed", pa.bool_()),
        ("reason", pa.string()),
    ]
)
_HUMANEVAL_FILE = ("humaneval/HumanEval.jsonl", ("task_id", "prompt", "entry_point", "canonical_solution", "test"))
_MBPP_FILE = ("mbpp/mbpp.jsonl", ("task_id", "text", "code", "test_setup_code", "test_list"))
KINDS: dict[str, _Kind] = {
    "humaneval": _Kind(*_HUMANEVAL_FILE, 20, 0.2, 512, None, 3.0, _humaneval),
    "mbpp": _Kind(*_MBPP_FILE, 16, 0.1, None, 256, 10.0, _mbpp),
    "humaneval-fim": _Kind(*_HUMANEVAL_FILE, 20, 0.2, None, 64, 3.0, _humaneval_fim),
}
