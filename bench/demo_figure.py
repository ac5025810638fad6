"""The picture in the README: loss over the steps of a demo run (needs the `analysis` extra).

python bench/demo_figure.py runs/demo docs/demo-loss.svg
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from demo import FIRST_MESH, SECOND_MESH
from training.metrics import read_lines


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python bench/demo_figure.py RUN OUT.svg")
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    records = read_lines(run / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    validation = [r for r in records if r["kind"] == "validation"]
    resumed = next(e["step"] for e in read_lines(run / "ledger.jsonl") if e["event"] == "resume")

    plt.rcParams.update({"svg.hashsalt": "demo", "font.size": 9})
    figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    figure.patch.set_facecolor("white")
    axes.plot([r["step"] + 1 for r in train], [r["loss"] for r in train], color="#9db4d0", lw=0.9, label="training")
    steps, losses = [r["step"] for r in validation], [r["loss"] for r in validation]
    axes.plot(steps, losses, "o-", color="#1f4e8c", ms=4, label="validation, at each checkpoint")
    axes.axvline(resumed, color="#b3392f", lw=1, ls="--")
    text = f"SIGKILL on {FIRST_MESH};\ncontinued on {SECOND_MESH}"
    axes.annotate(text, (resumed, 5.6), xytext=(6, 0), textcoords="offset points", color="#b3392f")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
