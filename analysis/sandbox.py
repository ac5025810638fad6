"""Running a program that nobody has read, such as one that a model wrote: apart from everything, and within limits.

    verdict = Sandbox(Limits(seconds=3.0)).run("assert 1 + 1 == 2")

Each program is a process of its own, in new namespaces (no network, no other process in sight), whose root holds the
Python installation and /usr, all read-only, and one small scratch folder; without capabilities and, where this process
is root, as a user that owns nothing. Homes, credentials, runs and data are not in that root. All of its processes are
killed at the end, whatever they did.

What remains: the program shares an interpreter with the code that starts it, so one that digs through its frames can
find the mark of completion and pass without being right; the kernel is shared; memory is limited by process, not for
all of them together. Good enough to measure models, not for programs of somebody who wants to break out.
"""

import builtins
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from errors import RunError, UserError

NONE = "none (limits on time, memory and files only)"
_START_SECONDS = 60.0  # for namespaces, mounts and Python to be there: no part of the program's time
_REPORT_BYTES = 4096  # more than a report ever has; less than a pipe holds, so that reading it never waits
_TOOLS = ("unshare", "setpriv", "mount", "umount", "pivot_root", "sh")
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SCRATCH = "/sandbox"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"

# Arguments: an empty folder, the scratch's mount options, setpriv's options for the user; then what the root holds,
# "--", and the command. The shell stays process 1 of its namespace: it cannot be killed from inside, it dies with
# `unshare` (which a process that changed its user would not), and all others die with it.
_ROOT = r"""
set -eu
umask 022  # the program's user must be able to enter what is made here
root=$1 scratch=$2 user=$3; shift 3
echo 1000 >/proc/self/oom_score_adj || :  # if memory runs out, not the caller is killed
mount -t tmpfs -o size=1m,mode=755 none "$root"
cd "$root"
mkdir sandbox sandbox-old
ln -s sandbox-old/proc proc  # umount reads it, and then it leads nowhere
while [ "$1" != -- ]; do
  mkdir -p ".$(dirname "$1")"
  if [ -L "$1" ]; then ln -s "$(readlink "$1")" ".$1"
  elif [ -d "$1" ]; then mkdir -p ".$1"; mount --rbind "$1" ".$1"
  else : >".$1"; mount --bind "$1" ".$1"; fi
  shift
done
shift
while read -r _ _ _ _ point _; do
  point=$(printf %b "$point")
  case $point in "$root" | "$root"/*) mount -o remount,bind,ro "$point" ;; esac
done </proc/self/mountinfo
mount -t tmpfs -o "$scratch" none sandbox
pivot_root . sandbox-old
cd /sandbox
umount -l /sandbox-old
setpriv $user --no-new-privs --inh-caps=-all --bounding-set=-all -- "$@" || exit $?
"""

# Reads the limits as arguments, a nonce and the program from the file that is its input. Writes "+" to its output when
# the program is about to start, then the nonce if it ran to its end, or the name of what it raised.
_RUNNER = r"""
import ctypes, os, resource, sys
seconds, memory, file, processes = map(int, sys.argv[1:])
for name, limit in (("AS", memory), ("DATA", memory), ("FSIZE", file), ("NPROC", processes), ("CPU", seconds),
                    ("NOFILE", 64), ("CORE", 0), ("STACK", 64 << 20)):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(kind, (limit, limit))
# Neither namespaces nor another user leave the caller's keys behind: join a session keyring that is new and empty.
# Where the kernel has or allows no keyrings, the program can read none either.
join = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine)
if join:
    ctypes.CDLL(None).syscall(ctypes.c_long(join), ctypes.c_long(1), None)
text = os.read(0, 64)
program = b""
while part := os.read(0, 1 << 20):
    program += part
report, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
for fd in (0, 1, 2):
    os.dup2(null, fd)
os.close(null)
os.write(report, b"+")
try:
    exec(program.decode(), {})
except BaseException as error:
    os.write(report, type(error).__name__.encode()[:99])
    os._exit(1)
os.write(report, text)
os._exit(0)
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 3.0
    """Of the clock, from the program's first line on."""
    memory_mib: int = 1024
    """Address space of each process."""
    file_mib: int = 1
    """Of each file."""
    scratch_mib: int = 16
    """Of all files together."""
    processes: int = 8
    """At a time, threads included."""

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise UserError(f"limits: seconds={self.seconds} must be above 0, and at most 3600")
        for name in ("file_mib", "scratch_mib", "processes"):
            if getattr(self, name) < 1:
                raise UserError(f"limits: {name}={getattr(self, name)} must be at least 1")
        if self.memory_mib < 64:
            raise UserError(f"limits: memory_mib={self.memory_mib} is less than Python needs to start; give 64 or more")


