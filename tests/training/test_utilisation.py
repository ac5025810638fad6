"""Model FLOPs utilisation: only against a vendor's figure, with its convention and that figure beside it."""

import dataclasses
import io

import jax
import pytest

from parallel.topology import Peak
from training.metrics import ProgressLine
from training.program import Program

PEAK = Peak(989.4e12, "a data sheet")


def test_counts_the_flops_of_both_conventions_against_the_peak(tiny):
    mesh = tiny.mesh.build(jax.devices()[:8])
    tiny = dataclasses.replace(tiny, data=dataclasses.replace(tiny.data, chunks=1, samples_per_chunk=8))
    program = Program.plan(tiny, mesh)
    assert {program.throughput(0.5)[name] for name in ("mfu_causal", "mfu_full")} == {None}
    found = dataclasses.replace(program, peak=Peak(1e9, "made up")).throughput(0.5)
    tokens = 8 * 32 / 0.5
    for name, causal in (("mfu_causal", True), ("mfu_full", False)):
        assert found[name] == pytest.approx(tokens * tiny.model.train_flops_per_token(32, causal) / 1e9)
    assert found["mfu_full"] > found["mfu_causal"] > 0


@pytest.mark.parametrize(
    ("peak", "mfu", "said"),
    [(PEAK, 0.432, "MFU 43.2% (causal, of 989.4 bfloat16 TFLOP/s)  left"), (None, None, "MFU -  left")],
    ids=["known", "unknown"],
)
def test_the_progress_line_names_convention_and_peak(peak, mfu, said):
    stream = io.StringIO()
    values = {"loss": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "tokens_per_s": 10.0, "step_time_s": 1.0}
    ProgressLine(3, stream, peak=peak).show(2, values | {"mfu_causal": mfu})
    assert said in stream.getvalue()
