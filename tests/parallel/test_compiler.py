"""Questions to compilers in processes of their own: what comes back, also when a process does not."""

import dataclasses
import json
import sys

import pytest

from errors import UserError
from parallel import compiler
from parallel.compiler import Report, Request
from parallel.hlo import Traffic
from parallel.mesh import MeshConfig
from parallel.plan import Plan
from parallel.topology import Topology

needs_libtpu = pytest.mark.skipif(compiler.missing("v5e") is not None, reason="libtpu is not installed")
needs_cuda = pytest.mark.skipif(compiler.missing("h100") is not None, reason="the CUDA plugin is not installed")

#: A child that answers, or does what its topology says, and notes that it was started.
CHILD = """
import json, os, sys, time
request = json.load(sys.stdin)
with open(sys.argv[1], "a") as f:
    f.write(request["topology"] + "\\n")
does = request["topology"]
if does == "abort":
    print("I0000 starting", file=sys.stderr)
    print("F0000 00:00 emitter.cc:676] Check failed: a == b", file=sys.stderr)
    print("    @ 0x1234 main", file=sys.stderr)
    sys.stderr.flush()
    os.abort()
if does == "hang":
    print("still at it", file=sys.stderr, flush=True)
    time.sleep(60)
if does == "mistake":
    print("mesh: 3 does not divide", file=sys.stderr)
    sys.exit(2)
if does == "bug":
    raise KeyError("nobody knows")
print("a line that a library prints")
answer = json.loads(sys.argv[2])
answer["topology"] = does
answer["versions"] = {k: v for k, v in os.environ.items() if k in ("JAX_PLATFORMS", "XLA_FLAGS")}
print(json.dumps(answer) if does != "chatter" else "I0000 done")
"""


def answer(**fields):
    report = Report(
        Plan(MeshConfig(fsdp=4, tensor=2), microbatches=2, gather="once"),
        "v5e:2x4",
        {"jax": "1"},
        peak_bytes=30,
        argument_bytes=10,
        temp_bytes=20,
        flops=99,
        collectives=(Traffic("all-gather", ("fsdp",), 2, 4, 64), Traffic("all-reduce", ("fsdp", "tensor"), 1, 1, 4)),
        kernels=("tpu_custom_call",),
        compile_s=1.5,
    )
    return dataclasses.replace(report, **fields)


class Lab:
    """A cache, a file of sources, and a list of the children that were started."""

    def __init__(self, path, config):
        self.cache, self.source, self.log = path / "cache", path / "step.py", path / "log"
        self.source.write_text("x = 1")
        self.log.touch()
        self.config, self.seen = config, []

    def ask(self, *topologies, config=None, **options):
        requests = [Request(config or self.config, t) for t in topologies]
        command = [sys.executable, "-c", CHILD, str(self.log), json.dumps(answer().to_dict())]
        return compiler.check(
            requests, command, [self.source], self.cache, progress=lambda n, r: self.seen.append((n, r)), **options
        )

    @property
    def started(self):
        return self.log.read_text().split()


@pytest.fixture
def lab(tmp_path, tiny):
    return Lab(tmp_path, dataclasses.replace(tiny, mesh=MeshConfig(data=2, fsdp=4)).to_dict())


def test_a_report_survives_json():
    for report in (answer(), answer(refused="RESOURCE_EXHAUSTED: no", needed_bytes=5, flops=None), answer(failed="x")):
        assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert answer().compiled
    assert not answer(refused="no").compiled
    assert not answer(failed="no").compiled


def test_a_request_has_the_plan_of_its_config(tiny):
    execution = dataclasses.replace(tiny.execution, microbatches=4, gather="once", remat="dots")
    config = dataclasses.replace(tiny, mesh=MeshConfig(fsdp=8), execution=execution)
    assert Request(json.loads(json.dumps(config.to_dict())), "v5e:2x4").plan == Plan(
        MeshConfig(fsdp=8), microbatches=4, gather="once", remat="dots"
    )


