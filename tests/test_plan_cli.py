"""`run.py plan`, `train --mesh auto`, and what is set beside the compiler's answers."""

import dataclasses
import json

import pytest

from amber_jax.recipes import amber_7b, amber_tiny
from commands.plan import compiles
from errors import UserError
from parallel import compiler, planner
from parallel.compiler import Report
from parallel.hlo import Traffic
from parallel.mesh import MeshConfig
from parallel.plan import Plan
from parallel.topology import Topology
from run import main
from training import plan_check, planning


def run(capsys, *words):
    code = main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_plan_ranks_and_explains(capsys):
    code, value = run(capsys, "plan", "amber_tiny", "--topology", "h100:1x4", "--top", "3", "--explain")
    assert code == 0
    times = [p["predicted_step_s"] for p in value["plans"]]
    assert len(times) == 3
    assert times[0] <= min(times) * (1 + planner.TIE)
    assert any("matrix products" in line for line in value["explained"])
    assert main(["plan", "amber_tiny", "--topology", "h100:1x4", "--top", "3"]) == 0
    assert value["plans"][0]["plan"]["text"] in capsys.readouterr().out


def test_a_mesh_that_is_given_is_kept_to(capsys):
    _, value = run(capsys, "plan", "amber_tiny", "--topology", "cpu:8", "--mesh", "pipeline=2,tensor=4")
    assert {p["plan"]["mesh"] for p in value["plans"]} == {"pipeline=2,tensor=4"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["amber_tiny", "--topology", "v9p:4x4"], "unknown chip 'v9p'.*did you mean v5p"),
        (["amber_tiny", "--topology", "v5p"], "topology 'v5p'"),
        (["amber_7b", "--topology", "v5e:2x2"], "nothing fits for amber_7b on v5e:2x2.* v5e:.* is enough"),
        (["amber_tiny", "--topology", "cpu:8", "--mesh", "fsdp=3"], "= 3 but 8 cpu:8 devices"),
        (["amber_tiny", "--topology", "cpu:3", "--mesh", "tensor=3"], "tensor = 3 does not divide"),
        (
            ["amber_tiny", "--topology", "cpu:3", "--data.global-batch", "2"],
            "no mesh divides the model, or the batch of 2 has too few rows.*larger batch",
        ),
        (["amber_tiny", "--topology", "cpu:8", "--verify"], "no compiler is asked for simulated devices"),
        (["amber_tiny", "--topology", "cpu:8", "--top", "0"], "--top 0: must be positive"),
        (["amber_tiny", "--topology", "cpu:8", "--timeout-s", "nan"], "--timeout-s nan: must be positive"),
        (["amber_tiny", "--topology", "cpu:8", "--cache", "run.py"], "--cache run.py: is a file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_a_mistake_gets_one_message_and_exit_code_two(capsys, monkeypatch, words, message):
    monkeypatch.chdir(compiles()["sources"][0].parent.parent)
    code, value = run(capsys, "plan", *words)
    assert code == 2
    with pytest.raises(UserError, match=f"(?s){message}"):
        raise UserError(value["error"])


@pytest.mark.skipif(compiler.missing("v5e") is None, reason="libtpu is installed")
def test_a_compiler_that_is_not_installed_is_said_before_anything_else(capsys):
    code, value = run(capsys, "plan", "amber_tiny", "--topology", "v5e:2x4", "--verify")
    assert code == 2
    assert "the compiler for v5e is not installed (libtpu is missing); pip install -e '.[tpu]'" in value["error"]


def prediction(recipe, topology, plan):
    topology = Topology.parse(topology)
    workload = planning.workload(recipe, topology.chip.platform)
    return workload, planner.predict(workload, topology, plan)


def test_a_plan_fits_only_if_it_compiled_and_has_the_memory():
    """NVIDIA's compiler takes what no GPU holds."""
    plan = Plan(MeshConfig(fsdp=8))
    _, p = prediction(amber_7b(), "h100:1x8", plan)
    report = Report(plan, "h100:1x8", {}, peak_bytes=int(50e9))
    assert plan_check.Checked(p, report, p).fits
    assert plan_check.Checked(p, report, p).memory_error == pytest.approx(p.bytes / 50e9 - 1)
    assert not plan_check.Checked(p, dataclasses.replace(report, peak_bytes=int(90e9)), p).fits
    refused = dataclasses.replace(report, peak_bytes=None, refused="RESOURCE_EXHAUSTED: too much")
    assert not plan_check.Checked(p, refused, None).fits
    assert "refused" in plan_check.line(plan_check.Checked(p, refused, None))


def test_bytes_of_a_program_by_axis():
    """What two axes share counts for the outer; of a pipeline's ticks, the idle ones are taken off."""
    plan = Plan(MeshConfig(pipeline=2, fsdp=2, tensor=2), microbatches=4, gather="once")
    traffic = (
        Traffic("all-gather", ("fsdp",), 1, 1, 100),
        Traffic("all-reduce", ("fsdp", "tensor"), 1, 1, 100),
        Traffic("reduce-scatter", ("tensor",), 1, 5, 50),
        Traffic("collective-permute", ("pipeline",), 2, 10, 30),
    )
    sent = plan_check.sent_by_axis(Report(plan, "v5e:2x4", {}, collectives=traffic))
    assert sent == pytest.approx({"fsdp": 50 + 150, "tensor": 50 * 4 / 5, "pipeline": 30})


def test_auto_takes_the_best_plan_of_the_devices(capsys):
    code, value = run(
        capsys, "train", "amber_tiny", "--data", "synthetic", "--mesh", "auto", "--steps", "1",
        "--model.num-layers", "2", "--model.embed", "32", "--model.mlp", "32", "--model.head-dim", "8",
    )  # fmt: skip
    assert code == 0
    expected, _ = planning.auto(amber_tiny(), Topology.parse("cpu:8"))
    assert value["mesh"] == expected.mesh.degrees
