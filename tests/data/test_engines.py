"""Tasks are done once, whatever is killed, and every engine gives the same results and the same errors."""

import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data import engines
from data.chunks import written
from data.engines import Beam, Engine, Local, Task, perform, run_all
from errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60  # of what should take a second; reached only by a failure

needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="runs on Apache Beam; pip install -e '.[scale]'"
)
MULTI_PROCESSING = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")


class Odd(Exception):
    """Cannot be unpickled: its class takes two arguments, and Exception remembers one."""

    def __init__(self, a: str, b: str):
        super().__init__(a + b)


@dataclass(frozen=True)
class Square(Task):
    """Writes the square of a number, and in `ran` that it was run."""

    folder: Path
    number: int
    does: str = ""

    @property
    def journal(self) -> Path:
        return self.folder / f"{self.number:03}.json"

    @property
    def weight(self) -> int:
        return 1 + 9 * (self.number > 0)

    def run(self) -> dict[str, Any]:
        with open(self.folder / "ran", "a") as file:
            file.write(f"{self.number}\n")
        match self.does.split():
            case ["waits"]:
                wait_for((self.folder / "go").exists)
            case ["sleeps"]:
                time.sleep(0.2)
            case ["dies"] if not (self.folder / "go").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            case ["raises", "UserError"]:
                raise UserError(f"number {self.number} is wrong")
            case ["raises", "RunError", "late"]:
                time.sleep(0.2)
                raise RunError(f"number {self.number} is lost")
            case ["raises", "bug"]:
                return {"inverse": 1 // 0}
            case ["raises", "odd"]:
                raise Odd("not", " loadable")
        with written(self.folder / f"{self.number:03}.square") as part:
            part.write_text(str(self.number**2))
        return {"pair": (self.number, self.number**2), "documents": 1000, "tokens": 50_000, "bytes": 2_000_000}


def tasks_in(folder: Path, *does: str) -> list[Square]:
    folder.mkdir(parents=True, exist_ok=True)
    return [Square(folder, n, d) for n, d in enumerate(does)]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def ran(folder: Path) -> Counter:
    return Counter(map(int, (folder / "ran").read_text().split()))


def squares(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "ran"}


def quiet(line: str) -> None:
    pass


def square(n: int) -> int:
    time.sleep(0.05 * (n == 0))
    return n * n


def half(n: int) -> float:
    if n % 2:
        raise UserError(f"{n} is odd")
    return n / 2


@pytest.fixture(scope="module")
def local():
    """One pool of two workers for all tests that do not break it."""
    with Local(2) as engine:
        yield engine


# ---- tasks and journals -----------------------------------------------------------------------------------------


def test_results_are_in_order_and_the_same_for_any_engine(tmp_path, local):
    """The first tasks finish last."""
    does = ["sleeps", "sleeps", "", "", "", ""]
    one = run_all(tasks_in(tmp_path / "1", *does), Local(1), quiet, "squares")
    two = run_all(tasks_in(tmp_path / "2", *does), local, quiet, "squares")
    assert [r["pair"] for r in one] == [[n, n * n] for n in range(6)]
    assert two == one
    assert squares(tmp_path / "1") == squares(tmp_path / "2")
    assert len(squares(tmp_path / "1")) == 12


def test_what_has_a_journal_is_not_done_again(tmp_path, local):
    tasks = tasks_in(tmp_path, "", "", "", "", "")
    some = run_all(tasks[1:3], Local(1), quiet, "squares")
    lines: list[str] = []
    results = run_all(tasks, local, lines.append, "squares")
    assert results[1:3] == some
    assert ran(tmp_path) == dict.fromkeys(range(5), 1)
    assert lines[-1].startswith("squares: 5 of 5 tasks (2 of them before), 3,000 documents")
    assert run_all(tasks, local, lines.append, "squares") == results
    assert ran(tmp_path) == dict.fromkeys(range(5), 1)
    assert lines[-1] == "squares: all 5 tasks were done before"


def test_no_tasks_are_nothing_to_do(local):
    lines: list[str] = []
    assert run_all([], local, lines.append, "squares") == []
    assert lines == []
    assert local.map(square, []) == []


@pytest.mark.parametrize("content", [b"", b'{"pair": [1, 1], "docu', b"\xff\xfe", b"[1, 2]", b"null"])
def test_a_torn_or_foreign_journal_is_done_again(tmp_path, content):
    (task,) = tasks_in(tmp_path, "")
    first = perform(task)
    assert perform(task) == first
    assert ran(tmp_path) == {0: 1}
    task.journal.write_bytes(content)
    assert run_all([task], Local(1), quiet, "squares") == [first]
    assert ran(tmp_path) == {0: 2}
    assert json.loads(task.journal.read_bytes()) == first


def test_a_journal_that_cannot_be_written_is_a_run_error(tmp_path):
    (task,) = tasks_in(tmp_path, "")
    task.journal.mkdir()
    with pytest.raises(RunError, match=r"000\.json: cannot be written"):
        perform(task)


def test_two_tasks_with_one_journal_are_refused(tmp_path):
    (task,) = tasks_in(tmp_path, "")
    with pytest.raises(ValueError, match="squares: two tasks have the same journal"):
        run_all([task, task], Local(1), quiet, "squares")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_in_order_is_raised(tmp_path, local, workers):
    """With two workers the later error happens first."""
    tasks = tasks_in(tmp_path, "", "raises RunError late", "raises UserError")
    lines: list[str] = []
    with pytest.raises(RunError, match=r"^number 1 is lost$"):
        run_all(tasks, Local(1) if workers == 1 else local, lines.append, "squares")
    assert lines[-1] == "squares: stopped; 1 of 3 tasks are done and will not be done again"
    with pytest.raises(UserError, match=r"^number 2 is wrong$"):
        run_all([tasks[0], tasks[2]], local, quiet, "squares")
    assert ran(tmp_path)[0] == 1


def test_map_keeps_the_order(local):
    assert local.map(square, range(7)) == Local(1).map(square, range(7)) == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(UserError, match=r"^3 is odd$"):
        local.map(half, [0, 2, 3, 4, 5])


def test_at_least_one_worker():
    with pytest.raises(UserError, match="workers = 0: at least 1 is needed"):
        Local(0)


# ---- kills ------------------------------------------------------------------------------------------------------


def test_a_lost_worker_is_a_run_error(tmp_path):
    tasks = tasks_in(tmp_path, "", "dies", "", "")
    with pytest.raises(RunError, match="a worker process was lost"):
        run_all(tasks, Local(2), quiet, "squares")
    before = [t for t in tasks if t.journal.exists()]
    assert tasks[1] not in before
    (tmp_path / "go").touch()
    assert [r["pair"][1] for r in run_all(tasks, Local(1), quiet, "squares")] == [0, 1, 4, 9]
    assert ran(tmp_path)[1] == 2
    assert all(ran(tmp_path)[t.number] == 1 for t in before)


def seven(folder: str, engine: Engine) -> None:
    """Perform seven tasks, of which the last four wait until they are let go."""
    with engine:
        run_all(tasks_in(Path(folder), *["", "", "", *["waits"] * 4]), engine, quiet, "squares")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_run_goes_on_where_it_was(tmp_path, number):
    """Only the parent gets the signal; its workers, both in the middle of a task, end with it."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # a shell may have it ignored
        f"from tests.data.test_engines import seven, Local; seven({str(tmp_path)!r}, Local(2))"
    )
    # Whoever holds its standard output is still there, our child or an orphan.
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.json"))) == 3 and len(ran(tmp_path)) == 5)
        process.send_signal(number)
        process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
        (tmp_path / "go").touch()
    assert process.returncode == -number
    done = ran(tmp_path)
    assert done == dict.fromkeys(range(5), 1)
    seven(str(tmp_path), Local(1))
    assert ran(tmp_path) - done == {3: 1, 4: 1, 5: 1, 6: 1}
    assert len(list(tmp_path.glob("*.square"))) == 7


# ---- progress ---------------------------------------------------------------------------------------------------

LINE = re.compile(
    r"squares: (\d) of 4 tasks, ([\d,]+) documents, ([\d,]+) tokens, ([\d.]+) MB in ([\d.]+) s "
    r"\(([\d,]+) documents/s, ([\d,]+) tokens/s, ([\d.]+) MB/s\)(?:, (\d+)s left)?"
)


def test_progress_lines_have_the_figures(tmp_path, local):
    """Of the weight 31, 1 is done when the others are let go: 30 times as long is left."""
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        if "1 of 4 tasks" in line:
            (tmp_path / "go").touch()

    run_all(tasks_in(tmp_path, "", "waits", "waits", "waits"), local, log, "squares", log_every_s=0.25)
    figures = [m.groups() for m in map(LINE.fullmatch, lines) if m]
    begun = next(f for f in figures if f[0] == "1")
    assert begun[1:4] == ("1,000", "50,000", "2.0")
    assert float(begun[8]) == pytest.approx(30 * float(begun[4]), abs=30 * 0.05 + 1)
    done, documents, tokens, megabytes, seconds, *rates, left = figures[-1]
    assert LINE.fullmatch(lines[-1])
    assert (done, documents, tokens, megabytes, left) == ("4", "4,000", "200,000", "8.0", None)
    for amount, rate in zip((4000, 200_000, 8), rates):
        assert float(rate.replace(",", "")) == pytest.approx(amount / float(seconds), rel=0.2)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (200, "3m20s"), (3720, "1h02m")])
def test_durations(seconds, text):
    assert engines._duration(seconds) == text


# ---- Beam -------------------------------------------------------------------------------------------------------


def test_without_beam_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"needs Apache Beam .*pip install '\.\[scale\]'"), Beam((), tmp_path):
        pass


def test_an_attempt_keeps_errors_in_order(tmp_path):
    """What a Beam worker does with a call: after an error, only calls before it are still made."""
    (tmp_path / "errors").mkdir()

    def attempt(number: int, argument: int) -> None:
        engines._attempt((number, pickle.dumps((half, argument))), str(tmp_path))

    attempt(5, 10)
    attempt(3, 7)
    attempt(4, 8)
    attempt(2, 9)
    attempt(0, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "5", "errors"]
    assert sorted(p.name for p in (tmp_path / "errors").iterdir()) == ["2", "3"]
    error = pickle.loads((tmp_path / "errors" / "2").read_bytes())
    assert (type(error), str(error)) == (UserError, "9 is odd")


@pytest.fixture(params=[(), MULTI_PROCESSING], ids=["in_memory", "multi_processing"])
def beam(request, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # this package is not necessarily installed for the workers
    with Beam(request.param, tmp_path / "shared") as engine:
        yield engine
    assert not list((tmp_path / "shared").iterdir())


@needs_beam
def test_beam_equals_local(tmp_path, beam):
    does = ["sleeps", "sleeps", "", "", "", ""]
    tasks = tasks_in(tmp_path / "beam", *does)
    first = perform(tasks[2])
    lines: list[str] = []
    results = run_all(tasks, beam, lines.append, "squares", log_every_s=0.1)
    assert results == run_all(tasks_in(tmp_path / "local", *does), Local(1), quiet, "squares")
    assert results[2] == first
    assert squares(tmp_path / "beam") == squares(tmp_path / "local")
    assert ran(tmp_path / "beam") == dict.fromkeys(range(6), 1)
    assert lines[-1].startswith("squares: 6 of 6 tasks (1 of them before), 5,000 documents, 250,000 tokens, 10.0 MB")
    assert len(lines) > 1
    assert beam.map(square, range(7)) == [0, 1, 4, 9, 16, 25, 36]
    assert beam.map(square, []) == []


@needs_beam
def test_beam_raises_the_first_error_as_itself(tmp_path, beam):
    tasks = tasks_in(tmp_path / "t", "", "raises RunError late", "raises UserError", "raises bug", "raises odd")
    with pytest.raises(RunError, match=r"^number 1 is lost$"):
        run_all(tasks, beam, quiet, "squares")
    assert tasks[0].journal.exists()
    with pytest.raises(UserError, match=r"^number 2 is wrong$"):
        run_all([tasks[0], *tasks[2:]], beam, quiet, "squares")
    with pytest.raises(ZeroDivisionError) as bug:
        run_all(tasks[3:], beam, quiet, "squares")
    assert "1 // 0" in "".join(bug.value.__notes__)
    with pytest.raises(RuntimeError, match=r"^Odd: not loadable"):
        run_all(tasks[4:], beam, quiet, "squares")
    assert ran(tmp_path / "t")[0] == 1


@needs_beam
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--direct_num_workers=many",), "--direct_num_workers=many: .*invalid int value"),
        (("--runner=NoRunner",), "--runner=NoRunner: Unexpected pipeline runner"),
        (("--runner=no.such.Runner",), "--runner=no.such.Runner: No module named"),
    ],
)
def test_wrong_beam_options_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message), Beam(options, tmp_path):
        pass


def forget(shared: str) -> None:
    """Delete what other calls have written, as if it were in another machine's folder."""
    for path in Path(shared).glob("beam-*/[0-9]*"):
        path.unlink()


def unshare(shared: str) -> None:
    for path in Path(shared).glob("beam-*/errors"):
        path.rmdir()


@needs_beam
@pytest.mark.parametrize(
    ("function", "message"),
    [(forget, "must be a folder that this machine shares"), (unshare, "the Beam pipeline failed .*No such file")],
)
def test_a_folder_that_is_not_shared_is_a_run_error(tmp_path, function, message):
    with pytest.raises(RunError, match=message):
        Beam((), tmp_path).map(function, [str(tmp_path)] * 2)
