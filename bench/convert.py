"""Full-size import and export: time and peak memory, and the speed of import against a plain copy of the same files.

Writes a Hugging Face folder of the recipe's model with made-up weights (bfloat16), copies it with cp and sync, imports
it, exports the checkpoint again and compares the weight files. Each verb runs in a process of its own, whose peak
resident memory the system reports. The disk needs four times the folder.

    python bench/convert.py [--recipe amber_7b] [--dtype bfloat16] [--dir SCRATCH] [--out bench/results/NAME.json]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import ml_dtypes
import numpy as np
from record import record

from huggingface.writer import FolderWriter
from models import formats, recipes

RUN = Path(__file__).resolve().parent.parent / "run.py"


def make_folder(path, recipe, dtype):
    """Weights of a plausible size; those of two tensors differ, but come from one pool of random numbers."""
    model = recipes()[recipe]().model
    form = next(f for f in formats().values() if f.model is type(model))
    table = form.tensors(model)
    pool = np.random.default_rng(0).normal(0, 0.02, 2**25 + 1).astype(dtype)
    with FolderWriter(path, {r.theirs: (pool.dtype, r.shape) for r in table}, shard_bytes=5 * 10**9) as writer:
        for number, row in enumerate(table):
            size = int(np.prod(row.shape))
            tensor = np.resize(np.roll(pool, number * 7919), size).reshape(row.shape)
            if len(row.shape) == 1 and not row.theirs.endswith("bias"):
                tensor = (1 + tensor.astype(np.float32)).astype(dtype)  # a norm's gain
            writer.write(row.theirs, tensor)
        config = form.config_to_hf(model) | {"torch_dtype": dtype.name}
        writer.text("config.json", json.dumps(config))
        writer.commit()
    return max(int(np.prod(r.shape)) for r in table) * dtype.itemsize


def timed(command):
    """Seconds, peak resident bytes and standard output of a process."""
    os.sync()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command} failed with {process.returncode}")
    subprocess.run(["sync", "-f", "."], check=True)
    return time.perf_counter() - start, usage.ru_maxrss * 1024, output


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="amber_7b", choices=[*recipes()])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--dir", type=Path, default=Path("runs/bench-convert"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = np.dtype(getattr(ml_dtypes, args.dtype, args.dtype))
    folder, copy, run, back = (args.dir / name for name in ("folder", "copy", "run", "back"))
    shutil.rmtree(args.dir, ignore_errors=True)
    args.dir.mkdir(parents=True)
    largest = make_folder(folder, args.recipe, dtype)
    weights = sorted(p.name for p in folder.glob("*.safetensors"))
    size = sum((folder / name).stat().st_size for name in weights)

    copy_s, _, _ = timed(["cp", "-r", str(folder), str(copy)])
    shutil.rmtree(copy)
    verb = [sys.executable, str(RUN)]
    import_s, import_peak, output = timed([*verb, "import", str(folder), "--run", str(run), "--as", "0", "--json"])
    imported = json.loads(output)
    export_s, export_peak, output = timed([*verb, "export", f"{run}@0", "--out", str(back), "--json"])
    exported = json.loads(output)
    same = all(subprocess.run(["cmp", str(folder / n), str(back / n)], check=False).returncode == 0 for n in weights)

    limit = 3 * largest + 2**30
    seconds = imported["seconds"]
    result = {
        "benchmark": "convert",
        "recipe": args.recipe,
        "dtype": args.dtype,
        "weight_bytes": size,
        "copy_s": copy_s,
        "import_s": {"whole verb": import_s, **seconds},
        "export_s": {"whole verb": export_s, **exported["seconds"]},
        "import_speed_over_copy": copy_s / seconds["copy"],
        "import_with_proof_speed_over_copy": copy_s / import_s,
        "peak_bytes": {"import": import_peak, "export": export_peak, "limit (3 largest tensors + 1 GiB)": limit},
        "exported_weight_files_equal_the_original": same,
        "parity": {k: v for k, v in imported["parity"].items() if k not in ("digests", "tokens")},
    }
    record(result, jax.devices("cpu")[0], args.out)
    shutil.rmtree(args.dir)


if __name__ == "__main__":
    main()
