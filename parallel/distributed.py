"""Several processes as one run: how they find each other, decide alike, and end together.

jax knows the schemes by which a pod tells its processes who they are (`jax._src.clusters`: Slurm, Open MPI, TPU
metadata, GKE, Kubernetes jobs); plain flags stand in where there is none. Its own start is called only where there is
more than one process, and guarded: where it cannot connect it ends the process with a stack trace.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import clusters
from jax._src import distributed as runtime  # the key-value store that all processes share has no public name
from jax._src.clusters import cloud_tpu_cluster
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from errors import RunError, UserError
from parallel.hosts import BY_HAND, HostFlags

_WAIT_MS = 60 * 60 * 1000  # for a process that is busy; of one that died jax's heartbeat tells within 100 s
_POLL_S = 0.5  # between two looks whether another process has failed
_GRACE_S = 10.0  # for the others to hear that this one has failed
_calls = itertools.count()
_asked = itertools.count(1)


@dataclasses.dataclass(frozen=True)
class Hosts:
    """Who this process is."""

    process: int
    processes: int
    how: str
    """What said so."""


@contextlib.contextmanager
def start(flags: HostFlags, timeout_s: float = 300.0) -> Iterator[Hosts]:
    """Start `jax.distributed` where there is more than one process; inside, an error of one process ends all of them.

    The process that fails raises its error as ever; the others print it and end with the same exit code, in whatever
    they were waiting for. Before anything asks JAX for a device.

    Args:
        flags: what the user said.
        timeout_s: how long to wait for the other processes.

    Raises:
        UserError: the flags or the pod's variables do not say who this process is; the coordinator's port is taken.
        RunError: not all processes were there in time.
    """
    found = _find(flags, timeout_s)
    hosts = Hosts(found.process, found.processes, found.how)
    if hosts.processes == 1:
        yield hosts
        return
    _connect(found, timeout_s)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(hosts, ended), name="hosts", daemon=True)
    watcher.start()
    try:
        yield hosts
    except BaseException as e:
        _leave_with(_exit_code(e))
        ended.set()
        watcher.join()
        _tell(hosts, e)
        raise
    ended.set()
    watcher.join()


def several() -> bool:
    """Whether this run has more than one process; starts no backend."""
    return runtime.global_state.client is not None


def is_lead() -> bool:
    """Whether this process is the one that writes what a run writes once."""
    return runtime.global_state.process_id == 0


def from_lead(value: Any) -> Any:
    """The lead's value, JSON, in every process. All must call it, in the same order, from their main thread."""
    if not several():
        return value
    client, key = _client(), f"hosts/lead/{next(_calls)}"
    if is_lead():
        client.key_value_set(key, json.dumps(value))
        return value
    return json.loads(client.blocking_key_value_get(key, _WAIT_MS))


def check_same(what: str, values: dict[str, Any]) -> None:
    """Refuse to go on where a process has other values, JSON, than the lead: before that, none goes on.

    All must call it, as `from_lead`.

    Raises:
        UserError: names what differs, in the process where it does.
    """
    if not several():
        return
    mine = dict(_flat(json.loads(json.dumps(values))))
    theirs = from_lead(mine)
    names = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    if names:
        listed = "; ".join(f"{name} = {mine.get(name)!r} instead of {theirs.get(name)!r}" for name in names[:5])
        raise UserError(
            f"{what}: not the same in this process as in process 0: {listed}; start every process with the same "
            "command, code and data"
        )
    _client().wait_at_barrier(f"hosts/same/{next(_calls)}", _WAIT_MS)


def together() -> None:
    """Wait until all processes are here. All must call it, as `from_lead`.

    Before a program with collectives runs for the first time: one process has found it compiled, another compiles for
    minutes, and the transports give up after 30 seconds.
    """
    if several():
        _client().wait_at_barrier(f"hosts/together/{next(_calls)}", _WAIT_MS)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def takes_notice() -> bool:
    """Whether JAX's preemption service listens for this run: for SIGTERM, by which clusters announce an eviction."""
    return runtime.global_state.preemption_sync_manager is not None


