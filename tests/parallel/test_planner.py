"""The planner: legality, arithmetic that adds up and goes the right way, and what it chooses."""

import dataclasses
import re

import pytest

from errors import UserError
from parallel import planner
from parallel.mesh import MeshConfig
from parallel.plan import Plan
from parallel.planner import Weight, Workload, explain, lines, predict, rank, refusal
from parallel.topology import Topology


def model(batch=64, layers=8, embed=1024, heads=8, mlp=2816, vocab=32000, sequence=1024):
    """A small model with round sizes, its weights as the real ones are split."""
    shape = (embed, heads, embed // heads)
    split = ("layers", "embed", "heads", "head_dim")
    weights = (
        Weight("embedding", (vocab, embed), ("vocab", "embed")),
        Weight("head", (embed, vocab), ("embed", "vocab")),
        Weight("norm", (embed,), ("norm",)),
        *(Weight(f"layers.{name}", (layers, *shape), split) for name in ("wq", "wk", "wv")),
        Weight("layers.wo", (layers, *shape[1:], embed), ("layers", "heads", "head_dim", "embed")),
        Weight("layers.gate", (layers, embed, mlp), ("layers", "embed", "mlp")),
        Weight("layers.up", (layers, embed, mlp), ("layers", "embed", "mlp")),
        Weight("layers.down", (layers, mlp, embed), ("layers", "mlp", "embed")),
        Weight("layers.norms", (layers, 2 * embed), ("layers", "norm")),
    )
    return Workload(
        name="model",
        num_layers=layers,
        embed=embed,
        num_heads=heads,
        head_dim=embed // heads,
        mlp=mlp,
        vocab=vocab,
        weights=weights,
        global_batch=batch,
        sequence_length=sequence,
        compute_dtype="bfloat16",
        loss_chunks=8,
    )


def plan(mesh, **how):
    return Plan(MeshConfig.parse(mesh), **how)


def value(found, *what):
    return sum(line.value for line in found if line.what in what)


PLANS = [
    plan("data=16"),
    plan("fsdp=16", remat="full"),
    plan("fsdp=8,tensor=2", microbatches=2, gather="once", remat="dots"),
    plan("data=2,fsdp=4,tensor=2", microbatches=4, gather="tick", remat="full"),
    plan("pipeline=4,fsdp=4", microbatches=8, gather="once", remat="full"),
    plan("pipeline=4,fsdp=4", microbatches=8, repeats=2, remat="full", remat_stage=True),
    plan("pipeline=2,fsdp=2,data=2,tensor=2", microbatches=8, schedule="1f1b", remat="dots"),
    plan("fsdp=16", remat="offload"),
]
names = [str(p) for p in PLANS]


@pytest.mark.parametrize("chosen", PLANS, ids=names)
def test_the_arithmetic_adds_up_and_is_printed(chosen):
    there = Topology.parse("v5e:4x4")
    p = predict(model(), there, chosen)
    assert p == predict(model(), there, chosen), "deterministic"
    assert refusal(model(), chosen, 16) is None
    text = explain(p)
    middle = text.index("time of a step:")
    for part, total, unit in ((text[1:middle], p.bytes / 1e9, "GB"), (text[middle:], p.seconds * 1e3, "ms")):
        terms = [float(m[1]) for m in (re.match(rf"  .*? ([0-9.]+) {unit}  =", line) for line in part) if m]
        (shown,) = [float(m[1]) for m in (re.match(rf"  sum +([0-9.]+) {unit}", line) for line in part) if m]
        assert terms
        assert sum(terms) == pytest.approx(shown, abs=0.01 * len(terms))
        assert shown == pytest.approx(total, abs=0.01)
    assert all(line.value >= 0 for line in (*p.memory, *p.time))
    assert not any("{" in line for line in text), "every number is filled in"
    assert "predicted" in text[0]


@pytest.mark.parametrize("chosen", PLANS, ids=names)
def test_printed_formulas_give_the_printed_memory(chosen):
    for line in predict(model(), Topology.parse("v5e:4x4"), chosen).memory:
        formula = line.formula.format(*map(repr, line.numbers)).split(",")[0]
        formula = re.sub(r"\b(tokens|ticks|layers|microbatches|heads|B|on the device)\b|\(float32\)", "", formula)
        assert eval(formula.replace("x", "*"), {}) == pytest.approx(line.value), line


def test_more_shards_hold_less_state():
    there = Topology.parse("v5e:4x4")
    state = [
        value(predict(model(), there, plan(f"data={16 // z},fsdp={z}")).memory, "parameters", "moments", "gradients")
        for z in (1, 2, 4, 8, 16)
    ]
    assert state == sorted(state, reverse=True)
    assert state[0] == pytest.approx(16 * state[-1], rel=0.01)


@pytest.mark.parametrize("chosen", PLANS, ids=names)
@pytest.mark.parametrize("name", ["v5e:4x4", "a100:2x8", "2*v5e:2x4"])
def test_slower_links_are_nowhere_faster(chosen, name):
    full, slow = (predict(model(), Topology.parse(n), chosen) for n in (name, f"{name}@0.1"))
    assert slow.seconds >= full.seconds
    assert slow.bytes == full.bytes


def test_a_longer_pipeline_of_more_microbatches_has_less_bubble():
    there = Topology.parse("v5e:4x4")
    bubbles = [
        value(predict(model(), there, plan("pipeline=4,fsdp=4", microbatches=m)).time, "pipeline bubble")
        for m in (4, 8, 16)
    ]
    assert bubbles == sorted(bubbles, reverse=True)
    circular = predict(model(), there, plan("pipeline=4,fsdp=4", microbatches=4, repeats=2))
    assert value(circular.time, "pipeline bubble") == pytest.approx(bubbles[0] / 2)


def test_one_forward_one_backward_is_flat_in_microbatches_and_gpipe_is_not():
    there = Topology.parse("v5e:4x4")

    def peak(schedule, microbatches):
        longer = model(batch=4 * microbatches)
        chosen = plan("pipeline=4,fsdp=4", microbatches=microbatches, schedule=schedule, remat="full")
        return predict(longer, there, chosen).bytes

    assert peak("1f1b", 16) == peak("1f1b", 64)
    assert peak("gpipe", 64) > peak("gpipe", 16)


def test_gathering_once_moves_less_and_holds_more():
    there = Topology.parse("v5e:4x4")
    once, tick, layer = (
        predict(model(), there, plan("fsdp=16", microbatches=4, gather=gather, remat="full"))
        for gather in ("once", "tick", "layer")
    )
    assert once.sent_bytes["fsdp"] < tick.sent_bytes["fsdp"] < layer.sent_bytes["fsdp"]
    assert once.bytes > tick.bytes > layer.bytes


def test_remat_trades_time_for_memory():
    there = Topology.parse("v5e:4x4")
    none, dots, full, offload = (
        predict(model(), there, plan("fsdp=16", remat=remat)) for remat in ("none", "dots", "full", "offload")
    )
    assert none.bytes > dots.bytes > full.bytes > offload.bytes
    assert none.flops < dots.flops < full.flops == offload.flops
    assert value(offload.time, "host memory") > 0


def test_what_the_compiler_says_takes_the_models_place():
    there, chosen = Topology.parse("v5e:4x4"), plan("fsdp=8,tensor=2", remat="full")
    own = predict(model(), there, chosen)
    same = predict(model(), there, chosen, own.sent_bytes, own.flops)
    assert same.seconds == pytest.approx(own.seconds)
    more = predict(model(), there, chosen, {**own.sent_bytes, "tensor": 2 * own.sent_bytes["tensor"]}, 2 * own.flops)
    assert value(more.time, "matrix products") == pytest.approx(2 * value(own.time, "matrix products"))
    assert value(more.time, "activations over tensor") > value(own.time, "activations over tensor")
    assert more.sent_bytes["tensor"] == 2 * own.sent_bytes["tensor"]
    assert value(more.time, "weights over fsdp") == pytest.approx(value(own.time, "weights over fsdp"))


@pytest.mark.parametrize(
    ("kind", "result", "moved"),
    [
        ("all-gather", 800, 700),
        ("reduce-scatter", 100, 700),
        ("all-reduce", 800, 1400),
        ("all-to-all", 800, 700),
        ("collective-permute", 800, 800),
    ],
)
def test_bytes_sent_in_a_group_of_eight(kind, result, moved):
    assert planner.sent(kind, result, 8) == moved


# ---- legality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        (plan("fsdp=8"), "1\\*1\\*8\\*1 = 8 but there are 16 devices"),
        (plan("tensor=16"), "tensor = 16 does not divide the 'heads' dimension"),
        (plan("fsdp=16", microbatches=5), "microbatches=5 cut a batch of 64 rows, 16 or a multiple"),
        (plan("pipeline=16"), "pipeline = 16 does not divide the 'layers' dimension"),
        (plan("pipeline=4,fsdp=4", microbatches=8, repeats=4), "pipeline \\* repeats = 4\\*4 does not divide the 8"),
        (plan("pipeline=4,fsdp=4", microbatches=2), "gpipe: pipeline = 4 does not divide the 2 microbatches"),
    ],
)
def test_says_why_a_plan_cannot_be_run(chosen, why):
    assert re.search(why, refusal(model(), chosen, 16))


