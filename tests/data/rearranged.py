"""Made-up samples that are no windows, as fill-in-the-middle makes them."""

import dataclasses

import numpy as np

from data.dataset import SyntheticData
from data.sample import Sample


@dataclasses.dataclass(frozen=True)
class Rearranged(SyntheticData):
    """Targets of their own, of which a third does not count; and a source of ten such samples to validate on."""

    uncounted: int = 0
    """Added to the targets that do not count."""

    @property
    def sources(self) -> tuple[str, ...]:
        return ("held-out",)

    def sample(self, chunk: int, position: int) -> Sample:
        inputs, targets, _ = super().sample(chunk, position)
        weights = ((np.arange(self.sequence_length) + chunk + position) % 3 > 0).astype(np.float32)
        shift = 7 * chunk + position + np.where(weights == 0, self.uncounted, 0)
        return Sample(inputs, ((targets + shift) % self.vocab_size).astype(np.int32), weights)

    def validation(self, source: str, start: int = 0, stop: int | None = None, step: int = 1) -> Sample:
        all_of_them = (np.stack(values) for values in zip(*(self.sample(0, n) for n in range(10))))
        return Sample(*(values[start:stop:step] for values in all_of_them))