def preempted() -> bool:
    """Whether all processes are to save and leave now, as one of them was told; all ask alike, after every step."""
    # Counted from the start of the process: what was told before the first question is answered at the first, 1.
    return takes_notice() and multihost_utils.reached_preemption_sync_point(next(_asked))


class Vote:
    """Turns what any process asks for into what all of them do at the same step.

    The answer is that to the question before, so that nobody waits for a step that has just been given to the devices.
    A process alone is answered at once.
    """

    def __init__(self, mesh: Mesh):
        self._shape = (mesh.size,)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._any = jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def forget(self) -> None:
        """Let what was asked last go unanswered. All call it alike."""
        self._before = None

    def __call__(self, flag: bool) -> bool:
        """Whether any process had asked when this was last called."""
        if not several():
            return flag
        before = self._before
        mine = jax.make_array_from_callback(self._shape, self._sharding, lambda _: np.full(1, flag))
        self._before = self._any(mine)
        return before is not None and bool(before)


# ---- who we are ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Found:
    process: int
    processes: int
    how: str
    coordinator: str = ""
    local: int | None = None
    """The one GPU of the host that this process takes; None: all that it sees."""


def _find(flags: HostFlags, timeout_s: float) -> _Found:
    if flags.processes == 1:
        return _Found(0, 1, "--processes 1")
    if flags.coordinator is not None and flags.processes is not None and flags.process_id is not None:
        return _Found(flags.process_id, flags.processes, "flags", flags.coordinator)
    try:
        cluster = next((c for c in clusters.ClusterEnv._cluster_types if _applies(c)), None)
        if cluster is None:
            _refuse_traces()
            return _Found(0, 1, "alone")
        process, processes = cluster.get_process_id(), cluster.get_process_count()
        if processes == 1:
            return _Found(0, 1, cluster.name)
        coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
            timeout_secs=int(timeout_s), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
        )
        return _Found(process, processes, cluster.name, coordinator, _one_gpu(cluster))
    except UserError:
        raise
    except Exception as e:  # jax's own, of requests and kubernetes, and of variables that are no numbers
        raise UserError(f"hosts: the pod does not say who this process is ({e!r}); give {BY_HAND}") from e


def _applies(cluster: type[clusters.ClusterEnv]) -> bool:
    if cluster.opt_in_only_method:
        return False
    if issubclass(cluster, cloud_tpu_cluster.BaseTpuCluster) and jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        return False  # simulated devices, on a machine that has others
    if cluster is clusters.K8sCluster and "JOB_COMPLETION_INDEX" not in os.environ:
        return False  # a pod, but none of a job's several
    return cluster.is_env_present()


