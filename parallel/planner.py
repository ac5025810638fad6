"""Which plan is best on a topology: legal plans, memory and time predicted by arithmetic in the open, and a ranking.

Every prediction is a sum of `Line`s, each with its formula and the numbers in it (`explain`), so that it can be checked
by hand. What is assumed rather than known stands in one block of named constants. Nothing here was measured on an
accelerator: times are predictions, and memory is calibrated against what the TPU compiler plans for the same program.

R rows of S positions are one microbatch on one device, D the width of the stream, F of the MLP, A of all heads, V the
vocabulary; c is the size of a number in the compute dtype. P, N, Z, T are the degrees of pipeline, data, fsdp, tensor.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from errors import UserError
from parallel import axes
from parallel.axes import DATA, FSDP, MESH_AXES, PIPELINE, TENSOR
from parallel.mesh import MeshConfig
from parallel.pipeline import Timetable
from parallel.plan import Gather, Plan, Remat, batch_refusal, padded_rows
from parallel.topology import Topology

# ---- assumptions -------------------------------------------------------------------------------------------------

#: What matrix products reach of a chip's peak stands with its figures (`parallel.topology.Chip.efficiency`).
#: Share of a link's bandwidth that a large collective reaches.
LINK_EFFICIENCY = 0.85
#: Share of the memory bandwidth that streaming reaches.
HBM_EFFICIENCY = 0.8
#: Seconds before the first byte of a collective arrives, over the links of a node and over a network.
LATENCY, NETWORK_LATENCY = 5e-6, 2e-5
#: Share of a weight gather inside a layer, or of its gradient's scatter, that runs beside matrix products: the MLP's
#: travels while attention computes, but nothing is fetched for the next layer.
HIDDEN_LAYER = 0.5
#: Share of the traffic with host memory that runs beside matrix products.
HIDDEN_HOST = 0.8
#: A gather or scatter over a whole three-dimensional torus becomes an all-reduce in libtpu 0.0.42: twice the bytes.
WHOLE_TORUS = 2.0
#: Backward over forward of a flash kernel: 5 matrix products where forward has 2; splash makes scores and their
#: gradients twice, in a kernel for queries and in one for keys and values: 7.
FLASH_BACKWARD = {"tpu": 3.5, "gpu": 2.5, "cpu": 2.5}
#: Part of a chip's memory that a plan must leave free.
SPARE = 0.05
#: Times within this of each other count as equal, and the simpler plan wins.
TIE = 0.01

#: What a layer makes on its way and gives up again, in vectors of one token: of the stream's width, whole rows, and of
#: the MLP's, this device's part. Fitted, as the two lines below, to 79 programs of both 7B models that libtpu 0.0.42
#: compiled for v4, v5e, v5p and v6e: the median error of all memory is 2.4 %, 77 are from 5 % below to 14 % above.
WORK_STREAMS, WORK_MLP = 5.0, 5.5
#: More streams where a layer is run again from its input, and where it adds biases. Fitted to 38 programs of 2026-12-01
#: (`bench/results/plans.json`), of which those with 9 rows a device showed it.
WORK_AGAIN, WORK_BIASES = 3.0, 6.0
#: Kept by a layer that keeps everything, besides two whole rows: parts of streams, of heads and of the MLP.
KEPT_STREAMS, KEPT_HEADS, KEPT_MLP = 6.0, 4.0, 6.5
#: Copies of a chunk of logits, float32.
LOGITS = 2.0

Objective = Literal["time", "memory", "cost"]


# ---- what is to be planned ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Weight:
    """One parameter array of the model."""

    name: str
    shape: tuple[int, ...]
    """Global; stacked layers first."""
    logical: tuple[str, ...]
    """Logical axes (`parallel.axes.RULES`), one for each dimension."""

    @property
    def size(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)

    def stored(self, tensor: int) -> tuple[str, ...]:
        """Logical axes by which it is stored where ``tensor`` has this degree."""
        return axes.stored(self.logical, self.shape, tensor)

    def part(self, degrees: Mapping[str, int]) -> int:
        """Parameters of it on one device."""
        ways = 1
        for name in self.stored(degrees[TENSOR]):
            ways *= math.prod(degrees[a] for a in axes.mesh_axes_of(name))
        return self.size // ways

    @property
    def stacked(self) -> bool:
        """Is it part of a layer?"""
        return "layers" in self.logical


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step as plain numbers."""

    name: str
    num_layers: int
    embed: int
    num_heads: int
    head_dim: int
    mlp: int
    vocab: int
    weights: tuple[Weight, ...]
    global_batch: int
    """Sequences."""
    sequence_length: int
    compute_dtype: Literal["float32", "bfloat16"]
    loss_chunks: int
    moments: int = 2
    """Optimizer state, in float32 numbers for each parameter."""
    flops_causal: float = 0.0
    """Of the model for a token, as MFU counts them (`ModelConfig.train_flops_per_token`)."""
    flops_full: float = 0.0
    """The same, counting attention as if every position read every other."""
    quadratic_attention: bool = False
    """Attention keeps scores of every pair of positions (the reference softmax, not a flash kernel)."""

    @property
    def number(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.compute_dtype == "bfloat16" else 4

    @property
    def attention_width(self) -> int:
        """Heads times head width."""
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.global_batch * self.sequence_length

    @functools.cached_property
    def parameters(self) -> int:
        """Of the whole model."""
        return sum(w.size for w in self.weights)

    def part(self, mesh: MeshConfig) -> int:
        """Parameters of the whole model on one device."""
        if mesh not in self._parts:
            self._parts[mesh] = sum(w.part(mesh.degrees) for w in self.weights)
        return self._parts[mesh]

    @functools.cached_property
    def _parts(self) -> dict[MeshConfig, int]:
        return {}

    @functools.cached_property
    def layer_parameters(self) -> int:
        """Of one layer."""
        return sum(w.size for w in self.weights if w.stacked) // self.num_layers

    @functools.cached_property
    def end_parameters(self) -> int:
        """Of what is outside the layers: embedding, head, last norm."""
        return self.parameters - self.num_layers * self.layer_parameters


# ---- legality ----------------------------------------------------------------------------------------------------


def refusal(workload: Workload, plan: Plan, devices: int, slices: int = 1) -> str | None:
    """Why a plan cannot be run on so many devices, in so many slices, or None.

    The same rules, in the same words, as `training.config.RunConfig.check_mesh` and `MeshConfig.resolve` refuse by.
    """
    return mesh_refusal(workload, plan.mesh, devices, slices) or schedule_refusal(workload, plan)


def mesh_refusal(workload: Workload, mesh: MeshConfig, devices: int, slices: int = 1) -> str | None:
    """The part of `refusal` that depends on the mesh alone."""
    degrees = mesh.degrees
    if mesh.size != devices:
        return f"mesh: {'*'.join(map(str, degrees.values()))} = {mesh.size} but there are {devices} devices"
    left = slices
    for axis in (PIPELINE, DATA, FSDP):
        left //= math.gcd(degrees[axis], left)
    if left > 1:
        return f"mesh: {mesh} cannot be laid over {slices} slices without splitting tensor between them"
    try:
        for w in workload.weights:
            axes.check_divides(degrees, w.name, w.shape, w.stored(degrees[TENSOR]))
    except UserError as error:
        return str(error)
    if workload.sequence_length % degrees[TENSOR]:
        return (
            f"mesh: tensor = {degrees[TENSOR]} does not divide the sequence of {workload.sequence_length}, and "
            "activations between matrices are split along it"
        )
    return None


def schedule_refusal(workload: Workload, plan: Plan) -> str | None:
    """The part of `refusal` that depends on how the mesh is used."""
    degrees = plan.mesh.degrees
    if why := batch_refusal(workload.global_batch, plan.microbatches, degrees[DATA] * degrees[FSDP]):
        return f"mesh: {why}"
    stages = degrees[PIPELINE]
    if workload.num_layers % (stages * plan.repeats):
        return f"mesh: pipeline * repeats = {stages}*{plan.repeats} does not divide the {workload.num_layers} layers"
    if stages > 1 and plan.schedule == "gpipe" and plan.microbatches % stages:
        return f"gpipe: pipeline = {stages} does not divide the {plan.microbatches} microbatches"
    return None


# ---- arithmetic --------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """One term of a prediction."""

    what: str
    value: float
    """Bytes on one device, or seconds of a step."""
    formula: str
    """With {} for each number."""
    numbers: tuple[Any, ...]

    def text(self, unit: str) -> str:
        """As a person reads it."""
        shown = f"{self.value / 1e9:9.3f} GB" if unit == "bytes" else f"{self.value * 1e3:9.2f} ms"
        return f"  {self.what:26} {shown}  = {self.formula.format(*map(_number, self.numbers))}"


def _number(x: Any) -> str:
    if isinstance(x, str):
        return x
    if isinstance(x, int) or (float(x).is_integer() and abs(x) < 1e6):
        return f"{int(x):,}"
    return f"{x:.4g}"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a plan is predicted to need. Predicted, not measured."""

    plan: Plan
    topology: Topology
    memory: tuple[Line, ...]
    """Bytes of each device at the peak, by component."""
    time: tuple[Line, ...]
    """Seconds of a step, by component."""
    sent_bytes: Mapping[str, float]
    """Mesh axis -> bytes that each device sends in a step."""
    flops: float
    """Of each device in a step."""
    tokens: int
    """Of a step, padding left out."""
    model_flops: Mapping[str, float]
    """Of a step over all devices, as MFU counts them: "causal" and "full"."""

    @functools.cached_property
    def bytes(self) -> float:
        """Memory of each device at the peak."""
        return sum(line.value for line in self.memory)

    @functools.cached_property
    def seconds(self) -> float:
        """Of a step."""
        return sum(line.value for line in self.time)

    @property
    def chip_hours(self) -> float:
        """Of a trillion tokens."""
        return self.topology.chips * self.seconds / self.tokens * 1e12 / 3600

    def mfu(self, convention: Literal["causal", "full"]) -> float:
        """Model FLOP utilisation, of the vendor's bfloat16 peak."""
        return (
            self.model_flops[convention] / self.seconds / self.topology.devices / self.topology.chip.flops["bfloat16"]
        )

    @property
    def simplicity(self) -> tuple[int, ...]:
        """Smaller is simpler: fewer axes, then fewer other choices that are not the plain one."""
        plan = self.plan
        odd = (plan.schedule != "gpipe") + (plan.repeats > 1) + plan.remat_stage + (plan.remat == "offload")
        return (sum(d > 1 for d in plan.mesh.degrees.values()), odd, plan.microbatches)


def predict(
    workload: Workload,
    topology: Topology,
    plan: Plan,
    compiled_bytes: Mapping[str, float] | None = None,
    compiled_flops: float | None = None,
) -> Prediction:
    """Memory and time of a step by the open cost model; deterministic.

    Args:
        workload: what is trained.
        topology: on what.
        plan: legal on it (`refusal`).
        compiled_bytes: mesh axis -> bytes that each device sends in a step as a compiled program does
            (`sent`), in place of the model's own.
        compiled_flops: floating-point operations of each device in a step, in place of the model's own.
    """
    shape = _Shape(workload, topology, plan)
    memory = tuple(_memory(shape))
    flops = compiled_flops if compiled_flops is not None else shape.flops
    exchanges = list(_exchanges(shape))
    bytes_sent = {axis: 0.0 for axis in MESH_AXES if plan.mesh.degrees[axis] > 1}
    for exchange in exchanges:
        bytes_sent[exchange.axis] += exchange.bytes
    if compiled_bytes is not None:
        scale = {a: compiled_bytes.get(a, 0.0) / b if b else 0.0 for a, b in bytes_sent.items()}
        exchanges = [x._replace(bytes=x.bytes * scale[x.axis]) for x in exchanges]
        bytes_sent = {a: compiled_bytes.get(a, 0.0) for a in bytes_sent}
    time = tuple(_time(shape, exchanges, flops))
    model_flops = {"causal": workload.flops_causal * workload.tokens, "full": workload.flops_full * workload.tokens}
    return Prediction(plan, topology, memory, time, bytes_sent, flops, workload.tokens, model_flops)


def limit(topology: Topology) -> float:
    """Bytes of a device that a plan may take: the chip's less what must be left free."""
    return topology.chip.hbm_bytes * (1 - SPARE)


def sent(kind: str, result_bytes: float, group: int) -> float:
    """Bytes that each device of a group sends in a collective whose result has so many bytes on it."""
    if kind == "collective-permute":
        return result_bytes
    scale = {"all-gather": 1 / group, "all-to-all": 1 / group, "reduce-scatter": 1.0, "all-reduce": 2 / group}
    return result_bytes * scale[kind] * (group - 1)


class _Shape:
    """Sizes that follow from a workload and a plan, for one device."""

    def __init__(self, workload: Workload, topology: Topology, plan: Plan):
        self.workload, self.topology, self.plan = workload, topology, plan
        degrees = plan.mesh.degrees
        self.links = topology.links(degrees)
        self.whole_torus = FSDP in self.links and self.links[FSDP].whole_torus
        self.stages, self.replicas, self.shards, self.ways = (degrees[a] for a in MESH_AXES)
        ways = self.replicas * self.shards
        self.rows = padded_rows(workload.global_batch, plan.microbatches, ways) // ways
        self.tokens = self.rows * workload.sequence_length
        """Of a microbatch, before tensor parallelism splits the sequence."""
        self.layers = workload.num_layers // self.stages
        self.pipelined = self.stages > 1
        self.replayed = self.pipelined and (plan.schedule == "1f1b" or plan.remat_stage)
        """Does the backward pass run a stage again from its input?"""
        self.unrolled = self.pipelined and not self.replayed
        """Does every tick keep what its layers need for their backward pass?"""
        self.hoisted = self.unrolled and plan.gather == "layer" and plan.repeats == 1
        """Are the gathers of the forward pass, the same in every tick, taken out of the loop over them?"""
        self.once, self.by_layer = plan.gather == "once", plan.gather == "layer"
        table = Timetable(plan.schedule, self.stages, plan.microbatches, plan.repeats)
        self.passes = plan.microbatches * plan.repeats
        """Times that a stage is run with a microbatch that is there."""
        self.ticks = table.ticks if self.pipelined else plan.microbatches
        self.runs = plan.microbatches if plan.schedule == "1f1b" else self.ticks
        """Times that a stage is run, in "gpipe" also with what is thrown away."""
        self.number = workload.number
        self.stream = self.tokens / self.ways * workload.embed * self.number
        """Bytes of one microbatch's residual stream."""
        self.part = workload.part(plan.mesh)
        """Parameters of this device."""
        # Whole over fsdp, split over pipeline and tensor: what is gathered.
        self.layer_whole = workload.layer_parameters / self.ways
        self.ends_whole = workload.end_parameters / self.ways

    @functools.cached_property
    def forwards(self) -> float:
        """Forward passes of a layer in a step and microbatch: one, one more for each that runs it again."""
        return 1 + self.replayed + (self.plan.remat in ("full", "offload"))

    @functools.cached_property
    def layer_flops(self) -> float:
        """Of one layer and microbatch: forward once, and backward."""
        w, n = self.workload, self.tokens
        matrices = 2.0 * n * self.layer_whole
        attention = 2.0 * n * w.sequence_length * w.attention_width / self.ways  # half of the pairs, two products
        again = self.forwards + (self.plan.remat == "dots")
        # Run again from its input, a layer leaves out its last product, whose result nothing needs.
        unneeded = 2.0 * n * w.embed * w.mlp / self.ways if self.plan.remat in ("full", "offload") else 0.0
        return (
            matrices * (self.forwards + 2)
            - unneeded
            + attention * (again + FLASH_BACKWARD[self.topology.chip.platform])
        )

    @functools.cached_property
    def head_flops(self) -> float:
        """Of the logits of one microbatch: forward, backward, and forward again where they come in pieces."""
        w = self.workload
        return 2.0 * self.tokens * w.embed * w.vocab / self.ways * (3 + (w.loss_chunks > 1))

    @property
    def heads(self) -> float:
        """Microbatches whose logits one device computes, on the way that decides the step's length."""
        if self.pipelined and self.plan.schedule == "gpipe":
            return self.plan.microbatches / self.stages
        return self.plan.microbatches

    @functools.cached_property
    def flops(self) -> float:
        """Of one device in a step, those of the bubble left out."""
        return self.layer_flops * self.layers * self.plan.microbatches + self.head_flops * self.heads

    @property
    def in_ticks(self) -> float:
        """Share of `flops` inside the loop over ticks."""
        if self.plan.schedule == "1f1b":
            return 1.0
        return 1 - self.head_flops * self.heads / self.flops


# ---- memory ------------------------------------------------------------------------------------------------------


def _memory(s: _Shape) -> Iterator[Line]:
    """Bytes on one device at the moment when most are in use."""
    w, plan, c = s.workload, s.plan, s.number
    yield Line("parameters", s.part * 4.0, "{} x 4 B (float32)", (s.part,))
    yield Line("moments", s.part * 4.0 * w.moments, "{} x {} x 4 B", (s.part, w.moments))
    yield from _activations(s)
    if s.once:
        whole = s.layers * s.layer_whole + s.ends_whole
        yield Line("weights gathered", c * whole, "({} x {} + {}) x {} B", (s.layers, s.layer_whole, s.ends_whole, c))
    if s.by_layer and plan.remat == "none":
        kept = s.layers * (s.ticks / plan.repeats if s.unrolled else 1)
        yield Line("weights kept", c * kept * s.layer_whole, "{} x {} x {} B", (kept, s.layer_whole, c))
    if s.unrolled and plan.repeats > 1:  # autodiff keeps what a tick takes of the weights for its repeat
        size = (c if s.once else 4.0 / s.shards) * s.layers / plan.repeats * s.layer_whole
        yield Line("weights of each tick", s.ticks * size, "{} ticks x {} B", (s.ticks, size))
    gradients = list(_gradients(s))
    moments = [gradients + list(_in_layer(s)), gradients + list(_in_loss(s))]
    if s.hoisted:
        moments.append(list(_in_forward(s)))
    yield from max(moments, key=lambda lines: sum(line.value for line in lines))


def _activations(s: _Shape) -> Iterator[Line]:
    """What is kept for the backward pass."""
    plan = s.plan
    saved, formula, numbers = _saved(s)
    layers = s.layers // plan.repeats
    if s.unrolled:
        yield Line(
            "activations", saved * layers * s.ticks, "{} ticks x {} layers x (" + formula + ")",
            (s.ticks, layers, *numbers),
        )  # fmt: skip
    else:
        yield Line("activations", saved * layers, "{} layers x (" + formula + ")", (layers, *numbers))
    if s.pipelined and plan.schedule == "1f1b":
        yield Line("stage inputs", (2 * s.stages - 1) * s.stream, "(2 x {} - 1) x {} B", (s.stages, s.stream))
    elif s.pipelined:
        if s.replayed:
            yield Line("stage inputs", s.ticks * s.stream, "{} ticks x {} B", (s.ticks, s.stream))
        # What goes in and what comes out or their cotangents, and the share that is embedded here before it is split.
        yield Line(
            "pipeline ends", (2 + s.ways / s.stages) * plan.microbatches * s.stream,
            "(2 + {} / {}) x {} microbatches x {} B", (s.ways, s.stages, plan.microbatches, s.stream),
        )  # fmt: skip


def _gradients(s: _Shape) -> Iterator[Line]:
    """One float32 set that each layer's gradients are added to in turn; in mode "tick" those of a whole stage."""
    plan, c = s.plan, s.number
    summed = plan.microbatches > 1 or s.pipelined
    if s.once:
        whole, numbers = s.layers * s.layer_whole + s.ends_whole, (s.layers, s.layer_whole, s.ends_whole)
        yield Line("gradients", 4.0 * whole, "({} x {} + {}) x 4 B, whole over fsdp", numbers)
        if summed:
            yield Line("ends' gradients, new", c * s.ends_whole, "{} x {} B", (s.ends_whole, c))
        return
    yield Line("gradients", s.part * 4.0, "{} x 4 B", (s.part,))
    if summed and plan.gather == "tick":
        yield Line("gradients, new", s.part * 4.0, "{} x 4 B", (s.part,))
    elif summed:
        ends = s.ends_whole / s.shards
        yield Line("ends' gradients, new", ends * 4.0, "{} x 4 B", (ends,))


def _saved(s: _Shape) -> tuple[float, str, tuple[Any, ...]]:
    """Bytes that one layer keeps of one microbatch until its backward pass, and how."""
    w, n, c, t = s.workload, s.tokens, s.number, s.ways
    if s.plan.remat == "offload":
        return 0.0, "{} B on the device", (0,)
    if s.plan.remat == "full":
        return s.stream, "{} tokens / {} x {} x {} B", (n, t, w.embed, c)
    products = 3 * w.attention_width + 2 * w.mlp
    if s.plan.remat == "dots":
        numbers = n * (w.embed / t + products / t + w.embed)
        return c * numbers, "{} tokens x ({} + {} + {} x {}) / {} x {} B", (n, w.embed, products, t, w.embed, t, c)
    split = w.embed * KEPT_STREAMS + w.attention_width * KEPT_HEADS + w.mlp * KEPT_MLP
    scores = 0.0
    if w.quadratic_attention:
        scores = n * w.sequence_length * w.num_heads / t * (4 + c)
    numbers = n * (split / t + 2 * w.embed)
    return c * numbers + scores, "{} tokens x (({} + 2 x {} x {}) / {} x {} B + {} B)", (
        n, split, t, w.embed, t, c, scores / n,
    )  # fmt: skip


def _in_forward(s: _Shape) -> Iterator[Line]:
    """The forward loop of "gpipe", its gathers taken out of it."""
    yield from _at_work(s)
    yield Line(
        "stage's weights, whole", s.number * s.layers * s.layer_whole, "{} x {} x {} B",
        (s.layers, s.layer_whole, s.number),
    )  # fmt: skip


def _in_layer(s: _Shape) -> Iterator[Line]:
    """The backward pass of a layer."""
    w, c, t = s.workload, s.number, s.ways
    yield from _at_work(s)
    if s.by_layer:
        yield Line("layer's weights", c * s.layer_whole, "{} x {} B", (s.layer_whole, c))
        yield Line("layer's gradients, whole", 4.0 * s.layer_whole, "{} x 4 B", (s.layer_whole,))
    if s.plan.gather == "tick":
        held = s.layers / s.plan.repeats
        for what in ("stage's weights", "stage's gradients, whole"):
            yield Line(what, c * held * s.layer_whole, "{} x {} x {} B", (held, s.layer_whole, c))
    if s.whole_torus and not s.once:
        yield Line("head's gradient, whole", 4.0 * w.embed * w.vocab / t, "{} x {} / {} x 4 B", (w.embed, w.vocab, t))


def _at_work(s: _Shape) -> Iterator[Line]:
    """What a layer makes on its way and gives up again."""
    w, n, c, t = s.workload, s.tokens, s.number, s.ways
    streams = WORK_STREAMS + (WORK_AGAIN if s.plan.remat in ("full", "offload") else 0.0)
    streams += WORK_BIASES if any(weight.logical == ("layers", "mlp") for weight in w.weights) else 0.0
    numbers = n * (streams * w.embed + WORK_MLP * w.mlp / t)
    yield Line(
        "layer at work",
        c * numbers,
        "{} tokens x ({} x {} + {} x {} / {}) x {} B",
        (n, streams, w.embed, WORK_MLP, w.mlp, t, c),
    )
    if w.quadratic_attention:
        scores = n * w.sequence_length * w.num_heads / t
        yield Line(
            "attention scores",
            3 * 4.0 * scores,
            "3 x {} tokens x {} x {} heads / {} x 4 B",
            (n, w.sequence_length, w.num_heads, t),
        )


def _in_loss(s: _Shape) -> Iterator[Line]:
    """The loss of one microbatch, a piece of the sequence at a time."""
    w, n, c, t = s.workload, s.tokens, s.number, s.ways
    yield Line("stream, whole", 2 * n * w.embed * c, "2 x {} tokens x {} x {} B", (n, w.embed, c))
    logits = n / w.loss_chunks * w.vocab / t * 4
    yield Line("logits", LOGITS * logits, "{} x {} tokens / {} x {} / {} x 4 B", (LOGITS, n, w.loss_chunks, w.vocab, t))
    if not s.once:
        head = w.embed * w.vocab / t
        yield Line("head, whole", (c + 4.0) * head, "{} x ({} + 4) B", (head, c))


# ---- communication -----------------------------------------------------------------------------------------------


class Exchange(NamedTuple):
    """Collectives of one sort over one axis."""

    what: str
    axis: str
    bytes: float
    """That each device sends in a step."""
    calls: float
    """Collectives of a step."""
    formula: str
    numbers: tuple[Any, ...]
    hidden: float = 0.0
    """Share of the time that may run beside matrix products."""


def _exchanges(s: _Shape) -> Iterator[Exchange]:
    w, plan, c = s.workload, s.plan, s.number
    if s.shards > 1:
        yield from _weights_moved(s)
    if s.replicas > 1:
        yield Exchange(
            "gradients over data", DATA, 2 * _others(s.replicas) * s.part * 4, len(w.weights),
            "2 x ({} - 1) / {} x {} x 4 B", (s.replicas, s.replicas, s.part),
        )  # fmt: skip
    if s.ways > 1:
        # Forward: a gather before and a scatter after attention and MLP; backward the same; run again in a layer: all
        # of forward's but the last scatter, which nothing needs.
        layer = 4 * (1 + s.replayed) + 4 + (0 if plan.remat == "none" else 3)
        calls = layer * s.layers * plan.microbatches + 4 * s.heads
        whole = s.tokens * w.embed * c * _others(s.ways)
        yield Exchange(
            "activations over tensor", TENSOR, calls * whole, calls,
            "({} x {} layers x {} microbatches + 4 x {} at the ends) x {} tokens x {} x {} B x ({} - 1) / {}",
            (layer, s.layers, plan.microbatches, s.heads, s.tokens, w.embed, c, s.ways, s.ways),
        )  # fmt: skip
    if s.pipelined:
        yield Exchange(
            "streams to the next stage", PIPELINE, 2 * s.ticks * s.stream, 2 * s.ticks,
            "2 x {} ticks x {} B", (s.ticks, s.stream),
        )  # fmt: skip
        if plan.schedule == "gpipe":
            moved = 4 * plan.microbatches * s.stream * _others(s.stages)
            yield Exchange(
                "streams to and from ends", PIPELINE, moved, 4, "4 x {} microbatches x {} B x ({} - 1) / {}",
                (plan.microbatches, s.stream, s.stages, s.stages),
            )  # fmt: skip
        if plan.repeats > 1:
            own = s.layers * s.layer_whole / s.shards
            rounds = 2 * plan.repeats * sum(1 for weight in w.weights if weight.stacked)
            yield Exchange(
                "layers dealt out", PIPELINE, 2 * own * 4, rounds, "2 x {} x 4 B, and their gradients back", (own,)
            )
        ends = s.ends_whole / s.shards
        yield Exchange(
            "gradients of the ends", PIPELINE, 2 * _others(s.stages) * ends * 4, 3, "2 x ({} - 1) / {} x {} x 4 B",
            (s.stages, s.stages, ends),
        )  # fmt: skip


def _others(degree: int) -> float:
    """Share of a whole that the other members of a group hold."""
    return (degree - 1) / degree


def _weights_moved(s: _Shape) -> Iterator[Exchange]:
    """Gathers of weights and scatters of their gradients over ``fsdp``."""
    plan, c, z = s.plan, s.number, s.shards
    arrays = sum(1 for w in s.workload.weights if w.stacked)
    layers, ends = s.layers * s.layer_whole, s.ends_whole
    if s.once:
        times, back, per = 1.0, 1.0, arrays
    else:
        runs = s.runs / plan.repeats
        again = plan.remat != "none" if s.by_layer else s.replayed
        forward = 1 if s.hoisted else runs
        times, back = forward + runs * (again + (s.by_layer and s.replayed)), runs
        per = arrays * (s.layers if s.by_layer else 1)
    hidden = HIDDEN_LAYER if s.by_layer else 0.0
    twice = WHOLE_TORUS if s.whole_torus else 1.0
    per_ends = 1.0 if s.once else s.heads
    moved = (times * layers + per_ends * ends) * c * (z - 1) / z * twice
    yield Exchange(
        "weights over fsdp", FSDP, moved, times * per, "({} x {} + {} x {}) x {} B x ({} - 1) / {} x {}",
        (times, layers, per_ends, ends, c, z, z, twice), hidden,
    )  # fmt: skip
    moved = (back * layers + per_ends * ends) * 4 * (z - 1) / z * twice
    yield Exchange(
        "gradients over fsdp", FSDP, moved, back * per, "({} x {} + {} x {}) x 4 B x ({} - 1) / {} x {}",
        (back, layers, per_ends, ends, z, z, twice), hidden,
    )  # fmt: skip


# ---- time --------------------------------------------------------------------------------------------------------


def _time(s: _Shape, exchanges: Sequence[Exchange], flops: float) -> Iterator[Line]:
    """Seconds of a step, one term after the other; what runs beside matrix products is taken off where it is named."""
    w, plan, chip = s.workload, s.plan, s.topology.chip
    rate = chip.flops[w.compute_dtype] * chip.efficiency
    compute = flops / rate
    yield Line(
        "matrix products",
        compute,
        "{} FLOP / ({} FLOP/s x {})",
        (flops, chip.flops[w.compute_dtype], chip.efficiency),
    )
    # What a stage does in its ticks (in gpipe the ends are outside of them), and what may still hide something.
    busy, spare = compute * s.in_ticks, compute
    for exchange in exchanges:
        link = s.links[exchange.axis]
        latency = NETWORK_LATENCY if link.network else LATENCY
        seconds = exchange.bytes / (link.bandwidth * LINK_EFFICIENCY) + exchange.calls * latency
        hidden = min(exchange.hidden * seconds, spare)
        spare -= hidden
        if exchange.axis == TENSOR or (exchange.axis == FSDP and plan.schedule == "1f1b" and not s.once):
            busy += seconds - hidden  # in every tick; gpipe's gathers are counted by ticks already
        yield Line(
            exchange.what, seconds - hidden,
            f"{exchange.formula} / ({{}} B/s x {{}}) + {{}} x {{}} s, less {{}} s hidden [{{}}]",
            (*exchange.numbers, link.bandwidth, LINK_EFFICIENCY, exchange.calls, latency, hidden, link.how),
        )  # fmt: skip
    if s.pipelined:
        idle = (s.stages - 1) / s.passes
        yield Line(
            "pipeline bubble",
            busy * idle,
            "{} s x ({} - 1) / ({} x {})",
            (busy, s.stages, plan.microbatches, plan.repeats),
        )
    touched = s.part * 4.0 * (2 + 2 * w.moments + 1)
    bandwidth = chip.hbm_bandwidth * HBM_EFFICIENCY
    yield Line(
        "optimizer",
        touched / bandwidth,
        "{} x 4 B x (2 + 2 x {} + 1) / ({} B/s x {})",
        (s.part, w.moments, chip.hbm_bandwidth, HBM_EFFICIENCY),
    )
    passes = s.runs
    read = passes * (s.forwards + 2) * s.layers / plan.repeats * s.layer_whole * s.number
    added = (passes - 1) * 3 * 4.0 * (s.layers / plan.repeats * s.layer_whole if s.once else s.part)
    saved = 2.0 * _saved(s)[0] * s.layers * plan.microbatches
    yield Line(
        "activations kept", saved / bandwidth, "{} B written and read / ({} B/s x {})",
        (saved, chip.hbm_bandwidth, HBM_EFFICIENCY),
    )  # fmt: skip
    yield Line(
        "weights and gradients", (read + added) / bandwidth, "({} B read + {} B of gradients summed) / ({} B/s x {})",
        (read, added, chip.hbm_bandwidth, HBM_EFFICIENCY),
    )  # fmt: skip
    if plan.remat == "offload":
        moved = 2.0 * s.stream * s.layers * plan.microbatches
        seconds = moved / chip.host
        hidden = min(HIDDEN_HOST * seconds, spare)
        yield Line(
            "host memory",
            seconds - hidden,
            "2 x {} B x {} layers x {} microbatches / {} B/s, less {} hidden",
            (s.stream, s.layers, plan.microbatches, chip.host, hidden),
        )


# ---- ranking -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rejected:
    """Plans that cannot be used for one reason."""

    reason: str
    count: int
    example: str
    """One of them: of those out of memory the one that comes closest, and by how much it does not fit."""


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Plans for a workload, best first."""

    workload: Workload
    topology: Topology
    objective: Objective
    best: tuple[Prediction, ...]
    """All that fit, best first; with the objective "cost" the best of each size of the topology."""
    rejected: tuple[Rejected, ...]


def meshes(devices: int) -> Iterator[MeshConfig]:
    """All ways to write a number of devices as a product of the four degrees."""
    for pipeline in _divisors(devices):
        for data in _divisors(devices // pipeline):
            for fsdp in _divisors(devices // pipeline // data):
                yield MeshConfig(pipeline, data, fsdp, devices // pipeline // data // fsdp)


#: No more than this times as many microbatches as stages are tried: the bubble is small by then.
MICROBATCHES_PER_STAGE = 16
#: Repeats of the circular schedule that are tried.
REPEATS = (1, 2, 4)


def candidates(workload: Workload, topology: Topology, mesh: MeshConfig) -> Iterator[Plan]:
    """Plans on one mesh that divides the model, without those that another beats in every respect by construction."""
    stages, cpu = mesh.pipeline, topology.chip.platform == "cpu"  # whose memory is the host's
    ways = mesh.data * mesh.fsdp
    if ways > workload.global_batch:
        return
    rows = padded_rows(workload.global_batch, 1, ways) // ways
    for microbatches in _spread(rows) if stages == 1 else _for_pipeline(rows, stages):
        for schedule, repeats, stage in _schedules(workload, stages, microbatches):
            for gather in get_args(Gather) if mesh.fsdp > 1 else ("layer",):
                if gather == "tick" and (microbatches == 1 or (stages > 1 and schedule == "gpipe" and not stage)):
                    continue  # "once", or whole weights kept for every tick
                for remat in get_args(Remat):
                    if remat == "offload" and (cpu or stages > 1):
                        continue  # libtpu 0.0.42 fails on some pipelines that offload: "async-start expects the shape"
                    yield Plan(mesh, microbatches, schedule, repeats, gather, remat, stage)


@functools.cache
def _cuts(rows: int) -> tuple[int, ...]:
    """Numbers of microbatches that the rows of a device can be cut into so that none of them is only padding."""
    return tuple(sorted({-(-rows // each) for each in range(1, rows + 1)}))


def _for_pipeline(rows: int, stages: int) -> list[int]:
    """Cuts of the rows that keep the stages busy, the least of them in any case.

    Between each two powers of two those that "1f1b" and "gpipe", which takes multiples of the stages, waste least in.
    """
    enough = [m for m in _cuts(rows) if m >= stages]
    busy = [m for m in enough if m <= MICROBATCHES_PER_STAGE * stages] or enough[:1]
    return sorted({*_least_padding(rows, busy), *_least_padding(rows, [m for m in busy if m % stages == 0])})


def _spread(rows: int) -> list[int]:
    """One cut between each two powers of two: enough of a choice where nothing else depends on their number."""
    return sorted({*_least_padding(rows, _cuts(rows)), rows})


def _least_padding(rows: int, cuts: Sequence[int]) -> list[int]:
    """Of numbers of microbatches, between each two powers of two the one that adds fewest rows, then the largest."""
    best: dict[int, int] = {}
    for m in cuts:  # ascending
        power, padded = (m - 1).bit_length(), -(-rows // m) * m
        if power not in best or padded <= -(-rows // best[power]) * best[power]:
            best[power] = m
    return list(best.values())


def _schedules(workload: Workload, stages: int, microbatches: int) -> Iterator[tuple[Any, int, bool]]:
    """(schedule, repeats, remat_stage) to try."""
    if stages == 1:
        yield "gpipe", 1, False
        return
    if microbatches % stages == 0:
        for repeats in REPEATS:
            if workload.num_layers % (stages * repeats) == 0:
                yield "gpipe", repeats, False
                yield "gpipe", repeats, True
    yield "1f1b", 1, False


def rank(
    workload: Workload,
    topology: Topology,
    objective: Objective = "time",
    only_mesh: MeshConfig | None = None,
) -> Ranking:
    """Every plan that fits, best first, and why the others do not.

    Objectives: "time" of a step; "memory" of a device; "cost", chip-hours of a trillion tokens, for which smaller
    topologies of the same chip are looked at as well. Within `TIE` of each other the simpler plan is the better.

    Raises:
        UserError: no plan fits, saying which would with the least memory, and what to change.
    """
    if objective not in get_args(Objective):
        raise UserError(f"objective {objective!r}: choose from {', '.join(get_args(Objective))}")
    best, rejected, closest = _fitting(workload, topology, only_mesh)
    if objective == "cost" and only_mesh is None:
        found = [(best, topology)] + [(_fitting(workload, t, None)[0], t) for t in topology.smaller]
        best = [min(plans, key=_order("time")) for plans, _ in found if plans]
    if not best:
        raise UserError(_nothing_fits(workload, topology, only_mesh, closest, rejected))
    return Ranking(workload, topology, objective, tuple(sorted(best, key=_order(objective))), rejected)


class OtherBatch(NamedTuple):
    """A batch near by that would be worked off markedly faster."""

    global_batch: int
    gain: float
    """Tokens/s more, as a share."""
    prediction: Prediction

    def __str__(self) -> str:
        return (
            f"with --data.global-batch {self.global_batch}, a multiple of the devices, tokens/s are {self.gain:.0%} "
            f"higher: {self.prediction.plan}"
        )


#: A batch near by is spoken of from this gain in tokens/s on, and if it differs by no more than this share.
MARKEDLY, NEAR_BY = 0.05, 0.25


def other_batch(ranking: Ranking) -> OtherBatch | None:
    """The multiple of the devices next below or above the batch that is worked off markedly faster, if one is.

    Of meshes those are tried that spread the batch over all devices, and that of the best plan.
    """
    workload, topology, best = ranking.workload, ranking.topology, ranking.best[0]
    below = workload.global_batch // topology.devices * topology.devices
    tried = {best.plan.mesh, *(m for m in meshes(topology.devices) if m.pipeline == m.tensor == 1)}
    found: list[OtherBatch] = []
    for batch in {below, below + topology.devices} - {0, workload.global_batch}:
        if abs(batch / workload.global_batch - 1) <= NEAR_BY:
            other = dataclasses.replace(workload, global_batch=batch)
            fitting = [p for mesh in tried for p in _fitting(other, topology, mesh)[0]]
            if fitting:
                fastest = min(fitting, key=_order("time"))
                gain = fastest.tokens / fastest.seconds / (best.tokens / best.seconds) - 1
                found.append(OtherBatch(batch, gain, fastest))
    return max((o for o in found if o.gain >= MARKEDLY), key=lambda o: o.gain, default=None)


def _order(objective: Objective) -> Any:
    def key(p: Prediction) -> tuple[Any, ...]:
        value = {"time": p.seconds, "memory": p.bytes, "cost": p.chip_hours}[objective]
        return (math.floor(math.log(value) / math.log1p(TIE)), p.simplicity, p.seconds, p.bytes, str(p.plan))

    return key


def _fitting(
    workload: Workload, topology: Topology, only_mesh: MeshConfig | None
) -> tuple[list[Prediction], tuple[Rejected, ...], Prediction | None]:
    """Plans that fit, the others by reason, and of those out of memory the one that needs least."""
    reasons: collections.Counter[str] = collections.Counter()
    examples: dict[str, str] = {}
    fitting: list[Prediction] = []
    least: tuple[float, str, Plan] | None = None

    def reject(kind: str, example: str) -> None:
        reasons[kind] += 1
        examples.setdefault(kind, example)

    for mesh in meshes(topology.devices) if only_mesh is None else (only_mesh,):
        why = mesh_refusal(workload, mesh, topology.devices, topology.slices)
        if why is not None:
            reject("does not divide the model or the sequence", f"{mesh}: {why}")
            continue
        tried = 0
        for plan in candidates(workload, topology, mesh):
            why = schedule_refusal(workload, plan)
            if why is not None:
                reject("does not divide the batch or the layers", f"{plan}: {why}")
                continue
            tried += 1
            needed = sum(line.value for line in _memory(_Shape(workload, topology, plan)))
            if needed <= limit(topology):
                fitting.append(predict(workload, topology, plan))
                continue
            reasons[_MEMORY] += 1
            least = min(least, (needed, str(plan), plan), key=lambda x: x[:2]) if least else (needed, str(plan), plan)
        if not tried:
            reject("cuts the batch into no microbatches", f"{mesh}: {_no_microbatch(workload, mesh)}")
    closest = predict(workload, topology, least[2]) if least else None
    if closest is not None:
        examples[_MEMORY] = f"{closest.plan}: {_over(closest)}"
    rejected = tuple(Rejected(kind, n, examples[kind]) for kind, n in reasons.most_common())
    return fitting, rejected, closest


_MEMORY = "out of memory"


def _no_microbatch(workload: Workload, mesh: MeshConfig) -> str:
    ways = mesh.data * mesh.fsdp
    if why := batch_refusal(workload.global_batch, 1, ways):
        return why
    return f"{-(-workload.global_batch // ways)} rows a device make no {mesh.pipeline} microbatches, one for each stage"


def _over(p: Prediction) -> str:
    return (
        f"{p.bytes / 1e9:.2f} GB predicted, {limit(p.topology) / 1e9:.2f} GB of {p.topology.chip.name} may be used: "
        f"{(p.bytes - limit(p.topology)) / 1e9:.2f} GB too many"
    )


def _nothing_fits(
    workload: Workload,
    topology: Topology,
    only_mesh: MeshConfig | None,
    closest: Prediction | None,
    rejected: Sequence[Rejected],
) -> str:
    what = f"plan: nothing fits for {workload.name} on {topology}" + (
        f" with the mesh {only_mesh}" if only_mesh else ""
    )
    if closest is None:
        if only_mesh is not None:
            raise UserError(f"plan: {rejected[0].example}")
        return (
            f"{what}: no mesh divides the model, or the batch of {workload.global_batch} has too few rows; take a "
            f"larger batch, or another number of chips. For example: {rejected[0].example}"
        )
    text = f"{what}: the smallest is {closest.plan} with {_over(closest)}. "
    if only_mesh is not None:
        return text + "Leave the mesh to the planner, or take a larger topology"
    larger = topology
    for _ in range(6):
        larger = larger.larger
        fitting = _fitting(workload, larger, None)[0]
        if fitting:
            least = min(fitting, key=_order("memory"))
            return (
                text + f"{larger} is enough, for example with {least.plan}; or shorten the sequence, or lower the batch"
            )
    return text + "Shorten the sequence, lower the batch, or take a chip with more memory"


def _divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


# ---- text --------------------------------------------------------------------------------------------------------


def explain(prediction: Prediction) -> list[str]:
    """The arithmetic of a prediction, a line for each term and one for each sum."""
    p = prediction
    text = [f"{p.plan} on {p.topology} (predicted, not measured)", "memory of a device:"]
    text += [line.text("bytes") for line in p.memory]
    text.append(
        f"  {'sum':26} {p.bytes / 1e9:9.3f} GB  of {p.topology.chip.hbm_bytes / 1e9:.2f} GB; {SPARE:.0%} must stay free"
    )
    text.append("time of a step:")
    text += [line.text("seconds") for line in p.time]
    text.append(f"  {'sum':26} {p.seconds * 1e3:9.2f} ms  for {p.tokens:,} tokens on {p.topology.devices} devices")
    for axis, link in p.topology.links(p.plan.mesh.degrees).items():
        text.append(f"  {axis:9} over {link.how}; each device sends {p.sent_bytes[axis] / 1e9:.3f} GB a step")
    text.append(f"chip: {p.topology.chip.source}")
    return text


def _utilisation(p: Prediction) -> str:
    """MFU, where the peak is a vendor's."""
    return "-" if p.topology.chip.nominal else f"{p.mfu('causal'):.1%} / {p.mfu('full'):.1%}"


def lines(ranking: Ranking, top: int = 10) -> list[str]:
    """A ranking as a person reads it: a table of the best plans, and why others were rejected."""
    head = f"{'step':>9} {'tokens/s':>11} {'MFU causal/full':>15} {'memory':>9} {'chips':>6} {'chip-hours/T':>13}  plan"
    text = [
        f"{ranking.workload.name} on {ranking.topology}, by {ranking.objective} (predicted, not measured; "
        f"{len(ranking.best):,} plans fit)",
        head,
    ]
    for p in ranking.best[:top]:
        where = f"  on {p.topology}" if p.topology != ranking.topology else ""
        text.append(
            f"{p.seconds:>8.3f}s {p.tokens / p.seconds:>11,.0f} {_utilisation(p):>15} {p.bytes / 1e9:>6.2f} GB "
            f"{p.topology.chips:>6} {p.chip_hours:>13,.0f}  {p.plan}{where}"
        )
    for r in ranking.rejected:
        text.append(f"rejected, {r.reason}: {r.count:,}; {'closest' if r.reason == _MEMORY else 'such as'} {r.example}")
    return text
