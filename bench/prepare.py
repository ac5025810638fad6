"""One machine: preparing, loading and tracing data.

    tokenise   MB of text a CPU-second: ours (documents to packed, indexed, hashed chunks) against the originals' way
               (fact sheet 3.2: Hugging Face's tokenizer a document at a time, a buffer, JSON lines), one process each,
               in turns; and encoding alone, three ways
    memory     peak memory of `prepare` on a large corpus, and its speed with two workers
    load       samples a second that the loader gives, against reading the same bytes alone
    trace      milliseconds a query: a sample to its documents, a document to its steps

The text is what the machine has: Python files of the given folder as JSON lines, as often as needed, each time under
another name and with a first line of its own.

    python bench/prepare.py --text FOLDER --tokenizer llama.model [--mb 200] [--large-mb 2000] [--work FOLDER] [--out …]
"""

import argparse
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from record import record

from data.dataset import ChunkedData
from data.loader import local_batches
from data.sample import Schedule
from data.sources import SourceSpec, read
from data.tokenizer import load
from data.trace import Tracer

S = 2048


def write_corpus(text: Path, out: Path, size: int, files: int = 8) -> int:
    """Write JSON lines of at least `size` bytes of text in some files and return how many bytes of text there are."""
    sources = sorted(p for p in text.rglob("*.py") if p.is_file())
    random.Random(0).shuffle(sources)
    if not sources:
        sys.exit(f"{text}: no .py files")
    out.mkdir(parents=True)
    written = n = 0
    outputs = [open(out / f"{i:02}.jsonl", "w", encoding="utf-8") for i in range(files)]  # noqa: SIM115
    while written < size:
        try:
            content = f"# {n}\n" + sources[n % len(sources)].read_text("utf-8")
        except UnicodeDecodeError:
            content = f"# {n}\n"
        outputs[n % files].write(json.dumps({"text": content}, ensure_ascii=False) + "\n")
        written += len(content.encode())
        n += 1
    for file in outputs:
        file.close()
    return written


#: One `prepare` in a process of its own, without what only this benchmark needs.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from data.engines import Local
from data.prepare import PrepareConfig, prepare
from data.sources import SourceSpec

if __name__ == "__main__":  # worker processes import this file too
    corpus, out, tokenizer, vocab_size, workers, chunks = sys.argv[2:]
    prepare(PrepareConfig(
        recipe="amber_7b", out=Path(out), sources=(SourceSpec("code", corpus),), sequence_length=2048,
        vocab_size=int(vocab_size), validation_per_source=64, seed=1, chunks=int(chunks), tokenizer=Path(tokenizer),
        engine=Local(int(workers)),
    ))
"""


def command(corpus: Path, out: Path, tokenizer: Path, *, workers: int, chunks: int) -> list[str]:
    script = corpus.parent / "prepare_one.py"
    script.write_text(SCRIPT)
    root = Path(__file__).resolve().parent.parent
    words = [root, corpus, out, tokenizer, load(tokenizer).vocab_size, workers, chunks]
    return [sys.executable, str(script), *map(str, words)]


def theirs(corpus: Path, out: Path, content: dict[str, Any]) -> int:
    """The originals' way, with the tokenizer's own JSON: returns the number of windows."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    buffer: list[int] = []
    windows = 0
    with open(out, "w") as file:
        for document in read(SourceSpec("code", str(corpus))):
            buffer += [*tokenizer.encode(document.text, add_special_tokens=False).ids, 2]
            while len(buffer) >= S + 1:
                file.write(json.dumps({"token_ids": buffer[: S + 1], "source": "code"}) + "\n")
                buffer = buffer[S + 1 :]
                windows += 1
    return windows


