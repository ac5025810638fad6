"""A data directory while it is being made."""

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from data.folder import WORK, working
from errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_two_processes_do_not_write_in_one_folder(tmp_path):
    """And a process that is killed leaves no lock."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom data.folder import working\n"
        "with working(Path(sys.argv[1]), 'x'):\n    print('in', flush=True)\n    time.sleep(60)\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "set"], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )
    try:
        other.stdout.readline()
        with (
            pytest.raises(UserError, match="set: another process prepares it; wait until it ends, or stop it"),
            working(tmp_path / "set", "x"),
        ):
            pass
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    with working(tmp_path / "set", "x") as work:
        assert work == tmp_path / "set" / WORK
    assert not work.exists()


def test_a_file_system_without_locks_is_enough(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with working(tmp_path / "set", "x") as work:
        assert work.is_dir()
