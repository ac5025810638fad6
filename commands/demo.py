"""The whole story on this machine in minutes: real text, training, a kill, another mesh, the series, text.

Each part is a command that the reader can run alone. Real text becomes a chunked corpus; the planner ranks meshes; a
small Amber trains on a mesh of simulated devices; the process is killed with SIGKILL half way; the same command on
another mesh, a pipeline, carries on; every checkpoint of the series is checked, and two links of it are trained again
and must give the same bits; every checkpoint is evaluated and studied; a report shows it all; the model writes text.
"""

import dataclasses
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from commands.flags import Json
from errors import RunError, UserError
from training.metrics import duration, read_lines

ROOT = Path(__file__).resolve().parent.parent
#: How the reader can start this interpreter: shown before every command.
PYTHON = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else sys.executable
RECIPE = "amber_tiny"
SIMULATED = 4
#: The run starts on one mesh and is continued on another.
FIRST_MESH, SECOND_MESH = "data=2,fsdp=2", "pipeline=2,tensor=2"
#: What the second one needs besides: two stages have something to do at a time only if the batch comes in parts.
SECOND_PLAN = ["--execution.schedule", "1f1b", "--execution.microbatches", "4"]
SOURCES = {"code": "stdlib", "topics": "topics", "docstrings": "docstrings", "packages": "packages"}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything."""

    chunks: int
    """Chunks of data, and so checkpoints besides the first."""
    steps_per_chunk: int
    """Steps in each chunk, about: the text that this machine has decides."""
    fields: tuple[str, ...]
    """Flags that change the recipe."""
    bytes_per_token: float
    """Of the tokenizer that is made of the text, about."""
    least_megabytes: float
    """Of each source: a tokenizer cannot be trained on much less in all."""
    heldout: int
    """Held-out questions."""
    sequences: int
    """Sequences of each chunk that are looked for in what the model says."""


#: As many tokens as 150 steps of the recipe's 16 sequences, in twice as many steps of half: those 150 ended between
#: 5.04 and 5.39, as the text of the machine would have it, and these between 4.69 and 4.99 (from 7.65).
FULL = Size(
    chunks=12,
    steps_per_chunk=24,
    fields=("--data.global-batch=8",),
    bytes_per_token=2.9,
    least_megabytes=0.5,
    heldout=128,
    sequences=12,
)
#: A quarter of the tokens in a step, half the layers, few steps: most of the time goes into starting and compiling.
QUICK = Size(
    chunks=3,
    steps_per_chunk=9,
    fields=(
        "--data.global-batch=8", "--data.sequence-length=128", "--model.vocab-size=512", "--model.num-layers=2",
        "--optimizer.warmup-steps=8",
    ),
    bytes_per_token=1.9,
    least_megabytes=0.012,
    heldout=32,
    sequences=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Args:
    """Flags of this verb."""

    dir: Path | None = None
    """Run directory, by default runs/demo (runs/quick with --quick); the data goes beside it, with -data added."""
    quick: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The same story in ninety seconds: 3 chunks of short sequences. The model learns little."""
    chunks: int | None = None
    """Chunks of data, and so checkpoints besides the first; by default 12, or 3 with --quick."""
    steps_per_chunk: int | None = None
    """Steps in each chunk, about: the text that this machine has decides. By default 24, or 9 with --quick."""
    json: Json = False
    """Print one JSON object on stdout."""


def run(args: Args) -> dict[str, Any]:
    """Run every part, or what an interrupted demo left to do.

    Returns:
        Seconds and CPU seconds of every part, validation losses, checkpoints, and the text that the model wrote.
    """
    size = QUICK if args.quick else FULL
    size = dataclasses.replace(
        size, chunks=args.chunks or size.chunks, steps_per_chunk=args.steps_per_chunk or size.steps_per_chunk
    )
    run_dir = args.dir or Path("runs/quick" if args.quick else "runs/demo")
    if size.chunks < 2 or size.steps_per_chunk < 4:
        raise UserError("demo: needs at least 2 chunks and 4 steps in each, to be killed in the middle of one")
    if not run_dir.name:
        raise UserError(f"demo: --dir {run_dir}: give the name of a directory to make, such as runs/demo")
    return _tell(size, run_dir, Teller(sys.stderr if args.json else sys.stdout))