@dataclass(frozen=True)
class Verdict:
    """What became of a program."""

    passed: bool
    """It ran to its end, and nothing was raised."""
    reason: str
    """``passed``, ``timeout``, the name of a built-in exception, ``other exception``, or ``ended early``: it exited or
    was killed without any of these."""
    seconds: float


class Sandbox:
    """Runs programs; may be used by several threads.

    Args:
        limits: of each program.
        unsafe: run them without isolation, within the limits alone, as this user: they can read, change and send
            whatever this user can. Nothing is probed then.
    """

    def __init__(self, limits: Limits = Limits(), unsafe: bool = False):
        self.limits, self.unsafe = limits, unsafe

    @cached_property
    def isolation(self) -> str:
        """How programs are isolated here; tried out once.

        Raises:
            RunError: this machine does not allow it; the message says what failed.
        """
        if self.unsafe:
            return NONE
        advice = "programs are not run without isolation, unless --unsafe says so (they can then do all that you can)"
        missing = [tool for tool in _TOOLS if shutil.which(tool, path=_PATH) is None]
        if sys.platform != "linux" or missing:
            raise RunError(f"cannot isolate programs: needs Linux with {', '.join(missing or _TOOLS)}; {advice}")
        try:
            verdict = self._run("pass", isolated=True)
        except RunError as e:
            raise RunError(f"cannot isolate programs here ({e}); {advice}") from e
        if not verdict.passed:
            raise RunError(f"cannot isolate programs: an empty one ended with {verdict.reason!r}; raise the limits")
        who = "as a user of its own" if _free_user() is not None else "as this user, without capabilities"
        return f"namespaces (network, processes, files), {who}"

    def run(self, program: str) -> Verdict:
        """Run one program.

        Raises:
            RunError: no isolation here (see `isolation`), or the program could not be started.
        """
        return self._run(program, isolated=self.isolation != NONE)

    def run_many(self, programs: Sequence[str], workers: int = 1) -> list[Verdict]:
        """Run programs, several at a time; verdicts in their order. Equal programs are run once. Raises as `run`."""
        if workers < 1:
            raise UserError(f"programs: workers={workers} must be at least 1")
        if not programs:
            return []
        isolated = self.isolation != NONE
        unique = list(dict.fromkeys(programs))
        with ThreadPoolExecutor(workers) as pool:
            verdicts = dict(zip(unique, pool.map(lambda p: self._run(p, isolated), unique), strict=True))
        return [verdicts[p] for p in programs]

    def _run(self, program: str, isolated: bool) -> Verdict:
        limits, nonce = self.limits, secrets.token_hex(32).encode()  # 64 bytes, as the runner expects
        arguments = [int(limits.seconds) + 2, limits.memory_mib << 20, limits.file_mib << 20, limits.processes]
        command = [sys.executable, "-I", "-B", "-c", _RUNNER, *map(str, arguments)]
        with (
            tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as given,
            tempfile.TemporaryFile() as complaint,
        ):
            given.write(nonce + program.encode(errors="replace"))
            given.seek(0)
            home = _SCRATCH if isolated else folder
            try:
                process = subprocess.Popen(
                    _isolated(command, folder, limits) if isolated else command,
                    stdin=given,
                    stdout=subprocess.PIPE,
                    stderr=complaint,
                    cwd=folder,
                    env=_environment(home),
                    start_new_session=True,
                )
            except OSError as e:
                raise RunError(f"a program could not be started: {e.strerror}") from e
            with process:
                assert process.stdout is not None
                try:
                    started, _ = _read(process.stdout.fileno(), 1, _START_SECONDS)
                    begin = time.monotonic()
                    report, ended = _read(process.stdout.fileno(), _REPORT_BYTES, limits.seconds if started else 0)
                    seconds = time.monotonic() - begin
                finally:
                    # Not before the end was seen or time is up, so that its process group is still this one.
                    os.killpg(process.pid, signal.SIGKILL)
            if not started:
                complaint.seek(0)
                text = complaint.read(_REPORT_BYTES).decode(errors="replace").strip()
                raise RunError(f"a program could not be started: {text or f'nothing in {_START_SECONDS:.0f} s'}")
        # By the clock too: what came just after the limit may have been there when it was looked for.
        late = seconds > limits.seconds
        if not ended or late:
            return Verdict(False, "timeout" if late or len(report) < _REPORT_BYTES else "other exception", seconds)
        return Verdict(report == nonce, _reason(report, nonce), seconds)