def test_failures_are_told_and_the_others_go_on(lab):
    names = ["abort", "v5e:2x4", "hang", "mistake", "bug", "chatter", "v5p:2x2x2"]
    reports = lab.ask(*names, timeout_s=5)
    assert [r.topology for r in reports] == names
    assert [r.compiled for r in reports] == [False, True, False, False, False, False, True]
    abort, _, hang, mistake, bug, chatter, _ = (r.failed for r in reports)
    assert abort.startswith("the compiler ended its process (SIGABRT) after ")
    assert abort.endswith("F0000 00:00 emitter.cc:676] Check failed: a == b")
    assert hang == "no answer after 5 s: still at it"
    assert mistake == "mesh: 3 does not divide"
    assert bug.startswith("exit code 1 after ")
    assert bug.endswith("KeyError: 'nobody knows'")
    assert chatter == "no report in the answer: a line that a library prints | I0000 done"
    assert reports[0].plan == Plan(MeshConfig(data=2, fsdp=4))
    assert [n for n, _ in lab.seen] == list(range(7))
    assert all(reports[n] == r for n, r in lab.seen)


def test_the_child_sees_no_accelerator_and_no_flags_of_the_parent(lab, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    (report,) = lab.ask("v5e:2x4")
    assert report.versions == {"JAX_PLATFORMS": "cpu"}


def test_an_answer_that_cannot_be_read_is_asked_for_again(lab):
    (first,) = lab.ask("v5e:2x4")
    (kept,) = lab.cache.iterdir()
    kept.write_text("{")
    assert lab.ask("v5e:2x4") == [first]
    assert lab.started == ["v5e:2x4"] * 2


def test_answers_are_kept_and_failures_are_not(lab):
    first = lab.ask("v5e:2x4", "abort")
    assert lab.ask("v5e:2x4", "abort")[0] == first[0]
    assert sorted(lab.started) == ["abort", "abort", "v5e:2x4"]


def test_answers_are_kept_by_what_they_depend_on(lab):
    lab.ask("v5e:2x4")
    lab.ask("v5e:2x4", config={**lab.config, "seed": 7})
    lab.ask("v5e:2x4")
    assert len(lab.started) == 2
    lab.source.write_text("x = 2")
    lab.ask("v5e:2x4")
    lab.ask("v5e:4x4")
    assert len(lab.started) == 4


def test_reads_refusals():
    temporaries = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (26.73G) exceeds "
        "available HBM (15.75G)."
    )
    assert compiler.refusal("Traceback\n" + temporaries + "\n\nmore") == (temporaries, round(26.73 * 2**30))
    assert compiler.refusal("RESOURCE_EXHAUSTED: nothing left") == ("RESOURCE_EXHAUSTED: nothing left", None)
    assert compiler.refusal("INTERNAL: something else") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:4x4", "no compiler for 'v7'; there are v4, v5e, v5p, v6e, v7x, a100, h100, h200"),
        ("v5e", "'' is not a shape"),
        ("h100:4x4x4", "'4x4x4' is not a shape"),
        ("v5p:4x", "'4x' is not a shape"),
    ],
)
def test_refuses_what_is_not_a_topology(name, message):
    with pytest.raises(UserError, match=message):
        compiler.devices(name)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("v5e:2x4", "libtpu", "tpu"), ("h100:1x8", "jax_plugins.xla_cuda12", "cuda-check")],
)
def test_says_what_to_install(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    with pytest.raises(UserError, match=rf"{module} is missing.*pip install -e '\.\[{extra}\]'"):
        compiler.devices(name)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("v4:2x2x2", 8),
        ("v5e:2x4", 8),
        ("v5p:2x2x2", 8),
        ("v6e:16x16", 256),
        ("v5p:8x8x8", 512),
        ("2*v5e:4x4", 32),
        ("v7x:2x2x1", 8),
    ],
)
def test_tpu_slices(name, number):
    assert [d.platform for d in compiler.devices(name)] == ["tpu"] * number


@needs_libtpu
def test_several_slices_are_told_apart_and_their_network_too():
    there = compiler.devices("2*v5e:2x4")
    assert [d.slice_index for d in there] == [0] * 8 + [1] * 8
    assert Topology.of(there) == Topology.parse("2*v5e:2x4")
    assert Topology.of(compiler.devices("v7x:2x2x1")) == Topology.parse("v7x:2x2x1")


@needs_libtpu
def test_refuses_a_slice_that_is_not_made():
    with pytest.raises(UserError, match=r"topology 'v5e:3x4': the compiler does not know it"):
        compiler.devices("v5e:3x4")


@needs_cuda
@pytest.mark.parametrize(("name", "number"), [("a100:56x4", 224), ("h100:4x8", 32), ("h200:1x8", 8)])
def test_gpu_nodes(name, number):
    there = compiler.devices(name)
    assert [d.platform for d in there] == ["gpu"] * number
    assert there[0].device_kind == compiler.GPUS[name.partition(":")[0]].name