def test_tensor_stays_inside_a_slice():
    assert "cannot be laid over 4 slices" in refusal(model(), plan("data=2,tensor=8"), 16, slices=4)
    assert refusal(model(), plan("data=2,fsdp=2,tensor=4"), 16, slices=4) is None


def test_a_sequence_that_tensor_does_not_divide():
    assert "does not divide the sequence of 1023" in refusal(model(sequence=1023), plan("tensor=2,fsdp=8"), 16)


def test_an_mlp_that_tensor_does_not_divide_is_spread_over_both():
    odd = Weight("gate", (2, 64, 11), ("layers", "embed", "mlp"))
    degrees = MeshConfig.parse("fsdp=2,tensor=4").degrees
    assert odd.part(degrees) == 2 * 64 * 11 // 8
    assert odd.stored(4) == ("layers", "spread_embed", "whole_mlp")
    assert odd.stored(1) == odd.logical
    odd_model = model(mlp=11 * 43, embed=24, heads=8)
    assert "'spread_embed' dimension (24)" in refusal(odd_model, plan("fsdp=2,tensor=8"), 16)


def test_candidates_are_legal_and_differ():
    work, there = model(batch=48), Topology.parse("v5e:4x4")
    for mesh in planner.meshes(16):
        if planner.mesh_refusal(work, mesh, 16):
            continue
        found = [p for p in planner.candidates(work, there, mesh) if planner.schedule_refusal(work, p) is None]
        assert len(found) == len(set(found))
        assert all(p.mesh == mesh for p in found)
        simulated = list(planner.candidates(work, Topology.parse("cpu:16"), mesh))
        assert "offload" not in {p.remat for p in simulated}, "there is no other memory to move to"


