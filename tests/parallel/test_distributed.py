"""Processes find each other by what the pod says, decide alike and end together; on one machine, over real sockets."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from errors import UserError
from parallel import distributed
from parallel.distributed import HostFlags, Hosts

ROOT = Path(__file__).resolve().parent.parent.parent
SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}


@pytest.fixture
def pod(monkeypatch):
    """Sets a pod's variables, and no other pod's."""
    for name in list(os.environ):
        if re.match("SLURM_|OMPI_|KUBERNETES_|JOB_COMPLETION|JAX_COORDINATOR|TPU_|MEGASCALE_|CUDA_VISIBLE", name):
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(*item) for item in variables.items()]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"processes": 2}, "--coordinator and --process-id missing"),
        ({"coordinator": "a:1", "process_id": 0}, "--processes missing"),
        ({"processes": 1, "process_id": 1}, "--coordinator missing"),
        ({"coordinator": "a", "processes": 2, "process_id": 0}, "--coordinator 'a' is not HOST:PORT"),
        ({"coordinator": "a:70000", "processes": 2, "process_id": 0}, "'a:70000' is not HOST:PORT"),
        ({"coordinator": "a:1", "processes": 2, "process_id": 2}, "--process-id 2 of --processes 2"),
    ],
)
def test_refuses_flags_that_do_not_say_it(flags, message):
    with pytest.raises(UserError, match=message):
        HostFlags(**flags)


def test_starts_nothing_for_one_process(pod):
    pod()
    with distributed.start(HostFlags()) as hosts:
        assert hosts == Hosts(0, 1, "alone")
        assert (distributed.several(), distributed.is_lead(), distributed.from_lead([1])) == (False, True, [1])
    pod(**SLURM | {"SLURM_NTASKS": "1"})
    with distributed.start(HostFlags()) as hosts:
        assert hosts == Hosts(0, 1, "slurm")
    pod(SLURM_NTASKS="6")
    with distributed.start(HostFlags(processes=1)) as hosts:
        assert hosts == Hosts(0, 1, "--processes 1")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SLURM, (4, 6, "slurm", "node07:61440", 1)),
        (SLURM | {"SLURM_STEP_NUM_NODES": "6"}, (4, 6, "slurm", "node07:61440", None)),  # alone on its host: all GPUs
        (SLURM | {"CUDA_VISIBLE_DEVICES": "5"}, (4, 6, "slurm", "node07:61440", None)),  # given its GPU already
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "node07-ib:9"}, (4, 6, "slurm", "node07-ib:9", 1)),
        (OPEN_MPI, (1, 2, "ompi", "10.96.0.1:61442", None)),
        (
            SLURM | OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            (1, 2, "ompi", "10.96.0.1:61442", 0),
        ),  # mpirun in salloc
    ],
)
def test_reads_what_the_pod_says(pod, variables, expected):
    pod(**variables)
    found = distributed._find(HostFlags(), 1)
    assert (found.process, found.processes, found.how, found.coordinator, found.local) == expected


def test_flags_go_before_the_pod(pod):
    pod(**SLURM)
    found = distributed._find(HostFlags("here:1", 8, 7), 1)
    assert (found.process, found.processes, found.how, found.coordinator, found.local) == (
        7,
        8,
        "flags",
        "here:1",
        None,
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"},
            "has 4 tasks, but srun did not start this process .no SLURM_STEP_NODELIST, SLURM_P",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, "process 3 of 4 of Open MPI.*--processes 4"),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "8192.0;nothing"}, "the pod does not say.*Could not parse coordinator"),
        (SLURM | {"SLURM_NTASKS": "many"}, "the pod does not say.*'many'.*give --coordinator HOST:PORT"),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"},
            r"pod 2 of a Kubernetes job.*jax\[k8s\]",
        ),
    ],
)
def test_refuses_a_pod_that_says_half(pod, variables, message):
    pod(**variables)
    with pytest.raises(UserError, match=message), distributed.start(HostFlags()):
        pass


# ---- real processes ------------------------------------------------------------------------------------------------

PRELUDE = """
import sys
import jax
from parallel import distributed
from parallel.distributed import HostFlags, start
from parallel.mesh import MeshConfig, simulate

simulate(2, check=False)
me = int(sys.argv[1])
"""

TOGETHER = """
with start(HostFlags(), timeout_s=60) as hosts:
    mesh = MeshConfig(data=2 * hosts.processes).build()
    vote = distributed.Vote(mesh)
    asked = [vote(me == 1 and n == 2) for n in range(5)]
    distributed.check_same("test", {"a": {"b": [1, 2]}})
    host_of = [d.process_index for d in mesh.devices.flat]
    print(hosts.process, hosts.processes, hosts.how, host_of, distributed.from_lead(me), distributed.is_lead(), asked)
"""

FAILING = """
with start(HostFlags("localhost:%d", 2, me), timeout_s=60):
    if me == 1:
        raise OSError("disk on fire")
    distributed.from_lead(0)
    jax.numpy.zeros(1)
    import time
    time.sleep(600)  # a collective that the other one never joins
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def run(program, processes, **variables):
    """Exit code, stdout and stderr of each."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, str(k)],
            env=os.environ
            | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
            | {n: v.format(k) for n, v in variables.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in processes
    ]
    try:
        return [(p.wait(timeout=120), p.stdout.read(), p.stderr.read()) for p in running]
    finally:
        for process in running:
            process.kill()


def test_two_tasks_of_slurm_find_each_other_and_vote(pod):
    pod(
        **SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "1"}, JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}"
    )
    ended = run(TOGETHER, range(2), SLURM_PROCID="{}", SLURM_LOCALID="{}")
    assert [code for code, _, _ in ended] == [0, 0], ended
    said = [out.splitlines()[-1] for _, out, _ in ended]
    asked = [False, False, False, True, False]  # one question later, by both
    assert said == [f"{k} 2 slurm [0, 0, 1, 1] 0 {k == 0} {asked}" for k in range(2)]


def test_an_error_in_one_process_ends_the_other(pod):
    pod()
    (code, _, err), (other_code, _, other_err) = run(FAILING % free_port(), range(2))
    assert (code, err) == (1, "error: process 1 of 2: disk on fire\n")
    assert other_code == 1
    assert "OSError: disk on fire" in other_err


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (0, "process 0 of 2 (flags): the others were not there after 2 s; process 0 listens at localhost:"),
        (1, "process 1 of 2 (flags): the others were not there after 2 s; nothing answers at localhost:"),
    ],
)
def test_waits_for_the_others_only_so_long(pod, process, message):
    pod()
    program = f'with start(HostFlags("localhost:{free_port()}", 2, me), timeout_s=2):\n    pass'
    ((code, _, err),) = run(program, [process])
    assert code == 1
    assert f"errors.RunError: hosts: {message}" in err


def test_refuses_a_port_that_is_taken(pod):
    pod()
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"process 0 cannot listen on port {port} .*another --coordinator port"):
            distributed._connect(distributed._find(HostFlags(f"localhost:{port}", 2, 0), 1), 1)
