"""What the planner predicts of a plan beside what the compiler of the platform says of it."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from errors import UserError
from parallel import compiler, planner
from parallel.axes import FSDP, MESH_AXES, TENSOR
from parallel.compiler import Report, Request
from parallel.pipeline import Timetable
from parallel.planner import Prediction, Workload
from parallel.topology import Topology
from training.config import RunConfig
from training.planning import with_plan


@dataclasses.dataclass(frozen=True)
class Checked:
    """One plan, predicted and compiled."""

    prediction: Prediction
    report: Report
    refined: Prediction | None
    """The prediction by the compiler's own bytes in place of the model's; None if it did not compile."""

    @property
    def fits(self) -> bool:
        """Whether there is a program, and it fits: NVIDIA's compiler does not look at the size of the memory."""
        peak = self.report.peak_bytes
        return self.report.compiled and peak is not None and peak <= self.prediction.topology.chip.hbm_bytes

    @property
    def memory_error(self) -> float | None:
        """(predicted - compiled) / compiled peak memory, or None."""
        peak = self.report.peak_bytes
        return None if peak is None else (self.prediction.bytes - peak) / peak

    def row(self) -> dict[str, Any]:
        """Plain values for a table of results."""
        p, r = self.prediction, self.report
        return {
            "topology": str(p.topology),
            "plan": p.plan.as_dict(),
            "predicted_peak_bytes": round(p.bytes),
            "compiled_peak_bytes": r.peak_bytes,
            "memory_error": self.memory_error,
            "predicted_flops": p.flops,
            "compiled_flops": r.flops,
            "predicted_sent_bytes": {a: round(b) for a, b in p.sent_bytes.items()},
            "compiled_sent_bytes": None if not r.compiled else {a: round(b) for a, b in sent_by_axis(r).items()},
            "predicted_step_s": p.seconds,
            "step_s_by_compiled_bytes": self.refined and self.refined.seconds,
            "fits": self.fits,
            "compile_s": r.compile_s,
            "refused": r.refused,
            "failed": r.failed,
            "versions": r.versions,
        }


def target(topology: Topology) -> str:
    """The name of a topology for `compiler.devices`: the chips and their shape, whatever their network.

    Raises:
        UserError: a CPU, for which there is nothing to ask; or the compiler is not installed.
    """
    if topology.chip.platform == "cpu":
        raise UserError(
            f"plan --verify: {topology}: no compiler is asked for simulated devices; name slices of an accelerator"
        )
    slices = f"{topology.slices}*" if topology.slices > 1 else ""
    name = f"{slices}{topology.chip.name}:{'x'.join(map(str, topology.shape))}"
    compiler.require(name)
    return name


def sent_by_axis(report: Report) -> dict[str, float]:
    """Bytes that each device sends in a step, by the mesh axis that they travel over.

    A collective over several axes together counts for the outermost of them, whose links are the slowest. What a
    pipeline does in every tick the program does in idle ticks too (in "1f1b" it does not, but the count cannot tell):
    that share is taken off, for the model counts it in the bubble.
    """
    totals: dict[str, float] = {}
    plan = report.plan
    table = Timetable(plan.schedule, plan.mesh.pipeline, plan.microbatches, plan.repeats)
    busy = plan.microbatches * plan.repeats / table.ticks if plan.mesh.pipeline > 1 else 1.0
    shares = {TENSOR: busy, FSDP: busy if plan.schedule == "1f1b" and plan.gather != "once" else 1.0}
    for traffic in report.collectives:
        group = 1
        for axis in traffic.axes:
            group *= getattr(report.plan.mesh, axis)
        outermost = next((a for a in MESH_AXES if a in traffic.axes), None)
        if outermost is not None and group > 1:
            totals[outermost] = totals.get(outermost, 0.0) + planner.sent(traffic.kind, traffic.bytes, group)
    return {axis: total * shares.get(axis, 1.0) for axis, total in totals.items()}


def check(
    config: RunConfig,
    workload: Workload,
    predictions: Sequence[Prediction],
    command: Sequence[str],
    sources: Sequence[Path],
    cache: Path,
    timeout_s: float,
    progress: Callable[[Checked], None],
) -> list[Checked]:
    """Compile each plan for its topology and set the two beside each other, in order.

    Args:
        config: the run; its plan is replaced.
        workload: the same run, as the planner sees it.
        predictions: plans, each with its topology.
        command: see `compiler.check`; so are the next three.
        sources: what makes the program.
        cache: folder of answers.
        timeout_s: for each.
        progress: called with each as it is there.
    """
    requests = [Request(with_plan(config, p.plan).to_dict(), target(p.topology)) for p in predictions]

    def checked(index: int, report: Report) -> Checked:
        p = predictions[index]
        refined = None
        if report.compiled:
            # Of FLOPs the model knows better: the count takes idle ticks and masked attention for work.
            refined = planner.predict(workload, p.topology, p.plan, sent_by_axis(report))
        return Checked(p, report, refined)

    reports = compiler.check(
        requests,
        command,
        sources,
        cache,
        timeout_s=timeout_s,
        progress=lambda index, report: progress(checked(index, report)),
    )
    return [checked(index, report) for index, report in enumerate(reports)]


HEAD = f"{'predicted':>10} {'compiled':>10} {'error':>7} {'step':>9} {'by bytes':>9} {'compile':>8}  plan"


def line(checked: Checked) -> str:
    """A row of the table under HEAD: memory twice, step time by the model's bytes and by the compiler's."""
    p, r = checked.prediction, checked.report
    if not r.compiled:
        return f"{p.bytes / 1e9:>7.2f} GB {'refused' if r.refused else 'failed':>10}  {p.plan}: {r.refused or r.failed}"
    assert checked.refined is not None
    assert r.peak_bytes is not None
    return (
        f"{p.bytes / 1e9:>7.2f} GB {r.peak_bytes / 1e9:>7.2f} GB {checked.memory_error:>+7.1%} {p.seconds:>8.3f}s "
        f"{checked.refined.seconds:>8.3f}s {r.compile_s:>7.1f}s  {p.plan}"
    )