def test_meshes_are_all_products():
    found = list(planner.meshes(12))
    assert len(found) == len(set(found)) == 40, "2^2 in 10 ways times 3 in 4"
    assert all(m.size == 12 for m in found)


# ---- choice --------------------------------------------------------------------------------------------------------


def test_ranks_by_each_objective():
    work, there = model(batch=16), Topology.parse("v5e:2x4")
    time, memory, cost = (rank(work, there, objective) for objective in ("time", "memory", "cost"))
    assert time.best[0].seconds <= min(p.seconds for p in time.best) * (1 + 2 * planner.TIE)
    assert memory.best[0].bytes <= min(p.bytes for p in memory.best) * (1 + 2 * planner.TIE)
    assert memory.best[0].bytes < time.best[0].bytes
    assert cost.best[0].chip_hours <= time.best[0].chip_hours * (1 + planner.TIE)
    assert len({p.topology for p in cost.best}) == len(cost.best) > 1, "the best plan of each size"
    assert all(p.bytes <= planner.limit(p.topology) for r in (time, memory, cost) for p in r.best)
    with pytest.raises(UserError, match="objective 'beauty': choose from time, memory, cost"):
        rank(work, there, "beauty")


def test_ranking_is_deterministic():
    work, there = model(batch=8), Topology.parse("v5e:2x4")
    assert rank(work, there) == rank(work, there)


def test_simpler_plans_win_ties():
    best = rank(model(batch=4), Topology.parse("h100:1x1")).best[0]
    assert best.plan.mesh == MeshConfig()
    assert best.plan.schedule == "gpipe"
    assert not best.plan.remat_stage


def test_over_a_slower_network_less_is_sent():
    """The strategy question: the slower what joins the nodes, the less a plan may send over it."""
    work = model(batch=16)

    def over_network(name):
        best = rank(work, Topology.parse(name)).best[0]
        links = best.topology.links(best.plan.mesh.degrees)
        return sum(
            n / links[a].bandwidth * best.topology.factor
            for a, n in best.sent_bytes.items()
            if "network" in links[a].how
        )

    fast, slow, slower = (over_network(f"a100:2x4{factor}") for factor in ("", "@0.1", "@0.01"))
    assert fast >= slow >= slower
    assert fast > slower


def test_one_mesh_alone_can_be_planned():
    mesh = MeshConfig(fsdp=8, tensor=2)
    assert {p.plan.mesh for p in rank(model(batch=16), Topology.parse("v5e:4x4"), only_mesh=mesh).best} == {mesh}


def test_says_why_others_were_rejected():
    ranking = rank(model(batch=8, layers=32, embed=4096, mlp=11008), Topology.parse("v5e:4x4"))
    text = "\n".join(lines(ranking, top=3))
    assert re.search(r"rejected, out of memory: [\d,]+; closest .* GB too many", text)
    assert re.search(r"rejected, cuts the batch into no microbatches: [\d,]+; such as", text)
    assert re.search(r"rejected, does not divide the model or the sequence: [\d,]+; such as", text)
    assert "predicted, not measured" in text
    assert len([line for line in lines(ranking, top=3) if "chip-hours" not in line and "GB " in line]) >= 3
    assert sum(r.count for r in ranking.rejected) > 0


def test_nothing_fits_and_what_would():
    big = model(batch=16, layers=32, embed=4096, heads=32, mlp=11008)
    with pytest.raises(
        UserError, match=r"nothing fits for model on v5e:2x2: the smallest is .* GB too many. v5e:\d+x\d"
    ):
        rank(big, Topology.parse("v5e:2x2"))
    with pytest.raises(UserError, match=r"with the mesh data=4.*Leave the mesh to the planner"):
        rank(big, Topology.parse("v5e:2x2"), only_mesh=MeshConfig(data=4))
    with pytest.raises(UserError, match="no mesh divides the model, or the batch of 1 has too few rows"):
        rank(dataclasses.replace(big, global_batch=1, sequence_length=3), Topology.parse("cpu:7"))
    huge = model(batch=7, layers=1, embed=4096, heads=1, mlp=110080, sequence=65536)
    with pytest.raises(UserError, match="Shorten the sequence, lower the batch"):
        rank(huge, Topology.parse("cpu:1"))
