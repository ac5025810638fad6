"""What a user says of the processes of a run; `parallel.distributed` finds out the rest and starts them."""

import dataclasses

from errors import UserError

BY_HAND = "--coordinator HOST:PORT (of process 0), --processes N and --process-id K, or --processes 1 to run alone"


@dataclasses.dataclass(frozen=True)
class HostFlags:
    """Which process of how many this is; by default as the pod says (Slurm, Open MPI, TPU, GKE, Kubernetes)."""

    coordinator: str | None = None
    """HOST:PORT of process 0, as all processes reach it."""
    processes: int | None = None
    """Processes in all; 1 = this one runs alone, whatever the pod says."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        if self.processes == 1 and self.coordinator is None and self.process_id in (None, 0):
            return
        given = {f"--{name.replace('_', '-')}": value for name, value in dataclasses.asdict(self).items()}
        missing = [flag for flag, value in given.items() if value is None]
        if 0 < len(missing) < len(given):
            raise UserError(f"hosts: {' and '.join(missing)} missing; give {BY_HAND}")
        if self.coordinator is None or self.processes is None or self.process_id is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise UserError(f"hosts: --coordinator {self.coordinator!r} is not HOST:PORT")
        if not 0 <= self.process_id < self.processes:
            raise UserError(
                f"hosts: --process-id {self.process_id} of --processes {self.processes}; numbers go from 0 to "
                "processes - 1"
            )
