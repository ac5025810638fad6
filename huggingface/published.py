"""Names under which LLM360 published its checkpoints, and what a recipe's arithmetic says of each (fact sheet 4)."""

import dataclasses
import re
from collections.abc import Sequence

from errors import UserError
from training.config import Position, RunConfig

#: Family -> names of its revisions.
NAMES = {
    "amber": re.compile(r"ckpt_([0-9]{1,6})"),
    "crystal": re.compile(r"CrystalCoder_phase([1-9])_checkpoint_([0-9]{1,9})"),
}
EXAMPLES = {"amber": "ckpt_012", "crystal": "CrystalCoder_phase2_checkpoint_018000"}


def is_published(name: str, family: str) -> bool:
    """Whether a folder's name is that of a published revision."""
    return bool(NAMES[family].fullmatch(name))


def locate(place: str, family: str, recipe: RunConfig | None) -> tuple[int, Position | None]:
    """Index in the series of a checkpoint, and where in the run it lies, if the recipe is known.

    Args:
        place: an index, or a published name: ``ckpt_012``, ``CrystalCoder_phase2_checkpoint_018000``.
        family: of the model.
        recipe: of the run, or None.

    Raises:
        UserError: it is neither, or the recipe's series has no such checkpoint.
    """
    match = NAMES[family].fullmatch(place)
    if match and family == "crystal":
        if recipe is None:
            raise UserError(f"--as {place}: which index that is, only the recipe knows; give --recipe")
        phase, step = int(match[1]) - 1, int(match[2])
        if found := next((p for p in recipe.positions if (p.phase, p.phase_step) == (phase, step)), None):
            return found.index, found
        near = sorted((p.phase_step for p in recipe.positions if p.phase == phase), key=lambda s: abs(s - step))[:3]
        steps = ", ".join(map(str, sorted(near))) or "none"
        raise UserError(
            f"--as {place}: the series of {recipe.recipe} has no checkpoint there (nearest in this phase: {steps}); "
            "give its cadence for each phase, for example --every 1500 1500 1000"
        )
    match = match or re.fullmatch(r"([0-9]{1,6})", place)
    if not match:
        raise UserError(f"--as {place}: neither an index nor a published name of {family}, such as {EXAMPLES[family]}")
    index = int(match[1])
    if recipe is None:
        return index, None
    if index >= len(recipe.positions):
        raise UserError(f"--as {place}: the series of {recipe.recipe} ends at {len(recipe.positions) - 1}")
    return index, recipe.positions[index]


def with_cadence(recipe: RunConfig, every: Sequence[int]) -> RunConfig:
    """The recipe with another number of steps between the series checkpoints of each phase."""
    if len(every) != len(recipe.phases):
        raise UserError(f"--every: {len(every)} numbers, but {recipe.recipe} has {len(recipe.phases)} phases")
    phases = (dataclasses.replace(p, series_every_steps=n) for p, n in zip(recipe.phases, every, strict=True))
    return dataclasses.replace(recipe, phases=tuple(phases))
