"""Plain FSDP against the planner's choice for Amber-7B, where links are fast and where they are slow.

    python bench/strategies.py [--verify] [--out docs/strategies] [--cache .cache/compiled]

Writes OUT.json and OUT.svg, and prints the table of `docs/parallel.md`. Times are predicted by the open cost model;
with --verify both plans of every topology are compiled for it, and the memory that the compiler plans, and the time
that follows from the compiler's own bytes, stand beside them. Nothing is run on these machines.

"Plain FSDP" shards over all devices (ZeRO-3), each layer gathered when it is used, as LLM360 trained Amber; the planner
still picks its microbatches and rematerialisation. 224 does not divide Amber's width of 4096, so that on LLM360's
cluster it shards 32 ways and replicates 7 times; what 224 ways would take, as FSDP on flat parameters ran it, is
predicted beside it.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from amber_jax.recipes import amber_7b
from checkpoint.manifest import environment
from commands.plan import compiles
from parallel import planner
from parallel.mesh import MeshConfig
from parallel.topology import Topology
from training import plan_check, planning

#: (topology, sequences per step): LLM360's batch on their cluster, the power of two next to it elsewhere.
WHERE = [
    ("v5p:4x4x4", 2048), ("v4:4x4x8", 2048), ("v5e:16x16", 2048), ("amber", 2240), ("amber@0.1", 2240),
]  # fmt: skip


def plain_fsdp(workload, topology):
    """The best plan that shards over as many devices as divide the model, replicates over the rest, and gathers layer
    by layer."""
    n = topology.devices
    fsdp = max(d for d in range(1, n + 1) if n % d == 0 and workload.embed % d == 0 and workload.global_batch % n == 0)
    ranking = planner.rank(workload, topology, only_mesh=MeshConfig(data=n // fsdp, fsdp=fsdp))
    return next(p for p in ranking.best if p.plan.gather == "layer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--verify", action="store_true", help="compile both plans for every topology")
    parser.add_argument("--out", type=Path, default=Path("docs/strategies"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/compiled"))
    args = parser.parse_args()

    rows, checked = [], {}
    for name, batch in WHERE:
        recipe = amber_7b()
        config = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, global_batch=batch))
        topology = Topology.parse(name)
        workload = planning.workload(config, topology.chip.platform)
        plans = {"fsdp": plain_fsdp(workload, topology), "planner": planner.rank(workload, topology).best[0]}
        if args.verify:
            results = plan_check.check(
                config, workload, list(plans.values()), **compiles(), cache=args.cache, timeout_s=900,
                progress=lambda c: print(plan_check.line(c), file=sys.stderr, flush=True),
            )  # fmt: skip
            checked = dict(zip(plans, results, strict=True))
        row: dict[str, Any] = {"topology": name, "devices": topology.devices, "global_batch": batch}
        for which, p in plans.items():
            row[which] = {"plan": str(p.plan), "predicted_step_s": p.seconds, "predicted_peak_bytes": round(p.bytes)}
            if which in checked:
                row[which] |= {k: v for k, v in checked[which].row().items() if k not in ("plan", "topology")}
        if row["fsdp"]["plan"].startswith("data="):  # as it was run: parameters flattened, sharded over all devices
            flat = dataclasses.replace(plans["fsdp"].plan, mesh=MeshConfig(fsdp=topology.devices))
            row["flat_fsdp_step_s"] = planner.predict(workload, topology, flat).seconds
        row["speedup"] = row["fsdp"]["predicted_step_s"] / row["planner"]["predicted_step_s"]
        rows.append(row)
        print(table_row(row), flush=True)
    args.out.with_suffix(".json").write_text(
        json.dumps({"rows": rows, "versions": environment(), "date": datetime.date.today().isoformat()}, indent=2)
        + "\n"
    )
    plot(rows, args.out.with_suffix(".svg"))


def table_row(row):
    """A line of the table in Markdown."""
    cells = [row["topology"], str(row["global_batch"])]
    for which in ("fsdp", "planner"):
        r = row[which]
        compiled = f" / {r['compiled_peak_bytes'] / 1e9:.1f}" if r.get("compiled_peak_bytes") else ""
        by_bytes = f" / {r['step_s_by_compiled_bytes']:.2f}" if r.get("step_s_by_compiled_bytes") else ""
        cells += [f"`{r['plan']}`", f"{r['predicted_step_s']:.2f}{by_bytes} s"]
        cells += [f"{r['predicted_peak_bytes'] / 1e9:.1f}{compiled} GB"]
    return "| " + " | ".join([*cells, f"{row['speedup']:.2f}"]) + " |"


def plot(rows, path):
    """Step time of both on every topology, plain FSDP = 1."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    at = range(len(rows))
    axes.bar([x - 0.2 for x in at], [1.0] * len(rows), 0.38, label="plain FSDP", color="#8c8c8c")
    axes.bar([x + 0.2 for x in at], [1 / r["speedup"] for r in rows], 0.38, label="planner", color="#2a6f97")
    for x, row in zip(at, rows, strict=True):
        axes.text(x + 0.2, 1 / row["speedup"] + 0.02, f"{row['planner']['predicted_step_s']:.1f} s", ha="center")
        axes.text(x - 0.2, 1.02, f"{row['fsdp']['predicted_step_s']:.1f} s", ha="center")
    axes.set_xticks(list(at), [r["topology"] for r in rows])
    axes.set_ylabel("predicted step time, plain FSDP = 1")
    axes.set_ylim(0, 1.2)
    axes.legend(loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