def _refuse_traces() -> None:
    """Refuse to run alone where variables say that there are others, but not all that it takes to find them."""
    has = os.environ.get
    if int(has("SLURM_NTASKS", "1")) > 1:
        raise UserError(
            f"hosts: this Slurm job has {has('SLURM_NTASKS')} tasks, but srun did not start this process (no "
            f"{', '.join(v for v in _SLURM if v not in os.environ)}); start it with srun, or give {BY_HAND}"
        )
    if int(has("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"hosts: this is process {has('OMPI_COMM_WORLD_RANK')} of {has('OMPI_COMM_WORLD_SIZE')} of Open MPI, which "
            f"does not say where process 0 is (from version 5 on); give --coordinator HOST:PORT --processes "
            f"{has('OMPI_COMM_WORLD_SIZE')} --process-id $OMPI_COMM_WORLD_RANK"
        )
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        raise UserError(
            f"hosts: this is pod {has('JOB_COMPLETION_INDEX')} of a Kubernetes job, whose size only its API tells; "
            f"install jax[k8s], or give {BY_HAND}"
        )


#: What jax needs of Slurm (`jax._src.clusters.slurm_cluster`).
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def _one_gpu(cluster: type[clusters.ClusterEnv]) -> int | None:
    """Of several processes on a host each takes the GPU of its number, as with jax; one alone takes all.

    jax would give it one of them, and a process that was given its GPU by the launcher one that it cannot see.
    """
    has = os.environ.get
    one_process = has("SLURM_NTASKS", "") == has("SLURM_STEP_NUM_NODES") or has("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    one_visible = has("CUDA_VISIBLE_DEVICES") is not None and "," not in has("CUDA_VISIBLE_DEVICES", "")
    if one_process or one_visible or has("JAX_LOCAL_DEVICE_IDS"):
        return None
    return cluster.get_local_process_id()


# ---- starting and ending together ----------------------------------------------------------------------------------


def _connect(found: _Found, timeout_s: float) -> None:
    """`jax.distributed.initialize`, in a thread: if it cannot connect it never returns, and ends the process later."""
    port = int(found.coordinator.rpartition(":")[2])
    if found.process == 0:
        with socket.socket() as probe:  # jax 0.10.2 crashes on a port that is taken
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as e:
                raise UserError(
                    f"hosts: process 0 cannot listen on port {port} ({e.strerror}); give another --coordinator port"
                ) from e
    failure: list[BaseException] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                found.coordinator,
                found.processes,
                found.process,
                local_device_ids=found.local,
                cluster_detection_method="deactivate",
                initialization_timeout=int(timeout_s) + 60,
            )
        except BaseException as e:
            failure.append(e)

    thread = threading.Thread(target=initialize, name="jax.distributed", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise failure[0]
    if thread.is_alive():
        _leave_with(1)
        raise RunError(
            f"hosts: process {found.process} of {found.processes} ({found.how}): the others were not there after "
            f"{timeout_s:.0f} s; {_seen(found)}"
        )


def _seen(found: _Found) -> str:
    """What a process that waited in vain can say of the coordinator."""
    host, _, port = found.coordinator.rpartition(":")
    if found.process != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as e:
            return (
                f"nothing answers at {found.coordinator} ({e}): check that process 0 runs there, that this host can "
                "reach it, and that no firewall or proxy is between"
            )
    return (
        f"process 0 listens at {found.coordinator}: check that all {found.processes} were started, each with its own "
        "number, and can reach it"
    )


def _client() -> Any:
    return runtime.global_state.client


def _watch(hosts: Hosts, ended: threading.Event) -> None:
    """End this process once another one says that it has failed."""
    while not ended.wait(_POLL_S):
        try:
            failed = json.loads(_client().key_value_try_get("hosts/failed"))
        except Exception:  # not there; or the connection is gone, which jax itself ends the process for
            continue
        if failed["process"] != hosts.process:
            print(f"error: process {failed['process']} of {hosts.processes}: {failed['error']}", file=sys.stderr)
            _client().key_value_set(f"hosts/heard/{hosts.process}", "")
            if is_lead():  # the store is in this process, and jax aborts a process that loses it
                with contextlib.suppress(Exception):
                    _client().blocking_key_value_get("hosts/left", int(_GRACE_S * 1000))
                    time.sleep(_POLL_S)  # between saying so and being gone
            _leave(failed["code"])


def _tell(hosts: Hosts, error: BaseException) -> None:
    """Tell the others of an error, and wait until they have heard: once this process ends, they may not."""
    text = str(error) if isinstance(error, (UserError, RunError, OSError)) else repr(error)
    with contextlib.suppress(Exception):  # another was first, or is gone
        record = {"process": hosts.process, "error": text, "code": _exit_code(error)}
        _client().key_value_set("hosts/failed", json.dumps(record))
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and len(_client().key_value_dir_get("hosts/heard/")) < hosts.processes - 1:
            time.sleep(_POLL_S / 5)
    atexit.register(_say_left)


def _say_left() -> None:
    """The last that a failed process says, when its own error is printed: see `_watch`."""
    with contextlib.suppress(Exception):
        _client().key_value_set("hosts/left", "", allow_overwrite=True)


def _exit_code(error: BaseException) -> int:
    """As the command line's."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def _leave_with(code: int) -> None:
    """End with this code at the usual end of the process, or soon: jax, Orbax and Python would wait for the others."""
    atexit.register(_leave, code)  # runs before jax's own, which was registered earlier
    timer = threading.Timer(3 * _GRACE_S, _leave, (code,))
    timer.daemon = True
    timer.start()


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)
