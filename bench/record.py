"""What every benchmark writes beside its figures: machine, versions, date."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from checkpoint.manifest import environment


def record(result: dict[str, Any], device: jax.Device, out: Path | None) -> None:
    """Print a result with where and when it was measured, and write it to ``out`` if there is one."""
    result = {
        **result,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {device.device_kind}",
        "python": platform.python_version(),
        "versions": environment(),
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text)
