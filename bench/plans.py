"""The planner's memory against the compiler's, for both 7B models on five topologies that need not be there.

    python bench/plans.py [--topologies v5p:4x4x4,h100:4x8] [--recipes amber_7b] [--out bench/results/NAME.json]

Of every ranking it takes the two fastest plans, the fastest with a pipeline and the one of least memory, compiles each
(`plan --verify` does the same for the fastest), and prints predicted and compiled peak memory with the median error.
With --exhaustive N it compiles the N fastest plans of one topology instead, and says how far the planner's first choice
is from the best of them, by the cost model fed with the compiler's bytes.
"""

import argparse
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkpoint.manifest import environment
from commands.plan import compiles
from models import recipes
from parallel import planner
from parallel.topology import Topology
from training import plan_check, planning

TOPOLOGIES = "v5p:4x4x4,v4:4x4x8,v5e:16x16,v6e:16x16,h100:4x8"


def picked(ranking: planner.Ranking) -> list[planner.Prediction]:
    """Plans that differ: the two fastest, the fastest pipeline, the least memory."""
    best = list(ranking.best)
    some = best[:2] + [p for p in best if p.plan.mesh.pipeline > 1][:1] + [min(best, key=lambda p: p.bytes)]
    return list({str(p.plan): p for p in some}.values())


def main() -> None:
    """Compile, compare, record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--topologies", default=TOPOLOGIES)
    parser.add_argument("--recipes", default="amber_7b,crystal_7b")
    parser.add_argument("--exhaustive", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(".cache/compiled"))
    args = parser.parse_args()

    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rows": rows, "versions": environment(), "date": datetime.date.today().isoformat()}
    for recipe in args.recipes.split(","):
        config = recipes()[recipe]()
        for name in args.topologies.split(","):
            topology = Topology.parse(name)
            workload = planning.workload(config, topology.chip.platform)
            ranking = planner.rank(workload, topology)
            plans = list(ranking.best[: args.exhaustive]) if args.exhaustive else picked(ranking)
            print(f"{recipe} on {name}\n{plan_check.HEAD}", flush=True)
            checked = plan_check.check(
                config, workload, plans, **compiles(), cache=args.cache, timeout_s=600,
                progress=lambda c: print(plan_check.line(c), flush=True),
            )  # fmt: skip
            rows += [{"recipe": recipe, **c.row()} for c in checked]
            errors = [abs(r["memory_error"]) for r in rows if r["memory_error"] is not None]
            result["median_memory_error"] = statistics.median(errors) if errors else None
            result["largest_memory_error"] = max(errors, default=None)
            result["plans"], result["unfit"] = len(rows), sum(not r["fits"] for r in rows)
            if args.exhaustive:
                times = [c.refined.seconds for c in checked if c.refined is not None]
                first = checked[0].refined
                if first is not None:
                    result["first_over_best"] = first.seconds / min(times)
                    print(f"the first choice takes {result['first_over_best']:.3f} times the best of {len(times)}")
            if args.out:  # what is finished is kept
                args.out.write_text(json.dumps(result, indent=2) + "\n")
    errors = [abs(r["memory_error"]) for r in rows if r["memory_error"] is not None]
    if errors:
        print(
            f"{len(rows)} plans, {result['unfit']} do not fit; memory error: median {statistics.median(errors):.1%}, "
            f"{max(errors):.1%} most"
        )


if __name__ == "__main__":
    main()
