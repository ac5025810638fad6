"""A plan: a mesh, and how one training step is carried out on it. What the planner chooses and the compiler checks."""

import dataclasses
from typing import Any, Literal, get_args

from errors import UserError
from parallel.mesh import MeshConfig

#: How microbatches pass through the stages: all forward, then all backward (by autodiff; with ``repeats`` above 1
#: circular, also called interleaved); or one forward and one backward in turn, memory flat in microbatches.
Schedule = Literal["gpipe", "1f1b"]
#: When weights are gathered over ``fsdp``: once per step (whole weights stay live), once per microbatch and stage, or
#: in each layer (ZeRO-3).
Gather = Literal["once", "tick", "layer"]
#: What a layer keeps for its backward pass: everything; the results of matrix products; nothing; or nothing on the
#: device, its input going to host memory and back.
Remat = Literal["none", "dots", "full", "offload"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the planner chooses: it decides speed and memory of a step and, but for rounding, nothing of its result."""

    mesh: MeshConfig
    """Degrees, none of them -1."""
    microbatches: int = 1
    """Parts that the global batch is worked off in."""
    schedule: Schedule = "gpipe"
    """Without a pipeline the two are the same: one microbatch after the other."""
    repeats: int = 1
    """Times that a microbatch passes through every stage, each time through other layers (circular schedule)."""
    gather: Gather = "layer"
    remat: Remat = "none"
    remat_stage: bool = False
    """Keep only the input of a stage for its backward pass (a microbatch's, without a pipeline), and run the stage
    again; ``remat`` then says what that second run keeps. "1f1b" does so always."""

    def __post_init__(self) -> None:
        if -1 in self.mesh.degrees.values():
            raise UserError(f"plan: mesh {self.mesh}: give every degree")
        check_choices(self, "microbatches")

    def __str__(self) -> str:
        parts = [str(self.mesh), f"microbatches={self.microbatches}", f"gather={self.gather}", f"remat={self.remat}"]
        if self.mesh.pipeline > 1:
            parts.insert(2, self.schedule + (f" x{self.repeats}" if self.repeats > 1 else ""))
        if self.remat_stage:
            parts.append("remat_stage")
        return " ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for results: every field, and ``text``, the plan in a line."""
        return {**dataclasses.asdict(self), "mesh": str(self.mesh), "text": str(self)}


def padded_rows(global_batch: int, microbatches: int, ways: int) -> int:
    """Rows of each microbatch over the whole mesh, of which every device has the same number.

    The rows of the batch stand in their order at the front of the microbatches; those that are missing at the end are
    padding, and count nothing.

    Args:
        global_batch: rows that there are.
        microbatches: parts that they are worked off in.
        ways: devices that the rows of a microbatch are spread over.
    """
    return ways * -(-global_batch // (microbatches * ways))


def batch_refusal(global_batch: int, microbatches: int, ways: int) -> str | None:
    """Why a batch cannot be spread like that, or None: every device and every microbatch must get a row that counts."""
    if ways > global_batch:
        return f"data*fsdp = {ways} devices share the rows of a batch, and data.global_batch={global_batch} has fewer"
    most = -(-global_batch // padded_rows(global_batch, microbatches, ways))
    if microbatches > most:
        return (
            f"microbatches={microbatches} cut a batch of {global_batch} rows, {ways} or a multiple of them at a time "
            f"(data*fsdp), so that {microbatches - most} would hold nothing but padding; {most} are enough"
        )
    return None


def check_choices(how: Any, *counts: str) -> None:
    """Refuse what no step can be carried out by (UserError).

    Args:
        how: has ``gather``, ``remat``, ``schedule`` and ``repeats``.
        counts: other fields of it that must be at least 1.
    """
    choose("gather", how.gather, Gather)
    choose("remat", how.remat, Remat)
    choose("schedule", how.schedule, Schedule)
    for name in (*counts, "repeats"):
        if getattr(how, name) < 1:
            raise UserError(f"{name} {getattr(how, name)}: must be at least 1")
    if how.repeats > 1 and how.schedule != "gpipe":
        raise UserError(f"repeats {how.repeats}: is for the schedule gpipe, not {how.schedule!r}")


def choose(name: str, value: str, names: object) -> None:
    """Refuse a value that is not one of a Literal's (UserError)."""
    if value not in get_args(names):
        raise UserError(f"{name} {value!r}: choose from {', '.join(get_args(names))}")