def _tell(size: Size, run_dir: Path, teller: "Teller") -> dict[str, Any]:
    data_dir = run_dir.with_name(run_dir.name + "-data")
    fields = [f"--data.chunks={size.chunks}", *size.fields]
    rows, length = _batch(size)

    teller.part("Real text becomes a mixed, chunked corpus")
    # Enough text for every chunk, about; one of the sources ends after 0.4 MB.
    megabytes = size.chunks * size.steps_per_chunk * rows * (length + 1) * size.bytes_per_token / 1e6
    limit = max(megabytes / 4, (megabytes - 0.4) / 3, size.least_megabytes)
    sources = [f"--source={name}=embedded:{kind}" for name, kind in SOURCES.items()]
    data = teller.call(
        ["prepare", RECIPE, "--out", str(data_dir), *sources, f"--max-mb-per-source={limit:.2f}", *fields]
    )
    available = data["samples_per_chunk"][0] // rows
    if available < 4:
        raise RunError(f"demo: this machine's text fills only {available} steps per chunk; lower --chunks")
    total = size.chunks * available

    teller.part(f"The planner ranks the ways to train on {SIMULATED} devices (of nominal speed, as they are simulated)")
    plans = teller.call(["plan", RECIPE, "--topology", f"cpu:{SIMULATED}", "--top", "3", *fields])["plans"]
    for p in plans:
        teller.say(f"{p['predicted_peak_bytes'] / 1e6:6.0f} MB a device, predicted: {p['plan']['text']}")
    train = ["train", RECIPE, "--data", str(data_dir), "--run", str(run_dir), "--simulate", str(SIMULATED), *fields]
    kill_at = total // 2 + available // 2  # in the middle of a chunk, so that the rolling checkpoint is needed
    if _steps_done(run_dir) < kill_at:
        teller.part(f"A small Amber trains on {FIRST_MESH}, and is killed")
        teller.call_and_kill([*train, "--mesh", FIRST_MESH], run_dir, kill_at)
    teller.part(f"The same command carries on, now on {SECOND_MESH}")
    outcome = teller.call([*train, "--mesh", SECOND_MESH, *SECOND_PLAN])

    teller.part("Every checkpoint of the series is read back: hashes, digests, parents, ledger, data")
    series = teller.call(["series", str(run_dir), "--check"])
    teller.part("Two links of the series, chosen at random, are trained again and compared bit for bit")
    replays = teller.call(["verify", str(run_dir), "--sample", "2"])["replays"]
    for r in replays:
        teller.say(f"{r['start']} -> {r['end']}: {r['verdict']}, {r['losses']} losses compared")
    teller.part("Every checkpoint is evaluated and studied: held-out text, perplexity, memorization, weights")
    settings = [f"--evaluate.limit={size.heldout}", f"--memorization.sequences={size.sequences}"]
    studied = teller.call(["analyze", "evaluate,perplexity,memorization,weights", f"{run_dir}@all", *settings])
    accuracy = _by_checkpoint(studied, "evaluate/heldout", "acc")
    teller.say("the true continuation of held-out text chosen among 4: " + _first_to_last(accuracy))
    by_heart = _by_checkpoint(studied, "memorization", "score")
    teller.say("tokens of the training data said again by heart: " + _first_to_last(by_heart))
    teller.part("One page shows the run: it opens from the disk, with a browser")
    report = teller.call(["report", str(run_dir)])["report"]
    teller.part("The first and the last checkpoint write code and prose")
    prompts = ["--prompt", "    def __init__(self", "--prompt", "import"]
    sampling = ["--max-new-tokens", "48", "--temperature", "0.7", "--top-p", "0.9", "--seed", "1"]
    texts = {
        name: teller.call(["generate", f"{run_dir}@{name}", *prompts, *sampling])["continuations"]
        for name in ("init", "latest")
    }

    validation = [r for r in read_lines(run_dir / "metrics.jsonl") if r["kind"] == "validation"]
    result = {
        "run": str(run_dir),
        "data": str(data_dir),
        "seconds": teller.seconds,
        "cpu_seconds": teller.cpu_seconds,
        "steps": outcome["step"],
        "tokens": outcome["tokens"],
        "checkpoints": len(series["checkpoints"]),
        "verified": {f"{r['start']} -> {r['end']}": r["verdict"] for r in replays},
        "heldout_accuracy": accuracy,
        "report": report,
        "validation_loss_first": validation[0]["loss"],
        "validation_loss_last": validation[-1]["loss"],
        "continuations": texts,
    }
    teller.summary(result)
    return result


def _batch(size: Size) -> tuple[int, int]:
    """Rows of a step, and tokens of a row: the recipe's, or what the flags say instead."""
    from models import recipes

    data = recipes()[RECIPE]().data
    given = dict(flag.removeprefix("--").split("=") for flag in size.fields)
    return int(given.get("data.global-batch", data.global_batch)), int(
        given.get("data.sequence-length", data.sequence_length)
    )


