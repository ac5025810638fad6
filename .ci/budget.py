"""What CI took, beside what it may take (tests/budget.toml); exit code 1 at twice that.

    python .ci/budget.py TESTS.json DEMO.json

TESTS.json is what the tests wrote to $CPU_SECONDS_JSON, DEMO.json what `run.py demo --quick --json` printed.
"""

import json
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def of_command(*words: str) -> float:
    """CPU seconds of a command line of ours: the least of three, as the first one fills the disk's cache."""
    found = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, str(ROOT / "run.py"), *words], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> int:
    """Print the table."""
    tests, demo = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    budgets = tomllib.loads((ROOT / "tests" / "budget.toml").read_text())["totals"]
    taken = {**tests["totals"], "run.py demo --quick": sum(demo["cpu_seconds"].values())}
    taken |= {f"run.py {words}": of_command(*words.split()) for words in ("--help", "train --help")}
    print("CPU seconds    taken   budget")
    for what, seconds in taken.items():
        print(f"{what:20} {seconds:7.2f} {budgets[what]:8}")
    over = [what for what, seconds in taken.items() if seconds > 2 * budgets[what]]
    for what in over:
        print(f"error: {what} took more than twice what it may (tests/budget.toml)")
    return int(bool(over))


if __name__ == "__main__":
    sys.exit(main())