def _read(fd: int, most: int, seconds: float) -> tuple[bytes, bool]:
    """What comes out of a pipe, at most so many bytes: when it ends, it has come, or time is up; and if it ended."""
    data, deadline = b"", time.monotonic() + seconds
    while len(data) < most:
        if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            return data, False
        part = os.read(fd, most - len(data))
        if not part:
            return data, True
        data += part
    return data, False


def _reason(report: bytes, nonce: bytes) -> str:
    if report == nonce:
        return "passed"
    if not report:
        return "ended early"
    name = report.decode(errors="replace")  # the program could have written it: only known words are repeated
    kind = getattr(builtins, name, None)
    return name if isinstance(kind, type) and issubclass(kind, BaseException) else "other exception"


def _environment(home: str) -> dict[str, str]:
    """All that a program sees of the environment: nothing of this process's."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": _PATH, "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", **threads}


def _isolated(command: Sequence[str], folder: str, limits: Limits) -> list[str]:
    """The command inside namespaces and a root of its own; `folder` is an empty one."""
    unshare = ["unshare", "--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
    scratch, user = f"size={limits.scratch_mib}m,nr_inodes=10k,nosuid,nodev,mode=700", ""
    identity = _free_user()
    if identity is None:
        unshare.append("--map-root-user")
    else:
        scratch += f",uid={identity},gid={identity}"
        user = f"--reuid={identity} --regid={identity} --clear-groups"
    root = os.path.realpath(folder)
    return [*unshare, "sh", "-c", _ROOT, "sandbox", root, scratch, user, *_visible(), "--", *command]


def _free_user() -> int | None:
    """A user and group id that nothing belongs to, by chance one that no other program has; None if this is not root.

    Limits on processes count those of a user, and do not hold for root.
    """
    if os.geteuid() != 0:
        return None
    ends = []
    for name in ("uid_map", "gid_map"):
        inside, _, count = map(int, Path(f"/proc/self/{name}").read_text().split("\n")[-2].split())
        ends.append(min(inside + count, 2**31) if count > 1000 else 0)
    end = min(ends)
    return end - 1 - secrets.randbelow(end // 2) if end else None


def _visible() -> list[str]:
    """What is in a program's root: the system's programs and libraries, and Python with its packages."""
    python, executable = [sys.prefix, sys.base_prefix], sys.executable
    while True:  # a virtual environment's Python is a link, perhaps to a link
        python.append(os.path.dirname(executable))
        if not os.path.islink(executable):
            break
        executable = os.path.join(os.path.dirname(executable), os.readlink(executable))
    paths: list[str] = []
    for path in [*_SYSTEM, *_DEVICES, *sorted(map(os.path.normpath, python), key=len)]:
        if os.path.lexists(path) and not any(f"{path}/".startswith(f"{p}/") for p in paths):
            paths.append(path)
    return paths