def _by_checkpoint(studied: dict[str, Any], kind: str, figure: str) -> dict[str, float]:
    results = [r for r in studied["results"] if r["kind"] == kind]
    return {r["checkpoint"]["name"]: r["summary"][figure]["value"] for r in results}


def _first_to_last(values: dict[str, float]) -> str:
    (first, start), *_, (last, end) = values.items()
    return f"{start:.1%} ({first}) -> {end:.1%} ({last})"


def _steps_done(run_dir: Path) -> int:
    return max((r["step"] + 1 for r in read_lines(run_dir / "metrics.jsonl") if r["kind"] == "train"), default=0)


class Teller:
    """Runs commands, showing each one, and keeps the time."""

    def __init__(self, out: Any):
        self.out = out
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    def say(self, text: str = "") -> None:
        """Print a line."""
        print(text, file=self.out, flush=True)

    def part(self, title: str) -> None:
        """Begin a part of the story."""
        self.say(f"\n== {title}")

    def _show(self, words: list[str]) -> None:
        self.say(f"$ {PYTHON} run.py {shlex.join(words)}")

    def _took(self, verb: str, start: tuple[float, float]) -> None:
        wall, cpu = (now - then for now, then in zip(_clock(), start, strict=True))
        self.seconds[verb] = self.seconds.get(verb, 0.0) + wall
        self.cpu_seconds[verb] = self.cpu_seconds.get(verb, 0.0) + cpu
        self.say(f"({duration(wall)}, {cpu:.0f} CPU seconds)")

    def _start(self, words: list[str]) -> subprocess.Popen:
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
        environment["JAX_PLATFORMS"] = "cpu"  # the demo is about simulated devices, whatever this machine has
        return subprocess.Popen(
            [sys.executable, str(ROOT / "run.py"), *words, "--json"], stdout=subprocess.PIPE, text=True, env=environment
        )

    def call(self, words: list[str]) -> dict[str, Any]:
        """Run one command to its end and return its JSON.

        Raises:
            RunError: it failed; its own message is on stderr.
        """
        self._show(words)
        start = _clock()
        process = self._start(words)
        try:
            output, _ = process.communicate()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
        if process.returncode:
            raise RunError(f"demo: run.py {words[0]} ended with code {process.returncode}; its message is above")
        self._took(words[0], start)
        return json.loads(output)

    def call_and_kill(self, words: list[str], run_dir: Path, at_step: int) -> None:
        """Run one command and kill it with SIGKILL once it has logged a step."""
        self._show(words)
        start = _clock()
        process = self._start(words)
        try:
            while process.poll() is None and _steps_done(run_dir) < at_step:
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        if process.returncode != -signal.SIGKILL:
            raise RunError(f"demo: training ended with code {process.returncode} before it could be killed")
        self._took(words[0], start)
        self.say(f"killed with SIGKILL after step {_steps_done(run_dir)}")

    def summary(self, result: dict[str, Any]) -> None:
        """Say what was made and what to try next."""
        run, data = result["run"], result["data"]
        self.part("What was made")
        for name, continuations in result["continuations"].items():
            self.say(f"-- {run}@{name}")
            for c in continuations:
                self.say("   " + c["text"].replace("\n", "\n   "))
        times = ", ".join(f"{verb} {duration(s)}" for verb, s in self.seconds.items())
        self.say(
            f"\n{run}: {result['steps']} steps, {result['tokens']:,} tokens, {result['checkpoints']} checkpoints; "
            f"validation loss {result['validation_loss_first']:.3f} -> {result['validation_loss_last']:.3f}\n"
            f"{data}: chunks, validation samples, tokenizer, document index, manifest\n"
            f"{result['report']}: open it in a browser\n"
            f"time: {duration(sum(self.seconds.values()))}, {sum(self.cpu_seconds.values()):.0f} CPU seconds: {times}\n"
            "\n== Try next\n"
            f"{PYTHON} run.py series {run}\n"
            f"{PYTHON} run.py verify {run}    # all of it\n"
            f"{PYTHON} run.py generate {run}@{(result['checkpoints'] - 1) // 2} --prompt 'def '\n"
            f"{PYTHON} run.py train {RECIPE} --data synthetic --steps 10 --simulate 4 --mesh tensor=4\n"
            f"tensorboard --logdir {run}/tensorboard    # pip install tensorboard"
        )


def _clock() -> tuple[float, float]:
    """Seconds of the clock, and CPU seconds of the commands so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.monotonic(), used.ru_utime + used.ru_stime