def tokenise(text: Path, tokenizer_file: Path, work: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    size = write_corpus(text, work / "corpus", megabytes * 10**6)
    tokenizer = load(tokenizer_file)
    content = tokenizer.pieces.to_json()
    texts = [d.text for d in read(SourceSpec("code", str(work / "corpus")))]

    def fresh(path: Path) -> Path:
        shutil.rmtree(path, ignore_errors=True)
        return path

    def ours() -> None:
        # A process of its own each time, so that no cache of an earlier turn helps.
        words = command(work / "corpus", fresh(work / "ours"), tokenizer_file, workers=1, chunks=4)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)

    def encode_only() -> None:
        load(tokenizer_file).encode_to(texts, np.dtype("<u2"))

    def sentencepiece_only() -> None:
        tokenizer.encode_many(texts)

    def huggingface_only() -> None:
        import tokenizers

        theirs_alone = tokenizers.Tokenizer.from_str(json.dumps(content))
        for t in texts:
            theirs_alone.encode(t, add_special_tokens=False)

    ways = {
        "ours": ours,
        "theirs": lambda: theirs(work / "corpus", work / "theirs.jsonl", content),
        "encode": encode_only,
        "encode_sentencepiece": sentencepiece_only,
        "encode_huggingface": huggingface_only,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for n in range(repeats):
        for name in ways if n % 2 else reversed(ways):
            before = _cpu()
            ways[name]()
            seconds[name].append(_cpu() - before)
            print(f"{name}: {size / 1e6 / seconds[name][-1]:.2f} MB per CPU-second", file=sys.stderr, flush=True)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    with open(work / "theirs.jsonl") as file:
        windows = sum(1 for _ in file)
    data = ChunkedData(work / "ours")
    stored = data.manifest.sources[0]
    assert stored.windows == windows, "the two make different windows"
    return {
        "text_mb": size / 1e6,
        "repeats": repeats,
        "mb_per_cpu_second": {name: size / 1e6 / s for name, s in median.items()},
        "ratio_ours_to_theirs": median["theirs"] / median["ours"],
        "ratio_encode_to_sentencepiece": median["encode_sentencepiece"] / median["encode"],
        "ratio_encode_to_huggingface": median["encode_huggingface"] / median["encode"],
    }


def _cpu() -> float:
    """CPU seconds of this process and the children that ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def memory(text: Path, tokenizer_file: Path, work: Path, megabytes: int) -> dict[str, Any]:
    """Prepare a large corpus with two workers in a process of its own, watching the memory of all of them."""
    size = write_corpus(text, work / "large", megabytes * 10**6)
    words = command(work / "large", work / "large-out", tokenizer_file, workers=2, chunks=12)
    start = time.perf_counter()
    process = subprocess.Popen(words, start_new_session=True, stdout=sys.stderr)
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(_private(pid) for pid in _group(process.pid)))
        time.sleep(0.2)
    if process.returncode:
        sys.exit("prepare failed")
    seconds = time.perf_counter() - start
    manifest = ChunkedData(work / "large-out").manifest
    files = [f for s in manifest.sources for f in s.index_files]
    return {
        "text_mb": size / 1e6,
        "tokens": manifest.sources[0].tokens,
        "documents": manifest.sources[0].documents,
        "workers": 2,
        "seconds": seconds,
        "mb_per_s": size / 1e6 / seconds,
        "peak_mb_all_processes": peak / 1e6,
        "index_bytes_per_document": sum(f.bytes for f in files) / manifest.sources[0].documents,
    }


def _group(leader: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == leader:
                yield int(entry.name)


def _private(pid: int) -> int:
    """Bytes that only this process has, and its share of those it has in common; mapped files count too."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) * 1024


def loading(data: ChunkedData, batch: int = 32) -> dict[str, Any]:
    """Samples a second, the median of turns, against reading the same files alone (both from memory)."""
    phase = data.phases[0]
    steps = phase.steps(batch)
    schedule = Schedule(data.phases, (steps,), batch)
    rates: dict[str, list[float]] = {"loader": [], "raw": []}
    for turn in range(5):
        for name in ("loader", "raw") if turn % 2 else ("raw", "loader"):
            start = time.perf_counter()
            if name == "raw":
                for file in data.manifest.chunk_files:
                    (data.directory / file.file).read_bytes()
                n = phase.samples
            else:
                n = batch * sum(
                    1 for _ in local_batches(data, schedule, list(range(batch)), start_step=0, stop_step=steps)
                )
            rates[name].append(n / (time.perf_counter() - start))
    median = {name: statistics.median(r) for name, r in rates.items()}
    return {
        "samples": phase.samples,
        "global_batch": batch,
        "samples_per_s": median,
        "ratio_loader_to_raw": median["loader"] / median["raw"],
        "needed_samples_per_s": 7,
        "needed_by": "one H200 at Amber's size, about (issue 4)",
    }


def tracing(data: ChunkedData, queries: int = 1000) -> dict[str, Any]:
    """Milliseconds a query, after the first one has opened the index."""
    start = time.perf_counter()
    tracer = Tracer(data)
    schedule = Schedule(data.phases, (data.phases[0].steps(32),), 32)
    tracer.pieces(*schedule.place(0, 0))
    first = time.perf_counter() - start
    rng = random.Random(0)
    there, back = [], []
    for _ in range(queries):
        step, row = rng.randrange(schedule.steps), rng.randrange(32)
        start = time.perf_counter()
        pieces = tracer.pieces(*schedule.place(step, row))
        there.append(time.perf_counter() - start)
        piece = rng.choice(pieces)
        start = time.perf_counter()
        places = [p for s, n in tracer.find(f"{piece.source}/{piece.document}") for p in tracer.places(s, n)]
        steps = [schedule.reader(p.chunk, p.position) for p in places if p.chunk is not None and p.position is not None]
        back.append(time.perf_counter() - start)
        if (step, row) not in steps:
            sys.exit(f"step {step} row {row}: its document {piece.document} does not lead back to it")
    start = time.perf_counter()
    hits = sum(1 for _ in tracer.search("this text stands nowhere in it, of course"))
    return {
        "tokens": sum(s.tokens for s in data.manifest.sources),
        "queries": queries,
        "round_trips_right": queries,
        "first_query_ms": 1e3 * first,
        "sample_to_documents_ms": {"median": 1e3 * statistics.median(there), "largest": 1e3 * max(there)},
        "document_to_steps_ms": {"median": 1e3 * statistics.median(back), "largest": 1e3 * max(back)},
        "search_all_for_a_text_s": time.perf_counter() - start,
        "search_hits": hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with .py files, the text")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--mb", type=int, default=200)
    parser.add_argument("--large-mb", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder for the data; else a temporary one")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        work = Path(folder)
        result = {"text": f"Python files of {args.text.name}", "tokenizer": args.tokenizer.name}
        result["tokenise"] = tokenise(args.text, args.tokenizer, work, args.mb, args.repeats)
        result["memory"] = memory(args.text, args.tokenizer, work, args.large_mb)
        data = ChunkedData(work / "large-out")
        result["load"] = loading(ChunkedData(work / "ours"))
        result["trace"] = tracing(data)
        record(result, jax.devices()[0], args.out)


if __name__ == "__main__":
    main()
